"""What the preflight costs: seconds and peak memory of `lora-stack check-files`, as a process.

    python -m harness.bench.preflight_cost [--layers 8] [--rounds 5]

For the embedded stack, its style adapter alone, an adapter (rank 64, float32) on a base of the
widths of Qwen3-1.7B with that many layers, and that base with a tokenizer as large as Qwen3's: for
the first time, and when it is known. The files lie in the page cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from harness.resolve import StackOptions, stack_from_options
from harness.testing.sized import write_sized_adapter, write_sized_base, write_sized_tokenizer

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


def _write_inputs(base: Path, adapter: Path, layers: int) -> None:
    write_sized_base(base, layers=layers)
    write_sized_tokenizer(base)
    write_sized_adapter(adapter, base, layers=layers, rank=64, seed=0)


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    style = stack_from_options(StackOptions()).adapters[0].path
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, adapter = root / "base", root / "adapter"
        # In a process of its own: the system counts what its parent held as a child's peak, too.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_write_inputs, base, adapter, arguments.layers).result()
        time.sleep(3)  # what was written just now is not remembered
        size, weights = (
            sum(f.stat().st_size for f in folder.iterdir()) >> 20 for folder in (adapter, base)
        )
        cases = {
            "the embedded stack": ([], "known"),
            "its style adapter": ([str(style)], "known"),
            f"an adapter of {size} MiB": ([str(adapter)], "known"),
            f"a base of {weights} MiB, first time": ([str(base)], "{round}"),
            f"a base of {weights} MiB, known": ([str(base)], "known"),
        }
        for name, (words, cache) in cases.items():
            measure(words, {"XDG_CACHE_HOME": str(root / "known")})
            runs = [
                measure(words, {"XDG_CACHE_HOME": str(root / cache.format(round=number))})
                for number in range(arguments.rounds)
            ]
            seconds = statistics.median(run[0] for run in runs)
            print(f"{name:32} {seconds:6.2f} s  {max(run[1] for run in runs):6.0f} MiB")


if __name__ == "__main__":
    main()
