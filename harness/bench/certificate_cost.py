"""What a certificate costs: seconds and memory on a random model of a given shape.

    python -m harness.bench.certificate_cost [--shapes 0.5b 8b/18] [--rounds 3]

Writes a random stack to a temporary folder, reads its files once from the disk, loads it, and
measures a forward pass of the prompts' tokens, one read of the files from the page cache, and the
certificate, with the peak of anonymous memory beyond the loaded model; for two short prompts, for
eight of 16 tokens (short questions in a chat template), and for eight of 48, which is where the
certificate cuts prompts off. Then prints the arithmetic of the cost model in docs/certificate.md
for each shape and for Qwen3-8B's. Knows nothing of what the certificate checks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

__all__ = ["arithmetic", "measure"]

#: `0.5b` is Qwen2.5-0.5B's shape, 494 M parameters; `8b/18` an eighteenth of Qwen3-8B, 2 of its 36
#: layers and as much of its vocabulary, 455 M parameters; `tiny` is for trying the script.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "tied": True,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "8b/18": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "vocab_size": 8441},
}  # fmt: skip
#: Qwen3-8B: parameters, those of adapted layers, and bytes on disk in bfloat16.
QWEN3_8B = {"parameters": 8_190_735_360, "adapted": 6_945_767_424}
RANKS = (16, 64)
#: By tokens in all: the tokenizer here makes a token of each byte.
PROMPTS: dict[int, tuple[str, ...]] = {
    59: ("The quick brown fox jumps over", "the lazy dog, and over again."),
    128: tuple(f"{number}: sixteen tokens"[:16] for number in range(8)),
    384: tuple(f"{number}: " + "and so on, " * 10 for number in range(8)),
}
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arithmetic(*, parameters: int, adapted: int, tokens: int) -> dict[str, float]:
    """Operations and bytes of each part of a certificate for two adapters of `RANKS`.

    Args:
        parameters: of the base; `adapted` those in adapted layers. tokens: of the prompts.
    """
    from harness.certificate import capture, end_to_end

    variants = 2 + len(RANKS) * (1 + end_to_end._draws(len(RANKS)))
    short = end_to_end._TOKENS * (variants + 3)  # a row each, all merged, and two of live layers
    return {
        "bytes of the files": 2.0 * parameters,
        "one forward pass": 2.0 * parameters * tokens,
        "outputs in float64": 2.0 * adapted * capture._ROWS,
        "short forward pass of the variants": 2.0 * parameters * short,
        "merging module by module": 2.0 * adapted * sum(RANKS),
    }


def _write(folder: Path, shape: str, ranks: tuple[int, int]) -> Any:
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    base = tiny_base(
        folder / "base", "qwen3" if "head_dim" in SHAPES[shape] else "qwen2",
        dtype=_dtype(), max_position_embeddings=2048, **SHAPES[shape],
    )  # fmt: skip
    adapters = {
        name: tiny_adapter(
            folder / name, base, AdapterSpec(rank=rank, alpha=2 * rank, targets=_TARGETS), seed=n
        )
        for n, (name, rank) in enumerate(zip(("style", "instruct"), ranks, strict=True))
    }
    return harness.resolve_stack(base_model=base, adapters=adapters)


def _dtype() -> Any:
    import torch

    return torch.bfloat16


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def _timed(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, peak anonymous bytes beyond the start, and the result."""
    start_bytes = _anonymous_bytes()
    peak = [start_bytes]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = call()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return seconds, peak[0] - start_bytes, result


def _read(files: Sequence[Path], *, cold: bool = False) -> int:
    """Read the files once; *cold* drops them from the page cache first, where nobody maps them."""
    total = 0
    for file in files:
        with file.open("rb") as stream:
            if cold and hasattr(os, "posix_fadvise"):
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := stream.read(1 << 24):
                total += len(chunk)
    return total


