"""What is written: JSON, Markdown and HTML, whole, safe, in a folder of its own."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.tests.analysis.dense import layered_adapter, write_adapter

PLOTS = [
    "adapters", "compared-spectra", "cosine-map", "distributions", "interference",
    "merge-strategies", "overlap-matrix",
]  # fmt: skip


def _strict(text: str) -> Any:
    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    return json.loads(text, parse_constant=refuse)


def _keys(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _keys(item)) for key, item in value.items()]
    return _keys(value[0]) if isinstance(value, list) and value else None


def test_one_adapter_gives_all_files_and_five_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis import analyze_lora_weights

    analyze_lora_weights(layered_adapter(tmp_path / "a", seed=1), output_dir=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "analysis.json", "report.md", "report.html", "plots",
    }  # fmt: skip
    names = ["heat-map", "layers", "spectra", "weight-histogram", "weight-histogram-log"]
    assert sorted(p.name for p in (tmp_path / "out/plots").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    value = _strict((tmp_path / "out/analysis.json").read_text())
    assert (value["schema"], value["kind"]) == ("lora-stack-analysis/1", "analysis")
    assert len(value["adapters"][0]["modules"]) == 6


def test_a_comparison_draws_its_plots_titled_with_the_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis.running import compare, draw

    paths = [layered_adapter(tmp_path / n, seed=i) for i, n in enumerate(("style", "instruct"))]
    plots = draw(compare(paths))
    assert plots is not None
    assert sorted(plot.name for plot in plots) == PLOTS
    for plot in plots:
        assert plot.title.startswith("style and instruct")
        assert plot.png.startswith(b"\x89PNG")
        assert plot.svg.startswith("<?xml")


def _names(value: Any) -> set[str]:
    """Every key of *value*, but those that are names of adapters or numbers."""
    if isinstance(value, list):
        return set().union(*map(_names, value))
    if not isinstance(value, dict):
        return set()
    inner = [_names(item) for key, item in value.items() if key != "retained"]
    return {key for key in value if not key.isdecimal()}.union(*inner)


def test_every_key_of_the_analysis_is_on_its_page(tmp_path: Path) -> None:
    from harness.analysis import compare_lora_adapters

    paths = [layered_adapter(tmp_path / n, seed=i) for i, n in enumerate(("style", "instruct"))]
    compare_lora_adapters(paths, output_dir=tmp_path / "out")
    names = _names(_strict((tmp_path / "out/analysis.json").read_text()))
    page = (Path(__file__).parents[3] / "docs" / "analysis.md").read_text(encoding="utf-8")
    assert len(names) > 60
    assert not {name for name in names if f"`{name}`" not in page}


@pytest.mark.slow
def test_plots_of_the_same_figures_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis.running import analyze, draw

    figures = analyze(layered_adapter(tmp_path / "a", seed=1))
    assert draw(figures) == draw(figures)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["zero", "outside the layers"])
def test_odd_adapters_can_be_drawn(tmp_path: Path, shape: str) -> None:
    pytest.importorskip("matplotlib")
    import torch

    from harness.analysis.running import analyze, compare, draw

    name = "lm_head" if shape == "outside the layers" else "model.layers.3.mlp.q_proj"
    b = torch.zeros(8, 2) if shape == "zero" else torch.randn(8, 2)
    folder = write_adapter(
        tmp_path / "$a", {f"{name}.lora_A": torch.randn(2, 8), f"{name}.lora_B": b}
    )
    assert draw(analyze(folder))
    assert draw(compare([folder, folder], names=["$x", "$y"]))


def _drawn(draw: Any, *values: Any, size: tuple[float, float] = (11, 4)) -> Any:
    """The figure that a plot's function draws, laid out."""
    from harness.display.drawing import Figure, FigureCanvasAgg

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, *values)
    figure.canvas.draw()
    return figure


def test_layers_and_directions_are_whole_numbers_also_where_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis import plots
    from harness.analysis.running import analyze, compare

    folder = layered_adapter(tmp_path / "a", seed=1, layers=1, rank=1)
    one, two = analyze(folder), compare([folder, folder], names=["x", "y"])
    figures = [_drawn(plots._layers, one), _drawn(plots._spectra, one),
               _drawn(plots._compared_spectra, two), _drawn(plots._interference, two.pairs[0]),
               _drawn(plots._adapters, two)]  # fmt: skip
    numbered = [axes for f in figures for axes in f.axes
                if axes.get_xlabel() in ("layer", "direction", "directions kept")]  # fmt: skip
    assert len(numbered) == 8
    for axes in numbered:
        low, high = axes.get_xlim()
        assert [t for t in axes.get_xticks() if low <= t <= high] == [1 if "dir" in
                axes.get_xlabel() else 0]  # fmt: skip


