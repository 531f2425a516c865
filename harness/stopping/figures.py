"""Figures about how completions end: each one's, a mode's, and the survival curve.

Values from `Completion`s alone: no model is asked, so they cost nothing where completions exist.
What a model would have said next is `harness.stopping.evidence`'s. Knows nothing of verdicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.completion import Completion, StopReason
from harness.snapshot_form import Snapshot
from harness.stopping.endings import (
    EndSign,
    Loop,
    ends_a_sentence,
    find_loop,
    first_sentence_end,
    natural_end,
)
from harness.stopping.intervals import Interval, wilson_interval

__all__ = [
    "Ending",
    "ModeFigures",
    "Survival",
    "endings_of",
    "length_limit",
    "mode_figures",
    "survival",
]

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one completion ended.

    Attributes:
        tokens: its length, the EOS included.
        sign: what showed that it went on behind its natural end, or None.
        natural_end: tokens before the place where it should have ended: the EOS, the sign, or the
            end of its first sentence; None if it has none of them.
        overrun: tokens behind the natural end that a sign shows; 0 without one.
        counted: False where places were estimated, for want of a tokenizer.
        undecided: it was cut off before a place where an answer could end, so it says nothing.
        empty: it stopped before it said anything: no answer that ended.
    """

    prompt: str
    stop_reason: StopReason
    tokens: int
    sign: EndSign | None
    natural_end: int | None
    overrun: int
    loop: Loop | None
    loop_text: str
    counted: bool
    undecided: bool
    empty: bool = False

    @property
    def stopped(self) -> bool:
        return self.stop_reason is StopReason.EOS

    @property
    def ran_on(self) -> bool:
        """Neither stopped nor undecided."""
        return not self.stopped and not self.undecided


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """How many completions still run, token by token (Kaplan and Meier, JASA 53, 1958).

    Completions that the length or context cut off count as running until then. Index 0 is the
    first token.

    Attributes:
        at_risk: completions that reach the token.
        hazard: share of those that stop there.
        running: estimated share that runs on behind it.
    """

    at_risk: tuple[int, ...]
    hazard: tuple[float, ...]
    running: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeFigures:
    """How one mode's completions end.

    Attributes:
        reasons: completions by stop reason.
        interval: Wilson's 95 % interval of the stop rate.
        stop_tokens: (least, median, most) tokens of those that stopped, the EOS included.
    """

    mode: str
    max_new_tokens: int
    endings: tuple[Ending, ...]
    reasons: Mapping[str, int]
    interval: Interval
    stop_tokens: tuple[int, float, int] | None
    survival: Survival

    @property
    def total(self) -> int:
        return len(self.endings)

    @property
    def stopped(self) -> int:
        return sum(ending.stopped for ending in self.endings)

    @property
    def undecided(self) -> int:
        return sum(ending.undecided for ending in self.endings)

    @property
    def empty(self) -> int:
        return sum(ending.empty for ending in self.endings)

    @property
    def loops(self) -> int:
        return sum(ending.loop is not None for ending in self.endings)

    @property
    def overran(self) -> int:
        """Completions with an overrun."""
        return sum(ending.overrun > 0 for ending in self.endings)

    @property
    def rate(self) -> float | None:
        return self.stopped / self.total if self.endings else None

    @property
    def mean_tokens(self) -> float | None:
        return sum(e.tokens for e in self.endings) / self.total if self.endings else None

    @property
    def longest_overrun(self) -> int:
        return max((ending.overrun for ending in self.endings), default=0)

    @property
    def signs(self) -> Mapping[str, int]:
        """Completions by what showed that they went on."""
        return dict(Counter(e.sign.value for e in self.endings if e.sign is not None))


def length_limit(completions: Sequence[Completion | Snapshot]) -> int:
    """`max_new_tokens` of the first completion's settings; 0 of none."""
    settings = completions[0].settings if completions else {}
    if isinstance(settings, Mapping):
        return int(settings.get("max_new_tokens", 0))
    return settings.max_new_tokens


def endings_of(
    completions: Sequence[Completion | Snapshot],
    *,
    stops: Collection[int] = (),
    turn_ids: Collection[int] = (),
    decode: Decode | None = None,
) -> tuple[Ending, ...]:
    """How each completion ended; arguments as `natural_end`'s."""
    return tuple(
        _ending(completion, stops=stops, turn_ids=turn_ids, decode=decode)
        for completion in completions
    )


def _ending(
    completion: Completion | Snapshot,
    *,
    stops: Collection[int],
    turn_ids: Collection[int],
    decode: Decode | None,
) -> Ending:
    ids, text, reason = completion.token_ids, completion.text, completion.stop_reason
    stopped = reason is StopReason.EOS
    words = ids[:-1] if stopped else ids
    loop = find_loop(words)
    end = natural_end(
        words,
        text,
        _asked(completion),
        # What ended this completion is no overrun, whatever the files say.
        stops={*stops, ids[-1]} if stopped and ids else stops,
        turn_ids=turn_ids,
        decode=decode,
        loop=loop,
        ended=stopped,
    )
    if end is not None:
        place: int | None = end.tokens
    elif stopped:
        place = len(words)
    else:
        place = first_sentence_end(words, text, decode)
    cut = reason in (StopReason.LENGTH, StopReason.CONTEXT)
    round_ids = words[loop.start : loop.start + loop.period] if loop else ()
    return Ending(
        prompt=completion.prompt if isinstance(completion, Snapshot) else completion.prompt.id,
        stop_reason=reason,
        tokens=len(ids),
        sign=end.sign if end else None,
        natural_end=place,
        overrun=len(words) - end.tokens if end else 0,
        loop=loop,
        loop_text=decode(round_ids) if decode and loop else "",
        counted=decode is not None,
        undecided=cut and end is None and not ends_a_sentence(text),
        empty=stopped and not text.strip(),
    )


def _asked(completion: Completion | Snapshot) -> str:
    if isinstance(completion, Snapshot):
        return completion.prompt_text
    prompt = completion.prompt
    users = [message.content for message in prompt.messages if message.role == "user"]
    return prompt.text or (users[-1] if users else "")


def survival(endings: Sequence[Ending]) -> Survival:
    """The survival curve of *endings*, as long as the longest completion."""
    length = max((ending.tokens for ending in endings), default=0)
    stops, leaves = [0] * (length + 1), [0] * (length + 1)
    for ending in endings:
        (stops if ending.stopped else leaves)[ending.tokens] += 1
    at_risk: list[int] = []
    hazard: list[float] = []
    running: list[float] = []
    here, share = len(endings), 1.0
    for step in range(1, length + 1):
        at_risk.append(here)
        hazard.append(stops[step] / here if here else 0.0)
        share *= 1 - hazard[-1]
        running.append(share)
        here -= stops[step] + leaves[step]
    return Survival(at_risk=tuple(at_risk), hazard=tuple(hazard), running=tuple(running))


def mode_figures(mode: str, endings: Sequence[Ending], max_new_tokens: int) -> ModeFigures:
    """The figures of one mode."""
    lengths = [ending.tokens for ending in endings if ending.stopped]
    return ModeFigures(
        mode=mode,
        max_new_tokens=max_new_tokens,
        endings=tuple(endings),
        reasons=dict(Counter(ending.stop_reason.value for ending in endings)),
        interval=wilson_interval(len(lengths), len(endings)),
        stop_tokens=(min(lengths), median(lengths), max(lengths)) if lengths else None,
        survival=survival(endings),
    )
