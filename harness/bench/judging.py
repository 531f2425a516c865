"""Results against results: may they be compared, is everything there, and what does the gate say.

`harness.bench.gate` has the statistics. Values in, verdicts out. Knows nothing of files or of
measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.bench.cells import METRICS
from harness.bench.comparing import compare_history, compare_pairs
from harness.bench.gate import Change, Thresholds, judge_changes
from harness.bench.results import Results
from harness.verdict import Outcome, Verdict

__all__ = ["as_verdicts", "judge_history", "judge_pair", "judge_presence", "unlike"]

# What a night may be that others are held against: one that was compared with nothing is the first.
_REFERENCE = (None, "held", "skipped", "incomparable")


def unlike(old: Results, new: Results) -> list[str]:
    """What forbids comparing: lines `name: old, now new` of hardware and conditions that differ."""
    lines: list[str] = []
    for part, first, second in (
        ("hardware", old.fingerprint, new.fingerprint),
        ("measured", old.conditions, new.conditions),
    ):
        lines += [
            f"{part}: {name} was {first.get(name)!r}, is {second.get(name)!r}"
            for name in sorted({*first, *second})
            if first.get(name) != second.get(name)
        ]
    return lines


def judge_presence(old: Results, new: Results) -> list[Verdict]:
    """A verdict for each figure that was measured before and is absent, empty or skipped now."""
    found = []
    for key, before in old.cells.items():
        now = new.cells.get(key)
        if now is None:
            reason = new.skipped.get(key)
            evidence = [reason] if reason else ["it was measured before and is not here now"]
            added = [name for name in new.cells if name not in old.cells]
            if added and not reason:
                evidence.append(f"new here: {', '.join(added[:4])}; renamed?")
        elif any(not now.rounds[metric] for metric in METRICS):
            evidence = ["it has no rounds"]
        elif any(not before.rounds[metric] for metric in METRICS):
            evidence = ["the old one has no rounds"]
        else:
            continue
        found.append(
            Verdict(
                name=f"latency: {key}",
                outcome=Outcome.MISSING,
                evidence=tuple(evidence),
                remedy="measure what was measured before, or start a new history",
            )
        )
    return found


def judge_history(
    history: Sequence[Results], new: Results, thresholds: Thresholds | None = None
) -> tuple[list[Verdict], list[Change]]:
    """Tonight's results against stored ones (oldest first); one verdict a figure.

    Nights that failed are shown in plots and are no reference: a regression stays one until its
    files are taken out of the history.
    """
    comparable = [night for night in history if not unlike(night, new)]
    if not comparable:
        lines = unlike(history[-1], new) if history else ["there is no older result"]
        return [_incomparable(lines)], []
    reference = [night for night in comparable if night.verdict in _REFERENCE]
    reference = reference or comparable[:1]
    verdicts = judge_presence(reference[-1], new)
    shared = {key: cell for key, cell in new.cells.items() if not _named(verdicts, key)}
    table = compare_history([night.cells for night in reference], shared)
    changes = judge_changes(table, thresholds)
    verdicts += as_verdicts(changes, suspects=_commits(reference, history, new))
    return verdicts, changes


def _named(verdicts: Sequence[Verdict], key: str) -> bool:
    return any(verdict.name == f"latency: {key}" for verdict in verdicts)


def _commits(
    reference: Sequence[Results], history: Sequence[Results], new: Results
) -> Mapping[str, str]:
    """For each figure the commits between which it went bad: the last night that was well, and
    the first of the unbroken row of nights that failed."""
    ranges: dict[str, str] = {}
    for key in new.cells:
        for metric in METRICS:
            name = f"{key} {metric.removesuffix('_s')}"
            row = [*history, replace(new, failed=(name,))]
            first = len(row) - 1
            while first > 0 and name in row[first - 1].failed:
                first -= 1
            good = row[first - 1] if first > 0 else reference[-1]
            ranges[name] = f"went bad in {_commit(good)}..{_commit(row[first])}"
    return ranges


def _commit(results: Results) -> str:
    found = str(results.commit.get("id") or results.moment or "unknown")
    return found[:12] if results.commit.get("id") else found


def as_verdicts(changes: Sequence[Change], suspects: Mapping[str, str]) -> list[Verdict]:
    """One verdict a figure; a failed one names the commits that it went bad between."""
    verdicts = []
    for change in changes:
        interval = (
            f" [{change.low:.3f}, {change.high:.3f}]"
            if change.low is not None and change.high is not None
            else ""
        )
        evidence = [
            f"{change.old_s * 1e3:.3f} ms → {change.new_s * 1e3:.3f} ms, "
            f"ratio {change.ratio:.3f}{interval}, p {change.p_judged:.2g}",
            *change.why,
        ]
        if change.outcome is Outcome.FAILED and change.samples.name in suspects:
            evidence.append(suspects[change.samples.name])
        verdicts.append(
            Verdict(
                name=f"latency: {change.samples.name}",
                outcome=change.outcome,
                evidence=tuple(evidence),
                remedy={
                    Outcome.FAILED: "look at what changed between those commits, or accept the "
                    "new speed: start a new history",
                    Outcome.UNDECIDED: "raise --rounds, or measure while nothing else runs",
                }.get(change.outcome),
            )
        )
    return verdicts


def judge_pair(
    old: Sequence[Results], new: Sequence[Results], thresholds: Thresholds | None = None
) -> tuple[list[Verdict], list[Change]]:
    """Two sides whose rounds ran in turn, by launch."""
    different = [line for launch in old for line in unlike(launch, new[0])]
    if different:
        return [_incomparable(list(dict.fromkeys(different)))], []
    verdicts = [verdict for b, n in zip(old, new, strict=True) for verdict in judge_presence(b, n)]
    verdicts = list({verdict.name: verdict for verdict in verdicts}.values())
    shared = [
        {key: cell for key, cell in launch.cells.items() if not _named(verdicts, key)}
        for launch in new
    ]
    table = compare_pairs([launch.cells for launch in old], shared)
    changes = judge_changes(table, thresholds)
    between = f"went bad in {_commit(old[-1])}..{_commit(new[-1])}"
    suspects = {change.samples.name: between for change in changes}
    return verdicts + as_verdicts(changes, suspects=suspects), changes


def _incomparable(lines: Sequence[str]) -> Verdict:
    return Verdict(
        name="latency: same hardware and conditions",
        outcome=Outcome.INCOMPARABLE,
        evidence=tuple(lines),
        remedy="compare with results of this machine: lora-stack bench --output DIR makes them",
    )
