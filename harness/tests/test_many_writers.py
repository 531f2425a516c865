"""Many processes at once, and `kill -9` at random: none lost, none mixed, nothing half.

The figures of docs/reliability.md come from `python -m harness.tests.many_writers`.
"""

import json
import os
import subprocess
import sys

import pytest


def figures(*arguments):
    # Nothing of a distributed run around this one: its workers' benchmarks are not measured.
    around = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "harness.tests.many_writers", *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env=around | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def hold_together(folder, processes, snapshots, rounds):
    assert figures("together", folder, processes, snapshots, rounds) == {
        "written": processes * snapshots * rounds,
        "lost": 0, "mixed": 0, "failed": 0, "litter": 0,
    }  # fmt: skip


def hold_killed(folder, what, kills):
    found = figures("kill", folder, what, kills)
    assert found["killed"] == kills
    assert (found["partial"], found["lost"], found["litter"]) == (0, 0, 0)
    assert found["old"] + found["new"] >= kills


def test_4_processes_lose_and_mix_no_snapshot(tmp_path):
    hold_together(tmp_path, 4, 10, 3)


@pytest.mark.parametrize(("what", "kills"), [("snapshot", 25), ("benchmark", 4)])
def test_a_few_kills_leave_the_old_or_the_new(tmp_path, what, kills):
    hold_killed(tmp_path, what, kills)


@pytest.mark.slow
def test_8_processes_by_50_snapshots_by_4_rounds_lose_and_mix_none(tmp_path):
    hold_together(tmp_path, 8, 50, 4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["snapshot", "benchmark"])
def test_200_kills_leave_the_old_or_the_new(tmp_path, what):
    hold_killed(tmp_path, what, 200)


@pytest.mark.slow
def test_8_processes_on_one_checkout_do_not_meet(tmp_path, tiny):
    # Four runs and four test sessions, in one folder, at the same moment.
    (tmp_path / "p.txt").write_text("Tell me of rain.\nWhat is tea?\nGo on:\n")
    (tmp_path / "test_it.py").write_text("def test_it(lora_completion): assert lora_completion\n")
    stack = [
        f"--base-model={tiny.base}", f"--style-adapter={tiny.adapters['style']}",
        f"--instruct-adapter={tiny.adapters['instruct']}", "--prompts=p.txt", "--max-new-tokens=12",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    commands = [
        [sys.executable, "-m", "harness.cli", "run", "--json", *stack],
        [sys.executable, "-m", "pytest", "-q", "test_it.py", *stack],
    ]
    children = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for command in commands * 4
    ]
    said = [child.communicate(timeout=1800) for child in children]
    codes = [child.returncode for child in children]
    assert codes == [0] * 8, [err.decode()[-500:] for _, err in said]
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 4
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    answers = [[c["token_ids"] for c in report["completions"]] for report in reports]
    assert answers == [answers[0]] * 4
    assert not list(tmp_path.rglob(".staging*"))
