"""A base's tokenizer and generation settings, held against each other and the embedding's rows.

transformers builds a tokenizer out of several files: a token that one names and another lacks gets
the next free id, or moves those after it, without a word. Knows nothing of weights or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError, gathering, quoted
from harness.files.config_fields import FieldReader
from harness.files.file_kinds import is_there
from harness.files.strict_json import MAX_CONFIG_BYTES, read_json_object

__all__ = ["READ_FILES", "check_tokenizer", "embedding_rows", "has_tokenizer"]

_AGAIN = "copy the tokenizer that belongs to this base"
_TRUST = "remove it; or pass --trust-remote-code if you trust this folder"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
#: Classes that take tokenizer.json as it is; the others are built anew from its vocabulary.
_WHOLE = ("PreTrainedTokenizerFast", "TokenizersBackend")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
#: Templates in this folder have names; transformers prefers one called so to chat_template.jinja.
_OTHER_TEMPLATE = Path("additional_chat_templates", "default.jinja")
#: Gemma's tokenizer.json has 33 MB.
_MAX_TOKENIZER_BYTES = 64 * 1024 * 1024

_JSON = ("tokenizer.json", _CONFIG, "generation_config.json", "special_tokens_map.json", _ADDED)
#: Everything that the verdict depends on, relative to the folder.
READ_FILES = (*_JSON, *_TOKENIZER_FILES[1:], str(_OTHER_TEMPLATE))

_Files = Mapping[str, dict[str, Any] | None]


def check_tokenizer(
    folder: Path,
    rows: int | None,
    faults: list[InputError],
    *,
    trust_remote_code: bool,
    required: bool = True,
) -> None:
    """Hold tokenizer and generation settings against each other, and against the *rows* of the
    embedding if they are known.

    Args:
        required: whether a folder without a tokenizer is a fault.
    """
    files = {name: _optional(folder / name, faults) for name in _JSON}
    if required and not has_tokenizer(folder):
        faults.append(
            InputError(
                f"holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)})",
                where=folder,
                remedy="copy the base's tokenizer files beside its weights",
            )
        )
    if files["tokenizer.json"] is not None:
        _check_ids(files, rows, folder, faults)
    read = FieldReader(files[_CONFIG] or {}, folder / _CONFIG)
    if read.raw.get("auto_map") and not trust_remote_code:
        read.fault("auto_map", "the tokenizer needs Python code from its own folder", _TRUST)
    if others := read.raw.get("fast_tokenizer_files"):
        fault = f"{quoted(others)} would be read instead of tokenizer.json"
        read.fault("fast_tokenizer_files", fault, "remove it, and keep tokenizer.json")
    faults += read.faults
    if is_there(folder / _OTHER_TEMPLATE):
        faults.append(
            InputError(
                "would be used instead of the folder's own chat template",
                where=folder / _OTHER_TEMPLATE,
                remedy="move it to chat_template.jinja if it is the right one, or remove it",
            )
        )
    if files["generation_config.json"] is not None:
        _check_generation(files["generation_config.json"], rows, folder, faults)


def has_tokenizer(folder: Path) -> bool:
    """Whether *folder* holds a tokenizer of any kind."""
    return any(is_there(folder / name) for name in _TOKENIZER_FILES)


def _optional(path: Path, faults: list[InputError]) -> dict[str, Any] | None:
    limit = _MAX_TOKENIZER_BYTES if path.name == "tokenizer.json" else MAX_CONFIG_BYTES
    if is_there(path):
        with gathering(faults):
            return read_json_object(path, what=path.name, limit=limit)
    return None


def embedding_rows(checkpoint: CheckpointFiles) -> int | None:
    """How many token ids the base's embedding has; None where its name is not a usual one."""
    names = [name for name in checkpoint.places if name.endswith("embed_tokens.weight")]
    if len(names) != 1:
        return None
    return checkpoint.entry(names[0]).shape[0] if checkpoint.entry(names[0]).shape else None


def _check_ids(files: _Files, rows: int | None, folder: Path, faults: list[InputError]) -> None:
    """Every token has one id in all files, and the embedding has a row for it."""
    tokenizer = FieldReader(files["tokenizer.json"] or {}, folder / "tokenizer.json")
    ids, added = _token_ids(tokenizer)
    if not tokenizer.faults:
        highest = max(ids.values())
        if rows is not None and highest >= rows:
            fault = f"gives the id {highest}, the embedding has {rows} rows"
            tokenizer.fault("model", fault, _AGAIN)
        else:
            _check_added(files, ids, added, rows, folder, faults)
    faults += tokenizer.faults


