"""What adapters cost: every mode and application against the base, and ways of decoding.

Ratios with bootstrap intervals, from rounds that ran in turn where they did. Values in, rows out.
Knows nothing of files or pages.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from harness.bench.cells import CellResult
from harness.bench.gate import log_ratio_interval
from harness.bench.results import Results

__all__ = ["OverheadRow", "decoding_rows", "overhead_rows"]

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadRow:
    """One cell against another of the same batch.

    Attributes:
        against: what it is compared with, in words.
        tpot, ttft: `(ratio, low, high)`, the interval at 95 %.
    """

    mode: str
    application: str
    decoding: str
    batch_size: int
    against: str
    tpot: tuple[float, float, float]
    ttft: tuple[float, float, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _row(results: Results, cell: CellResult, other: CellResult, against: str) -> OverheadRow:
    def ratio(metric: str) -> tuple[float, float, float]:
        first, second = other.rounds[metric], cell.rounds[metric]
        paired = results.in_turn and len(first) == len(second)
        return log_ratio_interval(first, second, paired=paired, confidence=_CONFIDENCE)

    return OverheadRow(
        mode=cell.mode, application=cell.application, decoding=cell.decoding,
        batch_size=cell.batch_size, against=against, tpot=ratio("tpot_s"), ttft=ratio("ttft_s"),
    )  # fmt: skip


def overhead_rows(results: Results) -> list[OverheadRow]:
    """Each cell with adapters against the base of the same batch and decoding, and each live or
    flattened one against the same mode merged."""
    rows = []
    places = {(c.mode, c.application, c.decoding, c.batch_size): c for c in results.cells.values()}
    for cell in results.cells.values():
        if cell.application == "none" or not cell.rounds["tpot_s"]:
            continue
        for mode, application, against in (
            ("base", "none", "base"),
            (cell.mode, "merged", "merged"),
        ):
            other = places.get((mode, application, cell.decoding, cell.batch_size))
            if other is not None and other is not cell and other.rounds["tpot_s"]:
                rows.append(_row(results, cell, other, against))
    return rows


def decoding_rows(results: Results) -> list[OverheadRow]:
    """Each static or compiled cell against the same cell with a cache that grows."""
    places = {(c.mode, c.application, c.decoding, c.batch_size): c for c in results.cells.values()}
    rows = []
    for cell in results.cells.values():
        other = places.get((cell.mode, cell.application, "dynamic", cell.batch_size))
        if cell.decoding != "dynamic" and other is not None:
            rows.append(_row(results, cell, other, "dynamic"))
    return rows
