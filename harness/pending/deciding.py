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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.files.staging import write_bytes
from harness.files.strict_json import read_toml
from harness.pending.files import (
    Run,
    locked,
    read_case,
    read_records,
    stack_conditions,
)
from harness.pending.form import Record, case_form
from harness.pending.values import Case
from harness.snapshot_files import file_sha256, replace_pair, sidecar_of
from harness.verdict import Outcome

__all__ = ["Decided", "accept", "reject", "snapshots_folder"]

_AGAIN = "run the suites again, then review"
_ALIEN = "delete the pending file: no run of the suites writes such a thing"


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
    with locked(root):
        run, folder = read_records(root).run, snapshots_folder(root)
        return tuple(_accepted(root, folder, run, record) for record in records)


def reject(root: Path, records: Iterable[Record]) -> tuple[Decided, ...]:
    """Leave the snapshots as they are and the changes as no longer pending."""
    with locked(root):
        return tuple(_rejected(record) for record in records)


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
    for path in case.accepting:
        _check_place(root, folder, path, case)
    _write(root, case)
    write_bytes(record.path, case_form(case, decision="accepted"))
    return tuple(case.accepting)


def _write(root: Path, case: Case) -> None:
    """Write the snapshot and its evidence, or a snapshot without; nothing else."""
    evidence = sidecar_of(case.snapshot)
    wanted = case.accepting.get(case.snapshot)
    if wanted is None or not set(case.accepting) <= {case.snapshot, evidence}:
        raise InputError(
            "writes other files than the snapshot and its evidence", where=case.name, remedy=_ALIEN
        )
    target, text_was = root / case.snapshot, case.accepted_sha256[case.snapshot]
    if evidence in case.accepting:
        expected = text_was, case.accepted_sha256[evidence]
        as_expected = replace_pair(target, wanted, case.accepting[evidence], expected=expected)
    else:
        as_expected = _sha256(target) in (text_was, hashlib.sha256(wanted).hexdigest())
        if as_expected:
            write_bytes(target, wanted)
    if not as_expected:
        raise InputError("has changed since it was compared", where=case.snapshot, remedy=_AGAIN)


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


def _check_place(root: Path, folder: Path, path: Path, case: Case) -> None:
    """Refuse whatever is no file below the snapshots folder."""
    target = root / path
    if path.is_absolute() or ".." in path.parts or any(c in str(path) for c in "\x00\\"):
        sound = False
    else:
        sound = target.parent.resolve().is_relative_to(folder.resolve())
    if not sound or target.is_dir() or target.is_symlink():
        raise InputError(
            f"writes {str(path)!r}, which is no file below {folder.name}/",
            where=case.name,
            remedy=_ALIEN,
        )
    if path not in case.accepted_sha256:
        raise InputError(f"does not say what {path} was", where=case.name, remedy=_AGAIN)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
