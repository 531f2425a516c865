"""What was written, read back and held against float64; and what the storage dtype's rounding cost.

The reference is the base's stored number plus the strategy's delta, both in float64, from the
files. The proof bounds every checked entry: the nearest number of the dtype, or off by no more
than the accumulation's own error. The ledger, from the same blocks, says how much of ΔW the
rounding left. Writes nothing; knows nothing of options or reports.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import HarnessError
from harness.files.tensor_files import DTYPE_BYTES
from harness.merge.factors import Term
from harness.merge.plan import MergePlan, OutputTensor, ShardPlan
from harness.merge.recipe import Recipe, make_delta, total_factors
from harness.merge.storage import RAW, accumulator, decode, encode
from harness.merge.strategies import Kind

__all__ = ["ProofError", "TensorLedger", "Verify", "prove", "sampled_rows"]

Array = NDArray[Any]
#: `none`, `sampled` or `full`.
Verify = str

_BLOCK = 8
_FULL_BLOCK = 64
_PIECE = 1 << 16


class ProofError(HarnessError):
    """What was read back is not what was to be written: a fault of the disk or of the harness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLedger:
    """One merged tensor: how exact it is, and what rounding did to its delta.

    Norms are Frobenius norms, scaled from the checked rows to the whole tensor.

    Attributes:
        checked: entries that were read back; exact: those equal to the rounded float64 result.
        max_error: the largest distance from the float64 result, in units of the weight.
        weight_norm, delta_norm: ‖W‖ and ‖ΔW‖.
        lost_norm: ‖(W' − W) − ΔW‖: what the storage dtype could not hold.
        one_by_one_norm: the same, had each adapter been added and rounded in turn; None for one
            adapter or a strategy that is no sum.
        unmoved: checked entries that kept their stored number although their delta is not zero.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    adapters: tuple[str, ...]
    checked: int
    exact: int
    max_error: float
    weight_norm: float
    delta_norm: float
    lost_norm: float
    one_by_one_norm: float | None
    unmoved: int

    @property
    def rounding_loss(self) -> float:
        """‖(W' − W) − ΔW‖ / ‖ΔW‖; 0 where ΔW is zero."""
        return self.lost_norm / self.delta_norm if self.delta_norm else 0.0

    @property
    def survived(self) -> float:
        """The share of ‖ΔW‖ that survived: 1 − loss, at least 0."""
        return max(0.0, 1.0 - self.rounding_loss)


def prove(
    folder: Path,
    plan: MergePlan,
    recipe: Recipe,
    order: Sequence[str],
    *,
    verify: Verify,
    workers: int,
) -> tuple[TensorLedger, ...]:
    """Read *folder*'s shards back.

    Args:
        order: the adapters' names in the order given, for the one-by-one rounding.
        verify: `sampled` (some rows of each merged tensor and pieces of each other one) or `full`.

    Raises:
        ProofError: a header, an untouched byte or a merged entry is not what it should be.
    """
    from threadpoolctl import threadpool_limits

    jobs: list[Callable[[], TensorLedger | None]] = []
    files = {shard.name: os.open(folder / shard.name, os.O_RDONLY) for shard in plan.shards}
    bases: dict[Path, int] = {}
    try:
        for shard in plan.shards:
            # A few rows here and there: what the kernel would read ahead is not looked at.
            if verify != "full":
                os.posix_fadvise(files[shard.name], 0, 0, os.POSIX_FADV_RANDOM)
            _check_head(files[shard.name], shard)
            for tensor in shard.tensors:
                path = tensor.source_file.path
                if path not in bases:
                    bases[path] = os.open(path, os.O_RDONLY)
                jobs.append(
                    _job(bases[path], files[shard.name], tensor, recipe, order, verify == "full")
                )
        with (
            threadpool_limits(limits=1, user_api="blas"),
            ThreadPoolExecutor(max_workers=workers) as pool,
        ):
            results = list(pool.map(lambda job: job(), jobs))
    finally:
        for descriptor in (*files.values(), *bases.values()):
            os.close(descriptor)
    return tuple(result for result in results if result is not None)


def _job(
    base: int, output: int, tensor: OutputTensor, recipe: Recipe, order: Sequence[str], full: bool
) -> Callable[[], TensorLedger | None]:
    def run() -> TensorLedger | None:
        if tensor.terms:
            return _check_merged(base, output, tensor, recipe, order, full)
        check = _check_untouched if tensor.scale is None else _check_dequantised
        check(base, output, tensor, full)
        return None

    return run


def _check_head(descriptor: int, shard: ShardPlan) -> None:
    if os.fstat(descriptor).st_size != shard.size:
        raise ProofError(f"{shard.name}: has another size than was written")
    if _bytes(descriptor, 0, len(shard.head)) != shard.head:
        raise ProofError(f"{shard.name}: its header is not what was written")


def _check_dequantised(base: int, output: int, tensor: OutputTensor, full: bool) -> None:
    for rows in _blocks(tensor, full):
        wanted = encode(_base_numbers(base, tensor, rows), tensor.dtype)
        width = tensor.shape[1] * DTYPE_BYTES[tensor.dtype]
        size = (rows.stop - rows.start) * width
        if wanted.tobytes() != _bytes(output, tensor.start + rows.start * width, size):
            raise ProofError(f"{tensor.name}: read back it is not the dequantised base")


def _check_untouched(base: int, output: int, tensor: OutputTensor, full: bool) -> None:
    old, new = DTYPE_BYTES[tensor.source.dtype], DTYPE_BYTES[tensor.dtype]
    step = _PIECE * (16 if full else 1)
    starts = range(0, tensor.count, step)
    if not full and len(starts) > 3:
        middle = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little")
        starts_checked: Sequence[int] = [0, starts[middle % len(starts)], starts[-1]]
    else:
        starts_checked = starts
    for first in starts_checked:
        count = min(step, tensor.count - first)
        before = _bytes(base, tensor.source.start + first * old, count * old)
        after = _bytes(output, tensor.start + first * new, count * new)
        if not tensor.copied:
            kind = tensor.source.dtype
            numbers = decode(np.frombuffer(before, RAW[kind]), kind, np.float64)
            before = encode(numbers, tensor.dtype).tobytes()
        if before != after:
            raise ProofError(f"{tensor.name}: untouched, but read back it differs from the base")


def sampled_rows(tensor: str, rows: int) -> list[slice]:
    """The row blocks that are read back of *tensor*: one by its name's hash, and the last."""
    if rows <= 2 * _BLOCK:
        return [slice(0, rows)]
    last = rows - _BLOCK
    first = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:8], "little")
    first %= last - _BLOCK + 1
    return [slice(first, first + _BLOCK), slice(last, rows)]


