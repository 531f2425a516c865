"""The programming interface: one class for adapters, one front over all results, three functions.

Each call returns values; reports go to a new folder under the analyzer's own and never over
another run's. Knows nothing of the command line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.comparison import ComparisonFigures
from harness.analysis.figures import AdapterFigures
from harness.analysis.running import PLOT_HINT, analyze, compare, draw
from harness.analysis.sections import (
    Section,
    benchmark_section,
    latency_section,
    merge_section,
    outputs_section,
    run_sections,
)
from harness.analysis.writing import findings_of, summary_table, write_report
from harness.errors import InputError
from harness.files.staging import new_run_folder

if TYPE_CHECKING:
    from harness.completion import Completion
    from harness.merge import MergeReport

__all__ = [
    "LoRAAnalyzer",
    "UnifiedAnalyzer",
    "analyze_lora_weights",
    "compare_lora_adapters",
    "merge_lora_adapters",
]

Source = str | Path


def analyze_lora_weights(
    path: Source, *, output_dir: Source | None = None, plots: bool = True, **options: Any
) -> AdapterFigures:
    """The figures of one adapter, a folder or hub id; no base is needed.

    Args:
        output_dir: a new folder for the report; None writes nothing.
        plots: draw them; where matplotlib is missing, a warning says how to get it.
        options: as `harness.analysis.running.analyze` (`name`, `base_model`, `exact_entries`,
            `intruders`, `keep_going`).

    Raises:
        InputError: a broken adapter, named by file and tensor; a taken *output_dir*.
    """
    figures = analyze(path, **options)
    if output_dir is not None:
        _write(figures, Path(output_dir), plots=plots)
    return figures


def compare_lora_adapters(
    paths: Sequence[Source] | Mapping[str, Source],
    *,
    output_dir: Source | None = None,
    plots: bool = True,
    **options: Any,
) -> ComparisonFigures:
    """Two or more adapters side by side.

    Args:
        paths: folders or hub ids; a mapping names them.
        output_dir, plots: as `analyze_lora_weights`.
        options: as `harness.analysis.running.compare` (`weights`, `base_model`, …).

    Raises:
        InputError: as `analyze_lora_weights`; fewer than two; adapters of different bases.
    """
    if isinstance(paths, Mapping):
        options["names"] = list(paths)
        paths = list(paths.values())
    figures = compare(paths, **options)
    if output_dir is not None:
        _write(figures, Path(output_dir), plots=plots)
    return figures


def merge_lora_adapters(
    base_model: Source,
    adapters: Sequence[Source] | Mapping[str, Source],
    output: Source,
    *,
    merge_strategy: str = "sequential",
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    **options: Any,
) -> MergeReport:
    """`harness.merge.merge_lora_adapters`, here so that it can be had beside the analysis."""
    from harness.merge import merge_lora_adapters as merge

    return merge(
        base_model,
        adapters,
        output,
        merge_strategy=merge_strategy,
        weights=weights,
        dtype=dtype,
        **options,
    )


def _write(
    figures: AdapterFigures | ComparisonFigures,
    folder: Path,
    *,
    plots: bool,
    sections: Sequence[Section] = (),
) -> Path:
    """The report with its plots, or with a warning where they cannot be drawn."""
    drawn = draw(figures) if plots else ()
    if drawn is None:
        warnings.warn(PLOT_HINT, stacklevel=3)
    return write_report(figures, folder, plots=drawn or (), sections=sections)


class LoRAAnalyzer:
    """Analysis, comparison and merging with one output folder.

    Args:
        output_dir: where reports and merged checkpoints go, each in a new folder of its own.
    """

    def __init__(self, output_dir: Source = "runs") -> None:
        self.output_dir = Path(output_dir)
        self._last: AdapterFigures | ComparisonFigures | None = None

    def analyze_lora_weights(self, path: Source, **options: Any) -> AdapterFigures:
        """As the function; remembered for `generate_report`."""
        figures = analyze_lora_weights(path, **options)
        self._last = figures
        return figures

    def compare_adapters(
        self, paths: Sequence[Source] | Mapping[str, Source], **options: Any
    ) -> ComparisonFigures:
        """As `compare_lora_adapters`; remembered for `generate_report`."""
        figures = compare_lora_adapters(paths, **options)
        self._last = figures
        return figures

    def merge_adapters(
        self,
        base_model: Source,
        adapters: Sequence[Source] | Mapping[str, Source],
        output_name: Source | None = None,
        merge_strategy: str = "sequential",
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> MergeReport:
        """Merge into a new folder *output_name* under `output_dir`; by default named by the time.

        An absolute path is taken as it is. *options* are those of `merge_lora_adapters`.
        """
        target = (
            new_run_folder(self.output_dir)
            if output_name is None
            else self.output_dir / Path(output_name)
        )
        return merge_lora_adapters(
            base_model, adapters, target, merge_strategy=merge_strategy, weights=weights, **options
        )

    def generate_report(
        self, figures: AdapterFigures | ComparisonFigures | None = None, *, plots: bool = True
    ) -> Path:
        """Write the report of *figures*, by default the last ones, to a new folder; returns it.

        Raises:
            InputError: nothing has been analysed yet.
        """
        chosen = self._last if figures is None else figures
        if chosen is None:
            raise InputError(
                "there is nothing to report yet",
                where="generate_report",
                remedy="call analyze_lora_weights or compare_adapters first",
            )
        return _write(chosen, new_run_folder(self.output_dir), plots=plots)


class UnifiedAnalyzer:
    """One front for analysis, merging, mode outputs and latency, and one report over all.

    Args:
        output_dir: where the reports and merged checkpoints go, each in a new folder.
    """

    def __init__(self, output_dir: Source = "runs") -> None:
        self._analyzer = LoRAAnalyzer(output_dir)
        self._figures: list[AdapterFigures | ComparisonFigures] = []
        self._sections: list[Section] = []

    @property
    def output_dir(self) -> Path:
        return self._analyzer.output_dir

    def analyze_lora_weights(self, path: Source, **options: Any) -> AdapterFigures:
        """As the function; becomes part of the report."""
        figures = self._analyzer.analyze_lora_weights(path, **options)
        self._figures.append(figures)
        return figures

    def compare_lora_adapters(
        self, paths: Sequence[Source] | Mapping[str, Source], **options: Any
    ) -> ComparisonFigures:
        """As the function; becomes part of the report."""
        figures = self._analyzer.compare_adapters(paths, **options)
        self._figures.append(figures)
        return figures

    def merge_lora_adapters(
        self,
        base_model: Source,
        adapters: Sequence[Source] | Mapping[str, Source],
        output_name: Source | None = None,
        merge_strategy: str = "sequential",
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> MergeReport:
        """As `LoRAAnalyzer.merge_adapters`; how it went becomes part of the report."""
        report = self._analyzer.merge_adapters(
            base_model, adapters, output_name, merge_strategy, weights, **options
        )
        self._sections.append(merge_section(report))
        return report

    def add_mode_outputs(self, outputs: Mapping[str, Iterable[Completion]] | Source) -> None:
        """Put what each mode said into the report.

        Args:
            outputs: completions by mode; or the folder of a `lora-stack run`, whose verdicts and
                modes come along.

        Raises:
            InputError: no report of a run there.
        """
        if isinstance(outputs, Mapping):
            self._sections.append(outputs_section(outputs))
        else:
            self._sections.extend(run_sections(Path(outputs)))

    def add_latency(self, results: Mapping[str, Mapping[str, float]] | Source) -> None:
        """Put latency figures into the report.

        Args:
            results: a row each, `{"stacked": {"ttft_ms": 31.0}}`; or a file of `lora-stack bench`
                or of `pytest --benchmark-json`.

        Raises:
            InputError: no results there.
        """
        if isinstance(results, Mapping):
            self._sections.append(latency_section(results))
        else:
            self._sections.append(benchmark_section(Path(results)))

    def generate_report(self, *, plots: bool = True) -> Path:
        """Write one report over all that was gathered; returns the new folder.

        The last comparison leads, with its plots, and holds its adapters' own figures; without
        one, the last single analysis does. Whatever else was analysed has a table of its own.

        Raises:
            InputError: no adapter has been analysed or compared yet.
        """
        if not self._figures:
            raise InputError(
                "no adapter has been analysed yet",
                where="generate_report",
                remedy="call analyze_lora_weights or compare_lora_adapters first",
            )
        comparisons = [f for f in self._figures if isinstance(f, ComparisonFigures)]
        chosen = comparisons[-1] if comparisons else self._figures[-1]
        sections = [*_others(self._figures, chosen), *self._sections]
        return _write(chosen, new_run_folder(self.output_dir), plots=plots, sections=sections)


def _others(
    gathered: Sequence[AdapterFigures | ComparisonFigures],
    chosen: AdapterFigures | ComparisonFigures,
) -> list[Section]:
    """A table for each analysis that the *chosen* one does not hold, the latest of a source."""

    def sources(figures: AdapterFigures | ComparisonFigures) -> tuple[str, ...]:
        adapters = figures.adapters if isinstance(figures, ComparisonFigures) else (figures,)
        return tuple(adapter.source for adapter in adapters)

    latest = {sources(figures): figures for figures in gathered}
    shown = sources(chosen)
    sections = []
    for names, figures in latest.items():
        if names == shown or (len(names) == 1 and names[0] in shown):
            continue
        head, rows = summary_table(figures)
        title = " and ".join(
            adapter.name
            for adapter in (
                figures.adapters if isinstance(figures, ComparisonFigures) else (figures,)
            )
        )
        text = " ".join(finding.text for finding in findings_of(figures))
        sections.append(
            Section(title=title, text=text, head=tuple(head), rows=tuple(map(tuple, rows)))
        )
    return sections
