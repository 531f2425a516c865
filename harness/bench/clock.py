"""Clocks that a generation is timed with: the device's own on CUDA, the host's elsewhere.

On CUDA an event is recorded at every token and read only after the last one, so that measuring
adds no synchronisation to the loop; start and end are synchronised. Knows nothing of models.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, Protocol

import torch

from harness.bench.cells import Round
from harness.errors import HarnessError

__all__ = ["Clock", "CudaClock", "HostClock", "clock_for", "cuda_event", "synchronise"]


class Clock(Protocol):
    """Start once, mark every token, stop once."""

    def start(self) -> None: ...

    def mark(self) -> None: ...

    def stop(self) -> Round: ...


class HostClock:
    """`time.perf_counter`, after waiting for *device*; a CPU has always done what was asked."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._start = 0.0
        self._marks: list[float] = []

    def start(self) -> None:
        self._marks = []
        synchronise(self._device)
        self._start = time.perf_counter()

    def mark(self) -> None:
        synchronise(self._device)
        self._marks.append(time.perf_counter())

    def stop(self) -> Round:
        synchronise(self._device)
        end = time.perf_counter()
        return _round([mark - self._start for mark in self._marks], end - self._start)


class CudaClock:
    """CUDA events on the current stream, read after a synchronisation.

    An event carries the time at which the device got to it, not at which the host asked for it.
    End to end is the host's time between the two synchronisations: what a caller waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Any] = []
        self._used = 0
        self._start = 0.0

    def _record(self) -> None:
        if self._used == len(self._events):
            self._events.append(cuda_event())
        self._events[self._used].record(torch.cuda.current_stream(self._device))
        self._used += 1

    def start(self) -> None:
        self._used = 0
        torch.cuda.synchronize(self._device)
        self._start = time.perf_counter()
        self._record()

    def mark(self) -> None:
        self._record()

    def stop(self) -> Round:
        torch.cuda.synchronize(self._device)
        end = time.perf_counter()
        first, *rest = self._events[: self._used]
        return _round([first.elapsed_time(event) / 1e3 for event in rest], end - self._start)


def _round(marks: list[float], e2e: float) -> Round:
    if len(marks) < 2:
        raise HarnessError(f"{len(marks)} tokens were marked: nothing to measure between them")
    return Round(
        ttft_s=marks[0],
        gaps_s=tuple(after - before for before, after in itertools.pairwise(marks)),
        e2e_s=e2e,
    )


def cuda_event() -> Any:
    """A CUDA event that keeps the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: str) -> Clock:
    """The clock of *device*: the host's waits for other accelerators than CUDA at every token,
    since `generate` may read a step late whether all rows are done."""
    chosen = torch.device(device)
    return CudaClock(chosen) if chosen.type == "cuda" else HostClock(device)


def synchronise(device: str) -> None:
    """Wait until *device* has done everything asked of it; a CPU always has."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)
    elif chosen.type != "cpu":
        getattr(torch, chosen.type).synchronize()
