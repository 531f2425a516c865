"""What a strided hidden state costs the head's product in bfloat16 on a CPU.

    python -m harness.bench.head_slice [--rows 16] [--length 32] [--runs 3]

`generate` keeps the last position of the hidden states, a strided view `(rows, 1, hidden)`. With a
frozen head, torch's `linear` then takes a batched product that copies the head once a row. The
engine makes the slice contiguous first; this script times both, in turn, at a hidden
size of 1,024 and a vocabulary of 32,768, and prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(32_768, 1024, dtype=torch.bfloat16)
    hidden = torch.randn(arguments.rows, arguments.length, 1024, dtype=torch.bfloat16)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "as generate slices it": lambda strided: strided,
        "made contiguous": lambda strided: strided.contiguous(),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for _ in range(arguments.runs):
            for way, prepare in ways.items():
                start = time.perf_counter()
                torch.nn.functional.linear(prepare(hidden[:, -1:, :]), weight)
                times[way].append(time.perf_counter() - start)
    for way, found in times.items():
        print(f"{way:24} {statistics.median(found) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