class _Reference:
    """The delta of one tensor in float64, block by block, in all and adapter by adapter."""

    def __init__(self, tensor: OutputTensor, recipe: Recipe, order: Sequence[str]) -> None:
        self.recipe = recipe
        self.terms: list[Term] = []
        self.rights: list[Array] = []
        self.lefts: list[Array] = []  # whole, or of the last block
        self.dense: Array | None = None
        every = slice(0, tensor.shape[0])
        if recipe.strategy.kind is Kind.SUM:
            self.terms = sorted(tensor.terms, key=lambda term: order.index(term.source.name))
            self.rights = [term.right(np.float64) for term in self.terms]
        elif recipe.strategy.kind is Kind.FACTORS:
            left, right = total_factors(recipe, tensor.terms, every, np.float64)
            self.whole_left, self.rights = left, [right]
        else:
            # Which entries are kept is decided in the precision of the merge; the sum is not.
            whole = make_delta(recipe, tensor.terms, every, tensor.dtype)
            self.dense = whole.block(every).astype(np.float64)
        self.rank = sum(right.shape[0] for right in self.rights) or 1

    def block(self, rows: slice) -> tuple[Array, list[Array]]:
        """The delta of *rows*, and each adapter's share."""
        if self.dense is not None:
            self.lefts = [self.dense[rows]]
            return self.dense[rows], []
        self.lefts = [
            term.left(np.float64, rows) * (self.recipe.weight(term) * term.scale)
            for term in self.terms
        ] or [self.whole_left[rows]]
        shares = [left @ right for left, right in zip(self.lefts, self.rights, strict=True)]
        return functools.reduce(np.add, shares), shares

    def bound(self, rows: Array, columns: Array) -> Array:
        """How large the products behind each entry `[rows[i], columns[i]]` of the last block can
        be: what float32's accumulation can be off by is a small multiple of it."""
        if self.dense is not None:
            return np.abs(self.lefts[0][rows, columns])
        total = np.zeros(len(rows))
        for left, right in zip(self.lefts, self.rights, strict=True):
            total += np.linalg.norm(left[rows], axis=1) * np.linalg.norm(right[:, columns], axis=0)
        return total


