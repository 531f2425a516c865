"""From sources to figures to a report folder: what the analyzers and the commands share.

Matplotlib is an optional extra: without it there are figures and reports without plots, and a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.analysis.against_base import refine_with_base
from harness.analysis.comparison import ComparisonFigures, compare_adapters
from harness.analysis.figures import AdapterFigures, adapter_figures
from harness.analysis.modules import ModuleFigures
from harness.analysis.reading import AnalysedPair, open_adapter, open_adapters
from harness.checkpoint_files import read_checkpoint
from harness.errors import InputError
from harness.locating import locate_base

if TYPE_CHECKING:
    from harness.display.drawing import Plot

__all__ = ["PLOT_HINT", "analyze", "compare", "draw"]

PLOT_HINT = "no plots: matplotlib is missing → pip install 'lora-stack-harness[plots]'"

_Refine = Callable[[ModuleFigures, AnalysedPair], ModuleFigures]


def analyze(
    source: str | Path,
    *,
    name: str | None = None,
    base_model: str | Path | None = None,
    exact_entries: bool = False,
    intruders: int = 0,
    keep_going: bool = False,
) -> AdapterFigures:
    """The figures of the adapter at *source*, a folder or hub id.

    Args:
        base_model: a base to relate the figures to; none is needed.
        intruders: look for intruder dimensions among this many top directions; needs the base.

    Raises:
        InputError: as `open_adapter` and `adapter_figures`; a base that cannot be had;
            *intruders* without a base.
    """
    refine, base = _against(base_model, intruders)
    adapter = open_adapter(source, name=name, keep_going=keep_going)
    return adapter_figures(
        adapter, exact_entries=exact_entries, keep_going=keep_going, refine=refine, base=base
    )


def compare(
    sources: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    base_model: str | Path | None = None,
    exact_entries: bool = False,
    intruders: int = 0,
    keep_going: bool = False,
) -> ComparisonFigures:
    """The comparison of two or more adapters; raises `InputError` as its parts do."""
    refine, base = _against(base_model, intruders)
    adapters = open_adapters(sources, names=names, keep_going=keep_going)
    return compare_adapters(
        adapters,
        weights=weights,
        exact_entries=exact_entries,
        keep_going=keep_going,
        refine=refine,
        base=base,
    )


def _against(base_model: str | Path | None, intruders: int) -> tuple[_Refine | None, str | None]:
    if intruders < 0:
        raise InputError(f"{intruders} is too small", where="--intruders", remedy="give 1 or more")
    if base_model is None:
        if intruders:
            raise InputError("needs a base", where="--intruders", remedy="add --base-model PATH")
        return None, None
    base = locate_base(str(base_model), "--base-model", Path.cwd())
    return refine_with_base(read_checkpoint(base.path), intruders=intruders), base.source


def draw(figures: AdapterFigures | ComparisonFigures) -> tuple[Plot, ...] | None:
    """The plots of *figures*, or None where matplotlib is missing."""
    try:
        from harness.analysis import plots
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    if isinstance(figures, ComparisonFigures):
        return plots.draw_comparison(figures)
    return plots.draw_analysis(figures)
