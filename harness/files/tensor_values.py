"""The numbers in a safetensors file: finite or not, their largest size, all zero or not.

One pass without torch. The size of a floating number is its bits without the sign, read as an
integer: larger sizes are larger integers, infinity is larger than every number, and NaN larger
than infinity. So one integer maximum a block tells everything. Knows nothing of what a tensor is
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.files.tensor_files import TensorEntry, TensorFile

__all__ = ["ValueRange", "value_ranges"]

_BLOCK_BYTES = 1 << 20  # stays in a core's cache
# By dtype: the unsigned integer of its width, the bits without the sign, those of infinity.
# F8_E4M3 has no infinity: 0x7F is NaN, and nothing lies above it.
_BITS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", (1 << 63) - 1, 0x7FF << 52),
    "F32": ("<u4", (1 << 31) - 1, 0xFF << 23),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRange:
    """What the numbers of one floating tensor are.

    Attributes:
        largest: the largest absolute value; `inf` where some number is not finite.
        bad: where the first NaN or infinity stands, an index a dimension; None if all are finite.
        kind: `NaN` or `Inf`, of that number.
    """

    entry: TensorEntry
    largest: float
    bad: tuple[int, ...] | None = None
    kind: str = ""

    @property
    def zero(self) -> bool:
        return self.largest == 0


def value_ranges(file: TensorFile) -> Iterator[ValueRange]:
    """The range of each floating tensor, in the file's order.

    Reads in blocks of 1 MiB; integer tensors and empty ones are passed over.

    Raises:
        OSError: the file cannot be read any more.
    """
    import numpy as np

    buffer = np.empty(_BLOCK_BYTES, np.uint8)
    with file.path.open("rb") as source:
        for entry in file.entries.values():
            if entry.dtype in _BITS and entry.count:
                yield _range(source, entry, buffer, np)


def _range(source: Any, entry: TensorEntry, buffer: Any, np: Any) -> ValueRange:
    form, mask, infinity = _BITS[entry.dtype]
    width = np.dtype(form).itemsize
    source.seek(entry.start)
    largest = done = 0
    left = entry.end - entry.start
    while left:
        block = buffer[: min(left, _BLOCK_BYTES)]
        if source.readinto(memoryview(block)) != len(block):
            raise OSError(0, "the file became shorter while it was read")
        bits = block.view(form)
        np.bitwise_and(bits, mask, out=bits)
        top = int(bits.max())
        if top >= infinity:
            place = int((bits >= infinity).argmax())
            index = tuple(int(n) for n in np.unravel_index(done + place, entry.shape))
            exact = int(bits[place]) == infinity and entry.dtype != "F8_E4M3"
            return ValueRange(
                entry=entry,
                largest=float("inf"),
                bad=index,
                kind="Inf" if exact else "NaN",
            )
        largest = max(largest, top)
        done += len(bits)
        left -= len(bits) * width
    return ValueRange(entry=entry, largest=_number(largest, entry.dtype, np))


def _number(bits: int, dtype: str, np: Any) -> float:
    """The absolute value whose bits are *bits*."""
    if dtype == "BF16":
        return float(np.uint32(bits << 16).view(np.float32))
    if dtype == "F8_E5M2":
        return float(np.uint16(bits << 8).view(np.float16))
    if dtype == "F8_E4M3":
        exponent, mantissa = bits >> 3, bits & 7
        return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    kinds = {"F64": (np.uint64, np.float64), "F32": (np.uint32, np.float32),
             "F16": (np.uint16, np.float16)}  # fmt: skip
    integer, floating = kinds[dtype]
    return float(integer(bits).view(floating))
