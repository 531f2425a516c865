"""Accepted completions: their stored form, how two compare, and the syrupy extension.

One TOML file a case, in which the text is what a person reviews; the token ids decide. syrupy
holds the assertion and `--snapshot-update`. Knows nothing of engines or of pytest's options.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
from syrupy.data import SnapshotCollection, SnapshotCollections
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from harness.completion import Completion, GenerationSettings, StopReason
from harness.errors import InputError
from harness.staging import write_text
from harness.terminal import shown
from harness.textdiff import word_diff_line

__all__ = [
    "Snapshot",
    "SnapshotExtension",
    "differences",
    "read_snapshot",
    "snapshot_extension",
    "snapshot_name",
    "snapshot_of",
    "write_form",
]

_HEAD = (
    "# An accepted completion. The tokens decide; `pytest --snapshot-update` accepts a new one.\n"
)
_FORM = 1
_SUFFIX = "toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An accepted completion and the conditions it was made under.

    Attributes:
        made_with: provenance that does not decide (versions, device, dtype, adapters' digests).
    """

    prompt: str
    prompt_text: str
    mode: str
    application: str
    text: str
    stop_reason: StopReason
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    settings: Mapping[str, Any]
    made_with: Mapping[str, Any]


def snapshot_name(preset: str, prompt: str, mode: str) -> str:
    """The file name of a case, without suffix: slugs joined by double hyphens.

    A part that is no slug gets a digest of itself, so that no two cases share a file.
    """
    return "--".join(_slug(part) for part in (preset, prompt, mode))


