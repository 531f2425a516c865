"""What else belongs in a report on adapters: a merge, what the modes said, latency results.

Each becomes one or more tables (`Section`), from values or from what other commands wrote: the
folder of `lora-stack run`, the JSON of `lora-stack bench` or of any `pytest --benchmark-json`.
Knows nothing of figures of adapters.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.files.strict_json import read_json_object

if TYPE_CHECKING:
    from harness.completion import Completion
    from harness.merge import MergeReport

__all__ = [
    "Section",
    "benchmark_section",
    "latency_section",
    "merge_section",
    "outputs_section",
    "run_sections",
]

_OUTPUTS = "What each mode says"
_LATENCY = "Latency"
_SAID = ("mode", "prompt", "completion", "stopped by", "tokens")
_RUN_REMEDY = "give the folder that `lora-stack run --output` wrote"
_BENCHMARK_REMEDY = "give the file of `lora-stack bench` or of `pytest --benchmark-json`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One table of a report, under a title, with words before it."""

    title: str
    text: str
    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def merge_section(report: MergeReport) -> Section:
    """How a merge went."""
    lines = [line.removeprefix("- ") for line in report.summary()]
    rows = (
        ("output", report.output),
        ("strategy", report.strategy),
        ("dtype", report.dtype),
        ("bytes written", report.bytes_written),
        *(("result", line) for line in (*lines, *report.notes)),
    )
    return Section(title="Merge", text="", head=("what", "value"), rows=rows)


def outputs_section(completions: Mapping[str, Iterable[Completion]]) -> Section:
    """What each mode said, by mode."""
    rows = tuple(
        (mode, c.prompt.id, c.text, c.stop_reason.value, len(c.token_ids))
        for mode, said in completions.items()
        for c in said
    )
    return Section(title=_OUTPUTS, text="", head=_SAID, rows=rows)


def latency_section(results: Mapping[str, Mapping[str, float]]) -> Section:
    """Latency figures, a row each: `{"stacked": {"ttft_ms": 31.0}}`."""
    columns = tuple(dict.fromkeys(key for row in results.values() for key in row))
    rows = tuple((name, *(row.get(key) for key in columns)) for name, row in results.items())
    return Section(title=_LATENCY, text="", head=("what", *columns), rows=rows)


def run_sections(source: Path) -> tuple[Section, ...]:
    """The verdicts, the modes and what they said, from the folder (or `report.json`) of a run.

    Raises:
        InputError: no such file, or it is not the report of a run.
    """
    path = source / "report.json" if source.is_dir() else source
    value = read_json_object(path, what="the report of a run", remedy=_RUN_REMEDY)
    checks = _objects(value, "checks", path, _RUN_REMEDY)
    modes = _objects(value, "summary", path, _RUN_REMEDY)
    said = _objects(value, "completions", path, _RUN_REMEDY)
    where = f"{_text(value, 'device')}, {_text(value, 'dtype')}, {_text(value, 'application')}"
    return (
        Section(
            title=f"Run: {_text(value, 'verdict')}",
            text=f"On {where}; from {path}.",
            head=("check", "verdict", "evidence", "remedy"),
            rows=tuple(
                (c.get("name"), c.get("verdict"), _joined(c.get("evidence")), c.get("remedy"))
                for c in checks
            ),
        ),
        Section(
            title="Modes",
            text="",
            head=("mode", "weights", "completions", "stopped", "mean tokens", "seconds"),
            rows=tuple(
                tuple(
                    m.get(key)
                    for key in (
                        "mode", "formula", "completions", "stopped", "mean_tokens", "seconds",
                    )
                )
                for m in modes
            ),
        ),
        Section(
            title=_OUTPUTS,
            text="",
            head=_SAID,
            rows=tuple(
                tuple(c.get(key) for key in ("mode", "prompt", "text", "stop_reason", "tokens"))
                for c in said
            ),
        ),
    )  # fmt: skip


def benchmark_section(path: Path) -> Section:
    """The results in a file of pytest-benchmark's form, milliseconds.

    Cells that `lora-stack bench` measured also have their time to the first token and their
    tokens a second.

    Raises:
        InputError: no such file, or it holds no benchmarks.
    """
    value = read_json_object(path, what="a file of results", remedy=_BENCHMARK_REMEDY)
    benchmarks = _objects(value, "benchmarks", path, _BENCHMARK_REMEDY)
    if not benchmarks:
        raise InputError("holds no benchmark", where=path, remedy=_BENCHMARK_REMEDY)
    columns = ("median ms", "mean ms", "stddev ms", "min ms", "max ms", "rounds")
    ours: tuple[str, ...] = ("first token ms", "output tokens/s", "prefill tokens/s")
    rows = []
    for benchmark in benchmarks:
        stats = benchmark.get("stats")
        if not isinstance(stats, dict):
            raise InputError(
                f"benchmark {benchmark.get('name')!r} has no stats",
                where=path,
                remedy=_BENCHMARK_REMEDY,
            )
        times = (_milliseconds(stats.get(name.partition(" ")[0])) for name in columns[:-1])
        rows.append((benchmark.get("name"), *times, stats.get("rounds"), *_cell(benchmark)))
    if all(figure is None for row in rows for figure in row[-len(ours) :]):
        ours, rows = (), [row[: -len(ours)] for row in rows]
    machine = value.get("machine_info")
    names = machine if isinstance(machine, dict) else {}
    device = names.get("gpu") or names.get("processor") or names.get("machine") or "unknown"
    return Section(
        title=_LATENCY,
        text=f"Measured on {device}, {value.get('datetime') or 'at an unknown time'}; from {path}.",
        head=("benchmark", *columns, *ours),
        rows=tuple(rows),
    )


def _cell(benchmark: Mapping[str, Any]) -> tuple[float | None, ...]:
    extra = benchmark.get("extra_info")
    cell = extra.get("lora") if isinstance(extra, dict) else None
    if not isinstance(cell, dict):
        return (None, None, None)
    rounds = cell.get("rounds")
    first = rounds.get("ttft_s") if isinstance(rounds, dict) else None
    known = [x for x in first if isinstance(x, (int, float))] if isinstance(first, list) else []
    return (
        _milliseconds(statistics.median(known)) if known else None,
        _number(cell.get("output_tokens_per_s")),
        _number(cell.get("prefill_tokens_per_s")),
    )


def _objects(
    value: Mapping[str, Any], key: str, path: Path, remedy: str
) -> Sequence[Mapping[str, Any]]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"has no list of objects {key!r}", where=path, remedy=remedy)
    return found


def _text(value: Mapping[str, Any], key: str) -> str:
    return str(value.get(key) or "unknown")


def _joined(evidence: Any) -> str:
    return "; ".join(map(str, evidence)) if isinstance(evidence, list) else str(evidence or "")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _milliseconds(seconds: Any) -> float | None:
    return None if (number := _number(seconds)) is None else number * 1e3