def _token_ids(read: FieldReader) -> tuple[dict[str, int], set[str]]:
    """The ids of `tokenizer.json` by token, and which of them its model's vocabulary lacks."""
    model, added = read.raw.get("model"), read.raw.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # pairs of a token and its score
        words = (str(entry[0]) if isinstance(entry, list) and entry else "" for entry in vocabulary)
        ids: dict[str, Any] = {word: number for number, word in enumerate(words)}
    else:
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if not ids:
        read.fault("model", "holds no vocab", _AGAIN)
        return {}, set()
    owners: dict[Any, str] = {}
    for token, number in ids.items():
        if type(number) is int and owners.setdefault(number, token) != token:
            fault = f"vocab gives the id {number} to {quoted(owners[number])} and {quoted(token)}"
            read.fault("model", fault, _AGAIN)
    tokens = added if isinstance(added, list) else []
    if tokens is not added or not all(isinstance(token, dict) for token in tokens):
        read.fault("added_tokens", "is no list of tokens", _AGAIN)
    later = {str(t.get("content")): t.get("id") for t in tokens if isinstance(t, dict)}
    only_added = set(later) - set(ids)
    ids |= later
    if not all(type(number) is int and number >= 0 for number in ids.values()):
        read.fault("model", "vocab has ids that are no ids", _AGAIN)
    return ids, only_added


def _check_added(
    files: _Files,
    ids: dict[str, int],
    added: set[str],
    rows: int | None,
    folder: Path,
    faults: list[InputError],
) -> None:
    """Tokens that other files than tokenizer.json name: the same ids, or the next free ones."""
    settings = files[_CONFIG] or {}
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        read = FieldReader(settings, folder / _CONFIG)
        named = {text: number for number, token in decoder.items() for text in _texts(token)}
        lost = sorted(added - set(named))
        if lost and settings.get("tokenizer_class") not in _WHOLE:
            fault = f"leaves out {quoted(lost[0])}, to which tokenizer.json gives {ids[lost[0]]}"
            read.fault("added_tokens_decoder", fault, _AGAIN)
    else:
        read = FieldReader({}, folder / _ADDED)
        named = {token: str(number) for token, number in (files[_ADDED] or {}).items()}
    highest = max(ids.values())
    for token, number in sorted(named.items(), key=lambda item: (len(item[1]), item[1])):
        if token not in ids:
            highest += 1
        expected = ids.setdefault(token, highest)
        if number != str(expected):
            fault = f"{quoted(token)} has the id {number}, and by tokenizer.json {expected}"
            read.fault("added_tokens_decoder" if decoder else "ids", fault, _AGAIN)
    faults += read.faults
    special = [v for k, v in settings.items() if k.endswith("_token") or k in _TOKEN_LISTS]
    if decoder is None:
        special.append(files["special_tokens_map.json"])
    new = sorted(set(_texts(special)) - set(ids))
    highest += len(new)
    if rows is not None and highest >= rows and not read.faults:
        last = new[-1] if new else max(ids, key=ids.__getitem__)
        faults.append(
            InputError(
                f"{quoted(last)} would get the id {highest}, the embedding has {rows} rows",
                where=read.path if not new else folder / _CONFIG,
                remedy="name tokens that tokenizer.json holds, or " + _AGAIN,
            )
        )


def _texts(named: object) -> Iterator[str]:
    """The tokens of a setting: a text, a table with its `content`, or several of them."""
    if isinstance(named, str):
        yield named
    elif isinstance(named, dict):
        yield from _texts(named["content"] if "content" in named else [*named.values()])
    elif isinstance(named, list):
        for one in named:
            yield from _texts(one)


def _check_generation(
    settings: Mapping[str, Any], rows: int | None, folder: Path, faults: list[InputError]
) -> None:
    path = folder / "generation_config.json"
    read = FieldReader(settings, path)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and number >= 0 for number in ids):
            read.fault(key, f"{quoted(value)} is no token id", "write the id, or a list of ids")
        elif rows is not None and ids and max(ids) >= rows:
            read.fault(key, f"{max(ids)} is beyond the {rows} rows of the embedding", _AGAIN)
    for key in ("temperature", "top_p", "repetition_penalty"):
        value = settings.get(key)
        if value is not None and (type(value) not in (int, float) or value <= 0):
            read.fault(key, f"{quoted(value)} is not above 0", "write a number above 0")
    faults += read.faults
