"""The plots of an analysis or a comparison.

Heat maps are cividis or a blue–orange pair of it; an adapter keeps its colour and line style over
all plots of a comparison. Works on figures; knows nothing of files or reports.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from harness.analysis.comparison import AdapterPair, ComparisonFigures
from harness.analysis.figures import AdapterFigures
from harness.analysis.findings import listed
from harness.analysis.maps import draw_map, gridded, kinds_of, map_size, short
from harness.analysis.modules import ModuleFigures
from harness.display.drawing import (
    COLOURS,
    GREY,
    MISSING,
    SIGNED,
    STYLES,
    Figure,
    Plot,
    drawn,
)

__all__ = ["draw_analysis", "draw_comparison"]

_MOST_PAIRS = 6


def draw_analysis(figures: AdapterFigures) -> tuple[Plot, ...]:
    """All plots of one adapter."""
    name = figures.name
    return (
        drawn("weight-histogram", f"Weights of {name}", "Density of the entries of A, B and ΔW "
              "between their 0.2 % and 99.8 % quantiles." + _sampled(figures),
              lambda f: _weight_histogram(f, figures), (11, 3.6)),
        drawn("weight-histogram-log", f"Sizes of the weights of {name}",
              "Share of the entries by |x|, on a logarithmic scale; zeros are left out."
              + _sampled(figures), lambda f: _log_histogram(f, figures), (8, 4)),
        drawn("layers", f"{name} by layer", "‖ΔW‖ of each module type, and the mean effective "
              "rank with the rank that was trained.", lambda f: _layers(f, figures), (11, 4)),
        drawn("heat-map", f"Where {name} changes the model", "Root mean square entry of ΔW by "
              "layer and module type, on a logarithmic scale; grey: not adapted, or zero.",
              lambda f: _heat_map(f, figures), map_size(figures.modules)),
        drawn("spectra", f"Spectra of {name}", "Singular values of ΔW relative to the largest: "
              "the median over the layers, with their range shaded.",
              lambda f: _spectra(f, figures), (8, 4.4)),
    )  # fmt: skip


def draw_comparison(figures: ComparisonFigures) -> tuple[Plot, ...]:
    """All plots of a comparison; the maps of at most six pairs."""
    joined = listed(figures.names)
    plots = [
        drawn("adapters", f"{joined}: size", "‖ΔW‖ by module type, and by layer.",
              lambda f: _adapters(f, figures), (11, 4.2)),
        drawn("distributions", f"{joined}: sizes of the entries of ΔW", "Share of the entries by "
              "|ΔW|, on a logarithmic scale." + "".join(_sampled(a) for a in figures.adapters[:1]),
              lambda f: _distributions(f, figures), (8, 4)),
        drawn("compared-spectra", f"{joined}: spectra", "Singular values of ΔW, the median over "
              "the modules, and the energy in the first k directions.",
              lambda f: _compared_spectra(f, figures), (11, 4)),
        drawn("overlap-matrix", f"{joined}: cosine and overlap", "Over all shared modules of each "
              "pair: the cosine of the deltas, and the mean overlap of output and input spaces.",
              lambda f: _overlap_matrix(f, figures), (11, 1.4 + 0.9 * len(figures.names))),
        drawn("merge-strategies", f"{joined}: merge strategies", "Distance of the merged ΔW from "
              "the plain sum that the live stack applies, and how much of each adapter's energy "
              "is retained.", lambda f: _strategies(f, figures), (11, 4)),
    ]  # fmt: skip
    shared = [pair for pair in figures.pairs if pair.total is not None][:_MOST_PAIRS]
    for number, pair in enumerate(shared, start=1):
        suffix = "" if len(shared) == 1 else f"-{number}"
        plots += _pair_plots(pair, suffix)
    return tuple(plots)


def _pair_plots(pair: AdapterPair, suffix: str) -> list[Plot]:
    title = f"{pair.first} and {pair.second}"
    return [
        drawn(f"cosine-map{suffix}", f"{title}: cosine of ΔW", "By layer and module type; by "
              "chance it would be within a few 1/√(out·in). Grey: not shared.",
              lambda f: _cosine_map(f, pair), map_size(pair.modules)),
        drawn(f"interference{suffix}", f"{title}: overlap and interference by layer",
              "Solid: measured. Dotted: what random directions would give.",
              lambda f: _interference(f, pair), (11, 4)),
    ]  # fmt: skip


def _sampled(figures: AdapterFigures) -> str:
    delta = figures.counts["delta"]
    if delta.exact:
        return ""
    return (
        f" ΔW is sampled ({delta.total:,} entries; the standard error of a module's distribution "
        f"function is at most {delta.standard_error:.1g})."
    )


def _from_zero(axes: Any) -> None:
    """Sizes start at zero, and what is all of one size does not lie on the upper edge."""
    axes.set_ylim(bottom=0)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.05)


def _whole_numbers(axes: Any, places: Sequence[int]) -> None:
    """Whole numbers alone along *axes*, which hold *places*: a single one has no neighbours."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(set(places)) == 1:
        axes.set_xlim(places[0] - 1, places[0] + 1)
        axes.set_xticks(places[:1])


