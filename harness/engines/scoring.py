"""What a live model thinks of given tokens: teacher forcing, in one forward pass or step by step.

The head is applied only where a token was produced, and few positions at a time: float32 logits of
a 150,000-token vocabulary take 0.6 MB each. Also the same pass in another precision, which is what
noise floors are measured against. Knows nothing of snapshots or verdicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from harness.completion import Application
from harness.engines.inspection import bare_model
from harness.engines.padding import padded
from harness.evidence import TOP, Evidence
from harness.memory import keep_freed_pages
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine

__all__ = ["ScoreRow", "in_precision", "score", "score_stepwise"]

_TOKENS = {"cpu": 2048}  # in one forward pass, padding included
_TOKENS_ELSEWHERE = 16_384
_LOGIT_BYTES = {"cpu": 256 << 20}
_LOGIT_BYTES_ELSEWHERE = 2 << 30
# Positions whose float32 distributions are held at a time: on a CPU as many as its cache holds.
_ROW_BYTES = {"cpu": 4 << 20}
_ROW_BYTES_ELSEWHERE = 64 << 20
_DEEP = 64  # rows of the columns in which the highest logits are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """A prompt's token ids and the produced ones to be scored after it (at least one)."""

    prompt: tuple[int, ...]
    produced: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions that the model sees: the last produced token predicts nothing."""
        return len(self.prompt) + len(self.produced) - 1


def score(
    engine: PeftEngine,
    rows: Sequence[ScoreRow],
    mode: Mode | str,
    *,
    application: Application = Application.LIVE,
    batch_size: int | None = None,
) -> list[Evidence]:
    """Evidence of every row's produced tokens, by teacher forcing.

    Rows of like length go together, as many as the token budget holds, padded on the right, where
    causal attention never looks: so no mask is passed, and the kernels for plain causal attention
    serve.

    Args:
        batch_size: rows in one pass at most.
    """
    if torch.device(engine.device).type == "cpu":
        keep_freed_pages()
    found: dict[int, Evidence] = {}
    with engine.mode(mode, application), torch.inference_mode(), engine.threads():
        for batch in _batches(engine, rows, batch_size):
            evidence = _score_batch(engine, [rows[place] for place in batch])
            found |= zip(batch, evidence, strict=True)
    return [found[place] for place in range(len(rows))]


def _batches(
    engine: PeftEngine, rows: Sequence[ScoreRow], batch_size: int | None
) -> Iterator[list[int]]:
    kind = torch.device(engine.device).type
    tokens = _TOKENS.get(kind, _TOKENS_ELSEWHERE)
    head = bare_model(engine.model).get_output_embeddings()
    width = 4 if engine.dtype == "float32" else 2
    vocabulary = head.weight.shape[0] if head is not None else len(engine.tokenizer)
    positions = _LOGIT_BYTES.get(kind, _LOGIT_BYTES_ELSEWHERE) // (vocabulary * width)
    batch: list[int] = []
    produced = 0
    for place in sorted(range(len(rows)), key=lambda place: (rows[place].length, place)):
        row = rows[place]
        longest = row.length  # so far: rows come in rising length
        full = (
            (len(batch) + 1) * longest > tokens
            or produced + len(row.produced) > positions
            or len(batch) == batch_size
        )
        if batch and full:
            yield batch
            batch, produced = [], 0
        batch.append(place)
        produced += len(row.produced)
    if batch:
        yield batch


def _score_batch(engine: PeftEngine, rows: Sequence[ScoreRow]) -> list[Evidence]:
    seen = [(row.prompt + row.produced)[:-1] for row in rows]
    ids, _ = padded(seen, engine.pad_token_id, side="right")
    width = ids.shape[1]
    places = [
        place * width + position
        for place, row in enumerate(rows)
        for position in range(len(row.prompt) - 1, row.length)
    ]
    chosen = torch.tensor([token for row in rows for token in row.produced])
    with _head_at(engine.model, torch.tensor(places)):
        logits = engine.model(input_ids=ids.to(engine.device), use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1])
    if len(flat) != len(places):  # a model whose head is not the last step: all positions came
        flat = flat[torch.tensor(places, device=flat.device)]
    return _split(_evidence(flat, chosen), [len(row.produced) for row in rows])


@contextlib.contextmanager
def _head_at(model: Any, places: Tensor) -> Iterator[None]:
    """Let the head see only these positions, `(rows × width)` counted through, as one row.

    Contiguous, which a strided view is not: in bfloat16 on a CPU that is ten times slower, see
    `harness.engines.peft`.
    """
    head = bare_model(model).get_output_embeddings()
    if head is None:
        yield
        return

    def pick(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        picked = hidden.reshape(-1, hidden.shape[-1])[places.to(hidden.device)]
        return (picked[None], *arguments[1:])

    handle = head.register_forward_pre_hook(pick, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def score_stepwise(
    engine: PeftEngine,
    rows: Sequence[ScoreRow],
    mode: Mode | str,
    *,
    application: Application = Application.LIVE,
) -> list[Evidence]:
    """The same as `score`, the way `generate` goes: padded on the left, one token at a time."""
    width = max(len(row.prompt) for row in rows)
    steps = max(len(row.produced) for row in rows)
    ids = torch.full((len(rows), width + steps), engine.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        start = width - len(row.prompt)
        ids[place, start : width + len(row.produced)] = torch.tensor(row.prompt + row.produced)
        mask[place, start : width + steps] = 1
    ids, mask = ids.to(engine.device), mask.to(engine.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found: list[list[Evidence]] = [[] for _ in rows]
    cache: Any = None
    with engine.mode(mode, application) as model, torch.inference_mode(), engine.threads():
        for step in range(steps):
            begin, end = (0, width) if step == 0 else (width + step - 1, width + step)
            output = model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            evidence = _evidence(output.logits[:, -1], ids[:, end].cpu())
            for place, one in enumerate(_split(evidence, [1] * len(rows))):
                if step < len(rows[place].produced):
                    found[place].append(one)
    return [_join(parts) for parts in found]


def _evidence(logits: Tensor, chosen: Tensor) -> Evidence:
    """`(n, vocabulary)` logits of any dtype -> evidence of the chosen `(n,)` tokens."""
    top = min(TOP, logits.shape[-1])
    held = _ROW_BYTES.get(logits.device.type, _ROW_BYTES_ELSEWHERE)
    rows = max(torch.get_num_threads(), held // (logits.shape[-1] * 4))
    parts: list[tuple[Any, Any, Any]] = []
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        # As `generate` does: float32, and its own arg-max, which decides between equal ones.
        block = block if block.dtype == torch.float64 else block.float()
        highest, places = _highest(block, top)
        if top > 1 and not bool((highest[:, 0] > highest[:, 1]).all()):  # equal ones, or NaN
            places = _best_first(places, block.argmax(-1, keepdim=True))
        tokens = chosen[start : start + rows].to(block.device)[:, None]
        # Equal logits stay equal: every figure is taken from the one normaliser.
        norm = block.logsumexp(-1, keepdim=True)
        own, values = block.gather(-1, tokens) - norm, block.gather(-1, places) - norm
        parts.append(
            tuple(
                part.double().cpu().numpy() if part.is_floating_point() else part.cpu().numpy()
                for part in (own[:, 0], places, values)
            )  # type: ignore[arg-type]
        )
    return Evidence(
        logprobs=np.concatenate([part[0] for part in parts]),
        top_ids=np.concatenate([part[1] for part in parts]),
        top_logprobs=np.concatenate([part[2] for part in parts]),
    )


def _highest(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of the last dimension, on a CPU six times faster for a large vocabulary: what
    is among the highest lies in one of the *count* columns, of a few dozen, with the highest
    maxima."""
    positions, size = block.shape
    width = size // _DEEP
    if width <= count * _DEEP:
        return block.topk(count, dim=-1)
    even = width * _DEEP
    columns = block[:, :even].view(positions, _DEEP, width).amax(1).topk(count, dim=-1).indices
    steps = torch.arange(0, even, width, device=block.device)
    rest = torch.arange(even, size, device=block.device).expand(positions, -1)
    places = torch.cat([(steps[:, None] + columns[:, None]).flatten(1), rest], dim=1)
    highest, found = block.gather(1, places).topk(count, dim=-1)
    return highest, places.gather(1, found)


