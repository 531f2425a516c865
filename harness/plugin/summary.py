"""The verdict of each test, by mode and prompt, and the table that sums them up."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from harness.display.terminal import shown
from harness.plugin.orphans import ORPHANS
from harness.plugin.setting import SETTING
from harness.verdict import Outcome, overall

if TYPE_CHECKING:
    from harness.plugin.accepted import Judged

__all__ = ["case_of", "outcome_of", "properties_of", "write_end", "write_summary"]


_SHOWN = 10  # orphans
_TOLD = 3  # lines of a tie's or a drift's evidence; all of it is in the JUnit file


def case_of(item: pytest.Item) -> dict[str, str]:
    found: dict[str, str] = {}
    callspec = getattr(item, "callspec", None)
    for name, value in (callspec.params if callspec else {}).items():
        if name in ("lora_mode", "lora_declared_mode"):
            found["lora_mode"] = value.name
        elif name == "lora_mode_pair":
            found["lora_mode"] = value[1].name
        elif name == "lora_prompt":
            found["lora_prompt"] = value.id
    return found


def outcome_of(call: pytest.CallInfo[None], judged: Sequence[Judged]) -> Outcome:
    """What the test's snapshots say; without any, whether it passed."""
    if call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        return Outcome.SKIPPED
    if call.excinfo is None:
        # What was just accepted is held; a drift that only warns is still a drift.
        passed = (Outcome.HELD, Outcome.TIE, Outcome.DRIFT)
        found = [j.verdict for j in judged if j.verdict.outcome in passed and not j.written]
        return overall(found) if found else Outcome.HELD
    failed = [j.verdict for j in judged if not j.verdict.passed and not j.written]
    return overall(failed) if failed else Outcome.FAILED


def properties_of(judged: Sequence[Judged]) -> list[tuple[str, str]]:
    """What travels with a test's report beside the verdict: how its completion was come by, the
    noise floor, and the evidence where something is to be told."""
    found: list[tuple[str, str]] = []
    for one in judged:
        found.append(("lora_replay", one.how))
        if one.floor is not None:
            found.append(("lora_noise_floor", str(one.floor)))
        if one.unrecorded is not None:
            found.append(("lora_unrecorded", shown(one.unrecorded)))
        if one.verdict.outcome in (Outcome.TIE, Outcome.DRIFT) and not one.written:
            lines = "\n".join(one.verdict.evidence)
            found.append(("lora_evidence", shown(f"{one.verdict.name}: {lines}")))
    return found


def write_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table modes × verdicts, what passed and is worth knowing, and the command to run next."""
    cases = [
        (report, properties)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        and "lora_mode" in (properties := dict(getattr(report, "user_properties", ())))
    ]
    orphans = config.stash.get(ORPHANS, [])
    if not cases and not orphans:
        return
    terminalreporter.section("lora-stack: modes × verdicts")
    outcomes = _write_table(terminalreporter, config, [found for _, found in cases])
    lines = _measured([found for _, found in cases])
    for report, found in cases:
        if report.passed and "lora_evidence" in found:
            lines += f"{found['lora_verdict']}: {found['lora_evidence']}".split("\n")[:_TOLD]
    for line in [*lines, *_orphan_lines(orphans), *_next_commands(config, outcomes)]:
        terminalreporter.line(line)


def _write_table(
    terminalreporter: Any, config: pytest.Config, cases: Sequence[Mapping[str, str]]
) -> list[str]:
    """Writes it; the outcomes that occur, from harmless to bad."""
    counts: dict[str, Counter[str]] = {}
    for found in cases:
        counts.setdefault(found["lora_mode"], Counter())[found["lora_verdict"]] += 1
    if not counts:
        return []
    outcomes = [o.value for o in Outcome if any(row[o.value] for row in counts.values())]
    order = [m.name for m in config.stash[SETTING].stack.modes]
    width = max(len(mode) for mode in counts)
    terminalreporter.line(" " * width + "".join(f"{name:>14}" for name in outcomes))
    for mode in sorted(counts, key=lambda m: order.index(m) if m in order else len(order)):
        cells = "".join(f"{counts[mode][name] or '·':>14}" for name in outcomes)
        terminalreporter.line(f"{mode:<{width}}{cells}")
    return outcomes


def _measured(cases: Sequence[Mapping[str, str]]) -> list[str]:
    """How the completions were come by, the noise floor, and what could not be recorded."""
    lines = []
    ways = Counter(found["lora_replay"] for found in cases if "lora_replay" in found)
    if ways:
        lines.append(
            "completions: " + ", ".join(f"{count} {way}" for way, count in ways.most_common())
        )
    floors = {found["lora_noise_floor"] for found in cases if "lora_noise_floor" in found}
    if floors:
        # One a mode; the highest stands for all. Each begins with its figure.
        highest = max(floors, key=lambda floor: float(floor.split()[0]))
        lines.append(f"noise floor: at most {highest}")
    unrecorded = sorted({found["lora_unrecorded"] for found in cases if "lora_unrecorded" in found})
    return [*lines, *(f"not left for review: {fault}" for fault in unrecorded)]


def _orphan_lines(orphans: Sequence[str]) -> list[str]:
    if not orphans:
        return []
    more = [f"  and {len(orphans) - _SHOWN} more"] if len(orphans) > _SHOWN else []
    return [
        f"{len(orphans)} files of snapshots that no test asks for:",
        *(f"  {shown(path)}" for path in orphans[:_SHOWN]),
        *more,
        "  → git rm them, or bring their tests back",
    ]


def write_end(terminalreporter: Any, *, interrupted: bool, unsaved: Sequence[str]) -> None:
    """Which tests a worker crashed in, how many ran before an interrupt, what was not saved."""
    stats = terminalreporter.stats
    # xdist reports a lost worker's test under no phase of its own.
    crashed = [r.nodeid for r in stats.get("failed", ()) if getattr(r, "when", None) == "???"]
    if crashed or interrupted:
        terminalreporter.section("lora-stack: not run to the end")
    for nodeid in crashed:
        terminalreporter.line(shown(f"failed: {nodeid}: its worker crashed"))
    if interrupted:
        ran = {
            report.nodeid
            for kind in ("passed", "failed", "skipped", "xfailed", "xpassed", "error")
            for report in stats.get(kind, ())
            if hasattr(report, "nodeid")
        }
        # Without the deselected ones; under xdist it is what the workers have collected.
        planned = terminalreporter._session.testscollected
        terminalreporter.line(
            f"interrupted: {len(ran)} of {planned} tests ran"
            if planned
            else "interrupted before the tests were collected"
        )
    if unsaved:
        terminalreporter.section("lora-stack: not saved")
    for line in unsaved:
        terminalreporter.line(f"error: {line}")


def _next_commands(config: pytest.Config, outcomes: Sequence[str]) -> list[str]:
    """The command to run next, for the worst there is."""
    again = shlex.join(["pytest", *config.invocation_params.args])
    if Outcome.UNREADABLE in outcomes:
        return ["next: restore the unreadable snapshot files, then run again"]
    to_accept = {Outcome.DRIFT, Outcome.CHANGED, Outcome.MISSING, Outcome.INCOMPARABLE}
    if to_accept.intersection(outcomes):
        return [
            "next: lora-stack review shows the differences and accepts or rejects them; "
            f"to accept all: {again} --snapshot-update"
        ]
    if Outcome.FAILED in outcomes:
        return ["next: see what each mode says side by side: lora-stack run"]
    return []
