"""Judgements: values in, `Verdict` out.

Pure functions; nothing here reads, writes or generates. Where several judgements are summed up,
the worst one stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harness.completion import Completion

__all__ = [
    "Outcome",
    "Verdict",
    "judge_effect",
    "overall",
]


class Outcome(StrEnum):
    """What a judgement says. The order is from harmless to bad."""

    HELD = "held"  #: as claimed
    TIE = "tie"  #: differs within the measured rounding; passes, reported
    SKIPPED = "skipped"  #: not judged, and the evidence says why
    UNDECIDED = "undecided"  #: too little evidence to decide; never a pass
    DRIFT = "drift"  #: same tokens, other probabilities
    MISSING = "missing"  #: nothing accepted to compare with
    INCOMPARABLE = "incomparable"  #: made under other conditions
    CHANGED = "changed"  #: differs from what was accepted
    UNREADABLE = "unreadable"  #: what was accepted cannot be read
    FAILED = "failed"  #: a claim does not hold

    @property
    def passed(self) -> bool:
        """Whether the outcome lets a run succeed."""
        return self in (Outcome.HELD, Outcome.TIE, Outcome.SKIPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judgement with its evidence, a line each, and how to mend what failed."""

    name: str
    outcome: Outcome
    evidence: tuple[str, ...] = ()
    remedy: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the outcome lets a run succeed."""
        return self.outcome.passed

    def as_json(self) -> dict[str, Any]:
        """The form that every `--json` output uses."""
        return {
            "name": self.name,
            "verdict": self.outcome.value,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
        }


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """The worst outcome; `undecided` if there is none at all."""
    order = list(Outcome)
    found = [verdict.outcome for verdict in verdicts]
    return max(found, key=order.index) if found else Outcome.UNDECIDED


def judge_effect(name: str, first: Sequence[Completion], second: Sequence[Completion]) -> Verdict:
    """Whether two modes say different things: at least one prompt's tokens differ.

    Equal outputs on every prompt are what a mode switch that does nothing looks like.
    """
    differing = [
        a.prompt.id for a, b in zip(first, second, strict=True) if a.token_ids != b.token_ids
    ]
    if differing:
        return Verdict(
            name=name,
            outcome=Outcome.HELD,
            evidence=(f"{len(differing)} of {len(first)} completions differ",),
        )
    return Verdict(
        name=name,
        outcome=Outcome.FAILED if first else Outcome.UNDECIDED,
        evidence=(f"all {len(first)} completions are the same, token for token",),
        remedy="run lora-stack verify: an adapter may be inactive, empty, or scaled to nothing",
    )
