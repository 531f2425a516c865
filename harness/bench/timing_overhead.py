"""What measuring costs: a measured generation against a bare loop round `model.generate`.

    python -m harness.bench.timing_overhead [--shape NAME|PATH] [--rounds 40] [--repeats 3]

Both generate the same tokens from the same ids with the same settings, in turn, in an order drawn
anew each time; the measured one marks every token with the clock that the benchmarks use. Of a
round's repeats each keeps its fastest: neighbours only ever make slower. Prints the medians, the
ratio of the pairs with its 95 % bootstrap interval and what that is a token, and the same for a
bare loop against itself, which is the floor of what this can resolve. A tiny shape
(`--shape fixtures/latency/config.json --rounds 400`) shows what a token costs, a large one how
little of its time that is.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any


def measure(
    shape: str, *, rounds: int, repeats: int, device: str | None, output_tokens: int
) -> dict[str, Any]:
    """Seconds a generation, by way: `bare`, `measured`, and `bare again`; in turn. `seconds` by
    the wall, `processor` of this process (which waits for a GPU by spinning or sleeping: only on
    a CPU is it the cost)."""
    from harness.bench.cells import Lengths, cells_of
    from harness.bench.clock import clock_for, synchronise
    from harness.bench.measuring import Measurer
    from harness.completion import Application
    from harness.engines import load_for_timing
    from harness.engines.timed import generate_marked, random_ids
    from harness.resolve import random_stack

    stack = random_stack(f"random:{shape}", modes=["stacked"])
    with load_for_timing(stack, device=device) as engine:
        measurer = Measurer(engine, ceilings=False)
        lengths = Lengths(input_tokens=16, output_tokens=output_tokens, batch_sizes=(1,))
        cell = cells_of(stack, lengths, applications=[Application.LIVE])[0]
        ids = random_ids(measurer.vocabulary, 1, 16, engine.device)
        clock = clock_for(engine.device)
        with measurer.applied(cell.mode, cell.application) as (model, _):

            def bare() -> None:
                generate_marked(model, ids, output_tokens, None)

            def measured() -> None:
                clock.start()
                generate_marked(model, ids, output_tokens, clock.mark)
                clock.stop()

            ways = {"bare": bare, "measured": measured, "bare again": bare}
            times: dict[str, list[float]] = {way: [] for way in ways}
            processor: dict[str, list[float]] = {way: [] for way in ways}
            order = random.Random(0)
            import torch

            with torch.inference_mode():
                for number in range(rounds + 1):
                    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
                    for _ in range(repeats):
                        for way in order.sample(list(ways), len(ways)):
                            synchronise(engine.device)
                            start, busy = time.perf_counter(), time.process_time()
                            ways[way]()
                            synchronise(engine.device)
                            found[way].append(
                                (time.perf_counter() - start, time.process_time() - busy)
                            )
                    for way in ways if number else ():  # the first round warms up
                        times[way].append(min(wall for wall, _ in found[way]))
                        processor[way].append(min(busy for _, busy in found[way]))
        return {
            "device": engine.device, "dtype": engine.dtype, "seconds": times,
            "processor": processor,
        }  # fmt: skip


def main() -> None:
    from harness.bench.cells import percentile
    from harness.bench.gate import log_ratio_interval

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    found = measure(
        arguments.shape, rounds=arguments.rounds, repeats=arguments.repeats,
        device=arguments.device,
        output_tokens=arguments.output_tokens,
    )  # fmt: skip
    print(f"random:{arguments.shape}, {found['device']}, {found['dtype']}, stacked, live, batch 1, "
          f"16 + {arguments.output_tokens} tokens, {arguments.rounds} rounds in turn, "
          f"the fastest of {arguments.repeats} each")  # fmt: skip
    for clock, seconds in (("wall", found["seconds"]), ("processor", found["processor"])):
        medians = ", ".join(
            f"{way} {percentile(values, 50) * 1e3:.3f} ms" for way, values in seconds.items()
        )
        print(f"  {clock}: medians {medians}")
        for way in ("measured", "bare again"):
            ratio, low, high = log_ratio_interval(
                seconds["bare"], seconds[way], paired=True, confidence=0.95
            )
            token = percentile(seconds["bare"], 50) / arguments.output_tokens * 1e6
            print(f"    {way} / bare: {ratio - 1:+.2%} [{low - 1:+.2%}, {high - 1:+.2%}], a token "
                  f"{(ratio - 1) * token:+.1f} µs [{(low - 1) * token:+.1f}, "
                  f"{(high - 1) * token:+.1f}]")  # fmt: skip


if __name__ == "__main__":
    main()
