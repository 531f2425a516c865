"""Stored results: one file, or a folder of nights, oldest first. Knows nothing of judging."""

from __future__ import annotations

from pathlib import Path

from harness.bench.results import Results, read_results
from harness.errors import InputError
from harness.files.file_kinds import is_folder

__all__ = ["read_history"]


def read_history(path: Path) -> list[Results]:
    """The results in *path*: a file, a folder written by `lora-stack bench --output`, or a folder
    of such files and folders. In the order in which they were measured.

    Raises:
        InputError: nothing there, or a file that is broken: a history is not to shrink in silence.
    """
    if not is_folder(path):
        return [read_results(path)]
    own = path / "report.json"
    files = [own] if own.is_file() else sorted([*path.glob("*.json"), *path.glob("*/report.json")])
    if not files:
        raise InputError(
            "holds no results", where=path, remedy="give a file of results, or a folder of them"
        )
    return sorted((read_results(file) for file in files), key=lambda night: night.moment)
