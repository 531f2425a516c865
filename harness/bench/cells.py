"""What is measured: one cell a mode, application, batch size and length; and what came out.

Values only; knows nothing of torch, clocks or files. The definitions are those of vLLM's serving
benchmark (`vllm/benchmarks/serve.py`), for one batch instead of many requests: docs/latency.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.completion import Application
from harness.errors import InputError
from harness.stack import AdapterStack, Mode

__all__ = [
    "METRICS",
    "Cell",
    "CellResult",
    "Lengths",
    "Round",
    "Work",
    "cells_of",
    "fastest",
    "percentile",
    "summarise",
]

#: What the gate compares, a number a round: seconds, smaller is better.
METRICS = ("ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How much is generated, and for how many rows at once."""

    input_tokens: int
    output_tokens: int
    batch_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 2 or not self.batch_sizes:
            raise InputError(
                "a measurement needs a prompt token, two output tokens and a batch size",
                where="--input-tokens, --output-tokens, --batch-sizes",
                remedy="raise them",
            )
        if min(self.batch_sizes) < 1:
            raise InputError("is below 1", where="--batch-sizes", remedy="use 1 and more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the table.

    Attributes:
        mode: the stack's mode.
        application: how it is applied. The base has no adapters: it is measured once, as merged
            models are, without PEFT's layers.
        decoding: how `generate` runs a step (`harness.engines.timed.Decoding`).
    """

    mode: Mode
    application: Application
    batch_size: int
    input_tokens: int
    output_tokens: int
    decoding: str = "dynamic"

    @property
    def key(self) -> str:
        """What a cell is called in results; two results are compared where this is the same."""
        application = f"-{self.application}" if self.mode.weights else ""
        decoding = "" if self.decoding == "dynamic" else f"-{self.decoding}"
        return (
            f"{self.mode.name}{application}{decoding}-b{self.batch_size}"
            f"-i{self.input_tokens}-o{self.output_tokens}"
        )

    @property
    def application_name(self) -> str:
        return self.application.value if self.mode.weights else "none"

    @property
    def unwrapped(self) -> bool:
        """Whether it is measured without PEFT's layers in the forward pass."""
        return not self.mode.weights or self.application is Application.MERGED


def cells_of(
    stack: AdapterStack,
    lengths: Lengths,
    *,
    applications: Iterable[Application] = tuple(Application),
    decodings: Sequence[str] = ("dynamic",),
) -> tuple[Cell, ...]:
    """Every mode of *stack* × application × decoding × batch size; the base once each."""
    wanted = tuple(applications)
    return tuple(
        Cell(
            mode=mode,
            application=application,
            batch_size=batch_size,
            input_tokens=lengths.input_tokens,
            output_tokens=lengths.output_tokens,
            decoding=decoding,
        )
        for mode in stack.modes
        for application in (wanted if mode.weights else (Application.LIVE,))
        for decoding in decodings
        for batch_size in lengths.batch_sizes
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One generation, timed.

    Attributes:
        ttft_s: from just before the call to the first new token (prefill and one selection).
        gaps_s: from each token to the next, `output_tokens − 1` of them.
        e2e_s: from just before the call until the device has done everything.
    """

    ttft_s: float
    gaps_s: tuple[float, ...]
    e2e_s: float

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: the mean gap."""
        return sum(self.gaps_s) / len(self.gaps_s)

    def metrics(self) -> dict[str, float]:
        return {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}


def fastest(rounds: Sequence[Round]) -> Round:
    """Of several generations of one cell, each metric's lowest: TTFT, TPOT and end to end may be
    of different ones."""
    return Round(
        ttft_s=min(one.ttft_s for one in rounds),
        gaps_s=min(rounds, key=lambda one: one.tpot_s).gaps_s,
        e2e_s=min(one.e2e_s for one in rounds),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one prefill, or one decode step, must at least read and compute."""

    bytes_read: float
    flops: float

    def floor_s(self, *, bandwidth: float, rate: float) -> float:
        """The roofline: seconds on a device of *bandwidth* bytes/s and *rate* FLOP/s."""
        return max(self.bytes_read / bandwidth, self.flops / rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What was measured in one cell.

    Attributes:
        rounds: by metric of `METRICS`, one number a round, in the order they ran.
        itl_s: `mean`, `p50`, `p90`, `p99` of the gaps between tokens, pooled over the rounds.
        switch_s: seconds from rest until the mode was ready, each time it was entered.
        peak_bytes: the device's (on a CPU the process's) highest use while in the cell.
        prefill, decode: the least work, where it is known.
        device_states: what the device reported around the cell (clocks, temperature, throttling).
    """

    key: str
    mode: str
    application: str
    decoding: str
    batch_size: int
    input_tokens: int
    output_tokens: int
    rounds: Mapping[str, tuple[float, ...]]
    itl_s: Mapping[str, float]
    switch_s: tuple[float, ...] = ()
    peak_bytes: int | None = None
    prefill: Work | None = None
    decode: Work | None = None
    device_states: tuple[Mapping[str, Any], ...] = ()

    def median(self, metric: str) -> float:
        """The median over the rounds; raises `InputError` if there are none."""
        values = self.rounds.get(metric, ())
        if not values:
            raise InputError(f"{self.key} has no {metric}", remedy="measure it again")
        return percentile(values, 50)

    @property
    def output_tokens_per_s(self) -> float:
        """Output token throughput: all rows' new tokens over the end-to-end time."""
        return self.batch_size * self.output_tokens / self.median("e2e_s")

    @property
    def prefill_tokens_per_s(self) -> float:
        """All rows' prompt tokens over the time to the first token."""
        return self.batch_size * self.input_tokens / self.median("ttft_s")


def summarise(
    cell: Cell, rounds: Sequence[Round], *, gaps_s: Sequence[float] | None = None, **more: Any
) -> CellResult:
    """The result of *cell* from its rounds; *more* are further fields of `CellResult`.

    Args:
        gaps_s: the gaps to describe, where more was measured than the rounds.
    """
    gaps = list(gaps_s) if gaps_s is not None else [g for one in rounds for g in one.gaps_s]
    itl = {"mean": sum(gaps) / len(gaps)} if gaps else {}
    itl |= {f"p{p}": percentile(gaps, p) for p in (50, 90, 99)} if gaps else {}
    return CellResult(
        key=cell.key,
        mode=cell.mode.name,
        application=cell.application_name,
        decoding=cell.decoding,
        batch_size=cell.batch_size,
        input_tokens=cell.input_tokens,
        output_tokens=cell.output_tokens,
        rounds={
            metric: tuple(one.metrics()[metric] for one in rounds) for metric in METRICS
        },
        itl_s=itl,
        **more,
    )  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The *share*-th percentile with linear interpolation, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
