"""What each strategy does with deltas: pure functions, explicit weights and randomness.

*Factor* rules take and give thin factors and never make a whole matrix; *entry* rules look at
every entry of every delta. The papers are named in `harness.merge.strategies`. Knows nothing of
names, files or bases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import InputError

__all__ = [
    "EntryRule",
    "FactorRule",
    "StrategyOptions",
    "dare_linear",
    "dare_ties",
    "della",
    "iso_c",
    "knots",
    "magnitude_prune",
    "prune_by_magnitude",
    "svd",
    "thin_svd",
    "ties",
    "tsv",
]

Array = NDArray[Any]
Factors = tuple[Array, Array]


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


def svd(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    """The best approximation of the sum, of rank `options.rank`."""
    u, s, vt = thin_svd(*_summed(pairs, weights))
    rank = options.rank or len(s)
    return u[:, :rank] * s[:rank], vt[:rank]


def iso_c(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    """The sum with every singular value at their mean."""
    u, s, vt = thin_svd(*_summed(pairs, weights))
    return u * s.mean(), vt


def tsv(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    """The tasks' singular vectors made orthonormal together, their values kept."""
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


def knots(pairs: Sequence[Factors], weights: Sequence[float], options: StrategyOptions) -> Factors:
    """TIES on the deltas' coordinates in the singular basis that they share."""
    # [Δ₁|Δ₂|…] = U·Σ·[V₁|V₂|…]ᵀ; the Σ·Vᵢ, now in one basis, are merged by TIES.
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
    # Σ stays with the Vᵢ, as in the authors' code: what TIES trims is small in ΔW, not in V alone.
    scaled = s[:rank, None] * vt[:rank]
    aligned = [scaled[:, offsets[i] : offsets[i + 1]] @ q.T for i, (q, _) in enumerate(bases)]
    return q_left @ u[:, :rank], ties(aligned, weights, options, ())


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


def magnitude_prune(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, _: Generators
) -> Array:
    """Each delta's largest entries, summed."""
    return _plain_sum([prune_by_magnitude(d, options.density) for d in deltas], weights)


def ties(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, _: Generators
) -> Array:
    """Trim, elect, average what agrees."""
    return _disjoint_mean([prune_by_magnitude(d, options.density) for d in deltas], weights)


def dare_linear(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    """Drop at random, rescale, sum."""
    dropped = [_drop(d, options.density, g) for d, g in zip(deltas, rng, strict=True)]
    return _plain_sum(dropped, weights)


def dare_ties(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    """Drop at random, rescale, elect, average what agrees."""
    dropped = [_drop(d, options.density, g) for d, g in zip(deltas, rng, strict=True)]
    return _disjoint_mean(dropped, weights)


def della(
    deltas: Sequence[Array], weights: Sequence[float], options: StrategyOptions, rng: Generators
) -> Array:
    """Drop the small more often, rescale, elect, average what agrees."""
    dropped = [_magnitude_drop(d, options, g) for d, g in zip(deltas, rng, strict=True)]
    return _disjoint_mean(dropped, weights)
