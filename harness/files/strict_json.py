"""JSON and TOML files, read strictly.

`json.loads` lets through duplicate keys, `NaN`, numbers beyond any float and any size; a
configuration that was meant one way and read another is the quietest fault there is. Knows
nothing of what the files mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import InputError, quoted
from harness.files.file_kinds import regular_file

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_JSON_BYTES",
    "parse_json_object",
    "read_json_object",
    "read_small_text",
    "read_toml",
]

#: The most that any JSON file may have: the largest index or header in use is a few megabytes.
MAX_JSON_BYTES = 16 * 1024 * 1024
#: The most that a configuration, a declaration or a template may have.
MAX_CONFIG_BYTES = 1024 * 1024
_MAX_DEPTH = 64
# What bounds the memory: parsed, an item takes some hundred bytes, whatever it takes in the file.
_MAX_CONTAINERS, _MAX_ITEMS = 2_000_000, 3_000_000
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(
    path: Path, *, what: str, remedy: str | None = None, limit: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """Read a JSON object from *path*, of at most *limit* bytes.

    Raises:
        InputError: missing, not a regular file, too large, not UTF-8, a byte-order mark, a syntax
            error (with line and column), a duplicate key, `NaN` or `Infinity` or a number beyond
            them, half a surrogate pair, more than 64 levels deep, or not an object.
    """
    return parse_json_object(_read(path, what=what, remedy=remedy, limit=limit), where=path)


def read_small_text(path: Path, *, what: str, limit: int = MAX_CONFIG_BYTES) -> str:
    """A UTF-8 text of at most *limit* bytes; raises `InputError` like `read_json_object`."""
    data = _read(path, what=what, remedy=None, limit=limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 (byte {error.start})", where=path, remedy="write it anew as UTF-8"
        ) from error


def _read(path: Path, *, what: str, remedy: str | None, limit: int) -> bytes:
    regular_file(path, what=what, remedy=remedy)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
            if len(data) > limit:
                size = os.fstat(file.fileno()).st_size
                raise InputError(
                    f"{size} bytes is no {what}; at most {limit} are read",
                    where=path,
                    remedy=remedy or "copy or save it again",
                )
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
    return data


def parse_json_object(data: bytes, *, where: Path | str) -> dict[str, Any]:
    """Parse *data* as one strict JSON object; raises `InputError` like `read_json_object`."""

    def refuse(fault: str) -> NoReturn:
        raise InputError(fault, where=where, remedy="write it anew as plain UTF-8 JSON")

    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS or data.count(b",") > _MAX_ITEMS:
        refuse(f"holds more than {_MAX_CONTAINERS} lists and objects, or {_MAX_ITEMS} items")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        refuse("starts with a byte-order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 (byte {error.start})")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            key, place = _first_duplicate(text)
            refuse(f"{place}: names the key {quoted(key)} twice")
        return found

    def constant(literal: str) -> NoReturn:
        refuse(f"{_place_of(text, literal)}: holds {literal}, which is not JSON")

    def number(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            refuse(f"{_place_of(text, literal)}: {literal[:40]} is beyond every number")
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        )
    except json.JSONDecodeError as error:
        refuse(f"line {error.lineno}, column {error.colno}: {error.msg}")
    except ValueError as error:  # an integer of thousands of digits
        refuse(str(error).partition(";")[0])
    except RecursionError:
        refuse(f"is nested more than {_MAX_DEPTH} levels deep")
    if not isinstance(value, dict):
        refuse(f"holds a {type(value).__name__}, not an object")
    _refuse_depth(value, refuse)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            refuse("holds half a surrogate pair, which is no character")
    return value


def _refuse_depth(value: Any, refuse: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    refuse(f"is nested more than {_MAX_DEPTH} levels deep")


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def _place_of(text: str, literal: str) -> str:
    """Where a bare *literal* stands; the first of its kind is the one that was refused."""
    tokens = _TOKEN.finditer(text)
    return _place(text, next(t.start() for t in tokens if t[0].startswith(literal)))


def _first_duplicate(text: str) -> tuple[str, str]:
    """The first key that an object of *text* has twice, and the place of its second; *text* is
    JSON up to there.

    `json` tells its hook the pairs but not where they stand, so the text is read once more.
    """
    tokens = _TOKEN.finditer(text)
    objects: list[set[str] | None] = []  # the keys that each open object has had; None for a list
    before = ""
    while True:
        token = next(tokens)
        word = token[0]
        if word == "{":
            objects.append(set())
        elif word == "[":
            objects.append(None)
        elif word in "}]":
            objects.pop()
        elif word[0] == '"' and before in ("{", ",") and (seen := objects[-1]) is not None:
            key = json.loads(word)
            if key in seen:
                return key, _place(text, token.start())
            seen.add(key)
        before = word


def read_toml(
    path: Path, *, what: str, remedy: str | None = None, limit: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """Read a TOML file; raises `InputError` with line and column where it cannot be read."""
    data = _read(path, what=what, remedy=remedy, limit=limit)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # both of its own errors are ValueErrors
        fault = str(error).partition("\n")[0]
        raise InputError(f"is not valid TOML: {fault}", where=path, remedy=remedy) from error
