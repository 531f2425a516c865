"""Stored numbers: every conversion is torch's, bit for bit, and float64 is rounded once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harness.merge.kernel import DenseDelta, FactoredDelta, Scratch, add_block
from harness.merge.storage import RAW, decode, encode

_TORCH = {
    "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _torch_bits(numbers: np.ndarray, dtype: str) -> np.ndarray:
    import torch

    narrow = torch.from_numpy(numbers).to(getattr(torch, _TORCH[dtype]))
    width = torch.uint8 if narrow.element_size() == 1 else torch.int16
    return narrow.view(width).numpy().view(np.uint8 if width == torch.uint8 else np.uint16)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_every_stored_number_decodes_to_torchs_and_encodes_back_to_itself(dtype: str) -> None:
    import torch

    bits = np.arange(1 << (8 * np.dtype(RAW[dtype]).itemsize), dtype=np.uint32)
    raw = bits.astype(np.uint8 if bits.size == 256 else np.uint16).view(RAW[dtype])
    plain = raw.view(np.uint8 if bits.size == 256 else np.int16)
    expected = torch.from_numpy(plain.copy()).view(getattr(torch, _TORCH[dtype])).float().numpy()
    np.testing.assert_array_equal(decode(raw, dtype, np.float32), expected)
    finite = np.isfinite(expected)
    back = encode(expected[finite], dtype)
    np.testing.assert_array_equal(back.view(plain.dtype), plain[finite])
    wide = encode(expected[finite].astype(np.float64), dtype)
    np.testing.assert_array_equal(wide.view(plain.dtype), plain[finite])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E5M2"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-45, 30))
def test_float32_rounds_as_torch_rounds(dtype: str, seed: int, exponent: int) -> None:
    numbers = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    numbers = np.ldexp(numbers, exponent).astype(np.float32)
    mine = encode(numbers, dtype)
    theirs = _torch_bits(numbers, dtype)
    finite = np.isfinite(decode(mine, dtype, np.float32))
    np.testing.assert_array_equal(mine.view(theirs.dtype)[finite], theirs[finite])


def test_float64_is_rounded_to_bfloat16_once_and_ties_go_to_even() -> None:
    step = 2.0**-7
    just_above_a_tie = 1 + step / 2 + 2.0**-40  # through float32 it would become the tie
    numbers = np.array([1 + step / 2, 1 + 3 * step / 2, just_above_a_tie, -just_above_a_tie, 0.0])
    rounded = decode(encode(numbers, "BF16"), "BF16", np.float64)
    np.testing.assert_array_equal(rounded, [1, 1 + 2 * step, 1 + step, -1 - step, 0])


@pytest.mark.parametrize("exponent", [-126, -130, -133, -134, -140])
def test_float64_rounds_to_bfloat16_below_the_normal_numbers(exponent: int) -> None:
    numbers = np.ldexp(np.linspace(1, 2, 65), exponent)
    mine = encode(numbers, "BF16")
    # float32 holds these exactly down to 2**-149, so torch rounds them once as well.
    np.testing.assert_array_equal(mine, _torch_bits(numbers.astype(np.float32), "BF16"))


@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (128, 2048), (100, 2050), (65, 4100)])
def test_the_paired_kernel_is_the_plain_sum_rounded(shape: tuple[int, int]) -> None:
    rows, columns = shape
    random = np.random.default_rng(rows)
    base = encode(random.standard_normal(shape).astype(np.float32), "BF16")
    left = random.standard_normal((rows, 5)).astype(np.float32)
    right = (random.standard_normal((5, columns)) * 0.01).astype(np.float32)
    delta = FactoredDelta(left, right, "BF16")
    assert delta.paired
    every = slice(0, rows)
    merged = add_block(base.copy(), delta, every, Scratch(), stored="BF16", wanted="BF16")
    wanted = decode(base, "BF16", np.float64) + left.astype(np.float64) @ right
    nearest = encode(wanted, "BF16")
    assert np.mean(merged == nearest) > 0.999
    got = decode(merged, "BF16", np.float64)
    assert np.all(
        np.abs(got - wanted) <= np.abs(decode(nearest, "BF16", np.float64) - wanted) + 1e-5
    )


def test_the_paired_kernel_rounds_ties_to_even_and_keeps_nan_and_infinity() -> None:
    step = 2.0**-7
    base = encode(np.array([[1.0, 1 + step, np.nan, np.inf, -np.inf, -1.0]]), "BF16")
    half = np.full((1, 6), step / 2, np.float32)
    half[0, 5] = -step / 2
    delta = FactoredDelta(np.ones((1, 1)), half, "BF16")
    merged = add_block(base, delta, slice(0, 1), Scratch(), stored="BF16", wanted="BF16")
    values = decode(merged, "BF16", np.float32)[0]
    np.testing.assert_array_equal(values, [1.0, 1 + 2 * step, np.nan, np.inf, -np.inf, -1.0])


@given(
    left=arrays(np.float32, (3, 2), elements=st.floats(-1e4, 1e4, width=32)),
    right=arrays(np.float32, (2, 4), elements=st.floats(-1e4, 1e4, width=32)),
)
def test_no_entry_of_a_delta_is_larger_than_its_bound(left, right) -> None:
    product = np.abs(left.astype(np.float64) @ right).max()
    assert product <= FactoredDelta(left, right, "BF16").bound * (1 + 1e-6)
    assert DenseDelta(left @ right).bound == np.abs(left @ right).max()


def test_a_delta_that_is_no_number_has_no_bound() -> None:
    left, right = np.full((1, 1), np.inf, np.float32), np.zeros((1, 2), np.float32)
    assert not FactoredDelta(left, right, "BF16").bound <= 1e30
    assert not DenseDelta(np.array([[np.nan, 1.0]])).bound <= 1e30
