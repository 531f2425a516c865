"""The laws of every merge strategy, and PEFT's numbers where PEFT's are right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import InputError
from harness.merge.rules import StrategyOptions, prune_by_magnitude, thin_svd
from harness.merge.strategies import STRATEGIES, Kind, coefficients, find_strategy

_RULES = [s for s in STRATEGIES.values() if s.kind is not Kind.SUM]
_BY_NAME = [pytest.param(s, id=s.name) for s in _RULES]


def _pairs(seed: int, count: int, rows: int = 12, columns: int = 9):
    random = np.random.default_rng(seed)
    ranks = random.integers(1, 5, count)
    return [
        (random.standard_normal((rows, r)), random.standard_normal((r, columns))) for r in ranks
    ]


def _apply(strategy, pairs, weights, options=None, seeds=None) -> np.ndarray:
    options = options or StrategyOptions()
    if strategy.kind is Kind.FACTORS:
        left, right = strategy.factors(pairs, weights, options)
        return left @ right
    seeds = range(len(pairs)) if seeds is None else seeds
    generators = [np.random.default_rng(seed) for seed in seeds]
    return strategy.entries([a @ b for a, b in pairs], weights, options, generators)


def test_every_strategy_names_its_source_and_is_found_under_dashes() -> None:
    for name, strategy in STRATEGIES.items():
        assert strategy.source
        assert find_strategy(name.replace("_", "-")) is strategy
    with pytest.raises(InputError, match=r"did you mean ties\?"):
        find_strategy("tiess")


@pytest.mark.parametrize("strategy", _BY_NAME)
def test_one_whole_adapter_is_itself(strategy) -> None:
    pairs = _pairs(1, 1)
    if strategy.name == "iso_c":  # it flattens a spectrum: an adapter whose spectrum is flat
        left, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 3)))
        right, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((9, 3)))
        pairs = [(left * 0.7, right.T)]
    merged = _apply(strategy, pairs, [1.0], StrategyOptions(density=1.0, epsilon=0.0))
    np.testing.assert_allclose(merged, pairs[0][0] @ pairs[0][1], atol=1e-12)


@pytest.mark.parametrize("strategy", _BY_NAME)
def test_zero_weights_give_no_delta(strategy) -> None:
    assert not np.any(np.abs(_apply(strategy, _pairs(2, 3), [0.0] * 3)) > 1e-12)


@pytest.mark.parametrize("strategy", _BY_NAME)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_adapters_does_not_matter(strategy, seed: int) -> None:
    pairs, weights = _pairs(seed, 3), [0.5, 1.0, 2.0]
    forward = _apply(strategy, pairs, weights, seeds=[0, 1, 2])
    backward = _apply(strategy, pairs[::-1], weights[::-1], seeds=[2, 1, 0])
    np.testing.assert_allclose(forward, backward, atol=1e-9)


@pytest.mark.parametrize("strategy", _BY_NAME)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_weights_scale_the_result(strategy, seed: int, factor: float) -> None:
    pairs = _pairs(seed, 2)
    once = _apply(strategy, pairs, [1.0, 1.0])
    scaled = _apply(strategy, pairs, [factor, factor])
    np.testing.assert_allclose(scaled, factor * once, atol=1e-9)


def test_svd_of_full_rank_is_the_sum_and_a_truncation_is_the_best() -> None:
    pairs, weights = _pairs(3, 2, rows=20, columns=16), [0.7, -0.3]
    total = sum(w * a @ b for w, (a, b) in zip(weights, pairs, strict=True))
    np.testing.assert_allclose(_apply(STRATEGIES["svd"], pairs, weights), total, atol=1e-12)
    u, s, vt = np.linalg.svd(total)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    merged = _apply(STRATEGIES["svd"], pairs, weights, StrategyOptions(rank=2))
    np.testing.assert_allclose(merged, best, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6))
def test_thin_svd_is_numpys(seed: int, rank: int) -> None:
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((11, rank)), random.standard_normal((rank, 8))
    u, s, vt = thin_svd(left, right)
    np.testing.assert_allclose((u * s) @ vt, left @ right, atol=1e-10)
    np.testing.assert_allclose(s, np.linalg.svd(left @ right)[1][: len(s)], rtol=1e-9, atol=1e-12)


def test_iso_c_has_one_singular_value_and_tsv_leaves_orthogonal_tasks_alone() -> None:
    merged = _apply(STRATEGIES["iso_c"], _pairs(4, 2, rows=30, columns=30), [1.0, 1.0])
    s = np.linalg.svd(merged)[1]
    s = s[s > 1e-9]
    np.testing.assert_allclose(s, s[0])
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 4)))
    p, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 4)))
    pairs = [(q[:, :2] * [3.0, 2.0], p[:, :2].T), (q[:, 2:] * [5.0, 1.0], p[:, 2:].T)]
    total = sum(a @ b for a, b in pairs)
    np.testing.assert_allclose(_apply(STRATEGIES["tsv"], pairs, [1.0, 1.0]), total, atol=1e-12)


def test_knots_at_full_density_where_no_signs_conflict_averages_the_aligned_parts() -> None:
    left, right = np.abs(_pairs(5, 1)[0][0]), np.abs(_pairs(5, 1)[0][1])
    merged = _apply(
        STRATEGIES["knots"], [(left, right)] * 2, [1.0, 1.0], StrategyOptions(density=1)
    )
    # Two equal adapters: every aligned entry agrees with itself, and their mean is the adapter.
    np.testing.assert_allclose(merged, left @ right, atol=1e-10)


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_entry_strategies_give_pefts_numbers_on_deltas(name: str, density: float) -> None:
    import torch
    from peft.utils import merge_utils

    pairs, weights = _pairs(6, 3, rows=24, columns=20), [0.7, 0.3, 1.5]
    deltas = [torch.from_numpy(a @ b) for a, b in pairs]
    theirs = getattr(merge_utils, name)(deltas, torch.tensor(weights), density)
    mine = _apply(STRATEGIES[name], pairs, weights, StrategyOptions(density=density))
    np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-6)


_DRAWN = ("dare_linear", "dare_ties", "della")


@pytest.mark.parametrize("strategy", [p for p in _BY_NAME if p.id not in _DRAWN])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rows_and_columns_in_another_order_merge_in_that_order(strategy, seed: int) -> None:
    pairs, random = _pairs(seed, 2), np.random.default_rng(seed)
    rows, columns = random.permutation(12), random.permutation(9)
    moved = [(left[rows], right[:, columns]) for left, right in pairs]
    merged = _apply(strategy, pairs, [0.7, 1.3])
    other = _apply(strategy, moved, [0.7, 1.3])
    np.testing.assert_allclose(other, merged[rows][:, columns], atol=1e-9)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(columns, full_matrices=False)
    return u @ vt


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_thin_factors_give_what_the_papers_compute_on_whole_matrices(seed: int) -> None:
    import torch
    from peft.utils import merge_utils

    pairs, weights = _pairs(seed, 2, rows=24, columns=20), [0.7, 1.3]
    deltas = [a @ b for a, b in pairs]
    # Iso-C: the singular values of the sum, all at their mean.
    u, s, vt = np.linalg.svd(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    rank = int(np.count_nonzero(s > 1e-9))
    iso = s[:rank].mean() * (u[:, :rank] @ vt[:rank])
    np.testing.assert_allclose(_apply(STRATEGIES["iso_c"], pairs, weights), iso, atol=1e-9)
    # TSV-Merge, eq. 5: U⊥ Σ V⊥ᵀ of all tasks' singular vectors together.
    parts = [np.linalg.svd(d) for d in deltas]
    ranks = [int(np.count_nonzero(part[1] > 1e-9)) for part in parts]
    u = _orthonormal(np.hstack([p[0][:, :r] for p, r in zip(parts, ranks, strict=True)]))
    v = _orthonormal(np.hstack([p[2][:r].T for p, r in zip(parts, ranks, strict=True)]))
    s = np.concatenate([w * p[1][:r] for w, p, r in zip(weights, parts, ranks, strict=True)])
    np.testing.assert_allclose(_apply(STRATEGIES["tsv"], pairs, weights), (u * s) @ v.T, atol=1e-9)
    # KnOTS: TIES on ΣV of [Δ₁|Δ₂] = UΣV; PEFT's TIES stands for the authors'.
    u, s, vt = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    aligned = np.split((s[:, None] * vt)[s > 1e-9], 2, axis=1)
    tied = merge_utils.ties([torch.from_numpy(v) for v in aligned], torch.tensor(weights), 0.5)
    expected = u[:, s > 1e-9] @ tied.numpy()
    merged = _apply(STRATEGIES["knots"], pairs, weights)
    np.testing.assert_allclose(merged, expected, atol=1e-6 * np.abs(expected).max())


class _Dealt:
    """A generator whose draws are known beforehand."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = draws

    def random(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return self.draws.reshape(shape).astype(dtype)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_with_the_same_entries_dropped_dare_gives_pefts_numbers(name: str, monkeypatch) -> None:
    import torch
    from peft.utils import merge_utils

    pairs, weights, density = _pairs(8, 2, rows=24, columns=20), [0.7, 1.5], 0.4
    random = np.random.default_rng(0)
    draws = [random.random((24, 20)) for _ in pairs]
    dealt = iter([torch.from_numpy((d < density).astype(np.float64)) for d in draws])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(dealt))
    deltas = [torch.from_numpy(a @ b) for a, b in pairs]
    theirs = getattr(merge_utils, name)(deltas, torch.tensor(weights), density)
    mine = STRATEGIES[name].entries(
        [d.numpy() for d in deltas], weights, StrategyOptions(density=density),
        [_Dealt(d) for d in draws],
    )  # fmt: skip
    np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-6)


