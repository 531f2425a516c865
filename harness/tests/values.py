"""Values that several tests ask for: a completion, the report of a run, latencies. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason

__all__ = ["completion", "latency_cell", "latency_results", "run_report"]


def completion(prompt: Prompt | None = None, **values: Any) -> Completion:
    """A completion of *prompt*; *values* replace single fields."""
    given: dict[str, Any] = {
        "prompt": prompt or Prompt(id="p-1", text="x"),
        "mode": "stacked",
        "application": Application.LIVE,
        "prompt_token_ids": (1, 2),
        "token_ids": (3, 4),
        "text": "said",
        "stop_reason": StopReason.EOS,
        "settings": GenerationSettings(),
    }
    return Completion(**(given | values))


def run_report(tiny: Any, *, prompt: str = "x", text: str = "said", **values: Any) -> Any:
    """The report of a run of a `TinyStack` on one prompt, every mode saying *text*."""
    from harness.preset import Preset
    from harness.report.run import RunReport, judge_run
    from harness.resolve import resolve_stack

    stack = resolve_stack(base_model=tiny.base, adapters=tiny.adapters)
    asked = Prompt(id="p-1", text=prompt)
    said = {mode.name: (completion(asked, mode=mode.name, text=text),) for mode in stack.modes}
    given: dict[str, Any] = {
        "stack": stack,
        "preset": Preset(
            name="mine", description="", prompts=(asked,), settings=GenerationSettings()
        ),
        "device": "cpu",
        "dtype": "float32",
        "application": "live",
        "completions": said,
        "verdicts": judge_run(stack, said),
        "seconds": {"load": 1.0},
    }
    return RunReport(**(given | values))


def latency_cell(
    key: str = "stacked-live-b1-i16-o4",
    *,
    rounds: Sequence[float] | None = None,
    scale: float = 1.0,
    **more: Any,
) -> Any:
    """A measured cell: twenty rounds around 0.1 s, or *rounds*, times *scale*."""
    from harness.bench.cells import METRICS, CellResult, Work

    mode, _, rest = key.partition("-")
    application = rest.partition("-")[0]
    applied = application if application in ("live", "flattened", "merged") else "none"
    values = rounds or [0.1, 0.102, 0.098, 0.101, 0.099] * 4
    fields: dict[str, Any] = {
        "key": key, "mode": mode, "application": applied, "decoding": "dynamic",
        "batch_size": 1, "input_tokens": 16, "output_tokens": 4,
        "rounds": {metric: tuple(v * scale for v in values) for metric in METRICS},
        "itl_s": {"mean": 0.1, "p50": 0.1, "p90": 0.1, "p99": 0.1},
        "switch_s": (0.001,), "peak_bytes": 1 << 20,
        "prefill": Work(bytes_read=1e6, flops=1e9), "decode": Work(bytes_read=1e6, flops=1e6),
    }  # fmt: skip
    return CellResult(**fields | more)


def latency_results(*cells: Any, **more: Any) -> Any:
    """A session's results: of *cells*, or of three."""
    from harness.bench.results import Results

    made = cells or (
        latency_cell("base-b1-i16-o4"),
        latency_cell("stacked-live-b1-i16-o4"),
        latency_cell("stacked-merged-b1-i16-o4"),
    )
    fields: dict[str, Any] = {
        "cells": {cell.key: cell for cell in made},
        "fingerprint": {"kind": "cpu", "cpu": "made up", "cores": 2},
        "conditions": {"model": "m", "adapter_parameters": {}, "dtype": "float32"},
        "software": {"torch": "0"},
        "ceilings": {
            "copy_bytes_per_s": 1e10, "matmul_flops": 1e11, "matmul_dtype": "float32"
        },
        "stack": {"name": "made up", "random": False, "base": "b", "adapters": {}},
        "moment": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Results(**fields | more)
