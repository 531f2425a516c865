"""A snapshot's two files are written and read as one, whoever else writes, whenever killed."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import snapshot_files
from harness.errors import InputError
from harness.snapshot_files import (
    Pair,
    evidence_of,
    read_pair,
    replace_pair,
    sidecar_bytes,
    sidecar_of,
    write_pair,
)

TEXT = b"form = 2\ntext = 'one'\nline three\n"


def test_pair_is_read_back(tmp_path):
    path = tmp_path / "module" / "case.toml"
    assert read_pair(path) == Pair(text=None, sidecar=None)
    write_pair(path, TEXT, b"evidence")
    assert evidence_of(read_pair(path), where=path) == b"evidence"
    assert sidecar_of(path).read_bytes() == sidecar_bytes(TEXT, b"evidence")
    write_pair(path, TEXT + b"more\n", b"other")
    assert evidence_of(read_pair(path), where=path) == b"other"
    assert sorted(os.listdir(path.parent)) == ["case.evidence", "case.toml"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_between_any_two_steps_the_old_or_the_new_is_there(tmp_path, monkeypatch, stop):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"old")
    real, calls = os.replace, []

    def stopped(source, target):
        calls.append(target)
        if len(calls) == stop:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_pair(path, b"new", b"new")
    monkeypatch.undo()
    pair = read_pair(path)
    expected = {1: (TEXT, b"old"), 2: (TEXT, b"old"), 3: (b"new", b"new")}[stop]
    assert (pair.text, evidence_of(pair, where=path)) == expected
    assert sorted(os.listdir(tmp_path)) == ["case.evidence", "case.toml"]
    write_pair(path, b"next", b"next")
    assert evidence_of(read_pair(path), where=path) == b"next"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda text: text.replace(b"one", b"two"), "line 2: was edited"),
        (lambda text: text + b"more\n", "line 4: was edited"),
        (lambda text: text[:10], "line 2: was edited"),
        (lambda text: b"", "line 1: was edited"),
        (lambda text: text.replace(b"\n", b"\r\n"), "line ends were converted"),
    ],
)
def test_edited_text_is_noticed_and_the_line_named(tmp_path, edit, complaint):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"evidence")
    path.write_bytes(edit(TEXT))
    with pytest.raises(InputError, match=complaint):
        evidence_of(read_pair(path), where=path)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_sidecar_is_never_taken_for_a_sound_one(tmp_path_factory, data):
    sound = sidecar_bytes(TEXT, b"evidence of some length")
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    damaged += data.draw(st.binary(max_size=4))
    pair = Pair(text=TEXT, sidecar=bytes(damaged))
    if bytes(damaged) == sound:
        assert evidence_of(pair, where="x.toml") == b"evidence of some length"
    else:
        with pytest.raises(InputError, match=r"x\.evidence: is damaged"):
            evidence_of(pair, where="x.toml")


def test_missing_sidecar_and_a_folder_in_the_way_are_said(tmp_path):
    path = tmp_path / "case.toml"
    path.write_bytes(TEXT)
    with pytest.raises(InputError, match=r"case\.evidence: is missing"):
        evidence_of(read_pair(path), where=path)
    sidecar_of(path).mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_pair(path)
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write_pair(path, TEXT, b"")


def test_writing_what_is_there_writes_nothing(tmp_path):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"evidence")
    before = [file.stat() for file in (path, sidecar_of(path))]
    write_pair(path, TEXT, b"evidence")
    assert [file.stat() for file in (path, sidecar_of(path))] == before
    write_pair(path, TEXT, b"other")
    assert path.stat() == before[0]
    assert evidence_of(read_pair(path), where=path) == b"other"


def held(path):
    """A lock on the sidecar, as another process that writes there holds it."""
    descriptor = os.open(sidecar_of(path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_stopped_writer_stops_no_reader_and_makes_the_next_writer_say_so(tmp_path, monkeypatch):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"evidence")
    monkeypatch.setattr("harness.snapshot_files._PATIENCE_TO_READ", 0.01)
    monkeypatch.setattr("harness.snapshot_files._PATIENCE_TO_WRITE", 0.01)
    descriptor = held(path)
    with pytest.raises(InputError, match=r"case\.toml: .*another process has held it"):
        write_pair(path, b"new", b"new")
    assert evidence_of(read_pair(path), where=path) == b"evidence"
    write_pair(tmp_path / "other.toml", b"new", b"new")  # its neighbours do not wait
    os.close(descriptor)
    write_pair(path, b"new", b"new")
    assert evidence_of(read_pair(path), where=path) == b"new"


def _no_locks(monkeypatch):
    """A file system without locks, as some network ones are."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_pairs_are_written_and_read_all_the_same(tmp_path, monkeypatch):
    _no_locks(monkeypatch)
    path = tmp_path / "case.toml"
    for text in (TEXT, b"new"):
        write_pair(path, text, text)
        assert evidence_of(read_pair(path), where=path) == text


