"""The figures of one adapter in words: what a reader should see first.

A finding says what, where and how much. Knows nothing of how it is shown; what follows from
comparing adapters is in `harness.analysis.comparison_findings`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from harness.analysis.figures import AdapterFigures
from harness.analysis.modules import ModuleFigures, grouped

__all__ = [
    "Finding",
    "Level",
    "adapter_findings",
    "counted",
    "layer_ranges",
    "listed",
    "places",
]

#: Iglewicz and Hoaglin's (1993) bound for a modified z-score.
OUTLIER_SCORE = 3.5
_SPARE_RANK = 0.5  # of the rank, before it is worth a word


class Level(StrEnum):
    """How much a finding asks for."""

    FAULT = "fault"  #: something is broken
    ATTENTION = "attention"  #: probably not meant
    NOTE = "note"  #: good to know


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding. `modules` are those it is about; empty for the adapter as a whole."""

    level: Level
    text: str
    modules: tuple[str, ...] = ()


def counted(number: int, what: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def layer_ranges(layers: Iterable[int | None]) -> str:
    """`layers 3, 20–27`; modules outside the layers are named so."""
    known = sorted({layer for layer in layers if layer is not None})
    runs: list[list[int]] = []
    for layer in known:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    if not words:
        return "outside the layers"
    return ("layer " if len(known) == 1 else "layers ") + ", ".join(words)


def places(modules: Sequence[ModuleFigures], *, most: int = 4) -> str:
    """`q_proj in layers 2–5; o_proj in layer 7`, the fullest kinds first."""
    kinds = grouped(modules, lambda module: module.kind)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    words = [
        kind
        if all(member.layer is None for member in members)
        else f"{kind} in {layer_ranges(member.layer for member in members)}"
        for kind, members in ordered[:most]
    ]
    if len(ordered) > most:
        words.append(f"{len(ordered) - most} more module types")
    return "; ".join(words)


def adapter_findings(figures: AdapterFigures) -> list[Finding]:
    """What stands out in one adapter, the worst first."""
    found = [Finding(level=Level.FAULT, text=str(fault)) for fault in figures.faults]
    found += _training(figures)
    found += _outliers(figures)
    found += _sizes(figures)
    found += _ranks(figures)
    found += _against_base(figures)
    found += [Finding(level=Level.NOTE, text=f"Not in ‖ΔW‖: {note}.") for note in figures.notes]
    order = list(Level)
    return sorted(found, key=lambda finding: order.index(finding.level))


def _training(figures: AdapterFigures) -> list[Finding]:
    name, modules = figures.name, figures.modules
    untrained = [m for m in modules if m.untrained]
    found = []
    if len(untrained) == len(modules):
        return [
            Finding(
                level=Level.FAULT,
                text=f"{name} was never trained: B is zero in all {len(modules)} modules, "
                "so the adapter changes nothing.",
            )
        ]
    if all(m.norm_delta == 0 and m.scale != 0 for m in modules):
        return [
            Finding(
                level=Level.FAULT,
                text=f"{name} changes nothing: A or B is zero in all {len(modules)} modules.",
            )
        ]
    if untrained:
        found.append(
            Finding(
                level=Level.ATTENTION,
                text=f"{name} leaves {len(untrained)} of {len(modules)} modules as they were, "
                f"B is still zero: {places(untrained)}.",
                modules=tuple(m.module for m in untrained),
            )
        )
    still = [m for m in modules if not m.untrained and m.scale == 0]
    if still:
        found.append(
            Finding(
                level=Level.FAULT,
                text=f"{name} has alpha 0, so ΔW is zero: {places(still)}.",
                modules=tuple(m.module for m in still),
            )
        )
    dead = [m for m in modules if m.dead_ranks and not m.untrained]
    if dead:
        found.append(
            Finding(
                level=Level.ATTENTION,
                text=f"{sum(m.dead_ranks for m in dead)} ranks of {name} are dead (a zero row of A "
                f"or column of B): {places(dead)}.",
                modules=tuple(m.module for m in dead),
            )
        )
    return found


def _outliers(figures: AdapterFigures) -> list[Finding]:
    found = []
    for high in (True, False):
        outliers = [
            m
            for m in figures.modules
            if abs(score := figures.scores.get(m.module, 0.0)) > OUTLIER_SCORE
            and (score > 0) == high
        ]
        if not outliers:
            continue
        peers: dict[str, float] = {
            kind: statistics.median(m.rms for m in figures.modules if m.kind == kind and m.rms > 0)
            for kind in {m.kind for m in outliers}
        }
        worst = max(outliers, key=lambda m: abs(figures.scores[m.module]))
        times = worst.rms / peers[worst.kind]
        size = f"{times:.3g} times" if high else f"1/{1 / times:.3g} of"
        found.append(
            Finding(
                level=Level.ATTENTION,
                text=f"{figures.name} changes {len(outliers)} modules unusually "
                f"{'much' if high else 'little'}: {places(outliers)}; {worst.module} by {size} "
                f"the median of its kind.",
                modules=tuple(m.module for m in outliers),
            )
        )
    return found


def _sizes(figures: AdapterFigures) -> list[Finding]:
    total = figures.total
    if total.norm_delta == 0:
        return []
    parts = []
    for group, label in ((figures.kinds, "{}"), (figures.layers, "layer {}")):
        if len(group) < 2:
            continue
        top = max(group, key=lambda g: g.norm_delta)
        share = (top.norm_delta / total.norm_delta) ** 2
        name = top.name if top.name.startswith("outside") else label.format(top.name)
        parts.append(f"{share:.0%} of its energy lies in {name}")
    text = (
        f"{figures.name}: ‖ΔW‖ = {total.norm_delta:.4g} over {counted(total.modules, 'module')}, "
        f"{total.parameters:,} parameters"
    )
    return [Finding(level=Level.NOTE, text="; ".join([text, *parts]) + ".")]


def _ranks(figures: AdapterFigures) -> list[Finding]:
    trained = [m for m in figures.modules if m.rank_99]
    if not trained:
        return []
    needed = max(m.rank_99 for m in trained)
    mean = statistics.fmean(m.rank_99 for m in trained)
    rank = max(m.rank for m in trained)
    text = (
        f"99 % of {figures.name}'s energy lies in {mean:.3g} of {rank} ranks on average, "
        f"{needed} at most; the effective rank is {figures.total.mean_effective_rank:.3g}"
    )
    if mean <= _SPARE_RANK * rank and needed < rank:
        text += f", so rank {needed} would hold it"
    return [Finding(level=Level.NOTE, text=text + ".")]


def _against_base(figures: AdapterFigures) -> list[Finding]:
    found = []
    known = [m for m in figures.modules if m.relative_norm is not None]
    if known and figures.total.relative_norm is not None:
        top = max(known, key=lambda m: m.relative_norm or 0.0)
        found.append(
            Finding(
                level=Level.NOTE,
                text=f"{figures.name} is {figures.total.relative_norm:.3g} of the base's size "
                f"(‖ΔW‖/‖W‖), most in {top.module}: {top.relative_norm:.3g}.",
            )
        )
    intruded = [m for m in figures.modules if m.intruders]
    if intruded:
        found.append(
            Finding(
                level=Level.ATTENTION,
                text=f"{figures.name} brings {sum(m.intruders or 0 for m in intruded)} intruder "
                f"dimensions (directions foreign to the base): {places(intruded)}.",
                modules=tuple(m.module for m in intruded),
            )
        )
    return found