def test_equal_sizes_lie_below_the_upper_edge_and_an_empty_panel_says_why(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import torch

    from harness.analysis import plots
    from harness.analysis.running import analyze, compare

    a, b = torch.ones(2, 8), torch.ones(8, 2)
    tensors = {f"model.layers.{n}.mlp.up_proj.lora_{side}": value.clone()
               for n in range(2) for side, value in (("A", a), ("B", b))}  # fmt: skip
    folder = write_adapter(tmp_path / "a", tensors)
    two = compare([folder, folder], names=["x", "y"])
    panels = [_drawn(plots._layers, analyze(folder)).axes[0], _drawn(plots._adapters, two).axes[1]]
    for axes in panels:
        highest = max(max(line.get_ydata()) for line in axes.lines)
        assert axes.get_ylim()[0] == 0
        assert highest * 1.04 < axes.get_ylim()[1]
    head = write_adapter(tmp_path / "b", {"lm_head.lora_A": a, "lm_head.lora_B": b})
    empty = _drawn(plots._layers, analyze(head))
    assert [axes.texts[0].get_text() for axes in empty.axes] == ["no module lies in a layer"] * 2


@pytest.mark.parametrize("count", [2, 5, 8])
def test_the_numbers_of_an_overlap_matrix_stay_in_their_cells(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis import plots
    from harness.analysis.running import compare

    paths = [layered_adapter(tmp_path / str(i), seed=i, layers=2) for i in range(count)]
    size = (11, 1.4 + 0.9 * count)
    figure = _drawn(plots._overlap_matrix, compare(paths), size=size)
    for axes in figure.axes:
        left, right = (axes.transData.transform((x, 0))[0] for x in (-0.5, 0.5))
        assert len(axes.texts) == count**2
        assert max(text.get_window_extent().width for text in axes.texts) < right - left


def test_a_name_in_another_script_is_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("matplotlib")
    from harness.analysis.running import analyze, draw

    folder = layered_adapter(tmp_path / "a", seed=1, layers=1)
    plots = draw(analyze(folder, name="数学"))
    assert plots is not None
    assert plots[0].title == "Weights of 数学"
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_intruders_are_a_column_where_they_were_looked_for(tiny: Any, tmp_path: Path) -> None:
    from harness.analysis import analyze_lora_weights

    folder = tiny.adapters["style"]
    for count, there in ((0, False), (2, True)):
        analyze_lora_weights(
            folder, base_model=tiny.base, intruders=count, output_dir=tmp_path / str(count),
            plots=False,
        )  # fmt: skip
        assert ("| intruders |" in (tmp_path / str(count) / "report.md").read_text()) is there


def test_keys_keep_their_order_and_nothing_is_nan(tmp_path: Path) -> None:
    import torch

    from harness.analysis.running import compare
    from harness.analysis.writing import as_json

    name = "model.layers.0.mlp.q_proj"
    a, b = torch.ones(4, 16), torch.zeros(24, 4)
    zero = write_adapter(tmp_path / "zero", {f"{name}.lora_A": a, f"{name}.lora_B": b})
    other = layered_adapter(tmp_path / "other", seed=1)
    one, two = (as_json(compare(pair)) for pair in ([zero, other], [other, other]))
    _strict(json.dumps(one, allow_nan=False))
    assert list(one) == list(two)
    assert _keys(one["adapters"]) != []
    assert [list(pair) for pair in one["pairs"]] == [list(pair) for pair in two["pairs"]]


class _Outside(HTMLParser):
    """Collects scripts, and references that are not within the page."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [
            value
            for name, value in attrs
            if name in ("src", "href") and value and not value.startswith(("data:", "#"))
        ]


def test_the_html_is_self_contained_and_foreign_names_stay_text(tmp_path: Path) -> None:
    import torch

    from harness.analysis import analyze_lora_weights

    name = "model.layers.0.<img src=x onerror=alert(1)>|q_proj"
    folder = write_adapter(
        tmp_path / "a", {f"{name}.lora_A": torch.randn(2, 8), f"{name}.lora_B": torch.randn(8, 2)}
    )
    name = "<script>x</script>\u202e\x1b[31m"
    analyze_lora_weights(folder, name=name, output_dir=tmp_path / "out", plots=False)
    html = (tmp_path / "out/report.html").read_text()
    page = _Outside()
    page.feed(html)
    assert page.outside == []
    assert page.tags.count("script") == 1
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", html)
    markdown = (tmp_path / "out/report.md").read_text()
    for text in (html, markdown):
        assert "<script>x" not in text
        assert "\u202e" not in text
        assert "\x1b" not in text
    columns, seen = 0, 0
    for line in markdown.splitlines():
        pipes = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("| --- |"):
            columns = pipes
        elif "onerror" in line and line.startswith("|"):
            seen += 1
            assert pipes == columns
            assert "<img" not in line
    assert seen


def test_a_report_never_goes_over_another(tmp_path: Path) -> None:
    from harness.analysis import LoRAAnalyzer, analyze_lora_weights

    folder = layered_adapter(tmp_path / "a", seed=1)
    analyzer = LoRAAnalyzer(tmp_path / "runs")
    analyzer.analyze_lora_weights(folder)
    first, second = (analyzer.generate_report(plots=False) for _ in range(2))
    assert first != second
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {first.name, second.name}
    before = (first / "analysis.json").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        analyze_lora_weights(folder, output_dir=first, plots=False)
    assert (first / "analysis.json").read_bytes() == before


def test_without_matplotlib_there_are_figures_and_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.analysis import analyze_lora_weights
    from harness.analysis.running import draw

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "harness.display.drawing", raising=False)
    monkeypatch.delitem(sys.modules, "harness.analysis.plots", raising=False)
    monkeypatch.delattr("harness.analysis.plots", raising=False)
    folder = layered_adapter(tmp_path / "a", seed=1)
    with pytest.warns(UserWarning, match=r"pip install 'lora-stack-harness\[plots\]'") as said:
        figures = analyze_lora_weights(folder, output_dir=tmp_path / "out")
    # Not what the collector says meanwhile of files that other tests left open.
    (warning,) = (one for one in said if one.category is UserWarning)
    assert warning.filename == __file__
    assert draw(figures) is None
    assert not (tmp_path / "out/plots").exists()
    assert "data:image" not in (tmp_path / "out/report.html").read_text()


def test_the_unified_report_holds_analysis_merge_outputs_and_latency(tmp_path: Path) -> None:
    from harness.analysis import UnifiedAnalyzer
    from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(tmp_path / "stack")
    analyzer = UnifiedAnalyzer(tmp_path / "runs")
    with pytest.raises(InputError, match="no adapter has been analysed"):
        analyzer.generate_report()
    analyzer.analyze_lora_weights(stack.adapters["style"])
    figures = analyzer.compare_lora_adapters(stack.adapters)
    assert figures.names == ("style", "instruct")
    adapters = list(stack.adapters.values())
    merged = analyzer.merge_lora_adapters(
        stack.base, adapters, output_name="both", merge_strategy="weighted", weights=[0.7, 0.3]
    )
    assert Path(merged.output) == tmp_path / "runs" / "both"
    assert [adapter.weight for adapter in merged.adapters] == [0.7, 0.3]
    assert (tmp_path / "runs" / "both" / "config.json").is_file()
    said = Completion(
        prompt=Prompt(id="spring", text="Spring"), mode="stacked", text="blossom", token_ids=(5, 6),
        stop_reason=StopReason.EOS, application=Application.LIVE, prompt_token_ids=(1,),
        settings=GenerationSettings(),
    )  # fmt: skip
    analyzer.add_mode_outputs({"stacked": [said]})
    analyzer.add_latency({"stacked": {"ttft_ms": 31.25}})
    value = _strict((analyzer.generate_report(plots=False) / "analysis.json").read_text())
    assert value["kind"] == "comparison"
    assert [section["title"] for section in value["sections"]] == [
        "Merge", "What each mode says", "Latency",
    ]  # fmt: skip
    assert value["sections"][1]["rows"] == [["stacked", "spring", "blossom", "eos", 2]]
    assert value["sections"][2]["rows"] == [["stacked", 31.25]]


def _run(folder: Path) -> Path:
    """What `lora-stack run` writes, on the scripted engine's stack."""
    from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
    from harness.preset import Preset
    from harness.report.run import RunReport, write_run
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack
    from harness.verdict import Outcome, Verdict

    stack = tiny_stack(folder / "stack")
    prompt = Prompt(id="spring", text="Spring <b>")
    said = {
        mode: (
            Completion(
                prompt=prompt, mode=mode, text=f"{mode} says", token_ids=(5, 6),
                stop_reason=StopReason.EOS, application=Application.LIVE, prompt_token_ids=(1,),
                settings=GenerationSettings(),
            ),
        )
        for mode in ("base", "stacked")
    }  # fmt: skip
    report = RunReport(
        stack=resolve_stack(base_model=stack.base, adapters=stack.adapters),
        preset=Preset(name="one", description="", prompts=(prompt,), settings=GenerationSettings()),
        device="cpu",
        dtype="float32",
        application="live",
        completions=said,
        verdicts=(
            Verdict(name="effect: base ≠ stacked", outcome=Outcome.HELD, evidence=("1 of 1",)),
        ),
        seconds={"base": 1.0, "stacked": 2.0},
        notes=(),
    )
    return write_run(report, folder / "run")


def test_the_unified_report_reads_the_folder_of_a_run_and_a_file_of_benchmarks(
    tmp_path: Path,
) -> None:
    from harness.analysis import UnifiedAnalyzer

    paths = [layered_adapter(tmp_path / name, seed=n) for n, name in enumerate(("a", "b", "c"))]
    stats = {"median": 0.5, "mean": 0.6, "stddev": 0.1, "min": 0.4, "max": 0.9, "rounds": 5}
    cell = {"rounds": {"ttft_s": [0.1, 0.3, 0.2]}, "output_tokens_per_s": 40.0}
    (tmp_path / "bench.json").write_text(
        json.dumps(
            {
                "machine_info": {"gpu": "one GPU"},
                "datetime": "2026-01-02",
                "benchmarks": [
                    {"name": "plain", "stats": stats},
                    {"name": "ours", "stats": stats, "extra_info": {"lora": cell}},
                ],
            }
        )
    )
    analyzer = UnifiedAnalyzer(tmp_path / "runs")
    analyzer.analyze_lora_weights(paths[2])
    analyzer.compare_lora_adapters(paths[:2])
    analyzer.add_mode_outputs(_run(tmp_path))
    analyzer.add_latency(tmp_path / "bench.json")
    folder = analyzer.generate_report(plots=False)
    value = _strict((folder / "analysis.json").read_text())
    sections = {section["title"]: section for section in value["sections"]}
    assert list(sections) == ["c", "Run: held", "Modes", "What each mode says", "Latency"]
    assert sections["c"]["rows"][0][0] == "c"  # analysed, and not among those compared
    assert sections["Run: held"]["rows"] == [["effect: base ≠ stacked", "held", "1 of 1", None]]
    assert [row[0] for row in sections["Modes"]["rows"]] == ["base", "stacked"]
    assert sections["What each mode says"]["rows"][1] == [
        "stacked", "spring", "stacked says", "eos", 2,
    ]  # fmt: skip
    latency = sections["Latency"]
    assert "one GPU, 2026-01-02" in latency["text"]
    figures = [dict(zip(latency["head"], row, strict=True)) for row in latency["rows"]]
    assert figures[0]["median ms"] == 500
    assert figures[0]["first token ms"] is None
    assert (figures[1]["first token ms"], figures[1]["output tokens/s"]) == (200, 40)
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert all(title in text for title in sections), name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "has no list of objects"),
        ('{"benchmarks": []}', "holds no benchmark"),
        ('{"benchmarks": [{"name": "x"}]}', "has no stats"),
        ("[1", "JSON"),
    ],
)
def test_files_that_hold_no_results_are_refused_by_name(
    tmp_path: Path, content: str, words: str
) -> None:
    from harness.analysis import UnifiedAnalyzer

    path = tmp_path / "bench.json"
    path.write_text(content)
    analyzer = UnifiedAnalyzer(tmp_path / "runs")
    with pytest.raises(InputError, match=words) as caught:
        analyzer.add_latency(path)
    assert "bench.json" in str(caught.value)
    with pytest.raises(InputError):
        analyzer.add_mode_outputs(tmp_path / "no run here")


def test_the_functions_and_classes_come_from_one_place() -> None:
    from harness import analysis

    assert {
        "LoRAAnalyzer", "UnifiedAnalyzer", "analyze_lora_weights", "merge_lora_adapters",
        "compare_lora_adapters",
    } <= set(analysis.__all__)  # fmt: skip
    for name in analysis.__all__:
        assert callable(getattr(analysis, name))
