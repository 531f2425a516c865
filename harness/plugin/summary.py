"""The verdict of each test, by mode and prompt, and the table that sums them up."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from harness.errors import InputError
from harness.plugin.setting import SETTING
from harness.terminal import shown
from harness.verdict import Outcome

__all__ = ["case_of", "outcome_of", "write_end", "write_summary"]


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


def outcome_of(item: pytest.Item, call: pytest.CallInfo[None]) -> Outcome:
    if call.excinfo is None:
        return Outcome.HELD
    if call.excinfo.errisinstance(pytest.skip.Exception):
        return Outcome.SKIPPED
    snapshot = getattr(item, "funcargs", {}).get("lora_snapshot")
    for result in snapshot.executions.values() if snapshot is not None else ():
        if not result.success:
            return _snapshot_outcome(result)
    return Outcome.FAILED


def _snapshot_outcome(result: Any) -> Outcome:
    from harness.snapshot import differences, read_snapshot

    if result.recalled_data is None:
        return Outcome.MISSING
    try:
        accepted = read_snapshot(str(result.recalled_data), where=result.snapshot_location)
    except InputError:
        return Outcome.UNREADABLE
    fresh = read_snapshot(str(result.asserted_data), where="the completion")
    lines = differences(accepted, fresh)
    incomparable = any(line.startswith("incomparable") for line in lines)
    return Outcome.INCOMPARABLE if incomparable else Outcome.CHANGED


def write_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table modes × verdicts, and the command to run next."""
    counts: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            properties = dict(getattr(report, "user_properties", ()))
            if getattr(report, "when", None) == "call" and "lora_mode" in properties:
                row = counts.setdefault(properties["lora_mode"], Counter())
                row[properties["lora_verdict"]] += 1
    if not counts:
        return
    outcomes = [o.value for o in Outcome if any(row[o.value] for row in counts.values())]
    terminalreporter.section("lora-stack: modes × verdicts")
    order = [m.name for m in config.stash[SETTING].stack.modes]
    width = max(len(mode) for mode in counts)
    terminalreporter.line(" " * width + "".join(f"{name:>14}" for name in outcomes))
    for mode in sorted(counts, key=lambda m: order.index(m) if m in order else len(order)):
        cells = "".join(f"{counts[mode][name] or '·':>14}" for name in outcomes)
        terminalreporter.line(f"{mode:<{width}}{cells}")
    for line in _next_commands(config, outcomes):
        terminalreporter.line(line)


def write_end(terminalreporter: Any, *, interrupted: bool) -> None:
    """Which tests a worker crashed in, and how many ran before an interrupt."""
    stats = terminalreporter.stats
    # xdist reports a lost worker's test under no phase of its own.
    crashed = [r.nodeid for r in stats.get("failed", ()) if getattr(r, "when", None) == "???"]
    if not (crashed or interrupted):
        return
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
        planned = terminalreporter._numcollected - len(stats.get("deselected", ()))
        terminalreporter.line(f"interrupted: {len(ran)} of {planned} tests ran")


def _next_commands(config: pytest.Config, outcomes: Sequence[str]) -> list[str]:
    """The command to run next, for the worst there is."""
    again = shlex.join(["pytest", *config.invocation_params.args])
    if Outcome.UNREADABLE in outcomes:
        return ["next: restore the unreadable snapshot files, then run again"]
    if {Outcome.CHANGED, Outcome.MISSING, Outcome.INCOMPARABLE}.intersection(outcomes):
        return [f"next: read the differences above; to accept them: {again} --snapshot-update"]
    if Outcome.FAILED in outcomes:
        return ["next: see what each mode says side by side: lora-stack run"]
    return []
