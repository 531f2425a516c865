"""What a certificate is: checks with verdicts, and how they are told.

Values only; knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.verdict import Outcome, Verdict, overall

__all__ = ["MAX_LINES", "Certificate", "failed", "held", "listed"]

#: Offenders that a check names one by one; the rest are counted.
MAX_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The verdicts that prove that a stack is applied as claimed, or say where it is not.

    Attributes:
        subject: what was judged, in words.
        checks: in the order in which they were made.
        figures: measured numbers behind the checks, for programs (see docs/certificate.md).
    """

    subject: str
    checks: tuple[Verdict, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Outcome:
        """The worst outcome of all checks that were made; a skipped one says nothing."""
        return overall(check for check in self.checks if check.outcome is not Outcome.SKIPPED)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return self.verdict.passed

    def check(self, name: str) -> Verdict:
        """The check called *name*; raises `KeyError` if there is none."""
        for verdict in self.checks:
            if verdict.name == name:
                return verdict
        raise KeyError(name)

    def explain(self) -> str:
        """The certificate as text: every check, its evidence, and a remedy for what failed."""
        lines = [f"{self.subject}: {self.verdict.value}"]
        for check in self.checks:
            lines.append(f"  {check.name}: {check.outcome.value}")
            lines += [f"    {line}" for line in check.evidence]
            if check.remedy and not check.passed:
                lines.append(f"    → {check.remedy}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The form of `lora-stack verify --json`."""
        return {
            "verdict": self.verdict.value,
            "subject": self.subject,
            "checks": [check.as_json() for check in self.checks],
            "figures": dict(self.figures),
        }


def held(name: str, *evidence: str) -> Verdict:
    """A check that holds."""
    return Verdict(name=name, outcome=Outcome.HELD, evidence=evidence)


def failed(name: str, *evidence: str, remedy: str) -> Verdict:
    """A check that does not hold, and how to mend it."""
    return Verdict(name=name, outcome=Outcome.FAILED, evidence=evidence, remedy=remedy)


def listed(lines: list[str], what: str) -> tuple[str, ...]:
    """At most `MAX_LINES` of *lines*, and how many more *what* there are."""
    if len(lines) <= MAX_LINES:
        return tuple(lines)
    return (*lines[:MAX_LINES], f"and {len(lines) - MAX_LINES} more {what}")
