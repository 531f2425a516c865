"""Record how equal things differ: several processes of one command, their rounds in turn.

    python -m harness.bench.gate_noise FILE [--processes 8] [--rounds 20] [-- BENCH OPTIONS]

Writes the times of every cell, round and process; `harness.bench.gate_simulation` draws from them.
The file in `fixtures/latency/noise.json` was made so, on the machine it names.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

_DEFAULT = ["--base-model", "random:fixtures/latency/config.json", "--device", "cpu",
            "--input-tokens", "8", "--output-tokens", "3", "--batch-sizes", "1",
            "--repeats", "9"]  # fmt: skip


def main() -> None:
    from harness.bench.pairing import Worker, in_turn
    from harness.staging import write_text

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("options", nargs="*", default=_DEFAULT)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "harness.cli", "bench", "--serve", *arguments.options]
    with ExitStack() as running:
        workers = [
            running.enter_context(Worker(command, f"process {number}"))
            for number in range(arguments.processes)
        ]
        found = in_turn(workers, arguments.rounds)
    first = found[0]
    noise = {
        "about": "seconds by process, cell and metric, a number a round; round n of every process "
        "ran in one turn",
        "measured": " ".join(arguments.options),
        "moment": first.moment,
        "fingerprint": dict(first.fingerprint),
        "software": dict(first.software),
        "processes": [
            {
                key: {m: [float(f"{v:.4g}") for v in values] for m, values in cell.rounds.items()}
                for key, cell in results.cells.items()
            }
            for results in found
        ],
    }
    write_text(arguments.file, json.dumps(noise) + "\n")
    print(f"{arguments.file}: {len(found)} processes × {len(first.cells)} cells × "
          f"{arguments.rounds} rounds")  # fmt: skip


if __name__ == "__main__":
    main()
