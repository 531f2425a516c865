"""The stopping clinic: does each mode stop, how sure is that, why not, and who is to blame.

Importing this package costs nothing; torch comes with the first examination of a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.stopping.examining import examine_stopping
    from harness.stopping.judging import judge_stopping
    from harness.stopping.training_data import check_training_data
    from harness.stopping.values import StoppingReport

__all__ = ["StoppingReport", "check_training_data", "examine_stopping", "judge_stopping"]

_HOMES = {
    "StoppingReport": "harness.stopping.values",
    "check_training_data": "harness.stopping.training_data",
    "examine_stopping": "harness.stopping.examining",
    "judge_stopping": "harness.stopping.judging",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
