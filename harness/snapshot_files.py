"""A snapshot on disk: a text and, beside it, its evidence; the two are written and read as one.

The sidecar says which text it belongs to, by digest, and keeps a mark of every line, so that an
edited text is noticed and the line named. A writer that replaces a snapshot first lets the sidecar
serve both texts, then exchanges the text, then drops the old half: killed anywhere, what lies there
is the old snapshot or the new one. Readers and writers of a snapshot take turns by `flock`.
Knows bytes only: nothing of completions, evidence or verdicts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.files.file_kinds import open_regular
from harness.files.staging import staged_bytes, write_bytes

__all__ = [
    "SIDECAR_SUFFIX",
    "Pair",
    "evidence_of",
    "file_sha256",
    "read_pair",
    "replace_pair",
    "sidecar_bytes",
    "sidecar_of",
    "write_pair",
]

SIDECAR_SUFFIX = ".evidence"
_MAGIC = b"LSE\x01"
_DIGEST = 16
_CHECK = 8
# Seconds that a lock is waited for; it is held for milliseconds, unless its holder is stopped.
_PATIENCE_TO_READ = 10.0
_PATIENCE_TO_WRITE = 60.0
_REMEDY = "restore both files from version control, or accept anew with --snapshot-update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What lies on disk for one snapshot.

    Attributes:
        text: the text's bytes; None when there is no snapshot.
        sidecar: the sidecar's bytes; None when it is absent.
    """

    text: bytes | None
    sidecar: bytes | None

    @property
    def sha256(self) -> tuple[str, str]:
        """Hexadecimal, of the text and of the sidecar; `""` where it is absent."""
        return _hex(self.text), _hex(self.sidecar)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """What a sidecar holds for one text."""

    digest: bytes
    marks: bytes
    evidence: bytes


def sidecar_of(path: Path) -> Path:
    """Where the evidence of the snapshot at *path* lies."""
    return path.with_suffix(SIDECAR_SUFFIX)


def sidecar_bytes(text: bytes, evidence: bytes) -> bytes:
    """The sidecar of *text*."""
    return _packed([_half(text, evidence)])


def read_pair(path: Path) -> Pair:
    """Both files as they lay there at one moment.

    Raises:
        InputError: a file that is there and cannot be read.
    """
    try:
        try:
            with _turn(path, exclusive=False) as locked:
                if locked:
                    return _pair(path)
        except TimeoutError:  # a stopped writer must not stop the readers
            pass
        for _ in range(20):
            pair = _pair(path)
            if _matches(pair):
                break
            time.sleep(0.02)
        return pair
    except FileNotFoundError:
        return Pair(text=None, sidecar=None)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}", where=path, remedy=_REMEDY
        ) from error


def _pair(path: Path) -> Pair:
    return Pair(text=_read(path), sidecar=_read(sidecar_of(path)))


def write_pair(path: Path, text: bytes, evidence: bytes) -> None:
    """Write a snapshot, whole or not at all, whatever other processes do there.

    Raises:
        InputError: the place cannot be written.
    """
    with _writing(path):
        _exchange(path, text, _half(text, evidence))


def replace_pair(path: Path, text: bytes, sidecar: bytes, *, expected: tuple[str, str]) -> bool:
    """Write a snapshot whose *sidecar* is packed already, if what lies there is what is expected.

    Args:
        expected: SHA-256, hexadecimal, of the text and of the sidecar there (`""`: absent).

    Returns:
        False, and nothing is written, where something else lies there. What a killed call with the
        same arguments left counts as expected.

    Raises:
        InputError: the sidecar is damaged or another text's, or the place cannot be written.
    """
    new = _found(_unpacked(sidecar), text)
    if new is None:
        raise InputError("is damaged, or another text's", where=sidecar_of(path))
    with _writing(path):
        try:
            old_text, old_sidecar = _read(path), _read(sidecar_of(path))
        except OSError as error:
            raise InputError(
                f"cannot be read: {error.strerror or error}", where=path, remedy=_REMEDY
            ) from error
        found = _hex(old_text), _hex(old_sidecar)
        begun = any(half.digest == new.digest for half in _unpacked(old_sidecar or b""))
        if found != expected and not (begun and found[0] in (expected[0], _hex(text))):
            return False
        _exchange(path, text, new)
    return True


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder and hold the snapshot alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path, exclusive=True):
            yield
    except TimeoutError as error:
        raise InputError(
            f"cannot be written: another process has held it for {_PATIENCE_TO_WRITE:g} s",
            where=path,
            remedy="end that process, then try again",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot be made: {error.strerror or error}",
            where=path.parent,
            remedy="choose another place",
        ) from error


def _exchange(path: Path, text: bytes, new: _Half) -> None:
    """Replace what lies at *path*, which the caller holds; what is there already is not written."""
    old, sidecar = _current(path), sidecar_of(path)
    if old is not None and old.digest == new.digest:
        if _read(sidecar) != _packed([new]):
            write_bytes(sidecar, _packed([new]))
        return
    with contextlib.ExitStack() as staged:
        place_text = staged.enter_context(staged_bytes(path, text))
        place_new = staged.enter_context(staged_bytes(sidecar, _packed([new])))
        if old is None:
            place_new()
            place_text()
            return
        place_both = staged.enter_context(staged_bytes(sidecar, _packed([new, old])))
        place_both()
        place_text()
        place_new()


