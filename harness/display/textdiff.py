"""Differences between two texts by words; CJK text by characters.

Knows nothing of who shows them or how.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Change", "Piece", "split_words", "word_diff", "word_diff_line"]

# Runs of blanks, single CJK characters, runs of other word characters, single marks.
_WORDS = re.compile(
    r"\s+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+|[^\w\s]"
)


#: Pairs of equal words above which the differing middle counts as replaced: the search for the
#: best way takes time in their number, and nobody reads such a difference.
_MOST_PAIRS = 40_000


class Change(StrEnum):
    """What became of a piece of text."""

    KEPT = "kept"
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of words with one fate."""

    change: Change
    text: str


def split_words(text: str) -> list[str]:
    """Words, blanks, marks and single CJK characters; joined they give *text* back."""
    return _WORDS.findall(text)


def word_diff(before: str, after: str) -> tuple[Piece, ...]:
    """The pieces that lead from *before* to *after*, removals before additions.

    Between two long texts with little in common the whole differing middle is one replacement.
    """
    old, new = split_words(before), split_words(after)
    pieces: list[Piece] = []

    def add(change: Change, words: list[str]) -> None:
        text = "".join(words)
        if text and pieces and pieces[-1].change is change:
            pieces[-1] = Piece(change=change, text=pieces[-1].text + text)
        elif text:
            pieces.append(Piece(change=change, text=text))

    start = _shared(old, new)
    end = _shared(old[start:][::-1], new[start:][::-1])
    add(Change.KEPT, old[:start])
    for change, words in _middle(old[start : len(old) - end], new[start : len(new) - end]):
        add(change, words)
    add(Change.KEPT, old[len(old) - end :])
    return tuple(pieces)


def _shared(first: list[str], second: list[str]) -> int:
    """How many words at the start are the same."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _middle(old: list[str], new: list[str]) -> Iterator[tuple[Change, list[str]]]:
    """Words are matched, each with the blanks after it: blanks alone would match any other."""
    before, after = _units(old), _units(new)
    words = [unit[0] for unit in before], [unit[0] for unit in after]
    seen = Counter(words[1])
    if sum(seen[word] for word in words[0]) > _MOST_PAIRS:
        yield from ((Change.REMOVED, old), (Change.ADDED, new))
        return
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    for operation, i1, i2, j1, j2 in matcher.get_opcodes():
        if operation == "equal":
            for (word, blank), (_, other) in zip(before[i1:i2], after[j1:j2], strict=True):
                yield Change.KEPT, [word]
                yield from _replaced([blank], [other])
        else:
            yield from _replaced(_flat(before[i1:i2]), _flat(after[j1:j2]))


def _replaced(old: list[str], new: list[str]) -> Iterator[tuple[Change, list[str]]]:
    """One for the other, but for the blank that both end with."""
    tail = old[-1:] if old[-1:] == new[-1:] and (not old[-1] or old[-1].isspace()) else []
    yield Change.REMOVED, old[: len(old) - len(tail)]
    yield Change.ADDED, new[: len(new) - len(tail)]
    yield Change.KEPT, tail


def _units(words: list[str]) -> list[tuple[str, str]]:
    """Each word with the blanks after it; blanks at the start follow an empty word."""
    units: list[tuple[str, str]] = []
    for word in words:
        if not word.isspace():
            units.append((word, ""))
        else:
            units.append((units.pop()[0] if units else "", word))
    return units


def _flat(units: list[tuple[str, str]]) -> list[str]:
    return [part for unit in units for part in unit]


def word_diff_line(before: str, after: str) -> str:
    """A plain-text word diff as git writes it: `[-removed-]{+added+}`."""
    marks = {Change.KEPT: ("", ""), Change.REMOVED: ("[-", "-]"), Change.ADDED: ("{+", "+}")}
    return "".join(
        f"{marks[piece.change][0]}{piece.text}{marks[piece.change][1]}"
        for piece in word_diff(before, after)
    )
