"""Completions from drafts: what was accepted goes through the model once, instead of one by one.

A draft (the tokens of a snapshot) follows its prompt in one forward pass, and the arg-max at each
place is compared with the draft's token. Up to the first that differs greedy decoding gives the
same tokens; from there, and only then, the rest is generated. So the result is the completion that
greedy decoding gives, whatever the draft: this is greedy speculative verification (Leviathan et
al., arXiv:2211.17192) with the snapshot as the draft. Knows nothing of snapshots' files, verdicts
or pytest; torch comes with the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.completion import Application, Completion, GenerationSettings, Prompt
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.engines.scoring import ScoreRow
    from harness.evidence import Evidence

__all__ = ["Replayed", "inexpressible", "replay_completions", "with_evidence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A completion and how it was come by.

    Attributes:
        kept: how many leading tokens of the draft are in the completion.
        generated: how many tokens were generated one by one.
        reason: why nothing was replayed; None where a draft was.
        draft: the part of the draft that was tried.
        draft_evidence: what the model thinks of the draft's tokens, all of them.
    """

    completion: Completion
    kept: int
    generated: int
    reason: str | None = None
    draft: tuple[int, ...] = ()
    draft_evidence: Evidence | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """How it was come by, in words."""
        if self.reason is not None:
            return f"generated ({self.reason})"
        if self.generated:
            return "replayed up to a difference, then generated"
        return "replayed"


def inexpressible(settings: GenerationSettings) -> str | None:
    """Why completions under *settings* cannot be replayed; None if they can.

    The arg-max of one forward pass is what plain greedy decoding takes, and nothing else is.
    """
    if settings.do_sample:
        return "do_sample: the tokens are drawn, not the most probable ones"
    if settings.repetition_penalty != 1.0:
        return "repetition_penalty: the choice depends on more than the model's own probabilities"
    if settings.stop_strings:
        return "stop_strings: where they end a completion is decided while it is generated"
    return None


def replay_completions(
    engine: PeftEngine,
    prompts: Sequence[Prompt],
    mode: Mode | str,
    settings: GenerationSettings | None = None,
    *,
    drafts: Sequence[Sequence[int] | None] | None,
    application: Application = Application.LIVE,
) -> tuple[Replayed, ...]:
    """What `engine.generate` gives, with evidence; one forward pass where the drafts hold.

    Args:
        drafts: for each prompt the token ids that it is expected to produce, or None. A draft
            may be anything: a wrong one only costs time. None instead of all: generate.
    """
    settings = settings or GenerationSettings()
    chosen = engine.stack.mode(mode) if isinstance(mode, str) else mode
    reason = inexpressible(settings)
    if drafts is None:
        drafts, reason = [None] * len(prompts), "no replay was asked for"
    # What no row of the embedding stands for is nobody's draft.
    size = int(engine.model.get_input_embeddings().weight.shape[0])
    begun: dict[int, tuple[int, ...]] = {}  # place -> the beginning that greedy decoding gives
    kept: dict[int, int] = {}
    drafted: dict[int, Evidence] = {}
    ids = [engine.token_ids(prompt) for prompt in prompts]
    rows: dict[int, ScoreRow] = {}
    if reason is None:
        for place, draft in enumerate(drafts):
            row = _draft_row(engine, ids[place], draft or (), settings, size)
            if row is not None:
                rows[place] = row
        scored = _score(engine, list(rows.values()), chosen, application)
        for (place, row), found in zip(rows.items(), scored, strict=True):
            drafted[place] = found
            begun[place], kept[place] = _agreeing(row.produced, found)
    done: dict[int, Completion] = {}
    for place, tokens in begun.items():
        if _ended(engine, ids[place], tokens, settings):
            done[place] = engine.completion(
                prompts[place], ids[place], tokens, chosen, application, settings
            )
    missing = [place for place in range(len(prompts)) if place not in done]
    if missing:
        done |= zip(
            missing,
            engine.generate(
                [prompts[place] for place in missing],
                chosen,
                settings,
                application=application,
                begun=[begun.get(place, ()) for place in missing],
            ),
            strict=True,
        )
    whole = {p: drafted[p] for p, row in rows.items() if row.produced == done[p].token_ids}
    done |= _with_evidence(engine, done, whole, chosen, application)
    return tuple(
        Replayed(
            completion=done[place],
            kept=kept.get(place, 0),
            generated=len(done[place].token_ids) - len(begun.get(place, ())) if place in missing
            else 0,
            reason=None if place in rows else reason or "nothing accepted to replay",
            draft=rows[place].produced if place in rows else (),
            draft_evidence=drafted.get(place),
        )
        for place in range(len(prompts))
    )  # fmt: skip


def _draft_row(
    engine: PeftEngine,
    prompt: tuple[int, ...],
    draft: Sequence[int],
    settings: GenerationSettings,
    size: int,
) -> ScoreRow | None:
    """The part of *draft* that a completion can have: up to its first EOS, within the room."""
    from harness.engines.scoring import ScoreRow

    produced: list[int] = []
    for token in draft[: engine.room(len(prompt), settings)]:
        if not 0 <= token < size:
            break
        produced.append(token)
        if token in engine.eos_token_ids:
            break
    return ScoreRow(prompt=prompt, produced=tuple(produced)) if produced else None


def _agreeing(produced: tuple[int, ...], found: Evidence) -> tuple[tuple[int, ...], int]:
    """The beginning that greedy decoding gives, one token beyond the draft's agreeing part, and
    how many of the draft's tokens are in it."""
    best = [int(token) for token in found.top_ids[:, 0]]
    for place, (token, taken) in enumerate(zip(produced, best, strict=True)):
        if token != taken:
            return (*produced[:place], taken), place
    return produced, len(produced)


def _ended(
    engine: PeftEngine, prompt: tuple[int, ...], tokens: tuple[int, ...], s: GenerationSettings
) -> bool:
    return tokens[-1] in engine.eos_token_ids or len(tokens) >= engine.room(len(prompt), s)


def with_evidence(
    engine: PeftEngine, completions: Sequence[Completion], mode: Mode | str
) -> tuple[Completion, ...]:
    """*completions* of *mode*, each with its evidence, from one forward pass."""
    chosen = engine.stack.mode(mode) if isinstance(mode, str) else mode
    if not completions:
        return ()
    done = _with_evidence(
        engine, dict(enumerate(completions)), {}, chosen, completions[0].application
    )
    return tuple(done[place] for place in range(len(completions)))


def _with_evidence(
    engine: PeftEngine,
    done: dict[int, Completion],
    known: dict[int, Evidence],
    mode: Mode,
    application: Application,
) -> dict[int, Completion]:
    from harness.engines.scoring import ScoreRow

    asked = [p for p, c in done.items() if p not in known and c.token_ids]
    rows = [
        ScoreRow(prompt=done[p].prompt_token_ids, produced=done[p].token_ids) for p in asked
    ]  # fmt: skip
    known = known | dict(zip(asked, _score(engine, rows, mode, application), strict=True))
    return {p: replace(c, evidence=known.get(p)) for p, c in done.items()}


def _score(
    engine: PeftEngine, rows: Sequence[ScoreRow], mode: Mode, application: Application
) -> list[Evidence]:
    from harness.engines.scoring import score

    return score(engine, rows, mode, application=application) if rows else []
