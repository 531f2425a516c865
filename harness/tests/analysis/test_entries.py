"""Distributions of entries: exact counts, stated errors, NaN and infinities found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.tests.analysis.dense import make_pair


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=60), st.floats(0.01, 1))
def test_bfloat16_quantiles_of_magnitudes_are_exact(values: list[float], share: float) -> None:
    import math

    import torch

    from harness.analysis.entries import count_entries

    tensor = torch.tensor(values).bfloat16()
    ordered = tensor.float().abs().sort().values
    found = count_entries(tensor).magnitude_quantiles(share, 1.0)
    place = max(0, math.ceil(share * len(ordered) - 1e-9) - 1)
    assert found == (ordered[place].item(), ordered[-1].item())


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_nan_infinities_and_zeros_are_counted(name: str) -> None:
    import torch

    from harness.analysis.entries import count_entries

    values = [0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), float("-inf")]
    counts = count_entries(torch.tensor(values).to(getattr(torch, name)))
    assert (counts.total, counts.nan, counts.infinite, counts.zero) == (7, 1, 2, 2)


def test_a_float32_histogram_matches_numpy_but_for_entries_at_the_edges() -> None:
    import numpy as np
    import torch

    from harness.analysis.entries import count_entries

    tensor = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    edges = np.linspace(-4, 4, 41)
    expected, _ = np.histogram(tensor.numpy(), bins=edges, density=True)
    found = count_entries(tensor).histogram(edges)
    assert np.abs(found - expected).max() < 0.01
    assert found.sum() * 0.2 == pytest.approx(1, abs=0.001)


def test_counts_of_parts_add_up_to_the_counts_of_the_whole() -> None:
    import torch

    from harness.analysis.entries import count_entries, sum_counts

    tensor = torch.randn(100, 7, generator=torch.Generator().manual_seed(1))
    parts = sum_counts(count_entries(part) for part in tensor.split(13))
    assert (parts.counts == count_entries(tensor).counts).all()


def test_a_sampled_delta_lies_within_four_standard_errors_of_the_exact_one() -> None:
    import numpy as np

    from harness.analysis.entries import delta_counts

    pair = make_pair(11, rank=8, out=900, columns=700)
    exact, sampled = delta_counts(pair, exact=True), delta_counts(pair)
    assert exact.exact
    assert exact.total == 900 * 700
    assert not sampled.exact
    assert sampled.total < exact.total
    one, two = (np.cumsum(c.counts) / c.total for c in (exact, sampled))
    assert 0 < np.abs(one - two).max() < 4 * sampled.standard_error


def test_the_same_places_are_sampled_every_time() -> None:
    from harness.analysis.entries import delta_counts

    pair = make_pair(12, rank=2, out=900, columns=700)
    assert (delta_counts(pair).counts == delta_counts(pair).counts).all()
