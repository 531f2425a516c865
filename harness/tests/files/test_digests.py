"""Digests are of the contents, whatever is remembered."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from harness.errors import HarnessError, InputError
from harness.files import digests
from harness.files.digests import cache_folder, combined_digest, file_digests


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora-stack" / "digests"


@pytest.fixture
def large(tmp_path):
    """A file worth remembering, written long ago."""
    file = tmp_path / "shard"
    file.write_bytes(b"a" * (1 << 20))
    return file


def settle(monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**18))


def _tick(folder, moment):
    """Wait until what is written gets another time than *moment*: file systems have coarse ones."""
    while True:
        (folder / "clock").write_bytes(b"")
        if (folder / "clock").stat().st_ctime_ns > moment:
            return


def sha(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_digests_are_of_the_contents_in_order(tmp_path, large):
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert list(file_digests([small, large]).items()) == [(small, sha(small)), (large, sha(large))]


def test_large_file_is_read_once(large, monkeypatch, memory):
    settle(monkeypatch)
    expected = file_digests([large])[large]
    assert len(list(memory.iterdir())) == 1
    monkeypatch.setattr(digests, "_hashed", lambda *_: pytest.fail("read again"))
    assert file_digests([large])[large] == expected == sha(large)


@pytest.mark.parametrize("change", ["contents", "contents with the old times", "replaced"])
def test_changed_file_is_read_again(tmp_path, large, monkeypatch, change):
    settle(monkeypatch)
    file_digests([large])
    times = large.stat()
    _tick(tmp_path, times.st_ctime_ns)
    if change == "replaced":
        other = large.with_name("other")
        other.write_bytes(b"b" * (1 << 20))
        other.replace(large)
    else:
        large.write_bytes(b"b" * (1 << 20))
    if change != "contents":
        os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digests([large])[large] == sha(large)


def test_file_written_just_now_is_not_remembered(large, memory, monkeypatch):
    settled = large.stat().st_ctime_ns + 2_000_000_000
    monkeypatch.setattr(digests.time, "time_ns", lambda: settled)
    file_digests([large])
    assert not memory.exists()
    monkeypatch.setattr(digests.time, "time_ns", lambda: settled + 1)
    file_digests([large])
    assert memory.exists()


def test_file_that_was_fresh_when_its_reading_began_is_not_remembered(large, memory, monkeypatch):
    """It may have changed since, within the tick of its time."""
    clock = [large.stat().st_ctime_ns]
    read = digests._hashed

    def slowly(*given):
        clock[0] += 60 * 10**9
        return read(*given)

    monkeypatch.setattr(digests, "_hashed", slowly)
    monkeypatch.setattr(digests.time, "time_ns", lambda: clock[0])
    file_digests([large])
    assert not memory.exists()
    file_digests([large])
    assert memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": 3}', "[" * 100_000])
def test_damaged_memory_is_ignored(large, monkeypatch, memory, damage):
    settle(monkeypatch)
    file_digests([large])
    (entry,) = memory.iterdir()
    entry.write_text(damage)
    assert file_digests([large])[large] == sha(large)
    assert json.loads(entry.read_text())["sha256"] == sha(large)


@pytest.mark.parametrize("digest", [3, "abc", None])
def test_memory_of_no_digest_is_ignored(large, monkeypatch, memory, digest):
    settle(monkeypatch)
    file_digests([large])
    (entry,) = memory.iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": digest}))
    assert file_digests([large])[large] == sha(large)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match="gone: cannot be read"):
        file_digests([tmp_path / "gone"])


def test_without_a_place_for_the_memory_digests_still_come(large, monkeypatch, tmp_path):
    settle(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digests([large])[large] == sha(large)


def test_cache_folder_ignores_a_relative_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("x") == tmp_path / ".cache" / "lora-stack" / "x"


def test_combined_digest_does_not_depend_on_the_order():
    assert combined_digest({"a": "1", "b": "2"}) == combined_digest({"b": "2", "a": "1"})
    assert combined_digest({"a": "1", "b": "2"}) != combined_digest({"a": "2", "b": "1"})


def test_ctrl_c_does_not_wait_for_what_is_being_read(large, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_bytes(large.read_bytes())
    stopped = []

    def hashed(file, stop):
        if Path(file.name) == other:
            stopped.append(stop.wait(60))
        return "0" * 64

    def interrupt(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(digests, "_hashed", hashed)
    with pytest.raises(KeyboardInterrupt):
        file_digests([large, other], progress=interrupt)
    assert all(stopped)  # empty where there is one core: the second was not begun


def test_nothing_more_is_read_once_it_is_stopped(large):
    stop = threading.Event()
    stop.set()
    with pytest.raises(HarnessError, match="stopped"):
        file_digests([large], stop=stop)
