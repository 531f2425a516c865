"""The factors of a flattened adapter: made, written and read back one module at a time.

`A = [w₁s₁A₁; w₂s₂A₂; …]`, `B = [B₁|B₂|…]`, zero where an adapter lacks the module; or the best
approximation of a rank. Memory holds one module's factors in float64, whatever the adapters'
number and size. Knows nothing of configs, reports or folders.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from harness.adapter_config import natural_order
from harness.adapter_files import KEY_PREFIX
from harness.errors import InputError
from harness.files.tensor_files import DTYPE_BYTES, read_tensor_file
from harness.merge.factors import Term, too_large
from harness.merge.proof import ProofError, TensorLedger, Verify
from harness.merge.rules import thin_svd
from harness.merge.storage import RAW, decode, encode
from harness.preflight import MOST_OF_A_FACTOR

__all__ = ["FlatModule", "Loss", "flat_modules", "prove_factors", "stored_bytes", "write_factors"]

Array = NDArray[Any]
Ranks = Mapping[str, int]

_SAMPLED_ROWS = 32
_ENTRIES = 1 << 20  # of a product that are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatModule:
    """One module of the result, with the terms of the adapters that adapt it, in their order."""

    module: str
    terms: tuple[Term, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """`in` and `out` in the adapter's own layout: `A: (r, in)`, `B: (out, r)`."""
        return self.terms[0].pair.in_features, self.terms[0].pair.out_features

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(term.source.name for term in self.terms)

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the file."""
        stem = f"{KEY_PREFIX}{self.module}"
        if self.terms[0].pair.embedding:
            return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a truncation left out of one module: ‖rest‖ and ‖ΔW‖."""

    lost: float
    norm: float

    @property
    def share(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


def flat_modules(terms: Mapping[str, Sequence[Term]]) -> tuple[FlatModule, ...]:
    """The modules in the order in which they are written."""
    return tuple(
        FlatModule(module=module, terms=tuple(terms[module]))
        for module in sorted(terms, key=natural_order)
    )


def stored_bytes(modules: Sequence[FlatModule], rank: int, dtype: str) -> int:
    """The size of all factors at *rank*."""
    return sum(sum(module.sizes) for module in modules) * rank * DTYPE_BYTES[dtype]


def write_factors(
    path: Path,
    modules: Sequence[FlatModule],
    ranks: Ranks,
    dtype: str,
    *,
    compress: bool,
    rank: int | None,
) -> tuple[int, dict[str, Loss]]:
    """Write the safetensors file *path*; returns the rank that all modules share, and what a
    truncation lost by module.

    Args:
        ranks: the rows that each adapter gets where nothing is compressed.

    Raises:
        InputError: a number that *dtype* cannot hold.
    """
    if rank is None and not compress:
        shared = sum(ranks.values())
        with path.open("xb") as file:
            _write_head(file, modules, shared, dtype)
            for module in modules:
                for key, factor in zip(module.keys, _concatenated(module, ranks), strict=True):
                    file.write(_encoded(factor, dtype, key, module))
                _release(module)
        return shared, {module.module: Loss(lost=0.0, norm=0.0) for module in modules}
    # The shared rank is known when every module has been decomposed: until then the factors wait
    # beside the file, not in memory.
    waiting = path.with_suffix(".waiting")
    kept: list[int] = []
    losses: dict[str, Loss] = {}
    try:
        with waiting.open("xb") as file:
            for module in modules:
                a, b, losses[module.module] = _decomposed(module, rank)
                for key, factor in zip(module.keys, (a, b), strict=True):
                    file.write(_encoded(factor, dtype, key, module))
                kept.append(a.shape[0])
                _release(module)
        shared = max(kept)
        with waiting.open("rb") as source, path.open("xb") as file:
            _write_head(file, modules, shared, dtype)
            for module, own in zip(modules, kept, strict=True):
                inside, outside = module.sizes
                for shape, axis in (((own, inside), 0), ((outside, own), 1)):
                    raw = source.read(shape[0] * shape[1] * DTYPE_BYTES[dtype])
                    factor = np.frombuffer(raw, RAW[dtype]).reshape(shape)
                    more = [(0, 0), (0, 0)]
                    more[axis] = (0, shared - own)
                    file.write(np.ascontiguousarray(np.pad(factor, more)).data)
    finally:
        waiting.unlink(missing_ok=True)
    return shared, losses


def _own_factors(term: Term) -> tuple[Array, Array]:
    """`w·s·A` and `B` in float64, in the adapter's own layout."""
    source, pair = term.source, term.pair
    a = source.array(pair.a, np.float64) * (source.weight * term.scale)
    return a, source.array(pair.b, np.float64)


def _concatenated(module: FlatModule, ranks: Ranks) -> tuple[Array, Array]:
    inside, outside = module.sizes
    total = sum(ranks.values())
    a, b = np.zeros((total, inside)), np.zeros((outside, total))
    by_name = {term.source.name: term for term in module.terms}
    start = 0
    for name, width in ranks.items():
        if name in by_name:
            own_a, own_b = _own_factors(by_name[name])
            a[start : start + own_a.shape[0]] = own_a
            b[:, start : start + own_a.shape[0]] = own_b
        start += width
    return a, b


def _decomposed(module: FlatModule, rank: int | None) -> tuple[Array, Array, Loss]:
    parts = [_own_factors(term) for term in module.terms]
    u, s, vt = thin_svd(
        np.concatenate([b for _, b in parts], axis=1), np.concatenate([a for a, _ in parts], axis=0)
    )
    kept = len(s) if rank is None else min(rank, len(s))
    loss = Loss(lost=float(np.linalg.norm(s[kept:])), norm=float(np.linalg.norm(s)))
    root = np.sqrt(s[:kept])
    return root[:, None] * vt[:kept], u[:, :kept] * root, loss


def _write_head(file: BinaryIO, modules: Sequence[FlatModule], rank: int, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for module in modules:
        inside, outside = module.sizes
        for key, shape in zip(module.keys, ((rank, inside), (outside, rank)), strict=True):
            end = position + shape[0] * shape[1] * DTYPE_BYTES[dtype]
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(struct.pack("<Q", len(head)) + head)


def _encoded(factor: Array, dtype: str, key: str, module: FlatModule) -> memoryview:
    raw = encode(factor, dtype)
    most = float(np.abs(decode(raw, dtype, np.float64)).max(initial=0))
    if MOST_OF_A_FACTOR < most < math.inf:
        raise too_large(key, most, MOST_OF_A_FACTOR, module.terms)
    if not math.isfinite(most):
        raise InputError(
            f"{key!r}: a number does not fit into {dtype}",
            where="--dtype",
            remedy="choose float32",
        )
    return np.ascontiguousarray(raw).data


def _release(module: FlatModule) -> None:
    for term in module.terms:
        term.release()


def prove_factors(
    path: Path, modules: Sequence[FlatModule], dtype: str, verify: Verify, *, truncated: bool
) -> tuple[TensorLedger, ...]:
    """Hold the stored factors' products against `Σ wᵢ·sᵢ·BᵢAᵢ` in float64.

    Raises:
        ProofError: a product is off by more than the rounding of two factors.
    """
    if verify == "none":
        return ()
    file = read_tensor_file(path, what=path.name)
    rows = []
    with path.open("rb") as stream:
        for module in modules:
            stored = []
            for key in module.keys:
                entry = file.entries[key]
                raw = os.pread(stream.fileno(), entry.end - entry.start, entry.start)
                numbers = np.frombuffer(raw, RAW[dtype]).reshape(entry.shape)
                stored.append(decode(numbers, dtype, np.float64))
            rows.append(_compare(module, stored[0], stored[1], dtype, verify, truncated=truncated))
            _release(module)
    return tuple(rows)


def _compare(
    module: FlatModule, a: Array, b: Array, dtype: str, verify: Verify, *, truncated: bool
) -> TensorLedger:
    # Each factor is rounded once; a product of two roundings, a rank of terms.
    precision = 4 * {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    parts = [_own_factors(term) for term in module.terms]
    across = [np.linalg.norm(own_a, axis=0) for own_a, _ in parts]
    # Factors of an SVD are bounded by the whole sum, not entry by entry.
    largest = sum(
        float(np.max(np.linalg.norm(own_b, axis=1), initial=0.0)) * float(np.max(norm, initial=0.0))
        for (_, own_b), norm in zip(parts, across, strict=True)
    )
    checked = exact = 0
    worst = delta = lost = 0.0
    for some in _row_blocks(b.shape[0], a.shape[1], verify):
        got = b[some] @ a
        wanted = np.sum([own_b[some] @ own_a for own_a, own_b in parts], axis=0)
        error = np.abs(got - wanted)
        worst = max(worst, float(np.max(error, initial=0.0)))
        if not truncated:
            room = np.abs(b[some]) @ np.abs(a) + largest
            for (_, own_b), norm in zip(parts, across, strict=True):
                room += np.linalg.norm(own_b[some], axis=1)[:, None] * norm
            if not (error <= precision * room + np.finfo(np.float64).tiny).all():
                raise ProofError(
                    f"{module.module}: the flattened adapter's delta is off by {worst:.3g}"
                )
        checked += got.size
        exact += int(np.count_nonzero(encode(got, dtype) == encode(wanted, dtype)))
        delta += float(np.vdot(wanted, wanted))
        lost += float(np.vdot(error, error))
    scale = b.shape[0] * a.shape[1] / checked if checked else 0.0
    return TensorLedger(
        name=module.module,
        dtype=dtype,
        shape=(b.shape[0], a.shape[1]),
        adapters=module.adapters,
        checked=checked,
        exact=exact,
        max_error=worst,
        weight_norm=0.0,
        delta_norm=(delta * scale) ** 0.5,
        lost_norm=(lost * scale) ** 0.5,
        one_by_one_norm=None,
        unmoved=0,
    )


def _row_blocks(rows: int, columns: int, verify: Verify) -> Iterator[slice]:
    last = rows if verify == "full" else min(rows, _SAMPLED_ROWS)
    step = max(1, _ENTRIES // max(columns, 1))
    for first in range(0, last, step):
        yield slice(first, min(first + step, last))
