"""Broken and hostile folders: each is refused in one line that names the file and the fault."""

import os
import resource
import threading

import pytest

from harness.cli import main
from harness.tests.hostile import base_rows, config_rows, stack_rows, tensors_rows, weights_rows
from harness.tests.hostile.folders import Folders

GROUPS = {
    "weights": weights_rows.ROWS,
    "tensors": tensors_rows.ROWS,
    "config": config_rows.ROWS,
    "base": base_rows.ROWS,
    "stack": stack_rows.ROWS,
}
ROWS = [(f"{group}: {row[0]}", *row[1:]) for group, rows in GROUPS.items() for row in rows]


@pytest.fixture(scope="session")
def sound_folders(tiny, tmp_path_factory):
    """The tiny stack's folders side by side, without a claim about the base."""
    import shutil

    root = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny.base, root / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, root / name)
        Folders.json(_At(root), f"{name}/adapter_config.json", base_model_name_or_path="../base")
    return root


class _At:
    def __init__(self, root):
        self.root = root


@pytest.fixture
def folders(sound_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    # A child's limits on processor time: what hangs, hangs for less.
    monkeypatch.setattr("harness.files.patterns._CPU_SECONDS", 1)
    monkeypatch.setattr("harness.template_probe._CPU_SECONDS", 1)
    return Folders(tmp_path / "case", sound_folders)


def test_there_are_150_rows_and_no_two_alike():
    assert len(ROWS) >= 150
    assert len({row[0] for row in ROWS}) == len(ROWS)


def test_the_folders_that_the_rows_break_are_sound(folders, capsys):
    assert main(["check-files", *folders.arguments]) == 0
    assert "sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "words", "build"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_broken_folder_is_refused_and_named(folders, capsys, file, words, build):
    build(folders)
    capsys.readouterr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = threading.active_count()
    code = main(["check-files", *folders.arguments])
    captured = capsys.readouterr()
    lines = captured.err.rstrip("\n").split("\n")
    assert code == 2, captured
    assert all(line.startswith("error: ") for line in lines), captured.err
    named = [line for line in lines if file in line and words in line]
    assert named, captured.err[:2000]
    assert all("→" in line for line in named), "how to mend it is said"
    assert "Traceback" not in captured.err
    assert captured.out == ""
    # The zero-width space is the guard that `shown` puts into what a log would take as a command.
    foreign = captured.err.replace("\n", "").replace("\u200b", "")
    assert foreign.isprintable(), "nothing of the folder's reaches the terminal unescaped"
    assert len(captured.err) < 30_000
    assert not os.path.lexists("canary"), "code of the folder's ran"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "kilobytes"
    assert threading.active_count() <= threads
