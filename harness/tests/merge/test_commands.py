"""`lora-stack merge` and `lora-stack flatten` as they are written in the documentation."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from harness.cli import main


def test_the_documented_merge_works_with_both_spellings(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, path in {"model": tiny.base, "adapter1": tiny.adapters["style"],
                       "adapter2": tiny.adapters["instruct"]}.items():  # fmt: skip
        (tmp_path / name).symlink_to(path)
    line = "merge --base model --adapters adapter1 adapter2 --output {} "
    assert (
        main((line.format("merged") + "--merge-strategy weighted --weights 0.7 0.3").split()) == 0
    )
    assert main((line.format("again") + "--merge_strategy weighted --weights 0.7 0.3").split()) == 0
    out = capsys.readouterr().out
    assert "equal the rounded float64 result" in out
    weights = [tmp_path / name / "model.safetensors" for name in ("merged", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("command", ["merge", "flatten"])
def test_json_is_one_object_with_verdict_and_checks(tiny, tmp_path, capsys, command):
    arguments = [command, "--adapters", *map(str, tiny.adapters.values()), "--json"]
    arguments += ["--output", str(tmp_path / "out")]
    if command == "merge":
        arguments += ["--base", str(tiny.base), "--max-rounding-loss", "0.5"]
    assert main(arguments) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["verdict"] == "held"
    assert {check["name"] for check in value["checks"]} <= {"proof", "rounding"}
    assert all(set(c) == {"name", "verdict", "evidence", "remedy"} for c in value["checks"])
    assert value["kind"] == command


def test_a_failed_gate_exits_1_and_bad_input_2(tiny, tmp_path, capsys):
    line = ["merge", "--base", str(tiny.base), "--adapters", str(tiny.adapters["style"])]
    line += ["--output", str(tmp_path / "out")]
    assert main([*line, "--dtype", "bfloat16", "--max-rounding-loss", "1e-9", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["verdict"] == "failed"
    assert main([*line, "--merge-strategy", "weighted", "--weights", "nan"]) == 2
    assert "not a finite number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _read_to_the_end(terminal):
    """What is written to it; read while it is: a terminal that nobody reads fills up."""
    said = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while data := os.read(terminal, 1 << 16):
            said += data
    os.close(terminal)
    return said


def test_a_terminal_sees_bytes_and_time_left_and_a_pipe_sees_no_bar(tiny, tmp_path):
    code = "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "merge", "--base", str(tiny.base)]
    line += ["--adapters", str(tiny.adapters["style"]), "--output"]
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*line, str(tmp_path / "shown")], stderr=theirs, stdout=subprocess.DEVNULL,
        env=os.environ | settings,
    ) as shown:  # fmt: skip
        os.close(theirs)
        said = _read_to_the_end(ours).decode()
    assert shown.returncode == 0, said
    assert re.search(r"(\d+\.\d)/\1 kB\S* \S*\d:\d\d:\d\d", said), said
    piped = subprocess.run(
        [*line, str(tmp_path / "piped")], capture_output=True, text=True, check=True,
        env=os.environ | settings,
    )  # fmt: skip
    assert piped.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--base", "B", "--output", "O", "--adapters"]])
def test_help_and_mistakes_import_no_torch_and_neither_does_merging(tiny, tmp_path, arguments):
    if "--base" in arguments:
        arguments = ["--base", str(tiny.base), "--output", str(tmp_path / "out"), "--adapters"]
        arguments += [str(path) for path in tiny.adapters.values()]
    code = (
        "import sys\nfrom harness.cli import main\n"
        "try:\n    main(['merge', *sys.argv[1:]])\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.stderr.strip() == "False"
