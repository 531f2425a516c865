"""`lora-stack flatten`: adapters into one ordinary adapter."""

from __future__ import annotations

import argparse

from harness.commands.merge import print_report
from harness.options import FILES_TRUST_OPTION, add_option, add_options

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "concatenate adapters into one LoRA adapter that any server can load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-stack flatten`."""
    add_option(
        parser, "--adapters", nargs="+", required=True, metavar="PATH", help="one or more adapters"
    )
    add_option(parser, "--output", required=True, metavar="DIR", help="a new folder")
    add_option(
        parser, "--weights", nargs="+", type=float, metavar="W", help="one number an adapter"
    )
    add_option(
        parser,
        "--compress",
        action="store_true",
        help="bring the rank down to the numerical rank, exactly",
    )
    add_option(
        parser, "--rank", type=int, metavar="R", help="truncate to this rank; reports the error"
    )
    add_option(parser, "--dtype", default="float32", metavar="T", help="of the factors (float32)")
    add_option(
        parser,
        "--verify",
        default="sampled",
        choices=("none", "sampled", "full"),
        help="how much is read back against float64 (sampled)",
    )
    add_options(parser, (FILES_TRUST_OPTION,))
    add_option(parser, "--force", action="store_true", help="replace a non-empty output folder")
    add_option(parser, "--json", action="store_true", help="one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Flatten; returns the exit code."""
    from harness.merge import flatten_adapters

    report = flatten_adapters(
        arguments.adapters,
        arguments.output,
        weights=arguments.weights,
        compress=arguments.compress,
        rank=arguments.rank,
        dtype=arguments.dtype,
        verify=arguments.verify,
        force=arguments.force,
        trust_remote_code=arguments.trust_remote_code,
    )
    print_report(report, limit=None, as_json=arguments.json)
    return 0
