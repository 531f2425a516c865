"""How the deltas of two or more adapters lie to each other in one module.

All `ΔWᵢ = sᵢ·BᵢAᵢ` of a module share one pair of orthonormal bases, found from the joint factors
`[A₁; A₂; …]` and `[B₁|B₂|…]` of `R = Σr` ranks: in them each delta is an `R × R` *core*, and
norms, inner products, angles and merges of deltas are those of the cores. Nothing larger than the
factors is formed, but for sampled blocks where signs are counted. Knows nothing of files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.analysis.entries import delta_blocks
from harness.analysis.spectrum import joint_roots
from harness.lora import LoraPair

__all__ = ["JointModule", "PairFigures", "join_module", "pair_figures", "sign_conflict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """One delta in the joint bases: `core = left·diag(values)·rightᵀ`, without the zeros."""

    core: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JointModule:
    """One module's deltas in their joint bases.

    Attributes:
        cores: one for each pair, in the order given.
        factor_cores: `(L_Bᵢᵀ, L_Aᵢ, sᵢ)` with `coreᵢ = sᵢ·L_Bᵢᵀ·L_Aᵢ`, `(R, r)` and `(r, R)`.
    """

    pairs: tuple[LoraPair, ...]
    cores: tuple[Core, ...]
    factor_cores: tuple[tuple[Tensor, Tensor, float], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the deltas."""
        return self.pairs[0].b.shape[0], self.pairs[0].a.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """Two adapters in one module; `by_chance` is what independent random directions would give.

    Attributes:
        inner: `⟨ΔW₁, ΔW₂⟩`. cosine: that over both norms; 0 where one is zero.
        cosine_by_chance: the root mean square, `1/√(out·in)`.
        norm_ratio: second over first, None if the first is zero. balance: smaller over larger.
        column_cosines, row_cosines: cosines of the principal angles between the column (output)
            and row (input) spaces, descending.
        column_overlap, row_overlap: `‖U₁ᵀU₂‖_F²/min(k₁, k₂)`, 0 to 1.
        sign_conflict: share of entries with opposite signs, sampled with *sign_conflict_error*;
            None where one delta is zero.
        interference: singular task interference over `Σσ`: 0 for orthogonal directions, 1 for the
            same ones; a sum of absolute entries, so more where ranks are a large part of the sizes.
        nuclear: `Σσ` of both, the weight of `interference` in sums over modules.
    """

    module: str
    kind: str
    layer: int | None
    entries: int
    norm_first: float
    norm_second: float
    inner: float
    cosine: float
    cosine_by_chance: float
    norm_ratio: float | None
    balance: float
    column_cosines: tuple[float, ...]
    row_cosines: tuple[float, ...]
    column_overlap: float
    column_overlap_by_chance: float
    row_overlap: float
    row_overlap_by_chance: float
    sign_conflict: float | None
    sign_conflict_error: float
    interference: float
    interference_by_chance: float
    nuclear: float


def join_module(pairs: Sequence[LoraPair]) -> JointModule:
    """Put the deltas of one module into their joint bases; the shapes must agree."""
    roots_b, roots_a = joint_roots(pairs)
    factor_cores, cores = [], []
    for pair, root_b, root_a in zip(pairs, roots_b, roots_a, strict=True):
        factor_cores.append((root_b.T, root_a, pair.scale))
        core = pair.scale * (root_b.T @ root_a)
        left, values, right_t = torch.linalg.svd(core, full_matrices=False)
        size = max(pair.b.shape[0], pair.a.shape[1]) * torch.finfo(torch.float64).eps
        floor = size * abs(pair.scale) * float(root_b.norm() * root_a.norm())
        kept = int((values[: pair.rank] > floor).sum())
        cores.append(
            Core(
                core=core,
                left=left[:, :kept],
                values=values[:kept],
                right=right_t[:kept].T,
                norm=float(core.norm()),
            )
        )
    return JointModule(pairs=tuple(pairs), cores=tuple(cores), factor_cores=tuple(factor_cores))


