"""One adapter or several for people in a terminal, and as verdicts for programs.

Knows nothing of options or exit codes.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from harness.analysis.comparison import ComparisonFigures
from harness.analysis.figures import AdapterFigures
from harness.analysis.findings import Level, adapter_findings
from harness.analysis.writing import findings_of, summary_table
from harness.display.terminal import console, shown
from harness.verdict import Outcome, Verdict

__all__ = ["judge_adapters", "print_adapters"]


def judge_adapters(figures: AdapterFigures | ComparisonFigures) -> list[Verdict]:
    """Whether each adapter is sound and trained; of a comparison also how each pair lies."""
    if isinstance(figures, AdapterFigures):
        return _judge(figures)
    alone = [verdict for adapter in figures.adapters for verdict in _judge(adapter)]
    return [*alone, *_judge_pairs(figures)]


def _judge(figures: AdapterFigures) -> list[Verdict]:
    faults = tuple(str(fault) for fault in figures.faults)
    checks = [
        Verdict(
            name=f"sound: {figures.name}",
            outcome=Outcome.UNREADABLE if faults else Outcome.HELD,
            evidence=faults or (f"{len(figures.modules)} modules, every entry finite",),
            remedy="save or copy the adapter again" if faults else None,
        )
    ]
    found = [f for f in adapter_findings(figures) if f.text not in faults]
    bad = tuple(f.text for f in found if f.level is Level.FAULT)
    checks.append(
        Verdict(
            name=f"trained: {figures.name}",
            outcome=Outcome.FAILED if bad else Outcome.HELD,
            evidence=bad or tuple(f.text for f in found if f.level is Level.ATTENTION),
            remedy="check that training reached lora_B, and that it was saved after training"
            if bad
            else None,
        )
    )
    return checks


def _judge_pairs(figures: ComparisonFigures) -> list[Verdict]:
    checks = []
    for pair in figures.pairs:
        total = pair.total
        evidence = (
            ("no module in common",)
            if total is None
            else (
                f"cosine {total.cosine:+.3g} over {total.modules} shared modules "
                f"(±{total.cosine_by_chance:.2g} by chance)",
                f"output overlap {total.column_overlap:.3g} "
                f"({total.column_overlap_by_chance:.2g} by chance), "
                f"input overlap {total.row_overlap:.3g} ({total.row_overlap_by_chance:.2g})",
            )
        )
        checks.append(
            Verdict(
                name=f"overlap: {pair.first} and {pair.second}",
                outcome=Outcome.SKIPPED if total is None else Outcome.HELD,
                evidence=evidence,
            )
        )
    return checks


def print_adapters(figures: AdapterFigures | ComparisonFigures, folder: Path) -> None:
    """What stands out, one line a finding; the table of totals; where the report lies."""
    out = console()
    for finding in findings_of(figures):
        out.print(f"{finding.level.value:>9}  {shown(finding.text)}", soft_wrap=True)
    head, rows = summary_table(figures)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, cell in enumerate(head):
        if number:
            table.add_column(cell, justify="right", no_wrap=True)
        else:
            table.add_column(cell, overflow="fold")
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    out.print()
    out.print(table)
    out.print(f"\nreport: {shown(str(folder / 'report.html'))}", soft_wrap=True)
