"""Writing files and folders beside their place and renaming them into it: whole or not there.

A reader never sees half a file, and a killed writer leaves only a `.staging-…` entry, which the
next writer into the same folder sweeps: writers hold a lock on what they stage, and what nobody
holds is litter. Where the system cannot exchange two folders in one step, the old one waits as
`.replaced-…` for a moment, and the next writer puts it back if the new one never came. Knows
nothing of what is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from harness.errors import InputError
from harness.files.file_kinds import is_folder, is_link, is_there, whole_path

__all__ = [
    "check_file_place",
    "check_place",
    "new_run_folder",
    "staged_bytes",
    "staged_folder",
    "write_bytes",
    "write_text",
]

_PREFIX = ".staging-"
_ASIDE = ".replaced-"
_YOUNG_SECONDS = 1.0  # just made, perhaps not locked yet
_TRIES = 100  # to stage an entry where others remove what it needs
#: What network file systems without locks answer; there, nothing is swept.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: Folders (device, inode) that this process has swept.
_swept: set[tuple[int, int]] = set()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 *text* to *path*, whole or not at all; makes the parent folder."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write *data* to *path*, whole or not at all; makes the parent folder.

    Raises:
        InputError: the place cannot be written (read-only, full, a folder is in the way).
    """
    with staged_bytes(path, data) as place:
        place()


