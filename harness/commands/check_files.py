"""`lora-stack check-files`: the preflight alone, of a stack or of single folders."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.display.terminal import console, errors, shown
from harness.options import add_option, add_stack_arguments
from harness.options import stack_options as stack_options_of

if TYPE_CHECKING:
    from harness.errors import InputError
    from harness.verdict import Verdict

_MOST_LINES = 100  # on a terminal

SUMMARY = "check every file of a stack, or single folders, before anything loads them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="adapters or bases to check by themselves"
    )
    add_stack_arguments(parser)
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check; returns 0, or 2 with a line a fault."""
    from harness.errors import InputError
    from harness.verdict import Outcome, Verdict, overall

    options = stack_options_of(arguments)
    faults: dict[str, list[InputError]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    if arguments.folders and (options.named or options.lock_file):
        raise InputError(
            "single folders and a stack are both given",
            where="check-files",
            remedy="give folders alone, or the stack's options",
        )
    for folder in arguments.folders:
        faults[folder], notes[folder] = _check_folder(
            Path(folder), trust_remote_code=options.trust_remote_code
        )
    if not arguments.folders:
        faults["the stack"], notes["the stack"] = _check_stack(arguments)
    verdicts = [
        Verdict(
            name=name,
            outcome=Outcome.FAILED if found else Outcome.HELD,
            evidence=tuple(str(fault) for fault in found) or notes[name] or ("sound",),
        )
        for name, found in faults.items()
    ]
    outcome = overall(verdicts)
    if arguments.json:
        document = {"verdict": outcome.value, "checks": [v.as_json() for v in verdicts]}
        json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        _print(verdicts)
    return 0 if outcome.passed else 2


def _check_stack(arguments: argparse.Namespace) -> tuple[list[InputError], tuple[str, ...]]:
    from harness.errors import combined, gathering
    from harness.preflight import check_stack_files
    from harness.resolve import stack_from_options

    options = stack_options_of(arguments)
    faults: list[InputError] = []
    notes: tuple[str, ...] = ()
    with gathering(faults):
        stack = stack_from_options(options, faults=faults)
        if not options.named:
            errors().print("no stack was named: this is the embedded tiny trained one")
        notes = check_stack_files(stack, trust_remote_code=options.trust_remote_code)
    if faults:
        return list(combined(faults).faults), ()
    held = () if stack.lock is None else (f"as {stack.lock} says",)
    parts = ", ".join([f"base {stack.base.source}", *(a.name for a in stack.adapters)])
    return [], (f"sound: {parts}", *held, *notes)


def _check_folder(
    folder: Path, *, trust_remote_code: bool
) -> tuple[list[InputError], tuple[str, ...]]:
    from harness.adapter_config import CONFIG_NAME
    from harness.adapter_files import read_adapter
    from harness.checkpoint_claims import check_claims
    from harness.checkpoint_files import INDEX_NAME, SINGLE_NAME, read_checkpoint
    from harness.checkpoint_tokenizer import embedding_rows
    from harness.errors import combined, gathering
    from harness.files.file_kinds import is_there
    from harness.preflight import (
        check_adapter_values,
        check_base_tokenizer,
        check_base_values,
        check_templates,
    )

    faults: list[InputError] = []
    notes: list[str] = []
    a_base = any(is_there(folder / name) for name in ("config.json", SINGLE_NAME, INDEX_NAME))
    if a_base and not (is_there(folder / CONFIG_NAME) and not is_there(folder / "config.json")):
        rows = None
        with gathering(faults):
            checkpoint = read_checkpoint(folder, faults=faults)
            rows = embedding_rows(checkpoint)
            if not faults:  # what is missing was told of
                check_claims(checkpoint, faults, trust_remote_code=trust_remote_code)
            check_base_values(checkpoint, faults)
            layers = len(checkpoint.places)
            notes.append(f"sound: a base of {layers} tensors in {len(checkpoint.shards)} files")
        check_base_tokenizer(folder, rows, faults, trust_remote_code=trust_remote_code)
        check_templates([folder], faults)
    else:
        with gathering(faults):
            files = read_adapter(folder, faults=faults, trust_remote_code=trust_remote_code)
            zero = check_adapter_values(files, faults)
            notes.append(
                f"sound: an adapter of rank {files.config.rank} on {len(files.pairs)} modules, "
                f"{files.parameters:,} parameters"
            )
            notes += [*zero, *(f"not additive: {why}" for why in files.config.not_additive)]
    return (list(combined(faults).faults) if faults else []), tuple(notes)


def _print(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        if verdict.passed:
            for line in verdict.evidence:
                console().print(shown(f"{verdict.name}: {line}"), soft_wrap=True)
            continue
        for line in verdict.evidence[:_MOST_LINES]:
            print(f"error: {shown(line)}", file=sys.stderr)
        if len(verdict.evidence) > _MOST_LINES:
            more = len(verdict.evidence) - _MOST_LINES
            print(f"error: {shown(verdict.name)}: and {more} more faults → --json tells all",
                  file=sys.stderr)  # fmt: skip