def test_della_keeps_with_the_papers_probabilities() -> None:
    # Deep et al. 2024, section 3: p_i = p_min + ε/n · r_i, p_min = p − ε/2, r = 0 for the largest.
    columns, density, epsilon = 101, 0.6, 0.3
    delta = np.random.default_rng(0).permutation(np.linspace(0.1, 1, columns))[None]
    ranks = np.argsort(np.argsort(-np.abs(delta[0])))
    dropped = (1 - density) - epsilon / 2 + epsilon * ranks / (columns - 1)
    for shift in (-1e-4, 1e-4):  # a draw just below the share that is kept keeps; just above drops
        merged = STRATEGIES["della"].entries(
            [delta], [1.0], StrategyOptions(density=density, epsilon=epsilon),
            [_Dealt((1 - dropped + shift)[None])],
        )  # fmt: skip
        if shift < 0:
            np.testing.assert_allclose(merged, delta / (1 - dropped), rtol=1e-5)
        else:
            assert not merged.any()


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_dropping_keeps_the_density_and_the_mean(name: str) -> None:
    pairs = [(np.ones((400, 1)), np.ones((1, 500)))]
    merged = _apply(STRATEGIES[name], pairs, [1.0], StrategyOptions(density=0.3))
    assert abs(np.mean(merged != 0) - 0.3) < 0.01
    assert abs(merged.mean() - 1) < 0.03
    if name != "della":
        np.testing.assert_allclose(np.unique(merged), [0, 1 / 0.3])


