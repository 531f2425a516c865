"""The folder `.pending/`: a file a compared case, and one that says what the newest run tested.

Records are written beside and renamed, under a lock, by any number of sessions. Knows nothing of
who shows them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.files.file_kinds import open_regular
from harness.files.staging import write_bytes
from harness.files.strict_json import parse_json_object
from harness.pending.form import (
    FORM,
    Record,
    case_form,
    read_details,
    read_header,
    text_field,
    text_fields,
    to_json,
)
from harness.pending.values import Case

__all__ = [
    "FOLDER",
    "Broken",
    "Records",
    "Run",
    "case_path",
    "locked",
    "read_case",
    "read_records",
    "record_case",
    "record_run",
    "stack_conditions",
]

#: Below pytest's root folder; ignored by git.
FOLDER = ".pending"
_RUN = ".run.json"
_PART = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*")
_PART_BYTES = 240
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run of the suites tested.

    Attributes:
        conditions: as in `Side.conditions`; see `stack_conditions`.
        modes: the stack's modes in their order, for whoever lists them.
        written: when it was recorded, in seconds since 1970; set by reading.
    """

    conditions: Mapping[str, str]
    modes: tuple[str, ...] = ()
    written: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A file in `.pending/` that cannot be read, and why."""

    path: Path
    fault: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """All that lies in `.pending/`, by name.

    Attributes:
        run: None where no run has been recorded.
    """

    root: Path
    run: Run | None
    cases: tuple[Record, ...]
    broken: tuple[Broken, ...]

    @property
    def pending(self) -> tuple[Record, ...]:
        """What a person still has to decide."""
        return tuple(record for record in self.cases if record.pending)


def stack_conditions(conditions: Mapping[str, str]) -> dict[str, str]:
    """Those that say which stack it is: `base`, `base_…` and `adapter_<name>`, digests all."""
    return {
        key: value
        for key, value in conditions.items()
        if key == "base" or key.startswith(("base_", "adapter_"))
    }


def record_run(root: Path, run: Run) -> None:
    """Say what the newest run tests; once a session, before its first `record_case`."""
    conditions = {str(key): str(value) for key, value in run.conditions.items()}
    form = {"form": FORM, "conditions": conditions, "modes": list(run.modes)}
    with locked(root):
        write_bytes(root / FOLDER / _RUN, to_json(form) + b"\n")


def record_case(root: Path, case: Case) -> Path:
    """Write *case* into `.pending/`, over what an earlier run said of it; returns the file.

    Held cases too: the grid is complete by them, and what was pending is no longer. Any number of
    processes may record at once. The same record again costs no write.

    Args:
        root: pytest's root folder.

    Raises:
        InputError: the name is no relative path, or the place cannot be written.
    """
    path = case_path(root, case.name)
    data = case_form(case)
    with locked(root):
        if not _lies_there(path, data):
            write_bytes(path, data)
    return path


def _lies_there(path: Path, data: bytes) -> bool:
    """Whether *data* is recorded already; if so, it counts as recorded now."""
    with contextlib.suppress(OSError):  # no file, or gone between two steps
        with open_regular(path) as file:
            same = file.read() == data
        if same:
            os.utime(path)
        return same
    return False


def case_path(root: Path, name: str) -> Path:
    """The file of the case called *name*; raises `InputError` where that is no relative path."""
    parts = name.split("/")
    if not all(_PART.fullmatch(p) and len(os.fsencode(p)) <= _PART_BYTES for p in parts):
        raise InputError(f"{name!r} is no name of a case", remedy="use slugs joined by /")
    return root / FOLDER / f"{name}.json"


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of `.pending/` alone; makes the folder, ignored by git."""
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ignore = folder / ".gitignore"
        if not ignore.exists():
            write_bytes(ignore, b"# Made by lora-stack.\n*\n")
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}", where=folder, remedy="check its permissions"
        ) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_records(root: Path) -> Records:
    """The first lines of all records; files that cannot be read are named with their fault."""
    folder = root / FOLDER
    cases: dict[str, Record] = {}  # while it is written to, a folder may list a file twice
    broken: list[Broken] = []
    run: Run | None = None
    for entry, name in _files(folder, ""):
        try:
            cases[name] = _record(entry, name)
        except FileNotFoundError:  # gone meanwhile
            continue
        except (InputError, OSError) as error:
            broken.append(_broken(Path(entry.path), error))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            run = _run(folder / _RUN)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except (InputError, OSError) as error:
            broken.append(_broken(folder / _RUN, error))
    return Records(
        root=root,
        run=run,
        cases=tuple(sorted(cases.values(), key=lambda record: record.name)),
        broken=tuple(sorted(broken, key=lambda item: item.path)),
    )


def read_case(record: Record) -> Case:
    """All that was recorded of a case.

    Raises:
        InputError: the file is broken, or was recorded anew since *record* was read.
    """
    try:
        with open_regular(record.path) as file:
            header, _, details = file.read().partition(b"\n")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=record.path) from error
    now = read_header(header, path=record.path, name=record.name, written=record.written)
    if now != record:
        raise InputError(
            "a run has recorded this case anew", where=record.name, remedy="review it again"
        )
    return read_details(details.removesuffix(b"\n"), record)


def _broken(path: Path, error: InputError | OSError) -> Broken:
    fault = error.fault if isinstance(error, InputError) else f"cannot be read: {error.strerror}"
    return Broken(path=path, fault=fault)


def _files(folder: str | Path, name: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """The files of cases, each with the name that its place gives it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{name}{entry.name}/")
            elif entry.name.endswith(".json"):
                yield entry, name + entry.name.removesuffix(".json")


def _run(path: Path) -> Run:
    with open_regular(path) as file:
        data, written = file.read(), os.fstat(file.fileno()).st_mtime
    raw = parse_json_object(data, where=path)
    conditions = raw.get("conditions")
    if raw.get("form") != FORM or not isinstance(conditions, dict):
        raise InputError("is no record of a run", where=path)
    return Run(
        conditions={key: text_field(conditions, key, path) for key in conditions},
        modes=text_fields(raw, "modes", path),
        written=written,
    )


def _record(entry: os.DirEntry[str], name: str) -> Record:
    path = Path(entry.path)
    with open_regular(path) as file:
        line = file.readline(_HEADER_BYTES)
        written = os.fstat(file.fileno()).st_mtime
    if not line.endswith(b"\n"):
        raise InputError("its first line does not end", where=path)
    return read_header(line[:-1], path=path, name=name, written=written)
