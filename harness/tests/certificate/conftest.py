"""One sound subject a session; every test gets a copy of its own."""

import pytest

from harness.tests.certificate.subject import load_live, write_stack


@pytest.fixture(scope="session")
def written_stack(tmp_path_factory):
    return write_stack(tmp_path_factory.mktemp("certified") / "stack")


@pytest.fixture(scope="session")
def pristine(written_stack):
    return load_live(written_stack)


@pytest.fixture
def subject(pristine):
    return pristine.copied()


@pytest.fixture(scope="session")
def pristine_bfloat16(written_stack):
    return load_live(written_stack, "bfloat16")


@pytest.fixture(scope="session")
def other_stack(tmp_path_factory):
    """Another base and other adapters of the same shapes."""
    return write_stack(tmp_path_factory.mktemp("other") / "stack", seed=7)
