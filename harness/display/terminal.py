"""Text on a terminal: two consoles, and foreign text made inert.

Model outputs and file names can hold escape sequences, bidirectional overrides, `::error` lines and
what looks like a password; they are shown, never obeyed, and a likely secret is shown by its
beginning only. What is stored is never changed. Knows nothing of what is printed.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "errors", "shown"]

_KEPT = "\n\t"
# A log of GitHub Actions, Azure Pipelines or TeamCity takes these for commands: the first at the
# beginning of a line, and a long line may be broken before any word; the others anywhere
# (github.com/actions/runner, ActionCommand.cs).
_COMMAND = re.compile(r"(?<=:)(?=:[A-Za-z][\w-]*(?:\s|::))|(?<=##)(?=\[|vso\[|teamcity\[)")
_GUARD = "\u200b"
#: Tokens and keys by their published prefixes; a private key by its first line.
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|sk-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{35}|A[KS]IA[A-Z0-9]{16}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
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
    """*text* with control, bidirectional, surrogate and line-separating characters written as
    `\\xNN` or `\\uNNNN`.

    Where a continuous-integration log would read a command, a zero-width space stands in between;
    a likely secret is cut after its first characters.
    """
    safe = "".join(_visible(character) for character in _SECRET.sub(_cut, text))
    return "\n".join(
        _GUARD + line if line.lstrip().startswith("::") else line
        for line in _COMMAND.sub(_GUARD, safe).split("\n")
    )


def _cut(found: re.Match[str]) -> str:
    return f"{found[0][:7]}…[likely a secret: {len(found[0])} characters]"


def _visible(character: str) -> str:
    if character in _KEPT:
        return character
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character