def file_sha256(path: Path) -> str:
    """SHA-256, hexadecimal, of a text or a sidecar; `""` where it is not there.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    return _hex(_read(path))


def _hex(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def evidence_of(pair: Pair, *, where: Path | str) -> bytes:
    """The evidence that belongs to the pair's text.

    Raises:
        InputError: the sidecar is absent or damaged, or the text was edited since: the line.
    """
    assert pair.text is not None
    sidecar = Path(where).with_suffix(SIDECAR_SUFFIX)
    if pair.sidecar is None:
        raise InputError("is missing beside its snapshot", where=sidecar, remedy=_REMEDY)
    halves = _unpacked(pair.sidecar)
    if not halves:
        raise InputError(
            f"is damaged ({len(pair.sidecar)} bytes, wrong checksum)", where=sidecar, remedy=_REMEDY
        )
    half = _found(halves, pair.text)
    if half is None:
        raise InputError(_edit(halves[0], pair.text), where=where, remedy=_REMEDY)
    return half.evidence


def _edit(half: _Half, text: bytes) -> str:
    """In what *text* is not the one that was accepted."""
    if _digest(text.replace(b"\r\n", b"\n")) == half.digest:
        return "line ends were converted; keep them with `snapshots/** -text` in .gitattributes"
    marks = _marks(text)
    if len(marks) == len(half.marks) and marks == half.marks:
        return "was edited since it was accepted"
    number = next(
        (n for n, (a, b) in enumerate(zip(marks, half.marks, strict=False), 1) if a != b),
        min(len(marks), len(half.marks)),
    )
    return f"line {number}: was edited since it was accepted, or the evidence is another text's"


def _current(path: Path) -> _Half | None:
    """What the sidecar holds for the text that lies at *path*; None if there is no sound pair."""
    try:
        text, sidecar = _read(path), _read(sidecar_of(path))
    except OSError:
        return None
    if text is None or sidecar is None:
        return None
    return _found(_unpacked(sidecar), text)


def _matches(pair: Pair) -> bool:
    if pair.text is None or pair.sidecar is None:
        return pair.text is None and pair.sidecar is None
    return _found(_unpacked(pair.sidecar), pair.text) is not None


def _found(halves: Sequence[_Half], text: bytes) -> _Half | None:
    digest = _digest(text)
    return next((half for half in halves if half.digest == digest), None)


def _half(text: bytes, evidence: bytes) -> _Half:
    return _Half(digest=_digest(text), marks=_marks(text), evidence=evidence)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:_DIGEST]


def _marks(text: bytes) -> bytes:
    """A byte a line: enough to name an edited one in 255 of 256 cases."""
    return bytes(zlib.crc32(line) & 0xFF for line in text.split(b"\n"))


def _packed(halves: Sequence[_Half]) -> bytes:
    parts = [_MAGIC, bytes([len(halves)])]
    for half in halves:
        parts += [
            half.digest,
            len(half.marks).to_bytes(3, "little"),
            len(half.evidence).to_bytes(3, "little"),
            half.marks,
            half.evidence,
        ]
    data = b"".join(parts)
    return data + hashlib.sha256(data).digest()[:_CHECK]


def _unpacked(data: bytes) -> list[_Half]:
    """The halves; none if the sidecar is damaged."""
    body, check = data[:-_CHECK], data[-_CHECK:]
    if not body.startswith(_MAGIC) or hashlib.sha256(body).digest()[:_CHECK] != check:
        return []
    halves, place = [], len(_MAGIC) + 1
    for _ in range(body[len(_MAGIC)] if len(body) > len(_MAGIC) else 0):
        head = body[place : place + _DIGEST + 6]
        marks = int.from_bytes(head[_DIGEST : _DIGEST + 3], "little")
        evidence = int.from_bytes(head[_DIGEST + 3 :], "little")
        place += _DIGEST + 6
        end = place + marks + evidence
        if len(head) < _DIGEST + 6 or end > len(body):
            return []
        halves.append(
            _Half(
                digest=head[:_DIGEST],
                marks=body[place : place + marks],
                evidence=body[place + marks : end],
            )
        )
        place = end
    return halves


def _read(path: Path) -> bytes | None:
    """The file's bytes; None if it is not there."""
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _turn(path: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold the snapshot at *path*; yields False where the file system has no locks.

    The lock is on the sidecar: whoever puts another one in its place holds that one, too, until all
    is written. Where there is none yet, it is on the folder.

    Raises:
        TimeoutError: somebody holds it for very long.
        FileNotFoundError: there is no such folder.
    """
    end = time.monotonic() + (_PATIENCE_TO_WRITE if exclusive else _PATIENCE_TO_READ)
    sidecar = sidecar_of(path)
    with contextlib.ExitStack() as opened:
        while True:
            descriptor = _lockable(sidecar)
            opened.callback(os.close, descriptor)
            locked = _lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, end)
            now = _lockable(sidecar)
            opened.callback(os.close, now)
            if not locked or os.path.sameopenfile(descriptor, now):
                break
            opened.close()  # replaced, made or removed while we waited
        yield locked


def _lockable(sidecar: Path) -> int:
    """A descriptor of the sidecar; of its folder where it cannot be opened."""
    try:
        return os.open(sidecar, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return os.open(sidecar.parent, os.O_RDONLY | os.O_DIRECTORY)


def _lock(descriptor: int, kind: int, end: float) -> bool:
    pause = 0.001
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                return False  # some network file systems
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds it") from error
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        else:
            return True
