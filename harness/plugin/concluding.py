"""The end of a test: its verdict travels with its report, and what it compared is left for review.

Knows nothing of how the verdicts are summed up.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from harness.display.terminal import shown
from harness.errors import InputError
from harness.plugin.accepted import ACCEPTED, Judged
from harness.plugin.summary import case_of, outcome_of, properties_of

__all__ = ["pytest_assertrepr_compare", "pytest_runtest_makereport"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    # User properties travel to JUnit, and from xdist's workers to the controller's summary.
    if call.when == "call" and (parameters := case_of(item)):
        item.user_properties.extend(parameters.items())
        judged = _concluded(item)
        if not any(name == "lora_verdict" for name, _ in item.user_properties):
            item.user_properties.append(("lora_verdict", outcome_of(call, judged).value))
        item.user_properties.extend(properties_of(judged))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(
    op: str, left: object, right: object
) -> Generator[None, list[Any], list[Any]]:
    """A snapshot that could not be written is a line; syrupy would show where it was raised."""
    explained = yield
    for side in (left, right):
        results = getattr(side, "executions", None)
        last = list(results.values())[-1] if isinstance(results, dict) and results else None
        if isinstance(error := getattr(last, "exception", None), InputError):
            return [[f"completion {op} snapshot", *shown(str(error)).split("\n")]]
    return explained


def _concluded(item: pytest.Item) -> list[Judged]:
    """The test's comparisons with snapshots, each recorded for review."""
    snapshot = getattr(item, "funcargs", {}).get("lora_snapshot")
    accepted = item.config.stash.get(ACCEPTED, None)
    if snapshot is None or accepted is None:
        return []
    return accepted.conclude(snapshot.executions)
