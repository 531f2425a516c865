"""Two commits or environments in turn: each in a process of its own, asked for one generation
after the other.

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
    GroupVisit,
    Visit,
    collected,
    entered_group,
    groups_of,
    measurable,
    visit_group,
)
from harness.errors import InputError

__all__ = ["Worker", "answers_on", "in_turn", "serve"]

_REMEDY = "see its message above; it must be a lora-stack with bench --serve"


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
    """Say which groups of cells there are, then answer each line of *requests*: `enter GROUP`,
    `time CELL` for one generation, `leave` for what the visit came to, `end` for all results.

    Raises:
        InputError: no cell can be measured here, or a line asks for something else.
    """
    possible, skipped = measurable(measurer, cells)
    groups = groups_of(possible)
    visits: dict[str, list[Visit]] = {cell.key: [] for cell in possible}
    for group in groups.values():
        visit_group(measurer, group, warming=True)
    ready = {name: [cell.key for cell in group] for name, group in groups.items()}
    _answer(answers, {"ready": ready, "repeats": repeats})
    with contextlib.ExitStack() as entered:
        visit: GroupVisit | None = None
        for line in requests:
            word, _, name = line.strip().partition(" ")
            if word == "end":
                break
            if word == "enter" and name in groups:
                visit = entered.enter_context(entered_group(measurer, groups[name]))
            elif word == "time" and visit is not None and name in visit.keys:
                visit.once(name)
            elif word == "leave" and visit is not None:
                for key, seen in visit.seen().items():
                    visits[key].append(seen)
                visit = None
                entered.close()
            else:
                raise InputError(
                    f"was asked {line!r}", where="bench --serve", remedy="use the same version"
                )
            _answer(answers, {"done": word})
    measurer.close_ceilings()
    made = [collected(measurer, cell, visits[cell.key]) for cell in possible]
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

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
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

    def ready(self) -> tuple[dict[str, list[str]], int]:
        """What it says once it is loaded and warm: the groups of cells that it can measure, and
        how many generations a round is to have.

        Raises:
            InputError: it has ended, or says something else.
        """
        found = self.read()
        groups, repeats = found.get("ready"), found.get("repeats")
        if not isinstance(groups, dict) or not isinstance(repeats, int):
            raise InputError(
                "did not say what it measures", where=f"the {self.name} side", remedy=_REMEDY
            )
        return {str(name): [str(key) for key in keys] for name, keys in groups.items()}, repeats

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

    In a round the groups of cells come in an order drawn anew. All sides enter a group, then
    generate in turn, one generation each, so that what slows the machine for a while slows all;
    who goes first changes every time.

    Raises:
        InputError: a worker ended, or answered what cannot be read.
    """
    groups: dict[str, dict[str, list[Worker]]] = {}
    repeats = 1
    for worker in workers:
        having, wanted = worker.ready()
        repeats = max(repeats, wanted)
        for name, keys in having.items():
            for key in keys:
                groups.setdefault(name, {}).setdefault(key, []).append(worker)
    order = random.Random(seed)
    turn = 0
    for number in range(rounds):
        names = list(groups)
        order.shuffle(names)
        for place, name in enumerate(names):
            sides = [w for w in workers if any(w in having for having in groups[name].values())]
            for worker in sides:
                worker.ask(f"enter {name}")
            for _ in range(repeats):
                turn += 1
                for key, having in groups[name].items():
                    first = turn % len(having)
                    for worker in having[first:] + having[:first]:
                        worker.ask(f"time {key}")
            for worker in sides:
                worker.ask("leave")
            if progress is not None:
                progress((number + (place + 1) / len(names)) / rounds)
    return [results_in(worker.ask("end"), f"the {worker.name} side") for worker in workers]
