"""JSON and TOML files, read strictly.

`json.loads` lets through duplicate keys, `NaN` and any size; a configuration that was meant one
way and read another is the quietest fault there is. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import InputError

__all__ = ["MAX_JSON_BYTES", "parse_json_object", "read_json_object", "read_toml", "regular_file"]

MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_DEPTH = 64


def regular_file(path: Path, *, what: str, remedy: str | None = None) -> Path:
    """Return *path* if it is a regular file; raises `InputError` naming *what* is expected."""
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            fault = f"{what} is a link that points nowhere"
        elif path.exists():
            fault = f"{what} is not a regular file"
        else:
            fault = f"{what} is missing"
        raise InputError(fault, where=path, remedy=remedy)
    return path


def read_json_object(path: Path, *, what: str, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object from *path*.

    Raises:
        InputError: missing, not a regular file, over 64 MiB, not UTF-8, a byte-order mark,
            a syntax error (with line and column), a duplicate key, `NaN` or `Infinity`, more than
            64 levels deep, or not an object.
    """
    regular_file(path, what=what, remedy=remedy)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{size} bytes is no {what}", where=path, remedy=remedy)
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
    return parse_json_object(data, where=path)


def parse_json_object(data: bytes, *, where: Path | str) -> dict[str, Any]:
    """Parse *data* as one strict JSON object; raises `InputError` like `read_json_object`."""

    def refuse(fault: str) -> NoReturn:
        raise InputError(fault, where=where, remedy="write it anew as plain UTF-8 JSON")

    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        refuse("starts with a byte-order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 (byte {error.start})")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                refuse(f"names the key {key!r} twice")
            found[key] = value
        return found

    def constant(literal: str) -> NoReturn:
        refuse(f"holds {literal}, which is not JSON")

    if _depth(text) > _MAX_DEPTH:
        refuse(f"is nested more than {_MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        refuse(f"line {error.lineno}, column {error.colno}: {error.msg}")
    except ValueError as error:  # an integer of thousands of digits
        refuse(str(error))
    if not isinstance(value, dict):
        refuse(f"holds a {type(value).__name__}, not an object")
    return value


def _depth(text: str) -> int:
    """An upper bound on the nesting, brackets inside strings left out."""
    depth = deepest = 0
    quoted = escaped = False
    for character in text if text.count("[") + text.count("{") > _MAX_DEPTH else "":
        if escaped:
            escaped = False
        elif quoted:
            escaped = character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def read_toml(path: Path, *, what: str, remedy: str | None = None) -> dict[str, Any]:
    """Read a TOML file; raises `InputError` with line and column where it cannot be read."""
    regular_file(path, what=what, remedy=remedy)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is not valid TOML: {error}", where=path, remedy=remedy) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