def measure(shape: str, *, rounds: int = 3) -> dict[str, Any]:
    """Median seconds, wall and processor's, and peak bytes, by tokens of the prompts and part.

    The model is a random one of *shape* in bfloat16; verdicts other than `held` are listed.
    """
    with tempfile.TemporaryDirectory(prefix="lora-stack-") as scratch:
        stack = _write(Path(scratch), shape, RANKS)
        files = list(Path(scratch).rglob("*.safetensors"))
        start = time.perf_counter()
        size = _read(files, cold=True)
        found: dict[str, Any] = {"shape": shape, "bytes": size}
        found["seconds from the disk"] = time.perf_counter() - start
        with harness.load_engine(stack, device="cpu") as engine, engine.mode("stacked") as model:
            bare: Any = getattr(model, "base_model", model)
            found["parameters"] = sum(
                p.numel() for n, p in bare.named_parameters() if "lora_" not in n
            )
            found["adapted"] = sum(
                p.numel() for n, p in bare.named_parameters() if ".base_layer.weight" in n
            )
            found["runs"] = {
                tokens: _parts(model, stack, engine.tokenizer, prompts, files, rounds)
                for tokens, prompts in PROMPTS.items()
            }
    return found


def _parts(
    model: Any,
    stack: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    files: Sequence[Path],
    rounds: int,
) -> dict[str, Any]:
    import torch

    from harness.certificate.capture import batched, probe_ids

    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = probe_ids(tokenizer, prompts, vocabulary)
    ids, mask = batched(rows)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)

    def certify(whole: bool) -> Any:
        return harness.certify_stack(
            model, stack, tokenizer=tokenizer, prompts=prompts, end_to_end=whole
        )

    parts: dict[str, Callable[[], Any]] = {
        "one forward pass": forward,
        "one read of the files (cached)": lambda: _read(files),
        "certificate without end to end": lambda: certify(False),
        "whole certificate": lambda: certify(True),
    }
    forward()  # first touch of the mapped weights
    wall: dict[str, list[float]] = {part: [] for part in parts}
    cpu: dict[str, list[float]] = {part: [] for part in parts}
    peaks = dict.fromkeys(parts, 0)
    verdicts: set[str] = set()
    for _ in range(rounds):  # interleaved, so that a busy machine slows all alike
        for part, call in parts.items():
            spent = time.process_time()
            took, peak, result = _timed(call)
            wall[part].append(took)
            cpu[part].append(time.process_time() - spent)
            peaks[part] = max(peaks[part], peak)
            if hasattr(result, "verdict"):
                verdicts.add(result.verdict.value)
    return {
        "tokens": sum(map(len, rows)),
        "wall": {part: statistics.median(s) for part, s in wall.items()},
        "cpu": {part: statistics.median(s) for part, s in cpu.items()},
        "peaks": peaks,
        "verdicts": sorted(verdicts),
    }


def main() -> None:
    """Measure, print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["0.5b", "8b/18"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes: dict[str, Mapping[str, int]] = {}
    for shape in arguments.shapes:
        found = measure(shape, rounds=arguments.rounds)
        sizes[shape] = {name: found[name] for name in ("parameters", "adapted")}
        print(
            f"{shape}: {found['parameters']:,} parameters, {found['bytes']:,} bytes of files, "
            f"{found['seconds from the disk']:.2f} s to read them from the disk; "
            f"{torch.get_num_threads()} threads",
            flush=True,
        )
        for run in found["runs"].values():
            forward, read, shorter, whole = run["cpu"].values()
            both, four = (
                forward + read,
                3 * shorter + whole,
            )  # verify: end to end in one mode of four
            print(
                f"  {run['tokens']} tokens: {', '.join(run['verdicts'])}; of the processor time a "
                f"forward pass and a read are {both / shorter:.0%} without end to end, "
                f"{both / whole:.0%} of the whole, {4 * both / four:.0%} of four modes"
            )
            for part, seconds in run["wall"].items():
                print(
                    f"    {part:<34}{seconds:>7.2f} s {run['cpu'][part]:>7.2f} s of processor "
                    f"time {run['peaks'][part] / 1e6:>6.0f} MB",
                    flush=True,
                )
    for shape, size in (*sizes.items(), ("qwen3-8b", QWEN3_8B)):
        for tokens in PROMPTS:
            parts = arithmetic(**size, tokens=tokens)
            words = [f"{parts.pop('bytes of the files') / 1e9:.2f} GB of files"]
            words += [f"{part} {operations / 1e9:,.0f}" for part, operations in parts.items()]
            print(f"{shape}, {tokens} tokens, 10⁹ operations: " + "; ".join(words))


if __name__ == "__main__":
    main()
