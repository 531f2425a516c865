"""Files and folders are written whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.errors import InputError
from harness.files.staging import (
    check_file_place,
    check_place,
    new_run_folder,
    staged_folder,
    write_bytes,
    write_text,
)


@pytest.fixture(autouse=True)
def _nothing_swept_yet(monkeypatch):
    """A folder gets the number of one that this process has swept and somebody has removed."""
    monkeypatch.setattr("harness.files.staging._swept", set())


def test_text_is_written_with_its_folder(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "Grüße 你好\r\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Grüße 你好\r\n".encode()
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_folder_appears_when_the_block_ends(tmp_path):
    with staged_folder(tmp_path / "out") as staged:
        (staged / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_failure_leaves_the_old_folder_and_no_litter(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def fail_half_way():
        with staged_folder(tmp_path / "out", replace=True) as staged:
            (staged / "new").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_only_the_new_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("harness.files.staging._exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with staged_folder(tmp_path / "out", replace=True) as staged:
        (staged / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_full_folder_and_file_are_refused_before_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    for name, complaint in [("full", "is not empty"), ("file", "is a file")]:
        with pytest.raises(InputError, match=complaint), staged_folder(tmp_path / name):
            pytest.fail("the block ran")


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_bytes(tmp_path, b"")


def test_killed_writer_leaves_nothing_visible_and_is_swept(tmp_path):
    code = (
        "import sys, time, pathlib; from harness.files.staging import staged_folder\n"
        f"with staged_folder(pathlib.Path({str(tmp_path / 'out')!r})) as s:\n"
        "    (s / 'half').write_text('half'); print('ready', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    old = time.time() - 5
    for litter in tmp_path.iterdir():
        os.utime(litter, (old, old))
    with staged_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_run_folders_do_not_collide(tmp_path):
    assert len({new_run_folder(tmp_path, 0.0) for _ in range(50)}) == 50
    assert new_run_folder(tmp_path, 0.0).name.startswith("19700101T000000Z-")


def test_place_is_checked_before_work_and_left_as_it_was(tmp_path):
    from harness.files.staging import check_place

    check_place(tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError):
            check_place(bad)


def aged(path, seconds=60):
    old = time.time() - seconds
    os.utime(path, (old, old), follow_symlinks=False)
    return path


def test_litter_is_swept_by_the_next_writer_and_what_is_held_is_not(tmp_path, monkeypatch):
    import fcntl

    from harness.files import staging

    now = time.time()
    monkeypatch.setattr(staging.time, "time", lambda: now)  # young stays young
    (tmp_path / ".staging-dead").mkdir()
    (tmp_path / ".staging-dead" / "half").write_text("")
    (tmp_path / ".staging-file").write_text("half")
    (tmp_path / ".staging-alive").mkdir()
    (tmp_path / ".staging-link").symlink_to("nowhere")
    for entry in tmp_path.iterdir():
        aged(entry)
    (tmp_path / ".staging-young").mkdir()
    os.utime(tmp_path / ".staging-young", (now - 0.9, now - 0.9))
    held = os.open(tmp_path / ".staging-alive", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_text(tmp_path / "f", "x")
    os.close(held)
    assert sorted(os.listdir(tmp_path)) == [
        ".staging-alive",
        ".staging-link",
        ".staging-young",
        "f",
    ]


def test_what_was_put_aside_and_never_replaced_comes_back(tmp_path):
    for name in ("out", "other"):
        (tmp_path / f".replaced-{name}").mkdir()
        (tmp_path / f".replaced-{name}" / "old").write_text("old")
    (tmp_path / "other").mkdir()
    write_text(tmp_path / "f", "x")
    assert sorted(os.listdir(tmp_path)) == ["f", "other", "out"]
    assert (tmp_path / "out" / "old").read_text() == "old"
    assert os.listdir(tmp_path / "other") == []


def test_without_an_exchange_a_failed_second_step_puts_the_old_back(tmp_path, monkeypatch):
    import errno

    from harness.files import staging

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    real = os.rename

    def rename(source, target, **named):
        if ".staging-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target, **named)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(InputError, match="Input/output error"),
        staged_folder(tmp_path / "out", replace=True) as staged,
    ):
        (staged / "new").write_text("new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


def test_where_the_system_knows_no_exchange_two_renames_do(tmp_path, monkeypatch):
    import ctypes
    import errno

    from harness.files import staging

    class Libc:
        def __init__(self, code):
            if code is not None:
                self.renameat2 = lambda *_: ctypes.set_errno(code) or -1

    for code in (None, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, code=code, **__: Libc(code))
        assert staging._exchange(tmp_path, tmp_path) is False
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc(errno.EPERM))
    with pytest.raises(PermissionError):
        staging._exchange(tmp_path, tmp_path)


def test_an_output_in_an_input_or_around_one_or_a_link_is_refused(tmp_path):
    from harness.files.staging import check_place

    source = tmp_path / "inputs" / "adapter"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for bad, words in [
        (source, "lies inside an input"),
        (source / "deep" / "out", "lies inside an input"),
        (tmp_path / "link" / "out", "lies inside an input"),
        (tmp_path / "inputs", "holds an input"),
    ]:
        with pytest.raises(InputError, match=words):
            check_place(bad, inputs=[source], replace=True)
        with pytest.raises(InputError, match=words), staged_folder(bad, inputs=[source]):
            pytest.fail("the block ran")
    check_place(tmp_path / "beside", inputs=[source, tmp_path / "absent"])
    (tmp_path / "dangling").symlink_to("nowhere")
    for link in ("link", "dangling"):
        with pytest.raises(InputError, match="is a link"):
            check_place(tmp_path / link, replace=True)
    assert list(source.iterdir()) == []


def failing(monkeypatch, name, *, times=1, error=None):
    """`os.<name>` (or `fcntl.flock`) fails so many times, then works again."""
    import errno
    import fcntl

    home = fcntl if name == "flock" else os
    real, left = getattr(home, name), [times]
    raised = error or OSError(errno.EIO, os.strerror(errno.EIO))

    def call(*arguments, **named):
        place = str(arguments[0])
        ours = name == "flock" or ".staging-" in place or name == "listdir"
        if ours and left[0]:
            left[0] -= 1
            raise raised
        return real(*arguments, **named)

    monkeypatch.setattr(home, name, call)


@pytest.mark.parametrize("name", ["open", "flock", "mkdir"])
def test_a_fault_before_the_first_byte_is_told_and_leaves_nothing(tmp_path, monkeypatch, name):
    from harness.files.staging import check_place

    if name != "mkdir":
        failing(monkeypatch, name)
        with pytest.raises(InputError, match="Input/output error"):
            write_bytes(tmp_path / "f", b"x")
        monkeypatch.undo()
    for write in (check_place, lambda place: staged_folder(place).__enter__()):
        failing(monkeypatch, name)
        with pytest.raises(InputError, match="Input/output error"):
            write(tmp_path / "out")
        monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    failing(monkeypatch, "open", error=FileNotFoundError(2, "No such file"))
    with staged_folder(tmp_path / "out") as staged:
        (staged / "x").write_text("1")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "out") == ["x"]


def test_a_file_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    import fcntl

    real, swept = fcntl.flock, []

    def flock(held, how):
        if not swept:
            (litter,) = tmp_path.glob(".staging-*")
            litter.unlink()
            swept.append(litter)
        real(held, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_text(tmp_path / "f", "x")
    assert os.listdir(tmp_path) == ["f"]
    assert len(swept) == 1


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    from pathlib import Path

    from harness.files.staging import check_place

    (tmp_path / "out").mkdir()

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(InputError, match="Permission denied"):
        check_place(tmp_path / "out")


def test_a_folder_that_was_filled_while_the_block_ran_is_not_replaced(tmp_path):
    def work(**options):
        with staged_folder(tmp_path / "out", **options) as staged:
            (staged / "new").write_text("new")
            write_text(tmp_path / "out" / "theirs", "theirs")

    with pytest.raises(InputError, match="out: is not empty"):
        work()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]
    work(replace=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_a_folder_that_comes_at_the_last_moment_is_replaced_where_that_was_asked_for(
    tmp_path, monkeypatch
):
    from pathlib import Path

    real, came = Path.exists, []

    def exists(self, **named):
        found = real(self, **named)
        if self.name == "out" and not found and list(tmp_path.glob(".staging-*/new")) and not came:
            came.append(write_text(self / "theirs", "theirs"))
        return found

    with staged_folder(tmp_path / "out", replace=True) as staged:
        (staged / "new").write_text("new")
        monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.undo()
    assert came
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("step", ["_sweep", "_fresh_in"])
def test_a_parent_that_another_process_removes_again_is_made_again(tmp_path, monkeypatch, step):
    """Who tried a place that was not there yet leaves it so: at any moment of another's writing."""
    from harness.files import staging

    real, removed = getattr(staging, step), []

    def late(parent, **named):
        if not removed:
            parent.rmdir()
            removed.append(parent)
        return real(parent, **named)

    monkeypatch.setattr(staging, step, late)
    write_text(tmp_path / "runs" / "f", "x")
    removed.clear()
    with staged_folder(tmp_path / "deep" / "runs" / "out") as staged:
        (staged / "x").write_text("1")
    assert removed
    assert os.listdir(tmp_path / "runs") == ["f"]
    assert os.listdir(tmp_path / "deep" / "runs") == ["out"]


