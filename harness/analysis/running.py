"""From sources to figures to a report folder: what the analyzers and the commands share.

Matplotlib is an optional extra: without it there are figures and reports without plots, and a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.analysis.against_base import refine_with_base
from harness.analysis.comparison import ComparisonFigures, compare_adapters
from harness.analysis.figures import AdapterFigures, adapter_figures
from harness.analysis.modules import ModuleFigures
from harness.analysis.reading import AnalysedAdapter, AnalysedPair, open_adapter, open_adapters
from harness.checkpoint_claims import check_claims
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.errors import InputError, combined
from harness.fit import check_adapter_on_base
from harness.locating import locate_base
from harness.preflight import check_base_values
from harness.stack import Adapter, Base

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
    trust_remote_code: bool = False,
) -> AdapterFigures:
    """The figures of the adapter at *source*, a folder or hub id.

    Args:
        base_model: a base to relate the figures to; none is needed.
        intruders: look for intruder dimensions among this many top directions; needs the base.
        trust_remote_code: accept folders that make loaders run code; none of it runs here.

    Raises:
        InputError: as `open_adapter` and `adapter_figures`; a base that cannot be had, or that
            the preflight refuses; *intruders* without a base.
    """
    base = _open_base(base_model, intruders, trust_remote_code)
    adapter = open_adapter(
        source, name=name, keep_going=keep_going, trust_remote_code=trust_remote_code
    )
    return adapter_figures(
        adapter,
        exact_entries=exact_entries,
        keep_going=keep_going,
        refine=_against(base, [adapter], intruders),
        base=base.base.source if base else None,
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
    trust_remote_code: bool = False,
) -> ComparisonFigures:
    """The comparison of two or more adapters; raises `InputError` as its parts do."""
    base = _open_base(base_model, intruders, trust_remote_code)
    adapters = open_adapters(
        sources, names=names, keep_going=keep_going, trust_remote_code=trust_remote_code
    )
    return compare_adapters(
        adapters,
        weights=weights,
        exact_entries=exact_entries,
        keep_going=keep_going,
        refine=_against(base, adapters, intruders),
        base=base.base.source if base else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenBase:
    base: Base
    checkpoint: CheckpointFiles


def _open_base(
    base_model: str | Path | None, intruders: int, trust_remote_code: bool
) -> _OpenBase | None:
    """The base, if one is given, and found sound: what holds NaN is no measure of anything."""
    if intruders < 0:
        raise InputError(f"{intruders} is too small", where="--intruders", remedy="give 1 or more")
    if base_model is None:
        if intruders:
            raise InputError("needs a base", where="--intruders", remedy="add --base-model PATH")
        return None
    base = locate_base(str(base_model), "--base-model", Path.cwd())
    checkpoint = read_checkpoint(base.path)
    faults: list[InputError] = []
    check_claims(checkpoint, faults, trust_remote_code=trust_remote_code, plain_float8=True)
    check_base_values(checkpoint, faults)
    if faults:
        raise combined(faults)
    return _OpenBase(base=base, checkpoint=checkpoint)


def _against(
    base: _OpenBase | None, adapters: Sequence[AnalysedAdapter], intruders: int
) -> _Refine | None:
    """What relates a module to *base*, once every adapter is found to fit it."""
    if base is None:
        return None
    faults: list[InputError] = []
    for one in adapters:
        adapter = Adapter(name=one.name, path=one.path, source=one.source)
        check_adapter_on_base(adapter, one.files, base.checkpoint, base.base, faults)
    if faults:
        raise combined(faults)
    return refine_with_base(base.checkpoint, intruders=intruders)


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
