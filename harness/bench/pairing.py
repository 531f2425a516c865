"""Two commits or environments in turn: each in a process of its own, asked group by group.

A worker is any command that ends in `lora-stack bench --serve …`; it loads its stack, says what it
will measure, then answers one line for each line it is sent. Only one works at a time. Knows
nothing of judging.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from harness.bench.cells import Cell
from harness.bench.measuring import Measurer
from harness.bench.results import Results, as_benchmark_json, results_in
from harness.bench.session import results_of
from harness.bench.visiting import (
    Visit,
    at_least_one,
    collected,
    groups_of,
    measurable,
    visit_group,
    warm_up,
)
from harness.errors import InputError

__all__ = ["Worker", "answers_on", "in_turn", "serve"]

_A_VISIT = 5  # generations of a cell at most; a round of more has several visits
_REMEDY = "see its message above; it must be a lora-stack with bench --serve as of this version"


@contextlib.contextmanager
def answers_on() -> Iterator[TextIO]:
    """Standard output for answers alone; whatever else is printed goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as answers:
            yield answers
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def serve(
    measurer: Measurer,
    cells: Sequence[Cell],
    requests: TextIO,
    answers: TextIO,
    *,
    repeats: int = 1,
) -> None:
    """Say which groups of cells there are and how many visits a round has, then answer each line
    of *requests*: a group's name asks for a visit of its cells, `end` for the results.

    Raises:
        InputError: no cell can be measured here, or a line names no group.
    """
    possible, skipped = measurable(measurer, cells)
    for group in groups_of(possible).values():
        skipped |= warm_up(measurer, group)
    possible = [cell for cell in possible if cell.key not in skipped]
    at_least_one(measurer, possible, skipped)
    groups = groups_of(possible)
    visits: dict[str, list[Visit]] = {cell.key: [] for cell in possible}
    a_round = -(-repeats // _A_VISIT)
    _answer(answers, {"ready": list(groups), "visits": a_round})
    for line in requests:
        name = line.strip()
        if name == "end":
            break
        if name not in groups:
            raise InputError(
                f"was asked for {name!r}", where="bench --serve", remedy="use the same version"
            )
        found = visit_group(measurer, groups[name], repeats=-(-repeats // a_round))
        for key, visit in found.items():
            visits[key].append(visit)
        _answer(answers, {"done": name})
    else:
        return  # the other end is gone: nobody asks for results
    measurer.close_ceilings()
    made = [collected(measurer, cell, visits[cell.key], a_round=a_round) for cell in possible]
    _answer(answers, as_benchmark_json(results_of(measurer, made, skipped, in_turn=True)))


def _answer(answers: TextIO, value: Mapping[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


class Worker:
    """One process that measures when asked. Use it as a context manager."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            raise InputError(
                f"cannot be started: {error.strerror}",
                where=f"the {name} side: {command[0]}",
                remedy="give a command that runs lora-stack of the other environment",
            ) from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """End it: once it has been read to the end it ends by itself, else nobody waits for it."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if failed is not None:
            self._process.terminate()
        try:
            self._process.wait(timeout=30 if failed is None else 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def read(self) -> dict[str, Any]:
        """The next answer; raises `InputError` if the worker has ended without one."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(
                "gave no answer" if not line else f"answered {line[:60]!r}",
                where=f"the {self.name} side",
                remedy=_REMEDY,
            )
        return found

    def ready(self) -> tuple[list[str], int]:
        """What it says once it is loaded and warm: the groups of cells that it can measure, and
        how many visits make a round.

        Raises:
            InputError: it has ended, or says something else.
        """
        found = self.read()
        groups, visits = found.get("ready"), found.get("visits")
        if not isinstance(groups, list) or not isinstance(visits, int):
            raise InputError(
                "did not say what it measures", where=f"the {self.name} side", remedy=_REMEDY
            )
        return [str(name) for name in groups], visits

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: reading says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self.read()


def in_turn(
    workers: Sequence[Worker],
    rounds: int,
    *,
    progress: Callable[[float], None] | None = None,
    seed: int = 0,
) -> list[Results]:
    """*rounds* rounds of every worker; their results in the order of *workers*.

    The groups of cells come in an order drawn anew each time, and each is visited by one worker
    right after the other; who goes first changes from time to time. Where a round has several
    visits they are spread over as many passes: what slows a shared machine for a second shall not
    hit all of one side's.

    Raises:
        InputError: a worker ended, or answered what cannot be read.
    """
    groups: dict[str, list[Worker]] = {}
    visits = 1
    for worker in workers:
        having, a_round = worker.ready()
        visits = max(visits, a_round)
        for name in having:
            groups.setdefault(name, []).append(worker)
    order = random.Random(seed)
    firsts = {name: order.randrange(len(having)) for name, having in groups.items()}
    passes = rounds * visits
    for number in range(passes):
        names = list(groups)
        order.shuffle(names)
        for place, name in enumerate(names):
            having_it = groups[name]
            first = (firsts[name] + number) % len(having_it)
            for worker in having_it[first:] + having_it[:first]:
                worker.ask(name)
            if progress is not None:
                progress((number + (place + 1) / len(names)) / passes)
    return [results_in(worker.ask("end"), f"the {worker.name} side") for worker in workers]
