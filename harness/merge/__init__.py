"""Merging adapters into a checkpoint, and flattening them into one adapter.

Importing this package costs nothing; numpy comes with the first call, torch never does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.merge.flatten import flatten_adapters
    from harness.merge.merging import RoundingLossError, merge_lora_adapters
    from harness.merge.proof import ProofError
    from harness.merge.report import MergeReport
    from harness.merge.strategies import STRATEGIES, StrategyOptions

_HOMES = {
    "STRATEGIES": "harness.merge.strategies",
    "MergeReport": "harness.merge.report",
    "ProofError": "harness.merge.proof",
    "RoundingLossError": "harness.merge.merging",
    "StrategyOptions": "harness.merge.strategies",
    "flatten_adapters": "harness.merge.flatten",
    "merge_lora_adapters": "harness.merge.merging",
}

__all__ = [
    "STRATEGIES",
    "MergeReport",
    "ProofError",
    "RoundingLossError",
    "StrategyOptions",
    "flatten_adapters",
    "merge_lora_adapters",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
