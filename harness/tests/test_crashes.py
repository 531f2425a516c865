"""Killed, out of room, on a broken disk, at every call: as before or whole, and nothing left.

The figures of docs/reliability.md come from `python -m harness.tests.crashing FOLDER`.
"""

import json
import os
import subprocess
import sys

import pytest

from harness.tests.crashing_writers import CACHES, WITHOUT_A_STACK, WRITERS


def figures(folder, names):
    result = subprocess.run(
        [sys.executable, "-m", "harness.tests.crashing", str(folder), *names],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def hold(found, name):
    killed = found[name]["killed"]
    assert killed["kills"] > 5, name
    assert killed["before"] > 0, name
    assert killed["after"] > 0, name
    assert (killed["partial"], killed["litter"], killed["inputs changed"]) == (0, 0, 0), name
    for kind in ("full", "broken"):
        failed = found[name][kind]
        assert failed["other errors"] == [], name
        assert failed["faults"] == failed["clear errors"] + failed["absorbed"], name
        if name in CACHES:
            assert failed["absorbed"] > 4, name
        else:
            assert failed["clear errors"] > 4, name
        assert (failed["partial"], failed["litter"], failed["inputs changed"]) == (0, 0, 0), name


def test_files_and_folders_survive_a_kill_and_a_fault_at_every_call(tmp_path):
    found = figures(tmp_path, WITHOUT_A_STACK)
    assert set(found) == set(WITHOUT_A_STACK)
    for name in found:
        hold(found, name)


@pytest.mark.slow
def test_every_writer_survives_a_kill_and_a_fault_at_every_call(tmp_path):
    names = [name for name in WRITERS if name not in WITHOUT_A_STACK]
    found = figures(tmp_path, names)
    assert set(found) == set(names)
    for name in found:
        hold(found, name)
