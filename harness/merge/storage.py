"""Stored numbers as numpy arrays: every floating safetensors dtype decoded and rounded, exactly.

Rounding is to nearest, ties to even, once, also from float64 straight to a narrow dtype. numpy
knows no bfloat16 and no float8, so these go through their bits. Knows nothing of files.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPE_NAMES", "FLOATS", "RAW", "accumulator", "decode", "encode", "largest"]

Array = NDArray[Any]

#: The unsigned (or native) numpy dtype in which a stored dtype's bytes are held.
RAW: dict[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
#: The stored dtypes that hold weights.
FLOATS = frozenset(RAW)
#: `--dtype` names, by safetensors name.
DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "fp32": "F32", "fp16": "F16", "bf16": "BF16",
}  # fmt: skip

# Below the smallest normal number the spacing is fixed: exponents of the spacing.
_BF16_TINY, _BF16_STEP = 2.0**-126, 2.0**-133


def accumulator(dtype: str) -> type[np.floating[Any]]:
    """What a sum that is to be stored as *dtype* is accumulated in: twice the precision."""
    return np.float64 if dtype in ("F32", "F64") else np.float32


def largest(dtype: str) -> float:
    """The largest finite number of *dtype*."""
    return {
        "F64": float(np.finfo(np.float64).max), "F32": float(np.finfo(np.float32).max),
        "F16": 65504.0, "BF16": 3.3895313892515355e38, "F8_E4M3": 448.0, "F8_E5M2": 57344.0,
    }[dtype]  # fmt: skip


def decode(raw: Array, dtype: str, into: type[np.floating[Any]]) -> Array:
    """The numbers of *raw* (an array of `RAW[dtype]`), as *into*; exact except F64 to float32."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)
        numbers = wide.view(np.float32)
        return numbers if into is np.float32 else numbers.astype(into)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _float8_values(dtype)[raw].astype(into)
    return raw.astype(into)


def encode(numbers: Array, dtype: str) -> Array:
    """*numbers* (float32 or float64) rounded once to *dtype*, as an array of `RAW[dtype]`.

    What lies beyond the dtype becomes infinite (NaN in F8_E4M3, which has no infinity).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "BF16":
            return _to_bfloat16(numbers)
        if dtype in ("F8_E4M3", "F8_E5M2"):
            return _to_float8(numbers, dtype)
        return numbers.astype(RAW[dtype])


def _to_bfloat16(numbers: Array) -> Array:
    if numbers.dtype == np.float64:
        # Rounding through float32 would round twice: cut the 45 low bits of the float64 itself.
        bits = numbers.view(np.uint64) if numbers.flags.c_contiguous else numbers.copy().view("u8")
        kept = bits + ((bits >> np.uint64(45)) & np.uint64(1)) + np.uint64((1 << 44) - 1)
        kept &= ~np.uint64((1 << 45) - 1)
        rounded = kept.view(np.float64)
        small = np.abs(numbers) < _BF16_TINY
        if small.any():
            rounded = np.where(small, np.rint(numbers / _BF16_STEP) * _BF16_STEP, rounded)
        rounded = np.where(np.isnan(numbers), np.nan, rounded)
        top: Array = rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)
        return top.astype(np.uint16)
    return _float32_to_bfloat16(numbers)


def _float32_to_bfloat16(numbers: Array) -> Array:
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    kept = bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    top: Array = (kept >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(numbers)
    if nan.any():
        top[nan] = 0x7FC0
    return top


@cache
def _float8_values(dtype: str) -> Array:
    """The 256 values of an 8-bit format (OCP 8-bit floating point specification, 2023)."""
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    values = np.empty(256, np.float64)
    for code in range(256):
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        sign = -1.0 if code & 0x80 else 1.0
        fraction = mantissa / (1 << mantissa_bits)
        if exponent == 0:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = float("nan")
        if dtype == "F8_E5M2" and exponent == 31:
            value = float("inf") if mantissa == 0 else float("nan")
        values[code] = sign * value
    return values


def _to_float8(numbers: Array, dtype: str) -> Array:
    positive = _float8_values(dtype)[:128]
    finite = positive[np.isfinite(positive)]  # ascending, the index is the code
    # One step past the largest number stands for "beyond".
    beyond = finite[-1] + (finite[-1] - finite[-2])
    ladder = np.append(finite, beyond)
    middles = (ladder[:-1] + ladder[1:]) / 2
    size = np.abs(numbers.astype(np.float64))
    code = np.searchsorted(middles, size, side="left")
    tie = (code < len(middles)) & (size == middles[np.minimum(code, len(middles) - 1)])
    code += tie & (code % 2 == 1)
    overflow = 0x7F if dtype == "F8_E4M3" else 0x7C
    code = np.where(code >= len(finite), overflow, code)
    code = np.where(np.isnan(numbers), 0x7F, code).astype(np.uint8)
    result: Array = code | (np.signbit(numbers).astype(np.uint8) << np.uint8(7))
    return result
