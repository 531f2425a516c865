"""Accepted completions: taken, read back with their evidence, and the syrupy extension that keeps
them.

One file a case (`harness.snapshot_form`), and its evidence beside it (`harness.evidence`,
`harness.snapshot_files`). syrupy holds the assertion and `--snapshot-update`; how two compare is
given to it (`harness.verdict`). Knows nothing of engines or of pytest's options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from syrupy.data import SnapshotCollections
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from harness.completion import Completion, GenerationSettings
from harness.display.terminal import shown
from harness.errors import InputError
from harness.evidence import decode_evidence, encode_evidence
from harness.files.digests import combined_digest, text_digest
from harness.snapshot_files import Pair, evidence_of, read_pair, write_pair
from harness.snapshot_form import RESTORE, Snapshot, read_snapshot, write_form

__all__ = [
    "Found",
    "Snapshot",
    "SnapshotExtension",
    "StoredForm",
    "draft_tokens",
    "read_snapshot",
    "read_stored",
    "snapshot_extension",
    "snapshot_name",
    "snapshot_of",
    "stored_form",
    "write_form",
]

_SUFFIX = "toml"
_LONGEST = 64  # characters of a slug: three of them and a suffix must fit into a file name


def snapshot_name(preset: str, prompt: str, mode: str) -> str:
    """The file name of a case, without suffix: slugs joined by double hyphens.

    A part that is no slug gets a digest of itself, so that no two cases share a file.
    """
    return "--".join(_slug(part) for part in (preset, prompt, mode))


def _slug(text: str) -> str:
    slug = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "x"
    if slug == text and len(slug) <= _LONGEST:
        return slug
    slug = slug[:_LONGEST]
    return f"{slug}-{text_digest(text)[:8]}"


def snapshot_of(
    completion: Completion,
    made_with: Mapping[str, Any],
    contents: Mapping[str, str] | None = None,
) -> Snapshot:
    """The snapshot that accepting *completion* would store."""
    settings = _settings(completion.settings)
    return Snapshot(
        prompt=completion.prompt.id,
        prompt_text=completion.prompt.shown,
        mode=completion.mode,
        application=completion.application.value,
        text=completion.text,
        stop_reason=completion.stop_reason,
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=completion.token_ids,
        settings=settings,
        made_with=dict(made_with),
        contents={
            "prompt": text_digest(" ".join(map(str, completion.prompt_token_ids))),
            "settings": combined_digest({key: repr(value) for key, value in settings.items()}),
            **(contents or {}),
        },
        evidence=completion.evidence,
    )


def _settings(settings: GenerationSettings) -> dict[str, Any]:
    """Only what differs from the defaults, and always the length; TOML has no null."""
    defaults = asdict(GenerationSettings())
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(settings).items()
        if key != "batch_size"
        and value is not None
        and (value != defaults[key] or key == "max_new_tokens")
    }


class StoredForm(str):
    """A stored form, as syrupy passes it on: the text, with what belongs to it.

    Attributes:
        snapshot: what the form says; None where it cannot be read, and `fault` says why.
        evidence: the encoded evidence.
        path: where it lies; None for one that is not stored.
        sha256: of the two files there, as `Pair.sha256`; None where they could not be read.
    """

    snapshot: Snapshot | None
    fault: InputError | None
    evidence: bytes
    path: Path | None
    sha256: tuple[str, str] | None

    @classmethod
    def of(
        cls,
        text: str,
        *,
        snapshot: Snapshot | None = None,
        fault: InputError | None = None,
        evidence: bytes = b"",
        path: Path | None = None,
        sha256: tuple[str, str] | None = None,
    ) -> Self:
        form = cls(text)
        form.snapshot, form.fault, form.evidence = snapshot, fault, evidence
        form.path, form.sha256 = path, sha256
        return form


#: What lies where a snapshot would: the snapshot, nothing, or why it cannot be read.
Found = Snapshot | InputError | None


def stored_form(snapshot: Snapshot) -> StoredForm:
    """What accepting *snapshot* writes.

    Raises:
        InputError: its log-probabilities are no numbers: such a model has nothing to accept.
    """
    evidence = b""
    if snapshot.evidence is not None:
        if not snapshot.evidence.finite:
            raise InputError(
                "the model's log-probabilities are not finite: there is nothing to accept",
                where=f"{snapshot.prompt} in mode {snapshot.mode}",
                remedy="look for NaN or inf in the weights: lora-stack verify",
            )
        evidence = encode_evidence(snapshot.evidence, snapshot.token_ids)
    return StoredForm.of(write_form(snapshot), snapshot=snapshot, evidence=evidence)


def read_stored(path: Path) -> StoredForm | None:
    """The snapshot at *path* with its evidence; None when there is none.

    Never raises for what a file can hold: the form's `fault` says what is wrong, and where.
    """
    try:
        pair = read_pair(path)
    except InputError as error:
        return StoredForm.of("", fault=error, path=path)
    if pair.text is None:
        return None
    text = pair.text.decode("utf-8", "replace")
    try:
        snapshot, evidence = _joined(pair, text, path)
    except InputError as error:
        return StoredForm.of(text, fault=error, path=path, sha256=pair.sha256)
    return StoredForm.of(text, snapshot=snapshot, evidence=evidence, path=path, sha256=pair.sha256)


def _joined(pair: Pair, text: str, path: Path) -> tuple[Snapshot, bytes]:
    try:
        data = evidence_of(pair, where=path)
    except InputError:
        read_snapshot(text, where=path)  # what is wrong with the text itself says more
        raise
    # It is what was written, so a line that looks like a conflict's marker is the completion's.
    snapshot = read_snapshot(text, where=path, markers=False)
    if not data:
        return snapshot, data
    try:
        evidence = decode_evidence(data, snapshot.token_ids)
    except (ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"its evidence is damaged: {error}", where=path, remedy=RESTORE) from error
    return replace(snapshot, evidence=evidence), data


def draft_tokens(path: Path) -> tuple[int, ...] | None:
    """The accepted token ids at *path*, to be tried as a draft; None if there are none to be had.

    Whatever is wrong with the rest of the file is the verdict's to say.
    """
    try:
        return read_snapshot(path.read_bytes().decode("utf-8", "replace"), where=path).token_ids
    except (OSError, InputError):
        return None


#: Judges a fresh snapshot against what lies at a path; lines if it does not pass.
Judge = Callable[[Path, Found, Snapshot], tuple[str, ...]]


class SnapshotExtension(SingleFileSnapshotExtension):
    """syrupy's store for completions: `<root>/<test module>/<case>.toml`, one file a case.

    Made by `snapshot_extension`. syrupy's own search for unused snapshots is off: with `-k` or `-m`
    it would count deselected cases as unused, and `--snapshot-update` would delete them.
    """

    _write_mode = WriteMode.TEXT
    file_extension = _SUFFIX
    root: Path = Path("snapshots")
    taken: Callable[[Completion], Snapshot]
    judge: Judge

    def serialize(self, data: Any, **_: Any) -> str:
        if not isinstance(data, Completion):
            raise TypeError(f"a completion snapshot holds a Completion, not {type(data).__name__}")
        snapshot = type(self).taken(data)
        try:
            return stored_form(snapshot)
        except InputError as error:
            return StoredForm.of(write_form(snapshot), snapshot=snapshot, fault=error)

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return not self._lines(serialized_data, snapshot_data)

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        yield from self._lines(serialized_data, snapshot_data)

    def _lines(self, serialized_data: StoredForm, snapshot_data: str) -> tuple[str, ...]:
        assert serialized_data.snapshot is not None
        if not isinstance(snapshot_data, StoredForm):  # syrupy's empty text: nothing is accepted
            return ("missing: nothing is accepted yet; now:", shown(serialized_data.snapshot.text))
        assert snapshot_data.path is not None
        accepted = snapshot_data.fault or snapshot_data.snapshot
        return type(self).judge(snapshot_data.path, accepted, serialized_data.snapshot)

    @classmethod
    def dirname(cls, *, test_location: Any) -> str:
        return str(cls.root / test_location.basename)

    @classmethod
    def get_snapshot_name(cls, *, test_location: Any, index: Any = 0) -> str:
        if isinstance(index, str):
            return index
        return SingleFileSnapshotExtension.get_snapshot_name(
            test_location=test_location, index=index
        )

    @classmethod
    def get_file_basename(cls, *, test_location: Any, index: Any) -> str:
        return cls.get_snapshot_name(test_location=test_location, index=index)

    @classmethod
    def write_snapshot(cls, *, snapshot_location: str, snapshots: Any, **_: Any) -> None:
        for data, _location, _index in snapshots:
            if data.fault is not None:
                raise data.fault
            write_pair(Path(snapshot_location), str(data).encode("utf-8"), data.evidence)

    def read_snapshot_data_from_location(
        self, *, snapshot_location: str, **_: Any
    ) -> StoredForm | None:
        return read_stored(Path(snapshot_location))

    def discover_snapshots(self, **_: Any) -> SnapshotCollections:
        return SnapshotCollections()


def snapshot_extension(
    root: Path, taken: Callable[[Completion], Snapshot], judge: Judge
) -> type[SnapshotExtension]:
    """The extension for a snapshots folder.

    Args:
        taken: makes the snapshot of a completion, stamping it with its provenance.
        judge: compares it with what is accepted.
    """
    return type(
        "CompletionSnapshotExtension",
        (SnapshotExtension,),
        {"root": root, "taken": staticmethod(taken), "judge": staticmethod(judge)},
    )
