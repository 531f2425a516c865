"""The latency report: JSON, Markdown and HTML of one session, its gate, and the nights before.

Made from `Results` alone, which `lora-stack bench` measures or a file of pytest-benchmark holds.
Knows nothing of engines, clocks or the terminal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.bench.cells import METRICS
from harness.bench.gate import Change
from harness.bench.overhead import OverheadRow, decoding_rows, overhead_rows
from harness.bench.results import Results, as_benchmark_json
from harness.display.markdown import inline, table
from harness.display.page import cell as show
from harness.display.page import image_uri, render
from harness.files.staging import staged_folder
from harness.report.nights import NIGHTS, TITLES, night_rows
from harness.verdict import Outcome, Verdict, overall

__all__ = [
    "LatencyReport",
    "as_json",
    "as_markdown",
    "cell_rows",
    "label",
    "markers",
    "write_latency",
]

_TEMPLATE = Path(__file__).parent / "templates" / "latency.html.jinja"
_UNBOUNDED = 5.0  # a log ratio: a factor of 150


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """One session, judged.

    Attributes:
        verdicts: of the gate; one that says so where nothing was compared.
        changes: the figures behind them.
        history: earlier results, oldest first, for plots and sparklines.
    """

    results: Results
    verdicts: tuple[Verdict, ...]
    changes: tuple[Change, ...] = ()
    history: tuple[Results, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """The worst verdict; `skipped` where nothing was compared."""
        made = [verdict for verdict in self.verdicts if verdict.outcome is not Outcome.SKIPPED]
        return overall(made or self.verdicts)

    @property
    def heading(self) -> str:
        """`held`, `failed`, …; `measured` where nothing was compared."""
        return "measured" if self.outcome is Outcome.SKIPPED else self.outcome.value

    @property
    def counts(self) -> str:
        """How many verdicts passed, or that there is none."""
        if self.outcome is Outcome.SKIPPED:
            return "Compared with nothing: see --against."
        passed = sum(verdict.passed for verdict in self.verdicts)
        words = f"{passed} of {len(self.verdicts)} verdicts passed."
        floors = [
            f"{floor:.0%} ({title})" if math.isfinite(floor) else f"any ({title})"
            for metric, title in TITLES.items()
            for floor in [_floor(self.changes, metric)]
            if floor is not None
        ]
        if floors:
            words += f" A change below {', '.join(floors)} could not be told from noise."
        return words


def _floor(changes: Sequence[Change], metric: str) -> float | None:
    """The largest relative change that equal things showed in *metric*; None for no figure."""
    floors = [change.samples.floor for change in changes if change.samples.metric == metric]
    if not floors:
        return None
    return math.expm1(max(floors)) if max(floors) < _UNBOUNDED else math.inf


def markers(results: Results) -> list[str]:
    """What a reader must know before any figure: random weights, no GPU, throttling, ceilings."""
    lines = []
    if results.random:
        lines.append(
            f"{results.stack.get('base')}: RANDOM WEIGHTS in a shape. Its times mean what they "
            "say; nothing else about this model does."
        )
    if results.fingerprint.get("kind") != "cuda":
        lines.append("Measured on a CPU: this says nothing about a GPU.")
    slowed = sorted(
        {
            reason
            for cell in results.cells.values()
            for state in cell.device_states
            for reason in state.get("throttle", ())
        }
    )
    if slowed:
        lines.append(f"The device slowed itself down while measuring: {', '.join(slowed)}.")
    lines += [f"Not measured: {key}: {reason}" for key, reason in results.skipped.items()]
    return lines


def cell_rows(results: Results) -> list[dict[str, Any]]:
    """The main table's rows, in milliseconds, tokens a second, shares and GiB."""
    rows = []
    for cell in results.cells.values():
        if any(not cell.rounds[metric] for metric in METRICS):
            continue
        rows.append(
            {
                "cell": label(cell.mode, cell.application, cell.decoding, cell.batch_size),
                "mode": cell.mode,
                "application": cell.application,
                "decoding": cell.decoding,
                "batch": cell.batch_size,
                "rounds": len(cell.rounds["e2e_s"]),
                "ttft_ms": cell.median("ttft_s") * 1e3,
                "itl_p50_ms": cell.itl_s["p50"] * 1e3,
                "itl_p90_ms": cell.itl_s["p90"] * 1e3,
                "itl_p99_ms": cell.itl_s["p99"] * 1e3,
                "tpot_ms": cell.median("tpot_s") * 1e3,
                "e2e_ms": cell.median("e2e_s") * 1e3,
                "output_tokens_per_s": cell.output_tokens_per_s,
                "prefill_tokens_per_s": cell.prefill_tokens_per_s,
                "decode_share": results.share(cell, "decode"),
                "prefill_share": results.share(cell, "prefill"),
                "switch_ms": _median(cell.switch_s, 1e3),
                "peak_gib": None if cell.peak_bytes is None else cell.peak_bytes / 2**30,
            }
        )
    return rows


