"""All modes of a stack in one process against one process a mode, prompts one by one.

    python -m harness.bench.one_load [--runs 3] [--prompts 16] [--new-tokens 64]

Builds a random bfloat16 Qwen3 of 0.16 B parameters with two all-linear adapters, then runs both
ways in turn, each as whole processes with start-up and load, and prints medians and the ratio of
each pair. Random weights: the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_MODES: tuple[tuple[str, ...], ...] = ((), ("style",), ("instruct",), ("style", "instruct"))


def build(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The base and its adapters; no EOS, so that every completion has its full length."""
    import torch

    from harness.testing.tiny import AdapterSpec, tiny_stack

    stack = tiny_stack(
        folder,
        adapters={
            "style": AdapterSpec(rank=16, alpha=32, size=0.01),
            "instruct": AdapterSpec(rank=64, alpha=64, size=0.01),
        },
        tied=True,
        hidden=768,
        layers=16,
        dtype=torch.bfloat16,
        vocab_size=65_536,
        intermediate_size=2304,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.02,
    )
    (stack.base / "generation_config.json").write_text('{"pad_token_id": 0}\n', encoding="utf-8")
    config = json.loads((stack.base / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = None
    (stack.base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return stack.base, dict(stack.adapters)


def _timed(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=quiet, stderr=quiet)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, adapters = build(folder)
        prompts = [
            f"{'The river bends. ' * (1 + n % 4)}Tell me about {n}."
            for n in range(arguments.prompts)
        ]
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
        )
        length = str(arguments.new_tokens)
        naive = [sys.executable, "-m", "harness.bench.one_by_one", str(base)]
        harness = [
            sys.executable, "-m", "harness.cli", "run", "--base-model", str(base),
            *(part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")),
            "--prompts", "prompts.jsonl", "--max-new-tokens", length, "--json",
        ]  # fmt: skip
        ways: dict[str, list[float]] = {"one process a mode": [], "live": [], "merged": []}
        for number in range(arguments.runs):
            ways["one process a mode"].append(
                sum(
                    _timed(
                        [*naive, " ".join(str(adapters[a]) for a in mode), "prompts.json", length],
                        folder,
                    )
                    for mode in _MODES
                )
            )
            for way in ("live", "merged"):
                ways[way].append(_timed([*harness, "--application", way], folder))
            print(
                f"round {number + 1}: " + ", ".join(f"{w} {t[-1]:.1f} s" for w, t in ways.items())
            )
    print(f"{arguments.prompts} prompts × {length} tokens × {len(_MODES)} modes, medians:")
    for way, times in ways.items():
        ratios = [a / b for a, b in zip(ways["one process a mode"], times, strict=True)]
        print(f"  {way:20} {statistics.median(times):7.1f} s   × {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
