"""Asking the allocator to keep pages that will be wanted again.

glibc hands every freed array of some megabytes back to the kernel, and the next one is zeroed page
by page: measured, a third of a merge's system time, and up to a third of a forward pass over some
hundred tokens on a CPU, whose LoRA layers make several such arrays each. Knows nothing of either.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

__all__ = ["keep_freed_pages"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_BYTES = 32 << 20


@cache
def keep_freed_pages() -> None:
    """Set glibc's thresholds for the whole process, once; elsewhere does nothing.

    Up to some 32 MiB a thread stay allocated.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _BYTES)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _BYTES)
