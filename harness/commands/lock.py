"""`lora-stack lock`: write down what the stack's files are, to be held against on every run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.display.terminal import console, errors, shown
from harness.options import add_option, add_stack_arguments
from harness.options import stack_options as stack_options_of

SUMMARY = "write stack.lock.json: the SHA-256 of every file of the stack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_option(
        parser, "--check", action="store_true", help="write nothing; 1 if the lock does not hold"
    )
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write or check the lock; returns the exit code."""
    import dataclasses

    from harness.files.file_kinds import is_there
    from harness.files.strict_json import read_json_object
    from harness.preflight import check_stack_files
    from harness.resolve import LOCK_NAME, NO_LOCK, stack_from_options
    from harness.stack_lock import lock_faults, make_lock, write_lock
    from harness.verdict import Outcome, Verdict

    options = stack_options_of(arguments)
    given = options.lock_file
    stack = stack_from_options(dataclasses.replace(options, lock_file=NO_LOCK))
    beside = Path(options.stack_file).parent if options.stack_file else Path.cwd()
    path = Path(given) if given and given != NO_LOCK else beside / LOCK_NAME
    if arguments.check:
        faults = lock_faults(path, stack)
        outcome = Outcome.CHANGED if faults else Outcome.HELD
        evidence = tuple(str(fault) for fault in faults) or (f"every file is as {path} says",)
    else:
        # What is locked is taken for sound from then on.
        check_stack_files(stack, trust_remote_code=options.trust_remote_code)
        before = read_json_object(path, what="the lock file") if is_there(path) else None
        lock = make_lock(stack, before=before, progress=_progress)
        write_lock(path, lock)
        outcome = Outcome.HELD
        parts = [lock["base"], *lock["adapters"].values()]
        count = sum(len(part["files"]) for part in parts)
        state = "unchanged" if before == lock else "changed" if before else "new"
        evidence = (f"{path}: {count} files of {stack.name}, {state}",)
    verdict = Verdict(name="lock", outcome=outcome, evidence=evidence)
    if arguments.json:
        document = {"verdict": outcome.value, "lock": str(path), "checks": [verdict.as_json()]}
        json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        for line in evidence:
            console().print(shown(line), soft_wrap=True)
    return 0 if outcome.passed else 1


def _progress(done: int, total: int) -> None:
    if errors().is_terminal:
        errors().print(f"hashed {done} of {total} files", end="\r" if done < total else "\n")
