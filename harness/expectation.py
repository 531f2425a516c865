"""What a mode's stopping is expected to be, as a stack's TOML declares it.

Knows nothing of completions; `harness.stopping.judging` holds figures against an expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError

__all__ = ["ALWAYS_RATE", "NEVER_RATE", "Expectation", "read_expectation"]

#: No number of completions proves a rate of 1. `always` is proven to this rate, and refuted by one
#: completion that runs on; 73 prompts are enough.
ALWAYS_RATE = 0.95
#: Likewise `never`: below this rate, and not one stop.
NEVER_RATE = 0.05

_KEYS = frozenset({"stops", "min_rate", "max_rate", "max_overrun", "loops"})
_FORMS = (
    'write "always", "never" or {min_rate = 0.9, max_rate = 1.0}; a table may also hold '
    'stops = "always", max_overrun = 0 (tokens) and loops = false'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the rate of completions that end in EOS must be, and what must not happen.

    Attributes:
        word: `always` or `never`, or None for bounds alone.
        min_rate, max_rate: what the rate must be proven to be above and below; None is no bound.
        max_overrun: tokens that a completion may have behind its natural end.
        loops: False forbids repetition loops.
    """

    word: str | None = None
    min_rate: float | None = None
    max_rate: float | None = None
    max_overrun: int | None = None
    loops: bool = True

    @property
    def must_stop(self) -> bool:
        """Whether stopping is asked for at all."""
        return self.min_rate is not None

    @property
    def shown(self) -> str:
        """The declaration in words."""
        parts = []
        if self.word == "always":
            parts.append(f"always (proven above {self.min_rate:.0%})")
        elif self.word == "never":
            parts.append(f"never (proven below {self.max_rate:.0%})")
        else:
            if self.min_rate is not None:
                parts.append(f"above {self.min_rate:.0%}")
            if self.max_rate is not None:
                parts.append(f"below {self.max_rate:.0%}")
        if self.max_overrun is not None:
            parts.append(f"overrun at most {self.max_overrun} tokens")
        if not self.loops:
            parts.append("no loops")
        return ", ".join(parts) or "nothing"


def read_expectation(value: Any, *, where: Any = None) -> Expectation:
    """The expectation that *value*, an entry of `[stops]`, declares.

    Raises:
        InputError: a word, key or number that means nothing, or bounds that contradict each other.
    """

    given = value

    def refuse() -> InputError:
        return InputError(f"{given!r} declares no stopping", where=where, remedy=_FORMS)

    if isinstance(value, str):
        value = {"stops": value}
    if not isinstance(value, Mapping) or not value or set(value) - _KEYS:
        raise refuse()
    word, low, high = (value.get(key) for key in ("stops", "min_rate", "max_rate"))
    overrun, loops = value.get("max_overrun"), value.get("loops", True)
    if word is not None:
        if word not in ("always", "never") or low is not None or high is not None:
            raise refuse()
        low, high = (ALWAYS_RATE, None) if word == "always" else (None, NEVER_RATE)
    for rate in (low, high):
        sound = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (sound and 0 <= rate <= 1):
            raise refuse()
    if low is not None and high is not None and low > high:
        raise refuse()
    if overrun is not None and (type(overrun) is not int or overrun < 0):
        raise refuse()
    if not isinstance(loops, bool):
        raise refuse()
    return Expectation(
        word=word,
        # A bound of 0 or 1 on the harmless side bounds nothing.
        min_rate=float(low) if low else None,
        max_rate=float(high) if high is not None and high < 1 else None,
        max_overrun=overrun,
        loops=loops,
    )
