"""`lora-stack run`: every mode over every prompt in one load, shown side by side."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.display.terminal import console, errors
from harness.errors import InputError
from harness.interrupts import exit_code
from harness.options import (
    APPLICATION_OPTION,
    PROMPT_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
)
from harness.options import stack_options as stack_options_of

if TYPE_CHECKING:
    from rich.console import Console

    from harness.report.run import RunReport
    from harness.running import Collected, Request

SUMMARY = "generate with every mode, show them side by side, judge stopping and effect"

_NOTHING_RAN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_options(parser.add_argument_group("the prompts"), PROMPT_OPTIONS)
    add_options(parser, (APPLICATION_OPTION,))
    add_option(parser, "--output", metavar="DIR", help="where the report goes (runs/<time>-<id>)")
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )
    add_option(
        parser,
        "--timeout",
        metavar="SECONDS",
        type=float,
        help="end a mode that takes longer, and go on with the others; implies --isolate",
    )
    add_option(
        parser,
        "--isolate",
        action="store_true",
        help="run in a child process: a mode that kills it is reported, and the others still run",
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.files.staging import check_place, new_run_folder
    from harness.preflight import check_stack_files
    from harness.report.run import as_json, write_run
    from harness.report.terminal import print_banner, print_report
    from harness.running import Collected, Request

    if arguments.timeout is not None and not 0 < arguments.timeout < math.inf:
        raise InputError(
            f"{arguments.timeout} is no time", where="--timeout", remedy="write seconds, e.g. 600"
        )
    request = Request.of(arguments)
    # Before torch is imported: what is broken is said in a second.
    check_stack_files(request.stack, trust_remote_code=request.trust_remote_code)
    folder = Path(arguments.output) if arguments.output else new_run_folder(Path("runs"))
    inputs = [request.stack.base.path, *(adapter.path for adapter in request.stack.adapters)]
    check_place(folder, inputs=inputs)
    out = errors() if arguments.json else console()
    print_banner(out, request.stack, request.preset, embedded=not stack_options_of(arguments).named)
    collected, code = Collected(), None
    try:
        _generate(arguments, request, collected, out)
    except KeyboardInterrupt as error:
        code = exit_code(error)
        collected.notes.append(f"interrupted: {collected.ran} of {request.planned} ran")
    report = _report(request, collected, complete=code is None)
    unwritten: InputError | None = None
    if report.completions or not report.complete:
        try:
            write_run(report, folder)
        except InputError as error:  # what was generated is shown all the same
            unwritten = error
    if arguments.json:
        json.dump(as_json(report), sys.stdout, ensure_ascii=True, indent=2)
        print()
    else:
        print_report(out, report, folder if unwritten is None else None)
    if unwritten is not None:
        raise unwritten
    if code is not None:
        return code
    if not report.completions and not report.verdicts:
        return _NOTHING_RAN
    return 0 if report.outcome.passed else 1


def _generate(
    arguments: argparse.Namespace, request: Request, collected: Collected, out: Console
) -> None:
    from harness.report.terminal import print_loaded, progress_bar

    def loaded(lines: list[str]) -> None:
        print_loaded(out, lines)

    with progress_bar(errors(), request.modes) as progress:
        if arguments.isolate or arguments.timeout is not None:
            from harness.running.isolated import run_apart

            run_apart(
                request, arguments, collected, timeout=arguments.timeout, loaded=loaded,
                progress=progress,
            )  # fmt: skip
        else:
            from harness.running.in_process import run_here

            run_here(request, collected, loaded=loaded, progress=progress)


def _report(request: Request, collected: Collected, *, complete: bool) -> RunReport:
    from harness.report.run import RunReport, judge_run

    whole = collected.of(request, whole=True)
    return RunReport(
        stack=request.stack,
        preset=request.preset,
        device=collected.device,
        dtype=collected.dtype,
        application=request.application.value,
        completions=collected.of(request),
        verdicts=(*judge_run(request.stack, whole), *collected.faults.values()),
        seconds=collected.seconds,
        notes=tuple(collected.notes),
        planned=request.planned,
        complete=complete,
    )
