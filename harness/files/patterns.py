"""Regular expressions out of foreign files: compiled and matched with a bound on the time.

Python's `re` backtracks; a pattern of twenty characters can take years on a name of thirty. What
could is tried in a child process with a limit on processor time first. Knows nothing of configs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["SLOW", "pattern_fault"]

SLOW = "takes longer than any match should"
_CPU_SECONDS = 2
_WALL_SECONDS = 120  # a stopped or starved child; processor time is the bound that counts
_LONGEST = 10_000
_QUICK = 10**8  # steps that two repeats may take on all names together
_CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    matched = re.compile(pattern)
    for name in names:
        matched.fullmatch(name)
print("done")
"""


def pattern_fault(patterns: Sequence[str], names: Sequence[str]) -> tuple[str, str] | None:
    """The first of *patterns* that cannot be used, and why: it does not compile, or is `SLOW` on
    one of *names*. None if all can."""
    doubtful = []
    quick = sum(len(name) ** 2 for name in names) < _QUICK
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            return pattern, f"has {len(pattern)} characters, at most {_LONGEST} are tried"
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            return pattern, str(error) or type(error).__name__
        if not (quick and _simple(pattern)):
            doubtful.append(pattern)
    if not doubtful:
        return None
    slow = _tried(doubtful, names)
    return None if slow is None else (doubtful[slow], SLOW)


def _simple(pattern: str) -> bool:
    """Whether *pattern* cannot take long on a module's name: at most two repeats, none of a group
    but an optional one, and no reference back."""
    repeats = sum(pattern.count(character) for character in "*+{")
    return (
        repeats <= 2
        and pattern.count("?") <= 4
        and not re.search(r"\)[*+{]|\\[1-9]|\(\?P=", pattern)
    )


def _tried(patterns: Sequence[str], names: Sequence[str]) -> int | None:
    """The place of the first pattern that a child process could not finish with."""
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(_CPU_SECONDS)],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            check=False,
            timeout=_WALL_SECONDS,
        )
        output = child.stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    told = output.split()
    return None if told[-1:] == ["done"] else int(told[-1]) if told else 0
