"""Faults at every n-th call to the operating system: a kill, a full disk, a broken one.

`interposed(hook)` puts a hook before each call that changes the disk: files opened for writing,
bytes written, folders made, things renamed, synced, removed. It works on Python's own doors (`os`,
`io.open`, `renameat2`), so it needs no privileges; it does not see writes of compiled libraries,
and the harness has none write for it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["MAKING", "count_calls", "fail_at", "interposed", "kill_at"]

#: What makes or changes something. Tidying up after a fault is not failed as well.
MAKING = frozenset(
    {"open", "write", "pwrite", "mkdir", "rename", "replace", "exchange", "fsync",
     "copy_file_range", "posix_fallocate", "sendfile", "ftruncate"}
)  # fmt: skip
_REMOVING = frozenset({"unlink", "rmdir", "remove"})
Hook = Callable[[str, Callable[[], Any]], None]


class _Watched(io.FileIO):
    """A raw file whose writes pass the hook."""

    hook: Hook

    def write(self, data: Any) -> int:
        self.hook("write", lambda: super(_Watched, self).write(memoryview(data)[: len(data) // 2]))
        return super().write(data)


def _is_writing(mode: str) -> bool:
    return any(letter in mode for letter in "wxa+")


@contextlib.contextmanager
def interposed(hook: Hook) -> Iterator[None]:
    """Call `hook(name, half)` before each call; `half()` does half of a write, or nothing."""
    from harness.files import staging

    real_open, real_os = io.open, {name: getattr(os, name) for name in MAKING | _REMOVING
                                   if hasattr(os, name)}  # fmt: skip
    real_exchange, real_fdopen = staging._exchange, os.fdopen

    def buffered(file: Any, mode: str, encoding: str | None, errors: Any, newline: Any) -> Any:
        raw = _Watched(file, mode.replace("b", "").replace("t", ""))
        raw.hook = hook
        whole: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, encoding, errors, newline)

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
        errors: Any = None, newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not _is_writing(mode) or opener is not None or not closefd:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            hook("open", lambda: None)
        return buffered(file, mode, encoding, errors, newline)

    def passed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real_os[name](*arguments, **named)
            hook(name, lambda: None)
            return real_os[name](*arguments, **named)

        return call

    def exchanged(first: Path, second: Path) -> bool:
        hook("exchange", lambda: None)
        return real_exchange(first, second)

    import builtins

    try:
        io.open = builtins.open = opened  # type: ignore[assignment]
        os.fdopen = opened
        for name in real_os:
            setattr(os, name, passed(name))
        staging._exchange = exchanged
        yield
    finally:
        io.open = builtins.open = real_open
        os.fdopen = real_fdopen
        for name, function in real_os.items():
            setattr(os, name, function)
        staging._exchange = real_exchange


def count_calls(names: list[str]) -> Hook:
    """A hook that notes every call."""
    return lambda name, half: names.append(name)


def kill_at(number: int) -> Hook:
    """A hook that kills the process, as `kill -9` does, at call *number* (from 1); a write is half
    done by then."""
    seen = 0

    def hook(name: str, half: Callable[[], Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def fail_at(number: int, code: int, failed: list[str]) -> Hook:
    """A hook that lets the *number*-th making call (from 1) fail with *code*, e.g. `ENOSPC`;
    a write has written half by then. *failed* gets the call's name."""
    seen = 0

    def hook(name: str, half: Callable[[], Any]) -> None:
        nonlocal seen
        if name not in MAKING:
            return
        seen += 1
        if seen == number:
            failed.append(name)
            if code == errno.ENOSPC:
                half()
            raise OSError(code, os.strerror(code))

    return hook