def test_without_locks_what_stays_no_pair_is_told(tmp_path, monkeypatch):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"evidence")
    sidecar_of(path).unlink()
    _no_locks(monkeypatch)
    assert read_pair(path) == Pair(text=TEXT, sidecar=None)
    sidecar_of(path).write_bytes(sidecar_bytes(b"other", b"evidence"))
    with pytest.raises(InputError, match="line 1: was edited"):
        evidence_of(read_pair(path), where=path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be made: File exists"):
        write_pair(tmp_path / "file" / "case.toml", TEXT, b"")
    path = tmp_path / "case.toml"
    path.write_bytes(TEXT)
    sidecar_of(path).mkdir()
    with pytest.raises(InputError, match=r"case\.toml: cannot be read: Is a directory"):
        replace_pair(path, TEXT, sidecar_bytes(TEXT, b""), expected=("", ""))


def test_an_edit_that_the_marks_do_not_show_is_noticed_all_the_same(tmp_path):
    path = tmp_path / "case.toml"
    write_pair(path, b"line 0", b"evidence")
    mark = zlib.crc32(b"line 0") & 0xFF
    other = next(
        line for n in range(1, 10_000)
        if zlib.crc32(line := f"line {n}".encode()) & 0xFF == mark
    )  # fmt: skip
    path.write_bytes(other)
    with pytest.raises(InputError, match=r"case\.toml: was edited since it was accepted"):
        evidence_of(read_pair(path), where=path)


@pytest.mark.parametrize(("place", "value"), [(21, 0xFF), (24, 0xFF), (4, 2)])
def test_lengths_that_lie_under_a_right_checksum_are_damage(place, value):
    body = bytearray(sidecar_bytes(TEXT, b"evidence")[:-8])
    body[place] = value
    lying = bytes(body) + hashlib.sha256(body).digest()[:8]
    with pytest.raises(InputError, match="is damaged"):
        evidence_of(Pair(text=TEXT, sidecar=lying), where="x.toml")


@pytest.mark.parametrize("name", ["case.toml", "case.evidence"])
def test_a_pipe_in_the_place_of_a_file_is_no_wait(tmp_path, name):
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"evidence")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no regular file"):
        read_pair(path)


