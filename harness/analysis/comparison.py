"""Two or more adapters side by side: every pair of them, module by module, and what merging does.

Figures over a group of modules treat the adapters' deltas as block-diagonal: inner products and
squared norms add, a module that one adapter lacks counts as zero there. Every figure is defined in
docs/analysis.md. Knows nothing of drawing or of reports.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.adapter_config import natural_order
from harness.analysis.figures import AdapterFigures, adapter_figures
from harness.analysis.merge_preview import MergeSums, StrategyFigures, merge_sums, strategy_figures
from harness.analysis.modules import ModuleFigures, grouped, kind_of, layer_name, layer_of
from harness.analysis.overlap import PairFigures, join_module, pair_figures
from harness.analysis.reading import AnalysedAdapter, AnalysedPair
from harness.analysis.spectrum import one_thread
from harness.errors import InputError

__all__ = ["AdapterPair", "ComparisonFigures", "PairGroup", "compare_adapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGroup:
    """Two adapters over several modules that both have.

    `cosine` is `Σ⟨ΔW₁,ΔW₂⟩/√(Σ‖ΔW₁‖²·Σ‖ΔW₂‖²)` over the shared modules; overlaps are means
    weighted equally; `interference` is weighted by `Σσ`; `sign_conflict` by entries.
    """

    name: str
    modules: int
    norm_first: float
    norm_second: float
    norm_ratio: float | None
    cosine: float
    cosine_by_chance: float
    column_overlap: float
    column_overlap_by_chance: float
    row_overlap: float
    row_overlap_by_chance: float
    sign_conflict: float | None
    interference: float
    interference_by_chance: float


@dataclass(frozen=True, kw_only=True)
class AdapterPair:
    """Two adapters: their shared modules one by one and in groups, and the modules of one alone."""

    first: str
    second: str
    modules: tuple[PairFigures, ...]
    total: PairGroup | None
    layers: tuple[PairGroup, ...]
    kinds: tuple[PairGroup, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ComparisonFigures:
    """All adapters of a comparison.

    Attributes:
        adapters: the figures of each alone, in the order given.
        pairs: every pair, in the order given.
        strategies: what each merge strategy would do, over all modules of any adapter.
        layer_strategies: the same by layer.
    """

    adapters: tuple[AdapterFigures, ...]
    pairs: tuple[AdapterPair, ...]
    strategies: tuple[StrategyFigures, ...]
    layer_strategies: Mapping[str, tuple[StrategyFigures, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def faults(self) -> tuple[InputError, ...]:
        return tuple(fault for adapter in self.adapters for fault in adapter.faults)


def compare_adapters(
    adapters: Sequence[AnalysedAdapter],
    *,
    weights: Sequence[float] | None = None,
    exact_entries: bool = False,
    keep_going: bool = False,
    refine: Callable[[ModuleFigures, AnalysedPair], ModuleFigures] | None = None,
    base: str | None = None,
) -> ComparisonFigures:
    """Compare two or more *adapters*; one module of each is in memory at a time.

    Args:
        weights: one an adapter, for the `weighted` strategy.
        keep_going: leave broken modules out, as `adapter_figures` does.

    Raises:
        InputError: fewer than two adapters, a wrong number of weights, or a module whose shapes
            differ between adapters: they belong to different bases.
    """
    if len(adapters) < 2:
        raise InputError("needs two adapters or more", where="compare", remedy="name another")
    if weights is not None and len(weights) != len(adapters):
        raise InputError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            where="--weights",
            remedy="give one weight an adapter",
        )
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise InputError("holds NaN or infinities", where="--weights", remedy="give numbers")
    pair_maps = [adapter.pair_map() for adapter in adapters]
    _check_shapes(adapters, pair_maps)
    alone = [
        adapter_figures(
            adapter, exact_entries=exact_entries, keep_going=keep_going, refine=refine, base=base
        )
        for adapter in adapters
    ]
    sound = [{figures.module for figures in one.modules} for one in alone]
    names = [adapter.name for adapter in adapters]
    found: dict[tuple[int, int], list[PairFigures]] = {
        pair: [] for pair in itertools.combinations(range(len(adapters)), 2)
    }
    sums: dict[str, dict[str, MergeSums]] = {}
    with one_thread():
        for module in sorted(set().union(*sound), key=natural_order):
            present = [i for i in range(len(adapters)) if module in sound[i]]
            joint = join_module([pair_maps[i][module].pair for i in present])
            sums[module] = merge_sums(joint, present, len(adapters), weights)
            for (p, i), (q, j) in itertools.combinations(enumerate(present), 2):
                found[i, j].append(
                    pair_figures(joint, p, q, kind=kind_of(module), layer=layer_of(module))
                )
    by_layer = grouped(sums, lambda module: layer_name(layer_of(module)))
    return ComparisonFigures(
        adapters=tuple(alone),
        pairs=tuple(
            _adapter_pair(names[i], names[j], modules, sound[i], sound[j])
            for (i, j), modules in found.items()
        ),
        strategies=strategy_figures(names, sums.values(), weights),
        layer_strategies={
            layer: strategy_figures(names, [sums[module] for module in members], weights)
            for layer, members in by_layer.items()
        },
    )


def _check_shapes(
    adapters: Sequence[AnalysedAdapter], pair_maps: Sequence[Mapping[str, AnalysedPair]]
) -> None:
    first: dict[str, tuple[AnalysedAdapter, tuple[int, int, bool]]] = {}
    for adapter, pairs in zip(adapters, pair_maps, strict=True):
        for module, analysed in pairs.items():
            pair = analysed.pair
            shape = (pair.b.shape[0], pair.a.shape[1], pair.transposed)
            other, expected = first.setdefault(module, (adapter, shape))
            if shape != expected:
                raise InputError(
                    f"module {module!r}: {adapter.name} adapts a weight of {list(shape[:2])}, "
                    f"{other.name} one of {list(expected[:2])}",
                    where=adapter.path,
                    remedy="compare adapters of the same base",
                )


def _adapter_pair(
    first: str,
    second: str,
    modules: Sequence[PairFigures],
    in_first: set[str],
    in_second: set[str],
) -> AdapterPair:
    layers = grouped(modules, lambda module: layer_name(module.layer))
    kinds = grouped(modules, lambda module: module.kind)
    return AdapterPair(
        first=first,
        second=second,
        modules=tuple(modules),
        total=_group("all shared modules", modules) if modules else None,
        layers=tuple(_group(name, members) for name, members in layers.items()),
        kinds=tuple(_group(name, members) for name, members in kinds.items()),
        only_first=tuple(sorted(in_first - in_second, key=natural_order)),
        only_second=tuple(sorted(in_second - in_first, key=natural_order)),
    )


def _group(name: str, modules: Sequence[PairFigures]) -> PairGroup:
    one = math.hypot(*(m.norm_first for m in modules))
    two = math.hypot(*(m.norm_second for m in modules))
    chance = math.hypot(*(m.norm_first * m.norm_second * m.cosine_by_chance for m in modules))
    nuclear = sum(m.nuclear for m in modules)
    signed = [m for m in modules if m.sign_conflict is not None]
    entries = sum(m.entries for m in signed)

    def mean(figure: Callable[[PairFigures], float]) -> float:
        return statistics.fmean(map(figure, modules))

    def weighted(figure: Callable[[PairFigures], float]) -> float:
        return sum(figure(m) * m.nuclear for m in modules) / nuclear if nuclear else 0.0

    return PairGroup(
        name=name,
        modules=len(modules),
        norm_first=one,
        norm_second=two,
        norm_ratio=two / one if one else None,
        cosine=sum(m.inner for m in modules) / (one * two) if one and two else 0.0,
        cosine_by_chance=chance / (one * two) if one and two else 0.0,
        column_overlap=mean(lambda m: m.column_overlap),
        column_overlap_by_chance=mean(lambda m: m.column_overlap_by_chance),
        row_overlap=mean(lambda m: m.row_overlap),
        row_overlap_by_chance=mean(lambda m: m.row_overlap_by_chance),
        sign_conflict=sum((m.sign_conflict or 0.0) * m.entries for m in signed) / entries
        if entries
        else None,
        interference=weighted(lambda m: m.interference),
        interference_by_chance=weighted(lambda m: m.interference_by_chance),
    )
