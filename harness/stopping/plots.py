"""Plots of a stopping report: EOS by step, who still runs and who stops where, the weight sweep.

Knows nothing of files or verdicts.
"""

from __future__ import annotations

from typing import Any

from harness.display.drawing import COLOURS, GREY, MISSING, STYLES, Figure, Plot, drawn, plain
from harness.stopping.sweep import Sweep
from harness.stopping.values import StoppingReport, quartiles

__all__ = ["stopping_plots"]

_LEAST, _AROUND = 1e-8, 12


def stopping_plots(report: StoppingReport) -> list[Plot]:
    """Every plot that the report has figures for."""
    plots = []
    if any(summary.by_step for summary in report.evidence.values()):
        plots.append(_eos_by_step(report))
    if any(figures.total for figures in report.modes.values()):
        plots.append(_survival(report))
    if any(effect.layers for blame in report.blame.values() for effect in blame.adapters):
        plots.append(_layers(report))
    if report.sweep is not None:
        plots.append(_sweep(report.sweep))
    return plots


def _series(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place % len(STYLES)]}


def _eos_by_step(report: StoppingReport) -> Plot:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, (mode, summary) in enumerate(report.evidence.items()):
            _band(left, place, mode, dict(enumerate(summary.by_step, 1)))
            _band(right, place, mode, _around_end(report, mode))
        left.set_yscale("log")
        left.set_ylim(_LEAST, 2)
        left.set_xlabel("token of the completion")
        left.set_ylabel("probability of EOS")
        right.axvline(0, color=GREY, linewidth=0.8)
        right.set_xlabel("tokens from the natural end")
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return drawn(
        "eos-by-step",
        "EOS probability by step",
        "What each mode holds EOS for at each token of its own completions: median and quartiles "
        "over those that reach the token. Right: counted from each completion's natural end, where "
        "a mode that stops has its peak.",
        draw,
        (12, 4.2),
    )


def _band(axes: Any, place: int, mode: str, steps: dict[int, tuple[float, float, float]]) -> None:
    where = sorted(steps)
    low, middle, high = ([max(_LEAST, steps[n][which]) for n in where] for which in range(3))
    axes.plot(where, middle, label=plain(mode), **_series(place))
    axes.fill_between(
        where, low, high, color=COLOURS[place % len(COLOURS)], alpha=0.15, linewidth=0
    )


def _around_end(report: StoppingReport, mode: str) -> dict[int, tuple[float, float, float]]:
    """Quartiles of the probability, by tokens from the natural end."""
    found: dict[int, list[float]] = {}
    for trace, ending in zip(report.traces[mode], report.modes[mode].endings, strict=True):
        if ending.natural_end is None:
            continue
        for step, probability in enumerate(trace.probability):
            offset = step - ending.natural_end
            if abs(offset) <= _AROUND:
                found.setdefault(offset, []).append(probability)
    return {offset: three for offset, values in found.items() if (three := quartiles(values))}


def _survival(report: StoppingReport) -> Plot:
    last = max((f.max_new_tokens for f in report.modes.values()), default=1)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for place, (mode, figures) in enumerate(report.modes.items()):
            running = [1.0, *figures.survival.running]
            if figures.stopped == figures.total:
                running += [running[-1]] * (last + 1 - len(running))
            left.step(range(len(running)), running, where="post", linewidth=1.8, **_series(place))
            hazard = figures.survival.hazard
            right.plot(
                range(1, len(hazard) + 1), hazard, label=plain(mode), linewidth=1.8,
                marker="." if len(hazard) < 60 else None, **_series(place),
            )  # fmt: skip
        left.set_ylabel("share still running")
        right.set_ylabel("share of those running that stop here")
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.05)
            axes.set_xlim(0, last)
            axes.set_xlabel("token of the completion")
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return drawn(
        "survival",
        "Completions still running, and the hazard of EOS",
        "Left: share of completions that run on behind each token (Kaplan-Meier; those cut off by "
        "the length count as running until then); a mode that stops falls to 0. Right: of the "
        "completions that reach a token, the share that stops there.",
        draw,
        (12, 4.2),
    )


def _layers(report: StoppingReport) -> Plot:
    shown = {mode: blame for mode, blame in report.blame.items() if blame.adapters}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shown), 1, squeeze=False)
        for axes, (mode, blame) in zip(grid[:, 0], shown.items(), strict=True):
            width = 0.8 / len(blame.adapters)
            for place, effect in enumerate(blame.adapters):
                offset = (place - (len(blame.adapters) - 1) / 2) * width
                layers = sorted(effect.layers)
                axes.bar(
                    [layer + offset for layer in layers],
                    [effect.layers[layer] for layer in layers],
                    width,
                    color=COLOURS[place % len(COLOURS)],
                    label=f"{plain(effect.adapter)} ({effect.effect:+.1f})",
                )
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.set_title(plain(mode))
            axes.set_xlabel("layer")
            axes.set_ylabel("nats")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return drawn(
        "blame-by-layer",
        "Who raises and lowers EOS, by layer",
        "Change of EOS's log-odds at the natural end that each adapter makes in each layer; the "
        "layers' shares add up to the adapter's effect, in brackets.",
        draw,
        (9, 0.8 + 2.8 * len(shown)),
    )


def _sweep(sweep: Sweep) -> Plot:
    rows, columns = sweep.first_weights, sweep.second_weights
    panels: list[tuple[str, list[list[float]], str, float | None]] = [
        ("stop rate", [[sweep.at(r, c).rate for c in columns] for r in rows], "{:.0%}", 1.0),
        ("mean tokens", [[sweep.at(r, c).mean_tokens for c in columns] for r in rows], "{:.0f}",
         None),
        (f"{sweep.first} retained",
         [[_number(sweep.at(r, c).retention) for c in columns] for r in rows], "{:.2f}", None),
    ]  # fmt: skip

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, values, form, top) in zip(grid, panels, strict=True):
            map_ = axes.imshow(
                values, origin="lower", aspect="auto", cmap="Blues",
                vmin=0.0 if top else None, vmax=top,
            )  # fmt: skip
            map_.cmap.set_bad(MISSING)
            low, high = map_.get_clim()
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    value = values[y][x]
                    if value != value:
                        continue
                    dark = high > low and (value - low) / (high - low) > 0.55
                    axes.text(
                        x, y, form.format(value), ha="center", va="center", fontsize=9,
                        color="white" if dark else "black",
                    )  # fmt: skip
                    if sweep.at(row, column).meets:
                        axes.add_patch(_frame(x, y))
            axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
            axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
            axes.set_xlabel(f"weight of {plain(sweep.second)}")
            axes.set_ylabel(f"weight of {plain(sweep.first)}")
            axes.set_title(plain(title))
            axes.grid(False)

    return drawn(
        "weight-sweep",
        "Weights: stopping, length and style",
        f"{sweep.prompts} prompts a cell, greedy. Framed: the observed stop rate reaches "
        f"{sweep.target:.0%} without a loop. Retained: how much likelier the mode's words are "
        f"under {sweep.first} alone than under the base; 1 is its own words, 0 the base's.",
        draw,
        (12, 4.0),
    )


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=COLOURS[1], linewidth=2
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
