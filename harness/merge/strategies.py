"""The merge strategies: pure functions of deltas, explicit weights and explicit randomness.

All work on ΔW = s·B·A, never on A and B apart (averaging those leaves cross terms behind). Three
kinds: *sums* only say with what factor each delta enters; *factor* strategies give back two thin
factors and never make a whole matrix; *entry* strategies look at every entry of every delta.
Knows nothing of files, dtypes on disk or bases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import InputError

__all__ = [
    "STRATEGIES",
    "Kind",
    "Strategy",
    "StrategyOptions",
    "coefficients",
    "find_strategy",
    "thin_svd",
]

Array = NDArray[Any]
Factors = tuple[Array, Array]


class Kind(StrEnum):
    """What a strategy has to be given."""

    SUM = "sum"
    FACTORS = "factors"
    ENTRIES = "entries"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions:
    """The knobs of the strategies that have any.

    Attributes:
        density: the share of entries that is kept, above 0, at most 1.
        rank: what `svd` truncates to; None keeps the numerical rank.
        epsilon: `della`: how far the drop probability varies with magnitude.
        seed: for `dare_*` and `della`; the same seed gives the same bits.
    """

    density: float = 0.5
    rank: int | None = None
    epsilon: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"{self.density} is not in (0, 1]", where="--density")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"{self.rank} is not a rank", where="--rank", remedy="write 1 or more")
        if not 0 <= self.epsilon < 1:
            raise InputError(f"{self.epsilon} is not in [0, 1)", where="--epsilon")
        if self.seed < 0:
            raise InputError(f"{self.seed} is negative", where="--seed", remedy="write 0 or more")


Generators = Sequence[np.random.Generator]
FactorRule = Callable[[Sequence[Factors], Sequence[float], StrategyOptions], Factors]
EntryRule = Callable[[Sequence[Array], Sequence[float], StrategyOptions, Generators], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to make one delta of several.

    Attributes:
        source: where it comes from.
        weighted: whether weights can be given.
        options: which of `StrategyOptions` it reads.
        factors: the rule of a factor strategy; entries: of an entry strategy.
    """

    name: str
    kind: Kind
    summary: str
    source: str
    weighted: bool = True
    options: tuple[str, ...] = ()
    factors: FactorRule | None = None
    entries: EntryRule | None = None


