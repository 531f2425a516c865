"""Record how equal things differ: one command against itself, as two commands are compared.

    python -m harness.bench.gate_noise FILE [--launches 16] [--rounds 8] [-- BENCH OPTIONS]

Each launch starts the command twice and has both measure every cell in turn, as `lora-stack bench
--against-command` does. Writes the times of every launch, process, cell and round after each
launch; `harness.bench.gate_simulation` draws from them. The file in `fixtures/latency/noise.json`
was made so, on the machine it names.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.bench.results import Results

_DEFAULT = ["--base-model", "random:fixtures/latency/config.json", "--device", "cpu",
            "--input-tokens", "8", "--output-tokens", "3", "--batch-sizes", "1,2,4",
            "--repeats", "5"]  # fmt: skip


def main() -> None:
    from harness.bench.pairing import Worker, in_turn
    from harness.files.staging import write_text

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--launches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("options", nargs="*", default=_DEFAULT)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "harness.cli", "bench", "--serve", *arguments.options]
    launches: list[list[Any]] = []
    for launch in range(arguments.launches):
        with ExitStack() as running:
            workers = [running.enter_context(Worker(command, name)) for name in ("first", "second")]
            found = in_turn(workers, arguments.rounds, seed=launch)
        launches.append([_times(results) for results in found])
        first = found[0]
        noise = {
            "about": "microseconds by launch, process, cell and metric, a number a visit (the "
            "fastest of its generations); the two processes of a launch were visited in turn",
            "measured": " ".join(arguments.options),
            "moment": first.moment,
            "fingerprint": dict(first.fingerprint),
            "software": dict(first.software),
            "launches": launches,
        }
        write_text(arguments.file, json.dumps(noise, separators=(",", ":")) + "\n")
        print(f"{arguments.file}: {launch + 1} launches × 2 processes × {len(first.cells)} cells × "
              f"{arguments.rounds} visits", flush=True)  # fmt: skip


def _times(results: Results) -> dict[str, dict[str, list[float]]]:
    return {
        key: {metric: [round(v * 1e6, 1) for v in values] for metric, values in cell.rounds.items()}
        for key, cell in results.cells.items()
    }


if __name__ == "__main__":
    main()
