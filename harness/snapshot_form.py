"""A snapshot and its text: one TOML file, in which the text is what a person reviews and the token
ids decide.

What is written is read back exactly, whatever a model says. Knows nothing of evidence's form, of
where the file lies, or of who compares.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from harness.completion import StopReason
from harness.errors import InputError
from harness.evidence import Evidence

__all__ = ["RESTORE", "Snapshot", "read_snapshot", "write_form"]

#: The remedy for a file that cannot be read.
RESTORE = "restore the file from version control, or accept anew with --snapshot-update"
_HEAD = (
    "# An accepted completion. The tokens decide; `pytest --snapshot-update` accepts a new one.\n"
    "# What the model thought of each token lies beside it, in the .evidence file.\n"
)
_FORM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An accepted completion and the conditions it was made under.

    Attributes:
        made_with: provenance: the base's name and architecture, the mode's composition, device,
            dtype, versions.
        contents: SHA-256 (hex) of what it was made from: `base`, `adapter_<name>`, `tokenizer`,
            `template`, `settings`, `prompt` (its token ids).
        evidence: of each token; None where the engine gives none. Not compared by `==`.
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
    contents: Mapping[str, str] = field(default_factory=dict)
    evidence: Evidence | None = field(default=None, compare=False, repr=False)


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
            "sha256": dict(snapshot.contents),
        },
        multiline_strings=True,
    )


def read_snapshot(form: str, *, where: Path | str, markers: bool = True) -> Snapshot:
    """Read a stored form.

    Args:
        markers: refuse lines that look like those of a merge conflict.

    Raises:
        InputError: not TOML (merge-conflict markers included), or a field is absent or malformed.
    """

    def refuse(fault: str) -> InputError:
        return InputError(fault, where=where, remedy=RESTORE)

    for number, line in enumerate(form.split("\n") if markers else (), 1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ", "||||||| ")):
            raise refuse(f"line {number}: a merge-conflict marker")
    try:
        raw = tomllib.loads(form)
    except (ValueError, RecursionError) as error:
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
            contents={str(key): _text(value) for key, value in dict(raw["sha256"]).items()},
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
