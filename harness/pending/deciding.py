"""Decisions about recorded changes: accepting writes the snapshot, rejecting leaves it.

A decision holds for what was shown: a case recorded anew, a snapshot changed since the comparison,
or another stack than the newest run's is refused. A pending file is foreign text (it may come from
somebody's pull request), so nothing outside the snapshots folder is ever written. Knows nothing of
who decides.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.pending.files import (
    Run,
    locked,
    read_case,
    read_records,
    stack_conditions,
)
from harness.pending.form import Record, case_form
from harness.pending.values import Case
from harness.staging import write_bytes
from harness.strict_json import read_toml
from harness.verdict import Outcome

__all__ = ["Decided", "accept", "finish_acceptances", "reject", "snapshots_folder"]

_STARTED = ".accepting.json"
_AGAIN = "run the suites again, then review"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What became of a decision.

    Attributes:
        decision: `accepted` or `rejected`.
        refused: why nothing was done; None where it was.
        files: what was written.
    """

    name: str
    decision: str
    refused: str | None = None
    files: tuple[Path, ...] = ()


def accept(root: Path, records: Iterable[Record]) -> tuple[Decided, ...]:
    """Write the snapshots of *records*, each whole or not at all; refusals are in the result.

    Refused: a case recorded anew since it was read, or decided already; a snapshot file that is
    not as it was when compared; another base or adapter than the newest run's; `incomparable`
    because of another base or set of adapters; a path outside the snapshots folder.
    """
    records = tuple(records)
    with locked(root):
        run = read_records(root).run
        folder = snapshots_folder(root)
        journal = folder / _STARTED
        # Should we be killed between two files of one case, the next review ends what began. The
        # word for it lies with the snapshots: in a foreign `.pending/` it would decide for us.
        write_bytes(journal, json.dumps([record.details_sha256 for record in records]).encode())
        try:
            return tuple(_accepted(root, folder, run, record) for record in records)
        finally:
            journal.unlink(missing_ok=True)


def reject(root: Path, records: Iterable[Record]) -> tuple[Decided, ...]:
    """Leave the snapshots as they are and the changes as no longer pending."""
    with locked(root):
        return tuple(_rejected(record) for record in records)


def finish_acceptances(root: Path) -> tuple[Decided, ...]:
    """End what a killed acceptance began: snapshots of which some files, not all, were written."""
    folder = snapshots_folder(root)
    journal = folder / _STARTED
    if not journal.exists():
        return ()
    with locked(root):
        try:
            started = {str(digest) for digest in json.loads(journal.read_bytes())}
        except (OSError, ValueError, TypeError):
            started = set()
        found = read_records(root)
        begun = [
            record
            for record in found.pending
            if record.details_sha256 in started and _half_written(root, folder, record)
        ]
        done = tuple(_accepted(root, folder, found.run, record) for record in begun)
        journal.unlink(missing_ok=True)
        return done


def snapshots_folder(root: Path) -> Path:
    """The folder of snapshots below *root*: pytest's ini value `lora_snapshots`, or `snapshots`.

    Read from the project, not from a pending file: what lies there may be anybody's.
    """
    for name, section in (
        ("pytest.ini", "pytest"),
        (".pytest.ini", "pytest"),
        ("tox.ini", "pytest"),
        ("setup.cfg", "tool:pytest"),
    ):
        ini = configparser.ConfigParser(interpolation=None, strict=False)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            ini.read(root / name, encoding="utf-8")
        if ini.has_section(section):
            return root / ini.get(section, "lora_snapshots", fallback="snapshots")
    if (root / "pyproject.toml").is_file():
        tool = read_toml(root / "pyproject.toml", what="the project file").get("tool", {})
        options = tool.get("pytest", {})
        value = options.get("ini_options", options).get("lora_snapshots", "snapshots")
        return root / str(value)
    return root / "snapshots"


def _accepted(root: Path, folder: Path, run: Run | None, record: Record) -> Decided:
    try:
        files = _accept(root, folder, run, record)
    except InputError as error:
        return Decided(name=record.name, decision="accepted", refused=_reason(record, error))
    return Decided(name=record.name, decision="accepted", files=files)


