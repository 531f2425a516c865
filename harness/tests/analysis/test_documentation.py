"""The worked example runs, and every figure is defined in docs/analysis.md."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "analyze_stack.py"


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="not a checkout")
@pytest.mark.slow
def test_the_worked_example_runs_on_the_embedded_stages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "sequential: 0.0% from the plain sum" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert done.stdout.endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="not a checkout")
def test_every_figure_of_a_module_and_of_a_pair_is_defined() -> None:
    from harness.analysis.modules import ModuleFigures
    from harness.analysis.overlap import PairFigures

    text = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    plain = {
        "module", "kind", "layer", "out_features", "in_features", "rank", "scale", "dtype",
        "parameters", "bytes", "entries", "norm_first", "norm_second", "inner", "nuclear",
    }  # fmt: skip
    names = {
        f.name for figures in (ModuleFigures, PairFigures) for f in dataclasses.fields(figures)
    }
    for name in sorted(names - plain):
        shared = name.replace("column_", "…_").replace("row_", "…_")
        assert f"`{name}`" in text or f"`{shared}`" in text, name
