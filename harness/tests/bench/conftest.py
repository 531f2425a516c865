"""Results made up from numbers, and a tiny shape to measure."""

import pytest

from harness.embedded import embedded_folder
from harness.tests.values import latency_cell, latency_results


@pytest.fixture(scope="session")
def tiny_shape():
    """A `config.json` that is measured in milliseconds."""
    return embedded_folder() / "latency" / "config.json"


@pytest.fixture
def cell_of():
    return latency_cell


@pytest.fixture
def results_of():
    return latency_results
