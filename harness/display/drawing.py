"""Drawing: the only room that knows matplotlib. Every plot comes as PNG and SVG.

Colours are Okabe and Ito's eight, which colour-blind readers can tell apart; a series keeps its
colour and line style over all plots of a report. Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

__all__ = [
    "COLOURS",
    "GREY",
    "MISSING",
    "SIGNED",
    "STYLES",
    "Figure",
    "Plot",
    "drawn",
    "plain",
]

#: One a series, in this order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
STYLES: tuple[Any, ...] = (
    "-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2, 2, 2)),
)  # fmt: skip
GREY = "#777777"
# From here on DejaVu Sans has few letters: Chinese, Japanese, Korean.
_EAST = 0x2E80
_WIDE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
         "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC",
         "Droid Sans Fallback")  # fmt: skip
#: A cell of a map that has no value.
MISSING = "#dddddd"
#: For maps of signed values.
SIGNED = LinearSegmentedColormap.from_list(
    "blue-white-orange", ["#0072B2", "#9ecae8", "#f7f7f7", "#f2b48a", "#D55E00"]
)
_SETTINGS: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "svg.fonttype": "path", "svg.hashsalt": "lora-stack",
    "figure.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One drawn plot: a slug for its file name, a title, a caption in words, and both forms."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def drawn(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Figure], None],
    size: tuple[float, float],
) -> Plot:
    """The plot that *draw* makes on an empty figure of *size* inches.

    The same values give the same bytes: no dates, no random ids.
    """
    with (
        mpl.rc_context(_SETTINGS | {"font.family": _families(title)}),
        warnings.catch_warnings(),
    ):
        # A script that no font here has is drawn as boxes; the caption's page names it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.suptitle(textwrap.fill(plain(title), int(size[0] * 9)), fontweight="bold")
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=140, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def _families(title: str) -> list[str]:
    """Matplotlib's own font, and for scripts that it lacks those of *_WIDE* that are installed."""
    own = "DejaVu Sans"
    if all(ord(character) < _EAST for character in title):
        return [own]
    installed = {font.name for font in fontManager.ttflist}
    return [own, *(name for name in _WIDE if name in installed)]


def plain(name: str) -> str:
    """Foreign text for matplotlib, which would take dollar signs for mathematics."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name).replace("$", r"\$")
