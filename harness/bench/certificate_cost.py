"""What a certificate costs: seconds and memory on a random model of a given shape.

`python -m harness.bench.certificate_cost` writes a random stack to a temporary folder, loads it,
and measures a forward pass of the same tokens, one read of the files, and the certificate, with
the peak of anonymous memory beyond the loaded model. The cost model is in docs/certificate.md.
Knows nothing of what the certificate checks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

__all__ = ["measure"]

#: Shapes of Qwen2.5: `0.5b` has 494 M parameters, `tiny` is for trying the script.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
PROMPTS = ("The quick brown fox jumps over", "the lazy dog, and over again.")
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _write(folder: Path, shape: str, ranks: tuple[int, int]) -> Any:
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    base = tiny_base(
        folder / "base", "qwen2", dtype=_dtype(), **SHAPES[shape],
        tied=True, max_position_embeddings=2048,
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


def measure(shape: str, *, ranks: tuple[int, int] = (16, 64), rounds: int = 3) -> dict[str, Any]:
    """Median seconds and peak bytes, by part, for a random stack of *shape* in bfloat16."""
    import torch

    with tempfile.TemporaryDirectory(prefix="lora-stack-") as scratch:
        stack = _write(Path(scratch), shape, ranks)
        files = list(Path(scratch).rglob("*.safetensors"))
        sizes = [file.stat().st_size for file in files]
        with harness.load_engine(stack, device="cpu") as engine, engine.mode("stacked") as model:
            encoded = engine.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")

            def forward() -> None:
                with torch.no_grad():
                    model(**encoded, use_cache=False)

            def read() -> int:
                return sum(len(chunk) for file in files for chunk in _chunks(file))

            def certify(whole: bool) -> Any:
                return harness.certify_stack(
                    model, stack, tokenizer=engine.tokenizer, prompts=PROMPTS, end_to_end=whole
                )

            parts: dict[str, Callable[[], Any]] = {
                "forward": forward,
                "read": read,
                "without_end_to_end": lambda: certify(False),
                "whole": lambda: certify(True),
            }
            forward()  # first touch of the mapped weights
            seconds: dict[str, list[float]] = {part: [] for part in parts}
            peaks = dict.fromkeys(parts, 0)
            verdicts: set[str] = set()
            for _ in range(rounds):  # interleaved, so that a busy machine slows all alike
                for part, call in parts.items():
                    took, peak, result = _timed(call)
                    seconds[part].append(took)
                    peaks[part] = max(peaks[part], peak)
                    if hasattr(result, "verdict"):
                        verdicts.add(result.verdict.value)
    return {
        "shape": shape,
        "files_bytes": sum(sizes),
        "tokens": int(encoded["attention_mask"].sum()),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "median_seconds": {part: round(statistics.median(s), 3) for part, s in seconds.items()},
        "peak_bytes_beyond_the_model": peaks,
        "verdicts": sorted(verdicts),
    }


def _chunks(file: Path) -> Any:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            yield chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    print(json.dumps(measure(parser.parse_args().shape), indent=2))


if __name__ == "__main__":
    main()
