"""`lora-stack analyze`: what is in one adapter, as figures, findings, plots and a report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.display.terminal import errors
from harness.errors import InputError
from harness.options import FILES_TRUST_OPTION, add_option, add_options

if TYPE_CHECKING:
    from harness.analysis.comparison import ComparisonFigures
    from harness.analysis.figures import AdapterFigures

__all__ = ["SUMMARY", "add_arguments", "add_report_arguments", "finish", "new_folder", "run"]

SUMMARY = "what is in an adapter: norms, spectra, distributions, findings, plots"

_BROKEN_INPUT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-stack analyze`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder or hub id")
    add_option(parser, "--name", metavar="NAME", help="what to call it (the folder's name)")
    add_report_arguments(parser)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `analyze` and `compare` share."""
    add_option(
        parser,
        "--base-model",
        metavar="PATH|ID",
        help="relate the figures to this base; none is needed",
    )
    add_option(
        parser,
        "--intruders",
        type=int,
        default=0,
        metavar="K",
        help="look for directions foreign to the base among the top K of W + ΔW (slow)",
    )
    add_option(
        parser,
        "--exact-entries",
        action="store_true",
        help="count every entry of every ΔW instead of a sample (slow)",
    )
    add_option(
        parser,
        "--keep-going",
        action="store_true",
        help="leave broken modules out, report the sound ones, and still exit with 2",
    )
    add_options(parser, (FILES_TRUST_OPTION,))
    add_option(parser, "--no-plots", action="store_true", help="figures and tables alone")
    add_option(
        parser, "--output", metavar="DIR", help="a new folder for the report (runs/<time>-<id>)"
    )
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    """Analyse, write the report, and say what stands out."""
    from harness.analysis.running import analyze

    folder = new_folder(arguments, [arguments.adapter])
    figures = analyze(
        arguments.adapter,
        name=arguments.name,
        base_model=arguments.base_model,
        exact_entries=arguments.exact_entries,
        intruders=arguments.intruders,
        keep_going=arguments.keep_going,
        trust_remote_code=arguments.trust_remote_code,
    )
    return finish(arguments, figures, folder)


def new_folder(arguments: argparse.Namespace, adapters: Sequence[str]) -> Path:
    """Where the report goes; a taken place, one in an adapter, and one that cannot be written are
    refused before any work is done."""
    from harness.files.file_kinds import is_folder, is_there
    from harness.files.staging import check_place, new_run_folder

    folder = Path(arguments.output) if arguments.output else new_run_folder(Path("runs"))
    if is_there(folder) and (not is_folder(folder) or any(folder.iterdir())):
        raise InputError("exists already", where=folder, remedy="name a new folder as --output")
    check_place(folder, inputs=[Path(name) for name in adapters if is_folder(Path(name))])
    return folder


def finish(
    arguments: argparse.Namespace,
    figures: AdapterFigures | ComparisonFigures,
    folder: Path,
) -> int:
    """Judge, draw, write, print; returns the exit code."""
    from harness.analysis.running import PLOT_HINT, draw
    from harness.analysis.writing import as_json, write_report
    from harness.report.adapters import judge_adapters, print_adapters
    from harness.verdict import overall

    plots = () if arguments.no_plots else draw(figures)
    if plots is None:
        errors().print(PLOT_HINT)
    write_report(figures, folder, plots=plots or ())
    checks = judge_adapters(figures)
    outcome = overall(checks)
    if arguments.json:
        value = {
            "verdict": outcome.value,
            "checks": [check.as_json() for check in checks],
            "report": str(folder),
            **as_json(figures, plots=plots or ()),
        }
        json.dump(value, sys.stdout, ensure_ascii=True, indent=2, allow_nan=False)
        print()
    else:
        print_adapters(figures, folder)
    if figures.faults:
        return _BROKEN_INPUT
    return 0 if outcome.passed else 1
