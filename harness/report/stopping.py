"""The stopping report as JSON, Markdown and a self-contained HTML page.

Prompts and model outputs are foreign text, which `harness.display` makes inert. Knows nothing of
how the figures came about.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.display.page import image_uri, render
from harness.display.plain_values import plain
from harness.files.staging import staged_folder
from harness.stopping.values import StoppingReport

if TYPE_CHECKING:
    from harness.display.drawing import Plot

__all__ = ["as_json", "tables", "write_stopping"]

SCHEMA = "lora-stack-stopping/1"
_TEMPLATES = Path(__file__).parent / "templates"


def as_json(report: StoppingReport) -> dict[str, Any]:
    """Everything as plain values; numbers that are not finite are None."""
    payload = {
        "verdict": report.verdict.value,
        "checks": [check.as_json() for check in report.checks],
        "schema": SCHEMA,
        "subject": report.subject,
        "source": report.source,
        "generated": report.generated,
        "causes": [cause.as_json() for cause in report.causes],
        "modes": {
            mode: {
                "total": f.total,
                "stopped": f.stopped,
                "rate": f.rate,
                "interval": dataclasses.asdict(f.interval),
                "stop_reasons": f.reasons,
                "undecided": f.undecided,
                "empty": f.empty,
                "stop_tokens": f.stop_tokens,
                "mean_tokens": f.mean_tokens,
                "max_new_tokens": f.max_new_tokens,
                "overran": f.overran,
                "longest_overrun": f.longest_overrun,
                "signs": f.signs,
                "loops": f.loops,
                "survival": dataclasses.asdict(f.survival),
                "eos": dataclasses.asdict(report.evidence[mode])
                if mode in report.evidence
                else None,
                "sampled": dataclasses.asdict(report.sampled[mode])
                if mode in report.sampled
                else None,
                "completions": [
                    dataclasses.asdict(ending) | _trace(report, mode, place)
                    for place, ending in enumerate(f.endings)
                ],
            }
            for mode, f in report.modes.items()
        },
        "blame": {
            mode: dataclasses.asdict(blame) | {"sentence": blame.sentence}
            for mode, blame in report.blame.items()
        },
        "sweep": dataclasses.asdict(report.sweep) if report.sweep else None,
        "dataset": dataclasses.asdict(report.dataset) if report.dataset else None,
        "notes": list(report.notes),
    }
    values: dict[str, Any] = plain(payload)
    return values


def _trace(report: StoppingReport, mode: str, place: int) -> dict[str, Any]:
    if mode not in report.traces:
        return {}
    trace = report.traces[mode][place]
    return {
        "eos_probability": [float(f"{p:.4g}") for p in trace.probability],
        "eos_rank": trace.rank,
        "eos_margin": [round(m, 3) for m in trace.margin],
    }


def tables(report: StoppingReport) -> list[dict[str, Any]]:
    """The tables of the report: `title`, `text`, `head`, `rows`."""
    found = [_modes_table(report)]
    if report.sampled:
        found.append(_sampled_table(report))
    if report.blame:
        found.append(_blame_table(report))
    if report.sweep is not None:
        found.append(_sweep_table(report))
    found.append(_completions_table(report))
    return found


def _modes_table(report: StoppingReport) -> dict[str, Any]:
    rows = []
    for mode, f in report.modes.items():
        eos = report.evidence.get(mode)
        rows.append(
            (
                mode, f"{f.stopped} of {f.total}", f.interval.shown, _reasons(f.reasons),
                None if f.stop_tokens is None else f"{f.stop_tokens[0]}–{f.stop_tokens[2]}",
                f.stop_tokens[1] if f.stop_tokens else None, f.mean_tokens, f.overran,
                f.longest_overrun, f.loops, f.undecided,
                eos.at_end_probability[1] if eos and eos.at_end_probability else None,
                eos.at_end_rank[1] if eos and eos.at_end_rank else None,
                eos.at_end_margin[1] if eos and eos.at_end_margin else None,
            )
        )  # fmt: skip
    return {
        "title": "Modes",
        "text": "Wilson's 95 % interval. Tokens until stop count the EOS. Overran: completions "
        "that went on behind a natural end, and by how many tokens at most. P(EOS), its rank and "
        "margin: at the natural end, medians; the margin is its logit over the best other "
        "token's, in nats.",
        "head": (
            "mode", "stopped", "95 % interval", "stop reasons", "tokens until stop", "median",
            "mean tokens", "overran", "by up to", "loops", "cut off early", "P(EOS)",
            "EOS rank", "EOS margin",
        ),
        "rows": rows,
    }  # fmt: skip


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _sampled_table(report: StoppingReport) -> dict[str, Any]:
    return {
        "title": "Sampled decoding",
        "text": "A prompt counts as one trial, whatever the number of its samples. Alike: how far "
        "a prompt's samples do the same (intra-class correlation).",
        "head": (
            "mode",
            "prompts",
            "samples",
            "temperature",
            "stop rate",
            "95 % interval",
            "said nothing",
            "alike",
        ),
        "rows": [
            (
                mode, len(s.counts), s.samples, s.temperature, s.rate, s.interval.shown,
                sum(s.empty), s.alike,
            )
            for mode, s in report.sampled.items()
        ],
    }  # fmt: skip


def _blame_table(report: StoppingReport) -> dict[str, Any]:
    rows = [
        (mode, e.adapter, e.weight, e.effect, e.error, e.alone, e.logit, e.largest, b.full, b.ends,
         b.ends_of)
        for mode, b in report.blame.items()
        for e in b.adapters
    ]  # fmt: skip
    return {
        "title": "Blame",
        "text": "Effect: the change of EOS's log-odds at the natural end, in nats, when the "
        "adapter is added to the others of the mode; alone: to the base. "
        + " ".join(f"{mode}: {blame.sentence}." for mode, blame in report.blame.items()),
        "head": (
            "mode", "adapter", "weight", "effect", "±", "alone", "EOS logit", "largest change",
            "mode's log-odds", "ends", "ends of",
        ),
        "rows": rows,
    }  # fmt: skip


def _sweep_table(report: StoppingReport) -> dict[str, Any]:
    sweep = report.sweep
    assert sweep is not None
    return {
        "title": "Weight sweep",
        "text": f"{sweep.prompts} prompts a row; the target is {sweep.target:.0%}.",
        "head": (
            sweep.first, sweep.second, "stopped", "95 % interval", "mean tokens", "loops",
            f"{sweep.first} retained", "meets the target",
        ),
        "rows": [
            (c.first, c.second, f"{c.stopped} of {c.total}", c.interval.shown, c.mean_tokens,
             c.loops, c.retention, "yes" if c.meets else "no")
            for c in sweep.cells
        ],
    }  # fmt: skip


def _completions_table(report: StoppingReport) -> dict[str, Any]:
    rows = []
    for mode, f in report.modes.items():
        traces: Sequence[Any] = report.traces.get(mode, ())
        for place, e in enumerate(f.endings):
            at = None
            if traces and e.natural_end is not None and e.natural_end < traces[place].tokens:
                at = traces[place].probability[e.natural_end]
            rows.append(
                (
                    e.prompt, mode, e.stop_reason.value, e.tokens, e.natural_end, e.overrun,
                    e.sign.value if e.sign else None,
                    f"period {e.loop.period} × {e.loop.rounds} {e.loop_text!r}" if e.loop else None,
                    at,
                )
            )  # fmt: skip
    return {
        "title": "Completions",
        "text": "",
        "head": (
            "prompt", "mode", "stop reason", "tokens", "natural end", "overrun", "shown by", "loop",
            "EOS probability there",
        ),
        "rows": rows,
    }  # fmt: skip


def write_stopping(report: StoppingReport, folder: Path, *, plots: Sequence[Plot] = ()) -> Path:
    """Write `stopping.json`, `report.md`, `report.html` and the plots as a new *folder*.

    Raises:
        InputError: *folder* exists and is not empty, or cannot be written.
    """
    view = {
        "title": f"{report.subject}: {report.verdict.value}",
        "subtitle": report.source,
        "checks": [check.as_json() for check in report.checks],
        "causes": [cause.as_json() for cause in report.causes],
        "tables": tables(report),
        "notes": report.notes,
        "rows_shown": 40,
        "plots": [
            {"name": p.name, "title": p.title, "caption": p.caption, "uri": image_uri(p.svg)}
            for p in plots
        ],
    }
    with staged_folder(folder) as staged:
        text = json.dumps(as_json(report), ensure_ascii=False, indent=1, allow_nan=False)
        (staged / "stopping.json").write_text(text + "\n", encoding="utf-8")
        for name in ("md", "html"):
            rendered = render(_TEMPLATES / f"stopping.{name}.jinja", **view)
            (staged / f"report.{name}").write_text(rendered, encoding="utf-8")
        if plots:
            (staged / "plots").mkdir()
        for plot in plots:
            (staged / "plots" / f"{plot.name}.png").write_bytes(plot.png)
            (staged / "plots" / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
    return folder