def test_della_drops_small_entries_more_often_than_large_ones() -> None:
    delta = np.tile(np.linspace(0.1, 1, 500), (400, 1))
    strategy = STRATEGIES["della"]
    options = StrategyOptions(density=0.5, epsilon=0.8)
    merged = strategy.entries([delta], [1.0], options, [np.random.default_rng(0)])
    kept = (merged != 0).mean(axis=0)
    assert kept[-50:].mean() > 0.8
    assert kept[:50].mean() < 0.2


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), density=st.floats(0.01, 1))
def test_pruning_keeps_exactly_the_share_even_among_ties(values: list[int], density: float) -> None:
    delta = np.array([values], np.float64)
    pruned = prune_by_magnitude(delta, density)
    keep = int(density * delta.size)
    kept = pruned[pruned != 0]
    assert len(kept) <= keep
    largest = np.sort(np.abs(delta).ravel())[::-1][:keep]
    np.testing.assert_array_equal(np.sort(np.abs(kept)), np.sort(largest[largest != 0]))


def test_weights_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(InputError, match="takes no weights"):
        coefficients("sequential", [1.0], 1)
    with pytest.raises(InputError, match="needs one weight"):
        coefficients("weighted", None, 2)
    with pytest.raises(InputError, match="sum to zero"):
        coefficients("average", [1.0, -1.0], 2)
    assert coefficients("weighted", [1.0, -1.0], 2) == (1.0, -1.0)
    assert coefficients("average", None, 4) == (0.25,) * 4


@pytest.mark.parametrize("wrong", [{"density": 0}, {"density": 1.5}, {"rank": 0}, {"seed": -1},
                                   {"epsilon": 1.0}, {"density": float("nan")}])  # fmt: skip
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        StrategyOptions(**wrong)
