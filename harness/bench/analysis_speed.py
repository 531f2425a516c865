"""The algebra of the factors against materialising ΔW, module by module in one run.

    python -m harness.bench.analysis_speed [--layers 36] [--rank 64] [--modules q_proj gate_proj]
        [--count 6] [--no-dense-svd]

Writes random bfloat16 adapters of Qwen3-8B's shape (seven modules a layer) with spectra that fall
over two decades, then prints, first, the processor time and peak memory of the complete figures
of one adapter, each measured in a process of its own; then, for modules of each kind named, the
mean time of the norm, the cosine of two adapters and all singular values, from the factors (one
thread, median of seven) and from the dense float64 ΔW (materialising included: `s·(B@A)` as PEFT
does it), with the ratio and the largest relative error between the two. Norms and cosines are set
against one thread of the dense way, all threads stand beside it; its singular values have all
threads. Those take minutes: `--no-dense-svd` leaves them out. The error of a cosine is relative to
it or, where it is smaller, to that of random directions. Random weights: the time depends on the
values only where ranks cancel, and products are taken again in float64.
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

    _Call = Callable[[LoraPair, LoraPair], Any]

_TIMES = 7
_SLOW = "singular values"
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


def compare(ones: list[LoraPair], twos: list[LoraPair], *, dense_svd: bool) -> list[dict[str, Any]]:
    """Rows of factors against dense, over modules of one kind in two adapters."""
    import torch

    from harness.analysis import spectrum

    def dense_cosine(one: LoraPair, two: LoraPair) -> float:
        x, y = one.delta(), two.delta()
        return float((x * y).sum() / (x.norm() * y.norm()))

    def quick_values(one: LoraPair, _: LoraPair) -> Any:
        return spectrum.singular_values(spectrum.factors_of(one))

    def dense_values(one: LoraPair, _: LoraPair) -> Any:
        return torch.linalg.svdvals(one.delta())[: one.rank]

    ways: list[tuple[str, _Call, _Call, int]] = [
        ("norm", lambda one, _: spectrum.pair_norm(one), lambda one, _: float(one.delta().norm()),
         len(ones)),
        ("cosine", spectrum.cosine, dense_cosine, len(ones)),
    ]  # fmt: skip
    if dense_svd:
        ways.append((_SLOW, quick_values, dense_values, 1))
    rows = []
    for what, quick, dense, count in ways:
        pairs = list(zip(ones, twos, strict=True))[:count]
        quick_seconds = dense_seconds = together = error = 0.0
        for pair in pairs:
            one = pair[0]
            with spectrum.one_thread():
                quick(*pair)  # first touch of the mapped file
                timed = [_timed(quick, pair) for _ in range(_TIMES)]
                quick_seconds += statistics.median(seconds for seconds, _ in timed)
                # Singular values take minutes: they are given all threads, once.
                alone, expected = (0.0, None) if what == _SLOW else _timed(dense, pair)
            all_threads, again = _timed(dense, pair)
            expected = torch.as_tensor(again if expected is None else expected)
            dense_seconds += alone or all_threads
            together += all_threads
            found = torch.as_tensor(timed[-1][1])
            chance = (one.b.shape[0] * one.a.shape[1]) ** -0.5 if what == "cosine" else 0.0
            scale = expected.abs().clamp(min=chance)
            error = max(error, float(((found - expected).abs() / scale).max()))
        rows.append(
            {
                "modules": len(pairs),
                "what": what,
                "factors_ms": quick_seconds / len(pairs) * 1e3,
                "dense_ms": dense_seconds / len(pairs) * 1e3,
                "dense_all_threads_ms": together / len(pairs) * 1e3,
                "times": dense_seconds / quick_seconds,
                "largest_error": error,
            }
        )
    return rows


def _timed(call: _Call, pair: tuple[LoraPair, LoraPair]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call(*pair)
    return time.perf_counter() - start, value


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--modules", nargs="*", default=["q_proj", "gate_proj"])
    parser.add_argument("--count", type=int, default=6, help="modules of a kind, one a layer")
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
        _print_modules(
            folders,
            arguments.modules,
            count=arguments.count,
            dense_svd=not arguments.no_dense_svd,
        )


def _print_modules(folders: list[Path], kinds: list[str], *, count: int, dense_svd: bool) -> None:
    from harness.adapter_files import read_adapter

    files = [read_adapter(folder) for folder in folders]
    print(
        f"{'module':<11}{'of':>3} {'what':<16}{'factors':>10}{'dense':>13}{'all threads':>13}"
        f"{'times':>8}{'error':>8}"
    )
    for kind in kinds:
        modules = [name for name in files[0].pairs if name.endswith(kind)][:count]
        ones, twos = ([adapter.pair(name) for name in modules] for adapter in files)
        for row in compare(ones, twos, dense_svd=dense_svd):
            print(
                f"{kind:<11}{row['modules']:>3} {row['what']:<16}{row['factors_ms']:>7.2f} ms"
                f"{row['dense_ms']:>10.1f} ms{row['dense_all_threads_ms']:>10.1f} ms"
                f"{row['times']:>8,.0f}{row['largest_error']:>8.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
