"""`lora-stack merge`: adapters into one checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from harness.options import FILES_TRUST_OPTION, add_option, add_options

if TYPE_CHECKING:
    from harness.merge import MergeReport

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "merge adapters into a checkpoint, proven by reading it back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-stack merge`."""
    add_option(parser, "--base", required=True, metavar="PATH|ID", help="the base model")
    add_option(
        parser, "--adapters", nargs="+", required=True, metavar="PATH", help="one or more adapters"
    )
    add_option(parser, "--output", required=True, metavar="DIR", help="a new folder")
    add_option(
        parser,
        "--merge-strategy",
        default="sequential",
        metavar="NAME",
        help="sequential (default), weighted, average, ties, dare_linear, dare_ties, della, "
        "magnitude_prune, svd, knots, tsv, iso_c",
    )
    add_option(
        parser, "--weights", nargs="+", type=float, metavar="W", help="one number an adapter"
    )
    add_option(parser, "--dtype", metavar="T", help="bfloat16, float16, float32 (as stored)")
    add_option(
        parser,
        "--density",
        type=float,
        default=0.5,
        metavar="D",
        help="share of entries that ties, dare_*, della, magnitude_prune and knots keep (0.5)",
    )
    add_option(parser, "--rank", type=int, metavar="R", help="svd: truncate to this rank")
    add_option(
        parser,
        "--epsilon",
        type=float,
        default=0.1,
        metavar="E",
        help="della: how far the drop probability varies (0.1)",
    )
    add_option(parser, "--seed", type=int, default=0, metavar="N", help="for dare_* and della (0)")
    add_option(
        parser,
        "--verify",
        default="sampled",
        choices=("none", "sampled", "full"),
        help="how much of the output is read back against float64 (sampled); full also hashes "
        "the base and the output",
    )
    add_option(
        parser,
        "--max-rounding-loss",
        type=float,
        metavar="SHARE",
        help="fail if storing loses more than this share of ‖ΔW‖, e.g. 0.5",
    )
    add_option(
        parser, "--workers", type=int, metavar="N", help="threads; default: one a core, and one"
    )
    add_options(parser, (FILES_TRUST_OPTION,))
    add_option(parser, "--force", action="store_true", help="replace a non-empty output folder")
    add_option(parser, "--json", action="store_true", help="one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Merge; returns the exit code."""
    # Before numpy is imported: each worker multiplies alone, and BLAS' own threads would only spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from harness.display.terminal import errors, shown
    from harness.memory import keep_freed_pages
    from harness.merge import RoundingLossError, StrategyOptions, merge_lora_adapters

    options = StrategyOptions(
        density=arguments.density,
        rank=arguments.rank,
        epsilon=arguments.epsilon,
        seed=arguments.seed,
    )
    keep_freed_pages()
    progress = _Progress()
    try:
        report = merge_lora_adapters(
            arguments.base,
            arguments.adapters,
            arguments.output,
            merge_strategy=arguments.merge_strategy,
            weights=arguments.weights,
            dtype=arguments.dtype,
            options=options,
            workers=arguments.workers,
            verify=arguments.verify,
            max_rounding_loss=arguments.max_rounding_loss,
            force=arguments.force,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress if progress.shown else None,
        )
    except RoundingLossError as error:
        progress.close()
        if arguments.json:
            print_report(error.report, limit=error.limit, as_json=True)
        errors().print(f"failed: {shown(str(error))}", soft_wrap=True)
        return 1
    finally:
        progress.close()
    print_report(report, limit=arguments.max_rounding_loss, as_json=arguments.json)
    return 0


def print_report(report: MergeReport, *, limit: float | None, as_json: bool) -> None:
    """The report on standard output: Markdown for people, or one JSON object."""
    if as_json:
        checks = checks_of(report, limit)
        verdict = "failed" if any(c["verdict"] == "failed" for c in checks) else "held"
        value = {"verdict": verdict, "checks": checks, **report.as_json()}
        json.dump(value, sys.stdout, ensure_ascii=True, indent=2, allow_nan=False)
        print()
        return
    from harness.display.terminal import console, shown

    lines = [line.removeprefix("- ") for line in report.summary()]
    place = f"{report.output}: {report.kind} of {', '.join(a.name for a in report.adapters)}"
    what = f" ({report.strategy}, {report.bytes_written:,} bytes, {report.seconds:.1f} s)"
    for line in (place + what, *lines, *report.notes):
        console().print(shown(line), soft_wrap=True)


def checks_of(report: MergeReport, limit: float | None) -> list[dict[str, Any]]:
    """What was judged, in the form that every `--json` output uses."""
    from harness.verdict import Outcome, Verdict

    proof = Verdict(
        name="proof",
        outcome=Outcome.HELD if report.verify != "none" else Outcome.SKIPPED,
        evidence=tuple(line.removeprefix("- ") for line in report.summary()),
    )
    checks = [proof.as_json()]
    if limit is not None:
        loss = report.rounding_loss or 0.0
        rounding = Verdict(
            name="rounding",
            outcome=Outcome.HELD if loss <= limit else Outcome.FAILED,
            evidence=(f"lost {loss:.3%} of ‖ΔW‖, allowed {limit:.3%}",),
            remedy=None if loss <= limit else "choose --dtype float32, or serve unmerged",
        )
        checks.append(rounding.as_json())
    return checks


class _Progress:
    """A bar with bytes and time left on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

            from harness.display.terminal import errors

            self._bar = Progress(
                "merging", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=errors()
            )
            self._bar.start()
            self._task = self._bar.add_task("merging", total=total)
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar down; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
