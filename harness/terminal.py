"""Text on a terminal: two consoles, and foreign text made inert.

Model outputs and file names can hold escape sequences, bidirectional overrides and `::error`
lines; they are shown, never obeyed. Knows nothing of what is printed.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "errors", "shown"]

_KEPT = "\n\t"
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@cache
def console() -> Console:
    """Standard output."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


@cache
def errors() -> Console:
    """Standard error, for progress and messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def shown(text: str) -> str:
    """*text* with control, bidirectional and surrogate characters written as `\\xNN` or `\\uNNNN`.

    A line that a continuous-integration log would take as a command gets a zero-width guard.
    """
    safe = "".join(_visible(character) for character in text)
    return "\n".join(
        "\u200b" + line if line.lstrip().startswith(("::", "##[")) else line
        for line in safe.split("\n")
    )


def _visible(character: str) -> str:
    if character in _KEPT:
        return character
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character
