"""What each merge strategy would make of two or more deltas, without merging anything.

Sums and factor strategies work on the `R × R` cores of `harness.analysis.overlap`, where they are
exact: those strategies do not care about the basis. Entry strategies (TIES, DARE, DELLA, pruning)
do; they run on sampled blocks, as if the sample were the whole matrix, and say so. KnOTS stands
between: it prunes entries, but in a basis of its own for one side, so it runs on sampled columns.
The strategies themselves are `harness.merge`'s. Knows nothing of files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from harness.analysis.entries import delta_blocks
from harness.analysis.overlap import JointModule
from harness.errors import InputError
from harness.merge.strategies import STRATEGIES, Kind, StrategyOptions, coefficients

__all__ = ["MergeSums", "StrategyFigures", "merge_sums", "strategy_figures"]

_BASIS_FREE = ("tsv", "iso_c")
_BLOCKS = 4
_COLUMNS = 512


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
    sampled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyFigures:
    """One strategy over a group of modules.

    Attributes:
        distance: `‖M − S‖/‖S‖`: how far the merged delta lies from the plain sum, which is what
            the live stack applies.
        norm_ratio: `‖M‖/‖S‖`.
        retained: by adapter, `(⟨M, ΔWᵢ⟩/‖ΔWᵢ‖²)²`: the energy of `M` along `ΔWᵢ`, relative to
            `ΔWᵢ`'s own; 1 is whole, and more where the others point the same way.
        sampled: the figures are estimates from blocks of entries, not exact.
    """

    strategy: str
    what: str
    distance: float | None
    norm_ratio: float | None
    retained: Mapping[str, float | None]
    sampled: bool


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
    chosen = [1.0 if weights is None else weights[i] for i in present]
    merged = {}
    for name in ("sequential", "average", "weighted"):
        factors = _coefficients(name, weights, total)
        if factors is not None:
            parts = [factors[i] * core for i, core in zip(present, cores, strict=True)]
            merged[name] = torch.stack(parts).sum(dim=0)
    merged["svd"] = _truncated(plain, max(pair.rank for pair in joint.pairs))
    if len({pair.rank for pair in joint.pairs}) == 1 and all(p.scale >= 0 for p in joint.pairs):
        merged["linear"] = _factorwise(joint)
    if all(core.norm > 0 for core in joint.cores):
        merged |= {name: _by_factors(name, joint, chosen) for name in _BASIS_FREE}
    found = {name: _sums(core, plain, cores, present, total) for name, core in merged.items()}
    found["knots"] = _aligned(joint, present, total, chosen)
    return found | _by_entries(joint, present, total, chosen)


def _coefficients(
    name: str, weights: Sequence[float] | None, total: int
) -> tuple[float, ...] | None:
    """The factor of each adapter, or None where the strategy cannot be had with these weights."""
    try:
        return coefficients(name, None if name == "sequential" else weights, total)
    except InputError:
        return None


def _by_factors(name: str, joint: JointModule, weights: Sequence[float]) -> Tensor:
    """A strategy of `harness.merge` that is the same in any orthonormal basis, on the cores."""
    rule = STRATEGIES[name].factors
    assert rule is not None
    size = joint.cores[0].core.shape
    # `tsv` gives each adapter an equal share of the matrix's rank: zeros keep that share's size.
    room = max(*size, min(min(joint.shape), len(joint.pairs) * max(size)))
    pairs = []
    for left, right, scale in joint.factor_cores:
        padded_left = np.zeros((room, left.shape[1]))
        padded_left[: left.shape[0]] = scale * left.numpy()
        padded_right = np.zeros((right.shape[0], room))
        padded_right[:, : right.shape[1]] = right.numpy()
        pairs.append((padded_left, padded_right))
    thin_left, thin_right = rule(pairs, weights, StrategyOptions())
    return torch.from_numpy(thin_left @ thin_right)[: size[0], : size[1]]


def _by_entries(
    joint: JointModule, present: Sequence[int], total: int, weights: Sequence[float]
) -> dict[str, MergeSums]:
    blocks = list(islice(delta_blocks(joint.pairs), _BLOCKS))
    samples = [torch.cat(parts).to(torch.float64) for parts in zip(*blocks, strict=True)]
    share = math.prod(joint.shape) / samples[0].numel()
    arrays = [sample.numpy() for sample in samples]
    plain = torch.stack(samples).sum(dim=0)
    found: dict[str, MergeSums] = {}
    for name, strategy in STRATEGIES.items():
        if strategy.kind is not Kind.ENTRIES or strategy.entries is None:
            continue
        seed = zlib.crc32(joint.pairs[0].module.encode())
        generators = [np.random.default_rng([seed, i]) for i in present]
        merged = strategy.entries(arrays, weights, StrategyOptions(), generators)
        found[name] = _sums(torch.from_numpy(merged), plain, samples, present, total, share=share)
    return found


def _aligned(
    joint: JointModule, present: Sequence[int], total: int, weights: Sequence[float]
) -> MergeSums:
    """KnOTS aligns the stored matrices' columns in one basis of their rows and prunes by entry:
    the rows may be in any basis, the columns may not, so whole columns are sampled.
    """
    rule = STRATEGIES["knots"].factors
    assert rule is not None
    small, wide = [], []
    for (left, right, scale), pair in zip(joint.factor_cores, joint.pairs, strict=True):
        small.append(scale * (right.T if pair.transposed else left))
        wide.append(pair.b.T if pair.transposed else pair.a)
    length = wide[0].shape[1]
    places = torch.arange(length)
    if length > _COLUMNS:
        seed = zlib.crc32(joint.pairs[0].module.encode())
        drawn = np.random.default_rng(seed).choice(length, _COLUMNS, replace=False)
        places = torch.from_numpy(np.sort(drawn))
    columns = [side.index_select(1, places).to(torch.float64) for side in wide]
    parts = [left @ right for left, right in zip(small, columns, strict=True)]
    pairs = [(left.numpy(), right.numpy()) for left, right in zip(small, columns, strict=True)]
    thin_left, thin_right = rule(pairs, weights, StrategyOptions())
    plain = torch.stack(parts).sum(dim=0)
    share = length / _COLUMNS if length > _COLUMNS else None
    return _sums(
        torch.from_numpy(thin_left @ thin_right), plain, parts, present, total, share=share
    )


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
    merged: Tensor,
    plain: Tensor,
    parts: Sequence[Tensor],
    present: Sequence[int],
    total: int,
    *,
    share: float | None = None,
) -> MergeSums:
    """The sums over *parts* as they are, or times *share* for a sample."""
    factor = share or 1.0
    along, alone = [0.0] * total, [0.0] * total
    for position, part in zip(present, parts, strict=True):
        along[position] = factor * float((merged * part).sum())
        alone[position] = factor * float(part.square().sum())
    return MergeSums(
        distance=factor * float((merged - plain).square().sum()),
        plain=factor * float(plain.square().sum()),
        merged=factor * float(merged.square().sum()),
        along=tuple(along),
        alone=tuple(alone),
        sampled=share is not None,
    )


def _describe(strategy: str, weights: Sequence[float] | None) -> str:
    given = "" if weights is None else ", w = " + ", ".join(f"{w:g}" for w in weights)
    if strategy == "svd":
        return "the plain sum cut to the largest single rank"
    if strategy == "linear":
        return "A and B summed apart (PEFT's linear): the product has cross terms"
    found = STRATEGIES[strategy]
    return found.summary + (given if found.weighted else "")


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
                sampled=any(part.sampled for part in parts),
            )
        )
    return tuple(sorted(result, key=lambda figures: figures.distance or 0.0))
