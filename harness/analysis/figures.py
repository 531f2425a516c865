"""What is in one adapter: figures per module, layer, module type and adapter.

Every figure is defined, with its unit and source, in docs/analysis.md. The figures of a module
come from its two factors (`harness.analysis.spectrum`); sums over modules treat `ΔW` of the whole
adapter as block-diagonal, so norms add in squares. One module is in memory at a time. Knows
nothing of drawing, of reports, or of other adapters.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.analysis.entries import EntryCounts, sum_counts
from harness.analysis.modules import ModuleFigures, grouped, layer_name, module_figures
from harness.analysis.reading import AnalysedAdapter, AnalysedPair
from harness.analysis.spectrum import one_thread
from harness.errors import InputError

__all__ = ["AdapterFigures", "GroupFigures", "adapter_figures", "group_figures", "robust_scores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """Several modules together: a layer, a module type, or the whole adapter.

    Norms add in squares; ranks are means over the modules, weighted equally; `rms` is over all
    entries of the modules' `ΔW`.
    """

    name: str
    modules: int
    parameters: int
    bytes: int
    norm_a: float
    norm_b: float
    norm_delta: float
    rms: float
    max_spectral_norm: float
    mean_stable_rank: float
    mean_effective_rank: float
    rank_wasted_share: float
    dead_ranks: int
    untrained: int
    relative_norm: float | None


@dataclass(frozen=True, kw_only=True)
class AdapterFigures:
    """All figures of one adapter.

    Attributes:
        total: the adapter as one group. layers, kinds: groups in the natural order.
        counts: the distributions of all entries of `a`, `b` and `delta`, for histograms.
        scores: by module, how far log₁₀ of its rms lies from its kind's, as a robust z-score.
        faults: what was left out, under `keep_going`.
        base: the base's source if the figures are relative to one.
    """

    name: str
    source: str
    modules: tuple[ModuleFigures, ...]
    total: GroupFigures
    layers: tuple[GroupFigures, ...]
    kinds: tuple[GroupFigures, ...]
    counts: Mapping[str, EntryCounts]
    scores: Mapping[str, float]
    notes: tuple[str, ...] = ()
    faults: tuple[InputError, ...] = ()
    base: str | None = None


def group_figures(name: str, modules: Sequence[ModuleFigures]) -> GroupFigures:
    """*modules* (at least one) as one group."""

    def root_sum(figure: Callable[[ModuleFigures], float]) -> float:
        return math.hypot(*(figure(module) for module in modules))

    norm = root_sum(lambda m: m.norm_delta)
    # ‖W‖ of a module is norm/relative_norm where that is known and not 0/0.
    base = [m.norm_delta / m.relative_norm for m in modules if m.relative_norm]
    known = all(m.relative_norm is not None for m in modules) and base
    return GroupFigures(
        name=name,
        modules=len(modules),
        parameters=sum(m.parameters for m in modules),
        bytes=sum(m.bytes for m in modules),
        norm_a=root_sum(lambda m: m.norm_a),
        norm_b=root_sum(lambda m: m.norm_b),
        norm_delta=norm,
        rms=norm / math.sqrt(sum(m.out_features * m.in_features for m in modules)),
        max_spectral_norm=max(m.spectral_norm for m in modules),
        mean_stable_rank=statistics.fmean(m.stable_rank for m in modules),
        mean_effective_rank=statistics.fmean(m.effective_rank for m in modules),
        rank_wasted_share=sum(m.rank_wasted for m in modules) / sum(m.rank for m in modules),
        dead_ranks=sum(m.dead_ranks for m in modules),
        untrained=sum(m.untrained for m in modules),
        relative_norm=norm / math.hypot(*base) if known else None,
    )


def robust_scores(modules: Sequence[ModuleFigures]) -> dict[str, float]:
    """Modified z-scores of log₁₀ rms against the modules of the same kind (needs five of them).

    `0.6745·(x − median)/MAD` (Iglewicz and Hoaglin 1993); beyond 3.5 is an outlier. The MAD is
    taken as at least 0.01, a 2 % change, so that near-equal layers have no outliers.
    """
    scores: dict[str, float] = {}
    for members in grouped(modules, lambda m: m.kind).values():
        sizes = {m.module: math.log10(m.rms) for m in members if m.rms > 0}
        if len(sizes) < 5:
            continue
        middle = statistics.median(sizes.values())
        spread = max(0.01, statistics.median(abs(x - middle) for x in sizes.values()))
        scores |= {name: 0.6745 * (x - middle) / spread for name, x in sizes.items()}
    return scores


def adapter_figures(
    adapter: AnalysedAdapter,
    *,
    exact_entries: bool = False,
    keep_going: bool = False,
    refine: Callable[[ModuleFigures, AnalysedPair], ModuleFigures] | None = None,
    base: str | None = None,
) -> AdapterFigures:
    """Compute all figures of *adapter*, module by module.

    Args:
        exact_entries: count every entry of every `ΔW` instead of a sample.
        keep_going: leave broken modules out and list them in `faults`.
        refine: adds to a module's figures, e.g. those relative to a base; *base* names it.

    Raises:
        InputError: NaN or infinities without *keep_going*, or no sound module at all.
    """
    found: list[ModuleFigures] = []
    sums: dict[str, EntryCounts] = {}
    faults = list(adapter.faults)
    with one_thread():
        for analysed in adapter.pairs():
            try:
                figures, counts = module_figures(analysed, exact_entries=exact_entries)
                found.append(refine(figures, analysed) if refine else figures)
            except InputError as fault:
                if not keep_going:
                    raise
                faults.append(fault)
                continue
            sums = {k: sum_counts([sums[k], c]) if k in sums else c for k, c in counts.items()}
    if not found:
        raise faults[0] if faults else InputError("adapts no module", where=adapter.path)

    def groups(key: Callable[[ModuleFigures], str]) -> tuple[GroupFigures, ...]:
        return tuple(group_figures(name, members) for name, members in grouped(found, key).items())

    return AdapterFigures(
        name=adapter.name,
        source=adapter.source,
        modules=tuple(found),
        total=group_figures(adapter.name, found),
        layers=groups(lambda m: layer_name(m.layer)),
        kinds=groups(lambda m: m.kind),
        counts=sums,
        scores=robust_scores(found),
        notes=adapter.notes,
        faults=tuple(faults),
        base=base,
    )
