"""Presets: named sets of prompts with generation settings, as TOML, JSON Lines or plain text.

Knows nothing of tokenizers: whether a prompt goes through the chat template is said by its
having messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from harness.completion import GenerationSettings, Message, Prompt
from harness.embedded import embedded_folder
from harness.errors import InputError
from harness.files.file_kinds import is_there, regular_file
from harness.files.strict_json import (
    MAX_JSON_BYTES,
    parse_json_object,
    read_small_text,
    read_toml,
)

__all__ = [
    "choose_preset",
    "DEFAULT_PRESET",
    "Preset",
    "load_preset",
    "load_prompts",
    "preset_names",
]

DEFAULT_PRESET = "elegant_style"
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PRESET_KEYS = frozenset({"description", "format", "generation", "prompts"})
_PROMPT_KEYS = frozenset({"id", "text", "messages", "system"})
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named set of prompts and the settings to complete them with."""

    name: str
    description: str
    prompts: tuple[Prompt, ...]
    settings: GenerationSettings

    def with_settings(self, **changes: Any) -> Preset:
        """A copy whose settings differ where *changes* gives a value other than None."""
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(self, settings=replace(self.settings, **given)) if given else self


def _folders() -> list[Path]:
    return [Path.cwd() / "fixtures" / "presets", embedded_folder() / "presets"]


