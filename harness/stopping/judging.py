"""The one judge of stopping: figures held against what a mode's entry in `[stops]` declares.

A rate is judged on its 95 % interval (`rate_interval`), never on the observed share: it passes when
the whole interval lies beyond the bound, fails when the whole interval lies on the wrong side, and
is undecided otherwise, with the number of prompts that would decide. Completions that were cut off
before they could have ended count for neither side. Pure: values in, `Verdict` out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from harness.completion import Completion
from harness.expectation import Expectation, read_expectation
from harness.snapshot_form import Snapshot
from harness.stopping.figures import (
    Decode,
    Ending,
    ModeFigures,
    endings_of,
    length_limit,
    mode_figures,
)
from harness.stopping.intervals import Interval, clustered_interval, prompts_needed, rate_interval
from harness.verdict import Outcome, Verdict

__all__ = ["judge_endings", "judge_samples", "judge_stopping"]

_NAMED = 3


def judge_stopping(
    mode: str,
    expected: str | Mapping[str, Any] | Expectation,
    completions: Sequence[Completion | Snapshot],
    *,
    stops: Collection[int] = (),
    turn_ids: Collection[int] = (),
    decode: Decode | None = None,
    too_few: Outcome = Outcome.UNDECIDED,
) -> Verdict:
    """Judge how *completions* end.

    Args:
        expected: an entry of `[stops]` (docs/stack-file.md), or what was read from one.
        stops, turn_ids, decode: as in `harness.stopping.endings.natural_end`.
        too_few: the outcome where the prompts are too few to prove a rate; a run that is not there
            to judge rates skips.
    """
    endings = endings_of(completions, stops=stops, turn_ids=turn_ids, decode=decode)
    figures = mode_figures(mode, endings, length_limit(completions))
    return judge_endings(figures, expected, too_few=too_few)


def judge_endings(
    figures: ModeFigures,
    expected: str | Mapping[str, Any] | Expectation,
    *,
    too_few: Outcome = Outcome.UNDECIDED,
) -> Verdict:
    """Judge a mode's figures; a single counterexample refutes `always`, `never`, and what must
    not happen at all."""
    want = expected if isinstance(expected, Expectation) else read_expectation(expected)
    name = f"stopping: {figures.mode}"
    if not figures.total:
        return Verdict(name=name, outcome=Outcome.UNDECIDED, evidence=("no completion",))
    low, high = _ends(figures, want)
    shown = rate_interval(figures.stopped, figures.total).shown
    evidence = [
        f"{figures.stopped} of {figures.total} stopped (95 % interval {shown}); "
        f"declared: {want.shown}"
    ]
    if figures.undecided:
        evidence.append(
            f"{figures.undecided} were cut off by max_new_tokens = {figures.max_new_tokens} "
            "before a place where an answer could end"
        )
    if figures.empty and want.must_stop:
        evidence.append(f"{figures.empty} stopped before they said anything: no answers that ended")
    refuted = _refutations(figures, want)
    if refuted or _fails(want, low, high):
        return Verdict(
            name=name,
            outcome=Outcome.FAILED,
            evidence=(*evidence, *refuted, *_offenders(figures, want)),
            remedy=_remedy(figures, want),
        )
    if _holds(want, low, high):
        return Verdict(name=name, outcome=Outcome.HELD, evidence=tuple(evidence))
    if _cut_short(figures, want):
        return Verdict(
            name=name,
            outcome=Outcome.UNDECIDED,
            evidence=(
                *evidence,
                f"max_new_tokens = {figures.max_new_tokens} is too small to decide",
            ),
            remedy="raise --max-new-tokens until answers end before it",
        )
    needed = prompts_needed(
        _answered(figures, want) / (figures.total - figures.undecided),
        min_rate=want.min_rate,
        max_rate=want.max_rate,
    )
    return Verdict(
        name=name,
        outcome=too_few,
        evidence=(*evidence, _too_few(figures.total, needed)),
        remedy="give more prompts, e.g. --preset held_out or --prompts FILE, or declare a rate "
        "that so few can prove",
    )


def judge_samples(
    mode: str,
    expected: str | Mapping[str, Any] | Expectation,
    counts: Sequence[int],
    samples: int,
    *,
    empty: Sequence[int] = (),
) -> Verdict:
    """Judge a sampled stop rate by `clustered_interval`; `always` and `never` are their rates.

    Args:
        counts: how many of a prompt's *samples* samples stopped, a number a prompt.
        empty: how many of those said nothing; where answers must end, these are none.
    """
    want = expected if isinstance(expected, Expectation) else read_expectation(expected)
    name = f"stopping, sampled: {mode}"
    if not counts:
        return Verdict(name=name, outcome=Outcome.UNDECIDED, evidence=("no completion",))
    silent = sum(empty) if want.must_stop else 0
    if silent:
        counts = [stopped - nothing for stopped, nothing in zip(counts, empty, strict=True)]
    interval = clustered_interval(counts, samples)
    line = (
        f"{sum(counts)} of {len(counts) * samples} samples of {len(counts)} prompts "
        f"{f'ended an answer, {silent} more said nothing' if silent else 'stopped'} "
        f"(95 % interval {interval.shown}, a prompt counts once); declared: {want.shown}"
    )
    if _fails(want, interval.low, interval.high):
        return Verdict(
            name=name,
            outcome=Outcome.FAILED,
            evidence=(line,),
            remedy="see the blame in this report, or declare the rate that the mode has",
        )
    if _holds(want, interval.low, interval.high):
        return Verdict(name=name, outcome=Outcome.HELD, evidence=(line,))
    needed = prompts_needed(
        sum(counts) / (len(counts) * samples), min_rate=want.min_rate, max_rate=want.max_rate
    )
    return Verdict(
        name=name,
        outcome=Outcome.UNDECIDED,
        evidence=(line, _too_few(len(counts), needed)),
        remedy="give more prompts; more samples a prompt do not replace them",
    )


def _ends(figures: ModeFigures, want: Expectation) -> tuple[float, float]:
    """The interval's ends with what was cut off counted against each; where answers must end, what
    says nothing is none."""
    answered = _answered(figures, want)
    low: Interval = rate_interval(answered, figures.total)
    high: Interval = rate_interval(answered + figures.undecided, figures.total)
    return low.low, high.high


def _answered(figures: ModeFigures, want: Expectation) -> int:
    return figures.stopped - (figures.empty if want.must_stop else 0)


def _holds(want: Expectation, low: float, high: float) -> bool:
    above = want.min_rate is None or low > want.min_rate
    return above and (want.max_rate is None or high < want.max_rate)


def _fails(want: Expectation, low: float, high: float) -> bool:
    below = want.min_rate is not None and high < want.min_rate
    return below or (want.max_rate is not None and low > want.max_rate)


def _refutations(figures: ModeFigures, want: Expectation) -> list[str]:
    lines: list[str] = []
    ran_on = sum(ending.ran_on for ending in figures.endings)
    if want.word == "always" and ran_on:
        lines.append(f"{ran_on} ran on past a place where an answer could end")
    if want.word == "always" and figures.empty:
        lines.append(f"{figures.empty} are empty")
    if want.word == "never" and figures.stopped:
        lines.append(f"{figures.stopped} ended with EOS")
    if want.max_overrun is not None and figures.longest_overrun > want.max_overrun:
        over = [e for e in figures.endings if e.overrun > want.max_overrun]
        signs = ", ".join(sorted({e.sign.value for e in over if e.sign}))
        lines.append(
            f"{len(over)} went on more than {want.max_overrun} tokens behind their natural end, "
            f"up to {figures.longest_overrun} ({signs})"
        )
    if not want.loops and figures.loops:
        periods = sorted({e.loop.period for e in figures.endings if e.loop})
        several = ", ".join(map(str, periods[:6])) + (", …" if len(periods) > 6 else "")
        lines.append(f"{figures.loops} end in a repetition loop, of period {several} tokens")
    return lines


def _offenders(figures: ModeFigures, want: Expectation) -> list[str]:
    """The first completions that did what is not declared, each with what it did."""
    found = [e for e in figures.endings if _offends(e, want)]
    return [f"{ending.prompt}: {_did(ending)}" for ending in found[:_NAMED]]


def _offends(ending: Ending, want: Expectation) -> bool:
    if want.max_overrun is not None and ending.overrun > want.max_overrun:
        return True
    if not want.loops and ending.loop:
        return True
    if want.min_rate is not None and (ending.empty or not ending.stopped):
        return True
    return want.min_rate is None and want.max_rate is not None and ending.stopped


def _did(ending: Ending) -> str:
    if ending.empty:
        return "ended with EOS and said nothing"
    how = "ended with EOS" if ending.stopped else f"ended by {ending.stop_reason}"
    line = f"{how} after {ending.tokens} tokens"
    if ending.loop:
        again = f" of {ending.loop_text!r}" if ending.loop_text else ""
        line += f", in a loop of period {ending.loop.period}{again}"
    elif ending.sign:
        line += f", {ending.overrun} of them behind its natural end ({ending.sign})"
    return line


def _remedy(figures: ModeFigures, want: Expectation) -> str:
    if not want.loops and figures.loops:
        return "lora-stack stopping names the adapter that loops; look at its weight and training"
    if want.must_stop and figures.empty > figures.total - figures.stopped:
        return (
            "an adapter raises EOS where answers begin: lower its weight (lora-stack stopping "
            "--sweep), or look at what its training examples begin with"
        )
    if want.must_stop:
        return (
            "lora-stack stopping says why: EOS ids, an adapter that suppresses EOS, or EOS that "
            "was not in the training loss; a longer answer needs a larger --max-new-tokens"
        )
    return "check the EOS ids in generation_config.json, or mend [stops] in the stack's TOML"


def _cut_short(figures: ModeFigures, want: Expectation) -> bool:
    """Whether most was cut off, or what was would decide if it all ended or all ran on."""
    if not figures.undecided:
        return False
    if figures.undecided >= 0.5 * figures.total:
        return True
    best = rate_interval(figures.stopped + figures.undecided, figures.total)
    worst = rate_interval(figures.stopped, figures.total)
    return _holds(want, best.low, best.high) or _holds(want, worst.low, worst.high)


def _too_few(given: int, needed: int | None) -> str:
    if needed is None:
        return f"{given} prompts are too few to decide, and no number would: declare another rate"
    return f"{given} prompts are too few to decide; {needed} would, if the rest do likewise"
