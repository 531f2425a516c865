"""Checking snapshots by replay against generating anew, and against one process a mode.

    python -m harness.bench.replay_speed [--runs 3] [--prompts 2 4] [--new-tokens 128]
        [--modes base style instruct stacked] [--dtype bfloat16] [--one-by-one 1]

Builds a random Qwen3 in the shape of SmolLM2-135M (30 layers of 576, a vocabulary of 49,152) with
two all-linear adapters of rank 16. Then, for each number of prompts, in turn and in one process:
every mode and prompt generated anew in batches, and every one checked by replay of what was said;
and as processes of their own, one a mode: PEFT, prompts one after the other. Prints medians and the
ratio of each pair, of wall and of processor time; and the ratio of the fastest runs, which
neighbours on a shared machine disturbed least. The head is the embedding shifted by one row, so
that every next token is as certain as a trained model's and no rounding tie adds work to either
side; the time of an operation does not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

_MODES = ("base", "style", "instruct", "stacked")


def build(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The base and its adapters; no EOS, so that every completion has its full length."""
    import torch
    from safetensors.torch import load_file, save_file

    from harness.testing.tiny import AdapterSpec, tiny_stack

    stack = tiny_stack(
        folder,
        adapters={
            "style": AdapterSpec(rank=16, alpha=32, size=0.005),
            "instruct": AdapterSpec(rank=16, alpha=32, size=0.005),
        },
        tied=False,
        hidden=576,
        layers=30,
        dtype=torch.bfloat16,
        vocab_size=49_152,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        initializer_range=0.02,
    )
    (stack.base / "generation_config.json").write_text('{"pad_token_id": 0}\n', encoding="utf-8")
    config = json.loads((stack.base / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = None
    (stack.base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # After token t the model says t + 1: the head's row for it is the embedding of t, so small that
    # it leads by some twenty nats, as a trained model's choice does; at hundreds, `exp` would end
    # in its slow way through numbers too small for float32.
    weights = load_file(stack.base / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"] * 50
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = (embedding / 24).roll(1, dims=0).contiguous()
    save_file(weights, stack.base / "model.safetensors", metadata={"format": "pt"})
    return stack.base, dict(stack.adapters)


@dataclass(kw_only=True)
class _Times:
    """Seconds of each run of one way: on the clock, and of processor time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], None], name: str) -> None:
        start, busy = time.perf_counter(), _processor()
        work()
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(_processor() - busy)
        print(f"{name}: {self.wall[-1]:.2f} s, {self.cpu[-1]:.2f} s of CPU", flush=True)

    def against(self, other: _Times) -> str:
        """Medians, how many times as long as *other* each run took, and the same of the fastest."""
        shown = [f"{statistics.median(self.wall):8.2f} s {statistics.median(self.cpu):8.2f} s CPU"]
        for name in ("wall", "cpu"):
            mine, others = getattr(self, name), getattr(other, name)
            # A way that ran once is held against every run of the other.
            pairs = zip(mine if len(mine) > 1 else mine * len(others), others, strict=True)
            shown.append(f"× {statistics.median(a / b for a, b in pairs):.1f} ({name})")
        shown.append(f"fastest {min(self.wall):.2f} s")
        if self is other:
            return f"{shown[0]}  {shown[-1]}"
        return f"{'  '.join(shown)} × {min(self.wall) / min(other.wall):.1f}"


def _processor() -> float:
    """Processor seconds of this process and of its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _one_by_one(
    base: Path, adapters: dict[str, Path], modes: Sequence[str], prompts: Path, new_tokens: int
) -> None:
    for mode in modes:
        names = {"base": [], "stacked": list(adapters)}.get(mode, [mode])
        subprocess.run(
            [
                sys.executable, "-m", "harness.bench.one_by_one", str(base),
                " ".join(str(adapters[name]) for name in names), str(prompts), str(new_tokens),
            ],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip


@dataclass(kw_only=True)
class _Way:
    """One number of prompts: what they are, what was said, and how long each way took."""

    prompts: list[Any]
    drafts: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    found: list[Any] = field(default_factory=list)
    anew: _Times = field(default_factory=_Times)
    replayed: _Times = field(default_factory=_Times)
    alone: _Times = field(default_factory=_Times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one-by-one", type=int, default=1, help="runs of the processes a mode")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        _measure(Path(scratch), arguments)


def _measure(folder: Path, arguments: Any) -> None:
    import torch

    from harness.completion import GenerationSettings, Prompt
    from harness.engines import load_engine
    from harness.replay import replay_completions
    from harness.resolve import resolve_stack

    base, adapters = build(folder)
    prompts = [
        Prompt(id=f"p{n}", text=f"{'Please. ' * (n % 2)}Tell me about {n}.")
        for n in range(max(arguments.prompts))
    ]
    ways = [_Way(prompts=prompts[:count]) for count in arguments.prompts]
    modes, settings = arguments.modes, GenerationSettings(max_new_tokens=arguments.new_tokens)
    stack = resolve_stack(adapters=adapters, base_model=str(base))
    with load_engine(stack, device="cpu", dtype=arguments.dtype) as engine:

        def generate(way: _Way, settings: GenerationSettings) -> None:
            for mode in modes:
                said = engine.generate(way.prompts, mode, settings)
                way.drafts[mode] = [completion.token_ids for completion in said]

        def replay(way: _Way, settings: GenerationSettings) -> None:
            for mode in modes:
                way.found += replay_completions(
                    engine, way.prompts, mode, settings, drafts=way.drafts[mode]
                )

        for way in ways:
            generate(way, replace(settings, max_new_tokens=2))
            replay(way, replace(settings, max_new_tokens=2))
            way.found.clear()
        for number in range(1, arguments.runs + 1):
            for way in ways:
                name = f"{number}: {len(way.prompts)} prompts"
                way.anew.run(partial(generate, way, settings), f"{name} anew, same batches")
                way.replayed.run(partial(replay, way, settings), f"{name} replayed")
    for number in range(1, arguments.one_by_one + 1):
        for way in ways:
            texts = folder / f"{len(way.prompts)}.json"
            texts.write_text(json.dumps([p.text for p in way.prompts]), encoding="utf-8")
            way.alone.run(
                partial(_one_by_one, base, adapters, modes, texts, arguments.new_tokens),
                f"{number}: {len(way.prompts)} prompts one by one, one process a mode",
            )
    print(
        f"{len(modes)} modes, {arguments.new_tokens} tokens each, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads. Medians:"
    )
    for way in ways:
        print(
            f"{len(way.prompts)} prompts; of the replayed tokens "
            f"{sum(one.kept for one in way.found)} held and "
            f"{sum(one.generated for one in way.found)} were generated"
        )
        print(f"  replay                            {way.replayed.against(way.replayed)}")
        print(f"  anew, same process, same batches  {way.anew.against(way.replayed)}")
        if way.alone.wall:
            print(f"  one process a mode, one by one    {way.alone.against(way.replayed)}")


if __name__ == "__main__":
    main()
