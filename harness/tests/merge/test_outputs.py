"""Every byte at its place, whoever writes which stretch when, and whatever the system refuses."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from harness.merge import outputs
from harness.merge.outputs import OutputFile, Pen, copy_range

_PAGE = 4096


def refuse_direct_writing(monkeypatch):
    """As a file system without O_DIRECT does."""
    real = os.open

    def opened(path, flags, *mode, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", opened)


@pytest.fixture
def direct_writing(tmp_path):
    """Skips on a file system that has none (tmpfs before Linux 6.6): there is nothing to see."""
    probe = OutputFile(tmp_path / "probe", _PAGE)
    probe.close()
    if not probe.direct:
        pytest.skip("no O_DIRECT on this file system")


@pytest.fixture
def small_writes(monkeypatch):
    """Pens write after two pages: small files show all that large ones do."""
    monkeypatch.setattr(outputs, "_WRITE_BYTES", 2 * _PAGE)


def written(path: Path, lengths, seed, *, pens=2):
    """Write a file of stretches of *lengths* in a drawn order, block by block; gives what was
    meant."""
    draw = random.Random(seed)
    whole = draw.randbytes(sum(lengths))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    order = draw.sample(range(len(lengths)), len(lengths))
    path.unlink(missing_ok=True)
    output = OutputFile(path, len(whole))
    try:
        tools = [Pen() for _ in range(pens)]
        for number in order:
            start, end = starts[number], starts[number] + lengths[number]
            pen = draw.choice(tools)
            pen.at(output, start)
            while start < end:
                block = whole[start : min(end, start + draw.choice((1, 100, _PAGE, 9000)))]
                if draw.random() < 0.5:
                    pen.put(memoryview(block))
                else:
                    pen.space(len(block) + 10)[: len(block)] = block
                    pen.wrote(len(block))
                start += len(block)
            pen.end()
        output.finish()
    finally:
        output.close()
    return whole


_LENGTHS = st.lists(
    st.one_of(st.integers(0, 20), st.integers(_PAGE - 2, _PAGE + 2), st.integers(0, 40_000)),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(lengths=_LENGTHS, seed=st.integers(0, 1 << 32))
def test_stretches_of_any_length_in_any_order_make_the_whole_file(tmp_path_factory, lengths, seed):
    path = tmp_path_factory.getbasetemp() / "stretches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "_WRITE_BYTES", 2 * _PAGE)
        assert written(path, lengths, seed) == path.read_bytes()


def test_whole_pages_go_past_the_cache_and_edges_wait_for_the_end(
    tmp_path, monkeypatch, small_writes, direct_writing
):
    real, seen = os.pwrite, []

    def pwrite(descriptor, data, start):
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, start, len(data)))
        return real(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    whole = written(tmp_path / "out", [5000, 30_000, 100], 3)
    assert (tmp_path / "out").read_bytes() == whole
    direct = [call for call in seen if call[0]]
    assert sum(size for _, _, size in direct) >= 30_000 - 2 * _PAGE
    assert all(start % _PAGE == size % _PAGE == 0 for _, start, size in direct)
    through = [call[0] for call in seen].index(False)
    assert not any(call[0] for call in seen[through:])
    assert all(size < _PAGE for _, _, size in seen[through:])


@pytest.mark.parametrize("what", ["no O_DIRECT", "stricter rules", "half of it", "nothing"])
def test_what_the_file_system_refuses_goes_through_the_cache(
    tmp_path, monkeypatch, small_writes, what
):
    real = os.pwrite

    def pwrite(descriptor, data, start):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if what == "stricter rules":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if what == "nothing":
                return 0
            return real(descriptor, data[: -(-len(data) // 2 // 512) * 512], start)
        return real(descriptor, data[: len(data) // 2 or 1], start)

    if what == "no O_DIRECT":
        refuse_direct_writing(monkeypatch)
    monkeypatch.setattr(os, "pwrite", pwrite)
    whole = written(tmp_path / "out", [5000, 30_000, 100, 70_000], 4)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("direct", [True, False])
def test_a_full_or_broken_disk_is_an_error_wherever_it_shows(
    tmp_path, monkeypatch, direct_writing, direct, code
):
    real = os.pwrite

    def pwrite(descriptor, data, start):
        if bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT) is direct:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=os.strerror(code)):
        written(tmp_path / "out", [5000, 30_000, 100], 5)


def test_a_file_system_without_room_to_reserve_gets_a_file_of_the_size(tmp_path, monkeypatch):
    def fallocate(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    whole = written(tmp_path / "out", [5000, 30_000, 100], 9)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("call", ["posix_fallocate", "open"])
def test_a_file_that_cannot_be_made_leaves_no_descriptor_open(tmp_path, monkeypatch, call):
    gc.collect()  # what earlier tests have left open
    real, before = getattr(os, call), set(os.listdir("/proc/self/fd"))

    def full(*arguments):
        if call == "open" and not arguments[1] & os.O_DIRECT:
            return real(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            OutputFile(tmp_path / "out", 100)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_block_larger_than_the_buffer_keeps_what_is_held(tmp_path, small_writes):
    data = random.Random(10).randbytes(200_100)
    output, pen = OutputFile(tmp_path / "out", 200_100), Pen()
    pen.at(output, 0)
    pen.put(memoryview(data)[:100])
    pen.put(memoryview(data)[100:])
    pen.end()
    output.finish()
    output.close()
    assert (tmp_path / "out").read_bytes() == data


def test_threads_write_neighbours_at_once(tmp_path, small_writes):
    draw = random.Random(6)
    lengths = [draw.randrange(1, 20_000) for _ in range(64)]
    whole = draw.randbytes(sum(lengths))
    output = OutputFile(tmp_path / "out", len(whole))

    def write(first):
        pen = Pen()
        for number in range(first, len(lengths), 4):
            start = sum(lengths[:number])
            pen.at(output, start)
            pen.put(memoryview(whole[start : start + lengths[number]]))
            pen.end()

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output.finish()
    output.close()
    assert (tmp_path / "out").read_bytes() == whole


def copied(path: Path, source: Path, start, target, size):
    """A file of *size* + *target* bytes whose end is a copy of *source* from *start*."""
    output, descriptor = OutputFile(path, target + size), os.open(source, os.O_RDONLY)
    try:
        copy_range(output, target, descriptor, start, size, Pen())
        output.finish()
    finally:
        output.close()
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize("way", ["directly", "by the kernel", "by hand"])
@pytest.mark.parametrize(
    ("start", "target", "size"),
    [(0, 0, 100_000), (100, 100, 90_000), (100, 4196, 90_000), (7, 100, 90_000), (9, 9, 10),
     (4090, 4090, 10), (0, 0, 0)],
)  # fmt: skip
def test_a_range_is_copied_from_anywhere_to_anywhere(
    tmp_path, monkeypatch, way, start, target, size
):
    def other_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    data = random.Random(7).randbytes(100_000)
    (tmp_path / "source").write_bytes(data)
    if way != "directly":
        refuse_direct_writing(monkeypatch)
    if way == "by hand":
        monkeypatch.setattr(os, "copy_file_range", other_disk)
    found = copied(tmp_path / "out", tmp_path / "source", start, target, size)
    assert found == bytes(target) + data[start : start + size]


def test_blocks_are_shared_where_the_file_system_can(tmp_path, monkeypatch):
    # What btrfs and XFS do, on any file system: the pages named, from descriptor to descriptor.
    data, shared = random.Random(8).randbytes(100_000), []
    (tmp_path / "source").write_bytes(data)

    def ioctl(descriptor, request, wanted):
        assert request == 0x4020940D  # FICLONERANGE
        source, start, size, target = struct.unpack("qQQQ", wanted)
        assert start % _PAGE == size % _PAGE == target % _PAGE == 0
        shared.append((start, target, size))
        os.pwrite(descriptor, os.pread(source, size, start), target)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    found = copied(tmp_path / "out", tmp_path / "source", 100, 4196, 90_000)
    assert found == bytes(4196) + data[100:90_100]
    assert shared == [(4096, 8192, 20 * _PAGE)]
    copied(tmp_path / "aside", tmp_path / "source", 7, 100, 90_000)
    assert len(shared) == 1, "what does not lie alike on the pages cannot be shared"


def test_a_file_system_that_cannot_share_is_asked_once(tmp_path, monkeypatch):
    data, asked = random.Random(11).randbytes(50_000), []
    (tmp_path / "source").write_bytes(data)

    def ioctl(*_):
        asked.append(1)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    output, source = OutputFile(tmp_path / "out", 50_000), os.open(tmp_path / "source", os.O_RDONLY)
    try:
        for start in (0, 20_000, 40_000):
            copy_range(output, start, source, start, min(20_000, 50_000 - start), Pen())
        output.finish()
    finally:
        output.close()
        os.close(source)
    assert (tmp_path / "out").read_bytes() == data
    assert asked == [1]


@pytest.mark.parametrize("call", ["ioctl", "copy_file_range"])
def test_a_disk_that_fails_while_it_copies_is_an_error(tmp_path, monkeypatch, call):
    (tmp_path / "source").write_bytes(b"x" * 9000)
    if call == "copy_file_range":
        refuse_direct_writing(monkeypatch)
        monkeypatch.setattr(OutputFile, "share", lambda *_: False)  # btrfs and XFS would

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        copied(tmp_path / "out", tmp_path / "source", 0, 0, 9000)


@pytest.mark.parametrize("direct", [True, False])
def test_a_source_that_ends_early_is_an_error(tmp_path, monkeypatch, direct):
    (tmp_path / "source").write_bytes(b"x" * 5000)
    if not direct:
        refuse_direct_writing(monkeypatch)
    with pytest.raises(InputError, match="became shorter"):
        copied(tmp_path / "out", tmp_path / "source", 0, 0, 9000)
