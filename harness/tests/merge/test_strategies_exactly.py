"""The strategies at their edges: ranks, ties, limits, dtypes, and what each error says."""

import itertools

import numpy as np
import pytest

from harness import InputError
from harness.merge.rules import StrategyOptions, prune_by_magnitude, thin_svd
from harness.merge.strategies import STRATEGIES, coefficients, find_strategy


def entries(name, deltas, weights, *, seeds=None, **options):
    rng = [np.random.default_rng(seed) for seed in (seeds or range(len(deltas)))]
    return STRATEGIES[name].entries(deltas, weights, StrategyOptions(**options), rng)


def factors(name, pairs, weights, **options):
    left, right = STRATEGIES[name].factors(pairs, weights, StrategyOptions(**options))
    return left @ right


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_factors_of_sequential_weighted_and_average():
    assert coefficients("sequential", None, 3) == (1.0, 1.0, 1.0)
    assert coefficients("weighted", [2.0, 3.0], 2) == (2.0, 3.0)
    assert coefficients("average", None, 4) == (0.25,) * 4
    assert coefficients("average", [1.0, 3.0], 2) == (0.25, 0.75)
    assert coefficients("ties", None, 2) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: coefficients("sequential", [1.0], 1),
         "--weights: sequential adds every adapter whole and takes no weights → "
         "use --merge-strategy weighted"),
        (lambda: coefficients("weighted", None, 1),
         "--weights: weighted needs one weight an adapter → e.g. --weights 0.7 0.3"),
        (lambda: coefficients("average", [1.0, -1.0], 2),
         "--weights: the weights sum to zero, and an average divides by their sum → "
         "use --merge-strategy weighted for a difference of adapters"),
        (lambda: find_strategy("tiez"),
         "--merge-strategy: unknown strategy 'tiez' → did you mean ties? choose from: "
         + ", ".join(STRATEGIES)),
        (lambda: find_strategy("zzzz"),
         "--merge-strategy: unknown strategy 'zzzz' → choose from: " + ", ".join(STRATEGIES)),
        (lambda: StrategyOptions(density=0.0), "--density: 0.0 is not in (0, 1]"),
        (lambda: StrategyOptions(density=1.1), "--density: 1.1 is not in (0, 1]"),
        (lambda: StrategyOptions(rank=0), "--rank: 0 is not a rank → write 1 or more"),
        (lambda: StrategyOptions(epsilon=1.0), "--epsilon: 1.0 is not in [0, 1)"),
        (lambda: StrategyOptions(epsilon=-0.1), "--epsilon: -0.1 is not in [0, 1)"),
        (lambda: StrategyOptions(seed=-1), "--seed: -1 is negative → write 0 or more"),
    ],
)  # fmt: skip
def test_every_refusal_says_where_what_and_how_to_mend_it(call, words):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == words


