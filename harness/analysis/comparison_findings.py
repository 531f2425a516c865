"""What a comparison of adapters says in words: overlap, conflict, balance, and merging.

Knows nothing of how a finding is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

from harness.analysis.comparison import AdapterPair, ComparisonFigures
from harness.analysis.findings import (
    Finding,
    Level,
    adapter_findings,
    counted,
    layer_ranges,
    listed,
)
from harness.analysis.merge_preview import StrategyFigures
from harness.analysis.modules import grouped
from harness.analysis.overlap import PairFigures

__all__ = ["comparison_findings"]

_OVERLAP_TIMES, _OVERLAP_LEAST = 3.0, 0.1
_COSINE_TIMES, _COSINE_LEAST = 5.0, 0.05
_UNBALANCED = 0.25
_SHOWN = 4

_Figure: TypeAlias = Callable[[PairFigures], float]


def comparison_findings(comparison: ComparisonFigures) -> list[Finding]:
    """What stands out between the adapters, then in each of them; the worst first."""
    found: list[Finding] = []
    for pair in comparison.pairs:
        found += _sharing(pair)
        if pair.total is not None and pair.total.norm_first and pair.total.norm_second:
            found += [*_cosines(pair), *_overlaps(pair), *_balance(pair), *_signs(pair)]
    found += _strategies(comparison.strategies)
    for adapter in comparison.adapters:
        found += adapter_findings(adapter)
    order = list(Level)
    return sorted(found, key=lambda finding: order.index(finding.level))


def _sharing(pair: AdapterPair) -> list[Finding]:
    found = []
    if pair.total is None:
        found.append(
            Finding(
                level=Level.NOTE,
                text=f"{pair.first} and {pair.second} adapt no module in common: they cannot "
                "overlap.",
            )
        )
    elif idle := [
        name
        for name, norm in (
            (pair.first, pair.total.norm_first),
            (pair.second, pair.total.norm_second),
        )
        if not norm
    ]:
        found.append(
            Finding(
                level=Level.NOTE,
                text=f"{listed(idle)} {'change' if len(idle) > 1 else 'changes'} nothing in what "
                f"{pair.first} and {pair.second} both adapt "
                f"({counted(pair.total.modules, 'module')}): they cannot overlap.",
            )
        )
    for name, other, modules in (
        (pair.first, pair.second, pair.only_first),
        (pair.second, pair.first, pair.only_second),
    ):
        if modules and pair.total is not None:
            found.append(
                Finding(
                    level=Level.NOTE,
                    text=f"{name} alone adapts {counted(len(modules), 'module')} that {other} "
                    "leaves out, "
                    f"such as {modules[0]}.",
                    modules=modules,
                )
            )
    return found


def _by_kind(
    modules: Iterable[PairFigures], text: Callable[[str, list[PairFigures]], str]
) -> list[Finding]:
    """A finding a module type, those with the most of *modules* first; types that are not worth a
    line of their own are named in the last."""
    kinds = grouped(modules, lambda module: module.kind)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    found = [
        Finding(level=Level.ATTENTION, text=text(kind, members), modules=_names(members))
        for kind, members in shown
    ]
    if rest:
        last = found[-1]
        found[-1] = replace(
            last,
            text=f"{last.text} So also in {listed([kind for kind, _ in rest])}.",
            modules=last.modules + tuple(name for _, m in rest for name in _names(m)),
        )
    return found


def _names(modules: Iterable[PairFigures]) -> tuple[str, ...]:
    return tuple(module.module for module in modules)


def _cosines(pair: AdapterPair) -> list[Finding]:
    total = pair.total
    assert total is not None
    aligned = [
        m
        for m in pair.modules
        if abs(m.cosine) > max(_COSINE_LEAST, _COSINE_TIMES * m.cosine_by_chance)
    ]

    def text(kind: str, members: list[PairFigures]) -> str:
        top = max(members, key=lambda m: abs(m.cosine))
        direction = "adds to" if top.cosine > 0 else "works against"
        return (
            f"{pair.second} {direction} {pair.first} in {kind}, "
            f"{layer_ranges(m.layer for m in members)}: cosine up to {top.cosine:+.2f} "
            f"against ±{top.cosine_by_chance:.2g} by chance."
        )

    found = _by_kind(aligned, text)
    if not aligned:
        found.append(
            Finding(
                level=Level.NOTE,
                text=f"{pair.first} and {pair.second} point in independent directions: cosine "
                f"{total.cosine:+.3g} over {counted(total.modules, 'shared module')}, against "
                f"±{total.cosine_by_chance:.2g} by chance.",
            )
        )
    return found


def _overlaps(pair: AdapterPair) -> list[Finding]:
    found: list[Finding] = []
    sides: tuple[tuple[str, _Figure, _Figure], ...] = (
        (
            "writes to the same outputs as",
            lambda m: m.column_overlap,
            lambda m: m.column_overlap_by_chance,
        ),
        ("reads the same inputs as", lambda m: m.row_overlap, lambda m: m.row_overlap_by_chance),
    )
    for words, overlap, chance in sides:
        high = [
            m
            for m in pair.modules
            if overlap(m) > max(_OVERLAP_LEAST, _OVERLAP_TIMES * chance(m)) and chance(m) < 1
        ]

        def text(
            kind: str,
            members: list[PairFigures],
            words: str = words,
            overlap: _Figure = overlap,
            chance: _Figure = chance,
        ) -> str:
            top = max(members, key=overlap)
            return (
                f"{pair.second} {words} {pair.first} in {kind}, "
                f"{layer_ranges(m.layer for m in members)}: subspace overlap up to "
                f"{overlap(top):.2f} against {chance(top):.2g} by chance."
            )

        found += _by_kind(high, text)
    return found


def _balance(pair: AdapterPair) -> list[Finding]:
    total = pair.total
    if total is None or not total.norm_first or not total.norm_second:
        return []
    ratio = total.norm_second / total.norm_first
    if min(ratio, 1 / ratio) >= _UNBALANCED:
        return []
    larger, smaller = (pair.second, pair.first) if ratio > 1 else (pair.first, pair.second)
    return [
        Finding(
            level=Level.ATTENTION,
            text=f"{larger} is {max(ratio, 1 / ratio):.3g} times as large as {smaller} over their "
            "shared modules: it will dominate an average.",
        )
    ]


def _signs(pair: AdapterPair) -> list[Finding]:
    total = pair.total
    if total is None or total.sign_conflict is None:
        return []
    return [
        Finding(
            level=Level.NOTE,
            text=f"{pair.first} and {pair.second} have opposite signs in {total.sign_conflict:.1%} "
            f"of the entries (50 % by chance); singular task interference "
            f"{total.interference:.2g} against {total.interference_by_chance:.2g} by chance.",
        )
    ]


def _strategies(strategies: Sequence[StrategyFigures]) -> list[Finding]:
    known = [s for s in strategies if s.distance is not None]
    if len(known) < 2:
        return []
    words = [f"{s.strategy} {s.distance:.2%}" for s in known]
    return [
        Finding(
            level=Level.NOTE,
            text="Distance of the merged ΔW from what the live stack applies: "
            + ", ".join(words)
            + ".",
        )
    ]
