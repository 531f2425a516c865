"""What goes into an engine and what comes out: prompts, settings, completions.

Values only. Knows nothing of models, torch, files or pytest. Engines produce
`Completion`s; everything above reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from harness.stack import AdapterStack, Mode

if TYPE_CHECKING:
    from harness.evidence import Evidence

__all__ = [
    "Application",
    "Completion",
    "Engine",
    "GenerationSettings",
    "Message",
    "Prompt",
    "StopReason",
]


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"  #: an end-of-sequence id was produced
    STOP_STRING = "stop_string"  #: one of the settings' stop strings appeared
    LENGTH = "length"  #: `max_new_tokens` was reached
    CONTEXT = "context"  #: the model's context was full


class Application(StrEnum):
    """How a mode is applied to the base."""

    LIVE = "live"  #: PEFT's forward pass adds each adapter's path
    FLATTENED = "flattened"  #: the adapters are rank-concatenated into one
    MERGED = "merged"  #: the deltas are added into the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt under a slug id: either plain text, or messages for the chat template."""

    id: str
    text: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def shown(self) -> str:
        """The prompt as a person reads it: the text, or the turns one after the other."""
        if self.text is not None:
            return self.text
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{m.role}: {m.content}" for m in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How to decode. Greedy unless `do_sample`; sampling needs a seed.

    Attributes:
        max_new_tokens: tokens, the EOS included.
        seed: seeds torch before each batch when sampling.
        stop_strings: texts that end a completion; the match is kept.
        batch_size: prompts in one forward pass; 0 lets the engine choose. It does not belong to
            a snapshot's identity: batching changes results in rounding ties only.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    batch_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one mode said to one prompt.

    Attributes:
        prompt_token_ids: what the model was given, template applied, padding left out.
        token_ids: what it produced, the EOS included where it produced one.
        text: the produced tokens decoded without special tokens.
        evidence: what the model thought of each token, where it was asked; no part of equality.
    """

    prompt: Prompt
    mode: str
    application: Application
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    settings: GenerationSettings
    evidence: Evidence | None = field(default=None, compare=False, repr=False)

    @property
    def stopped(self) -> bool:
        """Whether the model itself ended the completion with an EOS."""
        return self.stop_reason is StopReason.EOS


class Engine(Protocol):
    """Whoever generates for a stack. The reference is `harness.engines.peft.PeftEngine`."""

    @property
    def stack(self) -> AdapterStack: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        mode: Mode | str,
        settings: GenerationSettings | None = None,
        *,
        application: Application = Application.LIVE,
    ) -> tuple[Completion, ...]:
        """Complete every prompt in *mode*; the results come in the order of the prompts."""
        ...

    def close(self) -> None: ...
