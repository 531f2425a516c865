"""The errors that the harness raises.

Knows nothing of what went wrong where: the place that finds a fault words it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["HarnessError", "InputError"]


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
        super().__init__(line if remedy is None else f"{line} → {remedy}")
