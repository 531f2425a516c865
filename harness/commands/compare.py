"""`lora-stack compare`: two or more adapters side by side, and what merging them would do."""

from __future__ import annotations

import argparse

from harness.commands.analyze import add_report_arguments, finish, new_folder
from harness.options import add_option

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "how adapters overlap and interfere, and what each merge strategy would do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-stack compare`."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="two or more folders or hub ids"
    )
    add_option(
        parser, "--names", nargs="+", metavar="NAME", help="one name an adapter (folder names)"
    )
    add_option(
        parser,
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one number an adapter, for the merge strategies that take weights",
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, write the report, and say what stands out."""
    from harness.analysis.running import compare

    folder = new_folder(arguments, arguments.adapters)
    figures = compare(
        arguments.adapters,
        names=arguments.names,
        weights=arguments.weights,
        base_model=arguments.base_model,
        exact_entries=arguments.exact_entries,
        intruders=arguments.intruders,
        keep_going=arguments.keep_going,
        trust_remote_code=arguments.trust_remote_code,
    )
    return finish(arguments, figures, folder)
