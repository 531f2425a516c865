"""The modes in a child process that may hang, be killed or break its device: the next one goes on.

Knows nothing of engines: what the child tells is all there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from harness.errors import HarnessError, InputError, combined
from harness.interrupts import postponed
from harness.running.collected import Collected, Loaded, Request
from harness.running.messages import as_completion, as_message

__all__ = ["CHILD", "run_apart"]

#: The command of a child; the descriptor to tell on comes after it.
CHILD = (sys.executable, "-m", "harness.running.child")


def run_apart(
    request: Request,
    arguments: argparse.Namespace,
    collected: Collected,
    *,
    timeout: float | None,
    loaded: Loaded,
    progress: Callable[[str, float], None] | None = None,
    command: Sequence[str] = CHILD,
) -> None:
    """Run the modes of *request* in a child, and in a fresh one after each that is lost.

    Args:
        arguments: the options that *request* was made of; the child makes its own of them.
        timeout: seconds that a mode may take, and loading as well; None for no limit.

    Raises:
        InputError: the child refuses the stack or a prompt.
        HarnessError: the child fails for a reason of its own before anything ran.
    """
    left = list(request.modes)
    while left:
        watch = _Watch(
            request=request, collected=collected, left=left, loaded=loaded, progress=progress
        )
        process: subprocess.Popen[bytes] | None = None
        ended: bool | None = None
        with contextlib.ExitStack() as life:
            while ended is None:  # again where somebody's own handler lets the run go on
                # What the child has told was done, and no signal loses it.
                with postponed() as interrupt:
                    if process is None:
                        process, reader = life.enter_context(_child(command, arguments, left))
                    ended = watch.follow(reader, timeout, interrupt)
            assert process is not None
            fault = _fault(process, ended, timeout)
        if watch.is_loaded:
            if fault is not None and left:
                collected.failed(left.pop(0), *fault)
            elif left and not watch.did_something:
                raise HarnessError("the child ended without a word")
            continue
        said, remedy = fault or ("the child ended without a word", None)
        first, *others = left
        collected.failed(first, f"while loading: {said}", remedy)
        for mode in others:
            collected.not_run(mode, f"loading failed: {said}", remedy)
        return


class _Watch:
    """Follows one child's messages."""

    def __init__(
        self,
        *,
        request: Request,
        collected: Collected,
        left: list[str],
        loaded: Loaded,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self._request, self._collected, self._left = request, collected, left
        self._loaded, self._progress = loaded, progress
        self.is_loaded = self.did_something = False
        self._pending, self._begun = b"", time.monotonic()

    def follow(self, reader: int, timeout: float | None, interrupt: int) -> bool | None:
        """Handle messages until the child ends (True) or hangs past *timeout* (False); None when
        *interrupt* can be read, after what the child has told by then."""
        while True:
            room = None
            if timeout is not None:
                room = max(0.0, self._begun + timeout - time.monotonic())
            ready = select.select([reader, interrupt], [], [], room)[0]
            if not ready:
                return False
            if interrupt in ready:
                while select.select([reader], [], [], 0)[0] and self._read(reader):
                    pass
                return None
            if not self._read(reader):
                return True

    def _read(self, reader: int) -> bool:
        """Take the messages that are there; False when the child has closed its end."""
        data = os.read(reader, 1 << 16)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            message = as_message(line)
            self._take(message)
            if message["kind"] in ("loaded", "done", "failed"):
                self._begun = time.monotonic()  # the clock of the next mode
        return bool(data)

    def _take(self, message: dict[str, object]) -> None:
        kind, mode, collected = message["kind"], str(message.get("mode", "")), self._collected
        match kind, message:
            case "loaded", {"lines": list(lines), "seconds": float(seconds), "notes": list(notes)}:
                collected.device, collected.dtype = str(message["device"]), str(message["dtype"])
                if not collected.seconds:
                    self._loaded([str(line) for line in lines])
                    collected.notes += map(str, notes)
                collected.seconds["load"] = collected.seconds.get("load", 0.0) + seconds
                self.is_loaded = True
            case "progress", {"share": float(share)}:
                if self._progress is not None:
                    self._progress(mode, share)
            case "completion", {"completion": dict(values)}:
                collected.add(mode, as_completion(values, self._request.preset))
            case "done", {"seconds": float(seconds)}:
                self._leave(mode)
                collected.done(mode, seconds)
            case "failed", {"said": str(said), "remedy": remedy}:
                self._leave(mode)
                collected.failed(mode, said, None if remedy is None else str(remedy))
            case "refused", {"faults": list(faults)}:
                raise combined([InputError(f, where=w, remedy=r) for f, w, r in faults])
            case _:
                raise HarnessError(f"a child told of {kind!r}, which nobody knows")

    def _leave(self, mode: str) -> None:
        if mode in self._left:
            self._left.remove(mode)
        self.did_something = True


@contextlib.contextmanager
def _child(
    command: Sequence[str], arguments: argparse.Namespace, modes: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A child and the end of the pipe that it tells on; it does not outlive the block."""
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [*command, str(writer)],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _is_real(sys.stderr) else subprocess.DEVNULL,
            pass_fds=[writer],
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        os.close(writer)
        writer = -1
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                asked = {"arguments": vars(arguments), "modes": list(modes)}
                process.stdin.write(json.dumps(asked).encode())
            yield process, reader
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _is_real(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _fault(
    process: subprocess.Popen[bytes], ended: bool, timeout: float | None
) -> tuple[str, str | None] | None:
    """What ended the child, and what to do about it; None if it came to its end."""
    if not ended:
        return (
            f"hung: no end after {timeout:g} s",
            "raise --timeout, or lower --max-new-tokens or --batch-size",
        )
    code = process.wait()
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else "a signal"
        memory = "; the system's own out-of-memory killer does that" if -code == 9 else ""
        return (
            f"its process was killed by signal {-code} ({name}){memory}",
            "lower --batch-size, or choose a smaller --dtype" if memory else None,
        )
    return f"its process ended with exit code {code}; what it said is on standard error", None
