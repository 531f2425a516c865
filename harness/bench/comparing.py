"""Two sides of times become figures with their noise floors: pairs in turn, or nights in a row.

What `harness.bench.gate` judges. Knows nothing of files or of measuring.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from harness.bench.cells import METRICS, CellResult
from harness.bench.gate import FAMILY, Samples
from harness.bench.noise_floor import noise_floor

__all__ = ["compare_history", "compare_pairs"]

_FEW = 4  # launches or nights; below, what they differ by is not known
_UNKNOWN = 0.10  # and a change must be at least this


def compare_pairs(
    old: Sequence[Mapping[str, CellResult]], new: Sequence[Mapping[str, CellResult]]
) -> list[Samples]:
    """Rounds that ran in turn, as pairs; cells that both sides have.

    Args:
        old, new: by launch: each side was started several times, and its rounds spread over them.

    The floor is what the launches' ratios of one figure show against each other (`noise_floor`):
    the same two things compared again, by other processes, so that what drifts between launches
    cancels there as it does in the comparison. With fewer than four launches it is what pairs show
    against each other, which knows nothing of processes, and a change must be at least 10 %.
    """
    keys = [key for key in old[0] if key in new[0]]
    pairs = {
        (key, metric): [
            list(zip(before[key].rounds[metric], after[key].rounds[metric], strict=False))
            for before, after in zip(old, new, strict=True)
            if key in before and key in after
        ]
        for key in keys
        for metric in METRICS
    }
    floors = {
        metric: _pair_floor([pairs[key, metric] for key in keys if any(pairs[key, metric])])
        for metric in METRICS
    }
    return [
        Samples(
            key=key, metric=metric, paired=True, floor=floors[metric],
            old=tuple(pair[0] for launch in launches for pair in launch),
            new=tuple(pair[1] for launch in launches for pair in launch),
        )
        for (key, metric), launches in pairs.items()
        if any(launches)
    ]  # fmt: skip


def _pair_floor(cells: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> float:
    """The floor of one metric, from its pairs by cell and launch."""
    import numpy as np

    least = 0.0
    if min((sum(map(bool, launches)) for launches in cells), default=0) < _FEW:
        cells = [[[pair] for launch in launches for pair in launch] for launches in cells]
        least = math.log1p(_UNKNOWN)
    rows = [
        [statistics.fmean(math.log(new / old) for old, new in launch) for launch in launches
         if launch]
        for launches in cells
    ]  # fmt: skip
    columns = min(map(len, rows), default=0)
    table = np.array([row[:columns] for row in rows]).reshape(len(rows), columns)
    level = FAMILY / len(METRICS)
    return max(least, noise_floor(table, factor=1 / max(1, columns), level=level))


def compare_history(
    nights: Sequence[Mapping[str, CellResult]], new: Mapping[str, CellResult]
) -> list[Samples]:
    """Tonight against earlier *nights* (oldest first) of the same hardware.

    The old side is the rounds of all nights. The floor is that of one more night
    (`noise_floor`), from the medians of the nights that have all its cells, and at least what
    tonight's own rounds leave open. With fewer than four nights what nights differ by is
    not known, and a change must be at least 10 %.
    """
    import numpy as np

    table: list[Samples] = []
    for metric in METRICS:
        keys = [key for key, cell in new.items() if cell.rounds[metric]]
        old = {
            key: [night[key] for night in nights if key in night and night[key].rounds[metric]]
            for key in keys
        }
        level = FAMILY / len(METRICS) / max(1, len(keys))
        known = [key for key in keys if len(old[key]) >= _FEW]
        whole = [n for n in nights if all(k in n and n[k].rounds[metric] for k in known)]
        floor = math.inf
        if known and len(whole) >= _FEW:
            medians = [[math.log(night[key].median(metric)) for night in whole] for key in known]
            floor = noise_floor(
                np.array(medians), factor=1 + 1 / len(whole), level=FAMILY / len(METRICS)
            )
        for key in keys:
            if old[key]:
                times = new[key].rounds[metric]
                nightly = floor if key in known and floor < math.inf else math.log1p(_UNKNOWN)
                table.append(
                    Samples(
                        key=key, metric=metric, paired=False, new=times,
                        old=tuple(value for cell in old[key] for value in cell.rounds[metric]),
                        floor=max(nightly, _within_floor(times, level)),
                    )
                )  # fmt: skip
    return table


def _within_floor(rounds: Sequence[float], level: float) -> float:
    """What this session's own rounds leave open of their mean, as a log ratio (Student)."""
    from scipy import stats

    if len(rounds) < 2:
        return math.inf
    logs = [math.log(value) for value in rounds]
    quantile = float(stats.t.ppf(1 - level, len(logs) - 1))
    return quantile * statistics.stdev(logs) / math.sqrt(len(logs))
