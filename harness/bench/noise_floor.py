"""How far apart equal things lie on this machine: the floor under what the gate calls a change.

What was measured several times, in several launches or nights, is a table of logarithms with a row
a cell. Take out each cell's own mean, and what is left is noise, of two kinds: what one launch
shifts in all cells at once (a process lies otherwise in memory, a neighbour is awake), and what
one cell has of its own. The first is a single draw a launch, however many cells the table has; the
second is many, and has to hold for the unluckiest of them. Each gets half of the level and
Student's quantile with its own degrees of freedom; the floor is their sum, so that by Bonferroni's
inequality the level holds for the whole table. Values in, a number out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["noise_floor"]


def noise_floor(table: np.ndarray[Any, Any], *, factor: float, level: float) -> float:
    """The log ratio that no cell exceeds upwards by noise alone, but with probability *level*.

    Args:
        table: `(cells, columns)`, logarithms; a column a launch or a night. What is to be judged
            may be in it: a lasting change is in the mean of its row, which is taken out.
        factor: the variance of what is judged over that of one column: `1/n` for the mean of *n*
            columns, `1 + 1/n` for one more column against that mean.

    Returns:
        Infinity where there are no two columns to differ.
    """
    from scipy import stats

    cells, columns = table.shape
    if cells < 1 or columns < 2:
        return math.inf
    left = table - table.mean(axis=1, keepdims=True)
    shared = left.mean(axis=0)
    own = left - shared
    found = 0.0
    for part, freedom, count in (
        (shared, columns - 1, 1),
        (own, (columns - 1) * (cells - 1), cells),
    ):
        if freedom:
            quantile = float(stats.t.ppf(1 - level / 2 / count, freedom))
            found += quantile * math.sqrt(float((part**2).sum()) / freedom * factor)
    return found
