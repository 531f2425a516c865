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


def test_what_is_to_be_installed_for_more_can_be_installed():
    """Every extra that is named anywhere is one; the histogram's is what it cannot be
    drawn without."""
    import re
    import tomllib

    root = DOCS.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    files = [root / "README.md", *DOCS.glob("*.md"), *(root / "harness").rglob("*.py")]
    named = {
        extra
        for file in files
        for extra in re.findall(r"lora-stack-harness\[([a-z]+)\]", file.read_text(encoding="utf-8"))
    }
    assert {"plots", "gpu", "histogram"} <= named <= set(extras)
    assert any("pytest-benchmark[histogram]" in need for need in extras["histogram"])
