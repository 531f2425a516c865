"""Maps of layers × module types: which cells there are, how large they are drawn, and the drawing.

Knows nothing of what a cell's number means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize

from harness.analysis.modules import ModuleFigures
from harness.analysis.overlap import PairFigures
from harness.display.drawing import MISSING, Figure, plain

__all__ = ["draw_map", "gridded", "kinds_of", "map_size", "short"]

_ANNOTATED = 80  # cells, at most, that carry their number


def kinds_of(modules: Sequence[ModuleFigures] | Sequence[PairFigures]) -> list[str]:
    """The module types, in the order in which they come."""
    return list(dict.fromkeys(m.kind for m in modules))


def short(name: str, width: int = 28) -> str:
    """*name* for a label: inert, and cut in the middle to *width* characters."""
    name = plain(name)
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-width // 2 :]}"


def map_size(
    modules: Sequence[ModuleFigures] | Sequence[PairFigures],
) -> tuple[float, float]:
    """Width and height of the figure, in inches."""
    columns = len({m.layer for m in modules})
    return min(14.0, 7 + 0.2 * columns), 1.8 + 0.36 * len(kinds_of(modules))


def gridded(
    modules: Sequence[Any], value: Callable[[Any], float]
) -> tuple[Any, list[str], list[str]]:
    """Kinds × layers; NaN where there is no module; the mean where there are several."""
    kinds = kinds_of(modules)
    layers = sorted({m.layer for m in modules}, key=lambda n: (n is None, n or 0))
    cells: dict[tuple[int, int], list[float]] = {}
    for m in modules:
        cells.setdefault((kinds.index(m.kind), layers.index(m.layer)), []).append(value(m))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for place, values in cells.items():
        grid[place] = np.mean(values)
    return grid, kinds, ["outside" if n is None else str(n) for n in layers]


def draw_map(
    figure: Figure, grid: Any, kinds: list[str], layers: list[str], label: str, norm: Normalize,
    cmap: Any,
) -> None:  # fmt: skip
    """Draw what `gridded` gives; few cells carry their number."""
    axes = figure.subplots()
    colours = (mpl.colormaps[cmap] if isinstance(cmap, str) else cmap).with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=colours, norm=norm)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    step = max(1, math.ceil(len(layers) / 24))
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_yticks(range(len(kinds)), [short(kind) for kind in kinds])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if grid.size <= _ANNOTATED:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                r, g, b, _ = colours(norm(value))
                dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