def _best_first(places: Tensor, best: Tensor) -> Tensor:
    """Put the arg-max in front; `topk` may order equal values otherwise, or leave it out."""
    if bool((places[:, :1] == best).all()):
        return places
    found = places == best
    last = torch.arange(places.shape[1], device=places.device) == places.shape[1] - 1
    slot = torch.where(found.any(-1, keepdim=True), found, last)
    order = (~slot).to(torch.int8).argsort(dim=-1, stable=True)
    return torch.where(slot, best, places).gather(-1, order)


def _split(evidence: Evidence, counts: Sequence[int]) -> list[Evidence]:
    parts, start = [], 0
    for count in counts:
        parts.append(
            Evidence(
                logprobs=evidence.logprobs[start : start + count],
                top_ids=evidence.top_ids[start : start + count],
                top_logprobs=evidence.top_logprobs[start : start + count],
            )
        )
        start += count
    return parts


def _join(parts: Sequence[Evidence]) -> Evidence:
    return Evidence(
        logprobs=np.concatenate([part.logprobs for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )


@contextlib.contextmanager
def in_precision(engine: PeftEngine, dtype: str) -> Iterator[None]:
    """Forward passes in *dtype*, one layer's weights at a time in it.

    The weights come from the checkpoint where it holds more precision than was loaded. Adapters
    keep their own dtype below float32, as PEFT keeps them, and follow above it.

    Args:
        dtype: `float64`, `float32`, `bfloat16` or `float16`.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    bare = bare_model(engine.model)
    handles: list[Any] = []
    kept: dict[nn.Module, dict[tuple[nn.Module, str], Any]] = {}

    def enter(unit: nn.Module, names: dict[nn.Module, str]) -> None:
        held = kept.setdefault(unit, {})
        for module, name in names.items():
            lower = wanted.itemsize < 4 and ".lora_" in f".{name}"
            for key, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_floating_point() or lower:
                    continue
                held[module, key] = parameter
                source = _stored_weight(engine, f"{name}.{key}", parameter)
                module._parameters[key] = nn.Parameter(
                    source.to(parameter.device, wanted), requires_grad=False
                )

    def leave(unit: nn.Module) -> None:
        for (module, key), parameter in kept.pop(unit, {}).items():
            module._parameters[key] = parameter

    try:
        for unit, names in _units(bare).items():
            handles.append(
                unit.register_forward_pre_hook(
                    lambda unit, _, names=names: enter(unit, names), prepend=True
                )
            )
            handles.append(unit.register_forward_hook(lambda unit, _, __: leave(unit)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in list(kept):
            leave(unit)


def _units(bare: nn.Module) -> dict[nn.Module, dict[nn.Module, str]]:
    """Modules whose weights change together: a LoRA layer with its parts, or one with its own."""
    units: dict[nn.Module, dict[nn.Module, str]] = {}
    inside: set[nn.Module] = set()
    for name, module in bare.named_modules():
        if module in inside:
            continue
        if isinstance(module, LoraLayer):
            parts = {part: f"{name}.{n}" if n else name for n, part in module.named_modules()}
            inside |= set(parts)
            units[module] = parts
        elif module._parameters:
            units[module] = {module: name}
    return units


def _stored_weight(engine: PeftEngine, name: str, loaded: Tensor) -> Tensor:
    stored = name.replace(".base_layer.", ".")
    if stored not in engine.checkpoint.places:
        return loaded
    tensor = engine.checkpoint.tensor(stored)
    fits = tensor.shape == loaded.shape and tensor.is_floating_point()
    return tensor if fits and tensor.dtype.itemsize > loaded.dtype.itemsize else loaded