def test_limits_of_the_options_are_allowed():
    StrategyOptions(density=1.0, rank=1, epsilon=0.0, seed=0)
    assert find_strategy("dare-ties") is STRATEGIES["dare_ties"]
    with pytest.raises(InputError, match=r"did you mean dare_linear\? choose from"):
        find_strategy("dare_lineer")


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(9, 4, 2), (4, 9, 2), (3, 3, 5), (2, 8, 6), (8, 2, 6), (6, 6, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thin_svd_has_the_numerical_rank_and_gives_the_product_back(rows, columns, inner, dtype):
    left, right = draw(rows, inner, dtype=dtype), draw(inner, columns, seed=1, dtype=dtype)
    for scale in (1.0, 1e-8):
        u, s, vt = thin_svd(left * dtype(scale), right)
        whole = left.astype(np.float64) @ right.astype(np.float64)
        assert len(s) == np.linalg.matrix_rank(whole) == min(rows, columns, inner)
        assert s.dtype == dtype
        tolerance = 100 * np.finfo(dtype).eps
        np.testing.assert_allclose((u * s) @ vt, whole * scale, atol=tolerance * scale * 10)
        np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thin_svd_drops_what_is_below_the_tolerance_and_keeps_what_is_above(dtype):
    # s₀ = 1, max(m, n) = 40: the tolerance is 40·ε. The inner side, of 3, must not count.
    epsilon = np.finfo(dtype).eps
    for second, rank in ((60 * epsilon, 2), (25 * epsilon, 1), (0.0, 1)):
        left = np.zeros((40, 3), dtype)
        left[0, 0], left[1, 1] = 1, second
        right = np.eye(3, 8, dtype=dtype)
        assert len(thin_svd(left, right)[1]) == rank
        assert len(thin_svd(right.T, left.T)[1]) == rank
    assert len(thin_svd(np.zeros((4, 2), dtype), np.zeros((2, 4), dtype))[1]) == 1


def test_knots_has_the_numerical_rank_too():
    # One delta twice: the rank is one; with TIES' election of equal halves the mean is the delta.
    left, right = draw(12, 1), draw(1, 30, seed=1)
    for dtype in (np.float32, np.float64):
        pair = (left.astype(dtype), right.astype(dtype))
        u, vt = STRATEGIES["knots"].factors([pair, pair], [1.0, 1.0], StrategyOptions(density=1.0))
        assert u.shape == (12, 1)
        assert vt.shape == (1, 30)
        np.testing.assert_allclose(u @ vt, pair[0] @ pair[1], rtol=1e-4)
    tall = (draw(4, 3), draw(3, 50, seed=1))
    wide = (draw(4, 2, seed=2), draw(2, 50, seed=3))
    u, vt = STRATEGIES["knots"].factors([tall, wide], [1.0, 1.0], StrategyOptions(density=1.0))
    assert (u.shape, vt.shape) == ((4, 4), (4, 50))


def test_knots_keeps_values_above_the_tolerance_only():
    for dtype, (factor, rank) in itertools.product(
        (np.float32, np.float64), ((60.0, 2), (25.0, 1))
    ):
        left = np.zeros((40, 3), dtype)
        left[0, 0], left[1, 1] = 1, factor * np.finfo(dtype).eps
        pairs = [(left, np.eye(3, 8, dtype=dtype))]
        u, _ = STRATEGIES["knots"].factors(pairs, [1.0], StrategyOptions(density=1.0))
        assert u.shape[1] == rank


def test_knots_of_one_adapter_is_that_adapter():
    pair = (draw(7, 3), draw(3, 11, seed=1))
    np.testing.assert_allclose(factors("knots", [pair], [1.0], density=1.0), pair[0] @ pair[1])


def test_tsv_gives_each_task_its_share_of_the_rank():
    pairs = [(draw(4, 3, seed=n), draw(3, 6, seed=9 + n)) for n in range(3)]
    left, _ = STRATEGIES["tsv"].factors(pairs, [1.0] * 3, StrategyOptions())
    assert left.shape == (4, 3)  # min(4, 6) // 3 = 1 each
    two = STRATEGIES["tsv"].factors(pairs[:2], [1.0] * 2, StrategyOptions())
    assert two[0].shape == (4, 4)
    np.testing.assert_allclose(
        factors("tsv", [(draw(3, 3), draw(3, 8, seed=1))], [1.0]),
        draw(3, 3) @ draw(3, 8, seed=1),
    )


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if s.factors])
def test_factor_strategies_take_one_weight_a_delta(name):
    pairs = [(draw(4, 2), draw(2, 4, seed=1)), (draw(4, 2, seed=2), draw(2, 4, seed=3))]
    with pytest.raises(ValueError, match="zip"):
        factors(name, pairs, [1.0])


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if s.entries])
def test_entry_strategies_take_one_weight_a_delta(name):
    with pytest.raises(ValueError, match="zip"):
        entries(name, [draw(3, 3), draw(3, 3, seed=1)], [1.0], seeds=[0, 1])


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_random_strategies_take_one_generator_a_delta(name):
    with pytest.raises(ValueError, match="zip"):
        entries(name, [draw(3, 3), draw(3, 3, seed=1)], [1.0, 1.0], seeds=[0])


def test_pruning_at_its_limits():
    delta = draw(4, 5, dtype=np.float32)
    whole = prune_by_magnitude(delta, 1.0)
    assert np.array_equal(whole, delta)
    assert whole is not delta
    nothing = prune_by_magnitude(delta, 0.01)
    assert not nothing.any()
    assert (nothing.shape, nothing.dtype) == (delta.shape, delta.dtype)


class Fixed:
    """A generator that gives what it is told, and notes what it is asked for."""

    def __init__(self, value):
        self.value, self.asked = value, []

    def random(self, shape, dtype=np.float64):
        self.asked.append(np.dtype(dtype))
        return np.broadcast_to(np.asarray(self.value, dtype), shape)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_random_numbers_are_float32_so_that_a_seed_gives_the_same_bits_everywhere(name):
    delta, generator = draw(3, 4, dtype=np.float32), Fixed(0.0)
    found = STRATEGIES[name].entries([delta], [1.0], StrategyOptions(density=0.5), [generator])
    assert generator.asked == [np.float32]
    assert found.dtype == np.float32


