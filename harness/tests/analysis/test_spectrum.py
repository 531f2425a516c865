"""Norms, spectra and inner products from factors equal those of the dense delta."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.tests.analysis.dense import make_pair

SEEDS = st.integers(0, 2**31)
RANKS = st.integers(1, 6)
QUICK = settings(max_examples=20, deadline=None)


def _close(found: Any, expected: Any, relative: float = 1e-9) -> bool:
    import torch

    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


@QUICK
@given(seed=SEEDS, rank=RANKS, out=st.integers(1, 20), columns=st.integers(1, 20))
def test_norm_and_all_singular_values_equal_the_dense_ones(
    seed: int, rank: int, out: int, columns: int
) -> None:
    import torch

    from harness.analysis.spectrum import delta_norm, factors_of, singular_values

    pair = make_pair(seed, rank=rank, out=out, columns=columns, scale=-0.75)
    factors, dense = factors_of(pair), pair.delta()
    assert delta_norm(factors) == pytest.approx(float(dense.norm()), rel=1e-12)
    values = singular_values(factors)
    assert values.shape == (rank,)
    shared = min(rank, out, columns)
    assert _close(values[:shared], torch.linalg.svdvals(dense)[:shared])
    assert float(values[shared:].sum()) <= 1e-12 * float(values[0])


@QUICK
@given(seed=SEEDS, rank=RANKS)
def test_permuting_the_ranks_changes_no_figure(seed: int, rank: int) -> None:
    import torch

    from harness.analysis.spectrum import delta_norm, factors_of, singular_values

    pair = make_pair(seed, rank=rank)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    moved = make_pair(seed, rank=rank, a=pair.a[order], b=pair.b[:, order])
    one, two = factors_of(pair), factors_of(moved)
    assert delta_norm(one) == pytest.approx(delta_norm(two), rel=1e-12)
    assert _close(singular_values(one), singular_values(two))


@QUICK
@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_scaling_a_up_and_b_down_changes_no_figure(seed: int, exponent: int) -> None:
    from harness.analysis.spectrum import delta_norm, factors_of, singular_values

    pair = make_pair(seed)
    factor = 2.0**exponent
    moved = make_pair(seed, a=pair.a * factor, b=pair.b / factor)
    one, two = factors_of(pair), factors_of(moved)
    assert delta_norm(one) == pytest.approx(delta_norm(two), rel=1e-12)
    assert _close(singular_values(one), singular_values(two))


@QUICK
@given(first=SEEDS, second=SEEDS)
def test_inner_products_and_cosines_equal_the_dense_ones(first: int, second: int) -> None:
    from harness.analysis.spectrum import cosine, factors_of, inner_product

    one, two = make_pair(first, rank=3), make_pair(second, rank=5, scale=-2.0)
    dense_one, dense_two = one.delta(), two.delta()
    sizes = float(dense_one.norm() * dense_two.norm())
    expected = float((dense_one * dense_two).sum())
    found = inner_product(factors_of(one), factors_of(two))
    assert found == pytest.approx(expected, abs=1e-12 * sizes)
    assert cosine(one, two) == pytest.approx(expected / sizes, abs=1e-12)


@QUICK
@given(seed=SEEDS)
def test_the_cosine_with_itself_is_one_and_with_its_negation_minus_one(seed: int) -> None:
    from harness.analysis.spectrum import cosine

    pair = make_pair(seed)
    negated = make_pair(seed, b=-pair.b)
    assert cosine(pair, pair) == pytest.approx(1.0, abs=1e-12)
    assert cosine(pair, negated) == pytest.approx(-1.0, abs=1e-12)


def test_dead_and_doubled_ranks_have_singular_values_of_zero() -> None:
    import torch

    from harness.analysis.spectrum import factors_of, singular_values

    pair = make_pair(3, rank=5)
    a, b = pair.a.clone(), pair.b.clone()
    a[1] = 0
    a[4], b[:, 4] = a[0], b[:, 0]
    changed = make_pair(3, rank=5, a=a, b=b)
    values = singular_values(factors_of(changed))
    assert _close(values[:3], torch.linalg.svdvals(changed.delta())[:3])
    assert float(values[3:].max()) < 1e-12 * float(values[0])


def test_steep_spectra_keep_their_small_singular_values() -> None:
    import torch

    from harness.analysis.spectrum import factors_of, singular_values

    pair = make_pair(5, rank=6, out=64, columns=48)
    steps = torch.logspace(0, -6, 6, dtype=torch.float64)
    orthogonal_a = torch.linalg.qr(pair.a.double().T).Q.T
    orthogonal_b = torch.linalg.qr(pair.b.double()).Q
    steep = make_pair(5, a=orthogonal_a * steps[:, None], b=orthogonal_b, scale=1.0)
    values = singular_values(factors_of(steep))
    assert bool(((values / steps - 1).abs() < 1e-6).all())


def test_a_large_module_in_bfloat16_is_exact_to_a_millionth() -> None:
    import torch

    from harness.analysis.spectrum import delta_norm, factors_of, singular_values

    pair = make_pair(7, rank=32, out=700, columns=500)
    rounded = make_pair(7, a=pair.a.bfloat16(), b=pair.b.bfloat16())
    factors, dense = factors_of(rounded), rounded.delta()
    expected = torch.linalg.svdvals(dense)[:32]
    assert bool(((singular_values(factors) / expected - 1).abs() < 1e-6).all())
    assert abs(delta_norm(factors) / float(dense.norm()) - 1) < 1e-12


@QUICK
@given(seed=SEEDS, rank=RANKS, share=st.sampled_from([0.0, 0.5, 0.999, 1.0]), narrow=st.booleans())
def test_half_precision_norms_and_cosines_are_right_to_a_millionth_also_where_ranks_cancel(
    seed: int, rank: int, share: float, narrow: bool
) -> None:
    import torch

    from harness.analysis.spectrum import cosine, pair_norm

    # The second half of the ranks takes back `share` of what the first half adds.
    dtype = torch.bfloat16 if narrow else torch.float16
    half = make_pair(seed, rank=rank, out=96, columns=80)
    a = torch.cat([half.a, half.a]).to(dtype)
    b = torch.cat([half.b.to(dtype), -(half.b.to(dtype) * share)], dim=1)
    pair = make_pair(seed, a=a, b=b)
    second = make_pair(seed, a=half.a.roll(1, 0).to(dtype), b=(half.b + 0.1).to(dtype), scale=-2.0)
    dense, crossed = pair.delta(), second.delta()
    sizes = float(dense.norm() * crossed.norm())
    assert pair_norm(pair) == pytest.approx(float(dense.norm()), rel=1e-6, abs=1e-12)
    expected = float((dense * crossed).sum()) / sizes if float(dense.norm()) > 1e-12 else 0.0
    assert cosine(pair, second) == pytest.approx(expected, rel=1e-6, abs=1e-6 / (96 * 80) ** 0.5)


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_norms_of_tiny_and_huge_factors_neither_vanish_nor_overflow(factor: float) -> None:
    import torch

    from harness.analysis.spectrum import cosine, pair_norm

    pair = make_pair(1)
    moved = make_pair(1, a=(pair.a * factor).bfloat16(), b=(pair.b / factor).bfloat16())
    norm = float(moved.delta(torch.float64).norm())
    assert pair_norm(moved) == pytest.approx(norm, rel=1e-6)
    assert cosine(moved, moved) == pytest.approx(1.0, abs=1e-6)