def coefficients(strategy: str, weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """With what factor each delta enters `sequential`, `weighted` or `average`.

    Raises:
        InputError: weights for `sequential`, none for `weighted`, or weights that sum to zero
            for `average`.
    """
    if strategy == "sequential":
        if weights is not None:
            raise InputError(
                "sequential adds every adapter whole and takes no weights",
                where="--weights",
                remedy="use --merge-strategy weighted",
            )
        return (1.0,) * count
    if strategy == "weighted" and weights is None:
        raise InputError(
            "weighted needs one weight an adapter",
            where="--weights",
            remedy="e.g. --weights 0.7 0.3",
        )
    given = (1.0,) * count if weights is None else tuple(weights)
    if strategy != "average":
        return given
    total = sum(given)
    if total == 0:
        raise InputError(
            "the weights sum to zero, and an average divides by their sum",
            where="--weights",
            remedy="use --merge-strategy weighted for a difference of adapters",
        )
    return tuple(weight / total for weight in given)


# --- factor strategies: thin factors in, thin factors out -------------------------------------


def thin_svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The singular value decomposition of `left @ right` through two QR: never materialised.

    `left: (m, k)`, `right: (k, n)`; returns `U: (m, p)`, `s: (p,)` falling, `Vᵀ: (p, n)` with p
    the numerical rank (`s > s₀·max(m, n)·ε`), at least 1.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    tolerance = s[0] * max(left.shape[0], right.shape[1]) * np.finfo(s.dtype).eps
    rank = max(1, int(np.count_nonzero(s > tolerance)))
    return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T


def _summed(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    left = np.concatenate([w * a for w, (a, _) in zip(weights, pairs, strict=True)], axis=1)
    return left, np.concatenate([b for _, b in pairs], axis=0)


def _svd(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    u, s, vt = thin_svd(*_summed(pairs, weights))
    rank = options.rank or len(s)
    return u[:, :rank] * s[:rank], vt[:rank]


def _iso_c(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    u, s, vt = thin_svd(*_summed(pairs, weights))
    return u * s.mean(), vt


def _tsv(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    # Each task keeps at most its share of the matrix's rank, then the singular vectors of all
    # tasks are made orthonormal together (the nearest orthonormal set: Procrustes).
    room = max(1, min(pairs[0][0].shape[0], pairs[0][1].shape[1]) // len(pairs))
    whole = [thin_svd(*pair) for pair in pairs]
    parts = [(u[:, :room], s[:room], vt[:room]) for u, s, vt in whole]
    u = _nearest_orthonormal(np.concatenate([part[0] for part in parts], axis=1))
    v = _nearest_orthonormal(np.concatenate([part[2].T for part in parts], axis=1))
    s = np.concatenate([w * part[1] for w, part in zip(weights, parts, strict=True)])
    return u * s, v.T


def _nearest_orthonormal(columns: Array) -> Array:
    u, _, vt = np.linalg.svd(columns, full_matrices=False)
    nearest: Array = u @ vt
    return nearest


def _knots(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    # [Δ₁|Δ₂|…] = U·Σ·[V₁|V₂|…]ᵀ; the Vᵢ, now in one basis, are merged by TIES.
    lefts = np.concatenate([left for left, _ in pairs], axis=1)
    bases = [np.linalg.qr(right.T) for _, right in pairs]
    q_left, r_left = np.linalg.qr(lefts)
    ends = np.cumsum([right.shape[0] for _, right in pairs])
    starts = [0, *ends[:-1]]
    core = np.concatenate(
        [r_left[:, a:b] @ r.T for a, b, (_, r) in zip(starts, ends, bases, strict=True)], axis=1
    )
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    tolerance = s[0] * max(lefts.shape[0], pairs[0][1].shape[1]) * np.finfo(s.dtype).eps
    rank = max(1, int(np.count_nonzero(s > tolerance)))
    offsets = np.cumsum([0, *(r.shape[0] for _, r in bases)])
    aligned = [vt[:rank, offsets[i] : offsets[i + 1]] @ q.T for i, (q, _) in enumerate(bases)]
    merged = _ties(aligned, weights, options, ())
    return (q_left @ u[:, :rank]) * s[:rank], merged


# --- entry strategies: whole deltas in, one whole delta out ------------------------------------


def prune_by_magnitude(delta: Array, density: float) -> Array:
    """The `int(density·size)` entries of largest magnitude; the others zero. A copy."""
    keep = int(density * delta.size)
    if keep >= delta.size:
        return delta.copy()
    if keep == 0:
        return np.zeros_like(delta)
    size = np.abs(delta).ravel()
    threshold = np.partition(size, size.size - keep)[size.size - keep]
    mask = size > threshold
    # Ties at the threshold are kept from the front, so that exactly `keep` entries remain.
    level = np.flatnonzero(size == threshold)[: keep - int(np.count_nonzero(mask))]
    mask[level] = True
    pruned: Array = np.where(mask.reshape(delta.shape), delta, delta.dtype.type(0))
    return pruned


def _drop(delta: Array, density: float, generator: np.random.Generator) -> Array:
    kept = generator.random(delta.shape, dtype=np.float32) < density
    dropped: Array = np.where(kept, delta / delta.dtype.type(density), delta.dtype.type(0))
    return dropped


def _magnitude_drop(
    delta: Array, options: StrategyOptions, generator: np.random.Generator
) -> Array:
    """DELLA's MAGPRUNE: within a row, the smaller an entry, the likelier it is dropped."""
    drop = 1 - options.density
    spread = min(options.epsilon, 2 * drop, 2 * options.density)
    columns = delta.shape[1]
    order = np.argsort(-np.abs(delta), axis=1, kind="stable")
    ranks = np.empty(delta.shape, np.float32)
    steps = np.arange(columns, dtype=np.float32) / np.float32(max(columns - 1, 1))
    np.put_along_axis(ranks, order, np.broadcast_to(steps, delta.shape), axis=1)
    kept_share = np.float32(1 - (drop - spread / 2)) - np.float32(spread) * ranks
    kept = generator.random(delta.shape, dtype=np.float32) < kept_share
    # A share of 0 (spread at its limit) is never kept; dividing by it must not be seen.
    safe = np.maximum(kept_share, np.float32(1e-6)).astype(delta.dtype)
    dropped: Array = np.where(kept, delta / safe, delta.dtype.type(0))
    return dropped


def _disjoint_mean(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """TIES' election and disjoint mean: entries of the elected sign, over their number."""
    elected = np.zeros_like(deltas[0])
    for delta in deltas:
        elected += delta
    positive = elected >= 0
    total = np.zeros_like(deltas[0])
    count = np.zeros(deltas[0].shape, np.int8 if len(deltas) < 128 else np.int32)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = np.where(positive, delta > 0, delta < 0)
        count += agrees
        total += np.where(agrees, delta, delta.dtype.type(0)) * delta.dtype.type(weight)
    total /= np.maximum(count, 1)
    return total


def _plain_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += delta * delta.dtype.type(weight)
    return total


def _magnitude_prune(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, _: Generators
) -> Array:
    return _plain_sum([prune_by_magnitude(d, options.density) for d in deltas], weights)


def _ties(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, _: Generators
) -> Array:
    return _disjoint_mean([prune_by_magnitude(d, options.density) for d in deltas], weights)


def _dare_linear(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    dropped = [_drop(d, options.density, g) for d, g in zip(deltas, rng, strict=True)]
    return _plain_sum(dropped, weights)


def _dare_ties(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    dropped = [_drop(d, options.density, g) for d, g in zip(deltas, rng, strict=True)]
    return _disjoint_mean(dropped, weights)


def _della(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    dropped = [_magnitude_drop(d, options, g) for d, g in zip(deltas, rng, strict=True)]
    return _disjoint_mean(dropped, weights)


_TABLE = (
    Strategy(
        name="sequential",
        kind=Kind.SUM,
        summary="W + ΣΔᵢ, one adapter after the other; the order changes no bit",
        source="Hu et al. 2021, arXiv:2106.09685",
        weighted=False,
    ),
    Strategy(
        name="weighted",
        kind=Kind.SUM,
        summary="W + Σ wᵢΔᵢ, any finite weights",
        source="task arithmetic: Ilharco et al. 2022, arXiv:2212.04089",
    ),
    Strategy(
        name="average",
        kind=Kind.SUM,
        summary="W + mean Δᵢ (with --weights: Σ wᵢΔᵢ / Σ wᵢ)",
        source="model soups: Wortsman et al. 2022, arXiv:2203.05482",
    ),
    Strategy(
        name="ties",
        kind=Kind.ENTRIES,
        summary="trim to the largest entries, elect a sign, average what agrees",
        source="TIES-Merging: Yadav et al. 2023, arXiv:2306.01708",
        options=("density",),
        entries=_ties,
    ),
    Strategy(
        name="dare_linear",
        kind=Kind.ENTRIES,
        summary="drop entries at random, rescale the rest, add",
        source="DARE: Yu et al. 2023, arXiv:2311.03099",
        options=("density", "seed"),
        entries=_dare_linear,
    ),
    Strategy(
        name="dare_ties",
        kind=Kind.ENTRIES,
        summary="drop entries at random, rescale the rest, then TIES' election",
        source="DARE: Yu et al. 2023, arXiv:2311.03099",
        options=("density", "seed"),
        entries=_dare_ties,
    ),
    Strategy(
        name="della",
        kind=Kind.ENTRIES,
        summary="drop small entries more often than large ones, rescale, then elect",
        source="DELLA-Merging: Deep et al. 2024, arXiv:2406.11617",
        options=("density", "epsilon", "seed"),
        entries=_della,
    ),
    Strategy(
        name="magnitude_prune",
        kind=Kind.ENTRIES,
        summary="keep each delta's largest entries and add",
        source="the first step of TIES, arXiv:2306.01708; PEFT's magnitude_prune",
        options=("density",),
        entries=_magnitude_prune,
    ),
    Strategy(
        name="svd",
        kind=Kind.FACTORS,
        summary="the best approximation of Σ wᵢΔᵢ of a given rank",
        source="Eckart & Young 1936, by two QR and a small SVD",
        options=("rank",),
        factors=_svd,
    ),
    Strategy(
        name="knots",
        kind=Kind.FACTORS,
        summary="align the deltas in one singular basis, then TIES on the right vectors",
        source="KnOTS: Stoica et al. 2024, arXiv:2410.19735",
        options=("density",),
        factors=_knots,
    ),
    Strategy(
        name="tsv",
        kind=Kind.FACTORS,
        summary="orthonormalise the tasks' singular vectors together",
        source="TSV-Merge: Gargiulo et al. 2024, arXiv:2412.00081",
        factors=_tsv,
    ),
    Strategy(
        name="iso_c",
        kind=Kind.FACTORS,
        summary="the summed delta with all its singular values made equal",
        source="Iso-C: Marczak et al. 2025, arXiv:2502.04959 (mean over the numerical rank)",
        factors=_iso_c,
    ),
)

#: Every strategy by name.
STRATEGIES = {strategy.name: strategy for strategy in _TABLE}


def find_strategy(name: str) -> Strategy:
    """The strategy called *name* (dashes count as underscores).

    Raises:
        InputError: there is none.
    """
    strategy = STRATEGIES.get(name.replace("-", "_"))
    if strategy is None:
        import difflib

        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"unknown strategy {name!r}",
            where="--merge-strategy",
            remedy=f"{hint}choose from: {', '.join(STRATEGIES)}",
        )
    return strategy
