"""The figures of a latency session over the nights before it, as rows and sparklines.

Knows nothing of verdicts, or of where the rows are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.bench.cells import METRICS, CellResult
from harness.bench.results import Results

__all__ = ["NIGHTS", "TITLES", "night_rows", "sparkline"]

#: What people call each metric.
TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}
_BARS = "▁▂▃▄▅▆▇█"
#: How many nights are shown at most.
NIGHTS = 30


def sparkline(values: Sequence[float]) -> str:
    """One character a value, low to high between the least and the greatest; NaN is a gap."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    # Within 2 % everything is the middle: noise is not to look like mountains.
    span = max(high - low, 0.02 * high) or 1.0
    low = (low + high - span) / 2
    return "".join(
        _BARS[min(7, int((value - low) / span * 8))] if math.isfinite(value) else " "
        for value in values
    )


def night_rows(history: Sequence[Results], now: Results) -> list[dict[str, Any]]:
    """Each figure over the last nights and now: medians in ms, and a sparkline."""
    nights = [*history[-NIGHTS + 1 :], now]
    rows = []
    for key in now.cells:
        for metric in METRICS[:2]:
            values = [_night(night, key, metric) for night in nights]
            rows.append(
                {
                    "cell": key,
                    "metric": TITLES[metric],
                    "sparkline": sparkline(values),
                    "values_ms": [None if math.isnan(v) else v * 1e3 for v in values],
                }
            )
    return rows


def _night(night: Results, key: str, metric: str) -> float:
    cell: CellResult | None = night.cells.get(key)
    return cell.median(metric) if cell is not None and cell.rounds[metric] else math.nan
