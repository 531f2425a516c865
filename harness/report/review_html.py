"""The review as one self-contained HTML page: grid, modes side by side, words, tokens, heat.

Everything a person reads is in the page as escaped text; tokens lie in it as JSON, from which its
script draws them when asked. A content security policy forbids it every connection. Knows nothing
of decisions.
"""

from __future__ import annotations

import math
import secrets
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.display.page import render
from harness.display.terminal import shown
from harness.display.textdiff import Change, word_diff
from harness.errors import InputError
from harness.pending import Case, Position, Record, Records, read_case, stack_conditions
from harness.report.review import (
    SIGNS,
    Row,
    counts,
    display,
    fork,
    groups,
    modes,
    percent,
    rows,
    summary,
    unread,
)

__all__ = ["as_html"]

_TEMPLATE = Path(__file__).parent / "templates" / "review.html.jinja"


def as_html(records: Records) -> str:
    """The page, whole."""
    columns = modes(records)
    found = rows(records)
    places = {
        record.name: place
        for place, record in enumerate(
            row.cells[mode] for row in found for mode in columns if mode in row.cells
        )
    }
    several = len({(row.folder, row.preset) for row in found}) > 1
    conditions = records.run.conditions if records.run else {}
    return render(
        _TEMPLATE,
        nonce=secrets.token_urlsafe(16),
        heading=_heading(records),
        summary=summary(records),
        counts=[(name, count, SIGNS[name]) for name, count in counts(records).items()],
        conditions=[
            (key, value)
            for key, value in sorted(conditions.items(), key=lambda item: _order(item[0]))
        ],
        modes=columns,
        rows=[_row(row, columns, places, several) for row in found],
        groups=[
            {
                "outcome": group.outcome.value,
                "sign": SIGNS[group.outcome.value],
                "change": group.change,
                "pieces": _hunks(group.records[0]),
                "count": len(group.records),
                "place": places[group.records[0].name],
                "where": [f"{r.prompt} × {r.mode}" for r in group.records[:6]],
                "more": max(0, len(group.records) - 6),
            }
            for group in groups(records.cases)
        ],
        broken=[
            {"path": broken.path.relative_to(records.root).as_posix(), "fault": broken.fault}
            for broken in records.broken
        ],
    )


def _heading(records: Records) -> str:
    count = len(records.pending)
    if not count:
        return "Nothing is pending"
    return f"{count} {'change' if count == 1 else 'changes'} to review"


def _order(key: str) -> tuple[bool, str]:
    return not stack_conditions({key: ""}), key


def _hunks(record: Record) -> list[tuple[str, str]]:
    """What changed, and dots for what did not; empty where that is not words."""
    try:
        case = read_case(record)
    except InputError:
        return []
    if case.then is None or case.then.text == case.now.text:
        return []
    pieces = word_diff(case.then.text, case.now.text)
    found = [
        ("kept", " … ") if piece.change is Change.KEPT else (piece.change.value, piece.text.strip())
        for piece in pieces
    ]
    while found and found[0][0] == "kept":
        found.pop(0)
    while found and found[-1][0] == "kept":
        found.pop()
    return found[:40]


def _row(row: Row, columns: Sequence[str], places: dict[str, int], several: bool) -> dict[str, Any]:
    cards = [_card(row.cells[mode], places) if mode in row.cells else None for mode in columns]
    present = [card for card in cards if card]
    return {
        "place": present[0]["place"],
        "section": f"{row.folder} · {row.preset}" if several else "",
        "prompt": row.prompt,
        "prompt_text": next((card["prompt_text"] for card in present if card["prompt_text"]), ""),
        "cards": cards,
        "present": present,
        "quiet": all(card["name"] in ("held", "skipped") for card in present),
    }


def _card(record: Record, places: dict[str, int]) -> dict[str, Any]:
    name = display(record)
    card: dict[str, Any] = {
        "place": places[record.name],
        "case": record.name,
        "mode": record.mode,
        "name": name,
        "sign": SIGNS.get(name, "✗"),
        "pending": record.pending,
        "stops": list(record.stops),
        "evidence": record.evidence,
        "remedy": record.remedy,
        "snapshot": record.snapshot,
        "accept": f"lora-stack review --accept {shlex.quote(record.name)}",
        "prompt_text": "",
        "pieces": [],
        "tokens": None,
        "fork": None,
        "fault": None,
    }
    try:
        case = read_case(record)
    except InputError as error:
        return card | {"fault": unread(error)}
    then = case.now.text if case.then is None else case.then.text
    return card | {
        "prompt_text": case.prompt_text,
        "pieces": [(piece.change.value, piece.text) for piece in word_diff(then, case.now.text)],
        "tokens": _tokens(case) if case.now.positions else None,
        "fork": _fork(case),
    }


def _tokens(case: Case) -> dict[str, Any]:
    """What the page's script draws: `[piece, probability, drift, [[piece, probability], …]]`."""
    drifts = list(_drifts(case))
    return {
        "first": case.first,
        "floor": case.noise_floor,
        "then": [_token(p, None) for p in case.then.positions] if case.then else [],
        "now": [
            _token(p, drifts[index] if index < len(drifts) else None)
            for index, p in enumerate(case.now.positions)
        ],
    }


def _drifts(case: Case) -> Iterator[float | None]:
    """Log-probability now less then, in nats, as long as the tokens are the same."""
    if case.then is None:
        return
    for then, now in zip(case.then.positions, case.now.positions, strict=False):
        if then.token_id != now.token_id:
            return
        known = then.logprob is not None and now.logprob is not None
        yield now.logprob - then.logprob if known else None  # type: ignore[operator]


def _token(position: Position, drift: float | None) -> list[Any]:
    return [
        shown(position.piece),
        _chance(position.logprob),
        None if drift is None else float(f"{drift:.4g}"),
        [[shown(other.piece), _chance(other.logprob)] for other in position.alternatives],
    ]


def _chance(logprob: float | None) -> float | None:
    return None if logprob is None else float(f"{math.exp(min(logprob, 0.0)):.5g}")


def _fork(case: Case) -> dict[str, Any] | None:
    found = fork(case)
    if found is None:
        return None
    return {
        "number": found.index + 1,
        "before": found.before,
        "then": found.then.piece if found.then else "the end",
        "now": found.now.piece if found.now else "the end",
        "after_then": found.after_then,
        "after_now": found.after_now,
        "alternatives": [
            {
                "piece": _visible(piece),
                "then": percent(then),
                "now": percent(now),
                "then_width": round(100 * (then or 0.0), 1),
                "now_width": round(100 * (now or 0.0), 1),
            }
            for piece, then, now in found.alternatives
        ],
        "margin_then": _nats(found.margin_then),
        "margin_now": _nats(found.margin_now),
        "floor": _nats(case.noise_floor),
    }


def _nats(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


def _visible(piece: str) -> str:
    return piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
