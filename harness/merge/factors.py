"""Which adapters are merged, with what factor, in which order, and their factors as arrays.

The order is canonical (by the contents' SHA-256), so that no relabelling and no order on the
command line can change a bit of the result. Reads safetensors with numpy alone. Knows nothing of
bases, strategies' arithmetic or outputs.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME, AdapterFiles, PairEntry, read_adapter
from harness.errors import InputError, combined
from harness.files.digests import file_digests
from harness.files.tensor_files import TensorEntry
from harness.fit import check_adapters_together
from harness.merge.places import changed
from harness.merge.storage import RAW, decode
from harness.preflight import check_adapter_values
from harness.stack import Adapter, weight_fault

__all__ = [
    "DOUBLED_WEIGHT",
    "Source",
    "Term",
    "adapter_names",
    "check_weights",
    "open_sources",
    "terms_by_module",
    "too_large",
]

Array = NDArray[Any]

#: How a double weight is asked for, for who named one adapter twice.
DOUBLED_WEIGHT = "--weights 2"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One adapter of a merge.

    Attributes:
        weight: what its deltas are multiplied with.
        digest: SHA-256 of its config and weights.
    """

    name: str
    files: AdapterFiles
    weight: float
    digest: str
    data: mmap.mmap

    def array(
        self,
        entry: TensorEntry,
        dtype: type[np.floating[Any]],
        cut: Callable[[Array], Array] | None = None,
    ) -> Array:
        """The tensor of *entry*, or what *cut* takes of it, as numbers of *dtype*; a read-only
        view where that is possible.

        Raises:
            InputError: the file became shorter. What is gone from under a map ends the process.
        """
        if self.data.size() < entry.end:
            raise changed(self.files.tensors.path)
        raw = np.frombuffer(self.data, np.uint8, entry.end - entry.start, entry.start)
        kind = np.dtype(RAW[entry.dtype])
        aligned = raw if entry.start % kind.itemsize == 0 else raw.copy()
        numbers = aligned.view(kind).reshape(entry.shape)
        if cut is not None:
            numbers = cut(numbers)
        return numbers if kind == dtype else decode(numbers, entry.dtype, dtype)

    def release(self, entry: TensorEntry) -> None:
        """Give the pages of *entry* back; they are read again from the file when needed."""
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one adapter adds to one stored weight: `weight · scale · left @ right`.

    `left: (rows, r)` and `right: (r, columns)` in the stored weight's own layout; for embeddings
    and `Conv1D` that is Aᵀ and Bᵀ.

    Attributes:
        module: the name of the pair in the adapter.
        parameter: the name that the config's patterns see, where it is not the module's.
        expert: which expert of a fused parameter; None for a module.
        part: the rows `(start, end)` of ΔW that belong to this weight (gate and up stored apart).
        flipped: the fused parameter is stored `(experts, in, out)`.
    """

    source: Source
    module: str
    parameter: str | None = None
    expert: int | None = None
    part: tuple[int, int] | None = None
    flipped: bool = False

    @property
    def scale(self) -> float:
        """`s` of the module (`alpha/r`, or `alpha/√r`)."""
        return self.source.files.config.scale_of(self.parameter or self.module)

    @property
    def pair(self) -> PairEntry:
        return self.source.files.pairs[self.module]

    @property
    def rank(self) -> int:
        return self.pair.rank // self.pair.experts

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is `(in, out)`."""
        return self.flipped or self.source.files.config.fan_in_fan_out or self.pair.embedding

    def release(self) -> None:
        """Give the factors' pages back: memory stays flat however large the adapters are."""
        self.source.release(self.pair.a)
        self.source.release(self.pair.b)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the stored weight (of one expert's) that the term belongs to."""
        start, end = self.part or (0, self.pair.out_features)
        shape = (end - start, self.pair.in_features)
        return shape[::-1] if self.transposed else shape

    def left(self, dtype: type[np.floating[Any]], rows: slice = slice(None)) -> Array:
        """The left factor's *rows*, without scale or weight; not to be written to."""
        return self._in(dtype).T[rows] if self.transposed else self._out(dtype)[rows]

    def right(self, dtype: type[np.floating[Any]]) -> Array:
        """The right factor, without scale or weight; not to be written to."""
        return self._out(dtype).T if self.transposed else self._in(dtype)

    def _in(self, dtype: type[np.floating[Any]]) -> Array:
        """A: `(r, in)`; PEFT keeps a fused parameter's as `(experts·r, in)`."""
        expert, experts = self.expert, self.pair.experts

        def cut(a: Array) -> Array:
            return a if expert is None else a.reshape(experts, -1, a.shape[1])[expert]

        return self.source.array(self.pair.a, dtype, cut)

    def _out(self, dtype: type[np.floating[Any]]) -> Array:
        """B: `(out, r)`, the part's rows; PEFT keeps a fused parameter's as `(out, r·experts)`."""
        expert, experts = self.expert, self.pair.experts
        rows = slice(*self.part) if self.part else slice(None)

        def cut(b: Array) -> Array:
            own = b if expert is None else b.reshape(b.shape[0], -1, experts)[:, :, expert]
            return own[rows]

        return self.source.array(self.pair.b, dtype, cut)


def adapter_names(paths: Sequence[str | Path]) -> dict[str, str]:
    """A name for each adapter folder, made of its path: `style`, `stage1-checkpoint-120`, …"""
    named: dict[str, str] = {}
    for number, source in enumerate(paths, start=1):
        path = Path(source)
        name = _slug(path.name)
        if name.startswith("checkpoint") and path.parent.name:
            name = _slug(f"{path.parent.name}-{name}")
        if not name or name in named or name in ("base", "stacked", "all", "none"):
            name = f"adapter{number}"
        named[name] = str(source)
    return named


def _slug(text: str) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in text)
    plain = plain.strip("-_")
    return plain if plain[:1].isalpha() else ""


