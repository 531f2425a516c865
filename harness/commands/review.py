"""`lora-stack review`: what changed, accepted or rejected by key, by pattern, or written down."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.options import add_option

if TYPE_CHECKING:
    from harness.pending import Decided, Record, Records

SUMMARY = "review what the suites found changed, and accept or reject it"

_HELD, _PENDING, _NOTHING_RAN = 0, 1, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    deciding = parser.add_argument_group("decide without asking")
    for flag, what in (("--accept", "write these as snapshots"), ("--reject", "drop these")):
        add_option(
            deciding,
            flag,
            metavar="GLOB",
            action="append",
            default=[],
            help=f"{what}: a pattern of names, or of their last part; repeatable",
        )
    add_option(
        deciding, "--check", action="store_true", help="say what is pending and decide nothing"
    )
    writing = parser.add_argument_group("write it down")
    add_option(writing, "--json", action="store_true", help="one JSON object on standard output")
    add_option(
        writing,
        "--markdown",
        metavar="FILE",
        nargs="?",
        const="-",
        help="the pull request's comment; without FILE on standard output. On GitHub Actions also "
        "the step's summary, and annotations at the snapshot files",
    )
    add_option(writing, "--html", metavar="FILE", help="one self-contained page")
    add_option(parser, "--tokens", action="store_true", help="differences by token, too")
    add_option(
        parser,
        "--root",
        metavar="DIR",
        help="the folder with .pending/ and the snapshots; default: the nearest one upwards",
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.pending import read_records

    root = _root(arguments.root)
    _check(arguments)
    decided: list[Decided] = []
    records = read_records(root)
    if not records.cases and not records.broken:
        return _nothing_ran(arguments)
    if arguments.accept or arguments.reject:
        decided += _decide_by_pattern(records, arguments.accept, arguments.reject)
        records = read_records(root)
    elif _asks(arguments, records):
        decided += _decide_by_key(records)
        records = read_records(root)
    elif not (arguments.json or arguments.markdown or arguments.html):
        _print(records, check=arguments.check, tokens=arguments.tokens)
    _write(arguments, records, decided)
    _tell(arguments, records, decided)
    refused = any(item.refused for item in decided)
    return _PENDING if records.pending or records.broken or refused else _HELD


def _check(arguments: argparse.Namespace) -> None:
    if arguments.check and (arguments.accept or arguments.reject):
        raise InputError("decides nothing", where="--check", remedy="leave out --accept, --reject")
    if arguments.json and arguments.markdown == "-":
        raise InputError(
            "both want standard output", where="--json and --markdown", remedy="--markdown FILE"
        )


def _root(given: str | None) -> Path:
    from harness.files.file_kinds import is_folder
    from harness.pending import FOLDER

    if given is not None:
        if not is_folder(Path(given)):
            raise InputError("is no folder", where=given, remedy="name the one with .pending/")
        return Path(given)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / FOLDER).is_dir()), here)


def _nothing_ran(arguments: argparse.Namespace) -> int:
    message = "no run of the suites is recorded here → run pytest suites, or give --root"
    if arguments.json:
        print(json.dumps({"verdict": "undecided", "checks": [], "summary": message}))
    else:
        print(f"error: {message}", file=sys.stderr)
    return _NOTHING_RAN


def _asks(arguments: argparse.Namespace, records: Records) -> bool:
    """Whether a person is there to be asked, and there is something to ask."""
    writes = arguments.json or arguments.markdown or arguments.html or arguments.check
    return bool(records.pending) and not writes and sys.stdin.isatty() and sys.stdout.isatty()


def _decide_by_pattern(
    records: Records, accepted: Sequence[str], rejected: Sequence[str]
) -> tuple[Decided, ...]:
    from harness.pending import accept, reject

    taken = _matching(records, accepted, "--accept")
    dropped = _matching(records, rejected, "--reject")
    both = {record.name for record in taken} & {record.name for record in dropped}
    if both:
        raise InputError(
            f"{sorted(both)[0]} is matched by both",
            where="--accept and --reject",
            remedy="narrow one of them; nothing was decided",
        )
    return (*accept(records.root, taken), *reject(records.root, dropped))


def _matching(records: Records, patterns: Sequence[str], option: str) -> tuple[Record, ...]:
    found: dict[str, Record] = {}
    for pattern in patterns:
        matched = [
            record
            for record in records.pending
            if fnmatch.fnmatchcase(record.name, pattern)
            or fnmatch.fnmatchcase(record.name.rpartition("/")[2], pattern)
        ]
        if not matched:
            raise InputError(
                f"{pattern!r} matches nothing that is pending; nothing was decided",
                where=option,
                remedy="lora-stack review --check lists the names",
            )
        found |= {record.name: record for record in matched}
    return tuple(found.values())


def _decide_by_key(records: Records) -> tuple[Decided, ...]:
    from harness.display.terminal import console
    from harness.pending import accept, reject
    from harness.report.review_terminal import ask, print_grid, single_keys

    print_grid(console(), records)
    with single_keys() as read_key:
        choices = ask(console(), records, read_key)
    return (*accept(records.root, choices.accepted), *reject(records.root, choices.rejected))


def _print(records: Records, *, check: bool, tokens: bool) -> None:
    from harness.display.terminal import console, shown
    from harness.report.review import summary
    from harness.report.review_terminal import print_broken, print_review

    if not check:
        print_review(console(), records, tokens=tokens)
    else:
        for record in records.pending:
            print(shown(f"{record.outcome.value:<13}{record.name}  {record.change}"))
        print_broken(console(), records)
        print(summary(records))
    if records.pending:
        print("next: lora-stack review in a terminal, or lora-stack review --accept GLOB")


def _write(arguments: argparse.Namespace, records: Records, decided: Sequence[Decided]) -> None:
    from harness.files.staging import write_text

    if arguments.json:
        from harness.report.review import as_json

        print(json.dumps(as_json(records, decided), indent=2))
    if arguments.html:
        from harness.report.review_html import as_html

        write_text(Path(arguments.html), as_html(records))
    if not arguments.markdown:
        return
    from harness.report.review_markdown import annotation_lines, as_markdown

    text = as_markdown(records)
    if arguments.markdown == "-":
        print(text, end="")
    else:
        write_text(Path(arguments.markdown), text)
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary_file).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror or error}",
                where=summary_file,
                remedy="check GITHUB_STEP_SUMMARY in the environment",
            ) from error
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotation_lines(records):
            print(line, file=sys.stderr)


def _tell(arguments: argparse.Namespace, records: Records, decided: Sequence[Decided]) -> None:
    """What was decided, on standard error where standard output is a program's."""
    from harness.display.terminal import shown

    out = sys.stderr if arguments.json or arguments.markdown == "-" else sys.stdout
    for item in decided:
        what = f"not {item.decision}: {item.refused}" if item.refused else item.decision
        print(shown(f"{item.name}: {what}"), file=out)
    if decided:
        from harness.report.review import summary

        print(summary(records), file=out)
