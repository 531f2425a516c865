"""The working state of one examination: what was said, what was found in it, and what is tried.

Each step fills in its own part and asks no more of a model than it needs. Knows nothing of where
the completions come from, nor of the order of the steps: that is `harness.stopping.examining`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.completion import Application, Completion, GenerationSettings, Prompt
from harness.ending import EndingFiles, read_ending
from harness.expectation import Expectation, read_expectation
from harness.snapshot_form import Snapshot
from harness.stack import AdapterStack, Mode
from harness.stopping.causes import Cause, CauseKind
from harness.stopping.diagnosis import (
    Trials,
    diagnose,
    ends_without_stopping,
    mends,
    static_causes,
)
from harness.stopping.figures import Ending, ModeFigures, endings_of, length_limit, mode_figures
from harness.stopping.judging import judge_endings, judge_samples
from harness.stopping.static import examine_files
from harness.stopping.values import StoppingReport, summarise
from harness.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.stopping.blame import Blame

__all__ = ["Examination", "Said"]

Said = Completion | Snapshot
_MOST_TRIED = 16
_MORE_ROOM, _LEAST_ROOM = 4, 64


@dataclass(kw_only=True)
class Examination:
    """The working state of one examination; what leaves it is a `StoppingReport`."""

    engine: PeftEngine | None
    stack: AdapterStack | None
    application: Application
    stops: Mapping[str, Any] | None
    progress: Callable[[str, float], None] | None
    said: dict[str, tuple[Said, ...]]
    modes: dict[str, Mode] = field(default_factory=dict)
    figures: dict[str, ModeFigures] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    blames: dict[str, Blame] = field(default_factory=dict)
    traces: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    sampled: dict[str, Any] = field(default_factory=dict)
    extra: list[Verdict] = field(default_factory=list)
    trials: dict[str, Trials] = field(default_factory=dict)
    tried: dict[tuple[str, str], tuple[Sequence[Said], Sequence[Ending]]] = field(
        default_factory=dict
    )
    notes: list[str] = field(default_factory=list)
    ending: EndingFiles | None = None
    findings: tuple[Any, ...] = ()
    generated: int = 0

    def read_files(self, merged: Path | None) -> None:
        if self.stack is None:
            return
        templates = [adapter.path for adapter in reversed(self.stack.adapters)]
        self.ending = read_ending(self.stack.base.path, template_from=templates)
        self.findings = examine_files(self.stack, merged=merged)
        for name in self.said:
            self.modes.setdefault(name, self.stack.mode(name))

    @property
    def stop_ids(self) -> frozenset[int]:
        if self.engine is not None:
            return frozenset(self.engine.eos_token_ids)
        return frozenset(self.ending.eos if self.ending else ())

    @property
    def turn_ids(self) -> frozenset[int]:
        """What ends a turn; ids that the files' checks call wrong are no ends."""
        if self.ending is None:
            return self.stop_ids
        turn = self.ending.turn_end
        tokenizer = self.ending.tokenizer
        named = {turn[1]} if turn else set()
        if tokenizer is not None and tokenizer.eos_id is not None and turn is None:
            named.add(tokenizer.eos_id)
        return frozenset(named or self.stop_ids)

    @property
    def decode(self) -> Callable[[Sequence[int]], str] | None:
        if self.engine is None:
            return None
        tokenizer = self.engine.tokenizer

        def text(ids: Sequence[int]) -> str:
            decoded: str = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return decoded

        return text

    def endings(self, said: Sequence[Said]) -> tuple[Ending, ...]:
        return endings_of(said, stops=self.stop_ids, turn_ids=self.turn_ids, decode=self.decode)

    def figure(self, mode: str, said: Sequence[Said]) -> None:
        self.figures[mode] = mode_figures(mode, self.endings(said), length_limit(said))

    def expectation(self, mode: str) -> Expectation | None:
        declared = (
            self.stops if self.stops is not None else (self.stack.stops if self.stack else {})
        )
        return read_expectation(declared[mode]) if mode in declared else None

    def judge(self) -> None:
        for mode, figures in self.figures.items():
            want = self.expectation(mode)
            if want is not None:
                self.verdicts[mode] = judge_endings(figures, want)

    def trace(self) -> None:
        from harness.stopping.evidence import eos_traces

        assert self.engine is not None
        for mode, said in self.said.items():
            traces = eos_traces(
                self.engine,
                said,
                self.modes.get(mode, mode),
                # An id that only the files' checks call wrong is traced: it is what stops.
                self.stop_ids | self.turn_ids,
                application=self.application,
            )
            self.traces[mode] = traces
            self.evidence[mode] = summarise(traces, self.figures[mode])
            if self.progress is not None:
                self.progress(mode, 1.0)

    def assign_blame(self) -> None:
        """Blame in the mode with most adapters, and in each that does not end as declared."""
        from harness.stopping.blame import blame_adapters, natural_end_rows

        assert self.engine is not None
        widest = max(self.modes.values(), key=lambda m: len(m.weights), default=None)
        for name, mode in self.modes.items():
            if name not in self.said or not (mode is widest or self._at_fault(name)):
                continue
            said: Sequence[Said] = self.said[name]
            endings: Sequence[Ending] = self.figures[name].endings
            of = name
            if self._at_fault(name):
                self.trials[name] = self._try(name)
                # Broken words have no natural end: those of a mode that stops have one.
                sound = [a for a, f in self.trials[name].left_out.items() if mends(f)]
                if sound:
                    said, endings = self.tried[name, sound[0]]
                    of = f"{name} without {sound[0]}"
            stopped = [(s, e) for s, e in zip(said, endings, strict=True) if e.stopped]
            if len(stopped) >= 0.5 * len(said) > 0:
                said, endings = zip(*stopped, strict=True)
            rows = natural_end_rows(said, endings)
            found = blame_adapters(self.engine, mode, rows, self.turn_ids, ends_of=of)
            if found is not None:
                self.blames[name] = found

    def _at_fault(self, mode: str) -> bool:
        """Whether a mode that should stop, or must not loop, does otherwise."""
        want, figures = self.expectation(mode), self.figures[mode]
        if want is None or self.verdicts[mode].passed:
            return False
        return (want.must_stop and figures.stopped < figures.total) or bool(
            not want.loops and figures.loops
        )

    def find_causes(self) -> None:
        files = static_causes(self.findings)
        self.causes += files
        for mode, figures in self.figures.items():
            if not self._at_fault(mode):
                continue
            found = diagnose(figures, self.blames.get(mode), self.trials.get(mode), files)
            self.causes += found
            room = [c for c in found if c.kind is CauseKind.MAX_NEW_TOKENS]
            verdict = self.verdicts[mode]
            if room and verdict.outcome is Outcome.FAILED:
                # More room mends it: what ran out of room decides nothing.
                self.verdicts[mode] = replace(
                    verdict,
                    outcome=Outcome.UNDECIDED,
                    evidence=(*verdict.evidence, room[0].text),
                    remedy=room[0].remedy,
                )

    def _try(self, mode: str) -> Trials:
        """Generate for the prompts at fault without each adapter, and with more room."""
        from harness.stopping.blame import without

        said = [
            one
            for one, ending in zip(self.said[mode], self.figures[mode].endings, strict=True)
            if isinstance(one, Completion) and (not ending.stopped or ending.loop)
        ][:_MOST_TRIED]
        if not said or ends_without_stopping(self.figures[mode]):
            return Trials()
        settings = said[0].settings

        def run(key: str, chosen: Mode, room: GenerationSettings) -> ModeFigures:
            assert self.engine is not None
            found = self.engine.generate(
                [one.prompt for one in said], chosen, room, application=self.application
            )
            self.generated += len(found)
            endings = self.endings(found)
            self.tried[mode, key] = (found, endings)
            return mode_figures(chosen.name, endings, room.max_new_tokens)

        whole = self.modes[mode]
        left = {name: run(name, without(whole, name), settings) for name in whole.adapters}
        more = max(_MORE_ROOM * settings.max_new_tokens, _LEAST_ROOM)
        return Trials(
            left_out=left,
            longer=lambda: run("", whole, replace(settings, max_new_tokens=more)),
        )

    def sample(self, prompts: Sequence[Prompt], settings: GenerationSettings, count: int) -> None:
        from harness.stopping.sampling import sample_stops

        assert self.engine is not None
        for name in self.said:
            found = sample_stops(
                self.engine, prompts, self.modes[name], settings,
                samples=count, application=self.application,
            )  # fmt: skip
            self.sampled[name] = found
            self.generated += count * len(prompts)
            want = self.expectation(name)
            if want is not None:
                self.extra.append(judge_samples(name, want, found.counts, count, empty=found.empty))

    def try_weights(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> Any:
        from harness.stopping.sweep import sweep_weights

        assert self.engine is not None
        assert self.stack is not None
        if len(self.stack.adapters) < 2:
            self.notes.append("a weight sweep needs two adapters")
            return None
        names = [adapter.name for adapter in self.stack.adapters]
        wanted = [self.expectation(mode) for mode in self.said]
        rates = [want.min_rate for want in wanted if want is not None and want.min_rate]
        return sweep_weights(
            self.engine,
            prompts[:_MOST_TRIED],
            settings,
            adapters=(names[0], names[-1]),
            target=max(rates, default=0.95),
            turn_ids=self.turn_ids,
            decode=self.decode,
            progress=self.progress,
        )

    def report(self) -> StoppingReport:
        declared = self.stops if self.stops is not None else self.stack.stops if self.stack else {}
        known = [mode.name for mode in self.stack.modes] if self.stack else []
        absent = [mode for mode in declared if mode in known and mode not in self.said]
        if self.said and absent:
            self.notes.append(f"not examined, though declared: {', '.join(absent)}")
        if self.said and not self.verdicts:
            self.notes.append(
                "no mode declares how it must end: its figures are reported and not judged; "
                "declare [stops] in the stack's TOML"
            )
        total = sum(figures.total for figures in self.figures.values())
        made = "generated" if self.generated else "given"
        return StoppingReport(
            subject=f"stopping of {self.stack.name}" if self.stack else "stopping",
            source=f"{total} completions, {made}",
            findings=self.findings,
            modes=self.figures,
            verdicts=(*self.verdicts.values(), *self.extra),
            causes=tuple(self.causes),
            traces=self.traces,
            evidence=self.evidence,
            sampled=self.sampled,
            blame=self.blames,
            generated=self.generated,
            notes=tuple(self.notes),
        )
