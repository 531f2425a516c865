"""Broken and hostile folders: each is refused in one line that names the file and the fault."""

import os
import resource
import threading

import pytest

from harness.cli import main
from harness.tests.hostile.rows import ROWS


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
