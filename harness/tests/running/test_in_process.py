"""In one process: a mode that runs out of memory is not the last; a broken device is."""

import pytest


@pytest.fixture
def run(tiny, monkeypatch):
    """`run(mode=error)` runs the tiny stack; the modes named raise after their first batch."""
    from harness.cli import _parser
    from harness.engines.peft import PeftEngine
    from harness.running import Collected, Request
    from harness.running.in_process import run_here

    def run(**errors):
        real = PeftEngine.generate

        def generate(self, prompts, mode, *arguments, **named):
            if mode.name in errors:
                real(self, prompts[:2], mode, *arguments, **named)
                raise errors[mode.name]
            return real(self, prompts, mode, *arguments, **named)

        monkeypatch.setattr(PeftEngine, "generate", generate)
        arguments = _parser().parse_args(
            ["run", "--style-adapter", str(tiny.adapters["style"]), "--max-new-tokens", "2",
             "--instruct-adapter", str(tiny.adapters["instruct"]), "--base-model", str(tiny.base)]
        )  # fmt: skip
        request, collected = Request.of(arguments), Collected()
        run_here(request, collected, loaded=lambda lines: None)
        return request, collected

    return run


def cuda_error():
    import torch

    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind("CUDA error: device-side assert triggered\nCUDA kernel errors might be …")


def test_a_mode_without_memory_is_named_and_the_others_run(run):
    import torch

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried …"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory …"),
    ):
        request, collected = run(style=error)
        (verdict,) = collected.faults.values()
        assert verdict.name == "run: style"
        assert verdict.outcome == "failed"
        assert verdict.evidence[0].startswith("out of memory")
        assert "--batch-size" in verdict.remedy
        assert list(collected.of(request, whole=True)) == ["base", "instruct", "stacked"]
        assert len(collected.of(request)["style"]) == 2


def test_after_a_broken_device_the_rest_is_said_not_to_have_run(run):
    for error in (cuda_error(), RuntimeError("CUDA error: an illegal memory access")):
        request, collected = run(instruct=error)
        assert [(v.name, v.outcome) for v in collected.faults.values()] == [
            ("run: instruct", "failed"), ("run: stacked", "undecided")
        ]  # fmt: skip
        assert "--isolate" in collected.faults["stacked"].remedy
        assert list(collected.of(request, whole=True)) == ["base", "style"]


def test_a_bug_is_not_taken_for_the_machine(run):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(style=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_real_children_that_are_killed_or_run_out_of_memory(tiny, tmp_path, monkeypatch):
    import json
    import os
    import subprocess
    import sys

    child = (
        "import os, harness.engines.peft as p, torch\n"
        "real = p.PeftEngine.generate\n"
        "def generate(self, prompts, mode, *a, **k):\n"
        "    if mode.name == 'style': os.kill(os.getpid(), 9)\n"
        "    if mode.name == 'instruct': torch.empty(1 << 50)\n"
        "    return real(self, prompts, mode, *a, **k)\n"
        "p.PeftEngine.generate = generate\n"
        "import harness.running.child as c; c.main()\n"
    )
    program = (
        "import sys, harness.cli, harness.running.isolated as i\n"
        f"i.run_apart.__kwdefaults__['command'] = (sys.executable, '-c', {child!r})\n"
        "sys.exit(harness.cli.main(['run', '--timeout', '300', '--max-new-tokens', '2', '--json',"
        f" '--base-model', {str(tiny.base)!r}, '--style-adapter', {str(tiny.adapters['style'])!r},"
        f" '--instruct-adapter', {str(tiny.adapters['instruct'])!r}]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["verdict"] == "failed"
    lost = {c["name"]: c["evidence"][0] for c in report["checks"] if c["name"].startswith("run:")}
    assert "signal 9" in lost["run: style"]
    assert "out of memory" in lost["run: instruct"]
    assert set(lost) == {"run: style", "run: instruct"}
    assert {c["mode"] for c in report["completions"]} == {"base", "stacked"}
