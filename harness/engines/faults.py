"""Which errors of a mode are the machine's: out of memory, a broken device.

Those are told as that mode's verdict, and the others still run; anything else is a bug and is
raised. Knows nothing of verdicts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["DeviceFault", "attempt", "device_fault", "give_memory_back"]

_STICKY = ("cuda error", "cublas", "cudnn", "device-side assert", "hip error")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFault:
    """What happened to a mode.

    Attributes:
        said: the first line of the error.
        sticky: the device's context is broken: nothing more can run in this process
            (https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html: "the process
            must be terminated and relaunched").
    """

    said: str
    remedy: str
    sticky: bool


def device_fault(error: BaseException) -> DeviceFault | None:
    """What *error* says about the machine; None if it says nothing about it."""
    first = str(error).strip().split("\n")[0]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if out_of_memory:
        return DeviceFault(
            said=f"out of memory: {first}" if first else "out of memory",
            remedy="lower --batch-size or --max-new-tokens, or choose a smaller --dtype",
            sticky=False,
        )
    broken = type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _STICKY)
    )
    if broken:
        return DeviceFault(
            said=f"the device failed: {first}",
            remedy="run again with --isolate: a process of its own for what follows; "
            "CUDA_LAUNCH_BLOCKING=1 shows where",
            sticky=True,
        )
    return None


def attempt(work: Callable[[], object]) -> DeviceFault | None:
    """Do *work*, of one mode; None if it gets to its end, else what befell the machine.

    What *work* held in memory is free afterwards, so that the next mode can have it; after a
    sticky fault there is no next one. Any other error is raised.
    """
    try:
        work()
    except Exception as error:
        fault = device_fault(error)
        if fault is None:
            raise
    else:
        return None
    if not fault.sticky:  # here the error is gone, which held what the mode held
        give_memory_back()
    return fault


def give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
