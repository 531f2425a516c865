"""What a comparison of adapters says in words: overlap, conflict, balance, and merging.

Knows nothing of how a finding is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from harness.analysis.comparison import AdapterPair, ComparisonFigures
from harness.analysis.findings import Finding, Level, adapter_findings, layer_ranges
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
        if pair.total is not None:
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
    for name, other, modules in (
        (pair.first, pair.second, pair.only_first),
        (pair.second, pair.first, pair.only_second),
    ):
        if modules and pair.total is not None:
            found.append(
                Finding(
                    level=Level.NOTE,
                    text=f"{name} alone adapts {len(modules)} modules that {other} leaves out, "
                    f"such as {modules[0]}.",
                    modules=modules,
                )
            )
    return found


def _by_kind(modules: Iterable[PairFigures]) -> list[tuple[str, list[PairFigures]]]:
    """The module types with the most of *modules* first, no more than are worth a line."""
    kinds = grouped(modules, lambda module: module.kind)
    return sorted(kinds.items(), key=lambda item: -len(item[1]))[:_SHOWN]


def _cosines(pair: AdapterPair) -> list[Finding]:
    total = pair.total
    assert total is not None
    aligned = [
        m
        for m in pair.modules
        if abs(m.cosine) > max(_COSINE_LEAST, _COSINE_TIMES * m.cosine_by_chance)
    ]
    found = []
    for kind, members in _by_kind(aligned):
        top = max(members, key=lambda m: abs(m.cosine))
        direction = "adds to" if top.cosine > 0 else "works against"
        found.append(
            Finding(
                level=Level.ATTENTION,
                text=f"{pair.second} {direction} {pair.first} in {kind}, "
                f"{layer_ranges(m.layer for m in members)}: cosine up to {top.cosine:+.2f} "
                f"against ±{top.cosine_by_chance:.2g} by chance.",
                modules=tuple(m.module for m in members),
            )
        )
    if not aligned:
        found.append(
            Finding(
                level=Level.NOTE,
                text=f"{pair.first} and {pair.second} point in independent directions: cosine "
                f"{total.cosine:+.3g} over {total.modules} shared modules, against "
                f"±{total.cosine_by_chance:.2g} by chance.",
            )
        )
    return found


def _overlaps(pair: AdapterPair) -> list[Finding]:
    found = []
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
        for kind, members in _by_kind(high):
            top = max(members, key=overlap)
            found.append(
                Finding(
                    level=Level.ATTENTION,
                    text=f"{pair.second} {words} {pair.first} in {kind}, "
                    f"{layer_ranges(m.layer for m in members)}: subspace overlap up to "
                    f"{overlap(top):.2f} against {chance(top):.2g} by chance.",
                    modules=tuple(m.module for m in members),
                )
            )
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
