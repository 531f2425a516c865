"""A pass means what it says: intervals cover, and false passes are rare."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.stopping.intervals import (
    clustered_interval,
    exact_interval,
    prompts_needed,
    rate_interval,
    wilson_interval,
)

DRAWS = 10_000
RATES = (0.01, 0.05, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)


@given(st.integers(1, 400), st.data())
@settings(max_examples=25, deadline=None)
def test_intervals_are_those_of_scipy(total, data):
    from scipy.stats import binomtest

    count = data.draw(st.integers(0, total))
    test = binomtest(count, total)
    for ours, method in ((wilson_interval, "wilson"), (exact_interval, "exact")):
        theirs = test.proportion_ci(method=method)
        assert ours(count, total).low == pytest.approx(theirs.low, abs=1e-9)
        assert ours(count, total).high == pytest.approx(theirs.high, abs=1e-9)
    hull = rate_interval(count, total)
    assert hull.low <= wilson_interval(count, total).low
    assert hull.high >= wilson_interval(count, total).high


@pytest.mark.parametrize("total", [8, 20, 50, 74, 200])
def test_false_passes_are_rare_at_every_rate(total):
    import numpy

    draw = numpy.random.default_rng(0)
    low = numpy.array([rate_interval(count, total).low for count in range(total + 1)])
    high = numpy.array([rate_interval(count, total).high for count in range(total + 1)])
    for rate in RATES:
        # The true rate is the required one: every pass is false, and rates below pass less.
        counts = draw.binomial(total, rate, DRAWS)
        assert (low[counts] > rate).mean() <= 0.05
        assert (high[counts] < rate).mean() <= 0.05


def test_wilson_alone_would_pass_falsely_too_often():
    import numpy

    draw = numpy.random.default_rng(0)
    low = numpy.array([wilson_interval(count, 50).low for count in range(51)])
    assert (low[draw.binomial(50, 0.01, DRAWS)] > 0.01).mean() > 0.05


@pytest.mark.parametrize("alike", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(("prompts", "samples"), [(8, 8), (50, 4), (74, 16)])
def test_false_passes_are_rare_where_samples_of_a_prompt_are_alike(prompts, samples, alike):
    import numpy

    draw = numpy.random.default_rng(0)
    # The interval depends on the sum of the counts alone.
    low = numpy.array(
        [rate_interval(total / samples, prompts).low for total in range(prompts * samples + 1)]
    )
    for rate in (0.05, 0.5, 0.9, 0.98):
        shape = (1 - alike) / alike
        own = draw.beta(rate * shape, (1 - rate) * shape, (DRAWS, prompts))
        counts = draw.binomial(samples, own)
        assert (low[counts.sum(1)] > rate).mean() <= 0.05
    one = counts[0].tolist()
    assert clustered_interval(one, samples).low == low[sum(one)]


def test_samples_do_not_stand_in_for_prompts():
    assert clustered_interval([8] * 10, 8) == rate_interval(10, 10)
    with pytest.raises(ValueError, match="counts of 2 samples"):
        clustered_interval([3], 2)


def test_needed_prompts_decide_and_one_fewer_does_not():
    assert prompts_needed(1.0, min_rate=0.95) == 73
    assert prompts_needed(0.0, max_rate=0.05) == 73
    assert rate_interval(73, 73).low > 0.95 >= rate_interval(72, 72).low
    assert prompts_needed(0.9, min_rate=0.9) is None
    assert prompts_needed(1.0, min_rate=1.0) is None
    needed = prompts_needed(0.8, min_rate=0.7, max_rate=0.95)
    assert rate_interval(0.8 * needed, needed).low > 0.7
    assert rate_interval(0.8 * needed, needed).high < 0.95
