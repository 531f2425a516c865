"""pytest-benchmark's files, written whole or not at all.

By itself it writes over the old file in place: a kill, or a full disk, would lose both. Where a
stack is asked for, its two ways of saving (`--benchmark-json`, and `--benchmark-save` with
`--benchmark-autosave`) go through the staging. Knows nothing of what is saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from pathlib import Path
from typing import Any

import pytest

from harness.display.terminal import shown
from harness.errors import InputError
from harness.files.staging import check_file_place, write_text

__all__ = ["UNSAVED", "check_saving", "save_whole"]

#: Why benchmarks could not be saved, as lines.
UNSAVED = pytest.StashKey[list[str]]()


def check_saving(config: pytest.Config) -> None:
    """Refuse, before any test, a `--benchmark-json` that cannot be written.

    Raises:
        InputError: a folder lies there, or the place cannot be written.
    """
    path = config.getoption("benchmark_json", None)
    if isinstance(path, Path):
        check_file_place(path)


def save_whole(config: pytest.Config) -> None:
    """Let pytest-benchmark's session, if there is one, save through the staging."""
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    from pytest_benchmark.storage.file import FileStorage

    config.stash[UNSAVED] = []
    session.save_json = functools.partial(_save_json, config, session)
    if isinstance(session.storage, FileStorage):
        session.storage.save = functools.partial(_save_into, config, session.storage)


def _save_json(config: pytest.Config, session: Any, document: dict[str, Any]) -> None:
    if _write(config, session.json, document):
        session.logger.info(f"Wrote benchmark data in: {session.json}", purple=True)


def _save_into(config: pytest.Config, storage: Any, document: dict[str, Any], save: str) -> None:
    folder = os.open(storage.get(save).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # two sessions at once would take one number
        place = storage.get(f"{storage._next_num}_{save}.json")
        saved = _write(config, place, document)
    finally:
        os.close(folder)
    if saved:
        storage.logger.info(f"Saved benchmark data in: {place}")


def _write(config: pytest.Config, path: Path, document: dict[str, Any]) -> bool:
    from pytest_benchmark.utils import safe_dumps

    try:
        write_text(path, safe_dumps(document, ensure_ascii=True, indent=4))
    except InputError as error:  # the session goes on to its summary, and fails
        config.stash[UNSAVED].append(shown(str(error)))
        return False
    return True
