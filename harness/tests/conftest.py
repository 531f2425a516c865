"""Tiny stacks on disk for the harness' own tests. torch is imported when a test asks for it."""

import os
from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # a borrowed machine may lack it: see the upper conftest
    from hypothesis import HealthCheck, settings

    # A busy machine is no fault of what is tested; and a gate judges the commit, not the draw: its
    # examples are the same in every run. `HYPOTHESIS_PROFILE=search` draws others each time.
    settings.register_profile(
        "gate", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("search", settings.get_profile("gate"), derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.fixture(scope="session", autouse=True)
def _no_terminal():
    """What is said is as wide and as plain here as anywhere, whatever the shell or CI sets."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR_FORCE",
                     "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # fmt: skip
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What is remembered between runs lies apart from the user's, and starts empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Where no snapshot is accepted, and what is reviewed goes to the job's own page.
        for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Qwen3 base and two adapters on disk (`TinyStack`). Not to be written to."""
    from harness.testing.tiny import tiny_stack

    return tiny_stack(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny):
    """The tiny stack, loaded."""
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with load_engine(resolve_stack(adapters=tiny.adapters), device="cpu") as engine:
        yield engine


@pytest.fixture
def adapter_copy(tiny, tmp_path):
    """A copy of the tiny style adapter to break: `adapter_copy()` gives its folder."""
    import json
    import shutil

    def copy(name="broken", **config):
        folder = tmp_path / name
        shutil.copytree(tiny.adapters["style"], folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return copy
