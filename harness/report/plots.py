"""The plots of a latency report. Works on results; knows nothing of files or pages.

An application keeps its colour over all plots; grey is the base, which has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from harness.bench.cells import CellResult
from harness.bench.overhead import overhead_rows
from harness.bench.results import Results
from harness.display.drawing import COLOURS, GREY, STYLES, Figure, Plot, drawn, plain

__all__ = ["draw_latency"]

_APPLICATIONS = {"none": GREY, "live": COLOURS[0], "flattened": COLOURS[4], "merged": COLOURS[2]}
_MOST_LINES = 8


def draw_latency(results: Results, history: Sequence[Results] = ()) -> tuple[Plot, ...]:
    """Latency by mode, shares of the ceilings, what adapters cost, and the nights."""
    mark = " (random weights)" if results.random else ""
    cells = [c for c in results.cells.values() if c.decoding == "dynamic" and c.rounds["e2e_s"]]
    if not cells:
        return ()
    batches = sorted({cell.batch_size for cell in cells})
    size = (max(7.0, 1.2 + 3.4 * len(batches)), 5.6)
    plots = [
        drawn("latency-by-mode", f"Latency by mode{mark}", "Time to the first token, and the "
              "gap between tokens: bar the median, whisker up to the 99th percentile.",
              lambda f: _by_mode(f, cells, batches), size),
    ]  # fmt: skip
    if results.ceilings and any(cell.decode is not None for cell in cells):
        plots.append(
            drawn("share-of-ceiling", f"Share of the ceiling{mark}", "The roofline's time over "
                  "the measured one, with the copy bandwidth and the matrix rate measured in the "
                  "same session; 100 % is what the device allows.",
                  lambda f: _shares(f, results, cells, batches), size)
        )  # fmt: skip
    if any(row.against == "base" for row in overhead_rows(results)):
        plots.append(
            drawn("overhead", f"What adapters cost{mark}", "Time per output token over the "
                  "base's at the same batch, with 95 % bootstrap intervals.",
                  lambda f: _overhead(f, results), (9, 4.2))
        )  # fmt: skip
    if history:
        plots.append(
            drawn("history", f"The nights{mark}", "Medians of each night relative to the first "
                  "shown; a ring is a night that failed its gate.",
                  lambda f: _history(f, [*history[-29:], results]), (9, 5.4))
        )  # fmt: skip
    return tuple(plots)


def _bars(
    axes: Any,
    cells: Sequence[CellResult],
    value: Callable[[CellResult], float | None],
    whisker: Callable[[CellResult], float] | None = None,
) -> None:
    modes = list(dict.fromkeys(cell.mode for cell in cells))
    for place, mode in enumerate(modes):
        row = [cell for cell in cells if cell.mode == mode]
        width = 0.8 / max(3, len(row))
        for number, cell in enumerate(row):
            height = value(cell)
            if height is None:
                continue
            x = place + (number - (len(row) - 1) / 2) * width
            axes.bar(x, height, width * 0.92, color=_APPLICATIONS.get(cell.application, GREY))
            if whisker is not None:
                top = whisker(cell)
                axes.plot([x, x], [height, top], color="#333333", linewidth=0.9)
                axes.plot(
                    [x - width / 4, x + width / 4], [top, top], color="#333333", linewidth=0.9
                )
    axes.set_xticks(range(len(modes)), [plain(mode) for mode in modes])
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(visible=False, axis="x")


def _panels(figure: Figure, batches: Sequence[int]) -> Any:
    return figure.subplots(2, len(batches), squeeze=False, sharey="row")


def _legend(figure: Figure, cells: Sequence[CellResult]) -> None:
    from matplotlib.patches import Patch

    seen = [name for name in _APPLICATIONS if any(c.application == name for c in cells)]
    handles = [
        Patch(color=_APPLICATIONS[name], label="no adapter" if name == "none" else name)
        for name in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _by_mode(figure: Figure, cells: Sequence[CellResult], batches: Sequence[int]) -> None:
    panels = _panels(figure, batches)
    for column, batch in enumerate(batches):
        row = [cell for cell in cells if cell.batch_size == batch]
        top, bottom = panels[0][column], panels[1][column]
        _bars(top, row, lambda c: c.median("ttft_s") * 1e3)
        _bars(bottom, row, lambda c: c.itl_s["p50"] * 1e3, lambda c: c.itl_s["p99"] * 1e3)
        top.set_title(f"batch {batch}")
    panels[0][0].set_ylabel("first token, ms")
    panels[1][0].set_ylabel("between tokens, ms")
    _legend(figure, cells)


def _shares(
    figure: Figure, results: Results, cells: Sequence[CellResult], batches: Sequence[int]
) -> None:
    panels = _panels(figure, batches)
    for column, batch in enumerate(batches):
        row = [cell for cell in cells if cell.batch_size == batch]
        for axes, which in ((panels[0][column], "prefill"), (panels[1][column], "decode")):
            _bars(axes, row, lambda c, which=which: results.share(c, which))  # type: ignore[misc]
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        panels[0][column].set_title(f"batch {batch}")
    panels[0][0].set_ylabel("prefill, share of ceiling")
    panels[1][0].set_ylabel("decode, share of ceiling")
    _legend(figure, cells)


def _overhead(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    rows = [r for r in overhead_rows(results) if r.against == "base" and r.decoding == "dynamic"]
    batches = sorted({row.batch_size for row in rows})
    series = list(dict.fromkeys((row.mode, row.application) for row in rows))
    modes = list(dict.fromkeys(mode for mode, _ in series))
    markers = "osD^vP*X"
    for number, (mode, application) in enumerate(series):
        points = [row for row in rows if (row.mode, row.application) == (mode, application)]
        shift = (number - (len(series) - 1) / 2) * 0.7 / len(series)
        x = [batches.index(row.batch_size) + shift for row in points]
        y = [row.tpot[0] for row in points]
        errors = [[r.tpot[0] - r.tpot[1] for r in points], [r.tpot[2] - r.tpot[0] for r in points]]
        axes.errorbar(
            x, y, yerr=errors, linestyle="none", marker=markers[modes.index(mode) % 8], capsize=3,
            markersize=6, color=_APPLICATIONS.get(application, GREY),
            label=f"{plain(mode)}, {application}",
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("time per output token, × base")
    axes.grid(visible=False, axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _history(figure: Figure, nights: Sequence[Results]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    now = nights[-1]
    ordered = sorted(
        now.cells.values(),
        key=lambda c: (not any(c.key in name for n in nights for name in n.failed), c.batch_size,
                       c.application == "none", -len(c.mode)),
    )[:_MOST_LINES]  # fmt: skip
    for axes, metric, label in ((top, "ttft_s", "first token"), (bottom, "tpot_s", "per token")):
        for number, cell in enumerate(ordered):
            values = [
                night.cells[cell.key].median(metric)
                if cell.key in night.cells and night.cells[cell.key].rounds[metric]
                else math.nan
                for night in nights
            ]
            first = next((value for value in values if math.isfinite(value)), math.nan)
            line = [value / first for value in values]
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
            axes.plot(line, color=colour, linestyle=style, label=plain(cell.key), marker=".")
            name = f"{cell.key} {metric.removesuffix('_s')}"
            failed = [place for place, night in enumerate(nights) if name in night.failed]
            axes.plot(failed, [line[place] for place in failed], "o", markersize=10,
                      markerfacecolor="none", color=colour)  # fmt: skip
        axes.set_ylabel(f"{label}, × first night")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    names = [str(night.commit.get("id") or "")[:7] or night.moment[:10] for night in nights]
    step = max(1, len(nights) // 10)
    places = list(range(0, len(nights), step))
    bottom.set_xticks(places, [plain(names[place]) for place in places], rotation=30, fontsize=8)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
