"""An output file and how bytes get there: whole pages past the page cache, the rest through it.

Written directly (`O_DIRECT`, open(2)), gigabytes cost the processor almost nothing: no page of
memory is taken, filled and written back for them, and nothing that others have cached is pushed
out. Where the file system cannot, or its rules are stricter than whole pages of 4 KiB, the same
calls go through the page cache. Knows nothing of tensors or tasks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

from harness.errors import InputError

__all__ = ["OutputFile", "Pen", "copy_range", "read_into"]

_PAGE = 4096
#: A pen's bytes go to the disk once there are so many: large enough for a disk's full speed.
_WRITE_BYTES = 2 << 20
_FICLONERANGE = 0x4020940D  # linux/fs.h
_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)


class OutputFile:
    """A new file of a known size, written in any order by any number of threads.

    Attributes:
        descriptor: through the page cache.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Make the file and take its whole room on the disk.

        Raises:
            OSError: it exists, or the disk is full.
        """
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = -1
        self._shares = True
        self._edges: list[tuple[int, bytes]] = []
        try:
            try:
                os.posix_fallocate(self.descriptor, 0, size)  # a full disk shows here, not later
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(self.descriptor, size)
            try:
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        except BaseException:
            os.close(self.descriptor)
            raise

    @property
    def direct(self) -> bool:
        """Whether whole pages go past the page cache."""
        return self._direct >= 0

    def write(self, data: memoryview | bytes, start: int) -> None:
        """Put *data* at *start* through the page cache."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done:], start + done)

    def write_pages(self, data: memoryview, start: int) -> None:
        """Put whole pages, which lie at a page's beginning in memory, at the page *start*."""
        while self._direct >= 0 and len(data):
            try:
                done = os.pwrite(self._direct, data, start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # this file system wants more than whole pages of 4 KiB
            # Less than all: what is left has to begin at a page again.
            done = done if done == len(data) else done // _PAGE * _PAGE
            if done == 0:
                break
            data, start = data[done:], start + done
        self.write(data, start)

    def write_edge(self, data: memoryview, start: int) -> None:
        """Put less than a page at *start*, by `finish` at the latest: its page is another's too."""
        if self._direct < 0:
            self.write(data, start)
        else:
            # Kept until nobody writes around them: the cache and the disk never hold two versions.
            self._edges.append((start, bytes(data)))

    def share(self, source: int, start: int, target: int, size: int) -> bool:
        """Let the file system give this file the source's own blocks; False where it cannot."""
        if not self._shares:
            return False
        wanted = struct.pack("qQQQ", source, start, size, target)
        try:
            fcntl.ioctl(self.descriptor, _FICLONERANGE, wanted)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY and error.errno != errno.ENOTTY:
                raise
            self._shares = False
        return self._shares

    def finish(self) -> None:
        """Nothing more is written: the edges follow."""
        edges, self._edges = self._edges, []
        for start, data in sorted(edges):
            self.write(data, start)

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct >= 0:
            os.close(self._direct)


class Pen:
    """Writes one stretch of a file after the other; a worker's own, with a buffer of its own.

    `at` says where, `space` gives room for the next bytes, `wrote` says that they are there, and
    `end` that the stretch is over.
    """

    def __init__(self) -> None:
        self._room = mmap.mmap(-1, _WRITE_BYTES + 4 * _PAGE)
        self._first = self._held = self._start = 0

    def at(self, output: OutputFile, start: int) -> None:
        """The next stretch begins at *start* of *output*."""
        self._output = output
        # The buffer mirrors the file's pages: what comes before *start* is not ours.
        self._first = self._held = start % _PAGE
        self._start = start - self._first

    def space(self, size: int) -> memoryview:
        """Room for *size* bytes; their numbers are aligned if they are in the file."""
        if self._held + size > len(self._room):
            grown = mmap.mmap(-1, -(-(self._held + size) // _PAGE) * _PAGE)
            grown[: self._held] = self._room[: self._held]
            self._room = grown
        return memoryview(self._room)[self._held : self._held + size]

    def wrote(self, size: int) -> None:
        """The first *size* bytes of the `space` are there."""
        self._held += size
        if self._held >= _WRITE_BYTES:
            self._empty()

    def put(self, data: memoryview) -> None:
        """`space` and `wrote` for bytes that lie elsewhere."""
        self.space(len(data))[:] = data
        self.wrote(len(data))

    def end(self) -> None:
        """Write what is held."""
        self._empty()
        if self._held > self._first:
            edge = memoryview(self._room)[self._first : self._held]
            self._output.write_edge(edge, self._start + self._first)
        self._first = self._held = 0

    def _empty(self) -> None:
        """Write the whole pages; the rest moves to the front."""
        room, whole = memoryview(self._room), self._held // _PAGE * _PAGE
        if not whole:
            return
        if self._first:
            self._output.write_edge(room[self._first : _PAGE], self._start + self._first)
        begin = _PAGE if self._first else 0
        self._output.write_pages(room[begin:whole], self._start + begin)
        left = self._held - whole
        room[:left] = room[whole : self._held]
        self._first, self._held, self._start = 0, left, self._start + whole


def copy_range(
    output: OutputFile, target: int, source: int, start: int, size: int, pen: Pen
) -> None:
    """Put *size* bytes of the file *source* from *start* at *target*: as shared blocks, else past
    the page cache, else copied by the kernel (copy_file_range(2)), else read and written.

    Raises:
        InputError: the source ends before.
    """
    lead = min(-target % _PAGE, size)
    whole = (size - lead) // _PAGE * _PAGE
    alike = (start - target) % _PAGE == 0  # blocks can be shared only from page to page
    if whole and alike and output.share(source, start + lead, target + lead, whole):
        _copy_through(output, target, source, start, lead, pen)
        done = lead + whole
    else:
        done = 0 if output.direct else _copy_in_kernel(output, target, source, start, size)
    _copy_through(output, target + done, source, start + done, size - done, pen)


def _copy_in_kernel(output: OutputFile, target: int, source: int, start: int, size: int) -> int:
    """How many bytes the kernel copied; all, or none or some where it cannot."""
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(
                source, output.descriptor, size - done, start + done, target + done
            )
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            break
        if count == 0:
            break  # the source is too short, which reading finds
        done += count
    return done


def _copy_through(
    output: OutputFile, target: int, source: int, start: int, size: int, pen: Pen
) -> None:
    pen.at(output, target)
    for first in range(0, size, _WRITE_BYTES):
        count = min(_WRITE_BYTES, size - first)
        read_into(source, pen.space(count), start + first)
        pen.wrote(count)
    pen.end()


def read_into(descriptor: int, space: memoryview, start: int) -> None:
    """Fill *space* from *start* of a base's file.

    Raises:
        InputError: the file ends before.
    """
    position = 0
    while position < len(space):
        count = os.preadv(descriptor, [space[position:]], start + position)
        if count == 0:
            raise InputError(
                "the base became shorter while it was read; nothing was kept",
                where="--base",
                remedy="merge again when nobody writes to it",
            )
        position += count
