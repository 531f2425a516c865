"""The arithmetic of the hot loop: `round(W + L @ R)` for a block of rows, in cache-sized pieces.

bfloat16 is added and rounded two entries at a time, as the halves of a 32-bit word, which is what
makes numpy quick enough to leave torch (1.7 CPU seconds to import) out. Every piece has a fixed
size, so no number of workers changes a bit. Knows nothing of files or adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.merge.storage import accumulator, decode, encode

__all__ = ["ROWS", "DenseDelta", "FactoredDelta", "Scratch", "add_block"]

Array = NDArray[Any]

#: Rows that are read, added and written at a time.
ROWS = 256
_PAIRS = 1024  # columns of a piece, in pairs
_STRIP = 64  # rows whose elementwise work stays in the second-level cache

_SHIFT, _HIGH = np.uint32(16), np.uint32(0xFFFF0000)
_ONE, _HALF = np.uint32(1), np.uint32(0x7FFF)


class FactoredDelta:
    """A delta as `left @ right`; float32, or float64 where the sum is stored as F32 or F64."""

    def __init__(self, left: Array, right: Array, dtype: str) -> None:
        kind = accumulator(dtype)
        self.left = np.ascontiguousarray(left, dtype=kind)
        self.right = np.ascontiguousarray(right, dtype=kind)
        self.columns = self.right.shape[1]
        # Even and odd columns apart, in pieces: a 32-bit word holds one of each.
        self.paired = dtype == "BF16" and self.columns % 2 == 0
        self.pieces: list[tuple[slice, Array, Array]] = []
        if self.paired:
            for start in range(0, self.columns // 2, _PAIRS):
                where = slice(start, min(start + _PAIRS, self.columns // 2))
                part = self.right[:, 2 * where.start : 2 * where.stop]
                even = np.ascontiguousarray(part[:, 0::2])
                odd = np.ascontiguousarray(part[:, 1::2])
                self.pieces.append((where, even, odd))

    def block(self, rows: slice) -> Array:
        """The delta's *rows*, whole."""
        product: Array = self.left[rows] @ self.right
        return product


class DenseDelta:
    """A delta that was made entry by entry."""

    paired = False

    def __init__(self, delta: Array) -> None:
        self.delta = delta

    def block(self, rows: slice) -> Array:
        """The delta's *rows*."""
        return self.delta[rows]


class Scratch:
    """One worker's buffers, used again for every block: fresh pages cost more than the sums."""

    def __init__(self) -> None:
        self.sums = np.empty((2, ROWS, _PAIRS), np.float32)
        self.words = np.empty((_STRIP, _PAIRS), np.uint32)


def add_block(
    raw: Array,
    delta: FactoredDelta | DenseDelta,
    rows: slice,
    scratch: Scratch,
    *,
    stored: str,
    wanted: str,
    check: Callable[[Array], None],
) -> Array:
    """`raw` (rows of the base as stored, `RAW[stored]`) with *delta*'s rows added, as `wanted`.

    bfloat16 to bfloat16 works in place. *check* is called with results that can overflow.
    """
    if stored == wanted == "BF16" and isinstance(delta, FactoredDelta) and delta.paired:
        _add_pairs(raw.view(np.uint32), delta, rows, scratch)
        return raw
    numbers = decode(raw, stored, accumulator(wanted))
    numbers += delta.block(rows)
    result = encode(numbers, wanted)
    if wanted not in ("F32", "F64", "BF16"):
        check(result)
    return result


def _add_pairs(words: Array, delta: FactoredDelta, rows: slice, scratch: Scratch) -> None:
    left = delta.left[rows]
    count = left.shape[0]
    for where, even, odd in delta.pieces:
        width = where.stop - where.start
        # Contiguous views of the buffers, also for a narrow last piece.
        flat = scratch.sums.reshape(2, -1)
        low = flat[0, : count * width].reshape(count, width)
        high = flat[1, : count * width].reshape(count, width)
        np.matmul(left, even, out=low)
        np.matmul(left, odd, out=high)
        for start in range(0, count, _STRIP):
            strip = slice(start, min(start + _STRIP, count))
            word = words[strip, where]
            spare = scratch.words.reshape(-1)[: word.size].reshape(word.shape)
            _round_pairs(word, low[strip], high[strip], spare)


def _round_pairs(word: Array, low: Array, high: Array, spare: Array) -> None:
    """`word` becomes the two rounded sums: nearest, ties to even, on the bits of the float32.

    A little-endian word holds the even column in its low half and the odd one in its high half.
    """
    as_float = spare.view(np.float32)
    np.left_shift(word, _SHIFT, out=spare)
    np.add(low, as_float, out=low)
    np.bitwise_and(word, _HIGH, out=spare)
    np.add(high, as_float, out=high)
    for sums in (low.view(np.uint32), high.view(np.uint32)):
        np.right_shift(sums, _SHIFT, out=spare)
        np.bitwise_and(spare, _ONE, out=spare)
        np.add(sums, _HALF, out=sums)
        np.add(sums, spare, out=sums)
    even, odd = low.view(np.uint32), high.view(np.uint32)
    np.right_shift(even, _SHIFT, out=even)
    np.bitwise_and(odd, _HIGH, out=odd)
    np.bitwise_or(even, odd, out=word)
