"""From figures to causes: why a mode does not end as declared, and which adapter is to blame.

The rules, in order: what the files say; an adapter that does nothing; a turn's end that is no EOS;
a loop; an adapter that lowers EOS and without which the mode stops; too little room; EOS that
nobody taught. Pure: what had to be tried on the engine comes in as `Trials`. Knows nothing of
reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.stopping.blame import AdapterEffect, Blame
from harness.stopping.causes import Cause, CauseKind, Finding
from harness.stopping.endings import EndSign
from harness.stopping.figures import ModeFigures

__all__ = ["Trials", "diagnose", "ends_without_stopping", "mends", "static_causes"]

#: Nats of log-odds from which an adapter is said to lower EOS, if it is also beyond three standard
#: errors.
_LOWERS = 0.25
#: Share of completions from which a sign is a mode's, not a prompt's.
_MANY = 0.2
#: Of these, the first that the files name explains the others.
_EOS_KINDS = (CauseKind.EOS_ID, CauseKind.EOS_LIST, CauseKind.TOKENIZER_EOS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """What was tried with the prompts that do not end as declared.

    Attributes:
        left_out: figures of the mode without an adapter, by the adapter.
        longer: gives figures of the mode with more room, when they are needed.
    """

    left_out: Mapping[str, ModeFigures] = field(default_factory=dict)
    longer: Callable[[], ModeFigures] | None = None


def ends_without_stopping(figures: ModeFigures) -> bool:
    """Whether a mode produces the end of a turn, and generation does not stop at it."""
    count = figures.signs.get(EndSign.END_TOKEN.value, 0)
    return bool(count) and count >= _MANY * figures.total


def mends(left: ModeFigures) -> bool:
    """Whether most of the prompts at fault stop in a trial."""
    return left.total > 0 and left.stopped >= 0.5 * left.total


def static_causes(findings: Sequence[Finding]) -> list[Cause]:
    """The causes that failing static checks name; of several about EOS ids, the first."""
    causes = [
        Cause(
            kind=finding.kind,
            text="; ".join(finding.verdict.evidence),
            remedy=finding.verdict.remedy or "see docs/stopping.md",
        )
        for finding in findings
        if not finding.verdict.passed
    ]
    about_eos = [cause for cause in causes if cause.kind in _EOS_KINDS]
    return [cause for cause in causes if cause not in about_eos[1:]]


def diagnose(
    figures: ModeFigures,
    blame: Blame | None = None,
    trials: Trials | None = None,
    files: Sequence[Cause] = (),
) -> list[Cause]:
    """Why the mode of *figures*, which should stop, does not; empty where *files* say it all.

    Args:
        files: causes that the files named.
    """
    trials = trials or Trials()
    effects = blame.adapters if blame else ()
    found = [_inactive(figures, effect) for effect in effects if effect.largest == 0]
    named = any(cause.kind in _EOS_KINDS for cause in files)
    if ends_without_stopping(figures):
        # The files' check says the same with the ids' names.
        return found if named else [*found, _end_token(figures)]
    if found:
        return found
    if figures.loops >= _MANY * figures.total:
        found.append(_loop(figures, trials.left_out, effects))
    for effect in effects:
        left = trials.left_out.get(effect.adapter)
        if left is not None and mends(left) and _lowers(effect):
            found.append(_suppressed(figures, effect, left))
    if found:
        return found
    room = _room(figures, trials.longer() if trials.longer else None)
    if room is not None:
        return [room]
    for effect in effects:
        left = trials.left_out.get(effect.adapter)
        if left is not None and mends(left):
            found.append(_suppressed(figures, effect, left))
    if not found and blame is not None and effects:
        found.append(_not_learned(figures, blame))
    if not found and not files:
        found.append(
            Cause(
                kind=CauseKind.UNKNOWN,
                mode=figures.mode,
                text=f"{figures.stopped} of {figures.total} stopped; nothing here says why",
                remedy="give a loaded stack, so that EOS can be traced and adapters left out",
            )
        )
    return found


def _lowers(effect: AdapterEffect) -> bool:
    return effect.effect < -max(_LOWERS, 3 * effect.error)


def _inactive(figures: ModeFigures, effect: AdapterEffect) -> Cause:
    return Cause(
        kind=CauseKind.INACTIVE,
        mode=figures.mode,
        adapter=effect.adapter,
        text=f"{effect.adapter} changes no logit at the natural end: with it and without it the "
        "mode is the same",
        remedy=f"run lora-stack verify: {effect.adapter} may be off, of weight 0, or saved before "
        "it was trained (every lora_B zero)",
    )


def _end_token(figures: ModeFigures) -> Cause:
    count = figures.signs[EndSign.END_TOKEN.value]
    return Cause(
        kind=CauseKind.EOS_LIST,
        mode=figures.mode,
        text=f"{count} of {figures.total} completions produce the token that ends a turn, and "
        "generation goes on behind it",
        remedy="name that token's id in generation_config.json's eos_token_id",
    )


def _room(figures: ModeFigures, longer: ModeFigures | None) -> Cause | None:
    missing = figures.total - figures.stopped
    if longer is not None and mends(longer):
        text = (
            f"{longer.stopped} of {longer.total} that max_new_tokens = {figures.max_new_tokens} "
            f"cut off stop within {longer.max_new_tokens}"
        )
    elif figures.undecided >= 0.5 * missing > 0 and (
        longer is None or longer.undecided >= 0.5 * longer.total
    ):
        text = (
            f"max_new_tokens = {figures.max_new_tokens} cuts {figures.undecided} of "
            f"{figures.total} off before a place where an answer could end"
        )
    else:
        return None
    return Cause(
        kind=CauseKind.MAX_NEW_TOKENS,
        mode=figures.mode,
        text=text,
        remedy="raise --max-new-tokens until answers end before it",
    )


def _loop(
    figures: ModeFigures,
    without: Mapping[str, ModeFigures],
    effects: Sequence[AdapterEffect],
) -> Cause:
    loops = [ending.loop for ending in figures.endings if ending.loop]
    periods = sorted({loop.period for loop in loops})
    words = next((e.loop_text for e in figures.endings if e.loop and e.loop_text), "")
    # The adapter without which fewest prompts loop, if that is a real difference.
    ranked = sorted(without, key=lambda name: without[name].loops)
    guilty = ranked[0] if ranked and without[ranked[0]].loops <= 0.25 * len(loops) else None
    weight = next((e.weight for e in effects if e.adapter == guilty), 1.0)
    text = (
        f"{len(loops)} of {figures.total} completions end in a repetition loop, of period "
        f"{', '.join(map(str, periods[:6]))} tokens" + (f", e.g. {words!r}" if words else "")
    )
    if guilty is not None:
        left = without[guilty]
        text += f"; without {guilty} {left.loops} of {left.total} do"
    return Cause(
        kind=CauseKind.LOOPS,
        mode=figures.mode,
        adapter=guilty,
        text=text,
        remedy=(
            f"lower the weight of {guilty} (now {weight:g}), or look at its training"
            if guilty
            else "look at the adapters' weights; lora-stack stopping --sweep tries others"
        ),
    )


def _suppressed(figures: ModeFigures, effect: AdapterEffect, left: ModeFigures) -> Cause:
    verb = "lowers" if effect.effect < 0 else "raises"
    return Cause(
        kind=CauseKind.SUPPRESSED,
        mode=figures.mode,
        adapter=effect.adapter,
        text=f"{left.stopped} of {left.total} that ran on stop without {effect.adapter}; at the "
        f"natural end it {verb} EOS by {abs(effect.effect):.1f} nats at weight {effect.weight:g}",
        remedy=f"lower the weight of {effect.adapter}; lora-stack stopping --sweep shows which "
        "weights stop",
    )


def _not_learned(figures: ModeFigures, blame: Blame) -> Cause:
    teacher = max(blame.adapters, key=lambda effect: effect.effect)
    return Cause(
        kind=CauseKind.NOT_LEARNED,
        mode=figures.mode,
        adapter=teacher.adapter,
        text=f"the adapters act (logits change by up to {teacher.largest:.1f}), but EOS stays at "
        f"{blame.full:.1f} nats of log-odds at the natural end; {blame.sentence}",
        remedy="check that EOS is in the training loss: lora-stack stopping --dataset FILE; "
        "padding that is EOS, an answer without its end of turn, and truncation all mask it",
    )
