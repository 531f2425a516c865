"""The review as values: a grid of prompts and modes, groups of one change, where a case forks.

What every face of the review (terminal, Markdown, HTML, JSON) has in common. Imports nothing
heavy. Knows nothing of how any of them looks, nor of decisions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.display.pieces import joined_pieces
from harness.errors import InputError
from harness.pending import Broken, Case, Decided, Position, Record, Records
from harness.verdict import Outcome

__all__ = [
    "SIGNS",
    "Fork",
    "Group",
    "Row",
    "as_json",
    "counts",
    "display",
    "fork",
    "groups",
    "modes",
    "percent",
    "review_outcome",
    "rows",
    "summary",
    "unread",
]

#: One sign a verdict, for grids.
SIGNS: Mapping[str, str] = {
    "held": "✓",
    "tie": "≈",
    "skipped": "·",
    "undecided": "?",
    "drift": "~",
    "missing": "+",
    "incomparable": "≠",
    "changed": "✗",
    "unreadable": "!",
    "failed": "✗",
    "accepted": "✓",
    "rejected": "–",
}
_AROUND = 8
_LISTED = 6
_WORST_FIRST = [outcome.value for outcome in reversed(Outcome)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt of a preset in a test module, with its case in each mode."""

    folder: str
    preset: str
    prompt: str
    cells: Mapping[str, Record]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pending cases with one and the same change."""

    outcome: Outcome
    change: str
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Where then and now part.

    Attributes:
        index: of the first differing token.
        before: the words that lead up to it, the same then and now.
        then, now: the token there; None where that side has ended.
        after_then, after_now: the words that follow.
        alternatives: token, probability then, probability now (None: not among the five most
            probable, or no evidence is stored), the most probable first.
        margin_then, margin_now: of the best over the second best, in nats; None without evidence.
    """

    index: int
    before: str
    then: Position | None
    now: Position | None
    after_then: str
    after_now: str
    alternatives: tuple[tuple[str, float | None, float | None], ...]
    margin_then: float | None
    margin_now: float | None


def unread(error: InputError) -> str:
    """Why a recorded case cannot be shown; its path is this machine's and stays here."""
    return error.fault if error.remedy is None else f"{error.fault} → {error.remedy}"


def display(record: Record) -> str:
    """The decision where there is one, otherwise the verdict."""
    return record.decision or record.outcome.value


def modes(records: Records) -> tuple[str, ...]:
    """The modes in the stack's order; where no run says it, `base` first and `stacked` last."""
    known = records.run.modes if records.run else ()
    found = {record.mode for record in records.cases}
    rest = sorted(
        found - set(known), key=lambda mode: ((mode != "base") + (mode == "stacked"), mode)
    )
    return (*(mode for mode in known if mode in found), *rest)


