"""Where a merge may write, what is copied beside the weights, and whether the inputs held still.

Every check here runs before the first byte is written. Knows nothing of tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME
from harness.checkpoint_files import INDEX_NAME
from harness.errors import InputError
from harness.files.file_kinds import is_folder, whole_path
from harness.files.staging import check_place

__all__ = ["Watch", "changed", "check_output", "check_space", "copy_beside", "files_beside"]

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack",
    ".index.json", ".tflite", ".npz",
)  # fmt: skip
# A README would describe the base; an adapter lying in the base folder is applied unasked by
# transformers; the others are this harness's own, of an earlier merge.
_LEFT_OUT = frozenset(
    {"README.md", CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "merge_proof.json", "merge_report.md"}
)
_SPARE = 16 << 20


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse an output that would destroy an input or somebody's files.

    Raises:
        InputError: the output lies in an input or an input in it; it is a file or a link; it
            cannot be written; it is a non-empty folder and not *force*.
    """
    check_place(output, replace=True, inputs=inputs)
    if not force and _holds_something(output):
        raise InputError(
            "is not empty", where=output, remedy="name a new folder, or pass --force to replace it"
        )


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except FileNotFoundError:  # also if it went since the last look: another merge replaces it
        return False


def check_space(output: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold; the old output stays until the new one is whole.

    Raises:
        InputError: less than *needed* bytes and some spare are free.
    """
    parent = whole_path(output, Path.cwd()).parent
    while not is_folder(parent):
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed + _SPARE:
        raise InputError(
            f"{needed + _SPARE:,} bytes are needed, {free:,} are free",
            where=parent,
            remedy="free some space, or choose another disk",
        )


def files_beside(folder: Path) -> list[Path]:
    """What belongs to a checkpoint besides its weights, relative to *folder*: configs, tokenizer,
    templates, licence, remote code. No weights, no index, no hidden files, no adapters."""
    found = []
    for root, folders, names in os.walk(folder):
        place = Path(root)
        folders[:] = sorted(name for name in folders if not _foreign(place / name))
        for name in sorted(names):
            path = place / name
            if name.startswith(".") or name.endswith(_WEIGHTS) or not path.is_file():
                continue
            if name in _LEFT_OUT and place == folder:
                continue
            found.append(path.relative_to(folder))
    return found


def _foreign(folder: Path) -> bool:
    """Folders that are no part of the checkpoint: hidden ones, adapters, other checkpoints."""
    return (
        folder.name.startswith((".", "__pycache__"))
        or folder.is_symlink()
        or (folder / CONFIG_NAME).exists()
        or (folder / "config.json").exists()
    )


def copy_beside(folder: Path, target: Path, names: Sequence[Path]) -> None:
    """Copy the files *names* of *folder* to *target*; links are followed, modes are not kept."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


class Watch:
    """Notices that an input file changed after it was first looked at; gone is changed, too."""

    def __init__(self) -> None:
        self._before: dict[Path, tuple[int, int, int] | None] = {}

    def look(self, paths: Iterable[Path]) -> None:
        """Remember how *paths* are, before they are read; what was looked at before stays."""
        for path in paths:
            self._before.setdefault(path, _state(path))

    def check(self, paths: Iterable[Path]) -> None:
        """Raises `InputError` if one of *paths* is not what it was."""
        for path in paths:
            now = _state(path)
            if now is None or now != self._before[path]:
                raise changed(path)


def changed(path: Path) -> InputError:
    """The refusal of an input that is not what was checked."""
    return InputError(
        "changed while it was being merged; nothing was kept",
        where=path,
        remedy="merge again when nobody writes to it",
    )


def _state(path: Path) -> tuple[int, int, int] | None:
    """None where it is not there; one look, since it can go between two."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
