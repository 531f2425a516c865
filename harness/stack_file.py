"""A declared stack: what `stack.toml` may say, read strictly.

Paths stand as they are written: where they lead is `harness.resolve`'s to find, and only then is
what the file says of adapters and modes held against them. Knows nothing of folders or options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import InputError, quoted
from harness.expectation import read_expectation
from harness.files.config_fields import field_name
from harness.files.strict_json import read_toml
from harness.stack import AdapterStack, default_modes

__all__ = ["as_declared", "read_stack_file", "text_of"]

_STACK_KEYS = frozenset(
    {
        "name", "base", "preset", "stopping_preset", "adapters", "stops", "modes", "untrained",
        "parents",
    }
)  # fmt: skip


def read_stack_file(file: Path) -> dict[str, Any]:
    """The declaration in *file*: known keys alone, `adapters` a table of paths, `modes` a list.

    Raises:
        InputError: no TOML file, a key that is not known, adapters or modes of another form.
    """
    declared = read_toml(
        file, what="the stack's declaration", remedy="see docs/stack-file.md for its form"
    )
    unknown = sorted(set(declared) - _STACK_KEYS)
    if unknown:
        raise InputError(
            f"unknown key {unknown[0]!r}",
            where=file,
            remedy=f"known: {', '.join(sorted(_STACK_KEYS))}",
        )
    adapters = declared.get("adapters", {})
    if not isinstance(adapters, dict) or not all(isinstance(v, str) for v in adapters.values()):
        raise InputError(
            "[adapters] is not a table of paths", where=file, remedy='write e.g. style = "folder"'
        )
    modes = declared.get("modes", [])
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        raise InputError(
            f"modes: {quoted(modes)} is not a list of names",
            where=file,
            remedy='write e.g. ["base", "stacked"]',
        )
    return declared


def text_of(declared: Mapping[str, Any], key: str, file: Path) -> str | None:
    """What *declared* says of *key*; raises `InputError` if that is no string."""
    value = declared.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key}: {value!r} is not a string", where=file, remedy="put it in quotes")
    return value


def as_declared(stack: AdapterStack, declared: Mapping[str, Any], file: Path) -> AdapterStack:
    """*stack* with what its declaration says of stops, presets and training.

    Raises:
        InputError: a value of another form, or a name that the stack does not have.
    """
    stops = _stops(declared.get("stops", {}), stack, file)
    return replace(
        stack,
        stops=stops,
        preset=text_of(declared, "preset", file),
        stopping_preset=text_of(declared, "stopping_preset", file),
        untrained=_untrained(declared.get("untrained", []), stack, file),
        parents=_parents(declared.get("parents", {}), stack, file),
    )


def _untrained(declared: Any, stack: AdapterStack, file: Path) -> tuple[str, ...]:
    names = [adapter.name for adapter in stack.adapters]
    if not isinstance(declared, list) or not all(name in names for name in declared):
        raise InputError(
            f"untrained: {quoted(declared)} is not a list of the stack's adapters",
            where=file,
            remedy=f"choose from: {', '.join(names)}",
        )
    return tuple(declared)


def _parents(declared: Any, stack: AdapterStack, file: Path) -> dict[str, tuple[str, ...]]:
    """Which adapters each was trained on top of; only those before it in the stack can be."""
    names = [adapter.name for adapter in stack.adapters]
    remedy = f'write e.g. {names[-1] if names else "instruct"} = ["{(names or ["style"])[0]}"]'
    if not isinstance(declared, dict):
        raise InputError("[parents] is not a table", where=file, remedy=remedy)
    for name, parents in declared.items():
        before = names[: names.index(name)] if name in names else []
        if (
            name not in names
            or not isinstance(parents, list)
            or not all(parent in before for parent in parents)
        ):
            raise InputError(
                f"[parents] {field_name(name)} = {quoted(parents)} does not name adapters "
                "before it in the stack",
                where=file,
                remedy=remedy,
            )
    return {name: tuple(parents) for name, parents in declared.items()}


def _stops(declared: Any, stack: AdapterStack, file: Path) -> dict[str, Any]:
    if not isinstance(declared, dict):
        raise InputError(
            "[stops] is not a table", where=file, remedy='write e.g. stacked = "always"'
        )
    known = {m.name for m in default_modes([a.name for a in stack.adapters])}
    known |= {m.name for m in stack.modes}
    for mode, expected in declared.items():
        if mode not in known:
            raise InputError(
                f"[stops] names {mode!r}, which is no mode",
                where=file,
                remedy=f"choose from: {', '.join(sorted(known))}",
            )
        read_expectation(expected, where=f"{file}: [stops] {mode}")
    return dict(declared)
