"""The README's commands and examples run as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]


@pytest.fixture
def checkout(tmp_path):
    """A folder with what a fresh clone has, in which commands may write."""
    for name in ("fixtures", "suites", "snapshots", "conftest.py", "pyproject.toml", "harness"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command, folder):
    # The scripts of this environment come first, as in an activated one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: "-".join(re.findall(r"\w+", c))[:60])
def test_command_runs_as_written(command, checkout):
    done = run(command, checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("example", blocks("python"), ids=["python"])
def test_example_runs_as_written(example, checkout):
    done = run(f"python - <<'END'\n{example}END", checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The fox softly dwells amid the hushed forest." in done.stdout


def test_first_two_commands_are_the_set_up_and_ci_runs_the_second():
    first, second = blocks("sh")
    assert first.strip().endswith(".venv/bin/lora-stack run")
    assert second.strip() in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
