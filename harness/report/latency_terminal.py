"""A latency report in the terminal. Knows nothing of how it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from harness.bench.overhead import decoding_rows, overhead_rows
from harness.display.page import cell as show
from harness.display.terminal import shown
from harness.report.latency import LatencyReport, cell_rows, label, markers

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_latency"]

_MOST = 20


def print_latency(out: Console, report: LatencyReport, output: str | None) -> None:
    """The figures, what adapters cost, and the verdicts that did not pass."""
    for line in markers(report.results):
        out.print(f"! {shown(line)}")
    _figures(out, report)
    _ratios(out, report)
    out.print(f"{report.heading}: {report.counts}")
    bad = [verdict for verdict in report.verdicts if not verdict.passed]
    for verdict in bad[:_MOST]:
        out.print(f"{verdict.outcome.value}: {shown(verdict.name)}")
        for line in verdict.evidence:
            out.print(f"  {shown(line)}")
        if verdict.remedy:
            out.print(f"  → {shown(verdict.remedy)}")
    if len(bad) > _MOST:
        out.print(f"and {len(bad) - _MOST} more: see --json or the report")
    if output:
        out.print(f"report: {shown(output)}")


def _figures(out: Console, report: LatencyReport) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption="ms; decode and prefill: share of the ceiling")
    heads = ("", "TTFT", "ITL", "p99", "tokens/s", "decode", "prefill", "switch")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=place > 0)
    for row in cell_rows(report.results):
        shares = [
            "–" if row[name] is None else f"{row[name]:.1%}"
            for name in ("decode_share", "prefill_share")
        ]
        numbers = ("ttft_ms", "itl_p50_ms", "itl_p99_ms", "output_tokens_per_s")
        table.add_row(
            shown(row["cell"]),
            *(show(row[name], 3) for name in numbers),
            *shares,
            show(row["switch_ms"], 3),
        )
    out.print(table)


def _ratios(out: Console, report: LatencyReport) -> None:
    for title, rows in (
        ("time per output token over the base's",
         [row for row in overhead_rows(report.results) if row.against == "base"]),
        ("time per output token over the growing cache's", decoding_rows(report.results)),
    ):  # fmt: skip
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=title)
        for place, head in enumerate(("", "ratio", "95 % interval")):
            table.add_column(head, justify="right" if place else "left")
        for row in rows:
            ratio, low, high = row.tpot
            name = label(row.mode, row.application, row.decoding, row.batch_size)
            table.add_row(shown(name), f"× {ratio:.3f}", f"{low:.3f} – {high:.3f}")
        out.print(table)
