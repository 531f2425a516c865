"""`lora-stack analyze` and `lora-stack compare`: exit codes, output, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.tests.analysis.dense import layered_adapter


def _json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_analyze_writes_a_report_and_prints_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = layered_adapter(tmp_path / "style", seed=1)
    output = tmp_path / "out"
    assert main(["analyze", str(folder), "--output", str(output), "--no-plots", "--json"]) == 0
    value = _json(capsys)
    assert value["verdict"] == "held"
    assert [check["name"] for check in value["checks"]] == ["sound: style", "trained: style"]
    assert value["report"] == str(output)
    stored = json.loads((output / "analysis.json").read_text())
    assert stored["adapters"] == value["adapters"]


def test_compare_takes_underscores_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(layered_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    argv = ["compare", *paths, "--names", "style", "instruct", "--no_plots"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "style / instruct" in out
    assert "report.html" in out
    assert main([*argv, "--output", str(tmp_path / "json"), "--json", "--weights", "1", "2"]) == 0
    value = _json(capsys)
    assert value["checks"][-1]["name"] == "overlap: style and instruct"
    assert "weighted" in {s["strategy"] for s in value["strategies"]}


def test_a_broken_adapter_exits_with_2_and_keep_going_reports_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = layered_adapter(tmp_path / "a", seed=1)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    argv = ["analyze", str(folder), "--output", str(tmp_path / "out"), "--no-plots", "--json"]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: tensor ")
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--keep-going"]) == 2
    value = _json(capsys)
    assert value["verdict"] == "unreadable"
    assert 0 < len(value["adapters"][0]["modules"]) < 6
    assert "ends at byte" in value["checks"][0]["evidence"][0]


def test_an_adapter_that_was_never_trained_exits_with_1(tmp_path: Path) -> None:
    folder = layered_adapter(tmp_path / "a", seed=1, factor=0.0)
    assert main(["analyze", str(folder), "--output", str(tmp_path / "out"), "--no-plots"]) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--intruders", "3"], "--intruders: needs a base"),
        (["--base-model", "nowhere"], "nowhere: no such folder"),
        (["--output", "."], "exists already"),
    ],
)
def test_wrong_options_exit_with_2_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    layered_adapter(tmp_path / "a", seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "a", *extra]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_one_adapter_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = layered_adapter(tmp_path / "a", seed=1)
    assert main(["compare", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "two adapters or more" in capsys.readouterr().err


def test_help_imports_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys\nfrom harness.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "import harness.analysis\n"
        "sys.exit(bool({'torch', 'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--weights" in done.stdout
