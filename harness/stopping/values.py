"""What the stopping clinic says: figures, verdicts, causes, and the report that holds them.

Values only; how they are written is `harness.report.stopping`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from harness.stopping.causes import Cause, Finding
from harness.stopping.figures import ModeFigures
from harness.verdict import Outcome, Verdict, overall

if TYPE_CHECKING:
    from harness.stopping.blame import Blame
    from harness.stopping.evidence import EosTrace
    from harness.stopping.sampling import SampledFigures
    from harness.stopping.sweep import Sweep
    from harness.stopping.training_data import DatasetFigures

__all__ = ["EosSummary", "StoppingReport", "quartiles", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EosSummary:
    """EOS over a mode's completions; triples are lower quartile, median, upper quartile.

    Attributes:
        at_end_probability, at_end_rank, at_end_margin: at the natural ends (margin in nats).
        by_step: probability at each step, over the completions that reach it.
        replayed: tokens that are the arg-max of their position, of `tokens`.
    """

    ends: int
    at_end_probability: tuple[float, float, float] | None
    at_end_rank: tuple[float, float, float] | None
    at_end_margin: tuple[float, float, float] | None
    by_step: tuple[tuple[float, float, float], ...]
    replayed: int
    tokens: int


def quartiles(values: Any) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile; None of nothing."""
    found = sorted(float(value) for value in values)
    if not found:
        return None
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, middle, high = quantiles(found, n=4, method="inclusive")
    return low, middle, high


def summarise(traces: tuple[EosTrace, ...], figures: ModeFigures) -> EosSummary:
    """The summary of a mode's traces, which come in the order of its endings."""
    at_end = [
        (trace.probability[place], trace.rank[place], trace.margin[place])
        for trace, ending in zip(traces, figures.endings, strict=True)
        if (place := ending.natural_end) is not None and place < trace.tokens
    ]
    longest = max((trace.tokens for trace in traces), default=0)
    steps = [
        quartiles(trace.probability[step] for trace in traces if step < trace.tokens)
        for step in range(longest)
    ]
    return EosSummary(
        ends=len(at_end),
        at_end_probability=quartiles(row[0] for row in at_end),
        at_end_rank=quartiles(row[1] for row in at_end),
        at_end_margin=quartiles(row[2] for row in at_end),
        by_step=tuple(step for step in steps if step is not None),
        replayed=sum(trace.likeliest for trace in traces),
        tokens=sum(trace.tokens for trace in traces),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingReport:
    """Whether each mode stops, how sure that is, why not, and who is to blame.

    Attributes:
        findings: static checks of the files; empty where no files were given.
        modes: figures by mode; `traces` and `evidence` by mode where a model was asked.
        verdicts: the judgement of each mode that has an entry in `[stops]`.
        causes: what was named, worst first.
        generated: completions that were generated for this report; 0 where all were there.
    """

    subject: str
    source: str
    findings: tuple[Finding, ...]
    modes: Mapping[str, ModeFigures]
    verdicts: tuple[Verdict, ...]
    causes: tuple[Cause, ...]
    traces: Mapping[str, tuple[EosTrace, ...]] = field(default_factory=dict)
    evidence: Mapping[str, EosSummary] = field(default_factory=dict)
    sampled: Mapping[str, SampledFigures] = field(default_factory=dict)
    blame: Mapping[str, Blame] = field(default_factory=dict)
    sweep: Sweep | None = None
    dataset: DatasetFigures | None = None
    generated: int = 0
    notes: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[Verdict, ...]:
        """Every verdict: the modes', the files', the data set's."""
        data = (self.dataset.verdict,) if self.dataset is not None else ()
        return (*self.verdicts, *(finding.verdict for finding in self.findings), *data)

    @property
    def verdict(self) -> Outcome:
        """The worst outcome of all checks that were made."""
        return overall(v for v in self.checks if v.outcome is not Outcome.SKIPPED)

    @property
    def passed(self) -> bool:
        return self.verdict.passed

    def judged(self, mode: str) -> Verdict:
        """The verdict on *mode*, with the causes that were named for it as evidence.

        Raises:
            KeyError: the mode declares nothing.
        """
        name = f"stopping: {mode}"
        for verdict in self.verdicts:
            if verdict.name == name:
                break
        else:
            raise KeyError(mode)
        causes = [c for c in self.causes if c.mode in (None, mode)] if not verdict.passed else []
        return replace(
            verdict,
            evidence=(*verdict.evidence, *(f"cause: {c.kind}: {c.text}" for c in causes)),
            remedy=causes[0].remedy if causes else verdict.remedy,
        )

    def explain(self) -> str:
        """The report as text: verdicts, then causes with their remedies, then blame."""
        lines = [f"{self.subject}: {self.verdict.value}"]
        for check in self.checks:
            if not check.passed or check in self.verdicts:
                lines.append(f"  {check.name}: {check.outcome.value}")
                lines += [f"    {line}" for line in check.evidence]
        for cause in self.causes:
            where = f"{cause.mode}: " if cause.mode else ""
            lines += [f"  cause: {where}{cause.kind}: {cause.text}", f"    → {cause.remedy}"]
        lines += [f"  {mode}: {blame.sentence}" for mode, blame in self.blame.items()]
        return "\n".join(lines)