def test_without_locks_a_mixture_is_read_again_until_its_writer_is_through(tmp_path, monkeypatch):
    _no_locks(monkeypatch)
    path = tmp_path / "case.toml"
    write_pair(path, TEXT, b"old")
    path.write_bytes(b"new")  # a writer between its two files
    waited = []

    def finish(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            sidecar_of(path).write_bytes(sidecar_bytes(b"new", b"evidence"))

    monkeypatch.setattr(snapshot_files.time, "sleep", finish)
    assert evidence_of(read_pair(path), where=path) == b"evidence"
    assert len(waited) == 3


def test_a_lock_that_somebody_gives_back_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "case.toml"
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # before there is a sidecar, the folder is held
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 4:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    monkeypatch.setattr(snapshot_files.time, "sleep", pause)
    write_pair(path, TEXT, b"one")
    os.close(descriptor)
    assert len(pauses) == 4
    assert evidence_of(read_pair(path), where=path) == b"one"


def test_a_pair_is_replaced_only_where_the_expected_one_lies(tmp_path):
    path = tmp_path / "deep" / "case.toml"
    nothing, sidecar = ("", ""), sidecar_bytes(TEXT, b"evidence")
    assert replace_pair(path, TEXT, sidecar, expected=nothing)
    assert evidence_of(read_pair(path), where=path) == b"evidence"
    assert not replace_pair(path, b"new", sidecar_bytes(b"new", b""), expected=nothing)
    assert read_pair(path).text == TEXT
    there = tuple(hashlib.sha256(data).hexdigest() for data in (TEXT, sidecar))
    assert replace_pair(path, b"new", sidecar_bytes(b"new", b""), expected=there)
    assert read_pair(path).text == b"new"
    for damaged in (b"", sidecar, sidecar_bytes(b"new", b"")[:-1]):
        with pytest.raises(InputError, match=r"case\.evidence: is damaged, or another text's"):
            replace_pair(path, b"new", damaged, expected=there)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        replace_pair(path, b"new", sidecar_bytes(b"new", b""), expected=there)
    with pytest.raises(InputError, match="cannot be made: Not a directory"):
        write_pair(sidecar_of(path) / "x" / "case.toml", TEXT, b"")


# Every text names its evidence, so that a reader can tell a mixture. One process imports and forks.
_AT_ONCE = """
import hashlib, json, os, random, sys, time
from pathlib import Path
from harness import snapshot_files
from harness.snapshot_files import evidence_of, read_pair, write_pair

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
# Waiting for a slow disk mixes nothing.
snapshot_files._PATIENCE_TO_READ = snapshot_files._PATIENCE_TO_WRITE = 3600.0

def content(writer, number):
    evidence = os.urandom(300)
    text = f"{writer} {number} {hashlib.sha256(evidence).hexdigest()}" + "\\n" * (number % 7)
    return text.encode(), evidence

def check(path):
    pair = read_pair(path)
    evidence = evidence_of(pair, where=path)
    if hashlib.sha256(evidence).hexdigest() != pair.text.decode().split()[2]:
        raise SystemExit(f"mixed: {path}")

def work(writer):
    chance = random.Random(writer)
    for number in range(rounds):
        write_pair(root / f"case{chance.randrange(3)}.toml", *content(writer, number))
        check(root / f"case{chance.randrange(3)}.toml")
        write_pair(root / f"own{writer}-{number}.toml", *content(writer, number))

for case in range(3):
    write_pair(root / f"case{case}.toml", *content(0, 0))
children = []
for writer in range(8):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(writer)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
for path in root.glob("*.toml"):
    check(path)
print(json.dumps({"codes": codes, "files": len(list(root.iterdir()))}))
"""

# The moments are drawn up to a horizon that grows while children are caught at work and shrinks
# when they finish first, so that both happen on a machine of any speed.
_KILLED = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from harness.errors import InputError
from harness.snapshot_files import evidence_of, read_pair, write_pair

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
path = root / "case.toml"

def state():
    pair = read_pair(path)
    if pair.text is None:
        return "absent"
    try:
        evidence = evidence_of(pair, where=path)
    except InputError:
        return "unreadable"
    digest = hashlib.sha256(evidence).hexdigest()
    return pair.text.decode() if pair.text.decode().endswith(digest) else "mixed"

def content(name):
    evidence = os.urandom(200)
    return f"{name} {hashlib.sha256(evidence).hexdigest()}".encode(), evidence

horizon = 0.004
chance = random.Random(0)
seen = {"old": 0, "new": 0, "other": 0}
write_pair(path, *content("first"))
for number in range(rounds):
    before, new = state(), content(number)
    child = os.fork()
    if child == 0:
        try:
            write_pair(path, *new)
        finally:
            os._exit(0)
    time.sleep(chance.random() * horizon)
    os.kill(child, signal.SIGKILL)
    finished = os.WIFEXITED(os.waitpid(child, 0)[1])
    horizon *= 0.9 if finished else 1.05
    after = state()
    seen["old" if after == before else "new" if after == new[0].decode() else "other"] += 1
print(json.dumps(seen))
"""


def _driven(driver, folder: Path, rounds: int):
    result = subprocess.run(
        [sys.executable, "-c", driver, str(folder), str(rounds)],
        capture_output=True, text=True, check=False, timeout=1800,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_8_processes_writing_and_reading_at_once_lose_and_mix_nothing(tmp_path):
    found = _driven(_AT_ONCE, tmp_path, 12)
    assert found == {"codes": [0] * 8, "files": 2 * (3 + 8 * 12)}


def test_killed_at_random_moments_the_old_or_the_new_is_there(tmp_path):
    seen = _driven(_KILLED, tmp_path, 60)
    assert seen["other"] == 0
    assert sum(seen.values()) == 60


@pytest.mark.slow
def test_500_kills_leave_the_old_or_the_new(tmp_path):
    seen = _driven(_KILLED, tmp_path, 500)
    assert seen["other"] == 0
    assert min(seen["old"], seen["new"]) > 0
