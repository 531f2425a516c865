"""SIGTERM as an exception: what Ctrl-C does, a scheduler's `kill` does too; and both put off while
what would be lost is taken in.

Knows nothing of what is interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

__all__ = ["INTERRUPTED", "TERMINATED", "Terminated", "exit_code", "postponed", "terminable"]

#: Exit codes, as shells give them: 128 + the signal's number.
INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came; handled wherever Ctrl-C is."""


def exit_code(error: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated` in the main thread, so that what is staged is
    tidied up and what was done is told. Does nothing in another thread, or where somebody handles
    SIGTERM already."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def postponed() -> Iterator[int]:
    """Within the block Ctrl-C and SIGTERM wait for its end: an exception between two instructions
    would lose what one had read and the next was to keep.

    Gives a descriptor that can be read from once a signal waits, for `select`: leave the block
    soon then. A second signal does not wait. In another thread no signal arrives anyway.
    """
    came: list[int] = []
    over = False
    reader, writer = os.pipe()
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        # One that comes while the handlers are given back may leave this one in its place.
        if not over:
            came.append(number)
            if len(came) == 1:
                os.write(writer, b"!")
                return
        handlers[signal.Signals(number)](number, frame)

    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(known)
            if callable(handler):  # else the system acts on it, as it was told to
                handlers[known] = handler
    try:
        for number in handlers:
            signal.signal(number, handle)
        yield reader
    finally:
        over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
        if len(came) == 1:
            signal.raise_signal(came[0])
