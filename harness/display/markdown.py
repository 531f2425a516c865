"""Markdown that foreign text cannot break out of.

Model outputs hold backticks, pipes, HTML and mentions; here they stay text. Knows nothing of what
is reported.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from harness.display.terminal import shown

__all__ = ["code_block", "inline", "table"]

_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~>])")


def inline(text: str) -> str:
    """*text* on one line, marks escaped, HTML inert, mentions cut off from their names."""
    flat = " ".join(shown(text).split())
    escaped = _MARKS.sub(r"\\\1", html.escape(flat, quote=False).replace("&gt;", ">"))
    return escaped.replace("@", "@\u200b")


def code_block(text: str) -> str:
    """*text* in a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown(text)}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell is escaped."""
    lines = [
        "| " + " | ".join(inline(cell) for cell in head) + " |",
        "|" + " --- |" * len(head),
    ]
    lines += ["| " + " | ".join(inline(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
