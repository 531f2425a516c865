"""Holding a fresh completion against the accepted one: the lines of evidence, and the verdict.

Pure: two snapshots, a measured noise floor and a way to write tokens go in, a `Comparison` comes
out. What is a rounding tie and what a regression is decided here. Knows nothing of files, engines
or pytest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.display.pieces import joined_pieces
from harness.display.terminal import shown
from harness.display.textdiff import word_diff_line
from harness.errors import InputError
from harness.evidence import GAP_STEP, Evidence, Shifts, shifts
from harness.noise import NoiseFloor, Tolerances, tolerances
from harness.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from harness.snapshot_form import Snapshot

__all__ = ["Comparison", "judge_snapshot"]

_CONTEXT = 8  # tokens shown before the first that differs
_ACCEPT = "read the differences, then accept with lora-stack review or --snapshot-update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A verdict on a snapshot.

    Attributes:
        first: index of the first token that differs; None where none does.
        moved: how far log-probabilities moved over the tokens that are the same; None without
            evidence on both sides.
        allowed: how far they may.
    """

    verdict: Verdict
    first: int | None = None
    moved: Shifts | None = None
    allowed: Tolerances | None = None


def judge_snapshot(
    name: str,
    accepted: Snapshot | InputError | None,
    fresh: Snapshot,
    floor: NoiseFloor | None,
    *,
    accepted_now: Evidence | None = None,
    piece: Callable[[int], str] = str,
) -> Comparison:
    """What *fresh* is, next to what was accepted.

    Args:
        accepted: None where there is nothing, an `InputError` where it cannot be read.
        floor: what rounding moves; None where it cannot be measured, and then no difference is
            taken for rounding, and no movement of probabilities for a change.
        accepted_now: what the model of today thinks of the accepted tokens, all of them; with it
            a tie is a tie only if nothing else moved up to the end.
        piece: writes a token id as text.
    """
    if accepted is None:
        verdict = Verdict(
            name=name,
            outcome=Outcome.MISSING,
            evidence=("nothing is accepted yet", f"now: {shown(fresh.text)}"),
            remedy=_ACCEPT,
        )
        return Comparison(verdict=verdict)
    if isinstance(accepted, InputError):
        verdict = Verdict(
            name=name,
            outcome=Outcome.UNREADABLE,
            evidence=(f"{accepted.where}: {accepted.fault}",),
            remedy=accepted.remedy,
        )
        return Comparison(verdict=verdict)
    conditions = tuple(_other_conditions(accepted, fresh))
    first = _first_difference(accepted, fresh)
    if conditions:
        verdict = Verdict(
            name=name,
            outcome=Outcome.INCOMPARABLE,
            evidence=(*conditions, *_text_lines(accepted, fresh)),
            remedy="run with what the snapshot was made with, or accept anew with "
            "--snapshot-update",
        )
        return Comparison(verdict=verdict, first=first)
    return _compared(name, accepted, fresh, floor, first, accepted_now, piece)


def _compared(
    name: str,
    accepted: Snapshot,
    fresh: Snapshot,
    floor: NoiseFloor | None,
    first: int | None,
    accepted_now: Evidence | None,
    piece: Callable[[int], str],
) -> Comparison:
    same = len(fresh.token_ids) if first is None else first
    then, now = accepted.evidence, fresh.evidence
    moved = allowed = None
    if then is not None and now is not None and floor is not None:
        seen, count = now, same
        if accepted_now is not None and len(accepted_now) == len(accepted.token_ids):
            # Beyond a tie, too: what was accepted is scored as a whole.
            seen, count = accepted_now, len(accepted.token_ids)
        moved = shifts(then, seen, accepted.token_ids[:count])
        allowed = tolerances(floor, tokens=len(moved.chosen), gaps=len(moved.gaps))
    drifted = moved is not None and allowed is not None and _beyond(moved, allowed)
    lines = list(_movement_lines(moved, allowed, accepted, now, same))
    changed_contents = list(_contents_lines(accepted, fresh))
    if first is None:
        outcome = Outcome.DRIFT if drifted else Outcome.HELD
        told = [*lines, f"the noise floor is {floor}", *changed_contents] if drifted else lines
        remedy = (
            "the model changed though the text has not yet: find out what did, or accept anew with "
            "lora-stack review or --snapshot-update"
        )
    else:
        tied = (
            not drifted
            and allowed is not None
            and _is_tie(accepted, fresh, first, allowed.tie, accepted_now)
        )
        outcome = Outcome.TIE if tied else Outcome.CHANGED
        told = [*_difference_lines(accepted, fresh, first, floor, accepted_now, piece), *lines]
        told += [*changed_contents, *_text_lines(accepted, fresh)]
        remedy = _ACCEPT
    verdict = Verdict(
        name=name,
        outcome=outcome,
        evidence=tuple(told),
        remedy=None if outcome.passed else remedy,
    )
    return Comparison(verdict=verdict, first=first, moved=moved, allowed=allowed)


