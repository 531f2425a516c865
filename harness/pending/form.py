"""The stored form of a compared case: two lines of JSON, what a list needs and the details.

The first line holds the digest of the second, so that it stands for the whole. Foreign text is
ASCII in here: no escape sequence reaches a terminal by `cat`. Knows
nothing of folders, locks or decisions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.display.textdiff import Change, word_diff
from harness.errors import InputError
from harness.files.strict_json import parse_json_object
from harness.pending.values import Alternative, Case, Position, Side
from harness.verdict import Outcome, Verdict

__all__ = [
    "FORM",
    "Record",
    "case_form",
    "read_details",
    "read_header",
    "text_field",
    "text_fields",
    "to_json",
]

FORM = 1
#: Outcomes whose acceptance would change nothing: the text is kept, the tokens are not.
_LIGHT = frozenset({Outcome.HELD, Outcome.SKIPPED})
#: What a group has in common where it is not words.
_WORDED = {
    Outcome.DRIFT: "the same tokens, with other probabilities",
    Outcome.INCOMPARABLE: "made under other conditions",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a list needs of a compared case.

    Attributes:
        name, snapshot, preset, prompt, mode, first: as in `Case`.
        group: equal for cases with the same change; `""` where nothing changed.
        change: the change in one line, as `[-removed-]{+added+}` or words about it.
        stops: the stop reasons then (`""`: nothing accepted) and now.
        decision: `""` (none yet), `accepted` or `rejected`.
        details_sha256: of the second line.
        path: the file.
        written: when it was recorded, in seconds since 1970.
    """

    name: str
    snapshot: str
    preset: str
    prompt: str
    mode: str
    outcome: Outcome
    evidence: tuple[str, ...]
    remedy: str | None
    first: int | None
    group: str
    change: str
    stops: tuple[str, str]
    decision: str
    details_sha256: str
    path: Path
    written: float

    @property
    def pending(self) -> bool:
        """Whether a person still has to decide."""
        return not self.decision and not self.outcome.passed


def case_form(case: Case, *, decision: str = "") -> bytes:
    """The stored form of *case*; without tokens when it held or is decided."""
    light = bool(decision) or case.verdict.outcome in _LIGHT
    details = to_json(
        {
            "prompt_text": case.prompt_text,
            "verdict_name": case.verdict.name,
            "noise_floor": _finite(case.noise_floor),
            "then": None if light or case.then is None else _side_form(case.then, light=light),
            "now": _side_form(case.now, light=light),
            "accepting": {}
            if light
            else {
                path.as_posix(): base64.b64encode(data).decode()
                for path, data in case.accepting.items()
            },
            "accepted_sha256": {}
            if light
            else {path.as_posix(): digest for path, digest in case.accepted_sha256.items()},
        }
    )
    group, change = ("", "") if case.verdict.outcome in _LIGHT else _change(case)
    header = to_json(
        {
            "form": FORM,
            "name": case.name,
            "snapshot": case.snapshot.as_posix(),
            "preset": case.preset,
            "prompt": case.prompt,
            "mode": case.mode,
            "outcome": case.verdict.outcome.value,
            "evidence": _bounded(case.verdict.evidence),
            "remedy": case.verdict.remedy,
            "first": case.first,
            "group": group,
            "change": change,
            "stops": [case.then.stop_reason if case.then else "", case.now.stop_reason],
            "decision": decision,
            "details_sha256": hashlib.sha256(details).hexdigest(),
        }
    )
    return header + b"\n" + details + b"\n"


def read_header(line: bytes, *, path: Path, name: str, written: float) -> Record:
    """Read the first line of the file *path*, which holds the case *name*.

    Raises:
        InputError: not strict JSON, another form, another case, or a field is missing or wrong.
    """
    raw = parse_json_object(line, where=path)
    if raw.get("form") != FORM:
        raise InputError(f"has form {raw.get('form')!r}, this version reads {FORM}", where=path)
    if raw.get("name") != name:
        raise InputError(f"is the record of {raw.get('name')!r}", where=path)
    stops = text_fields(raw, "stops", path)
    if len(stops) != 2:
        raise InputError("stops are not two", where=path)
    return Record(
        name=name,
        snapshot=text_field(raw, "snapshot", path),
        preset=text_field(raw, "preset", path),
        prompt=text_field(raw, "prompt", path),
        mode=text_field(raw, "mode", path),
        outcome=_outcome(raw, path),
        evidence=text_fields(raw, "evidence", path),
        remedy=None if raw.get("remedy") is None else text_field(raw, "remedy", path),
        first=_index(raw, path),
        group=text_field(raw, "group", path),
        change=text_field(raw, "change", path),
        stops=(stops[0], stops[1]),
        decision=_decision(raw, path),
        details_sha256=text_field(raw, "details_sha256", path),
        path=path,
        written=written,
    )


def read_details(line: bytes, record: Record) -> Case:
    """The case of *record*, from the second line of its file.

    Raises:
        InputError: not the line that the record stands for, or a field is missing or wrong.
    """
    path = record.path
    if hashlib.sha256(line).hexdigest() != record.details_sha256:
        raise InputError("its details are damaged", where=path, remedy="run the suites again")
    raw = parse_json_object(line, where=path)
    try:
        then = raw["then"]
        return Case(
            name=record.name,
            snapshot=Path(record.snapshot),
            preset=record.preset,
            prompt=record.prompt,
            prompt_text=text_field(raw, "prompt_text", path),
            mode=record.mode,
            verdict=Verdict(
                name=text_field(raw, "verdict_name", path),
                outcome=record.outcome,
                evidence=record.evidence,
                remedy=record.remedy,
            ),
            first=record.first,
            noise_floor=_number(raw["noise_floor"]),
            then=None if then is None else _side(then, path),
            now=_side(raw["now"], path),
            accepting={
                Path(key): base64.b64decode(text_field(raw["accepting"], key, path), validate=True)
                for key in raw["accepting"]
            },
            accepted_sha256={
                Path(key): text_field(raw["accepted_sha256"], key, path)
                for key in raw["accepted_sha256"]
            },
        )
    except KeyError as error:
        raise InputError(f"the field {error.args[0]!r} is missing", where=path) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"a field is malformed: {error}", where=path) from error


