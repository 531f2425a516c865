"""An analysis does not write into what it reads."""

import pytest

from harness.cli import main


@pytest.mark.parametrize("output", ["", "report", "deep/report"])
def test_a_report_inside_the_adapter_is_refused_before_any_work(tiny, capsys, output):
    style = tiny.adapters["style"]
    before = sorted(style.rglob("*"))
    assert main(["analyze", str(style), "--output", str(style / output)]) == 2
    assert main(["compare", *map(str, tiny.adapters.values()), "--output", str(style / "x")]) == 2
    assert "lies inside an input" in capsys.readouterr().err
    assert sorted(style.rglob("*")) == before
