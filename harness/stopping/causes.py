"""What a diagnosis is: a kind of cause out of a closed list, what shows it, and what mends it.

Values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harness.verdict import Verdict

__all__ = ["Cause", "CauseKind", "Finding"]


class CauseKind(StrEnum):
    """Why a mode does not end as it should."""

    EOS_ID = "wrong EOS id"  #: generation stops at an id that ends nothing
    EOS_LIST = "end of turn is no EOS"  #: the template's end of turn does not stop generation
    OPENING = "no generation prompt"  #: the prompt ends before what opens an answer in training
    SETTINGS = "generation config bends the end"  #: EOS is forbidden, forced, or cut short by it
    TOKENIZER_EOS = "files disagree about EOS"  #: tokenizer or config name another EOS
    PAD_IS_EOS = "padding is EOS"  #: training code that masks padding masks the EOS label
    VOCABULARY = "vocabulary and head differ"
    EOS_ROW = "EOS row is dead"  #: the head's row of an EOS id is zero or not finite
    HEAD = "head is overwritten at reload"
    MERGED = "merged copy ends otherwise"
    MAX_NEW_TOKENS = "max_new_tokens is too small"
    INACTIVE = "adapter does nothing"
    SUPPRESSED = "adapter suppresses EOS"
    NOT_LEARNED = "EOS was not learned"
    LOOPS = "repetition loops"
    DATASET = "EOS is not in the training loss"
    UNKNOWN = "cause not found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One static check, and the kind of cause that a failing one names."""

    kind: CauseKind
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One named cause.

    Attributes:
        mode: the mode that it concerns; None for all.
        adapter: the adapter to blame, if one is.
    """

    kind: CauseKind
    text: str
    remedy: str
    mode: str | None = None
    adapter: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "mode": self.mode,
            "adapter": self.adapter,
            "text": self.text,
            "remedy": self.remedy,
        }
