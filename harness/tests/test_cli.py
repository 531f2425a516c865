"""The command: exit codes, one-line errors, JSON alone on standard output."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return main(["run", *arguments])


def test_embedded_stack_runs_in_an_empty_folder(capsys, tmp_path):
    assert run("--preset", "elegant_style") == 0
    out = capsys.readouterr().out
    assert "no stack was named" in out
    assert "W = W_base + ΔW_style + ΔW_instruct" in out
    assert "✓ stacked: style + instruct active in every layer" in out
    assert "verdict: held" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert {file.name for file in folder.iterdir()} == {"report.json", "report.md"}
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"] == "held"
    assert {c["mode"] for c in report["completions"]} == {"base", "style", "instruct", "stacked"}


def test_json_is_alone_on_standard_output(capsys, tiny):
    code = run("--lora-model", str(tiny.adapters["style"]), "--max-new-tokens", "3", "--json")
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["verdict"] == "held"
    assert all(set(c) == {"name", "verdict", "evidence", "remedy"} for c in report["checks"])


def test_underscores_are_dashes(capsys, tiny):
    code = run(
        f"--base_model={tiny.base}", "--style_adapter", str(tiny.adapters["style"]),
        "--instruct_adapter", str(tiny.adapters["instruct"]), "--max_new_tokens=2",
        "--modes", "base,stacked", "--output", "out_put",
    )  # fmt: skip
    assert code == 0
    assert os.listdir() == ["out_put"]
    report = json.loads(Path("out_put/report.json").read_text())
    assert report["stack"]["base"]["chosen_by"] == "--base-model"


def test_same_folders_elsewhere_give_the_same_tokens(capsys, tiny, tmp_path_factory):
    import shutil

    from harness.resolve import StackOptions, stack_from_options

    stack = stack_from_options(StackOptions())
    root = stack.base.path.parent
    elsewhere = tmp_path_factory.mktemp("copied") / "anywhere"
    shutil.copytree(root, elsewhere)
    found = []
    for place in (root, elsewhere):
        style, instruct = (place / a.path.relative_to(root) for a in stack.adapters)
        run("--style-adapter", str(style), "--instruct-adapter", str(instruct), "--json")
        report = json.loads(capsys.readouterr().out)
        found.append([(c["prompt"], c["mode"], c["token_ids"]) for c in report["completions"]])
    assert found[0] == found[1]
    assert len(found[0]) == 32


def test_verdict_that_does_not_pass_is_exit_code_1(capsys):
    # Two tokens are too few to see whether the stacked mode stops, which its stack.toml promises.
    assert run("--max-new-tokens", "2") == 1
    assert "✗ stopping: stacked: undecided" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--style-adapter", "x"], "--style-adapter"),
        (["--lora-model", "./nowhere"], "./nowhere"),
        (["--base-model", "./nowhere"], "./nowhere"),
        (["--preset", "elegant_stile"], "elegant_style"),
        (["--prompts", "nope.toml"], "nope.toml"),
        (["--prompts", "a.txt", "--preset", "b"], "--preset and --prompts"),
        (["--modes", "stackde"], "stackde"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--device", "cuda:77"], "--device"),
        (["--dtype", "int3"], "--dtype"),
        (["--adapter", "nopath"], "--adapter"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, named):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert "→" in line
    assert os.listdir() == []


@pytest.mark.parametrize("arguments", [["rnu"], ["run", "--presset", "x"], [], ["run", "--device"]])
def test_bad_usage_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_existing_output_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert run("--output", "out") == 2
    assert os.listdir("out") == ["mine"]


def test_fault_of_our_own_is_exit_code_3_without_a_traceback(capsys, monkeypatch):
    monkeypatch.setattr("harness.commands.run.run", lambda _: 1 / 0)
    assert run() == 3
    assert "please report" in capsys.readouterr().err


def test_interrupted_run_ends_with_a_partial_report(tmp_path):
    code = (
        "import signal, sys, harness.cli, harness.engines.peft as p\n"
        # A shell's background job inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = p.PeftEngine.generate\n"
        "def generate(self, prompts, mode, *a, **k):\n"
        "    if mode.name == 'stacked': print('here', flush=True); import time; time.sleep(600)\n"
        "    return real(self, prompts, mode, *a, **k)\n"
        "p.PeftEngine.generate = generate\n"
        "sys.exit(harness.cli.main(['run', '--output', 'out', '--max-new-tokens', '3']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "here" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "24 of 32 ran" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["complete"], report["verdict"]) == (False, "undecided")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import sys, harness.cli\n"
        f"try: harness.cli.main({arguments!r})\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora-stack" in done.stdout


def test_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m harness.cli run --max-new-tokens 2 --json | head -c 1",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_fit_is_no_bug_of_ours(capsys, monkeypatch):
    import harness.engines

    def load(*_, **__):
        raise MemoryError("8 GiB asked")

    monkeypatch.setattr(harness.engines, "load_engine", load)
    assert run("--preset", "elegant_style") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of memory: 8 GiB asked → lower --batch-size or --max-new-tokens, or choose a "
        "smaller --dtype"
    )


def test_what_was_generated_is_shown_where_the_report_cannot_be_written(capsys, monkeypatch):
    import harness.report.run
    from harness.errors import InputError

    def write(report, folder):
        raise InputError("cannot be written: No space left on device", where=folder)

    monkeypatch.setattr(harness.report.run, "write_run", write)
    assert run("--preset", "elegant_style", "--modes", "base", "--output", "out") == 2
    said = capsys.readouterr()
    assert "verdict: " in said.out
    assert "report.md" not in said.out
    assert said.err.splitlines()[-1] == "error: out: cannot be written: No space left on device"
