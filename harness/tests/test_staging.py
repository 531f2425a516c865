"""Files and folders are written whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.errors import InputError
from harness.staging import new_run_folder, staged_folder, write_bytes, write_text


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
        monkeypatch.setattr("harness.staging._exchange", lambda *_: False)
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
        "import sys, time, pathlib; from harness.staging import staged_folder\n"
        f"with staged_folder(pathlib.Path({str(tmp_path / 'out')!r})) as s:\n"
        "    (s / 'half').write_text('half'); print('ready', flush=True); time.sleep(60)\n"
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
    from harness.staging import check_place

    check_place(tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError):
            check_place(bad)