def _first_difference(accepted: Snapshot, fresh: Snapshot) -> int | None:
    then, now = accepted.token_ids, fresh.token_ids
    for place, (one, other) in enumerate(zip(then, now, strict=False)):
        if one != other:
            return place
    if len(then) != len(now) or accepted.stop_reason != fresh.stop_reason:
        return min(len(then), len(now))
    return None


def _beyond(moved: Shifts, allowed: Tolerances) -> bool:
    figures = (moved.chosen_rms, moved.gap_rms, moved.worst)
    limits = (allowed.chosen, allowed.gaps, allowed.worst)
    # A figure that is no number is beyond every limit.
    return any(not figure <= limit for figure, limit in zip(figures, limits, strict=True))


def _is_tie(
    accepted: Snapshot, fresh: Snapshot, first: int, most: float, accepted_now: Evidence | None
) -> bool:
    """Whether either token could come first at the first difference, then and now; and, where
    the accepted tokens were scored, whether each of them still could."""
    now = fresh.evidence
    if now is None or first >= len(accepted.token_ids) or first >= len(fresh.token_ids):
        return False
    lower = now.logprob_of(first, accepted.token_ids[first])
    if lower is None or not float(now.top_logprobs[first, 0]) - lower <= most:
        return False
    then = accepted.evidence
    if then is not None:
        # What was stored is rounded to whole steps.
        lower = then.logprob_of(first, fresh.token_ids[first])
        if lower is None or not float(then.top_logprobs[first, 0]) - lower <= most + GAP_STEP:
            return False
    if accepted_now is None or len(accepted_now) != len(accepted.token_ids):
        return True
    behind = accepted_now.top_logprobs[:, 0] - accepted_now.logprobs
    return bool((behind <= most).all())


def _other_conditions(accepted: Snapshot, fresh: Snapshot) -> Iterator[str]:
    """What makes two completions incomparable: another base, adapter set, prompt or settings."""
    if accepted.prompt_token_ids != fresh.prompt_token_ids:
        cause = "the prompt"
        for part in ("tokenizer", "template"):
            if accepted.contents.get(part) != fresh.contents.get(part):
                cause = f"the {part}" if part == "tokenizer" else "the chat template"
        yield (
            f"the prompt's token ids differ ({len(accepted.prompt_token_ids)} accepted, "
            f"{len(fresh.prompt_token_ids)} now); {cause} changed"
        )
    elif accepted.contents.get("tokenizer") != fresh.contents.get("tokenizer"):
        yield "the tokenizer is another one: the same ids may be other text"
    for key in sorted({*accepted.settings, *fresh.settings}):
        then, now = accepted.settings.get(key), fresh.settings.get(key)
        if then != now:
            yield f"the setting {key} was {then!r}, is {now!r}"
    if accepted.mode != fresh.mode:
        yield f"the mode was {accepted.mode!r}, is {fresh.mode!r}"
    for key, what in (("architecture", "base's architecture"), ("composition", "mode")):
        then, now = accepted.made_with.get(key), fresh.made_with.get(key)
        if then != now:
            yield f"the {what} was {then}, is {now}"
    hub_then, hub_now = (_hub_id(s.made_with.get("base")) for s in (accepted, fresh))
    other_contents = accepted.contents.get("base") != fresh.contents.get("base")
    if hub_then and hub_now and hub_then != hub_now and other_contents:
        yield f"the base was {hub_then}, is {hub_now}"


