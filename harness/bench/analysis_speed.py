"""The algebra of the factors against materialising ΔW, module by module in one run.

    python -m harness.bench.analysis_speed [--layers 36] [--rank 64] [--modules q_proj gate_proj]

Writes random bfloat16 adapters of Qwen3-8B's shape (seven modules a layer) with spectra that fall
over two decades, then prints, first, the processor time and peak memory of the complete figures
of one adapter, each measured in a process of its own; then, for each module named, the time of
the norm, the cosine of two adapters and all singular values, from the factors (one thread, median)
and from the dense float64 ΔW (all threads, materialising included), with the ratio and the
relative error between the two. The dense singular values take minutes: `--no-dense-svd` leaves
them out. Random weights: the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.lora import LoraPair

_SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (12288, 4096), "mlp.up_proj": (12288, 4096), "mlp.down_proj": (4096, 12288),
}  # fmt: skip


def build(folder: Path, *, layers: int, rank: int, seed: int) -> Path:
    """Write one random adapter of Qwen3-8B's shape."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -1, rank)
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in _SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            a = torch.randn(rank, columns, generator=generator) * fall[:, None] / columns**0.5
            b = torch.randn(rows, rank, generator=generator) * fall * 0.01
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in _SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(folder: Path) -> dict[str, float]:
    """The complete figures of the adapter in *folder*: seconds and peak bytes of this process."""
    from harness.analysis.running import analyze

    wall, cpu = time.perf_counter(), time.process_time()
    figures = analyze(folder)
    return {
        "modules": len(figures.modules),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(one: LoraPair, two: LoraPair, *, dense_svd: bool) -> list[dict[str, Any]]:
    """Rows of factor against dense, for one module of two adapters."""
    import torch

    from harness.analysis import spectrum

    def from_factors(call: Callable[[], Any]) -> tuple[float, Any]:
        with spectrum.one_thread():
            call()
            timed = [_timed(call) for _ in range(7)]
        return statistics.median(seconds for seconds, _ in timed), timed[-1][1]

    def dense_cosine() -> float:
        x, y = one.delta(), two.delta()
        return float((x * y).sum() / (x.norm() * y.norm()))

    factors = spectrum.factors_of
    ways: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("norm", lambda: spectrum.delta_norm(factors(one)), lambda: float(one.delta().norm()), 3),
        ("cosine", lambda: spectrum.cosine(one, two), dense_cosine, 3),
    ]
    if dense_svd:
        ways.append(
            (
                "singular values",
                lambda: spectrum.singular_values(factors(one)),
                lambda: torch.linalg.svdvals(one.delta())[: one.rank],
                1,
            )
        )
    rows = []
    for what, quick, dense, times in ways:
        quick_seconds, found = from_factors(quick)
        timed = [_timed(dense) for _ in range(times)]
        dense_seconds = statistics.median(seconds for seconds, _ in timed)
        found, expected = torch.as_tensor(found), torch.as_tensor(timed[-1][1])
        scale = torch.ones(()) if what == "cosine" else expected.abs()
        rows.append(
            {
                "module": one.module,
                "what": what,
                "factors_ms": quick_seconds * 1e3,
                "dense_ms": dense_seconds * 1e3,
                "times": dense_seconds / quick_seconds,
                "largest_error": float(((found - expected).abs() / scale).max()),
            }
        )
    return rows


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--modules", nargs="*", default=["q_proj", "gate_proj"])
    parser.add_argument("--no-dense-svd", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [
            build(Path(scratch) / name, layers=arguments.layers, rank=arguments.rank, seed=seed)
            for seed, name in enumerate(("one", "two"))
        ]
        again: list[str] = [
            sys.executable,
            "-m",
            "harness.bench.analysis_speed",
            "--measure",
            str(folders[0]),
        ]
        for _ in range(arguments.runs):
            done = subprocess.run(again, check=True, capture_output=True, text=True)
            run = json.loads(done.stdout)
            print(
                f"complete figures of {run['modules']} modules: {run['cpu_seconds']:.2f} s of "
                f"processor time, {run['wall_seconds']:.2f} s, peak {run['peak_mib']:.0f} MiB "
                "with torch"
            )
        _print_modules(folders, arguments.modules, dense_svd=not arguments.no_dense_svd)


def _print_modules(folders: list[Path], kinds: list[str], *, dense_svd: bool) -> None:
    from harness.adapter_files import read_adapter

    files = [read_adapter(folder) for folder in folders]
    print(f"{'module':<14}{'what':<18}{'factors':>10}{'dense':>14}{'times':>9}{'error':>10}")
    for kind in kinds:
        module = next(name for name in files[0].pairs if name.endswith(kind))
        for row in compare(files[0].pair(module), files[1].pair(module), dense_svd=dense_svd):
            print(
                f"{kind:<14}{row['what']:<18}{row['factors_ms']:>7.2f} ms"
                f"{row['dense_ms']:>11.1f} ms{row['times']:>9,.0f}{row['largest_error']:>10.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
