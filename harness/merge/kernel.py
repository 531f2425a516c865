"""The arithmetic of the hot loop: `round(W + L @ R)` for a block of rows, in cache-sized pieces.

bfloat16 is added and rounded two entries at a time, as the halves of a 32-bit word, which is what
makes numpy quick enough to leave torch (1.7 CPU seconds to import) out. Every piece has a fixed
size, so no number of workers changes a bit. Knows nothing of files or adapters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.merge.storage import accumulator, decode, encode

__all__ = ["ROWS", "DenseDelta", "FactoredDelta", "Scratch", "add_block"]

Array = NDArray[Any]

#: Rows that are read, added and written at a time.
ROWS = 128
# A piece is summed and rounded at once. Whole rows, where they are not very long: numpy runs
# through what lies in one stretch a third quicker than row by row. Few of them, for the cache, but
# not fewer than need be: between two calls of numpy's the workers wait for each other.
_HEIGHT, _PAIRS = 32, 8192
_AREA = 1 << 17  # pairs in a piece of short rows
# Below this many multiplications (rows · columns · rank) OpenBLAS multiplies without copying the
# factors into buffers of its own first: a fifth quicker for factors as thin as these.
_UNPACKED = 1_000_000
_STEP = 32  # columns of a product, in pairs, are a multiple of it: whole vectors

# Arrays, not scalars: numpy would convert a scalar anew in every call.
_SHIFT, _HIGH = np.array(16, np.uint32), np.array(0xFFFF0000, np.uint32)
_ONE, _HALF = np.array(1, np.uint32), np.array(0x7FFF, np.uint32)


class FactoredDelta:
    """A delta as `left @ right`; float32, or float64 where the sum is stored as F32 or F64."""

    def __init__(self, left: Array, right: Array, dtype: str) -> None:
        kind = accumulator(dtype)
        self.left = np.ascontiguousarray(left, dtype=kind)
        self.right = np.ascontiguousarray(right, dtype=kind)
        self.columns = self.right.shape[1]
        #: No entry is larger; NaN where a factor overflowed.
        self.bound = _largest(self.left) * _largest(self.right) * len(self.right)
        # Even and odd columns apart, in pieces: a 32-bit word holds one of each.
        self.paired = dtype == "BF16" and self.columns % 2 == 0
        self.pieces: list[tuple[slice, list[tuple[slice, Array]]]] = []
        thin = min(
            _AREA // max(1, self.columns // 2), _UNPACKED // (4 * _STEP * max(1, len(right)))
        )
        self.height = max(_HEIGHT, min(ROWS, thin // _HEIGHT * _HEIGHT))
        if self.paired:
            for start in range(0, self.columns // 2, _PAIRS):
                where = slice(start, min(start + _PAIRS, self.columns // 2))
                self.pieces.append((where, self._products(where)))

    def _products(self, where: slice) -> list[tuple[slice, Array]]:
        """The right factor's pairs *where*, `(products, 2, rank, pairs)` for each run of products
        of one size; the slices count from *where*'s beginning."""
        rank, width = self.right.shape[0], where.stop - where.start
        step = _UNPACKED // (self.height * max(1, rank)) // _STEP * _STEP or _PAIRS
        whole = width // step * step
        found = []
        for inside, size in ((slice(0, whole), step), (slice(whole, width), width - whole)):
            if inside.stop > inside.start:
                first, last = where.start + inside.start, where.start + inside.stop
                part = self.right[:, 2 * first : 2 * last].reshape(rank, -1, size, 2)
                found.append((inside, np.ascontiguousarray(part.transpose(1, 3, 0, 2))))
        return found

    def block(self, rows: slice) -> Array:
        """The delta's *rows*, whole."""
        product: Array = self.left[rows] @ self.right
        return product


class DenseDelta:
    """A delta that was made entry by entry."""

    paired = False

    def __init__(self, delta: Array) -> None:
        self.delta = delta
        self.bound = _largest(delta)

    def block(self, rows: slice) -> Array:
        """The delta's *rows*."""
        return self.delta[rows]


def _largest(numbers: Array) -> float:
    """The largest absolute value; NaN if one is among them."""
    return float(max(numbers.max(initial=0), -numbers.min(initial=0)))


class Scratch:
    """One worker's buffers, used again for every block: fresh pages cost more than the sums."""

    def __init__(self) -> None:
        self._sums = np.empty(2 * _HEIGHT * _PAIRS, np.float32)
        self._words = np.empty(2 * _HEIGHT * _PAIRS, np.uint32)

    def buffers(self, rows: int, width: int) -> tuple[Array, Array]:
        """Sums and spare words, `(2, rows, width)` each; contiguous, also for a narrow piece."""
        shape, size = (2, rows, width), 2 * rows * width
        return self._sums[:size].reshape(shape), self._words[:size].reshape(shape)


def add_block(
    raw: Array,
    delta: FactoredDelta | DenseDelta,
    rows: slice,
    scratch: Scratch,
    *,
    stored: str,
    wanted: str,
    scale: Array | None = None,
) -> Array:
    """`raw` (at most `ROWS` rows of the base as stored) with *delta*'s rows added, as `wanted`.

    bfloat16 to bfloat16 works in place. *scale* is what stored numbers are multiplied with first,
    in float32.
    """
    if stored == wanted == "BF16" and isinstance(delta, FactoredDelta) and delta.paired:
        _add_pairs(raw.view(np.uint32), delta, rows, scratch)
        return raw
    if scale is None:
        numbers = decode(raw, stored, accumulator(wanted))
    else:
        numbers = (decode(raw, stored, np.float32) * scale).astype(accumulator(wanted), copy=False)
    numbers += delta.block(rows)
    return encode(numbers, wanted)


def _add_pairs(words: Array, delta: FactoredDelta, rows: slice, scratch: Scratch) -> None:
    for top in range(0, len(words), delta.height):
        some = words[top : top + delta.height]
        left = delta.left[rows.start + top : rows.start + top + len(some)]
        for where, products in delta.pieces:
            sums, spare = scratch.buffers(len(some), where.stop - where.start)
            for inside, halves in products:
                # All of them in one call: between calls the workers wait for each other.
                out = sums[:, :, inside].reshape(2, len(some), len(halves), -1)
                np.matmul(left, halves, out=out.transpose(2, 0, 1, 3))
            _round_pairs(some[:, where], sums, spare)


def _round_pairs(words: Array, sums: Array, spare: Array) -> None:
    """`words` become the two rounded sums: nearest, ties to even, on the bits of the float32.

    A little-endian word holds the even column in its low half and the odd one in its high half;
    `sums` and `spare` hold the even columns in `[0]` and the odd ones in `[1]`.
    """
    np.left_shift(words, _SHIFT, out=spare[0])
    np.bitwise_and(words, _HIGH, out=spare[1])
    np.add(sums, spare.view(np.float32), out=sums)
    bits = sums.view(np.uint32)
    np.right_shift(bits, _SHIFT, out=spare)
    np.bitwise_and(spare, _ONE, out=spare)
    np.add(spare, _HALF, out=spare)
    np.add(bits, spare, out=bits)
    even, odd = bits
    np.right_shift(even, _SHIFT, out=even)
    np.bitwise_and(odd, _HIGH, out=odd)
    np.bitwise_or(even, odd, out=words)
