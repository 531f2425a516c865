"""Results as a file: pytest-benchmark's JSON, with what its fields have no room for.

`lora-stack bench` and `pytest --benchmark-json` write the same form, so that
`pytest-benchmark compare` reads both, and the gate too. What is ours lies in
`extra_info.lora` of each benchmark and in `lora_stack` at the top. Knows nothing of measuring.
"""

from __future__ import annotations

import datetime
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.bench.cells import METRICS, CellResult, Work
from harness.errors import InputError
from harness.files.strict_json import read_json_object

__all__ = [
    "Results",
    "as_benchmark_json",
    "cell_as_json",
    "joined",
    "read_results",
    "results_in",
    "session_as_json",
]

FORMAT = 1
_REMEDY = "measure it again: lora-stack bench --output DIR, or pytest --benchmark-json=FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One session's measurements.

    Attributes:
        cells: by key.
        skipped: why a cell could not be measured, by key.
        fingerprint: the hardware (`harness.bench.device.fingerprint`).
        conditions: what was measured: the model's numbers, the adapters' sizes, the dtype.
        software: versions.
        ceilings: `copy_bytes_per_s`, `matmul_flops`, `matmul_dtype`; empty where not measured.
        stack: name, base and adapters in words; `random` is True for a shape without weights.
        in_turn: whether round n of every cell ran in one turn, so that rounds pair up.
        commit: `id`, `time`, `branch` as pytest-benchmark records them.
        moment: ISO 8601, UTC.
        interrupted: how far a session came that did not get to its end; empty for a whole one.
        verdict: of the gate that judged these results, where one did.
        failed: `key metric` of what failed that gate.
    """

    cells: Mapping[str, CellResult]
    skipped: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, Any]
    conditions: Mapping[str, Any]
    software: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    stack: Mapping[str, Any] = field(default_factory=dict)
    load_s: float | None = None
    in_turn: bool = False
    commit: Mapping[str, Any] = field(default_factory=dict)
    moment: str = ""
    interrupted: str = ""
    source: str = ""
    verdict: str | None = None
    failed: tuple[str, ...] = ()

    @property
    def random(self) -> bool:
        return bool(self.stack.get("random"))

    def share(self, cell: CellResult, which: str) -> float | None:
        """Which share of the roofline was reached, 0 to 1: `decode` or `prefill`."""
        work = cell.decode if which == "decode" else cell.prefill
        if work is None or not self.ceilings:
            return None
        floor = work.floor_s(
            bandwidth=float(self.ceilings["copy_bytes_per_s"]),
            rate=float(self.ceilings["matmul_flops"]),
        )
        return floor / cell.median("tpot_s" if which == "decode" else "ttft_s")


def joined(launches: Sequence[Results]) -> Results:
    """The results of one side that was started several times: all rounds, one after the other.

    Percentiles of the gaps are the means of the launches'; the best ceilings stand for all.
    """
    first = launches[0]
    cells: dict[str, CellResult] = {}
    for key, cell in first.cells.items():
        parts = [launch.cells[key] for launch in launches if key in launch.cells]
        peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
        cells[key] = replace(
            cell,
            rounds={m: tuple(v for part in parts for v in part.rounds[m]) for m in METRICS},
            itl_s={
                name: statistics.fmean(part.itl_s[name] for part in parts) for name in cell.itl_s
            },
            switch_s=tuple(seconds for part in parts for seconds in part.switch_s),
            peak_bytes=max(peaks) if peaks else None,
            device_states=tuple(state for part in parts for state in part.device_states),
        )
    ceilings = dict(first.ceilings)
    for name in ("copy_bytes_per_s", "matmul_flops"):
        if name in ceilings:
            ceilings[name] = max(float(launch.ceilings[name]) for launch in launches)
    return replace(first, cells=cells, ceilings=ceilings)


def session_as_json(results: Results) -> dict[str, Any]:
    """The top-level `lora_stack` object: everything but the cells."""
    return {
        "format": FORMAT,
        "stack": dict(results.stack),
        "fingerprint": dict(results.fingerprint),
        "conditions": dict(results.conditions),
        "software": dict(results.software),
        "ceilings": dict(results.ceilings),
        "load_s": results.load_s,
        "in_turn": results.in_turn,
        "skipped": dict(results.skipped),
        **({"interrupted": results.interrupted} if results.interrupted else {}),
    }


def cell_as_json(cell: CellResult) -> dict[str, Any]:
    """One cell as plain values: `extra_info.lora` of its benchmark."""
    return {
        **asdict(cell),
        "output_tokens_per_s": cell.output_tokens_per_s,
        "prefill_tokens_per_s": cell.prefill_tokens_per_s,
    }


def as_benchmark_json(results: Results) -> dict[str, Any]:
    """The whole as pytest-benchmark writes it; times are end to end."""
    return {
        "machine_info": {
            "node": platform.node(),
            "processor": platform.processor(),
            "machine": platform.machine(),
            "system": platform.system(),
            "release": platform.release(),
            "python_version": platform.python_version(),
            "cpu": {"brand_raw": results.fingerprint.get("cpu", "")},
            **_flat(results),
        },
        "commit_info": dict(results.commit),
        "benchmarks": [
            {
                "group": f"b{cell.batch_size}",
                "name": f"latency[{cell.key}]",
                "fullname": f"lora-stack bench::latency[{cell.key}]",
                "params": None,
                "param": cell.key,
                "extra_info": {"lora": cell_as_json(cell)},
                "options": {"timer": "perf_counter", "warmup": True},
                "stats": _stats(cell.rounds["e2e_s"]),
            }
            for cell in results.cells.values()
        ],
        "datetime": results.moment or datetime.datetime.now(datetime.UTC).isoformat(),
        "version": _benchmark_version(),
        "lora_stack": session_as_json(results),
    }


def _flat(results: Results) -> dict[str, Any]:
    return {
        "gpu": results.fingerprint.get("device"),
        "driver": results.software.get("driver"),
        "cuda": results.software.get("cuda"),
        "versions": dict(results.software),
    }


def _benchmark_version() -> str:
    try:
        return version("pytest-benchmark")
    except PackageNotFoundError:
        return "5.1.0"


def _stats(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    many = len(ordered) > 1
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if many else (
        ordered[0], ordered[0], ordered[0]
    )  # fmt: skip
    mean = statistics.fmean(ordered)
    return {
        "min": ordered[0], "max": ordered[-1], "mean": mean,
        "stddev": statistics.stdev(ordered) if many else 0.0, "rounds": len(ordered),
        "median": median, "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": 0,
        "stddev_outliers": 0, "outliers": "0;0", "ld15iqr": ordered[0], "hd15iqr": ordered[-1],
        "ops": 1 / mean, "total": sum(ordered), "data": list(values), "iterations": 1,
    }  # fmt: skip


def read_results(path: Path) -> Results:
    """Results from a file of `lora-stack bench` or of `pytest --benchmark-json`.

    Raises:
        InputError: no such file, no JSON, no results of ours in it, or a cell that is broken.
    """
    return results_in(read_json_object(path, what="a file of results", remedy=_REMEDY), str(path))


def results_in(document: Mapping[str, Any], path: str) -> Results:
    """The results in a document of that form; *path* says where errors are.

    Raises:
        InputError: as `read_results`.
    """
    session, listed = document.get("lora_stack"), document.get("benchmarks")
    if not isinstance(session, dict) or not isinstance(listed, list):
        raise InputError("holds no latency results of this harness", where=path, remedy=_REMEDY)
    if session.get("format") != FORMAT:
        raise InputError(
            f"has format {session.get('format')!r}, this version reads {FORMAT}",
            where=path,
            remedy=_REMEDY,
        )
    if interrupted := session.get("interrupted"):
        raise InputError(
            f"is of a session that was interrupted: {interrupted}", where=path, remedy=_REMEDY
        )
    cells: dict[str, CellResult] = {}
    for benchmark in listed:
        ours = benchmark.get("extra_info", {}) if isinstance(benchmark, dict) else {}
        if not isinstance(ours, dict) or "lora" not in ours:
            continue
        cell = _cell(ours["lora"], path)
        if cell.key in cells:
            raise InputError(f"holds {cell.key!r} twice", where=path, remedy=_REMEDY)
        cells[cell.key] = cell
    if not cells:
        raise InputError("holds no measured cell", where=path, remedy=_REMEDY)
    parts = {
        name: session.get(name)
        for name in ("stack", "fingerprint", "conditions", "software", "ceilings", "skipped")
    }
    for name, value in parts.items():
        if not isinstance(value, dict):
            raise InputError(f"lora_stack.{name} is no object", where=path, remedy=_REMEDY)
    commit = document.get("commit_info")
    judged = document.get("checks")
    failing = [
        str(check["name"]).removeprefix("latency: ")
        for check in (judged if isinstance(judged, list) else [])
        if isinstance(check, dict) and check.get("verdict") == "failed" and "name" in check
    ]
    load_s = session.get("load_s")
    return Results(
        cells=cells,
        load_s=float(load_s) if isinstance(load_s, int | float) else None,
        in_turn=session.get("in_turn") is True,
        commit=commit if isinstance(commit, dict) else {},
        moment=str(document.get("datetime", "")),
        source=path,
        verdict=document["verdict"] if isinstance(document.get("verdict"), str) else None,
        failed=tuple(failing),
        **parts,  # type: ignore[arg-type]
    )


def _cell(value: Any, path: str) -> CellResult:
    try:
        rounds = {
            metric: tuple(_time(number) for number in value["rounds"][metric]) for metric in METRICS
        }
        return CellResult(
            key=str(value["key"]),
            mode=str(value["mode"]),
            application=str(value["application"]),
            decoding=str(value["decoding"]),
            batch_size=int(value["batch_size"]),
            input_tokens=int(value["input_tokens"]),
            output_tokens=int(value["output_tokens"]),
            rounds=rounds,
            itl_s={str(k): _seconds(v) for k, v in value["itl_s"].items()},
            switch_s=tuple(_seconds(number) for number in value["switch_s"]),
            peak_bytes=None if value["peak_bytes"] is None else int(value["peak_bytes"]),
            prefill=_work(value["prefill"]),
            decode=_work(value["decode"]),
            device_states=tuple(dict(state) for state in value["device_states"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"a measured cell is broken: {error!r}", where=path, remedy=_REMEDY
        ) from error


def _time(value: Any) -> float:
    if (number := _seconds(value)) == 0:
        raise ValueError(f"a generation that took {value!r} seconds")
    return number


def _seconds(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0 or isinstance(value, bool):
        raise ValueError(f"{value!r} is no time")
    return number


def _work(value: Any) -> Work | None:
    if value is None:
        return None
    return Work(bytes_read=_seconds(value["bytes_read"]), flops=_seconds(value["flops"]))
