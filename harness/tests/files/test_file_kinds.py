"""What a path leads to is found out without waiting, following too far, or failing."""

import os
import socket

import pytest

from harness.files.file_kinds import is_systems, open_regular, whole_path


def test_a_regular_file_is_opened_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_would_be_waited_for_is_no_regular_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(kind)
    with pytest.raises(OSError, match="is no regular file"):
        open_regular(path)


def test_a_folder_and_nothing_are_said_as_the_system_says_them(tmp_path):
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


@pytest.mark.parametrize("source", ["circle", "circle/x", "~nobody-of-this-name", "a\0b", ""])
def test_a_name_that_leads_nowhere_leads_no_further(tmp_path, source):
    (tmp_path / "circle").symlink_to("circle")
    assert whole_path(source, tmp_path) == tmp_path / source


def test_links_and_home_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert whole_path("link/x", tmp_path) == tmp_path / "real" / "x"
    assert whole_path("~/x", tmp_path) == tmp_path / "home" / "x"
    assert whole_path(tmp_path / "real", tmp_path / "elsewhere") == tmp_path / "real"


def test_shared_memory_is_users_own():
    assert is_systems("/dev/null")
    assert is_systems("/proc/self/mem")
    assert is_systems("/dev/shmem/x")
    assert not is_systems("/dev/shm/models/base")
    assert not is_systems("/home/dev/x")
