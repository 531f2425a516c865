"""What a file is, whatever it is called: regular or not, and whose format its first bytes are.

Knows nothing of what is expected to be in it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from harness.errors import InputError

__all__ = [
    "foreign_format",
    "is_folder",
    "is_link",
    "is_systems",
    "is_there",
    "open_regular",
    "regular_file",
    "whole_path",
]

_SYSTEM_FOLDERS = ("/dev/", "/proc/", "/sys/")
_MEMORY_FOLDER = "/dev/shm/"  # files of users' own, in memory: models lie there, and TMPDIR
_TORCH_ADVICE = "load it once where you trust it and save it with safetensors.torch.save_file"
_COPY_ADVICE = "copy or save it again"
# By the first bytes: what it is, and how to mend it.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the weights", "run: git lfs pull"),
    (b"GGUF", "a GGUF file, not safetensors", "give the original checkpoint"),
    (b"\x89HDF", "an HDF5 file, not safetensors", "give the safetensors file"),
    (b"\x93NUMPY", "a NumPy file, not safetensors", "save it as safetensors"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"BZh", "a bzip2 archive", "unpack it first"),
    (b"\x7fELF", "a program, not weights", _COPY_ADVICE),
)


def regular_file(path: Path, *, what: str, remedy: str | None = None) -> Path:
    """Return *path* if it is a regular file outside the system's own folders.

    Raises:
        InputError: naming *what* is expected: nothing there, a folder, pipe, device or socket, a
            link that points nowhere, in a circle or at the system, or a name too long to look up.
    """
    try:
        mode = path.stat().st_mode
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        if is_link(path):
            fault = f"{what} is a link that points nowhere"
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            fault = f"{what} is missing"
        else:
            fault = f"{what} cannot be looked up: {getattr(error, 'strerror', None) or error}"
        raise InputError(fault, where=path, remedy=remedy) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} is {_kind(mode)}, not a regular file", where=path, remedy=remedy)
    if is_systems(real):
        raise InputError(
            f"{what} is a link to {real}, which is the system's", where=path, remedy=remedy
        )
    return path


def open_regular(path: Path) -> BinaryIO:
    """The file at *path*, open to be read. What is opened is looked at, not the path: between two
    looks at a path, a writer puts a file there or takes it away.

    Raises:
        OSError: it cannot be opened, or is a folder, pipe, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "is no regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "is no regular file")


def is_systems(path: str) -> bool:
    """Whether the absolute *path* lies in one of the system's own folders."""
    return path.startswith(_SYSTEM_FOLDERS) and not path.startswith(_MEMORY_FOLDER)


def is_link(path: Path) -> bool:
    """Whether *path* is a symbolic link, wherever it points."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def whole_path(source: str | Path, here: Path) -> Path:
    """*source* from *here* on, `~` and links followed as far as they lead; never raises, whatever a
    user or a file names: a link in a circle, an unknown user's home, a name that can be none."""
    try:
        # `Path.expanduser` and `Path.resolve` raise where these leave a name as it is.
        return Path(os.path.realpath(here / os.path.expanduser(source)))  # noqa: PTH111
    except ValueError:  # a NUL in it
        return here / source


def is_there(path: Path) -> bool:
    """Whether something is called *path*, a broken link included; never raises."""
    return os.path.lexists(path) if "\0" not in str(path) else False


def is_folder(path: Path) -> bool:
    """Whether *path* is a folder (links are followed); never raises."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def foreign_format(head: bytes, size: int) -> tuple[str, str] | None:
    """What a file that should be safetensors is instead, and how to mend it; None if it may be.

    Args:
        head: the first kilobyte.
        size: of the whole file, in bytes.
    """
    if size == 0:
        return "an empty file", _COPY_ADVICE
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return kind, advice
    # A header whose length has the same low bytes is told apart by the brace after it.
    if head[8:9] == b"{":
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "an HTML page, not weights",
            "download it again; a login or error page was saved instead",
        )
    if text.startswith(b"{"):
        return "JSON text, not weights", "download it again; a server's answer was saved instead"
    if head.startswith(b"PK\x03\x04"):
        if b".pkl" in head:
            return (
                "a pickle (torch.save) under another name; pickles can run code and are not read",
                _TORCH_ADVICE,
            )
        return (
            "a zip archive (torch.save writes its pickles so), not safetensors",
            f"unpack it first, or {_TORCH_ADVICE}",
        )
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"}q\x00")):
        return (
            "a pickle (torch.save) under another name; pickles can run code and are not read",
            _TORCH_ADVICE,
        )
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it first"
    if not head.strip(b"\0"):
        return "zeros where the header should be: it was never written", _COPY_ADVICE
    return None
