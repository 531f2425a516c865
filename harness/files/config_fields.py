"""Typed access to the fields of a configuration that was read: each fault names file and key.

Faults are gathered, so that all of them are told at once. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import InputError, enough, quoted

__all__ = ["MAX_RANK", "FieldReader", "field_name"]

MAX_RANK = 1 << 16
_Number = TypeVar("_Number", int, float)


def field_name(key: str) -> str:
    """A key for a message: as it is where it is plain, otherwise quoted."""
    return key if re.fullmatch(r"[\w.-]{1,80}", key, re.ASCII) else quoted(key)


def _lists_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class FieldReader:
    """Typed access to a raw config; faults name the file and the key, and are gathered."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path
        self.faults: list[InputError] = []
        self._told: set[str] = set()

    def fault(self, key: str, fault: str, remedy: str) -> None:
        error = InputError(f"{key}: {fault}", where=self.path, remedy=remedy)
        if str(error) not in self._told and not enough(self.faults):
            self._told.add(str(error))
            self.faults.append(error)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.fault(key, f"{quoted(value)} is not true or false", "write true or false")
        return value is True

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            self.fault(key, f"{quoted(value)} is not a string", "write a string or null")
            return None
        return value

    def names(self, key: str) -> None:
        value = self.raw.get(key)
        listed = _lists_names(value)
        if value is not None and not isinstance(value, str) and not listed:
            self.fault(
                key, f"{quoted(value)} is neither names nor a pattern", "write a list of names"
            )
        elif listed and len(set(value or ())) < len(value or ()):
            self.fault(key, f"{quoted(value)} names a module twice", "name each once")

    def listed_names(self, key: str) -> None:
        """Hold a field to a list of names or null, where no pattern may stand."""
        value = self.raw.get(key)
        if value is not None and not _lists_names(value):
            self.fault(key, "is no list of names", "list the parameters, or write null")

    def layers(self, key: str) -> None:
        value = self.raw.get(key)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(type(n) is int and 0 <= n < 10_000 for n in numbers):
            self.fault(key, f"{quoted(value)} are no layer numbers", "write a list of numbers")

    def share(self, key: str) -> None:
        value = self.raw.get(key, 0.0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            self.fault(key, f"{quoted(value)} is not between 0 and 1", "write the trained value")

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 < value <= MAX_RANK:
            self.fault(key, f"{quoted(value)} is not a rank", f"write 1 to {MAX_RANK}")
            return 1
        return value

    def count(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 1 << 40:
            fault = "is missing" if value is None else f"{quoted(value)} is no count"
            self.fault(key, fault, "copy the config that belongs to the weights")
            return 1
        return value

    def alpha(self, key: str, value: object) -> float:
        number = float("nan")
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if not math.isfinite(number):
            self.fault(key, f"{quoted(value)} is not a finite number", "write the alpha trained")
            return 1.0
        if number <= 0:
            self.fault(key, f"{quoted(value)} is not above 0", "write the alpha trained")
        return number

    def table(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self.fault(key, f"{quoted(value)} is not a table", "write {} or {name: value}")
            return {}
        return value

    def pattern_table(self, key: str, read: Callable[[str, object], _Number]) -> dict[str, _Number]:
        if key in self.raw and self.raw[key] is None:  # PEFT asks None for its keys
            self.fault(key, "null is not a table", "write {}")
        return {name: read(key, value) for name, value in self.table(key).items()}
