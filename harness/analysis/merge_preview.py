"""What each merge strategy would make of two or more deltas, without merging anything.

Works on the `R × R` cores of `harness.analysis.overlap`: a linear strategy is a combination of
cores, and truncation to a rank is their singular value decomposition, so that the figures are
exact. Knows nothing of files; the merge itself is `harness.merge`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.analysis.overlap import JointModule

__all__ = ["MergeSums", "StrategyFigures", "merge_sums", "strategy_figures"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSums:
    """One strategy in one module, as sums that add up over modules.

    Attributes:
        distance: `‖M − S‖²` with `S = ΣΔWᵢ`. plain: `‖S‖²`. merged: `‖M‖²`.
        along: `⟨M, ΔWᵢ⟩` by adapter. alone: `‖ΔWᵢ‖²` by adapter.
    """

    distance: float
    plain: float
    merged: float
    along: tuple[float, ...]
    alone: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyFigures:
    """One strategy over a group of modules.

    Attributes:
        distance: `‖M − S‖/‖S‖`: how far the merged delta lies from the plain sum, which is what
            the live stack applies.
        norm_ratio: `‖M‖/‖S‖`.
        retained: by adapter, `(⟨M, ΔWᵢ⟩/‖ΔWᵢ‖²)²`: the energy of `M` along `ΔWᵢ`, relative to
            `ΔWᵢ`'s own; 1 is whole, and more where the others point the same way.
    """

    strategy: str
    what: str
    distance: float | None
    norm_ratio: float | None
    retained: Mapping[str, float | None]


def merge_sums(
    joint: JointModule, present: Sequence[int], total: int, weights: Sequence[float] | None
) -> dict[str, MergeSums]:
    """The sums of every strategy in one module.

    Args:
        present: the positions, among *total* adapters, of those that have the module.
        weights: one for each of the *total* adapters, for `weighted`.
    """
    cores = [core.core for core in joint.cores]
    plain = torch.stack(cores).sum(dim=0)
    merged = {"sequential": plain, "average": plain / total}
    if weights is not None:
        chosen = [weights[i] for i in present]
        merged["weighted"] = torch.stack(
            [weight * core for weight, core in zip(chosen, cores, strict=True)]
        ).sum(dim=0)
    rank = max(pair.rank for pair in joint.pairs)
    merged["svd"] = _truncated(plain, rank)
    if len({pair.rank for pair in joint.pairs}) == 1 and all(p.scale >= 0 for p in joint.pairs):
        merged["linear"] = _factorwise(joint)
    return {name: _sums(found, plain, cores, present, total) for name, found in merged.items()}


def _truncated(core: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    cut: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return cut


def _factorwise(joint: JointModule) -> Tensor:
    """PEFT's `linear`: A and B are summed apart, each times `√s`; the product has cross terms."""
    b = torch.stack([math.sqrt(s) * left for left, _, s in joint.factor_cores]).sum(dim=0)
    a = torch.stack([math.sqrt(s) * right for _, right, s in joint.factor_cores]).sum(dim=0)
    return b @ a


def _sums(
    merged: Tensor, plain: Tensor, cores: Sequence[Tensor], present: Sequence[int], total: int
) -> MergeSums:
    along, alone = [0.0] * total, [0.0] * total
    for position, core in zip(present, cores, strict=True):
        along[position], alone[position] = float((merged * core).sum()), float((core * core).sum())
    difference = merged - plain
    return MergeSums(
        distance=float((difference * difference).sum()),
        plain=float((plain * plain).sum()),
        merged=float((merged * merged).sum()),
        along=tuple(along),
        alone=tuple(alone),
    )


def _describe(strategy: str, weights: Sequence[float] | None) -> str:
    return {
        "sequential": "the plain sum ΣΔW, what the live stack applies",
        "average": "ΣΔW divided by the number of adapters",
        "weighted": "ΣwΔW with w = " + ", ".join(f"{w:g}" for w in weights or ()),
        "svd": "the plain sum cut to the largest single rank (PEFT's svd)",
        "linear": "A and B summed apart (PEFT's linear): the product has cross terms",
    }[strategy]


def strategy_figures(
    names: Sequence[str],
    modules: Iterable[Mapping[str, MergeSums]],
    weights: Sequence[float] | None,
) -> tuple[StrategyFigures, ...]:
    """The strategies over *modules* together; one that is undefined in any module is left out."""
    gathered = list(modules)
    shared = [s for s in gathered[0] if all(s in sums for sums in gathered)] if gathered else []
    result = []
    for strategy in shared:
        parts = [sums[strategy] for sums in gathered]
        plain = sum(part.plain for part in parts)
        retained: dict[str, float | None] = {}
        for position, name in enumerate(names):
            alone = sum(part.alone[position] for part in parts)
            along = sum(part.along[position] for part in parts)
            retained[name] = (along / alone) ** 2 if alone else None
        result.append(
            StrategyFigures(
                strategy=strategy,
                what=_describe(strategy, weights),
                distance=math.sqrt(sum(p.distance for p in parts) / plain) if plain else None,
                norm_ratio=math.sqrt(sum(p.merged for p in parts) / plain) if plain else None,
                retained=retained,
            )
        )
    return tuple(sorted(result, key=lambda figures: figures.distance or 0.0))