def _hub_id(base: object) -> str | None:
    """`owner/name` of `owner/name@commit`; None for a folder."""
    found = re.fullmatch(r"([^@]+)(?:@[^@]*)?@[0-9a-f]{7,64}", str(base))
    return found[1] if found else None


def _difference_lines(
    accepted: Snapshot,
    fresh: Snapshot,
    first: int,
    floor: NoiseFloor | None,
    accepted_now: Evidence | None,
    piece: Callable[[int], str],
) -> Iterator[str]:
    def written(ids: tuple[int, ...]) -> str:
        return f"{piece(ids[first])!r} ({ids[first]})" if first < len(ids) else "the end"

    around = fresh.token_ids[max(0, first - _CONTEXT) : first]
    before = joined_pieces(piece(token) for token in around)
    yield (
        f"token {first + 1} is the first that differs: {written(accepted.token_ids)} accepted, "
        f"{written(fresh.token_ids)} now{f', after {shown(before)!r}' if before else ''}"
    )
    pair = [s.token_ids[first] for s in (accepted, fresh) if first < len(s.token_ids)]
    for when, side in (("then", accepted), ("now", fresh)):
        if side.evidence is not None and first < len(side.evidence):
            known = {}
            if side is fresh and accepted_now is not None and first < len(accepted_now):
                # Up to here the two read the same: so probable is the accepted token now.
                known[accepted.token_ids[first]] = float(accepted_now.logprobs[first])
            yield f"{when}: {_chances(side.evidence, first, pair, known, piece)}"
    if floor is not None:
        most = tolerances(floor, tokens=1, gaps=1).tie
        yield f"a tie is within {most:.2g} nats; the noise floor is {floor}"
    yield (
        f"stop reason: {accepted.stop_reason} after {len(accepted.token_ids)} tokens accepted, "
        f"{fresh.stop_reason} after {len(fresh.token_ids)} now"
    )


def _chances(
    evidence: Evidence,
    place: int,
    pair: list[int],
    known: dict[int, float],
    piece: Callable[[int], str],
) -> str:
    parts = []
    for token in pair:
        found = evidence.logprob_of(place, token)
        found = known.get(token) if found is None else found
        chance = f"{math.exp(found):.2%}" if found is not None else "not among the first five"
        parts.append(f"{piece(token)!r} {chance}")
    margin = float(evidence.margins[place])
    return f"{', '.join(parts)}; the best is {margin:.2g} nats before the second"


def _movement_lines(
    moved: Shifts | None,
    allowed: Tolerances | None,
    accepted: Snapshot,
    now: Evidence | None,
    same: int,
) -> Iterator[str]:
    if moved is None or allowed is None:
        reason = "the run" if now is None else "the snapshot"
        if now is not None and accepted.evidence is not None:
            reason = "the noise floor, which was not measured,"
        yield f"probabilities were not compared: {reason} has no evidence"
        return
    if not len(moved.chosen):
        return
    which = "same" if len(moved.chosen) <= same else "accepted"
    yield (
        f"over {len(moved.chosen)} {which} tokens log-probabilities moved by "
        f"{moved.chosen_rms:.2g} nats (rms; {allowed.chosen:.2g} are allowed), the alternatives' "
        f"by {moved.gap_rms:.2g} ({allowed.gaps:.2g}), at most {moved.worst:.2g} "
        f"({allowed.worst:.2g}) at token {moved.worst_place + 1}"
    )


def _contents_lines(accepted: Snapshot, fresh: Snapshot) -> Iterator[str]:
    """What else is not as it was; none of it decides."""
    for key in sorted({*accepted.contents, *fresh.contents} - {"prompt", "settings"}):
        if accepted.contents.get(key) != fresh.contents.get(key):
            yield f"{key}: other contents than when accepted"
    then, now = ({"application": side.application, **side.made_with} for side in (accepted, fresh))
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            yield shown(f"{key}: {then.get(key)} accepted, {now.get(key)} now")


def _text_lines(accepted: Snapshot, fresh: Snapshot) -> Iterator[str]:
    if accepted.text == fresh.text:
        yield "the text is the same"
        return
    yield "text:"
    yield from shown(word_diff_line(accepted.text, fresh.text)).split("\n")
