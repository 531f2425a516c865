"""Results made up from numbers, and a tiny shape to measure."""

import pytest

from harness.bench.cells import METRICS, CellResult, Work
from harness.bench.results import Results
from harness.embedded import embedded_folder


@pytest.fixture(scope="session")
def tiny_shape():
    """A `config.json` that is measured in milliseconds."""
    return embedded_folder() / "latency" / "config.json"


@pytest.fixture
def cell_of():
    def make(key="stacked-live-b1-i16-o4", *, rounds=None, scale=1.0, **more):
        mode, _, rest = key.partition("-")
        application = rest.partition("-")[0]
        applied = application if application in ("live", "flattened", "merged") else "none"
        values = rounds or [0.1, 0.102, 0.098, 0.101, 0.099] * 4
        fields = {
            "key": key, "mode": mode, "application": applied, "decoding": "dynamic",
            "batch_size": 1, "input_tokens": 16, "output_tokens": 4,
            "rounds": {metric: tuple(v * scale for v in values) for metric in METRICS},
            "itl_s": {"mean": 0.1, "p50": 0.1, "p90": 0.1, "p99": 0.1},
            "switch_s": (0.001,), "peak_bytes": 1 << 20,
            "prefill": Work(bytes_read=1e6, flops=1e9), "decode": Work(bytes_read=1e6, flops=1e6),
        }  # fmt: skip
        return CellResult(**fields | more)

    return make


@pytest.fixture
def results_of(cell_of):
    def make(*cells, **more):
        made = cells or (
            cell_of("base-b1-i16-o4"),
            cell_of("stacked-live-b1-i16-o4"),
            cell_of("stacked-merged-b1-i16-o4"),
        )
        fields = {
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

    return make
