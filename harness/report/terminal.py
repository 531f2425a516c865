"""The run on a terminal: banner, progress, modes side by side with word differences, summary.

Knows nothing of how the completions came about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from harness.display.terminal import shown
from harness.display.textdiff import Change, word_diff
from harness.report.run import RunReport, completions_of, mode_rows

if TYPE_CHECKING:
    from harness.completion import Application, Completion
    from harness.preset import Preset
    from harness.stack import AdapterStack
    from harness.verdict import Outcome

__all__ = [
    "outcome_style",
    "print_banner",
    "loaded_lines",
    "print_loaded",
    "print_report",
    "progress_bar",
]


def outcome_style(outcome: Outcome) -> str:
    """Green for what passed, red for what failed, yellow for what could not be decided."""
    if outcome.passed:
        return "green"
    return "yellow" if outcome.value == "undecided" else "bold red"


def print_banner(out: Console, stack: AdapterStack, preset: Preset, *, embedded: bool) -> None:
    """What will run: modes with their equation, adapters, the base and why it was chosen."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    if embedded:
        grid.add_row("stack", "no stack was named: this is the embedded tiny trained one")
    base = stack.base
    where = base.source + (f" ({base.revision[:12]})" if base.revision else "")
    grid.add_row("base", f"{shown(where)}  · chosen by {shown(base.chosen_by)}")
    for adapter in stack.adapters:
        revision = f" ({adapter.revision[:12]})" if adapter.revision else ""
        grid.add_row(f"adapter {adapter.name}", shown(adapter.source) + revision)
    for mode in stack.modes:
        grid.add_row(f"mode {mode.name}", mode.formula)
    settings = preset.settings
    decoding = f"sampled, seed {settings.seed}" if settings.do_sample else "greedy"
    grid.add_row(
        "prompts",
        f"{preset.name}: {len(preset.prompts)}, {decoding}, at most "
        f"{settings.max_new_tokens} new tokens",
    )
    out.print(Panel(grid, title=Text(f"lora-stack · {shown(stack.name)}"), box=box.ROUNDED))


def loaded_lines(engine: Any, application: Application, seconds: float) -> list[str]:
    """A ✓ line for the base, each adapter and each mode, as read back from the live model."""
    lines = [f"✓ base loaded once in {seconds:.1f} s ({engine.device}, {engine.dtype})"]
    for adapter in engine.stack.adapters:
        files = engine.files[adapter.name]
        lines.append(
            f"✓ {adapter.name}: {len(files.pairs)} modules, {files.parameters:,} parameters, "
            "every factor equal to its file"
        )
    for mode in engine.stack.modes if application == "live" else ():
        with engine.mode(mode):
            names = " + ".join(mode.adapters) or "no adapter"
        lines.append(f"✓ {mode.name}: {names} active in every layer, read back")
    return lines


def print_loaded(out: Console, lines: Sequence[str]) -> None:
    """What `loaded_lines` gives, in green."""
    for line in lines:
        out.print(Text(shown(line), style="green"))


@contextlib.contextmanager
def progress_bar(
    err: Console, modes: Sequence[str]
) -> Iterator[Callable[[str, float], None] | None]:
    """A bar a mode on standard error; nothing where that is no terminal."""
    if not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        tasks = {mode: bar.add_task(mode, total=1.0) for mode in modes}
        yield lambda mode, share: bar.update(tasks[mode], completed=share)


def print_report(out: Console, report: RunReport, folder: Path | None) -> None:
    """Each prompt with every mode's words, then the verdicts and the summary.

    Args:
        folder: where the report was written; None where it could not be.
    """
    for prompt in report.preset.prompts:
        rows = completions_of(report, prompt)
        if rows:
            out.print()
            out.print(Text.assemble((prompt.id, "bold"), "  ", shown(prompt.shown)))
            out.print(_side_by_side(rows))
    out.print()
    out.print(_summary(report))
    for verdict in report.verdicts:
        style = outcome_style(verdict.outcome)
        mark = "✓" if verdict.passed else "✗"
        line = f"{mark} {verdict.name}: {verdict.outcome.value} · {'; '.join(verdict.evidence)}"
        out.print(Text(shown(line), style=style))
        if verdict.remedy and not verdict.passed:
            out.print(Text(f"  → {shown(verdict.remedy)}"))
    for note in report.notes:
        out.print(Text(f"note: {shown(note)}", style="yellow"))
    out.print(Text.assemble("verdict: ", (report.outcome.value, outcome_style(report.outcome))))
    if folder is not None and (report.completions or not report.complete):
        out.print(Text(shown(f"report:  {folder / 'report.md'}  {folder / 'report.json'}")))


def _side_by_side(rows: Sequence[Completion]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("mode", style="bold", no_wrap=True)
    table.add_column("completion", overflow="fold", ratio=1)
    table.add_column("stop", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    before: Completion | None = None
    for completion in rows:
        table.add_row(
            completion.mode,
            _highlighted(before.text if before else None, completion.text),
            Text(completion.stop_reason.value, style="green" if completion.stopped else "yellow"),
            str(len(completion.token_ids)),
        )
        before = completion
    return table


def _highlighted(before: str | None, text: str) -> Text:
    """The words of *text*; those that the mode above did not say are marked."""
    if before is None:
        return Text(shown(text))
    line = Text()
    for piece in word_diff(before, text):
        if piece.change is not Change.REMOVED:
            line.append(shown(piece.text), "bold cyan" if piece.change is Change.ADDED else "dim")
    return line


def _summary(report: RunReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("mode", "stopped", "stop reasons", "mean tokens", "seconds"):
        table.add_column(name, justify="right" if name in ("mean tokens", "seconds") else "left")
    for row in mode_rows(report):
        reasons = ", ".join(f"{reason} {n}" for reason, n in row["stop_reasons"].items())
        table.add_row(
            row["mode"],
            f"{row['stopped']} of {row['completions']}",
            reasons,
            f"{row['mean_tokens']:.1f}",
            f"{row['seconds']:.2f}",
        )
    return table
