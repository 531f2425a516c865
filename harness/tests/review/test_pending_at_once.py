"""Pending files that come, go and move while they are looked at; locks that are not to be had."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from harness.pending import accept, read_case, read_records, record_case
from harness.tests.review.factory import a_grid, case, recorded


def test_a_record_that_goes_away_while_it_is_recorded_again_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recorded(tmp_path, case())
    real, gone = os.utime, []

    def utime(path: Path, *times: object) -> None:
        if not gone:
            gone.append(path)
            path.unlink()
        real(path, *times)

    monkeypatch.setattr(os, "utime", utime)
    path = record_case(tmp_path, case())
    assert gone == [path]
    (record,) = read_records(tmp_path).cases
    assert read_case(record) == case()


def test_a_pipe_where_a_record_was_is_replaced(tmp_path: Path):
    path = recorded(tmp_path) / ".pending" / f"{case().name}.json"
    path.parent.mkdir()
    os.mkfifo(path)
    assert record_case(tmp_path, case()) == path
    assert path.is_file()


def test_a_file_that_a_folder_lists_twice_is_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As some file systems do with one that is replaced while they list."""
    root, real = a_grid(tmp_path), os.scandir

    @contextlib.contextmanager
    def scandir(folder: Path):
        with real(folder) as entries:
            found = list(entries)
        yield iter([*found, *(entry for entry in found if entry.is_file())])

    monkeypatch.setattr(os, "scandir", scandir)
    records = read_records(root)
    assert len(records.cases) == 12
    assert [decided.refused for decided in accept(root, records.pending)] == [None] * 4


def test_without_locks_cases_are_recorded_and_decided_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file system without locks, as some network ones are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    root = a_grid(tmp_path)
    assert [decided.refused for decided in accept(root, read_records(root).pending)] == [None] * 4
    assert not read_records(root).pending