def _check_merged(
    base: int, output: int, tensor: OutputTensor, recipe: Recipe, order: Sequence[str], full: bool
) -> TensorLedger:
    reference = _Reference(tensor, recipe, order)
    precision = float(np.finfo(accumulator(tensor.dtype)).eps) * (reference.rank + 4)
    columns = tensor.shape[1]
    checked = exact = unmoved = 0
    worst = weight = delta_sum = lost = one_by_one = 0.0
    in_turn = len(reference.terms) > 1
    for rows in _blocks(tensor, full):
        before = _base_numbers(base, tensor, rows)
        after = _numbers(output, tensor.start, tensor.dtype, rows, columns)
        delta, shares = reference.block(rows)
        wanted = before + delta
        nearest = decode(encode(wanted, tensor.dtype), tensor.dtype, np.float64)
        error = np.abs(after - wanted)
        same = after == nearest
        # The few others may be off by the accumulation's own error; "not within" also catches NaN.
        near, across = np.nonzero(~same)
        allowed = np.abs(nearest - wanted)[near, across] + precision * (
            np.abs(before)[near, across] + reference.bound(near, across)
        )
        wrong = np.flatnonzero(~(error[near, across] <= allowed))
        if wrong.size:
            row, column = int(near[wrong[0]]), int(across[wrong[0]])
            raise ProofError(
                f"{tensor.name}[{rows.start + row}, {column}]: read back {after[row, column]!r}, "
                f"float64 says {wanted[row, column]!r}"
            )
        checked += after.size
        exact += int(np.count_nonzero(same))
        unmoved += int(np.count_nonzero((after == before) & (delta != 0)))
        worst = max(worst, float(error.max(initial=0.0)))
        weight += float(np.vdot(before, before))
        delta_sum += float(np.vdot(delta, delta))
        missing = after - wanted
        lost += float(np.vdot(missing, missing))
        if in_turn:
            turn = before
            for share in shares:
                turn = decode(encode(turn + share, tensor.dtype), tensor.dtype, np.float64)
            missing = turn - wanted
            one_by_one += float(np.vdot(missing, missing))
    for term in tensor.terms:
        term.release()
    scale = tensor.count / checked if checked else 0.0
    return TensorLedger(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        adapters=tuple(n for n in order if any(t.source.name == n for t in tensor.terms)),
        checked=checked,
        exact=exact,
        max_error=worst,
        weight_norm=(weight * scale) ** 0.5,
        delta_norm=(delta_sum * scale) ** 0.5,
        lost_norm=(lost * scale) ** 0.5,
        one_by_one_norm=(one_by_one * scale) ** 0.5 if in_turn else None,
        unmoved=unmoved,
    )


def _blocks(tensor: OutputTensor, full: bool) -> Iterator[slice]:
    if not full:
        yield from sampled_rows(tensor.name, tensor.shape[0])
        return
    for first in range(0, tensor.shape[0], _FULL_BLOCK):
        yield slice(first, min(first + _FULL_BLOCK, tensor.shape[0]))


def _numbers(descriptor: int, start: int, dtype: str, rows: slice, columns: int) -> Array:
    width = columns * DTYPE_BYTES[dtype]
    data = _bytes(descriptor, start + rows.start * width, (rows.stop - rows.start) * width)
    return decode(np.frombuffer(data, RAW[dtype]).reshape(-1, columns), dtype, np.float64)


def _base_numbers(descriptor: int, tensor: OutputTensor, rows: slice) -> Array:
    """The base's numbers in float64: as stored, or the float32 product with their scale."""
    columns = tensor.shape[1]
    numbers = _numbers(descriptor, tensor.source.start, tensor.source.dtype, rows, columns)
    if tensor.scale is None:
        return numbers
    product: Array = numbers.astype(np.float32) * tensor.scale.rows(rows, columns)
    return product.astype(np.float64)


def _bytes(descriptor: int, start: int, size: int) -> bytes:
    data = os.pread(descriptor, size, start)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), start + len(data))
        if not more:
            raise ProofError("a file ended early while it was read back")
        data += more
    return data