def preset_names() -> list[str]:
    """The presets that can be named, from `./fixtures/presets` and the embedded ones."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.toml")})


def load_preset(name: str) -> Preset:
    """The preset called *name*; the working directory's wins over an embedded one.

    Raises:
        InputError: no such preset (the nearest name is offered), or a faulty file.
    """
    for folder in _folders():
        if re.fullmatch(r"[\w-]+", name) and is_there(folder / f"{name}.toml"):
            return load_prompts(folder / f"{name}.toml")
    names = preset_names()
    close = difflib.get_close_matches(name, names, n=1)
    raise InputError(
        f"unknown preset {name!r}",
        where="--preset",
        remedy=(f"did you mean {close[0]}? " if close else "")
        + f"known: {', '.join(names)}; a file of your own is given as --prompts FILE",
    )


def load_prompts(path: Path) -> Preset:
    """Read prompts from *path* by its suffix.

    `.toml` is a whole preset; `.jsonl` holds an object a line with `text` (or `prompt`) or
    `messages`, and an optional `id`; `.txt` holds a prompt a line.

    Raises:
        InputError: another suffix, no prompt, a prompt without text, an id that is no slug or
            comes twice; the line or entry is named.
    """
    readers = {".toml": _from_toml, ".jsonl": _from_jsonl, ".txt": _from_text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path.suffix or 'no suffix'} is no form of a prompt file",
            where=path,
            remedy=f"use {', '.join(readers)}",
        )
    regular_file(path, what="the prompt file", remedy="check the path given to --prompts")
    preset = reader(path)
    if not preset.prompts:
        raise InputError("holds no prompt", where=path, remedy="add at least one")
    seen: set[str] = set()
    for prompt in preset.prompts:
        if not _SLUG.fullmatch(prompt.id):
            raise InputError(
                f"the id {prompt.id!r} is no slug",
                where=path,
                remedy="use lower-case letters, digits and single hyphens: snapshots are named so",
            )
        if prompt.id in seen:
            raise InputError(
                f"two prompts have the id {prompt.id!r}", where=path, remedy="rename one"
            )
        seen.add(prompt.id)
    return preset


def _from_toml(path: Path) -> Preset:
    raw = read_toml(path, what="the preset", limit=MAX_JSON_BYTES)
    _known(raw, _PRESET_KEYS, path, "the preset")
    form = raw.get("format", "chat")
    if form not in ("chat", "text"):
        raise InputError(f'format = {form!r} is neither "chat" nor "text"', where=path)
    entries = raw.get("prompts", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError("prompts is not a list of tables", where=path, remedy="write [[prompts]]")
    return Preset(
        name=path.stem,
        description=str(raw.get("description", "")),
        prompts=tuple(
            _prompt(entry, n, path, chat=form == "chat") for n, entry in enumerate(entries, 1)
        ),
        settings=_settings(raw.get("generation", {}), path),
    )


def _from_jsonl(path: Path) -> Preset:
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        entry = parse_json_object(line.encode(), where=f"{path}: entry {number}")
        if "prompt" in entry:
            entry["text"] = entry.pop("prompt")
        prompts.append(_prompt(entry, number, path, chat="messages" in entry))
    return Preset(name=path.stem, description="", prompts=tuple(prompts),
                  settings=GenerationSettings())  # fmt: skip


def _from_text(path: Path) -> Preset:
    prompts = [
        _prompt({"text": line.strip()}, number, path, chat=True)
        for number, line in enumerate(_lines(path), 1)
        if line.strip()
    ]
    return Preset(name=path.stem, description="", prompts=tuple(prompts),
                  settings=GenerationSettings())  # fmt: skip


def _lines(path: Path) -> list[str]:
    # Not splitlines: a prompt may hold U+2028, which ends no line of a file.
    text = read_small_text(path, what="the prompt file", limit=MAX_JSON_BYTES)
    return text.replace("\r\n", "\n").split("\n")


def _prompt(entry: Mapping[str, Any], number: int, path: Path, *, chat: bool) -> Prompt:
    where = f"{path}: prompt {entry.get('id', number)}"
    _known(entry, _PROMPT_KEYS, where, "a prompt")
    text, messages = entry.get("text"), entry.get("messages")
    if (text is None) == (messages is None):
        raise InputError("needs text or messages, and only one of them", where=where)
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise InputError("its text is empty or not a string", where=where)
    identity = str(entry.get("id", f"prompt-{number}"))
    if text is not None and not chat:
        if "system" in entry:
            raise InputError('system needs format = "chat"', where=where)
        return Prompt(id=identity, text=text)
    turns = messages if messages is not None else [{"role": "user", "content": text}]
    if "system" in entry:
        turns = [{"role": "system", "content": entry["system"]}, *turns]
    return Prompt(id=identity, messages=tuple(_message(turn, where) for turn in turns))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise InputError("a message is not {role, content}", where=where)
    if turn["role"] not in _ROLES or not isinstance(turn["content"], str):
        raise InputError(
            f"a message has the role {turn['role']!r}", where=where, remedy=f"use {_ROLES}"
        )
    return Message(role=turn["role"], content=turn["content"])


def _known(raw: Mapping[str, Any], known: frozenset[str], where: Path | str, what: str) -> None:
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
            raise InputError(f"{what} has the unknown key {key!r}", where=where, remedy=remedy)


def _settings(raw: Any, path: Path) -> GenerationSettings:
    where = f"{path}: [generation]"
    if not isinstance(raw, dict):
        raise InputError("is not a table", where=where)
    defaults = GenerationSettings()
    _known(raw, frozenset(f.name for f in fields(GenerationSettings)), where, "it")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        default = getattr(defaults, key)
        if key == "stop_strings":
            sound = isinstance(value, list) and all(isinstance(s, str) and s for s in value)
            value = tuple(value) if sound else value
        elif isinstance(default, bool):
            sound = isinstance(value, bool)
        elif isinstance(default, float):
            sound = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        else:
            sound = type(value) is int and value >= (1 if key == "max_new_tokens" else 0)
        if not sound:
            raise InputError(f"{key} = {value!r}", where=where, remedy=f"default: {default!r}")
        values[key] = value
    settings = replace(defaults, **values)
    if settings.do_sample and settings.seed is None:
        raise InputError("do_sample needs a seed", where=where, remedy="add seed = 0")
    return settings


def choose_preset(
    name: str | None,
    file: str | Path | None,
    *,
    standing: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
) -> Preset:
    """The prompts in *file*, else the preset *name*, else the *standing* one, else the default.

    Raises:
        InputError: both are given; a count below 1; what `load_preset` and `load_prompts` refuse.
    """
    if name and file:
        raise InputError(
            "are both given", where="--preset and --prompts", remedy="give one of them"
        )
    for flag, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{value} is too small", where=flag, remedy="give 1 or more")
    chosen = load_prompts(Path(file)) if file else load_preset(name or standing or DEFAULT_PRESET)
    return chosen.with_settings(max_new_tokens=max_new_tokens, batch_size=batch_size)
