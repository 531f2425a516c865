"""What a strided hidden state costs the head's product in bfloat16 on a CPU.

    python -m harness.bench.head_slice [--rows 16] [--length 32] [--runs 7]

`generate` keeps the last position of the hidden states, a strided view `(rows, 1, hidden)`. With a
frozen head, torch's `linear` then takes a batched product that copies the head once a row. The
engine makes the slice contiguous first; this script times both, in turn, at the shape of a
Qwen3-0.6B head, and prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = torch.nn.Linear(1024, 151_936, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(arguments.rows, arguments.length, 1024, dtype=torch.bfloat16)
    ways = {"as generate slices it": lambda t: t, "made contiguous": torch.Tensor.contiguous}
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for _ in range(arguments.runs):
            for way, prepare in ways.items():
                start = time.perf_counter()
                head(prepare(hidden[:, -1:, :]))
                times[way].append(time.perf_counter() - start)
    for way, found in times.items():
        print(f"{way:24} {statistics.median(found) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