_PARTS = (("a", "A"), ("b", "B"), ("delta", "ΔW"))


def _weight_histogram(figure: Figure, figures: AdapterFigures) -> None:
    for axes, (key, label), colour in zip(figure.subplots(1, 3), _PARTS, COLOURS[:3], strict=True):
        counts = figures.counts[key]
        reach = max(abs(counts.quantile(0.002)), abs(counts.quantile(0.998))) or 1.0
        edges = np.linspace(-reach, reach, 81)
        axes.stairs(counts.histogram(edges), edges, fill=True, color=colour, alpha=0.85)
        axes.set(title=label, xlabel="value", ylabel="density" if key == "a" else "")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="x", scilimits=(-2, 3))


def _magnitude_edges(counts: Sequence[Any]) -> Any:
    low = min((c.magnitude_quantiles(0.001)[0] for c in counts), default=0.0)
    high = max(c.magnitude_quantiles(1.0)[0] for c in counts) or 1.0
    return np.geomspace(max(low, high * 1e-9), high * 1.1, 90)


def _log_histogram(figure: Figure, figures: AdapterFigures) -> None:
    axes = figure.subplots()
    edges = _magnitude_edges(list(figures.counts.values()))
    for (key, label), colour, style in zip(_PARTS, COLOURS, STYLES, strict=False):
        shares = figures.counts[key].magnitude_histogram(edges)
        axes.stairs(shares, edges, color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.set(xscale="log", yscale="log", xlabel="|x|", ylabel="share of entries a step")
    axes.set_ylim(bottom=1e-6)
    axes.legend()


def _layers(figure: Figure, figures: AdapterFigures) -> None:
    left, right = figure.subplots(1, 2)
    inside = [m for m in figures.modules if m.layer is not None]
    for number, kind in enumerate(kinds_of(inside)):
        totals: dict[int, float] = {}
        for m in inside:
            if m.kind == kind and m.layer is not None:
                totals[m.layer] = math.hypot(totals.get(m.layer, 0.0), m.norm_delta)
        left.plot(*zip(*sorted(totals.items()), strict=True), label=short(kind),
                  color=COLOURS[number % 8], linestyle=STYLES[number % 8],
                  marker="o" if len(totals) < 3 else None)  # fmt: skip
    if inside:
        figure.legend(loc="outside right center", fontsize=9)
    else:
        for axes in (left, right):
            axes.text(0.5, 0.5, "no module lies in a layer", transform=axes.transAxes, ha="center",
                      color=GREY)  # fmt: skip
    layers = sorted({m.layer for m in inside if m.layer is not None})
    means = [np.mean([m.effective_rank for m in inside if m.layer == n]) for n in layers]
    ranks = [np.mean([m.rank for m in inside if m.layer == n]) for n in layers]
    right.bar(layers, ranks, color=MISSING, label="rank trained")
    right.bar(layers, means, color=COLOURS[0], label="effective rank")
    right.set_ylim(top=max(ranks, default=1.0) * 1.3)
    right.legend(ncols=2, loc="upper right")
    left.set(xlabel="layer", ylabel="‖ΔW‖", title="size")
    right.set(xlabel="layer", ylabel="rank", title="rank")
    _from_zero(left)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        _whole_numbers(axes, layers)


def _heat_map(figure: Figure, figures: AdapterFigures) -> None:
    grid, kinds, layers = gridded(figures.modules, lambda m: m.rms if m.rms > 0 else math.nan)
    sizes = grid[np.isfinite(grid)]
    low, high = (sizes.min(), sizes.max()) if len(sizes) else (0.1, 1.0)
    norm = LogNorm(low * 0.98, high * 1.02)
    draw_map(figure, grid, kinds, layers, "rms of ΔW", norm, "cividis")


def _cosine_map(figure: Figure, pair: AdapterPair) -> None:
    grid, kinds, layers = gridded(pair.modules, lambda m: m.cosine)
    reach = max(0.01, float(np.nanmax(np.abs(grid))))
    draw_map(figure, grid, kinds, layers, "cosine", Normalize(-reach, reach), SIGNED)


def _relative_spectra(modules: Sequence[ModuleFigures]) -> Any:
    """`(modules, r)` singular values over the largest, NaN past a module's own rank."""
    trained = [m for m in modules if m.spectral_norm > 0]
    table = np.full((len(trained), max((m.rank for m in trained), default=0)), np.nan)
    for row, module in zip(table, trained, strict=True):
        row[: module.rank] = np.array(module.singular_values) / module.spectral_norm
    return table


def _spectra(figure: Figure, figures: AdapterFigures) -> None:
    axes = figure.subplots()
    lowest = 1.0
    for number, kind in enumerate(kinds_of(figures.modules)):
        table = _relative_spectra([m for m in figures.modules if m.kind == kind])
        if not table.size:
            continue
        places = np.arange(1, table.shape[1] + 1)
        middle = np.nanmedian(table, axis=0)
        lowest = min(lowest, float(middle.min()))
        colour = COLOURS[number % 8]
        axes.plot(places, middle, color=colour, linestyle=STYLES[number % 8], label=short(kind),
                  marker="o" if len(places) < 12 else None, markersize=3)  # fmt: skip
        axes.fill_between(places, np.nanmin(table, axis=0), np.nanmax(table, axis=0),
                          color=colour, alpha=0.07, linewidth=0)  # fmt: skip
    axes.set(yscale="log", xlabel="direction", ylabel="σ / σ₁")
    axes.set_ylim(bottom=max(lowest * 0.5, 1e-6), top=1.3)
    _whole_numbers(axes, range(1, max((m.rank for m in figures.modules), default=1) + 1))
    if axes.lines:
        figure.legend(loc="outside right center", fontsize=9)


def _adapters(figure: Figure, figures: ComparisonFigures) -> None:
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(g.name for a in figures.adapters for g in a.kinds))
    width = 0.8 / len(figures.adapters)
    for number, adapter in enumerate(figures.adapters):
        look = {"color": COLOURS[number % 8], "label": short(adapter.name)}
        norms = {group.name: group.norm_delta for group in adapter.kinds}
        places = np.arange(len(kinds)) + (number - (len(figures.adapters) - 1) / 2) * width
        left.bar(places, [norms.get(kind, 0.0) for kind in kinds], width * 0.94, **look)
        layers = [(int(g.name), g.norm_delta) for g in adapter.layers if g.name.isdigit()]
        if layers:
            right.plot(*zip(*sorted(layers), strict=True), linestyle=STYLES[number % 8], **look,
                       marker="o" if len(layers) < 12 else None, markersize=4)  # fmt: skip
    left.set_xticks(range(len(kinds)), [short(k, 18) for k in kinds], rotation=35, ha="right")
    left.set(ylabel="‖ΔW‖", title="by module type")
    right.set(xlabel="layer", ylabel="‖ΔW‖", title="by layer")
    _from_zero(right)
    _whole_numbers(right, [int(g.name) for a in figures.adapters for g in a.layers
                           if g.name.isdigit()])  # fmt: skip
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _distributions(figure: Figure, figures: ComparisonFigures) -> None:
    axes = figure.subplots()
    edges = _magnitude_edges([adapter.counts["delta"] for adapter in figures.adapters])
    for number, adapter in enumerate(figures.adapters):
        shares = adapter.counts["delta"].magnitude_histogram(edges)
        axes.stairs(shares, edges, color=COLOURS[number % 8], linestyle=STYLES[number % 8],
                    linewidth=1.8, label=short(adapter.name))  # fmt: skip
    axes.set(xscale="log", xlabel="|ΔW|", ylabel="share of entries a step")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.legend(loc="upper left")


