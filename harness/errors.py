"""The errors that the harness raises, one fault or several at once.

Knows nothing of what went wrong where: the place that finds a fault words it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = [
    "HarnessError",
    "InputError",
    "InputFaults",
    "combined",
    "enough",
    "gathering",
    "quoted",
]

_LONGEST_QUOTE = 120
_MOST_SHOWN = 20
_MOST_GATHERED = 1000


class HarnessError(Exception):
    """Anything that the harness itself reports. Exit code 3 unless it is an `InputError`."""


class InputError(HarnessError):
    """Bad usage, a bad file or a bad stack. Exit code 2.

    The message is one line a fault: where it is, what is wrong, and how to mend it.

    Args:
        fault: what is wrong, with both numbers where there are two.
        where: the file, option, tensor or key; shown first.
        remedy: how to mend it; shown after an arrow.
    """

    def __init__(
        self, fault: str, *, where: str | Path | None = None, remedy: str | None = None
    ) -> None:
        self.fault = fault
        self.where = None if where is None else str(where)
        self.remedy = remedy
        line = fault if self.where is None else f"{self.where}: {fault}"
        line = line if remedy is None else f"{line} → {remedy}"
        # A file's name can hold a line break; a fault is one line all the same.
        super().__init__(line.replace("\r", "\\r").replace("\n", "\\n"))

    @property
    def faults(self) -> tuple[InputError, ...]:
        """The single faults that this error tells of."""
        return (self,)


class InputFaults(InputError):
    """Several faults, found in one go; the message has a line for each of the first twenty."""

    def __init__(self, faults: Sequence[InputError]) -> None:
        first = faults[0]
        super().__init__(first.fault, where=first.where, remedy=first.remedy)
        self._faults = tuple(faults)
        lines = [str(fault) for fault in self._faults[:_MOST_SHOWN]]
        if len(self._faults) > _MOST_SHOWN:
            lines.append(f"and {len(self._faults) - _MOST_SHOWN} more faults")
        self.args = ("\n".join(lines),)

    @property
    def faults(self) -> tuple[InputError, ...]:
        return self._faults


def combined(faults: Sequence[InputError]) -> InputError:
    """One error that tells of all *faults* (at least one), each once."""
    single = list({str(one): one for fault in faults for one in fault.faults}.values())
    return single[0] if len(single) == 1 else InputFaults(single)


@contextlib.contextmanager
def gathering(faults: list[InputError]) -> Iterator[None]:
    """A block whose `InputError` is added to *faults*, so that the next block still runs."""
    try:
        yield
    except InputError as error:
        faults.extend(error.faults)


def enough(faults: Sequence[InputError]) -> bool:
    """Whether so many *faults* were found that looking for more would only cost time and memory."""
    return len(faults) >= _MOST_GATHERED


def quoted(value: object) -> str:
    """A foreign value for a message: its `repr`, which is inert, cut in the middle if long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal form
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "?"
    if len(text) <= _LONGEST_QUOTE:
        return text
    half = _LONGEST_QUOTE // 2
    return f"{text[:half]}…{text[-half:]} ({len(text)} characters)"