def pair_figures(
    joint: JointModule, first: int, second: int, *, kind: str, layer: int | None
) -> PairFigures:
    """The figures of two of the module's adapters, by position."""
    one, two = joint.cores[first], joint.cores[second]
    rows, columns = joint.shape
    inner = float((one.core * two.core).sum())
    sizes = one.norm * two.norm
    column_cross, row_cross = one.left.T @ two.left, one.right.T @ two.right
    conflict, error = sign_conflict(joint.pairs[first], joint.pairs[second])
    nuclear = float(one.values.sum() + two.values.sum())
    return PairFigures(
        module=joint.pairs[0].module,
        kind=kind,
        layer=layer,
        entries=rows * columns,
        norm_first=one.norm,
        norm_second=two.norm,
        inner=inner,
        cosine=max(-1.0, min(1.0, inner / sizes)) if sizes else 0.0,
        cosine_by_chance=1 / math.sqrt(rows * columns),
        norm_ratio=two.norm / one.norm if one.norm else None,
        balance=min(one.norm, two.norm) / max(one.norm, two.norm) if sizes else 0.0,
        column_cosines=_cosines(column_cross),
        row_cosines=_cosines(row_cross),
        column_overlap=_overlap(column_cross),
        column_overlap_by_chance=_overlap_by_chance(column_cross, rows),
        row_overlap=_overlap(row_cross),
        row_overlap_by_chance=_overlap_by_chance(row_cross, columns),
        sign_conflict=conflict,
        sign_conflict_error=error,
        interference=_interference(one, two, column_cross, row_cross) / nuclear if nuclear else 0.0,
        interference_by_chance=_interference_by_chance(one, two, rows, columns) / nuclear
        if nuclear
        else 0.0,
        nuclear=nuclear,
    )


def _cosines(cross: Tensor) -> tuple[float, ...]:
    if 0 in cross.shape:
        return ()
    return tuple(torch.linalg.svdvals(cross).clamp(0.0, 1.0).tolist())


def _overlap(cross: Tensor) -> float:
    """`φ` of Hu et al. 2021 (arXiv:2106.09685), section 7.2, over the whole spaces."""
    if 0 in cross.shape:
        return 0.0
    return min(1.0, float(cross.square().sum()) / min(cross.shape))


def _overlap_by_chance(cross: Tensor, size: int) -> float:
    """The mean over random subspaces of *size* dimensions: `(k₁k₂/size)/min(k₁, k₂)`."""
    return 0.0 if 0 in cross.shape else max(cross.shape) / size


def _interference(one: Core, two: Core, column_cross: Tensor, row_cross: Tensor) -> float:
    """Singular task interference, `‖(UᵀU − I)Σ(VᵀV − I)‖₁` with `U = [U₁|U₂]` and so on.

    Gargiulo et al. 2024 (arXiv:2412.00081). The diagonal blocks vanish, so two `k × k` products
    remain; the norm is the sum of absolute entries.
    """
    upper = (column_cross * two.values) @ row_cross.T
    lower = (column_cross.T * one.values) @ row_cross
    return float(upper.abs().sum() + lower.abs().sum())


def _interference_by_chance(one: Core, two: Core, rows: int, columns: int) -> float:
    """The mean for random directions with these spectra, entries taken as normal.

    An entry of `U₁ᵀU₂·Σ₂·V₂ᵀV₁` then has mean 0 and variance `Σσ²/(rows·columns)`.
    """
    typical = math.sqrt(2 / math.pi) / math.sqrt(rows * columns)
    first, second = len(one.values), len(two.values)
    return typical * (first**2 * two.norm + second**2 * one.norm)


def sign_conflict(first: LoraPair, second: LoraPair) -> tuple[float | None, float]:
    """Share of entries where the deltas have opposite signs, of those where neither is zero.

    What TIES calls a sign conflict (Yadav et al. 2023, arXiv:2306.01708), before trimming. Counted
    on eight blocks; returns the share and its standard error from the spread between blocks.
    """
    shares = []
    for one, two in delta_blocks([first, second]):
        product = one.sign() * two.sign()
        if counted := int((product != 0).sum()):
            shares.append(int((product < 0).sum()) / counted)
    if not shares:
        return None, 0.0
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return statistics.fmean(shares), error
