"""How long `lora-stack review` takes to open, start of the process included.

    python -m harness.bench.review_opening [--runs 9] [--cases 2000] [--changed 40]

Records cases by hand in a temporary folder, of which some changed, and times whole processes of
each command on them beside one that only starts Python, interleaved; prints the
medians of wall and processor time (on a busy machine the second is the one to trust).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.pending import Alternative, Case, Position, Run, Side, record_case, record_run
from harness.verdict import Outcome, Verdict

_MODES = ("base", "style", "instruct", "stacked")
_TOKENS = 128
_COMMANDS = {
    "python alone": None,
    "review --check": ["--check"],
    "review": [],
    "review --json": ["--json"],
    "review --markdown": ["--markdown"],
    "review --html": ["--html", "review.html"],
}


def _side(change: str) -> Side:
    """A completion of 128 tokens with their evidence."""
    words = [f" word{number % 40}" for number in range(_TOKENS)]
    words[20] = change
    positions = tuple(
        Position(
            token_id=number,
            piece=word,
            logprob=-0.125,
            alternatives=tuple(
                Alternative(token_id=number + n, piece=f"{word}{n}", logprob=-0.125 - n)
                for n in range(5)
            ),
        )
        for number, word in enumerate(words)
    )
    conditions = {"base": "b" * 64, "adapter_style": "5" * 64, "adapter_instruct": "1" * 64}
    return Side(text="".join(words), stop_reason="eos", positions=positions, conditions=conditions)


def build(root: Path, cases: int, changed: int) -> None:
    """Record *cases* cases in four modes below *root*, the first *changed* of them changed."""
    held, now = _side(" then"), _side(" now")
    record_run(root, Run(conditions=held.conditions, modes=_MODES))
    for number in range(cases):
        name = f"test_generation/bench--prompt-{number // 4:04}--{_MODES[number % 4]}"
        outcome = Outcome.CHANGED if number < changed else Outcome.HELD
        snapshot = Path(f"snapshots/{name}.toml")
        case = Case(
            name=name,
            snapshot=snapshot,
            preset="bench",
            prompt=f"prompt-{number // 4:04}",
            prompt_text="What is this?",
            mode=_MODES[number % 4],
            verdict=Verdict(name=name, outcome=outcome, evidence=("token 21 differs",)),
            first=20,
            noise_floor=1e-5,
            then=held,
            now=now,
            accepting={snapshot: b"new"},
            accepted_sha256={snapshot: ""},
        )
        record_case(root, case if number < changed else dataclasses.replace(case, first=None))


def _seconds(options: list[str] | None, root: Path) -> tuple[float, float]:
    """Wall and processor seconds of one whole process."""
    program = ["-c", "pass"] if options is None else ["-m", "harness.cli", "review", *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *program], cwd=root, stdout=subprocess.DEVNULL, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--changed", type=int, default=40)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as where it is installed
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as compiled:
        os.environ["PYTHONPYCACHEPREFIX"] = compiled
        root = Path(folder)
        build(root, arguments.cases, arguments.changed)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in _COMMANDS}
        for _ in range(arguments.runs + 1):  # the first is not counted
            for name, options in _COMMANDS.items():
                found[name].append(_seconds(options, root))
    print(f"{arguments.cases} cases, {arguments.changed} changed, {_TOKENS} tokens each")
    for name, seconds in found.items():
        wall, processor = (statistics.median(part) for part in zip(*seconds[1:], strict=True))
        print(f"{name:<20}{wall:7.3f} s wall {processor:7.3f} s processor")


if __name__ == "__main__":
    main()
