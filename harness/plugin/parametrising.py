"""What a test is multiplied by: modes, pairs of modes, prompts and cells of the stack under test.

Only what a test asks for by a fixture's name is looked up. Knows nothing of what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from harness.completion import Prompt
from harness.display.terminal import shown
from harness.errors import InputError
from harness.plugin.latency import chosen_cells
from harness.plugin.setting import SETTING
from harness.stack import AdapterStack, Mode

__all__ = [
    "lora_declared_mode",
    "lora_mode",
    "lora_mode_pair",
    "lora_prompt",
    "pytest_generate_tests",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    ours = {"lora_mode", "lora_prompt", "lora_mode_pair", "lora_declared_mode",
            "lora_cell"}  # fmt: skip
    if not ours.intersection(names):
        return
    setting = metafunc.config.stash[SETTING]
    try:
        stack, preset = setting.stack, setting.preset
    except InputError as error:
        raise pytest.UsageError(shown(str(error))) from None
    if "lora_cell" in names:
        try:
            cells = chosen_cells(setting)
        except InputError as error:
            raise pytest.UsageError(shown(str(error))) from None
        _parametrize(metafunc, "lora_cell", [(cell.key, cell) for cell in cells])
    if "lora_mode" in names:
        _parametrize(metafunc, "lora_mode", [(m.name, m) for m in stack.modes])
    if "lora_declared_mode" in names:
        declared = [(m.name, m) for m in stack.modes if m.name in stack.stops]
        _parametrize(metafunc, "lora_declared_mode", declared)
    if "lora_mode_pair" in names:
        pairs = [(f"{a.name}-{b.name}", (a, b)) for a, b in _pairs(stack)]
        _parametrize(metafunc, "lora_mode_pair", pairs)
    if "lora_prompt" in names:
        _parametrize(metafunc, "lora_prompt", [(p.id, p) for p in preset.prompts])


def _parametrize(metafunc: pytest.Metafunc, name: str, cases: Sequence[tuple[str, Any]]) -> None:
    metafunc.parametrize(
        name,
        [value for _, value in cases],
        ids=[label for label, _ in cases],
        indirect=True,
        scope="function" if name == "lora_prompt" else "session",
    )


def _pairs(stack: AdapterStack) -> list[tuple[Mode, Mode]]:
    """Modes that must differ: those where one's adapters are part of the other's."""
    return [
        (smaller, larger)
        for smaller in stack.modes
        for larger in stack.modes
        if set(smaller.adapters) < set(larger.adapters)
    ]


@pytest.fixture(scope="session")
def lora_mode(request: pytest.FixtureRequest) -> Mode:
    """Parametrised: each mode of the stack."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def lora_declared_mode(request: pytest.FixtureRequest) -> Mode:
    """Parametrised: each mode whose stopping the stack's TOML declares."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def lora_mode_pair(request: pytest.FixtureRequest) -> tuple[Mode, Mode]:
    """Parametrised: two modes, the second with all of the first's adapters and more."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def lora_prompt(request: pytest.FixtureRequest) -> Prompt:
    """Parametrised: each prompt of the preset."""
    return request.param  # type: ignore[no-any-return]
