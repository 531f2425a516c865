"""The child of an isolated run: `python -m harness.running.child DESCRIPTOR`, options on stdin.

Runs the modes that it is asked for and tells what it does on the descriptor. Dies with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
from dataclasses import replace

from harness.completion import Completion
from harness.display.terminal import shown
from harness.errors import InputError
from harness.running.collected import Collected, Request
from harness.running.in_process import run_here
from harness.running.messages import as_line, completion_message

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


class _Telling(Collected):
    """Tells each thing when it happens."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def tell(self, kind: str, **values: object) -> None:
        line = as_line({"kind": kind, **values})
        while line:
            line = line[os.write(self._descriptor, line) :]

    def add(self, mode: str, completion: Completion) -> None:
        self.tell("completion", mode=mode, completion=completion_message(completion))

    def done(self, mode: str, seconds: float) -> None:
        self.tell("done", mode=mode, seconds=seconds)

    def failed(self, mode: str, said: str, remedy: str | None = None) -> None:
        self.tell("failed", mode=mode, said=said, remedy=remedy)

    def not_run(self, mode: str, why: str, remedy: str | None = None) -> None:
        """Left to the next child."""


def main() -> None:
    """Run the modes on standard input's request."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    telling = _Telling(int(sys.argv[1]))
    asked = json.load(sys.stdin)
    try:
        request = replace(
            Request.of(argparse.Namespace(**asked["arguments"])), modes=tuple(asked["modes"])
        )

        def loaded(lines: list[str]) -> None:
            telling.tell(
                "loaded", lines=lines, device=telling.device, dtype=telling.dtype,
                notes=telling.notes, seconds=telling.seconds["load"],
            )  # fmt: skip

        def progress(mode: str, share: float) -> None:
            telling.tell("progress", mode=mode, share=share)

        run_here(request, telling, loaded=loaded, progress=progress)
    except InputError as error:
        telling.tell("refused", faults=[[one.fault, one.where, one.remedy] for one in error.faults])
    except Exception as error:
        from harness.engines.faults import device_fault

        fault = device_fault(error)
        if fault is not None:  # while loading: of a mode it is told already
            telling.tell("refused", faults=[[fault.said, "loading", fault.remedy]])
        elif os.environ.get("LORA_STACK_TRACEBACK"):
            raise
        else:
            for line in f"{type(error).__name__}: {error}".split("\n"):
                print(f"error: {shown(line)}", file=sys.stderr)
            sys.exit(3)


if __name__ == "__main__":
    main()