def _compared_spectra(figure: Figure, figures: ComparisonFigures) -> None:
    left, right = figure.subplots(1, 2)
    tables = [_relative_spectra(adapter.modules) for adapter in figures.adapters]
    few = max(table.shape[1] for table in tables) <= 16
    for number, (adapter, table) in enumerate(zip(figures.adapters, tables, strict=True)):
        if not table.size:
            continue
        look: dict[str, Any] = {
            "color": COLOURS[number % 8], "linestyle": STYLES[number % 8],
            "label": short(adapter.name), "marker": "o" if few else None,
            "markersize": 4,
        }  # fmt: skip
        places = np.arange(1, table.shape[1] + 1)
        left.plot(places, np.nanmedian(table, axis=0), **look)
        energy = np.nancumsum(table**2, axis=1)
        right.plot(places, np.median(energy / energy[:, -1:], axis=0), **look)
    left.set(yscale="log", xlabel="direction", ylabel="σ / σ₁", title="singular values")
    left.set_ylim(bottom=max(left.get_ylim()[0], 1e-6))
    right.set(xlabel="directions kept", ylabel="energy", title="energy in the first k")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_ylim(0, 1.03)
    if right.lines:
        right.legend(loc="lower right")
    for axes in (left, right):
        _whole_numbers(axes, range(1, max(table.shape[1] for table in tables) + 1))


