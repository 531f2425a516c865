"""Compared snapshots as values: what was accepted, what is said now, what accepting would write.

A run of the suites leaves one file a case in `.pending/` (ignored by git); `lora-stack review`
reads them. Imports neither torch nor pytest. Knows nothing of how completions come about, nor of
who shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.verdict import Verdict

__all__ = ["Alternative", "Case", "Position", "Side"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that could have stood at a position; `logprob` in nats."""

    token_id: int
    piece: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One produced token.

    Attributes:
        piece: the token as text (`harness.display.pieces`); pieces joined may differ from the
            decoded text in spacing.
        logprob: of this token, in nats; None where no evidence is stored.
        alternatives: the five most probable tokens, the most probable first; then, where the
            accepted completion parts from this one, the accepted token if it is none of them.
    """

    token_id: int
    piece: str
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def margin(self) -> float | None:
        """Log-probability of the best over that of the second best, in nats."""
        if len(self.alternatives) < 2:
            return None
        return self.alternatives[0].logprob - self.alternatives[1].logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A completion then (accepted) or now.

    Attributes:
        conditions: what it was made with, by name: digests of base, adapters, tokenizer, template,
            settings; versions, device, dtype, application. The keys `base` (or `base_…`) and
            `adapter_<name>` say which stack it is: a review accepts only what the newest run's
            stack made (`harness.pending.stack_conditions`), and what is `incomparable` only where
            these are the same then and now.
    """

    text: str
    stop_reason: str
    positions: tuple[Position, ...]
    conditions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One compared case: a prompt in a mode.

    Attributes:
        name: path of the snapshot below the snapshots folder, without suffix, with `/`; unique.
        snapshot: path of the snapshot file, relative to pytest's root folder.
        first: index of the first differing token; None when none differs.
        noise_floor: of log-probabilities, in nats, as calibrated for the run.
        then: None when nothing (readable) is accepted.
        accepting: the files that accepting writes, by path relative to the root folder; empty when
            there is nothing to accept.
        accepted_sha256: hexadecimal, of each file in `accepting` as it was when compared (`""`:
            absent), so that a review does not overwrite what came after. Every path in
            `accepting` needs one, and lies in the snapshots folder.
    """

    name: str
    snapshot: Path
    preset: str
    prompt: str
    prompt_text: str
    mode: str
    verdict: Verdict
    first: int | None
    noise_floor: float | None
    then: Side | None
    now: Side
    accepting: Mapping[Path, bytes]
    accepted_sha256: Mapping[Path, str]