def rows(records: Records) -> tuple[Row, ...]:
    """The grid, in the order of names."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records.cases:
        folder = record.name.rpartition("/")[0]
        found.setdefault((folder, record.preset, record.prompt), {})[record.mode] = record
    return tuple(
        Row(folder=folder, preset=preset, prompt=prompt, cells=cells)
        for (folder, preset, prompt), cells in found.items()
    )


def groups(cases: Iterable[Record]) -> tuple[Group, ...]:
    """Pending cases by their change: the worst first, then the largest group, then by name."""
    found: dict[str, list[Record]] = {}
    for record in cases:
        if record.pending:
            found.setdefault(record.group or record.name, []).append(record)
    return tuple(
        Group(outcome=members[0].outcome, change=members[0].change, records=tuple(members))
        for members in sorted(found.values(), key=_urgency)
    )


def _urgency(members: Sequence[Record]) -> tuple[int, int, str]:
    return (-list(Outcome).index(members[0].outcome), -len(members), members[0].name)


def counts(records: Records) -> dict[str, int]:
    """How many cases show which verdict or decision, the worst first."""
    order = [*_WORST_FIRST, "rejected", "accepted"]
    found = Counter(display(record) for record in records.cases)
    return {name: found[name] for name in order if found[name]}


def summary(records: Records) -> str:
    """`2 of 12 cases are pending: 1 changed, 1 drift`."""
    total, pending = len(records.cases), records.pending
    kinds = Counter(record.outcome.value for record in pending)
    broken = len(records.broken)
    line = (
        f"{len(pending)} of {total} cases {'is' if len(pending) == 1 else 'are'} pending: "
        + ", ".join(f"{kinds[kind]} {kind}" for kind in _WORST_FIRST if kinds[kind])
        if pending
        else f"nothing is pending: {total} cases"
    )
    return f"{line}; {broken} pending files cannot be read" if broken else line


def review_outcome(records: Records) -> Outcome:
    """The worst that is pending; `unreadable` where a pending file is; otherwise held."""
    order = list(Outcome)
    found = [record.outcome for record in records.pending]
    if records.broken:
        found.append(Outcome.UNREADABLE)
    return max(found, key=order.index, default=Outcome.HELD)


def fork(case: Case) -> Fork | None:
    """Where *case* parts from what was accepted; None where it does not, or nothing is."""
    if case.then is None or case.first is None:
        return None
    then, now = case.then.positions, case.now.positions
    index = case.first
    old = then[index] if index < len(then) else None
    new = now[index] if index < len(now) else None
    if old is None and new is None:
        return None
    shared = now if len(now) >= index else then
    return Fork(
        index=index,
        before=_joined(shared[max(0, index - _AROUND) : index]),
        then=old,
        now=new,
        after_then=_joined(then[index + 1 : index + 1 + _AROUND]),
        after_now=_joined(now[index + 1 : index + 1 + _AROUND]),
        alternatives=_alternatives(old, new),
        margin_then=old.margin if old else None,
        margin_now=new.margin if new else None,
    )


def _joined(positions: Sequence[Position]) -> str:
    return joined_pieces(position.piece for position in positions)


def _alternatives(
    then: Position | None, now: Position | None
) -> tuple[tuple[str, float | None, float | None], ...]:
    pieces: dict[int, str] = {}
    chances: list[dict[int, float]] = []
    for position in (then, now):
        found = {}
        if position is not None:
            if position.logprob is not None:
                found[position.token_id] = _chance(position.logprob)
                pieces[position.token_id] = position.piece
            for other in position.alternatives:
                found[other.token_id] = _chance(other.logprob)
                pieces[other.token_id] = other.piece
        chances.append(found)
    old, new = chances
    order = sorted(pieces, key=lambda token: -max(old.get(token, 0.0), new.get(token, 0.0)))
    said = {position.token_id for position in (then, now) if position is not None}
    kept = [token for place, token in enumerate(order) if place < _LISTED or token in said]
    return tuple((pieces[token], old.get(token), new.get(token)) for token in kept)


def _chance(logprob: float) -> float:
    return math.exp(min(logprob, 0.0))


def percent(chance: float | None) -> str:
    """`12.3 %`; a dash where it is not known."""
    if chance is None:
        return "–"
    return "< 0.1 %" if chance < 0.001 else f"{100 * chance:.1f} %"


def as_json(records: Records, decided: Sequence[Decided] = ()) -> dict[str, Any]:
    """The review as plain values, with the top-level `verdict` and `checks`."""
    return {
        "verdict": review_outcome(records).value,
        "checks": [
            {
                "name": record.name,
                "verdict": record.outcome.value,
                "evidence": list(record.evidence),
                "remedy": record.remedy,
            }
            for record in records.cases
        ],
        "pending": [record.name for record in records.pending],
        "summary": summary(records),
        "cases": [
            {
                "name": record.name,
                "snapshot": record.snapshot,
                "preset": record.preset,
                "prompt": record.prompt,
                "mode": record.mode,
                "verdict": record.outcome.value,
                "decision": record.decision or None,
                "change": record.change or None,
                "group": record.group or None,
                "first": record.first,
                "stop_then": record.stops[0] or None,
                "stop_now": record.stops[1],
            }
            for record in records.cases
        ],
        "groups": [
            {"change": group.change, "cases": [record.name for record in group.records]}
            for group in groups(records.cases)
        ],
        "conditions": dict(records.run.conditions) if records.run else None,
        "unreadable_files": [_broken(records, broken) for broken in records.broken],
        "decided": [
            {
                "name": item.name,
                "decision": item.decision,
                "refused": item.refused,
                "files": [path.as_posix() for path in item.files],
            }
            for item in decided
        ],
    }


def _broken(records: Records, broken: Broken) -> dict[str, str]:
    return {"file": broken.path.relative_to(records.root).as_posix(), "fault": broken.fault}
