"""What pages show: numbers as a person reads them, and tables that fit the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.display.page import cell
from harness.tests.analysis.dense import layered_adapter
from harness.tests.review.browser import driven


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1247.6, "1,248"), (12_345.6, "12,346"), (999.96, "1,000"), (999.4, "999"),
        (123.4, "123"),
        (0.00012345, "0.000123"), (3.14159, "3.14"), (0.0, "0"), (-54_321.0, "-54,321"),
        (1.5e12, "1.5e+12"), (1_000, "1,000"), (float("nan"), "–"), (None, "–"),
    ],
)  # fmt: skip
def test_a_number_is_shown_without_an_exponent_where_a_person_would_write_none(value, text):
    assert cell(value, 3) == text


def test_thousands_are_grouped_alike_in_a_column():
    assert [cell(value) for value in (999.94, 6467.3, 11_821.0)] == ["999.9", "6,467", "11,821"]


_OVERFLOWING = """
return { widest: Math.max(...$$('.scroll').map(box => box.scrollWidth - box.clientWidth)),
         tables: $$('table').length };
"""


@pytest.mark.slow
def test_every_column_of_an_analysis_and_of_a_comparison_is_in_sight(tmp_path: Path) -> None:
    from harness.analysis import compare_lora_adapters

    kinds = ("q_proj", "down_proj")
    paths = {
        name: layered_adapter(tmp_path / name.replace("/", "-"), seed=i, kinds=kinds)
        for i, name in enumerate(("stage1_style_injection/checkpoint-120", "stage2_instruct"))
    }
    compare_lora_adapters(paths, output_dir=tmp_path / "compared", plots=False)
    found = driven(tmp_path / "compared" / "report.html", _OVERFLOWING)
    assert found["tables"] == 8
    assert found["widest"] <= 0


@pytest.mark.slow
def test_every_column_of_the_latency_report_is_in_sight(tmp_path: Path) -> None:
    from harness.report.latency import LatencyReport, write_latency
    from harness.tests.values import latency_results
    from harness.verdict import Outcome, Verdict

    skipped = Verdict(name="latency: compared", outcome=Outcome.SKIPPED, evidence=("nothing",))
    write_latency(LatencyReport(results=latency_results(), verdicts=(skipped,)), tmp_path / "bench")
    found = driven(tmp_path / "bench" / "report.html", _OVERFLOWING)
    assert found["tables"] == 2
    assert found["widest"] <= 0