def test_a_parent_that_is_never_there_is_told(tmp_path, monkeypatch):
    from harness.files import staging

    def gone(parent, **named):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(staging, "_fresh_in", gone)
    with pytest.raises(InputError, match="No such file"):
        write_text(tmp_path / "f", "x")


@pytest.mark.parametrize("name", ["check_place", "check_file_place"])
def test_what_only_tries_a_place_is_not_swept_at_it(tmp_path, monkeypatch, name):
    from harness.files import staging

    real, looked = os.close, []

    def close(descriptor):
        real(descriptor)
        if not looked:  # the moment in which nobody holds the lock any more
            looked.append(descriptor)
            for entry in tmp_path.iterdir():
                aged(entry)
            staging._sweep(tmp_path, again=True)

    monkeypatch.setattr(os, "close", close)
    getattr(staging, name)(tmp_path / "out")
    assert looked
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("check", [check_place, check_file_place])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "can be no path"), ("circle/x", "levels of symb")],
)
def test_what_can_be_no_name_is_refused_before_any_work(tmp_path, check, name, reason):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match=reason):
        check(tmp_path / name)
    assert os.listdir(tmp_path) == ["circle"]


def test_a_folder_that_cannot_take_its_place_is_said(tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    def broken(path, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", broken)
    with (
        pytest.raises(InputError, match="cannot be written: Input/output error"),
        staged_folder(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == []
