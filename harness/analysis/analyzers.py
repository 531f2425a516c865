"""The programming interface: one class for adapters, one front over all results, three functions.

Each call returns values; reports go to a new folder under the analyzer's own and never over
another run's. Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.comparison import ComparisonFigures
from harness.analysis.figures import AdapterFigures
from harness.analysis.running import analyze, compare, draw
from harness.analysis.writing import Section, write_report
from harness.errors import InputError
from harness.staging import new_run_folder

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
        plots: draw them, where matplotlib is there.
        options: as `harness.analysis.running.analyze` (`name`, `base_model`, `exact_entries`,
            `intruders`, `keep_going`).

    Raises:
        InputError: a broken adapter, named by file and tensor; a taken *output_dir*.
    """
    figures = analyze(path, **options)
    if output_dir is not None:
        write_report(figures, Path(output_dir), plots=(draw(figures) or ()) if plots else ())
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
        write_report(figures, Path(output_dir), plots=(draw(figures) or ()) if plots else ())
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
        output: Source | None = None,
        **options: Any,
    ) -> MergeReport:
        """Merge into *output*, by default a new folder under `output_dir`."""
        target = new_run_folder(self.output_dir) if output is None else Path(output)
        return merge_lora_adapters(base_model, adapters, target, **options)

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
        return write_report(
            chosen,
            new_run_folder(self.output_dir),
            plots=(draw(chosen) or ()) if plots else (),
        )


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
        output: Source | None = None,
        **options: Any,
    ) -> MergeReport:
        """As the function; how it went becomes part of the report."""
        report = self._analyzer.merge_adapters(base_model, adapters, output, **options)
        lines = [line.removeprefix("- ") for line in report.summary()]
        rows = (
            ("output", report.output),
            ("strategy", report.strategy),
            ("dtype", report.dtype),
            ("bytes written", report.bytes_written),
            *(("result", line) for line in (*lines, *report.notes)),
        )
        self._sections.append(Section(title="Merge", text="", head=("what", "value"), rows=rows))
        return report

    def add_mode_outputs(self, completions: Mapping[str, Iterable[Completion]]) -> None:
        """Put what each mode said, by mode, into the report."""
        rows = tuple(
            (mode, c.prompt.id, c.text, c.stop_reason.value, len(c.token_ids))
            for mode, said in completions.items()
            for c in said
        )
        self._sections.append(
            Section(
                title="What each mode says",
                text="",
                head=("mode", "prompt", "completion", "stopped by", "tokens"),
                rows=rows,
            )
        )

    def add_latency(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """Put latency figures into the report: a row each, `{"stacked": {"ttft_ms": 31.0}}`."""
        columns = tuple(dict.fromkeys(key for row in results.values() for key in row))
        rows = tuple((name, *(row.get(key) for key in columns)) for name, row in results.items())
        self._sections.append(Section(title="Latency", text="", head=("what", *columns), rows=rows))

    def generate_report(self, *, plots: bool = True) -> Path:
        """Write one report over the widest analysis and all else that was gathered.

        A comparison holds its adapters' own figures, so the last comparison stands for them;
        without one, the last single analysis does. Returns the new folder.

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
        return write_report(
            chosen,
            new_run_folder(self.output_dir),
            plots=(draw(chosen) or ()) if plots else (),
            sections=self._sections,
        )
