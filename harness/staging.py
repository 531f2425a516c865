"""Writing files and folders beside their place and renaming them into it: whole or not there.

A reader never sees half a file, and a killed writer leaves only a `.staging-…` entry, which the
next writer of the same folder sweeps. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from harness.errors import InputError

__all__ = ["check_place", "new_run_folder", "staged_folder", "write_bytes", "write_text"]

_PREFIX = ".staging-"
_STALE_SECONDS = 24 * 3600.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 *text* to *path*, whole or not at all; makes the parent folder."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write *data* to *path*, whole or not at all; makes the parent folder.

    Raises:
        InputError: the place cannot be written (read-only, full, a folder is in the way).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.parent / f"{_PREFIX}{secrets.token_hex(6)}"
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside *target* that takes its place when the block ends without an error.

    An existing non-empty *target* is refused unless *replace*; then it is exchanged in one step
    where the system can (Linux `renameat2`), and removed after.

    Raises:
        InputError: *target* is a file, or a non-empty folder without *replace*, or its place
            cannot be written.
    """
    staged = _fresh_beside(target, replace=replace)
    lock = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells sweepers that the writer lives
        yield staged
        for file in staged.rglob("*"):
            _sync(file)
        _sync(staged)
        _take_place(staged, target)
        _sync(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)


def check_place(target: Path, *, replace: bool = False) -> None:
    """Refuse, before any work, a *target* that `staged_folder` could not write; same errors."""
    made = [folder for folder in target.parents if not folder.exists()]
    _fresh_beside(target, replace=replace).rmdir()
    for folder in made:
        with contextlib.suppress(OSError):  # somebody else has put something into it
            folder.rmdir()


def _fresh_beside(target: Path, *, replace: bool) -> Path:
    if target.exists() and not target.is_dir():
        raise InputError("is a file", where=target, remedy="name a folder")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise InputError("is not empty", where=target, remedy="name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        staged = target.parent / f"{_PREFIX}{secrets.token_hex(6)}"
        staged.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    return staged


def new_run_folder(root: Path, moment: float | None = None) -> Path:
    """The path `root/<time>-<id>` of a run that does not exist yet; `time` is UTC."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
    return root / f"{stamp}-{secrets.token_hex(3)}"


def _take_place(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        return
    if not _exchange(staged, target):
        aside = target.parent / f"{_PREFIX}{secrets.token_hex(6)}"
        target.rename(aside)
        staged.rename(target)
        aside.rename(staged)  # removed with the staging folder


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _sweep(parent: Path) -> None:
    """Remove what killed writers left in *parent*: unlocked folders, and files a day old."""
    for entry in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if not entry.is_dir():
                if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                    entry.unlink()
                continue
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - entry.stat().st_mtime > 1:  # just made, not yet locked
                    shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(
        f"cannot be written: {reason}",
        where=path,
        remedy="free some space" if error.errno == errno.ENOSPC else "choose another place",
    )
