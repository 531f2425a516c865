"""What the preflight costs: seconds and peak memory of `lora-stack check-files`, as a process.

    python -m harness.bench.preflight_cost [--layers 8] [--rounds 5]

For the embedded stack, its style adapter alone, and an adapter (rank 64, float32) on a base of the
widths of Qwen3-1.7B with that many layers, read for the first time and once more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.resolve import StackOptions, stack_from_options
from harness.testing.sized import write_sized_adapter, write_sized_base

__all__ = ["measure"]

# `os.wait4` gives a child's own peak; the interpreter with nothing imported has about 10 MiB.
_CALL = ("-m", "harness.cli", "check-files")


def measure(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of wall time and MiB of peak memory of one `lora-stack check-files`."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *_CALL, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"check-files {' '.join(arguments)} ended with {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    style = stack_from_options(StackOptions()).adapters[0].path
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_sized_base(root / "base", layers=arguments.layers)
        adapter = write_sized_adapter(
            root / "adapter", base, layers=arguments.layers, rank=64, seed=0
        )
        environment = {"XDG_CACHE_HOME": str(root / "cache")}
        size = sum(f.stat().st_size for f in adapter.iterdir())
        weights = sum(f.stat().st_size for f in base.iterdir())
        cases = {
            "the embedded stack": [],
            "its style adapter": [str(style)],
            f"an adapter of {size >> 20} MiB": [str(adapter)],
        }
        for name, words in cases.items():
            runs = [measure(words, environment) for _ in range(arguments.rounds)]
            seconds = statistics.median(run[0] for run in runs)
            print(f"{name:32} {seconds:6.2f} s  {max(run[1] for run in runs):6.0f} MiB")
        print(f"(the base of that adapter has {weights >> 20} MiB and no tokenizer: not checked)")


if __name__ == "__main__":
    main()
