"""The documents name every option, fixture and setting that there is."""

from pathlib import Path

import pytest

from harness.options import BENCH_OPTIONS, PROMPT_OPTIONS, RUN_OPTIONS, STACK_OPTIONS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "option", STACK_OPTIONS + PROMPT_OPTIONS + RUN_OPTIONS + BENCH_OPTIONS, ids=lambda o: o.flag
)
def test_option_is_documented(option):
    assert option.flag in (DOCS / "pytest.md").read_text(encoding="utf-8")


def test_every_fixture_is_documented():
    import harness.plugin as plugin

    text = (DOCS / "pytest.md").read_text(encoding="utf-8")
    fixtures = [name for name in vars(plugin) if name.startswith("lora_")]
    assert len(fixtures) >= 10
    assert not [name for name in fixtures if f"`{name}`" not in text]