def _slug(text: str) -> str:
    slug = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "x"
    if slug == text:
        return slug
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def snapshot_of(completion: Completion, made_with: Mapping[str, Any]) -> Snapshot:
    """The snapshot that accepting *completion* would store."""
    return Snapshot(
        prompt=completion.prompt.id,
        prompt_text=completion.prompt.shown,
        mode=completion.mode,
        application=completion.application.value,
        text=completion.text,
        stop_reason=completion.stop_reason,
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=completion.token_ids,
        settings=_settings(completion.settings),
        made_with=dict(made_with),
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


def write_form(snapshot: Snapshot) -> str:
    """The stored form of *snapshot*."""
    return _HEAD + tomli_w.dumps(
        {
            "form": _FORM,
            "prompt": snapshot.prompt,
            **_stored_text("prompt_text", snapshot.prompt_text),
            "mode": snapshot.mode,
            "stop_reason": snapshot.stop_reason.value,
            **_stored_text("text", snapshot.text),
            "tokens": {
                # One line each: a diff shows that they changed, and no more of it.
                "prompt": " ".join(map(str, snapshot.prompt_token_ids)),
                "completion": " ".join(map(str, snapshot.token_ids)),
            },
            "settings": dict(snapshot.settings),
            "made_with": {"application": snapshot.application, **snapshot.made_with},
        },
        multiline_strings=True,
    )


def read_snapshot(form: str, *, where: Path | str) -> Snapshot:
    """Read a stored form.

    Raises:
        InputError: not TOML (merge-conflict markers included), or a field is absent or malformed.
    """
    remedy = "restore the file from version control, or accept anew with --snapshot-update"

    def refuse(fault: str) -> InputError:
        return InputError(fault, where=where, remedy=remedy)

    for number, line in enumerate(form.split("\n"), 1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            raise refuse(f"line {number}: a merge-conflict marker")
    try:
        raw = tomllib.loads(form)
    except tomllib.TOMLDecodeError as error:
        raise refuse(f"is not valid TOML: {error}") from error
    if raw.get("form") != _FORM:
        raise refuse(f"has form {raw.get('form')!r}, this version reads {_FORM}")
    try:
        made_with = dict(raw["made_with"])
        return Snapshot(
            prompt=_text(raw["prompt"]),
            prompt_text=_read_text(raw, "prompt_text"),
            mode=_text(raw["mode"]),
            application=_text(made_with.pop("application")),
            text=_read_text(raw, "text"),
            stop_reason=StopReason(raw["stop_reason"]),
            prompt_token_ids=_ids(raw["tokens"]["prompt"]),
            token_ids=_ids(raw["tokens"]["completion"]),
            settings=dict(raw["settings"]),
            made_with=made_with,
        )
    except KeyError as error:
        raise refuse(f"the field {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise refuse(f"a field is malformed: {error}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _stored_text(key: str, text: str) -> dict[str, str]:
    """TOML has no half of a surrogate pair, and its readers turn `\\r\\n` into `\\n`; such a text
    is stored in JSON's escapes."""
    if "\r" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return {f"{key}_json": json.dumps(text)}
    return {key: text}


def _read_text(raw: Mapping[str, Any], key: str) -> str:
    escaped = raw.get(f"{key}_json")
    return _text(raw[key] if escaped is None else json.loads(_text(escaped)))


def _ids(value: object) -> tuple[int, ...]:
    ids = tuple(int(part) for part in _text(value).split())
    if any(token < 0 for token in ids):
        raise ValueError("a token id is negative")
    return ids


def differences(accepted: Snapshot, fresh: Snapshot) -> tuple[str, ...]:
    """Lines of evidence that *fresh* is not what was accepted; empty if it is.

    What was made under other conditions (prompt tokens, settings, mode) is said to be so first;
    then the first differing token, the stop reason, and the text as a word diff.
    """
    lines: list[str] = []
    if accepted.prompt_token_ids != fresh.prompt_token_ids:
        lines.append(
            "incomparable: the prompt's token ids differ "
            f"({len(accepted.prompt_token_ids)} accepted, {len(fresh.prompt_token_ids)} now); "
            "the prompt, tokenizer or chat template changed"
        )
    for key in sorted({*accepted.settings, *fresh.settings}):
        then, now = accepted.settings.get(key), fresh.settings.get(key)
        if then != now:
            lines.append(f"incomparable: the setting {key} was {then!r}, is {now!r}")
    if accepted.mode != fresh.mode:
        lines.append(f"incomparable: the mode was {accepted.mode!r}, is {fresh.mode!r}")
    if accepted.token_ids == fresh.token_ids and accepted.stop_reason == fresh.stop_reason:
        return tuple(lines)
    first = next(
        (
            place
            for place, (then, now) in enumerate(
                zip(accepted.token_ids, fresh.token_ids, strict=False)
            )
            if then != now
        ),
        min(len(accepted.token_ids), len(fresh.token_ids)),
    )
    lines.append(
        f"token {first + 1} is the first that differs: "
        f"{_token(accepted.token_ids, first)} accepted, {_token(fresh.token_ids, first)} now"
    )
    lines.append(
        f"stop reason: {accepted.stop_reason} after {len(accepted.token_ids)} tokens accepted, "
        f"{fresh.stop_reason} after {len(fresh.token_ids)} now"
    )
    for key in sorted({*accepted.made_with, *fresh.made_with}):
        then, now = accepted.made_with.get(key), fresh.made_with.get(key)
        if then != now:
            lines.append(f"{key}: {then} accepted, {now} now")
    if accepted.text != fresh.text:
        lines += ["text:", *shown(word_diff_line(accepted.text, fresh.text)).split("\n")]
    else:
        lines.append("the text is the same")
    return tuple(lines)


def _token(ids: tuple[int, ...], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "the end"


class SnapshotExtension(SingleFileSnapshotExtension):
    """syrupy's store for completions: `<root>/<test module>/<case>.toml`, one file a case.

    Made for a root and a provenance by `snapshot_extension`. syrupy's own search for unused
    snapshots is off: with `-k` or `-m` it would count deselected cases as unused, and
    `--snapshot-update` would delete them.
    """

    _write_mode = WriteMode.TEXT
    file_extension = _SUFFIX
    root: Path = Path("snapshots")
    made_with: Mapping[str, Any] = {}

    def serialize(self, data: Any, **_: Any) -> str:
        if not isinstance(data, Completion):
            raise TypeError(f"a completion snapshot holds a Completion, not {type(data).__name__}")
        return write_form(snapshot_of(data, self.made_with))

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return not self._lines(serialized_data, snapshot_data)

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        yield from self._lines(serialized_data, snapshot_data)

    def _lines(self, serialized_data: Any, snapshot_data: Any) -> tuple[str, ...]:
        fresh = read_snapshot(str(serialized_data), where="the completion")
        try:
            accepted = read_snapshot(str(snapshot_data), where="the snapshot")
        except InputError as error:
            return (f"unreadable: {error}",)
        return differences(accepted, fresh)

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
            write_text(Path(snapshot_location), str(data))

    def read_snapshot_data_from_location(self, *, snapshot_location: str, **_: Any) -> str | None:
        try:
            return Path(snapshot_location).read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def discover_snapshots(self, **_: Any) -> SnapshotCollections:
        return SnapshotCollections()

    def read_snapshot_collection(self, *, snapshot_location: str) -> SnapshotCollection:
        return SnapshotCollection(location=snapshot_location)


def snapshot_extension(root: Path, made_with: Mapping[str, Any]) -> type[SnapshotExtension]:
    """The extension for a snapshots folder, stamping *made_with* into what it writes."""
    return type(
        "CompletionSnapshotExtension",
        (SnapshotExtension,),
        {"root": root, "made_with": dict(made_with)},
    )