def _median(values: Sequence[float], scale: float) -> float | None:
    return sorted(values)[len(values) // 2] * scale if values else None


def as_json(report: LatencyReport) -> dict[str, Any]:
    """The verdict and checks, then all that pytest-benchmark's own files have."""
    return {
        "verdict": report.outcome.value,
        "checks": [verdict.as_json() for verdict in report.verdicts],
        "markers": markers(report.results),
        "figures": cell_rows(report.results),
        "overhead": [row.as_json() for row in overhead_rows(report.results)],
        "decoding": [row.as_json() for row in decoding_rows(report.results)],
        "changes": [change.as_json() for change in report.changes],
        "nights": night_rows(report.history, report.results) if report.history else [],
        **as_benchmark_json(report.results),
    }


_COLUMNS = {
    "cell": "cell",
    "ttft_ms": "TTFT ms",
    "itl_p50_ms": "ITL p50 ms", "itl_p90_ms": "p90 ms", "itl_p99_ms": "p99 ms",
    "e2e_ms": "end to end ms", "output_tokens_per_s": "tokens/s",
    "prefill_tokens_per_s": "prefill tokens/s", "decode_share": "decode, % of ceiling",
    "prefill_share": "prefill, % of ceiling", "switch_ms": "switch ms", "peak_gib": "peak GiB",
    "rounds": "rounds",
}  # fmt: skip


def label(mode: str, application: str, decoding: str, batch_size: int) -> str:
    """How people are told which cell: `stacked live, batch 8`."""
    how = "" if application == "none" else f" {application}"
    return f"{mode}{how}{'' if decoding == 'dynamic' else f' {decoding}'}, batch {batch_size}"


def _figure(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name.endswith("_share"):
        return value * 100
    return round(value) if name.endswith("tokens_per_s") and value >= 1000 else value


def _overhead_row(row: OverheadRow) -> list[Any]:
    name = label(row.mode, row.application, row.decoding, row.batch_size)
    return [f"{name} / {row.against}", *row.tpot, *row.ttft]


_OVERHEAD_HEAD = ["cell", "TPOT ratio", "low", "high", "TTFT ratio", "low", "high"]


def _overhead_table(rows: Sequence[OverheadRow]) -> str:
    return table(_OVERHEAD_HEAD, [[show(value) for value in _overhead_row(row)] for row in rows])


def _environment(results: Results) -> list[tuple[str, str]]:
    known, adapters = results.fingerprint, results.stack.get("adapters", {})
    random = " (random weights)" if results.random else ""
    rows = [
        ("stack", str(results.stack.get("name", ""))),
        ("base", str(results.stack.get("base", "")) + random),
        *((f"adapter {name}", str(source)) for name, source in adapters.items()),
        ("device", ", ".join(f"{name} {value}" for name, value in known.items())),
        ("software", ", ".join(f"{name} {v}" for name, v in results.software.items() if v)),
        ("dtype", str(results.conditions.get("dtype", ""))),
    ]  # fmt: skip
    if results.ceilings:
        rows.append(
            (
                "ceilings",
                f"copy {float(results.ceilings['copy_bytes_per_s']) / 1e9:,.1f} GB/s, "
                f"{results.ceilings['matmul_dtype']} products "
                f"{float(results.ceilings['matmul_flops']) / 1e12:,.2f} TFLOP/s, measured here",
            )
        )
    if results.load_s is not None:
        word = "building random weights" if results.random else "loading"
        rows.append((word, f"{results.load_s:.2f} s"))
    if results.commit.get("id"):
        rows.append(("commit", str(results.commit["id"])))
    rows.append(("measured at", results.moment))
    return rows


def as_markdown(report: LatencyReport) -> str:
    """The report for people, every foreign text inert."""
    results = report.results
    lines = [
        f"# Latency of {inline(str(results.stack.get('name', '')))}: {report.heading}",
        "",
    ]
    lines += [f"> **{inline(line)}**\n" for line in markers(results)]
    lines += [f"- {inline(name)}: {inline(value)}" for name, value in _environment(results)]
    bad = [verdict for verdict in report.verdicts if not verdict.passed]
    lines += ["", "## Verdicts", "", report.counts]
    if bad or len(report.verdicts) == 1:
        lines += ["", table(["figure", "verdict", "evidence", "remedy"], [
            [v.name, v.outcome.value, "; ".join(v.evidence), v.remedy or ""]
            for v in (bad or report.verdicts)
        ])]  # fmt: skip
    lines += ["", "## Figures", "", table(list(_COLUMNS.values()), [
        [show(_figure(name, row[name])) for name in _COLUMNS] for row in cell_rows(results)
    ])]  # fmt: skip
    overhead = overhead_rows(results)
    if overhead:
        how = "rounds in turn, pairs" if results.in_turn else "rounds apart, unpaired"
        lines += ["", "## What adapters cost", "", f"Ratios with 95 % intervals ({how})."]
        lines += ["", _overhead_table(overhead)]
    decoding = decoding_rows(results)
    if decoding:
        lines += ["", "## What another way of decoding brings", "", _overhead_table(decoding)]
    if report.history:
        lines += ["", f"## The last {min(NIGHTS, len(report.history) + 1)} nights", "",
                  table(["cell", "figure", "nights", "now ms"], [
                      [row["cell"], row["metric"], row["sparkline"], show(row["values_ms"][-1])]
                      for row in night_rows(report.history, report.results)
                  ])]  # fmt: skip
    return "\n".join(lines) + "\n"


def _tables(report: LatencyReport) -> list[dict[str, Any]]:
    results = report.results
    made = [
        {
            "title": "Figures",
            "text": "Medians over the rounds; gaps between tokens pooled. A share of the ceiling "
            "is the roofline's time over the measured one.",
            "head": list(_COLUMNS.values()),
            "rows": [[_figure(name, row[name]) for name in _COLUMNS] for row in cell_rows(results)],
        }
    ]
    for title, rows in (
        ("What adapters cost", overhead_rows(results)),
        ("What another way of decoding brings", decoding_rows(results)),
    ):
        if rows:
            how = "Rounds ran in turn: pairs." if results.in_turn else "Rounds did not run in turn."
            made.append(
                {
                    "title": title,
                    "text": f"Ratios with 95 % bootstrap intervals. {how}",
                    "head": _OVERHEAD_HEAD,
                    "rows": [_overhead_row(row) for row in rows],
                }
            )
    if report.changes:
        made.append(
            {
                "title": "Compared",
                "text": "New over old, 99 % interval, p of the rank test, "
                "and how far apart equal things were.",
                "head": ["figure", "old ms", "new ms", "ratio", "low", "high", "p",
                         "noise floor, %", "verdict"],
                "rows": [
                    [c.samples.name, c.old_s * 1e3, c.new_s * 1e3, c.ratio, c.low, c.high,
                     c.p_judged,
                     math.expm1(c.samples.floor) * 100 if c.samples.floor < _UNBOUNDED else None,
                     c.outcome.value]
                    for c in report.changes
                ],
            }
        )  # fmt: skip
    if report.history:
        made.append(
            {
                "title": "Nights",
                "text": "Medians, oldest night left; the scale is each row's own.",
                "head": ["cell", "figure", "nights", "now ms"],
                "rows": [
                    [row["cell"], row["metric"], row["sparkline"], row["values_ms"][-1]]
                    for row in night_rows(report.history, report.results)
                ],
            }
        )
    return made


def _with_failures(report: LatencyReport) -> Results:
    """The results with what failed now, as a stored night has it."""
    failed = [v.name for v in report.verdicts if v.outcome is Outcome.FAILED]
    return replace(report.results, failed=tuple(name.removeprefix("latency: ") for name in failed))


def write_latency(report: LatencyReport, folder: Path) -> Path:
    """Write `report.json`, `report.md` and `report.html` as a new *folder*, whole or not at all.

    Plots are left out where matplotlib is absent, and the page says so.
    """
    try:
        from harness.report.plots import draw_latency
    except ImportError:
        plots, hint = [], "Plots need matplotlib: pip install 'lora-stack-harness[plots]'."
    else:
        plots, hint = list(draw_latency(_with_failures(report), report.history)), ""
    results = report.results
    page = render(
        _TEMPLATE,
        title=f"Latency of {results.stack.get('name', '')}: {report.heading}",
        subtitle=f"{results.fingerprint.get('device') or results.fingerprint.get('cpu')}, "
        f"{results.conditions.get('dtype')}, {results.moment}",
        markers=markers(results),
        environment=_environment(results),
        checks=[v.as_json() for v in report.verdicts if not v.passed]
        or [v.as_json() for v in report.verdicts[:1]],
        counts=report.counts,
        plots=[{"title": p.title, "caption": p.caption, "uri": image_uri(p.svg)} for p in plots],
        hint=hint,
        tables=_tables(report),
    )
    with staged_folder(folder) as staged:
        text = json.dumps(as_json(report), ensure_ascii=False, indent=1) + "\n"
        (staged / "report.json").write_text(text, encoding="utf-8")
        (staged / "report.md").write_text(as_markdown(report), encoding="utf-8")
        (staged / "report.html").write_text(page, encoding="utf-8")
        for plot in plots:
            (staged / f"{plot.name}.png").write_bytes(plot.png)
    return folder
