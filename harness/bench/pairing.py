"""Two commits or environments in turn: each in a process of its own, asked round by round.

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
from harness.bench.measuring import Measurer, Visit, collected, measurable, visit_all
from harness.bench.results import Results, as_benchmark_json, results_in
from harness.bench.session import results_of
from harness.errors import InputError

__all__ = ["Worker", "answers_on", "in_turn", "serve"]


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
    """Answer each line of *requests*: a number asks for a round with that seed, `end` for the
    results of all rounds."""
    possible, skipped = measurable(measurer, cells)
    visits: dict[str, list[Visit]] = {cell.key: [] for cell in possible}
    visit_all(measurer, possible, seed=0, warming=True)
    _answer(answers, {"ready": [cell.key for cell in possible]})
    for line in requests:
        if line.strip() == "end":
            break
        found = visit_all(measurer, possible, seed=int(line), repeats=repeats)
        for key, visit in found.items():
            visits[key].append(visit)
        _answer(answers, {"done": int(line)})
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
                remedy="see its message above; it must be a lora-stack with bench --serve",
            )
        return found

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
    """*rounds* rounds of every worker, in an order drawn anew each round; their results in the
    order of *workers*.

    Raises:
        InputError: a worker ended, or answered what cannot be read.
    """
    for worker in workers:
        worker.read()  # ready: loaded and warm
    order = random.Random(seed)
    for number in range(rounds):
        turn = list(workers)
        order.shuffle(turn)
        for worker in turn:
            worker.ask(str(number + 1))
        if progress is not None:
            progress((number + 1) / rounds)
    return [results_in(worker.ask("end"), f"the {worker.name} side") for worker in workers]
