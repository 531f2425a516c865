"""Checking snapshots by replay against generating anew, and against one process a mode.

    python -m harness.bench.replay_speed [--runs 3] [--prompts 4] [--new-tokens 128]
        [--dtype bfloat16] [--one-by-one 1]

Builds a random Qwen3 in the shape of SmolLM2-135M (30 layers of 576, a vocabulary of 49,152) with
two all-linear adapters of rank 16. Then, in turn and in one process: every mode and prompt
generated anew in batches, and every one checked by replay of what was said; and as processes of
their own, one a mode: PEFT, prompts one after the other. Prints medians and the ratio of each pair,
of wall and of processor time. The head is the embedding shifted by one row, so that every next
token is as certain as a trained model's and no rounding tie adds work to either side; the time of
an operation does not depend on the values.
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
from dataclasses import replace
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
    # After token t the model says t + 1: the head's row for it is the embedding of t.
    weights = load_file(stack.base / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"] * 50
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = embedding.roll(1, dims=0).contiguous()
    save_file(weights, stack.base / "model.safetensors", metadata={"format": "pt"})
    return stack.base, dict(stack.adapters)


def _one_by_one(base: Path, adapters: dict[str, Path], prompts: Path, new_tokens: int) -> float:
    start = time.perf_counter()
    for mode in _MODES:
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
    return time.perf_counter() - start


def _line(name: str, times: list[float], against: list[float]) -> str:
    ratios = [other / own for own, other in zip(times, against, strict=False)]
    shown = f"   × {statistics.median(ratios):.1f}" if ratios else ""
    return f"  {name:36} {statistics.median(times):8.2f} s{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
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
        for n in range(arguments.prompts)
    ]
    texts = folder / "prompts.json"
    texts.write_text(json.dumps([prompt.text for prompt in prompts]), encoding="utf-8")
    settings = GenerationSettings(max_new_tokens=arguments.new_tokens)
    stack = resolve_stack(adapters=adapters, base_model=str(base))
    anew: list[float] = []
    replayed: list[float] = []
    alone: list[float] = []
    cpu: list[float] = []
    with load_engine(stack, device="cpu", dtype=arguments.dtype) as engine:
        drafts: dict[str, list[tuple[int, ...]]] = {}
        warm = replace(settings, max_new_tokens=2)
        for mode in _MODES:
            found = engine.generate(prompts, mode, warm)
            replay_completions(
                engine, prompts, mode, warm, drafts=[completion.token_ids for completion in found]
            )
        kept = generated = 0
        for number in range(arguments.runs):
            start, busy = time.perf_counter(), time.process_time()
            for mode in _MODES:
                said = engine.generate(prompts, mode, settings)
                drafts[mode] = [completion.token_ids for completion in said]
            anew.append(time.perf_counter() - start)
            start, between = time.perf_counter(), time.process_time()
            for mode in _MODES:
                for one in replay_completions(engine, prompts, mode, settings, drafts=drafts[mode]):
                    kept += one.kept
                    generated += one.generated
            replayed.append(time.perf_counter() - start)
            cpu.append((between - busy) / (time.process_time() - between))
            print(
                f"round {number + 1}: anew {anew[-1]:.1f} s, replay {replayed[-1]:.2f} s; "
                f"of CPU time × {cpu[-1]:.1f}",
                flush=True,
            )
    for number in range(arguments.one_by_one):
        alone.append(_one_by_one(base, adapters, texts, arguments.new_tokens))
        print(f"round {number + 1}: one process a mode {alone[-1]:.1f} s")
    count = len(prompts) * len(_MODES)
    print(
        f"{count} snapshots of {arguments.new_tokens} tokens, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads;\n"
        f"{kept} tokens replayed, {generated} generated. Medians:"
    )
    print(_line("replay", replayed, []))
    print(_line("anew, same process, same batches", anew, []))
    print(_line("  against replay", replayed, anew))
    print(f"  {'  of CPU time':36} {'':11}   × {statistics.median(cpu):.1f}")
    if alone:
        print(_line("one process a mode, one by one", alone, []))
        print(_line("  against replay", replayed[: len(alone)], alone))


if __name__ == "__main__":
    main()
