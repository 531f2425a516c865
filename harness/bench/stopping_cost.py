"""What the stopping clinic costs on the embedded stack: `python -m harness.bench.stopping_cost`.

50 held-out prompts in 4 modes: generation, EOS traces, static findings and blame.
"""

from __future__ import annotations

import time

__all__ = ["main"]


def main() -> None:
    """Print the seconds of loading and of examining."""
    from harness.engines import load_engine
    from harness.preset import load_preset
    from harness.resolve import StackOptions, stack_from_options
    from harness.stopping import examine_stopping

    preset = load_preset("held_out")
    start = time.perf_counter()
    with load_engine(stack_from_options(StackOptions()), device="cpu") as engine:
        loaded, busy = time.perf_counter(), time.process_time()
        report = examine_stopping(engine, prompts=preset.prompts[:50], settings=preset.settings)
        done, spent = time.perf_counter(), time.process_time() - busy
    print("| prompts × modes | completions | load s | examination s | its CPU s |")
    print("|---|---|---|---|---|")
    print(
        f"| 50 × {len(report.modes)} | {report.generated} | {loaded - start:.1f} "
        f"| {done - loaded:.1f} | {spent:.1f} |"
    )


if __name__ == "__main__":
    main()