def _rejected(record: Record) -> Decided:
    try:
        _undecided(record)
        write_bytes(record.path, case_form(read_case(record), decision="rejected"))
    except InputError as error:
        return Decided(name=record.name, decision="rejected", refused=_reason(record, error))
    return Decided(name=record.name, decision="rejected")


def _reason(record: Record, error: InputError) -> str:
    where = "" if error.where in (None, record.name) else f"{error.where}: "
    return f"{where}{error.fault}" + (f" → {error.remedy}" if error.remedy else "")


def _undecided(record: Record) -> None:
    if record.decision:
        raise InputError(f"is {record.decision} already", where=record.name)
    if record.outcome.passed:
        raise InputError(f"is {record.outcome}: nothing is pending", where=record.name)


def _accept(root: Path, folder: Path, run: Run | None, record: Record) -> tuple[Path, ...]:
    _undecided(record)
    case = read_case(record)
    if not case.accepting:
        raise InputError(
            "holds nothing to accept", where=case.name, remedy="pytest --snapshot-update"
        )
    _same_stack(case, run)
    files = {_place(root, folder, path, case): data for path, data in case.accepting.items()}
    for relative, path in zip(case.accepting, files, strict=True):
        present = _sha256(path)
        if present not in (case.accepted_sha256[relative], _digest(files[path])):
            raise InputError("has changed since it was compared", where=relative, remedy=_AGAIN)
    _write_all(files)
    write_bytes(record.path, case_form(case, decision="accepted"))
    return tuple(case.accepting)


def _same_stack(case: Case, run: Run | None) -> None:
    """Refuse what another stack made than the one that the newest run tested."""
    made = stack_conditions(case.now.conditions)
    if run is None:
        raise InputError("no run is recorded", where=case.name, remedy=_AGAIN)
    newest = stack_conditions(run.conditions)
    for key, value in made.items():
        if newest.get(key) != value:
            raise InputError(
                f"was made with {key} {value[:12]}, the newest run with "
                f"{newest.get(key, 'none of that name')[:18]}",
                where=case.name,
                remedy=_AGAIN,
            )
    if case.verdict.outcome is not Outcome.INCOMPARABLE or case.then is None:
        return
    then = stack_conditions(case.then.conditions)
    others = sorted(key for key in {*then, *made} if then.get(key) != made.get(key))
    if others:
        raise InputError(
            f"the snapshot was made with another stack ({', '.join(others)}): accepting it here "
            "would hide that",
            where=case.name,
            remedy="pytest --snapshot-update, if the stack is meant to be another one",
        )


def _place(root: Path, folder: Path, path: Path, case: Case) -> Path:
    """Where *path* is to be written; refuses whatever is not below the snapshots folder."""
    target = root / path
    if path.is_absolute() or ".." in path.parts or any(c in str(path) for c in "\x00\\"):
        sound = False
    else:
        sound = target.parent.resolve().is_relative_to(folder.resolve())
    if not sound or target.is_dir() or target.is_symlink():
        raise InputError(
            f"writes {str(path)!r}, which is no file below {folder.name}/",
            where=case.name,
            remedy="delete the pending file: no run of the suites writes such a thing",
        )
    if path not in case.accepted_sha256:
        raise InputError(f"does not say what {path} was", where=case.name, remedy=_AGAIN)
    return target


def _half_written(root: Path, folder: Path, record: Record) -> bool:
    """Whether some of the files that accepting *record* writes are there, and some are not."""
    try:
        case = read_case(record)
        written = [
            _sha256(_place(root, folder, path, case)) == _digest(data)
            for path, data in case.accepting.items()
        ]
    except InputError:
        return False
    return any(written)


def _write_all(files: Mapping[Path, bytes]) -> None:
    """Write all of *files* or none: staged first, then renamed; undone where one cannot be."""
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    staged: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, data in files.items():
            staged[path] = path.parent / f".staging-{secrets.token_hex(6)}"
            write_bytes(staged[path], data)
        for path in files:
            staged[path].replace(path)
            done.append(path)
    except BaseException as error:
        for path in done:
            old = before[path]
            if old is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, old)
        if isinstance(error, OSError):
            raise InputError(f"cannot be written: {error.strerror}", where=path) from error
        raise
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    try:
        return _digest(path.read_bytes())
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
