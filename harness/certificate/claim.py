"""What the files say about a mode: the base's tensors and the adapters' factors, by live name.

The source of truth of every check. Knows the file names that transformers maps while loading
(tied heads, dropped prefixes, fused experts); knows nothing of live models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.adapter_files import AdapterFiles, read_adapter
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.errors import InputError
from harness.lora import LoraPair
from harness.stack import STACKED_MODE, AdapterStack, Mode

__all__ = ["Claim", "Part", "read_claim"]

_PREFIXES = ("model.", "transformer.", "base_model.model.")
_FUSED = re.compile(r"(?P<experts>.+\.experts)\.(?P<which>gate_up_proj|down_proj)")
_RENAMED = {"lm_head.weight": "embed_out.weight"}  # of GPT-NeoX
_TIED_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a live tensor and the file's tensor for it.

    Attributes:
        index: where the piece lies in the live tensor; `()` for all of it.
    """

    index: tuple[int | slice, ...]
    file_name: str
    stored: Tensor


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A stack and one mode of it, as the files have it.

    Attributes:
        files: every adapter of the stack, in the mode or not.
        weights: every adapter's weight in the mode; 0 for one that is off.
    """

    stack: AdapterStack
    mode: Mode
    checkpoint: CheckpointFiles
    files: Mapping[str, AdapterFiles]
    weights: Mapping[str, float]

    def pairs(self, module: str) -> dict[str, LoraPair]:
        """The factors of *module*, by adapter."""
        return {name: f.pair(module) for name, f in self.files.items() if module in f.pairs}

    def terms(self, module: str) -> dict[str, tuple[float, LoraPair]]:
        """`(weight, pair)` of the adapters that the mode applies to *module*."""
        pairs = self.pairs(module)
        return {n: (w, pairs[n]) for n, w in self.weights.items() if w != 0 and n in pairs}

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that some adapter of the stack adapts."""
        return tuple(dict.fromkeys(m for f in self.files.values() for m in f.pairs))

    def parts(self, name: str) -> tuple[Part, ...]:
        """The file's tensors for the live base tensor *name*; empty if the files have none."""
        found = self._file_name(name)
        if found is not None:
            stored = self.checkpoint.tensor(found)
            return (Part(index=(), file_name=found, stored=stored),)
        return self._fused(name)

    def unclaimed(self, names: Iterable[str], ignored: Iterable[str] = ()) -> list[str]:
        """The files' tensors that none of the live tensors *names* stands for.

        Args:
            ignored: regular expressions of what the model's class leaves out on purpose.
        """
        taken: set[str] = set()
        for name in names:
            found = self._file_name(name)
            taken |= {found} if found else {part.file_name for part in self._fused(name)}
        patterns = (*ignored, r"rotary_emb\.inv_freq")  # old checkpoints keep one in each layer
        return [
            name
            for name in self.checkpoint.places
            if name not in taken and not any(re.search(p, name) for p in patterns)
        ]

    def _file_name(self, name: str) -> str | None:
        places = self.checkpoint.places
        candidates = [name]
        for prefix in _PREFIXES:
            candidates += [prefix + name, name.removeprefix(prefix)]
        candidates += [_RENAMED[name]] if name in _RENAMED else []
        found = next((candidate for candidate in candidates if candidate in places), None)
        if found is None and self.checkpoint.tied and name in _TIED_HEADS:
            found = self.checkpoint.embedding_name
        return found

    def _fused(self, name: str) -> tuple[Part, ...]:
        """Experts that transformers stacks into one parameter: `(experts, out, in)`."""
        match = _FUSED.fullmatch(name)
        if match is None:
            return ()
        halves = ("gate_proj", "up_proj") if match["which"] == "gate_up_proj" else ("down_proj",)
        parts: list[Part] = []
        number = 0
        while True:
            names = [f"{match['experts']}.{number}.{half}.weight" for half in halves]
            if any(self._file_name(file_name) is None for file_name in names):
                return tuple(parts)
            start = 0
            for file_name in names:
                stored = self.checkpoint.tensor(file_name)
                end = start + stored.shape[0]
                parts.append(
                    Part(index=(number, slice(start, end)), file_name=file_name, stored=stored)
                )
                start = end
            number += 1


def read_claim(stack: AdapterStack, mode: Mode | str) -> Claim:
    """Read the headers of the stack's files; the tensors stay on disk.

    Raises:
        InputError: a broken folder, an unknown mode, an adapter that is not additive, a base that
            is quantised.
    """
    chosen = _mode(stack, mode)
    files = {adapter.name: read_adapter(adapter.path) for adapter in stack.adapters}
    for adapter in stack.adapters:
        reasons = files[adapter.name].config.not_additive
        if reasons:
            raise InputError(
                f"cannot be certified: {reasons[0]}",
                where=files[adapter.name].config.path,
                remedy="only plain LoRA and rsLoRA adapters are additive; see docs/certificate.md",
            )
    weights = dict.fromkeys(files, 0.0) | dict(chosen.weights)
    checkpoint = read_checkpoint(stack.base.path)
    checkpoint.refuse_quantised()
    return Claim(
        stack=stack,
        mode=chosen,
        checkpoint=checkpoint,
        files=files,
        weights=weights,
    )


def _mode(stack: AdapterStack, mode: Mode | str) -> Mode:
    if isinstance(mode, Mode):
        for name in mode.adapters:
            stack.adapter(name)
        return mode
    if mode == STACKED_MODE:  # also of a stack with one adapter
        return Mode(name=STACKED_MODE, weights=tuple((a.name, 1.0) for a in stack.adapters))
    return stack.mode(mode)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits (NaN equals itself, 0.0 is not -0.0)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.dtype.is_floating_point:
        return torch.equal(first, second)
    first, second = first.contiguous(), second.contiguous()
    # Eight bytes at a time: comparing as many small integers takes three times as long.
    if first.ndim and first.shape[-1] * first.dtype.itemsize % 8 == 0 and _aligned(first, second):
        return torch.equal(first.view(torch.int64), second.view(torch.int64))
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[first.dtype.itemsize]
    return torch.equal(first.view(bits), second.view(bits))


def _aligned(*tensors: Tensor) -> bool:
    """Whether each begins at a multiple of eight bytes of its storage, so that it can be viewed."""
    return all(t.storage_offset() * t.dtype.itemsize % 8 == 0 for t in tensors)
