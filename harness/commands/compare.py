"""`lora-stack compare`: two or more adapters side by side, and what merging them would do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from harness.commands.analyze import add_report_arguments, finish, judge_adapters, new_folder
from harness.options import add_option

if TYPE_CHECKING:
    from harness.analysis.comparison import ComparisonFigures
    from harness.verdict import Verdict

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
    )
    return finish(arguments, figures, folder, [*judge_adapters(figures), *_judge_pairs(figures)])


def _judge_pairs(figures: ComparisonFigures) -> list[Verdict]:
    from harness.verdict import Outcome, Verdict

    checks = []
    for pair in figures.pairs:
        total = pair.total
        evidence = (
            ("no module in common",)
            if total is None
            else (
                f"cosine {total.cosine:+.3g} over {total.modules} shared modules "
                f"(±{total.cosine_by_chance:.2g} by chance)",
                f"output overlap {total.column_overlap:.3g} "
                f"({total.column_overlap_by_chance:.2g} by chance), "
                f"input overlap {total.row_overlap:.3g} ({total.row_overlap_by_chance:.2g})",
            )
        )
        checks.append(
            Verdict(
                name=f"overlap: {pair.first} and {pair.second}",
                outcome=Outcome.SKIPPED if total is None else Outcome.HELD,
                evidence=evidence,
            )
        )
    return checks
