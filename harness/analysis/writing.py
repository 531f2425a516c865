"""Figures as `analysis.json`, `report.md` and a self-contained `report.html`.

The JSON's keys keep their order and hold no NaN; its schema is in docs/analysis.md. Names in
adapters are foreign text, which `harness.display.page` escapes. Knows nothing of how the figures
came about.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.comparison import AdapterPair, ComparisonFigures
from harness.analysis.comparison_findings import comparison_findings
from harness.analysis.figures import AdapterFigures
from harness.analysis.findings import Finding, adapter_findings, listed
from harness.analysis.sections import Section
from harness.display.page import cell, image_uri, render
from harness.display.plain_values import plain
from harness.files.staging import staged_folder

if TYPE_CHECKING:
    from harness.display.drawing import Plot

__all__ = [
    "JSON_NAME",
    "SCHEMA",
    "as_json",
    "findings_of",
    "summary_table",
    "write_report",
]

SCHEMA = "lora-stack-analysis/1"
JSON_NAME = "analysis.json"
_TEMPLATES = Path(__file__).parent / "templates"
#: Rows of a table that the Markdown shows; the JSON and HTML hold all.
_MARKDOWN_ROWS = 40

Figures = AdapterFigures | ComparisonFigures


def findings_of(figures: Figures) -> list[Finding]:
    """The findings of an analysis or a comparison."""
    if isinstance(figures, ComparisonFigures):
        return comparison_findings(figures)
    return adapter_findings(figures)


def as_json(
    figures: Figures, *, plots: Sequence[Plot] = (), sections: Sequence[Section] = ()
) -> dict[str, Any]:
    """Everything as plain values in a stable order; what is not finite is None."""
    adapters = figures.adapters if isinstance(figures, ComparisonFigures) else (figures,)
    payload: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "comparison" if isinstance(figures, ComparisonFigures) else "analysis",
        "findings": [
            {"level": f.level.value, "text": f.text, "modules": list(f.modules)}
            for f in findings_of(figures)
        ],
        "adapters": [_adapter(adapter) for adapter in adapters],
        "pairs": [],
        "strategies": [],
        "layer_strategies": {},
    }
    if isinstance(figures, ComparisonFigures):
        payload["pairs"] = [dataclasses.asdict(pair) for pair in figures.pairs]
        payload["strategies"] = [dataclasses.asdict(s) for s in figures.strategies]
        payload["layer_strategies"] = {
            layer: [dataclasses.asdict(s) for s in strategies]
            for layer, strategies in figures.layer_strategies.items()
        }
    payload["sections"] = [dataclasses.asdict(section) for section in sections]
    payload["plots"] = [{"name": p.name, "title": p.title, "caption": p.caption} for p in plots]
    values: dict[str, Any] = plain(payload)
    return values


def _adapter(figures: AdapterFigures) -> dict[str, Any]:
    return {
        "name": figures.name,
        "source": figures.source,
        "base": figures.base,
        "notes": list(figures.notes),
        "faults": [str(fault) for fault in figures.faults],
        "total": dataclasses.asdict(figures.total),
        "kinds": [dataclasses.asdict(group) for group in figures.kinds],
        "layers": [dataclasses.asdict(group) for group in figures.layers],
        "modules": [
            dataclasses.asdict(module) | {"outlier_score": figures.scores.get(module.module)}
            for module in figures.modules
        ],
    }


def write_report(
    figures: Figures,
    folder: Path,
    *,
    plots: Sequence[Plot] = (),
    sections: Sequence[Section] = (),
    title: str | None = None,
) -> Path:
    """Write the report as a new *folder*, whole or not at all; returns the folder.

    The plots go beside it as `plots/<name>.png` and `.svg`, and inline into the HTML.

    Raises:
        InputError: *folder* exists and is not empty, or cannot be written.
    """
    payload = as_json(figures, plots=plots, sections=sections)
    view = _view(figures, payload, plots, sections, title)
    with staged_folder(folder) as staged:
        text = json.dumps(payload, ensure_ascii=False, indent=1, allow_nan=False)
        (staged / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        for name in ("report.md", "report.html"):
            rendered = render(_TEMPLATES / f"{name}.jinja", **view)
            (staged / name).write_text(rendered, encoding="utf-8")
        if plots:
            (staged / "plots").mkdir()
        for plot in plots:
            (staged / "plots" / f"{plot.name}.png").write_bytes(plot.png)
            (staged / "plots" / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
    return folder


def _view(
    figures: Figures,
    payload: Mapping[str, Any],
    plots: Sequence[Plot],
    sections: Sequence[Section],
    title: str | None,
) -> dict[str, Any]:
    comparison = isinstance(figures, ComparisonFigures)
    names = [adapter["name"] for adapter in payload["adapters"]]
    return {
        "title": title or listed(names),
        "subtitle": "LoRA adapters compared" if comparison else "What is in a LoRA adapter",
        "adapters": payload["adapters"],
        "findings": payload["findings"],
        "tables": [*_tables(figures), *(_section_table(section) for section in sections)],
        "plots": [
            {
                "name": plot.name,
                "title": plot.title,
                "caption": plot.caption,
                "uri": image_uri(plot.svg),
            }
            for plot in plots
        ],
        "rows_shown": _MARKDOWN_ROWS,
    }


def _section_table(section: Section) -> dict[str, Any]:
    return {
        "title": section.title, "text": section.text, "head": section.head, "rows": section.rows,
    }  # fmt: skip


_GROUP_COLUMNS = {
    "modules": "modules", "parameters": "parameters", "norm_delta": "‖ΔW‖", "rms": "rms ΔW",
    "max_spectral_norm": "largest σ₁", "mean_stable_rank": "stable rank",
    "mean_effective_rank": "effective rank", "rank_wasted_share": "rank wasted",
    "dead_ranks": "dead ranks", "relative_norm": "‖ΔW‖/‖W‖",
}  # fmt: skip
_MODULE_COLUMNS = {
    "module": "module", "rank": "r", "scale": "s", "norm_a": "‖A‖", "norm_b": "‖B‖",
    "norm_delta": "‖ΔW‖", "rms": "rms ΔW", "spectral_norm": "σ₁", "stable_rank": "stable rank",
    "effective_rank": "effective rank", "rank_99": "rank for 99\u00a0%", "dead_ranks": "dead ranks",
    "relative_norm": "‖ΔW‖/‖W‖", "intruders": "intruders",
}  # fmt: skip
_PAIR_COLUMNS = {
    "norm_ratio": "norm ratio", "cosine": "cosine", "cosine_by_chance": "by chance ±",
    "column_overlap": "output overlap", "column_overlap_by_chance": "by chance",
    "row_overlap": "input overlap", "row_overlap_by_chance": "by chance",
    "sign_conflict": "sign conflict", "interference": "interference",
    "interference_by_chance": "by chance",
}  # fmt: skip


def _tables(figures: Figures) -> list[dict[str, Any]]:
    if isinstance(figures, AdapterFigures):
        return _adapter_tables(figures)
    totals = _table(
        "The adapters", "", "adapter", _GROUP_COLUMNS, [a.total for a in figures.adapters]
    )
    pairs = [table for pair in figures.pairs for table in _pair_tables(pair)]
    alone = [table for a in figures.adapters for table in _adapter_tables(a)[-1:]]
    return [totals, _strategy_table(figures), *pairs, *alone]


def summary_table(figures: Figures) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and rows, as text, of the one table to see in a terminal."""
    rows: list[tuple[str, ...]] = []
    if isinstance(figures, ComparisonFigures):
        columns = {
            "norm_ratio": "norm ratio", "cosine": "cosine", "cosine_by_chance": "chance ±",
            "column_overlap": "outputs", "row_overlap": "inputs", "interference": "interf.",
        }  # fmt: skip
        for pair in figures.pairs:
            for group in (pair.total, *pair.kinds) if pair.total else ():
                name = f"{pair.first} / {pair.second}" if group is pair.total else group.name
                rows.append((name, *(cell(getattr(group, field), 3) for field in columns)))
        return ("modules", *columns.values()), rows
    columns = {
        "norm_delta": "‖ΔW‖", "rms": "rms ΔW", "max_spectral_norm": "max σ₁",
        "mean_effective_rank": "eff. rank", "rank_wasted_share": "wasted",
        "parameters": "parameters",
    }  # fmt: skip
    if figures.total.relative_norm is not None:
        columns["relative_norm"] = "‖ΔW‖/‖W‖"
    rows += [
        (whole.name, *(cell(getattr(whole, field), 3) for field in columns))
        for whole in (figures.total, *figures.kinds)
    ]
    return ("modules", *columns.values()), rows