def check_weights(
    weights: Sequence[float] | None, names: Sequence[str], *, where: str = "--weights"
) -> tuple[float, ...]:
    """One finite weight an adapter, in the order of *names*; 1 each if None.

    Raises:
        InputError: another number of weights than adapters; NaN, infinity or an absurd size.
    """
    if weights is None:
        return (1.0,) * len(names)
    if len(weights) != len(names):
        raise InputError(
            f"{len(weights)} weights for {len(names)} adapters",
            where=where,
            remedy="give one number an adapter, in the order of --adapters",
        )
    for name, weight in zip(names, weights, strict=True):
        if fault := weight_fault(weight):
            raise InputError(f"{name}: {fault}", where=where, remedy="e.g. 0.7 0.3")
    return tuple(float(weight) for weight in weights)


def open_sources(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    accept: Collection[str] = (),
    what: str = "merged",
    trust_remote_code: bool = False,
) -> tuple[Source, ...]:
    """Open the adapters, in canonical order, and check that every number in them is finite.

    Args:
        accept: what makes an adapter more than `W + s·B·A` (keys of its config) and is accepted.
        what: what they are opened for, for the message.
        trust_remote_code: let through config fields by which loaders run code; none does here.

    Raises:
        InputError: a broken or non-additive adapter; NaN, infinity or an absurd size in a factor;
            an adapter that changes nothing; two with the same weights.
    """
    every = [adapter.path / name for adapter in adapters for name in (CONFIG_NAME, WEIGHTS_NAME)]
    found = [
        (adapter, read_adapter(adapter.path, trust_remote_code=trust_remote_code))
        for adapter in adapters
    ]
    faults: list[InputError] = []
    together = {adapter.name: files for adapter, files in found}
    check_adapters_together(adapters, together, faults, doubled=DOUBLED_WEIGHT)
    for _, files in found:
        check_adapter_values(files, faults)
        reasons = [r for r in files.config.not_additive if r.partition(":")[0] not in accept]
        if reasons:
            raise InputError(
                f"cannot be {what}: {reasons[0]}",
                where=files.config.path,
                remedy="only plain LoRA and rsLoRA adapters are additive",
            )
    if faults:
        raise combined(faults)
    digests = file_digests(every)
    sources = []
    for (adapter, files), weight in zip(found, weights, strict=True):
        with files.tensors.path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        hashed = hashlib.sha256()  # as `adapter_digest` does, of digests that may be remembered
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            hashed.update(bytes.fromhex(digests[adapter.path / name]))
        source = Source(
            name=adapter.name, files=files, weight=weight, digest=hashed.hexdigest(), data=data
        )
        sources.append(source)
    return tuple(sorted(sources, key=lambda source: (source.digest, source.weight)))


def terms_by_module(sources: Sequence[Source]) -> Mapping[str, tuple[Term, ...]]:
    """The terms of every adapted module, in the sources' order."""
    found: dict[str, list[Term]] = {}
    for source in sources:
        for module in source.files.pairs:
            found.setdefault(module, []).append(Term(source=source, module=module))
    return {module: tuple(terms) for module, terms in found.items()}


def too_large(name: str, most: float, limit: float, terms: Sequence[Term]) -> InputError:
    """The refusal of a sum that would put *most* into the tensor *name*, where *limit* is what
    sound ones hold."""
    files = dict.fromkeys(str(term.source.files.tensors.path) for term in terms)
    return InputError(
        f"{name!r}: would hold {most:.3g}, beyond {limit:g}",
        where=" and ".join(files) or None,
        remedy="choose smaller --weights or a smaller lora_alpha, or train the adapter again",
    )
