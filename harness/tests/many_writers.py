"""Processes that write at once, and processes that are killed at work.

    python -m harness.tests.many_writers together FOLDER PROCESSES SNAPSHOTS ROUNDS
    python -m harness.tests.many_writers kill FOLDER snapshot|benchmark KILLS

Prints a JSON object. A benchmark is saved as a user does it: by a pytest session with
`--benchmark-json` over the old file. Imports no torch: a fork is cheap and has no threads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from harness import snapshot_files
from harness.completion import Prompt
from harness.files.staging import check_place
from harness.snapshot import read_snapshot, snapshot_of, write_form
from harness.snapshot_files import evidence_of, read_pair, write_pair
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
    # Waiting for a slow disk loses nothing.
    snapshot_files._PATIENCE_TO_READ = snapshot_files._PATIENCE_TO_WRITE = 3600.0
    seen = {"written": 0, "lost": 0, "mixed": 0, "failed": 0, "litter": 0}
    for turn in range(rounds):
        children = []
        for process in range(processes):
            child = os.fork()
            if child == 0:
                order = list(range(snapshots))
                random.Random(process).shuffle(order)
                value = turn * processes + process
                _quietly(lambda order=order, value=value: [accept(folder, n, value) for n in order])
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


def _snapshot(folder: Path, value: int, begun: Callable[[], object]) -> None:
    begun()
    for number in range(3):
        accept(folder, number, value)


def _snapshot_state(folder: Path) -> list[int | None]:
    return [accepted(folder, number) for number in range(3)]


_BENCHMARKS = """
import pytest

@pytest.mark.parametrize("number", range(8))
def test_one(benchmark, number):
    benchmark.extra_info["value"] = {value}
    benchmark.extra_info["seconds"] = [{value}.5] * 2000
    benchmark.pedantic(int, rounds=2)
"""


def _benchmark(folder: Path, value: int, begun: Callable[[], object]) -> None:
    import pytest

    (folder / "session").mkdir(exist_ok=True)
    test = folder / "session" / f"test_{value}.py"  # a process imports a module once
    test.write_text(_BENCHMARKS.format(value=value), encoding="utf-8")

    class Saving:
        """Says when the measuring is over and the saving begins."""

        @pytest.hookimpl(trylast=True)
        def pytest_benchmark_update_json(self) -> None:
            begun()

    kept = folder / "benchmark.json"
    code = pytest.main(
        [str(test), "-q", "--preset=elegant_style", "-p", "no:cacheprovider", "-p", "no:xdist",
         "--benchmark-quiet", f"--rootdir={folder}", f"--benchmark-json={kept}"],
        plugins=[Saving()],
    )  # fmt: skip
    assert code == 0, code


def _benchmark_state(folder: Path) -> list[int | None]:
    path = folder / "benchmark.json"
    if not path.exists():
        return [None]
    listed = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    values = {benchmark["extra_info"]["value"] for benchmark in listed}
    assert (len(listed), len(values)) == (8, 1)
    assert all(b["extra_info"]["seconds"] == [b["extra_info"]["value"] + 0.5] * 2000
               for b in listed)  # fmt: skip
    return [values.pop()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Killed:
    """What is killed: `write` calls what it is given when it begins to save."""

    write: Callable[[Path, int, Callable[[], object]], None]
    state: Callable[[Path], list[int | None]]


KILLED = {
    "snapshot": _Killed(write=_snapshot, state=_snapshot_state),
    "benchmark": _Killed(write=_benchmark, state=_benchmark_state),
}


def kill(folder: Path, what: str, kills: int) -> dict[str, int]:
    """Kill a writer at a random moment of its saving, *kills* times while it is at it; the moments
    are drawn up to a horizon that shrinks when the writer finishes first and grows when it is
    caught."""
    killed = KILLED[what]
    with _nothing_said():
        killed.write(folder, 0, lambda: None)  # here: what it imports, no child imports again
    current = killed.state(folder)
    seen = {"killed": 0, "old": 0, "new": 0, "partial": 0, "lost": 0}
    chance, horizon, value = random.Random(0), 0.02, 0
    while seen["killed"] < kills:
        value += 1
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            begun = functools.partial(os.write, told, b"x")
            _quietly(functools.partial(killed.write, folder, value, begun))
        os.close(told)
        assert os.read(ready, 1) == b"x", "the writer failed before it began to save"
        os.close(ready)
        time.sleep(chance.random() * horizon)
        os.kill(child, signal.SIGKILL)
        finished = os.WIFEXITED(os.waitpid(child, 0)[1])
        horizon *= 0.9 if finished else 1.05
        seen["killed"] += not finished
        try:
            found = killed.state(folder)
        except Exception:
            seen["partial"] += 1
            continue
        seen["lost"] += any(
            now not in (then, value) for then, now in zip(current, found, strict=True)
        )
        seen["old"] += found == current
        seen["new"] += found != current
        current = found
    old = time.time() - 60
    for entry in folder.rglob(".staging*"):
        os.utime(entry, (old, old))
    for parent in {entry.parent for entry in folder.rglob(".staging*")}:
        check_place(parent / "next")  # sweeps, as the next process that writes there does
    return seen | {"litter": len(_litter(folder))}


@contextlib.contextmanager
def _nothing_said() -> Iterator[None]:
    """Standard output goes nowhere."""
    kept = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    yield
    os.dup2(kept, 1)


def _quietly(work: Callable[[], object]) -> NoReturn:
    """Do it and end this process, with nothing on standard output."""
    try:
        with _nothing_said():
            work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


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
