"""Differences between two texts by words; CJK text by characters.

Knows nothing of who shows them or how.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Change", "Piece", "split_words", "word_diff", "word_diff_line"]

# Runs of blanks, single CJK characters, runs of other word characters, single marks.
_WORDS = re.compile(
    r"\s+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+|[^\w\s]"
)


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
    """The pieces that lead from *before* to *after*, removals before additions."""
    old, new = split_words(before), split_words(after)
    pieces: list[Piece] = []

    def add(change: Change, words: list[str]) -> None:
        if words:
            pieces.append(Piece(change=change, text="".join(words)))

    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for operation, i1, i2, j1, j2 in matcher.get_opcodes():
        if operation == "equal":
            add(Change.KEPT, old[i1:i2])
        else:
            add(Change.REMOVED, old[i1:i2])
            add(Change.ADDED, new[j1:j2])
    return tuple(pieces)


def word_diff_line(before: str, after: str) -> str:
    """A plain-text word diff as git writes it: `[-removed-]{+added+}`."""
    marks = {Change.KEPT: ("", ""), Change.REMOVED: ("[-", "-]"), Change.ADDED: ("{+", "+}")}
    return "".join(
        f"{marks[piece.change][0]}{piece.text}{marks[piece.change][1]}"
        for piece in word_diff(before, after)
    )
