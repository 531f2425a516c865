"""Processes that write at once, and processes that are killed at work.

    python -m harness.tests.many_writers together FOLDER PROCESSES SNAPSHOTS ROUNDS
    python -m harness.tests.many_writers kill FOLDER snapshot|benchmark KILLS

Prints a JSON object. Imports no torch: a fork is cheap and has no threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness.completion import Prompt
from harness.snapshot import read_snapshot, snapshot_of, write_form
from harness.snapshot_files import evidence_of, read_pair, write_pair
from harness.staging import write_text
from harness.tests.values import completion

_TOKENS = 400


def accept(folder: Path, number: int, value: int) -> None:
    """Accept a completion as the suites' `--snapshot-update` does; every token is *value*, and so
    is the evidence beside it."""
    said = completion(
        Prompt(id=f"p-{number}", text="x"), token_ids=(value,) * _TOKENS, text=f"{value} " * _TOKENS
    )
    text = write_form(snapshot_of(said, {})).encode("utf-8")
    write_pair(folder / "test_x" / f"p-{number}.toml", text, _evidence(value))


def _evidence(value: int) -> bytes:
    return value.to_bytes(4, "little") * _TOKENS


def accepted(folder: Path, number: int) -> int | None:
    """The value of snapshot *number*; None if it is not there.

    Raises:
        InputError: it cannot be read, or its evidence is another's.
        AssertionError: it is a mixture of two.
    """
    path = folder / "test_x" / f"p-{number}.toml"
    pair = read_pair(path)
    if pair.text is None:
        return None
    found = read_snapshot(pair.text.decode("utf-8"), where=path)
    assert len(set(found.token_ids)) == 1
    assert len(found.token_ids) == _TOKENS
    value = found.token_ids[0]
    assert found.text == f"{value} " * _TOKENS
    assert evidence_of(pair, where=path) == _evidence(value)
    return value


def _litter(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith((".staging", ".replaced"))]


def together(folder: Path, processes: int, snapshots: int, rounds: int) -> dict[str, int]:
    """Each round every process writes every snapshot, in an order of its own, with a value of its
    own and the round; then each must be there, whole, and of this round."""
    seen = {"written": 0, "lost": 0, "mixed": 0, "failed": 0, "litter": 0}
    for turn in range(rounds):
        children = []
        for process in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    order = list(range(snapshots))
                    random.Random(process).shuffle(order)
                    for number in order:
                        accept(folder, number, turn * processes + process)
                    os._exit(0)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
            children.append(child)
        seen["failed"] += sum(os.waitpid(child, 0)[1] != 0 for child in children)
        for number in range(snapshots):
            seen["written"] += processes
            try:
                value = accepted(folder, number)
            except Exception:
                seen["mixed"] += 1
                continue
            seen["lost"] += value is None or value // processes != turn
        seen["litter"] += len(_litter(folder))
    return seen


def _snapshot(folder: Path, value: int) -> None:
    for number in range(3):
        accept(folder, number, value)


def _snapshot_state(folder: Path) -> list[int | None]:
    return [accepted(folder, number) for number in range(3)]


def _benchmark(folder: Path, value: int) -> None:
    # As a benchmark file is saved: one JSON document through the staging.
    write_text(folder / "benchmark.json", json.dumps({"value": value, "seconds": [value] * 20_000}))


def _benchmark_state(folder: Path) -> list[int | None]:
    path = folder / "benchmark.json"
    if not path.exists():
        return [None]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["seconds"] == [document["value"]] * 20_000
    return [document["value"]]


KILLED: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], list[int | None]]]] = {
    "snapshot": (_snapshot, _snapshot_state),
    "benchmark": (_benchmark, _benchmark_state),
}


def kill(folder: Path, what: str, kills: int) -> dict[str, int]:
    """Kill a writer at a random moment, *kills* times while it is at work; the moments are drawn
    up to a horizon that shrinks when the writer finishes first and grows when it is caught."""
    write, state = KILLED[what]
    write(folder, 0)
    current = state(folder)
    seen = {"killed": 0, "old": 0, "new": 0, "partial": 0, "lost": 0}
    chance, horizon, value = random.Random(0), 0.02, 0
    while seen["killed"] < kills:
        value += 1
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b"x")
            write(folder, value)
            os._exit(0)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        time.sleep(chance.random() * horizon)
        os.kill(child, signal.SIGKILL)
        finished = os.WIFEXITED(os.waitpid(child, 0)[1])
        horizon *= 0.9 if finished else 1.05
        try:
            found = state(folder)
        except Exception:
            seen["partial"] += 1
            continue
        seen["killed"] += not finished
        seen["lost"] += any(
            now not in (then, value) for then, now in zip(current, found, strict=True)
        )
        seen["old"] += found == current
        seen["new"] += found != current
        current = found
    old = time.time() - 60
    for entry in folder.rglob(".staging*"):
        os.utime(entry, (old, old))
    write(folder, value + 1)
    return seen | {"litter": len(_litter(folder))}


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    if what == "together":
        processes, snapshots, rounds = map(int, rest)
        figures = together(Path(folder), processes, snapshots, rounds)
    else:
        figures = kill(Path(folder), rest[0], int(rest[1]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
