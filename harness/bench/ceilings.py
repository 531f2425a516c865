"""What the device at hand can do: bytes copied a second, matrix products a second; measured.

Measured in the session whose figures they judge, before and after it, since a data sheet knows
neither this card's clocks nor its neighbours. Knows nothing of models.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harness.bench.clock import cuda_event, synchronise

__all__ = ["Ceilings", "better", "measure_ceilings"]

# Far beyond any cache on CUDA; on a CPU beyond the last level, and quick.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_SIDE = {"cuda": 8192, "cpu": 1024}
_REPEATS = 7
_DRAWN = 1 << 20  # numbers that are not repeated: drawing all would take a CPU seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Attributes:
    bandwidth: bytes a second, read plus written, of a copy on the device.
    rate: FLOP/s of a square matrix product in the model's dtype, two a multiply-add.
    dtype: of the product.
    """

    bandwidth: float
    rate: float
    dtype: str

    def as_json(self) -> dict[str, Any]:
        return {
            "copy_bytes_per_s": self.bandwidth,
            "matmul_flops": self.rate,
            "matmul_dtype": self.dtype,
        }


def better(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of each: a ceiling is what was reached at best."""
    return Ceilings(
        bandwidth=max(first.bandwidth, second.bandwidth),
        rate=max(first.rate, second.rate),
        dtype=first.dtype,
    )


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Copy and multiply on *device*; the best of a few repeats each."""
    chosen, element = torch.device(device), getattr(torch, dtype)
    size = _COPY_BYTES.get(chosen.type, _COPY_BYTES["cpu"])
    if chosen.type == "cuda":
        size = min(size, int(torch.cuda.mem_get_info(chosen)[0] // 8))
    source = _filled((size // element.itemsize,), element, chosen)
    size = source.nbytes
    target = torch.empty_like(source)
    copy_s = _best(chosen, functools.partial(target.copy_, source))
    del source, target
    side = _SIDE.get(chosen.type, _SIDE["cpu"])
    left = _filled((side, side), element, chosen)
    right = _filled((side, side), element, chosen)
    out = torch.empty(side, side, dtype=element, device=chosen)
    product_s = _best(chosen, lambda: torch.mm(left, right, out=out))
    return Ceilings(bandwidth=2 * size / copy_s, rate=2 * side**3 / product_s, dtype=dtype)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as weights are. Constant ones switch fewer bits and draw less power, and a device
    that is held at its power limit multiplies them faster than it does any model's."""
    count = math.prod(shape)
    generator = torch.Generator(device=device).manual_seed(0)
    drawn = torch.empty(min(count, _DRAWN), dtype=dtype, device=device)
    drawn.normal_(0.0, 0.02, generator=generator)
    return drawn.repeat(-(-count // len(drawn)))[:count].reshape(shape)


def _best(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of the fastest repeat, after two that warm up; several calls are timed as one, so
    that launching hides behind computing."""
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(2):
            call()
        calls = 4 if device.type == "cuda" else 1
        for _ in range(_REPEATS):
            if device.type == "cuda":
                with torch.cuda.device(device):
                    start = cuda_event()
                    end = cuda_event()
                    start.record()
                    for _ in range(calls):
                        call()
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end) / 1e3 / calls)
                continue
            synchronise(str(device))
            began = time.perf_counter()
            call()
            synchronise(str(device))
            times.append(time.perf_counter() - began)
    return min(times)
