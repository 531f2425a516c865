"""Accepted snapshots that no test asks for any more: found after a session, named, never deleted.

What was collected counts, before `-k`, `-m` and `--deselect` take tests away, and nothing is said
where it cannot be known: a part of a module, another preset, modes of another stack. Knows nothing
of what snapshots hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.embedded import embedded_folder
from harness.errors import InputError
from harness.plugin.setting import SETTING, case_name, snapshots_folder

__all__ = ["ORPHANS", "find_orphans", "remember_collected"]

#: Paths, relative to the root folder, of what no test asks for.
ORPHANS = pytest.StashKey[list[str]]()
_COLLECTED = pytest.StashKey[dict[str, set[str]]]()
_NOT_WALKED = ("node_modules", "site-packages", "__pycache__")


def remember_collected(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Keep the names of the snapshots that *items* ask for, by test module."""
    asked: dict[str, set[str]] = {}
    for item in items:
        if "lora_snapshot" in getattr(item, "fixturenames", ()):
            callspec: Any = getattr(item, "callspec", None)
            parameters = callspec.params if callspec is not None else {}
            mode, prompt = parameters.get("lora_mode"), parameters.get("lora_prompt")
            if mode is not None and prompt is not None:
                name = case_name(config.stash[SETTING], prompt.id, mode.name)
                asked.setdefault(item.path.stem, set()).add(name)
    config.stash[_COLLECTED] = asked


def find_orphans(config: pytest.Config) -> list[str]:
    """Snapshots and sidecars below the snapshots folder that no collected test asks for."""
    asked = config.stash.get(_COLLECTED, {})
    _, folder = snapshots_folder(config)
    if not asked and not any(folder.glob("*/*.evidence")):
        return []  # another project's folder of the same name, or none
    if not folder.is_dir():
        return []
    modules = _modules(config.rootpath)
    found: list[Path] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in place.iterdir() if path.suffix in (".toml", ".evidence"))
        count = modules.get(place.name, 0)
        if place.name not in asked:
            if count == 0 and place.name not in _shipped():
                found += files  # its test module is gone
            continue
        # A part of a module, or one of two of the same name: the rest cannot be known.
        if count > 1 or _in_parts(config):
            continue
        found += (path for path in files if _orphaned(config, path, asked[place.name]))
    return [path.relative_to(config.rootpath).as_posix() for path in found]


def _orphaned(config: pytest.Config, path: Path, asked: set[str]) -> bool:
    if path.stem in asked:
        # A sidecar without its snapshot belongs to nobody.
        return path.suffix == ".evidence" and _is_alone(path)
    parts = path.stem.split("--")
    presets = {name.split("--")[0] for name in asked}
    modes = {name.split("--")[-1] for name in asked}
    if len(parts) != 3 or parts[0] not in presets:
        return False
    return parts[2] in modes or not config.stash[SETTING].modes_chosen


def _is_alone(sidecar: Path) -> bool:
    """Whether there is no snapshot; waits for a session that is about to put it there."""
    from harness.snapshot_files import read_pair

    snapshot = sidecar.with_suffix(".toml")
    try:
        return not snapshot.exists() and read_pair(snapshot).text is None
    except InputError:  # something is there, and cannot be read
        return False


def _in_parts(config: pytest.Config) -> bool:
    """Whether some of a module's tests were never collected."""
    named = any("::" in argument or "[" in argument for argument in config.args)
    return named or bool(config.getoption("lf", False))


def _shipped() -> set[str]:
    """The test modules that come with the harness; they lie outside of a user's root folder."""
    return {path.stem for path in (embedded_folder().parent / "suites").glob("test_*.py")}


def _modules(root: Path) -> dict[str, int]:
    """How many Python files of each name lie below *root*, without hidden and foreign folders."""
    counts: dict[str, int] = {}
    for name in _python_files(root):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _python_files(root: Path) -> Iterator[str]:
    for _, folders, files in os.walk(root):
        folders[:] = _walked(folders, files)
        for file in files:
            stem, dot, suffix = file.rpartition(".")
            if dot and suffix == "py":
                yield stem


def _walked(folders: Sequence[str], files: Sequence[str]) -> list[str]:
    if "pyvenv.cfg" in files:
        return []
    return [name for name in folders if not name.startswith(".") and name not in _NOT_WALKED]