def _bounded(lines: Iterable[str], characters: int = 2_000, count: int = 40) -> list[str]:
    """Evidence short enough for a line that is read in every list."""
    lines = list(lines)
    found = [line if len(line) <= characters else line[:characters] + "…" for line in lines[:count]]
    return found if len(lines) <= count else [*found, f"… and {len(lines) - count} lines more"]


def _change(case: Case) -> tuple[str, str]:
    """What tells this change from others, as a digest, and in one line for people."""
    outcome = case.verdict.outcome
    if outcome in _WORDED:
        differing = _differing(case) if outcome is Outcome.INCOMPARABLE else ()
        words = _WORDED[outcome] + (f": {', '.join(differing)}" if differing else "")
        return _digest(outcome.value, *differing), words
    if case.then is None:
        text = " ".join(case.now.text.split())
        why = "cannot be read" if outcome is Outcome.UNREADABLE else "nothing is accepted yet"
        said = (text or "no words") if len(text) <= 200 else text[:200] + "…"
        return _digest(outcome.value, case.now.stop_reason, case.now.text), f"{why}; now: {said}"
    hunks: list[str] = []
    words = ""
    for piece in word_diff(case.then.text, case.now.text):
        if piece.change is Change.KEPT:
            words += " … " if words else ""
            continue
        text = " ".join(piece.text.split())
        hunks += [piece.change.value, text]
        words += f"[-{text}-]" if piece.change is Change.REMOVED else f"{{+{text}+}}"
    stops = f"{case.then.stop_reason} → {case.now.stop_reason}"
    if case.then.stop_reason != case.now.stop_reason:
        words += f" stop: {stops}"
    words = words.removesuffix(" … ").strip() or "same words, other tokens"
    return (
        _digest(outcome.value, stops, *hunks),
        words if len(words) <= 300 else words[:300] + "…",
    )


def _differing(case: Case) -> tuple[str, ...]:
    """The names of the conditions that are not the same then and now."""
    then, now = case.then.conditions if case.then else {}, case.now.conditions
    return tuple(sorted(key for key in {*then, *now} if then.get(key) != now.get(key)))


def _digest(*parts: str) -> str:
    joined = "\x00".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:12]


def to_json(value: Any) -> bytes:
    """*value* as one ASCII line; half a surrogate pair, which is no character, is written out."""
    line = _dumped(value)
    return _dumped(_sound(value)) if b"\\ud" in line else line


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _sound(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_sound(key): _sound(item) for key, item in value.items()}
    return [_sound(item) for item in value] if isinstance(value, list | tuple) else value


def _side_form(side: Side, *, light: bool) -> dict[str, Any]:
    return {
        "text": side.text,
        "stop_reason": side.stop_reason,
        "positions": [] if light else [
            [p.token_id, p.piece, _finite(p.logprob),
             [[a.token_id, a.piece, _finite(a.logprob)] for a in p.alternatives]]
            for p in side.positions
        ],
        "conditions": {str(key): str(value) for key, value in side.conditions.items()},
    }  # fmt: skip


def _side(raw: Any, path: Path) -> Side:
    if not isinstance(raw, dict):
        raise TypeError("a side is no object")
    return Side(
        text=text_field(raw, "text", path),
        stop_reason=text_field(raw, "stop_reason", path),
        positions=tuple(_position(item) for item in raw["positions"]),
        conditions={key: text_field(raw["conditions"], key, path) for key in raw["conditions"]},
    )


def _position(raw: Any) -> Position:
    token, piece, logprob, alternatives = raw
    return Position(
        token_id=_token(token),
        piece=_string(piece),
        logprob=_number(logprob),
        alternatives=tuple(_alternative(item) for item in alternatives),
    )


def _alternative(raw: Any) -> Alternative:
    token, piece, logprob = raw
    value = _number(logprob)
    return Alternative(
        token_id=_token(token), piece=_string(piece),
        logprob=-math.inf if value is None else value,
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return _finite(float(value))


def _token(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no token id")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def text_field(raw: Mapping[str, Any], key: str, path: Path) -> str:
    """The text under *key*; raises `InputError` where there is none."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key} is {'no text' if key in raw else 'missing'}", where=path)
    return value


def text_fields(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    """The texts under *key*; raises `InputError` where there is no list of them."""
    value = raw.get(key)
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise InputError(f"{key} is no list of texts", where=path)
    return tuple(value)


def _outcome(raw: Mapping[str, Any], path: Path) -> Outcome:
    try:
        return Outcome(text_field(raw, "outcome", path))
    except ValueError as error:
        raise InputError(f"outcome is {raw['outcome']!r}", where=path) from error


def _decision(raw: Mapping[str, Any], path: Path) -> str:
    value = text_field(raw, "decision", path)
    if value not in ("", "accepted", "rejected"):
        raise InputError(f"decision is {value!r}", where=path)
    return value


def _index(raw: Mapping[str, Any], path: Path) -> int | None:
    value = raw.get("first")
    if value is None or (type(value) is int and value >= 0):
        return value
    raise InputError(f"first is {value!r}", where=path)