def _overlap_matrix(figure: Figure, figures: ComparisonFigures) -> None:
    names = list(figures.names)
    labels = [short(name, 20) for name in names]
    panels: tuple[tuple[str, str], ...] = (
        ("cosine", "cosine"), ("column_overlap", "output overlap"), ("row_overlap", "input overlap")
    )  # fmt: skip
    for axes, (field, title) in zip(figure.subplots(1, 3), panels, strict=True):
        grid = np.full((len(names), len(names)), np.nan)
        for (i, j), pair in zip(
            itertools.combinations(range(len(names)), 2), figures.pairs, strict=True
        ):
            if pair.total is not None:
                grid[i, j] = grid[j, i] = getattr(pair.total, field)
        np.fill_diagonal(grid, 1.0)
        signed = field == "cosine"
        norm = Normalize(-1 if signed else 0, 1)
        colours = (SIGNED if signed else mpl.colormaps["cividis"]).with_extremes(bad=MISSING)
        axes.imshow(np.ma.masked_invalid(grid), cmap=colours, norm=norm, aspect="auto")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), labels, rotation=20, ha="right")
        axes.set_yticks(range(len(names)), labels if field == "cosine" else [""] * len(names))
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                r, g, b, _ = colours(norm(value))
                dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
                # Two digits, or one with an exponent: what a cell of several has room for.
                text = f"{value:.2g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}"
                axes.text(column, row, text, ha="center", va="center",
                          fontsize=max(5, min(10, 42 // len(names))),
                          color="white" if dark else "black")  # fmt: skip


def _strategies(figure: Figure, figures: ComparisonFigures) -> None:
    left, right = figure.subplots(1, 2)
    known = [s for s in figures.strategies if s.distance is not None][::-1]
    places = np.arange(len(known))
    bars = left.barh(places, [s.distance or 0.0 for s in known], color=GREY)
    left.bar_label(bars, [f"{s.distance or 0.0:.2%}" for s in known], padding=3)
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.set(title="distance from the plain sum")
    left.margins(x=0.18)
    height = 0.8 / len(figures.names)
    for number, name in enumerate(figures.names):
        shift = ((len(figures.names) - 1) / 2 - number) * height
        right.barh(places + shift, [s.retained[name] or 0.0 for s in known], height * 0.92,
                   color=COLOURS[number % 8], label=short(name))  # fmt: skip
    right.axvline(1, color="black", linewidth=0.8)
    right.xaxis.set_major_formatter(PercentFormatter(1))
    right.set(title="energy retained of each adapter")
    for axes in (left, right):
        axes.set_yticks(places, [s.strategy for s in known])
        axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=4)


def _interference(figure: Figure, pair: AdapterPair) -> None:
    axes_overlap, axes_interference = figure.subplots(1, 2)
    groups = [group for group in pair.layers if group.name.isdigit()] or list(pair.layers)
    places = [int(g.name) if g.name.isdigit() else i for i, g in enumerate(groups)]
    lines: tuple[tuple[Any, str, str], ...] = (
        (axes_overlap, "column_overlap", "outputs"),
        (axes_overlap, "row_overlap", "inputs"),
        (axes_interference, "interference", "interference"),
    )
    for number, (axes, field, label) in enumerate(lines):
        # Black and grey: the first colours are the adapters'.
        colour = GREY if label == "inputs" else "black"
        look: dict[str, Any] = {"color": colour, "marker": "os^"[number], "markersize": 4}
        axes.plot(places, [getattr(g, field) for g in groups], label=label, **look)
        axes.plot(places, [getattr(g, f"{field}_by_chance") for g in groups],
                  color=colour, linestyle=":", label=f"{label}, by chance")  # fmt: skip
    axes_overlap.set(title="subspace overlap", ylabel="‖U₁ᵀU₂‖²/min k")
    axes_interference.set(title="singular task interference", ylabel="over Σσ")
    for axes in (axes_overlap, axes_interference):
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.3)  # room for the legend
        _whole_numbers(axes, places)
        axes.legend(ncols=2, loc="upper center")
