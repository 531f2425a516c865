"""What a pytest session tests: command line over ini, resolved once, when first asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.display.terminal import shown
from harness.options import (
    BENCH_OPTIONS,
    EMPTY,
    PROMPT_OPTIONS,
    RUN_OPTIONS,
    STACK_OPTIONS,
    Option,
    random_ranks,
    stack_options,
)
from harness.preset import Preset, choose_preset
from harness.resolve import StackOptions, stack_from_options
from harness.stack import AdapterStack

__all__ = [
    "DEST",
    "OPTIONS",
    "SETTING",
    "Setting",
    "case_name",
    "ini_name",
    "read_setting",
    "snapshots_folder",
]

#: What every option's destination starts with: pytest's namespace is shared by all plugins.
DEST = "lora_stack_"
OPTIONS = STACK_OPTIONS + PROMPT_OPTIONS + RUN_OPTIONS + BENCH_OPTIONS


@dataclass(kw_only=True)
class Setting:
    """What this session tests; resolved once, when first asked for.

    Attributes:
        modes_chosen: the command line names a stack or modes, which may not be all there are
            snapshots of.
    """

    options: StackOptions
    folder: Path
    values: Mapping[str, Any]
    asked_for: bool
    drift_fails: bool = True
    modes_chosen: bool = False
    _stack: AdapterStack | None = None
    _preset: Preset | None = None
    _stopping_preset: Preset | None = None

    @property
    def stack(self) -> AdapterStack:
        if self._stack is None:
            self._stack = stack_from_options(
                self.options,
                folder=self.folder,
                random_base=True,
                random_ranks=random_ranks(self.values.get("random_rank")),
            )
        return self._stack

    @property
    def preset(self) -> Preset:
        if self._preset is None:
            self._preset = self._choose(self.stack.preset)
        return self._preset

    @property
    def stopping_preset(self) -> Preset:
        """What stopping is judged on: the preset that is asked for, else the stack's for that."""
        if self._stopping_preset is None:
            self._stopping_preset = self._choose(self.stack.stopping_preset or self.stack.preset)
        return self._stopping_preset

    def _choose(self, standing: str | None) -> Preset:
        file = self.values.get("prompts")
        return choose_preset(
            self.values.get("preset"),
            self.folder / file if file else None,
            standing=standing,
            max_new_tokens=self.values.get("max_new_tokens"),
            batch_size=self.values.get("batch_size"),
        )


SETTING = pytest.StashKey[Setting]()


def ini_name(option: Option) -> str:
    """`--base-model` is `lora_base_model`; `--lora-model` stays `lora_model`."""
    name = option.flag.removeprefix("--").replace("-", "_")
    return name if name.startswith("lora_") else f"lora_{name}"


def read_setting(config: pytest.Config) -> Setting:
    given = {o.dest: config.getoption(DEST + o.dest) for o in OPTIONS}
    for option in OPTIONS:
        value = given[option.dest]
        if value == "" or (isinstance(value, list) and "" in value):
            raise pytest.UsageError(f"{option.flag}: {EMPTY}")
    standing = {o.dest: config.getini(ini_name(o)) or None for o in OPTIONS}
    stack_names = [o.dest for o in STACK_OPTIONS if o.dest not in ("modes", "lock_file")]
    from_command_line = any(given[name] for name in stack_names)
    source = given if from_command_line else standing
    values = {name: standing[name] if value is None else value for name, value in given.items()}
    for name in ("max_new_tokens", "batch_size"):
        values[name] = _count(values[name], name)
    modes = tuple(values["modes"] or ())
    general = {name: values[name] for name in ("lock_file", "trust_remote_code")}
    options = stack_options(SimpleNamespace(**{**source, "modes": modes, **general}))
    return Setting(
        options=options,
        folder=config.invocation_params.dir if from_command_line else config.rootpath,
        values=values,
        asked_for=options.named or bool(modes) or any(given.values()),
        drift_fails=_drift_fails(config),
        modes_chosen=from_command_line or bool(given["modes"]),
    )


def case_name(setting: Setting, prompt: str, mode: str) -> str:
    """The file name, without suffix, of a prompt's snapshot in a mode."""
    from harness.snapshot import snapshot_name

    return snapshot_name(setting.preset.name, prompt, mode)


def snapshots_folder(config: pytest.Config) -> tuple[Path, Path]:
    """The folder of accepted completions, and the profile's in it (the same without a profile).

    Raises:
        UsageError: a profile that is no plain name, or a folder outside of the root folder.
    """
    profile, ini = config.getoption(DEST + "profile"), config.getini("lora_snapshots")
    if profile is not None and not re.fullmatch(r"\w[\w.-]*", profile):
        raise pytest.UsageError(
            f"--snapshot-profile: {shown(profile)!r} is no plain name → use letters and digits"
        )
    folder = config.rootpath / ini
    if ".." in folder.parts or not folder.is_relative_to(config.rootpath):
        raise pytest.UsageError(
            f"lora_snapshots: {shown(ini)!r} is outside of {config.rootpath} → name a folder in it"
        )
    return folder, folder / profile if profile else folder


def _drift_fails(config: pytest.Config) -> bool:
    chosen = config.getoption(DEST + "drift") or config.getini("lora_drift")
    if chosen not in ("fail", "warn"):
        raise pytest.UsageError(f"lora_drift: {chosen!r} is neither fail nor warn")
    return bool(chosen == "fail")


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise pytest.UsageError(f"--{name.replace('_', '-')}: {value!r} is not 1 or more")
    return number
