"""The command `lora-stack`: argv → one call → print.

Each command is a module of `harness.commands`, imported when it is named: `--help` imports no
torch. Knows nothing of what the commands do.

Exit codes: 0 held · 1 a verdict failed · 2 bad usage or input · 3 internal error · 5 nothing ran ·
130 interrupted · 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from harness import __version__
from harness.display.terminal import shown
from harness.errors import HarnessError, InputError
from harness.interrupts import exit_code, terminable
from harness.options import EMPTY, empty_option, with_dashes

__all__ = ["main"]

_COMMANDS = (
    "run", "verify", "stopping", "review", "merge", "flatten", "analyze", "compare", "bench",
    "check-files", "lock",
)  # fmt: skip
_USAGE_ERROR, _INTERNAL_ERROR = 2, 3


class _Parser(argparse.ArgumentParser):
    """argparse with the house's error line, and the nearest option for a typo."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"error: {message} → see: {self.prog} --help\n")


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"harness.commands.{name.replace('-', '_')}")


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for *argv*: of the command it starts with alone, so that only that is imported."""
    parser = _Parser(
        prog="lora-stack",
        description="Evaluation and regression harness for stacks of LoRA adapters. "
        "With no stack named, the embedded tiny trained stack is used.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lora-stack {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in _COMMANDS else _COMMANDS:
        module = _command(name)
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = with_dashes(sys.argv[1:] if argv is None else argv)
    empty = empty_option(words)
    if empty is not None:
        return _complain(f"{empty}: {EMPTY}", _USAGE_ERROR)
    arguments = _parser(words).parse_args(words)
    try:
        with terminable():
            code: int = _command(arguments.command).run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _complain(str(error), _USAGE_ERROR)
    except KeyboardInterrupt as error:
        # What was at work notes on the interrupt how far it came.
        return _complain(
            "; ".join(["interrupted", *getattr(error, "__notes__", ())]), exit_code(error)
        )
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        machine = _of_the_machine(error)
        if machine is not None:
            return _complain(machine, _USAGE_ERROR)
        if os.environ.get("LORA_STACK_TRACEBACK"):
            raise
        kind = "" if isinstance(error, HarnessError) else f"{type(error).__name__}: "
        return _complain(
            f"{kind}{error} → please report this; LORA_STACK_TRACEBACK=1 shows where it happened",
            _INTERNAL_ERROR,
        )


def _of_the_machine(error: Exception) -> str | None:
    """What a model that does not fit, or a broken device, is told as; None for anything else."""
    if "torch" not in sys.modules:
        return None
    from harness.engines.faults import device_fault

    fault = device_fault(error)
    return None if fault is None else f"{fault.said} → {fault.remedy}"


def _complain(message: str, code: int) -> int:
    for line in message.split("\n"):
        print(f"error: {shown(line)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
