"""Where a completion should have ended: its natural end, what came behind it, and loops.

Reads token ids and text. A natural end is claimed only by what follows it: an end-of-turn token
that generation did not stop at, a role's header, the prompt again, another question, a repetition
loop. Knows nothing of models, tokenizers' files or verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["EndSign", "Loop", "NaturalEnd", "ends_a_sentence", "find_loop", "natural_end"]

_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s|$)|[。！？][”’」』）]*")
_ROLE = r"user|assistant|system|human|question|instruction|response|用户|助手|问题|问|答"
_HEADER = re.compile(
    rf"(?im)^[ \t]*(?:#{{1,4}}[ \t]*(?:{_ROLE})\b|(?:{_ROLE}|q|a)[ \t]*[:：]|"
    rf"(?:user|assistant|system|model)[ \t]*$)"
    r"|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]"
)
_QUESTION_LINE = re.compile(r"(?m)^[^\n.!?。！？]*[?？][ \t]*")
_LEAST_REPEATS, _LEAST_LOOP = 3, 8


class EndSign(StrEnum):
    """What shows that a completion went on behind its natural end."""

    END_TOKEN = "end token"  #: a token that ends a turn, and that generation does not stop at
    ROLE_HEADER = "role header"  #: the next speaker is announced
    PROMPT_AGAIN = "prompt again"  #: the prompt's own words
    QUESTION = "another question"  #: a line that asks
    LOOP = "loop"  #: the second round of a repetition


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A repetition that a completion ends in.

    Attributes:
        period: tokens a round.
        start: index of the first round's first token.
        rounds: whole rounds.
    """

    period: int
    start: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NaturalEnd:
    """Where a completion should have ended.

    Attributes:
        tokens: how many tokens lie before it.
        sign: what followed.
        exact: False where the place was counted in letters, for want of a tokenizer.
    """

    tokens: int
    sign: EndSign
    exact: bool = True


def find_loop(ids: Sequence[int]) -> Loop | None:
    """The repetition that *ids* ends in, by its shortest period.

    At least three whole rounds, and at least eight tokens of repetition, so `ha ha ha` is none.
    """
    length = len(ids)
    for period in range(1, length // _LEAST_REPEATS + 1):
        place = length - 1
        while place >= period and ids[place] == ids[place - period]:
            place -= 1
        start = place - period + 1
        rounds = (length - start) // period
        if rounds >= _LEAST_REPEATS and length - start >= max(_LEAST_LOOP, 3 * period):
            return Loop(period=period, start=start, rounds=rounds)
    return None


def ends_a_sentence(text: str) -> bool:
    """Whether *text* has a place where an answer could end."""
    return _SENTENCE_END.search(text) is not None


def natural_end(
    ids: Sequence[int],
    text: str,
    prompt: str,
    *,
    stops: Collection[int] = (),
    turn_ids: Collection[int] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    loop: Loop | None = None,
    ended: bool = False,
) -> NaturalEnd | None:
    """The first end-of-turn-like point of a completion that went on behind it; None if none did.

    Args:
        ids: the completion's tokens.
        text: the same without special tokens.
        prompt: the last user message's text, or the plain prompt.
        stops: ids that generation stops at.
        turn_ids: ids that end a turn by the files.
        decode: ids to text, to count letters as tokens; without it the place is estimated.
        ended: it ended by itself: a question as its last line is asked of the user.
    """
    found: list[NaturalEnd] = []
    for place, token in enumerate(ids):
        if token in turn_ids and token not in stops:
            found.append(NaturalEnd(tokens=place, sign=EndSign.END_TOKEN))
            break
    if loop is not None:
        found.append(NaturalEnd(tokens=loop.start + loop.period, sign=EndSign.LOOP))
    for place, sign in _signs(text, prompt, ended):
        before, exact = _tokens_before(place, ids, text, decode)
        found.append(NaturalEnd(tokens=before, sign=sign, exact=exact))
    return min(found, key=lambda end: end.tokens, default=None)


def first_sentence_end(
    ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str] | None = None
) -> int | None:
    """How many tokens lie before the end of the first sentence; None if no sentence ends."""
    match = _SENTENCE_END.search(text)
    return None if match is None else _tokens_before(match.end(), ids, text, decode)[0]


def _signs(text: str, prompt: str, ended: bool) -> list[tuple[int, EndSign]]:
    """Letters before each sign; a sign needs an ended sentence or line before it."""
    found: list[tuple[int, EndSign]] = []
    first = _SENTENCE_END.search(text)
    floor = first.end() if first else len(text)
    line = text.find("\n", len(text) - len(text.lstrip()))
    if line >= 0:
        floor = min(floor, line)
    header = _HEADER.search(text, floor) if floor else None
    if header is not None:
        found.append((header.start(), EndSign.ROLE_HEADER))
    asked = prompt.strip()
    again = text.find(asked, floor) if len(asked) >= 4 else -1
    if again >= 0:
        found.append((again, EndSign.PROMPT_AGAIN))
    question = _QUESTION_LINE.search(text, text.find("\n", floor) + 1 or len(text))
    if question is not None and not (ended and not text[question.end() :].strip()):
        found.append((question.start(), EndSign.QUESTION))
    return found


def _tokens_before(
    letters: int,
    ids: Sequence[int],
    text: str,
    decode: Callable[[Sequence[int]], str] | None,
) -> tuple[int, bool]:
    """The fewest tokens whose text has *letters* letters, and whether they were counted."""
    if decode is None:
        return round(letters / max(1, len(text)) * len(ids)), False
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) >= letters:
            high = middle
        else:
            low = middle + 1
    return low, True
