"""From a strategy and a module's terms to the delta that is added to one weight.

The place where pure strategies meet adapters' factors: what is computed in which precision, and
from which seed. Knows nothing of bases, outputs or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.merge.factors import Term
from harness.merge.kernel import DenseDelta, FactoredDelta
from harness.merge.storage import accumulator
from harness.merge.strategies import Kind, Strategy, StrategyOptions

__all__ = ["Recipe", "make_delta", "splittable", "sum_factors", "total_factors"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How deltas become one.

    Attributes:
        coefficients: the factor of each adapter's delta, by the adapter's name.
    """

    strategy: Strategy
    coefficients: Mapping[str, float]
    options: StrategyOptions

    def weight(self, term: Term) -> float:
        return self.coefficients[term.source.name]


def splittable(recipe: Recipe) -> bool:
    """Whether a tensor's rows can be computed apart from each other at no cost."""
    return recipe.strategy.kind is Kind.SUM


def sum_factors(
    recipe: Recipe, terms: Sequence[Term], rows: slice, dtype: type[np.floating[Any]]
) -> tuple[Array, Array]:
    """`Σ wᵢ·sᵢ·LᵢRᵢ` as two concatenated factors; `wᵢ·sᵢ` is made in float64."""
    lefts = [term.left(dtype, rows) for term in terms]
    left = np.empty((lefts[0].shape[0], sum(part.shape[1] for part in lefts)), dtype)
    start = 0
    for term, part in zip(terms, lefts, strict=True):
        end = start + part.shape[1]
        np.multiply(part, dtype(recipe.weight(term) * term.scale), out=left[:, start:end])
        start = end
    rights = [term.right(dtype) for term in terms]
    return left, rights[0] if len(rights) == 1 else np.concatenate(rights, axis=0)


def total_factors(
    recipe: Recipe, terms: Sequence[Term], rows: slice, dtype: type[np.floating[Any]]
) -> tuple[Array, Array]:
    """The merged delta's factors for *rows*; for sums and factor strategies."""
    if recipe.strategy.kind is Kind.SUM:
        return sum_factors(recipe, terms, rows, dtype)
    assert recipe.strategy.factors is not None
    pairs = [(term.left(np.float64) * term.scale, term.right(np.float64)) for term in terms]
    weights = [recipe.weight(term) for term in terms]
    left, right = recipe.strategy.factors(pairs, weights, recipe.options)
    return left[rows].astype(dtype), right.astype(dtype)


def make_delta(
    recipe: Recipe, terms: Sequence[Term], rows: slice, dtype: str
) -> FactoredDelta | DenseDelta:
    """The delta of *rows* (all rows, where the recipe is not splittable), to be stored as *dtype*.

    Entry strategies hold every adapter's whole delta of one tensor in memory, as float32 (float64
    for F32 and F64): a few times the tensor's size.
    """
    kind = accumulator(dtype)
    if recipe.strategy.kind is not Kind.ENTRIES:
        return FactoredDelta(*total_factors(recipe, terms, rows, kind), dtype)
    assert recipe.strategy.entries is not None
    deltas = []
    for term in terms:
        left = (term.left(np.float64) * term.scale).astype(kind)
        deltas.append(left @ term.right(kind))
    weights = [recipe.weight(term) for term in terms]
    generators = [_generator(recipe.options.seed, term) for term in terms]
    return DenseDelta(recipe.strategy.entries(deltas, weights, recipe.options, generators)[rows])


def _generator(seed: int, term: Term) -> np.random.Generator:
    """A generator of this adapter's and module's own: no order or worker can change its draws."""
    text = f"{seed}\0{term.source.digest}\0{term.module}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