def test_a_draw_that_is_the_density_itself_is_dropped():
    delta = draw(3, 4, dtype=np.float32)
    for name in ("dare_linear", "dare_ties"):
        found = STRATEGIES[name].entries([delta], [1.0], StrategyOptions(density=0.5), [Fixed(0.5)])
        assert not found.any()
    found = STRATEGIES["della"].entries(
        [delta], [1.0], StrategyOptions(density=0.5, epsilon=0.0), [Fixed(0.5)]
    )
    assert not found.any()


@pytest.mark.parametrize(
    ("density", "epsilon", "low", "high"),
    [
        (0.5, 0.2, 0.4, 0.6),    # epsilon itself
        (0.9, 0.9, 0.8, 1.0),    # twice what is dropped: the largest entry is always kept
        (0.2, 0.9, 0.0, 0.4),    # twice the density: the smallest never is
        (0.5, 0.0, 0.5, 0.5),
    ],
)  # fmt: skip
def test_della_keeps_from_low_to_high_by_rank_in_the_row(density, epsilon, low, high):
    # In each row the entries' sizes fall in another order, with a tie: the earlier counts larger.
    delta = np.array([[5, -4, 3, -3, 1], [1, 2, -3, 4, -5]], np.float32)
    share = np.linspace(high, low, 5)
    expected = np.array([share, share[::-1]])
    options = StrategyOptions(density=density, epsilon=epsilon)
    kept = np.zeros(delta.shape)
    draws = (np.arange(2000) + 0.5) / 2000
    for value in draws:
        found = STRATEGIES["della"].entries([delta], [1.0], options, [Fixed(value)])
        assert found.dtype == np.float32
        alive = found != 0
        kept += alive
        np.testing.assert_allclose(found[alive], (delta / expected)[alive], rtol=1e-5)
    np.testing.assert_allclose(kept / 2000, expected, atol=1.5 / 2000)


def test_della_of_one_and_of_two_columns():
    for columns in (1, 2):
        delta = np.arange(columns, 0, -1, dtype=np.float32)[None]
        options = StrategyOptions(density=0.5, epsilon=0.2)
        found = STRATEGIES["della"].entries([delta], [1.0], options, [Fixed(0.0)])
        np.testing.assert_allclose(found, delta / np.array([0.6, 0.4][:columns]), rtol=1e-6)


def test_an_even_vote_elects_plus():
    one = np.array([[1.0, -2.0]], np.float32)
    for name in ("ties", "dare_ties", "della"):
        found = entries(name, [one, -one], [1.0, 1.0], density=1.0)
        np.testing.assert_allclose(found, [[1.0, 2.0]])


@pytest.mark.parametrize("count", [127, 128, 129, 300])
def test_many_deltas_are_counted_without_overflow(count):
    found = entries("ties", [np.ones((1, 1), np.float32)] * count, [1.0] * count, density=1.0)
    assert found == 1.0


def test_knots_of_factors_wider_than_their_product():
    pair = (draw(7, 5), draw(5, 3, seed=1))
    found = factors("knots", [pair, pair], [1.0, 1.0], density=1.0)
    np.testing.assert_allclose(found, pair[0] @ pair[1])


def test_della_counts_equal_entries_from_the_front_and_in_float32():
    delta = np.ones((2, 700), np.float32)
    options = StrategyOptions(density=0.6, epsilon=0.3)
    ranks = np.arange(700, dtype=np.float32) / np.float32(699)
    share = np.float32(1 - (0.4 - 0.15)) - np.float32(0.3) * ranks
    found = STRATEGIES["della"].entries([delta], [1.0], options, [Fixed(0.0)])
    expected = delta / np.broadcast_to(share, delta.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.array_equal(found, expected), "other bits: something was not computed in float32"


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_what_is_dropped_has_no_vote(name):
    one = draw(2, 5, dtype=np.float32)
    options = StrategyOptions(density=0.5, epsilon=0.0)
    found = STRATEGIES[name].entries([one, one], [1.0, 1.0], options, [Fixed(0.9), Fixed(0.0)])
    np.testing.assert_allclose(found, one * 2, rtol=1e-6)