@contextlib.contextmanager
def staged_bytes(path: Path, data: bytes) -> Iterator[Callable[[], None]]:
    """Stage *data* beside *path*; the block gets a function that puts it there.

    The file is locked (`flock`) until the block ends, in its place too: who has several to put
    holds all of them meanwhile. What was not put is removed.

    Raises:
        InputError: as `write_bytes`; by the function, too.
    """
    try:
        staged, held = _fresh_beside(path, folder=False)
        try:
            with os.fdopen(held, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                yield functools.partial(_place, staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _place(staged: Path, path: Path) -> None:
    staged.replace(path)
    _sync(path.parent)


@contextlib.contextmanager
def staged_folder(
    target: Path, *, replace: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """A fresh folder beside *target* that takes its place when the block ends without an error.

    A non-empty *target* is refused unless *replace*, one that came while the block ran, too; with
    *replace* it is exchanged in one step where the system can (Linux `renameat2`), and removed
    after.

    Raises:
        InputError: *target* is a file or a link, or a non-empty folder without *replace*, or it
            lies in one of the *inputs* or holds one, or its place cannot be written.
    """
    _refuse(target, replace, inputs)
    try:
        staged, held = _fresh_beside(target, folder=True)
        try:
            yield staged
            for file in staged.rglob("*"):
                _sync(file)
            _sync(staged)
            _take_place(staged, target, replace)
            _sync(target.parent)
        finally:
            os.close(held)
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise _unwritable(target, error) from error


def check_place(target: Path, *, replace: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, a *target* that `staged_folder` could not write; same errors."""
    _refuse(target, replace, inputs)
    _try_beside(target, folder=True)


def check_file_place(path: Path) -> None:
    """Refuse, before any work, a *path* that `write_bytes` could not write; same errors."""
    _check_name(path)
    if path.is_dir():
        raise InputError("is a folder", where=path, remedy="name a file")
    _try_beside(path, folder=False)


def _check_name(target: Path) -> None:
    """Refuse what cannot be looked up: a name too long, a link in a circle above it."""
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is above it is made, or said when that is tried
    except OSError as error:
        raise _unwritable(target, error) from error
    except ValueError as error:
        raise InputError(f"can be no path: {error}", where=str(target)) from error


def _try_beside(target: Path, *, folder: bool) -> None:
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        staged, held = _fresh_beside(target, folder=folder)
        try:
            staged.rmdir() if folder else staged.unlink()
        finally:
            os.close(held)  # not before: a sweeper takes what nobody holds
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                parent.rmdir()


def _refuse(target: Path, replace: bool, inputs: Iterable[Path]) -> None:
    """Refuse what would destroy an input or somebody's files."""
    _check_name(target)
    here = Path.cwd()
    place = whole_path(target, here)
    for source in inputs:
        origin = whole_path(source, here)
        if place == origin or origin in place.parents:
            raise InputError(
                f"lies inside an input ({source})", where=target, remedy="choose another folder"
            )
        if place in origin.parents:
            raise InputError(
                f"holds an input ({source})", where=target, remedy="choose another folder"
            )
    if is_link(target):
        raise InputError("is a link", where=target, remedy="name a new folder")
    if is_there(target) and not is_folder(target):
        raise InputError("is a file", where=target, remedy="name a new folder")
    try:
        full = is_folder(target) and any(target.iterdir())
    except OSError as error:
        raise _unwritable(target, error) from error
    if full and not replace:
        raise _not_empty(target)


def _not_empty(target: Path) -> InputError:
    return InputError("is not empty", where=target, remedy="name a new folder")


def _fresh_beside(target: Path, *, folder: bool) -> tuple[Path, int]:
    """A fresh staged entry beside *target*, and a descriptor that holds the lock on it."""
    tries = 0
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent, again=folder)
            return _fresh_in(target.parent, folder=folder)
        except FileNotFoundError:
            # Another process only tried this place and has removed the parent again; or a sweeper
            # the entry, before it could be locked: this process stood still for long.
            tries += 1
            if tries == _TRIES:
                raise


def _fresh_in(parent: Path, *, folder: bool) -> tuple[Path, int]:
    """One try; raises `FileNotFoundError` where *parent* or the entry is gone meanwhile."""
    staged = parent / f"{_PREFIX}{secrets.token_hex(6)}"
    if folder:
        staged.mkdir()
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        held = os.open(staged, flags, 0o666)
    except OSError:
        if folder:
            staged.rmdir()
        raise
    try:
        _hold(held)  # tells sweepers that the writer lives
        staged.stat()
    except OSError:
        os.close(held)
        shutil.rmtree(staged, ignore_errors=True) if folder else staged.unlink(missing_ok=True)
        raise
    return staged, held


def _hold(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def new_run_folder(root: Path, moment: float | None = None) -> Path:
    """The path `root/<time>-<id>` of a run that does not exist yet; `time` is UTC."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
    return root / f"{stamp}-{secrets.token_hex(3)}"


def _take_place(staged: Path, target: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        try:
            staged.rename(target)  # an empty folder gives way
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not replace:  # it came since it was looked for
                raise _not_empty(target) from error
    if not _exchange(staged, target):
        aside = target.parent / f"{_ASIDE}{target.name}"
        held = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _hold(held)  # tells sweepers that the new one is coming
            target.rename(aside)
            try:
                staged.rename(target)
            except OSError:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(held)


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


def _sweep(parent: Path, *, again: bool) -> None:
    """Put right what killed writers left in *parent*: staged entries that nobody holds are
    removed, a folder that was put aside and never replaced is put back.

    Looking through a folder costs as much as it has entries: without *again*, a process does it
    once a folder.
    """
    state = parent.stat()
    if not again and (state.st_dev, state.st_ino) in _swept:
        return
    _swept.add((state.st_dev, state.st_ino))
    for entry in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _unheld(entry) as age:
            if age < _YOUNG_SECONDS:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
    for aside in parent.glob(f"{_ASIDE}*"):
        target = parent / aside.name.removeprefix(_ASIDE)
        with contextlib.suppress(OSError), _unheld(aside):
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(target)


@contextlib.contextmanager
def _unheld(entry: Path) -> Iterator[float]:
    """Hold *entry*, for a look at it; yields its age in seconds.

    Raises:
        OSError: its writer holds it, or it is gone.
    """
    held = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield time.time() - os.fstat(held).st_mtime
    finally:
        os.close(held)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        file = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
        reason = reason if file is None else f"{file} is no folder"
    return InputError(
        f"cannot be written: {reason}",
        where=path,
        remedy="free some space" if error.errno == errno.ENOSPC else "choose another place",
    )
