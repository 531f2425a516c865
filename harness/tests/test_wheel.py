"""Installed as a wheel, in an empty folder, the command and the plugin work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the wheel's contents and nothing of the checkout."""
    pytest.importorskip("pip", reason="environments that uv makes have none")
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", wheels], check=True
    )
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "harness.cli", "run", "--modes", "base,stacked"],
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_mine.py"],
    ],
    ids=["command", "plugin"],
)
def test_wheel_works_in_an_empty_folder(installed, tmp_path, command):
    (tmp_path / "test_mine.py").write_text(
        "import harness\n"
        "def test_it(lora_completion):\n"
        f"    assert harness.__file__.startswith({str(installed)!r})\n"
        "    assert lora_completion.token_ids\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
