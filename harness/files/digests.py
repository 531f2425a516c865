"""SHA-256 of files' contents, remembered between runs, so that a 16 GB base is read once.

What is remembered is keyed by path, size, modification and change time, inode and device: a file
that was touched in any way is read again. The memory lies in `$XDG_CACHE_HOME/lora-stack/digests`,
a small file each, and may be deleted at any time. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from harness.errors import HarnessError, InputError
from harness.files.staging import write_text

__all__ = ["cache_folder", "combined_digest", "file_digests", "text_digest"]

_WORTH_REMEMBERING = 1 << 20  # bytes; below, reading is as quick as looking it up
_SETTLED_NS = 2_000_000_000  # a file written this recently can change within one clock tick
_WORKERS = 4
_BLOCK_BYTES = 1 << 18


def cache_folder(name: str) -> Path:
    """The folder for remembered things called *name*: below `$XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return root / "lora-stack" / name


def file_digests(
    paths: Iterable[Path],
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[Path, str]:
    """The SHA-256 (hex) of each file's contents, in the order given.

    Large files are remembered and read side by side. Symbolic links are followed.

    Args:
        progress: called with the number of files done and in all.
        stop: once it is set, nothing more is read.

    Raises:
        InputError: a file that is absent or cannot be read.
        HarnessError: *stop* was set.
    """
    wanted = list(dict.fromkeys(paths))
    found: dict[Path, str] = {}
    stop = stop or threading.Event()
    with ThreadPoolExecutor(max_workers=min(_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            for path, digest in zip(wanted, pool.map(partial(_digest, stop), wanted), strict=True):
                found[path] = digest
                if progress is not None:
                    progress(len(found), len(wanted))
        except BaseException:
            stop.set()  # Ctrl-C: what is being read is not read to its end
            raise
    return found


def combined_digest(parts: Mapping[str, str]) -> str:
    """One SHA-256 (hex) for named digests or texts; the order they come in does not matter."""
    canonical = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 (hex) of *text* in UTF-8; lone surrogates count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(stop: threading.Event, path: Path) -> str:
    try:
        real = path.resolve(strict=True)
        before = _stamp(real)
        if before["size"] < _WORTH_REMEMBERING:
            return hashlib.sha256(real.read_bytes()).hexdigest()
        memory = cache_folder("digests") / f"{text_digest(str(real))[:40]}.json"
        remembered = _recall(memory, before)
        if remembered is not None:
            return remembered
        # As git's index does: what may still change, while it is read or after, without its stamp
        # showing it is not remembered.
        settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > _SETTLED_NS
        with real.open("rb", buffering=0) as file:
            digest = _hashed(file, stop)
        after = _stamp(real)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror or error}", where=path, remedy="restore the file"
        ) from error
    if before == after and settled:
        with contextlib.suppress(InputError):  # no place for a cache: read again next time
            write_text(memory, json.dumps({"path": str(real), **after, "sha256": digest}))
    return digest


def _hashed(file: BinaryIO, stop: threading.Event) -> str:
    sha256, space = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    while count := file.readinto(space):  # type: ignore[attr-defined]
        if stop.is_set():
            raise HarnessError("was stopped before all was read")
        sha256.update(space[:count])
    return sha256.hexdigest()


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def _recall(memory: Path, stamp: Mapping[str, int]) -> str | None:
    try:
        held = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or any(held.get(key) != value for key, value in stamp.items()):
        return None
    digest = held.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64:
        return None
    return digest
