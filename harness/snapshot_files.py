"""A snapshot on disk: a text and, beside it, its evidence; the two are written and read as one.

The sidecar says which text it belongs to, by digest, and keeps a mark of every line, so that an
edited text is noticed and the line named. A writer that replaces a snapshot first lets the sidecar
serve both texts, then exchanges the text, then drops the old half: killed anywhere, what lies there
is the old snapshot or the new one. Readers and writers of a folder take turns by `flock` on it.
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
from harness.staging import write_bytes

__all__ = [
    "SIDECAR_SUFFIX",
    "Pair",
    "evidence_of",
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
_PATIENCE = 10.0  # seconds that a lock is waited for; a stopped process must not stop the others
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
        with _turn(path.parent, exclusive=False) as locked:
            for attempt in range(1 if locked else 20):
                if attempt:
                    time.sleep(0.02)
                pair = Pair(text=_bytes(path), sidecar=_bytes(sidecar_of(path)))
                if locked or _matches(pair):
                    break
            return pair
    except FileNotFoundError:
        return Pair(text=None, sidecar=None)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}", where=path, remedy=_REMEDY
        ) from error


def write_pair(path: Path, text: bytes, evidence: bytes) -> None:
    """Write a snapshot, whole or not at all, whatever other processes do there.

    Raises:
        InputError: the place cannot be written.
    """
    _make_folder(path)
    with _turn(path.parent, exclusive=True):
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
    _make_folder(path)
    with _turn(path.parent, exclusive=True):
        try:
            old_text, old_sidecar = _bytes(path), _bytes(sidecar_of(path))
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


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be made: {error.strerror or error}",
            where=path.parent,
            remedy="choose another place",
        ) from error


def _exchange(path: Path, text: bytes, new: _Half) -> None:
    old = _current(path)
    if old is not None and old.digest != new.digest:
        write_bytes(sidecar_of(path), _packed([new, old]))
        write_bytes(path, text)
    write_bytes(sidecar_of(path), _packed([new]))
    if old is None or old.digest == new.digest:
        write_bytes(path, text)


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
        text, sidecar = _bytes(path), _bytes(sidecar_of(path))
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


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _turn(folder: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold the folder's lock; yields False where it cannot be had (some network file systems, or
    somebody holds it for very long), and the block runs all the same."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    end = time.monotonic() + _PATIENCE
    pause = 0.001
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR) or time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        else:
            return True
