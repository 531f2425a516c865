"""A mode that is lost is a verdict, and the others still run."""

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from harness.errors import HarnessError, InputError
from harness.running import Collected, Request
from harness.running.isolated import run_apart
from harness.verdict import Outcome

_COMMAND = (sys.executable, "-m", "harness.tests.running.scripted_child")


def options(**values):
    from harness import cli

    parsed = cli._parser().parse_args(["run"])
    return argparse.Namespace(**(vars(parsed) | values))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(script)` runs the embedded stack in scripted children; gives what came, and how many
    children it took."""

    def run(script, *, timeout=300.0, collected=None, **values):
        monkeypatch.setenv("LORA_SCRIPT", script)
        monkeypatch.setenv("LORA_CHILDREN", str(tmp_path / "children"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        arguments = options(**values)
        request, collected, lines = Request.of(arguments), collected or Collected(), []
        run_apart(
            request, arguments, collected, timeout=timeout, loaded=lines.extend, command=_COMMAND
        )
        assert lines in (["✓ loaded"], [])
        return request, collected, len((tmp_path / "children").read_text().splitlines())

    return run


def test_a_child_that_runs_to_its_end_gives_what_it_said(run):
    request, collected, children = run("")
    assert children == 1
    assert collected.faults == {}
    assert list(collected.of(request, whole=True)) == ["base", "style", "instruct", "stacked"]
    assert collected.ran == request.planned == 32
    said = collected.of(request)["style"][0]
    assert said.text == f"style \ud800 says 你好 to {said.prompt.id}"
    assert said.prompt is request.preset.prompts[0]
    assert (collected.device, collected.dtype) == ("cpu", "float32")
    assert collected.seconds == {
        "load": 0.5, "base": 0.25, "style": 0.25, "instruct": 0.25, "stacked": 0.25
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "said", "children"),
    [
        ("kill", "killed by signal 9 (SIGKILL); the system's own out-of-memory killer", 2),
        ("exit", "ended with exit code 7", 2),
        ("memory", "out of memory: 8 GiB asked", 1),
        ("sticky", "CUDA error: device-side assert triggered", 2),
    ],
)
def test_a_mode_that_is_lost_is_named_and_the_others_run(run, what, said, children):
    request, collected, took = run(f"style=3:{what}")
    assert took == children
    (verdict,) = collected.faults.values()
    assert verdict.name == "run: style"
    assert verdict.outcome is Outcome.FAILED
    assert said in verdict.evidence[0]
    assert list(collected.of(request, whole=True)) == ["base", "instruct", "stacked"]
    assert len(collected.of(request)["style"]) == 3
    assert collected.ran == 27


def test_a_mode_that_hangs_is_ended_and_the_others_run(run, monkeypatch):
    from harness.running import isolated

    real, collected = select.select, Collected()

    def only_while_it_hangs(reading, writing, failing, room):
        # However long a machine takes to start a child and to run the other modes.
        hangs = "instruct" in collected.said and "instruct" not in collected.faults
        return real(reading, writing, failing, room if hangs else None)

    monkeypatch.setattr(isolated, "select", SimpleNamespace(select=only_while_it_hangs))
    request, _, took = run("instruct=1:hang", timeout=1.0, collected=collected)
    assert took == 2
    assert list(collected.faults) == ["instruct"]
    assert collected.faults["instruct"].evidence == ("hung: no end after 1 s",)
    assert "--timeout" in collected.faults["instruct"].remedy
    assert list(collected.of(request, whole=True)) == ["base", "style", "stacked"]


def test_several_lost_modes_are_each_named(run):
    _, collected, took = run("base=0:kill style=0:memory instruct=8:kill stacked=0:sticky")
    assert took == 3
    assert list(collected.faults) == ["base", "style", "instruct", "stacked"]
    assert collected.ran == 8


@pytest.mark.parametrize(("what", "said"), [("kill", "signal 9"), ("quit", "without a word")])
def test_a_stack_that_cannot_be_loaded_is_tried_once(run, what, said):
    request, collected, took = run(f"load=0:{what}")
    assert took == 1
    assert said in collected.faults["base"].evidence[0]
    assert collected.faults["base"].outcome is Outcome.FAILED
    assert collected.faults["stacked"].outcome is Outcome.UNDECIDED
    assert collected.of(request) == {}


def test_a_stack_that_does_not_fit_is_said_to_be_too_large(run):
    with pytest.raises(InputError, match="loading: out of memory: 8 GiB asked → lower"):
        run("load=0:full")


def test_a_bug_in_a_child_is_a_line_and_the_other_modes_run(run, capfd):
    request, collected, _ = run("style=1:bug")
    assert "ended with exit code 3" in collected.faults["style"].evidence[0]
    assert list(collected.faults) == ["style"]
    assert collected.of(request)["stacked"]
    said = capfd.readouterr().err
    assert "error: ValueError: a\nerror: bug\n" in said
    assert "Traceback" not in said


def test_a_child_that_ends_without_a_word_is_not_started_for_ever(run):
    with pytest.raises(HarnessError, match="without a word"):
        run("base=0:quit")


def test_what_the_child_refuses_is_refused_here(run, tmp_path, monkeypatch):
    # The file goes away between the parent's look and the child's.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    arguments = options(prompts=str(prompts))
    request = Request.of(arguments)
    prompts.unlink()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(InputError, match=r"prompts\.txt: the prompt file is missing"):
        run_apart(
            request, arguments, Collected(), timeout=None, loaded=print, command=_COMMAND
        )  # fmt: skip


def test_an_interrupt_before_the_first_look_loses_nothing_that_was_told(run, monkeypatch):
    from harness.running import isolated

    real, collected = isolated._child, Collected()

    @contextlib.contextmanager
    def told_all(*arguments):
        with real(*arguments) as (process, reader):
            process.wait()
            signal.raise_signal(signal.SIGINT)
            yield process, reader

    monkeypatch.setattr(isolated, "_child", told_all)
    # A shell's background job inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("style=7:kill", collected=collected)
    finally:
        signal.signal(signal.SIGINT, before)
    assert collected.ran == 15


def test_a_signal_whose_handler_goes_on_ends_no_mode(run, monkeypatch):
    from harness.running import isolated

    real, heard = isolated._child, []

    @contextlib.contextmanager
    def signalled(*arguments):
        with real(*arguments) as child:
            signal.raise_signal(signal.SIGTERM)
            yield child

    monkeypatch.setattr(isolated, "_child", signalled)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        request, collected, took = run("")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert took == 1
    assert collected.faults == {}
    assert collected.ran == request.planned


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_a_child_says_37_of_120_ran(tmp_path, number, code):
    (tmp_path / "prompts.txt").write_text("".join(f"say {n}\n" for n in range(30)))
    program = (
        "import signal, sys, harness.cli, harness.running.isolated as i\n"
        # A shell's background job inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"i.run_apart.__kwdefaults__['command'] = {_COMMAND!r}\n"
        "sys.exit(harness.cli.main(['run', '--isolate', '--prompts', 'prompts.txt',"
        " '--output', 'out']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=os.environ | {
            "LORA_SCRIPT": "style=7:hang", "LORA_CHILDREN": str(tmp_path / "children"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )  # fmt: skip
    while "hanging" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code
    assert "Traceback" not in err
    assert "interrupted: 37 of 120 ran" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["complete"], report["verdict"]) == (False, "undecided")
    assert report["ran"] == "37 of 120 ran"
    assert len(report["completions"]) == 37
    assert report["completions"][0]["text"].startswith("base \ud800 says")
    assert "- 37 of 120 ran: the run was interrupted" in (tmp_path / "out/report.md").read_text()
    child = int((tmp_path / "children").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_time_that_is_none_is_refused():
    from harness.cli import main

    for bad in ("0", "-1", "nan", "inf"):
        assert main(["run", f"--timeout={bad}"]) == 2