def _adapter_tables(figures: AdapterFigures) -> list[dict[str, Any]]:
    name = figures.name
    groups = [
        _table(f"{name}: whole and by module type", "", "type", _GROUP_COLUMNS,
               [figures.total, *figures.kinds]),
        _table(f"{name}: by layer", "", "layer", _GROUP_COLUMNS, figures.layers),
    ]  # fmt: skip
    return [*groups, _table(f"{name}: by module", "", None, _MODULE_COLUMNS, figures.modules)]


def _pair_tables(pair: AdapterPair) -> list[dict[str, Any]]:
    if pair.total is None:
        return []
    title = f"{pair.first} and {pair.second}"
    return [
        _table(f"{title}: whole and by module type", "", "type", _PAIR_COLUMNS,
               [pair.total, *pair.kinds]),
        _table(f"{title}: by layer", "", "layer", _PAIR_COLUMNS, pair.layers),
        _table(f"{title}: by module", "", None, {"module": "module"} | _PAIR_COLUMNS,
               pair.modules),
    ]  # fmt: skip


def _table(
    title: str, text: str, name: str | None, columns: Mapping[str, str], items: Sequence[Any]
) -> dict[str, Any]:
    """One row an item; a column that no item has a value for is left out."""
    fields = {"name": name, **columns} if name else dict(columns)
    used = {f: label for f, label in fields.items()
            if any(getattr(item, f) is not None for item in items)}  # fmt: skip
    rows = [tuple(getattr(item, field) for field in used) for item in items]
    return {"title": title, "text": text, "head": tuple(used.values()), "rows": rows}


def _strategy_table(figures: ComparisonFigures) -> dict[str, Any]:
    head = ["strategy", "what it does", "distance from the sum", "‖merged‖/‖sum‖"]
    head += [f"{name} retained" for name in figures.names]
    rows = [
        (
            f"{s.strategy} (sampled)" if s.sampled else s.strategy,
            s.what,
            s.distance,
            s.norm_ratio,
            *s.retained.values(),
        )
        for s in figures.strategies
    ]
    return {
        "title": "What each merge strategy would do",
        "text": "The plain sum is what the live stack applies. Retained is the energy of the "
        "merged ΔW along an adapter's own, relative to that adapter's.",
        "head": tuple(head),
        "rows": rows,
    }
