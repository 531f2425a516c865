"""The latency report says what was measured, what failed and since when, in every form."""

import dataclasses
import json
import math

import pytest

from harness.bench.judging import judge_history
from harness.report.latency import (
    LatencyReport,
    as_json,
    as_markdown,
    cell_rows,
    markers,
    write_latency,
)
from harness.report.nights import sparkline
from harness.tests.bench.conftest import cell_of, results_of  # noqa: F401  (fixtures)
from harness.verdict import Outcome


@pytest.fixture
def report(results_of, cell_of):  # noqa: F811
    nights = tuple(
        results_of(moment=f"2026-01-0{n}", commit={"id": f"{n}" * 40}, verdict="held")
        for n in range(1, 7)
    )
    slow = cell_of("stacked-live-b1-i16-o4", scale=1.25,
                   device_states=({"throttle": ["power cap"]},))  # fmt: skip
    hostile = "`|<img src=x onerror=alert(1)>"
    new = results_of(
        cell_of("base-b1-i16-o4"), slow, cell_of("stacked-merged-b1-i16-o4"), in_turn=True,
        stack={"name": hostile, "random": True, "base": "random:qwen3-8b", "adapters": {}},
    )  # fmt: skip
    verdicts, changes = judge_history(nights, new)
    return LatencyReport(
        results=new, verdicts=tuple(verdicts), changes=tuple(changes), history=nights
    )


def test_a_failure_shows_in_json_markdown_and_html(report, tmp_path):
    assert report.outcome is Outcome.FAILED
    folder = write_latency(report, tmp_path / "out")
    page = (folder / "report.html").read_text()
    for text in (json.dumps(as_json(report)), as_markdown(report), page):
        assert "stacked-live-b1-i16-o4 ttft" in text
        assert "went bad in 666666666666.." in text
        assert "RANDOM WEIGHTS" in text
        assert "power cap" in text
    assert "<img src=x" not in page
    assert {file.name for file in folder.iterdir()} == {
        "report.json", "report.md", "report.html", "latency-by-mode.png", "share-of-ceiling.png",
        "overhead.png", "history.png",
    }  # fmt: skip


def test_what_could_not_have_been_seen_is_said_beside_what_passed(report, tmp_path):
    floors = {c.samples.metric: math.expm1(c.samples.floor) for c in report.changes}
    told = f"A change below {floors['ttft_s']:.0%} (TTFT), {floors['tpot_s']:.0%} (TPOT), "
    assert told in report.counts
    assert report.counts.endswith("could not be told from noise.")
    assert told in (write_latency(report, tmp_path / "out") / "report.html").read_text()
    blind = [
        dataclasses.replace(c, samples=dataclasses.replace(c.samples, floor=math.inf))
        for c in report.changes
    ]
    assert "any (TTFT)" in dataclasses.replace(report, changes=tuple(blind)).counts


def test_shares_are_the_roofline_over_what_was_measured(report):
    row = next(r for r in cell_rows(report.results) if r["cell"] == "base, batch 1")
    # 1e6 bytes at 1e10 a second are 0.1 ms, 1e9 FLOP at 1e11 are 10 ms; measured: 0.1 s.
    assert row["decode_share"] == pytest.approx(1e-4 / 0.1)
    assert row["prefill_share"] == pytest.approx(1e-2 / 0.1)


def test_overhead_is_told_against_the_base_and_the_merged_mode(report):
    rows = {(r["application"], r["against"]): r["tpot"] for r in as_json(report)["overhead"]}
    assert rows["live", "base"][0] == pytest.approx(1.25)
    assert rows["live", "merged"][0] == pytest.approx(1.25)
    assert rows["merged", "base"] == pytest.approx([1, 1, 1])


def test_without_a_gpu_and_without_ceilings_the_report_says_so(results_of):  # noqa: F811
    bare = dataclasses.replace(results_of(), ceilings={})
    assert any("nothing about a GPU" in line for line in markers(bare))
    assert all(row["decode_share"] is None for row in cell_rows(bare))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▅"),
        ([1.0, 2.0], "▁█"),
        ([1.0, float("nan"), 2.0], "▁ █"),
    ],
)
def test_a_sparkline_shows_the_range(values, expected):
    assert sparkline(values) == expected


def test_a_tenth_of_a_percent_is_no_mountain():
    assert set(sparkline([1.0, 1.001, 0.999])) <= set("▄▅")
