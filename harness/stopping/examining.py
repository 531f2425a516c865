"""`examine_stopping`: from a loaded stack, or from completions that exist already, to the report.

Where completions are given, nothing is generated but for a failing mode's experiments, and without
an engine nothing at all is asked of a model. Knows nothing of the command line or of files' form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.completion import Application, Completion, GenerationSettings, Prompt
from harness.ending import EndingFiles, read_ending
from harness.errors import InputError
from harness.expectation import Expectation, read_expectation
from harness.snapshot import Snapshot
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

__all__ = ["examine_stopping"]

Said = Completion | Snapshot
_MOST_TRIED = 16
_MORE_ROOM, _LEAST_ROOM = 4, 64


def examine_stopping(
    source: Any,
    *,
    engine: PeftEngine | None = None,
    stack: AdapterStack | None = None,
    prompts: Sequence[Prompt] | None = None,
    settings: GenerationSettings | None = None,
    modes: Sequence[Mode | str] | None = None,
    stops: Mapping[str, Any] | None = None,
    application: Application = Application.LIVE,
    samples: int = 0,
    blame: bool = True,
    sweep: bool = False,
    merged: Path | str | None = None,
    dataset: Path | str | None = None,
    labels: str = "assistant",
    progress: Callable[[str, float], None] | None = None,
    said: dict[str, tuple[Said, ...]] | None = None,
) -> StoppingReport:
    """Say of each mode whether it stops, how sure that is, why not, and who is to blame.

    Args:
        source: a loaded engine, which generates for *prompts*; or completions or snapshots, in one
            sequence or by mode, which cost no generation.
        engine: beside completions: traces EOS along them and blames adapters by forward passes.
        stack: where there is no engine: whose files and `[stops]` count.
        stops: expectations by mode, instead of the stack's.
        samples: also sample each prompt this often (needs an engine).
        sweep: also try other weights of the first and last adapter (needs an engine).
        merged: a merged copy, whose files are held against the stack's.
        dataset: training data to check (`check_training_data`); *labels* as there.
        said: filled with what an engine generates, a mode as soon as it is through, for whoever
            is interrupted: examined as *source*, it needs no engine.

    Raises:
        InputError: an engine without prompts, a mode that is unknown, files that cannot be read.
    """
    case = _Case(
        engine=engine, stack=stack, application=application, stops=stops, progress=progress,
        said={} if said is None else said,
    )  # fmt: skip
    if hasattr(source, "generate"):
        case.engine, case.stack = source, source.stack
        if not prompts:
            raise InputError("an engine needs prompts", where="examine_stopping",
                             remedy="pass prompts=load_preset(…).prompts")  # fmt: skip
        _generate(case, prompts, settings or GenerationSettings(), modes)
    else:
        _take(case, source, modes)
    case.stack = case.stack or (case.engine.stack if case.engine else None)
    case.read_files(Path(merged) if merged is not None else None)
    for mode, found in case.said.items():
        case.figure(mode, found)
    case.judge()
    if case.engine is not None:
        case.trace()
        if blame:
            case.assign_blame()
    case.find_causes()
    if samples and case.engine is not None and prompts:
        case.sample(prompts, settings or GenerationSettings(), samples)
    report = case.report()
    if sweep and case.engine is not None and prompts:
        report = replace(report, sweep=case.try_weights(prompts, settings or GenerationSettings()))
    if dataset is not None:
        report = _with_dataset(report, case, Path(dataset), labels)
    return report


def _generate(
    case: _Case,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    modes: Sequence[Mode | str] | None,
) -> None:
    assert case.engine is not None
    assert case.stack is not None
    chosen = [case.stack.mode(m) if isinstance(m, str) else m for m in modes or case.stack.modes]
    for mode in chosen:
        case.modes[mode.name] = mode
        case.said[mode.name] = case.engine.generate(
            prompts, mode, settings, application=case.application, progress=case.progress
        )
        case.generated += len(prompts)


def _take(case: _Case, source: Any, modes: Sequence[Mode | str] | None) -> None:
    if isinstance(source, Mapping):
        case.said = {str(mode): tuple(found) for mode, found in source.items()}
    else:
        by_mode: dict[str, list[Said]] = {}
        for one in _said(source):
            by_mode.setdefault(one.mode, []).append(one)
        case.said = {mode: tuple(found) for mode, found in by_mode.items()}
    if modes is not None:
        wanted = [m if isinstance(m, str) else m.name for m in modes]
        case.said = {mode: found for mode, found in case.said.items() if mode in wanted}


def _said(source: Iterable[Any]) -> Iterable[Said]:
    for one in source:
        if not isinstance(one, Completion | Snapshot):
            raise InputError(
                f"{type(one).__name__} is neither an engine, a completion nor a snapshot",
                where="examine_stopping",
                remedy="pass load_engine(stack), or completions or snapshots",
            )
        yield one


@dataclass(kw_only=True)
class _Case:
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
                self.extra.append(judge_samples(name, want, found.counts, count))

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


def _with_dataset(
    report: StoppingReport, case: _Case, dataset: Path, labels: str
) -> StoppingReport:
    from harness.engines.described import fresh_tokenizer
    from harness.stopping.training_data import check_training_data

    if case.stack is None:
        raise InputError(
            "training data needs a stack, whose tokenizer reads it", where="examine_stopping"
        )
    tokenizer = case.engine.tokenizer if case.engine else fresh_tokenizer(case.stack.base.path)
    found = check_training_data(dataset, tokenizer, stops=case.stop_ids, labels=labels)
    cause = (found.cause,) if found.cause is not None else ()
    return replace(report, dataset=found, causes=(*report.causes, *cause))
