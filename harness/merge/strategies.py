"""The merge strategies: pure functions of deltas, explicit weights and explicit randomness.

All work on ΔW = s·B·A, never on A and B apart (averaging those leaves cross terms behind). Three
kinds: *sums* only say with what factor each delta enters; *factor* strategies give back two thin
factors and never make a whole matrix; *entry* strategies look at every entry of every delta.
Knows nothing of files, dtypes on disk or bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from harness.errors import InputError
from harness.merge import rules
from harness.merge.rules import EntryRule, FactorRule, StrategyOptions

__all__ = [
    "STRATEGIES",
    "Kind",
    "Strategy",
    "StrategyOptions",
    "coefficients",
    "find_strategy",
]


class Kind(StrEnum):
    """What a strategy has to be given."""

    SUM = "sum"
    FACTORS = "factors"
    ENTRIES = "entries"


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
        entries=rules.ties,
    ),
    Strategy(
        name="dare_linear",
        kind=Kind.ENTRIES,
        summary="drop entries at random, rescale the rest, add",
        source="DARE: Yu et al. 2023, arXiv:2311.03099",
        options=("density", "seed"),
        entries=rules.dare_linear,
    ),
    Strategy(
        name="dare_ties",
        kind=Kind.ENTRIES,
        summary="drop entries at random, rescale the rest, then TIES' election",
        source="DARE: Yu et al. 2023, arXiv:2311.03099",
        options=("density", "seed"),
        entries=rules.dare_ties,
    ),
    Strategy(
        name="della",
        kind=Kind.ENTRIES,
        summary="drop small entries more often than large ones, rescale, then elect",
        source="DELLA-Merging: Deep et al. 2024, arXiv:2406.11617",
        options=("density", "epsilon", "seed"),
        entries=rules.della,
    ),
    Strategy(
        name="magnitude_prune",
        kind=Kind.ENTRIES,
        summary="keep each delta's largest entries and add",
        source="the first step of TIES, arXiv:2306.01708; PEFT's magnitude_prune",
        options=("density",),
        entries=rules.magnitude_prune,
    ),
    Strategy(
        name="svd",
        kind=Kind.FACTORS,
        summary="the best approximation of Σ wᵢΔᵢ of a given rank",
        source="Eckart & Young 1936, by two QR and a small SVD",
        options=("rank",),
        factors=rules.svd,
    ),
    Strategy(
        name="knots",
        kind=Kind.FACTORS,
        summary="align the deltas in one singular basis, then TIES on the right vectors",
        source="KnOTS: Stoica et al. 2024, arXiv:2410.19735",
        options=("density",),
        factors=rules.knots,
    ),
    Strategy(
        name="tsv",
        kind=Kind.FACTORS,
        summary="orthonormalise the tasks' singular vectors together",
        source="TSV-Merge: Gargiulo et al. 2024, arXiv:2412.00081",
        factors=rules.tsv,
    ),
    Strategy(
        name="iso_c",
        kind=Kind.FACTORS,
        summary="the summed delta with all its singular values made equal",
        source="Iso-C: Marczak et al. 2025, arXiv:2502.04959 (mean over the numerical rank)",
        factors=rules.iso_c,
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
