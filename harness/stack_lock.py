"""`stack.lock.json`: the SHA-256 of every file that decides what a stack says, and whose child
each adapter is.

Two bases of one shape, an adapter saved over another, a template edited in place: the files look
sound and are not the ones that were accepted. Only a digest tells. Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME, read_adapter
from harness.checkpoint_files import INDEX_NAME, SINGLE_NAME, read_checkpoint
from harness.errors import InputError, combined, quoted
from harness.files.digests import combined_digest, file_digests
from harness.files.file_kinds import is_there
from harness.files.staging import write_text
from harness.files.strict_json import read_json_object
from harness.stack import AdapterStack

__all__ = ["lock_faults", "make_lock", "write_lock"]

_FORM = 1
_BASE_NAMES = (
    "config.json", INDEX_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_ADAPTER_NAMES = (CONFIG_NAME, WEIGHTS_NAME, "chat_template.jinja")
_AGAIN = "restore it, or accept the change with: lora-stack lock"

Progress = Callable[[int, int], None]


def make_lock(
    stack: AdapterStack,
    *,
    before: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The lock of *stack* as its files are now.

    Args:
        before: an earlier lock; an adapter whose files are the same keeps the parents in it.

    Raises:
        InputError: a file that cannot be read; an adapter that is the same while one it was
            trained on (`[parents]` of the stack's declaration) or the base is not.
    """
    files = _files(stack)
    digests = file_digests([p for found in files.values() for p in found.values()],
                           progress=progress)  # fmt: skip
    sums = {
        part: {name: digests[path] for name, path in found.items()} for part, found in files.items()
    }
    lock: dict[str, Any] = {
        "form": _FORM,
        "stack": stack.name,
        "base": {"source": stack.base.source, "revision": stack.base.revision,
                 "files": sums["base"]},
        "adapters": {},
    }  # fmt: skip
    whole = {part: combined_digest(found) for part, found in sums.items()}
    faults: list[InputError] = []
    for adapter in stack.adapters:
        part = f"adapter {adapter.name}"
        claim = read_adapter(adapter.path).config
        parent = {
            "base_model_name_or_path": claim.base,
            "revision": claim.base_revision,
            "base": whole["base"],
            "adapters": {n: whole[f"adapter {n}"] for n in stack.parents.get(adapter.name, ())},
        }
        entry = {"source": adapter.source, "revision": adapter.revision, "files": sums[part]}
        kept = _kept_parent(before, adapter.name, entry["files"])
        if kept is not None and stack.parents.get(adapter.name) is not None:
            faults += _parent_faults(adapter.name, kept, parent)
        lock["adapters"][adapter.name] = entry | {"parent": kept or parent}
    if faults:
        raise combined(faults)
    return lock


def _files(stack: AdapterStack) -> dict[str, dict[str, Path]]:
    base = stack.base.path
    names = [shard.path.name for shard in read_checkpoint(base).shards] or [SINGLE_NAME]
    code = sorted(path.name for path in base.glob("*.py"))  # what --trust-remote-code runs
    found = {"base": {n: base / n for n in [*names, *_BASE_NAMES, *code] if is_there(base / n)}}
    for adapter in stack.adapters:
        found[f"adapter {adapter.name}"] = {
            n: adapter.path / n for n in _ADAPTER_NAMES if is_there(adapter.path / n)
        }
    return found


def _kept_parent(before: Mapping[str, Any] | None, name: str, files: Any) -> dict[str, Any] | None:
    entry = ((before or {}).get("adapters") or {}).get(name)
    if not isinstance(entry, dict) or entry.get("files") != files:
        return None
    parent = entry.get("parent")
    return parent if isinstance(parent, dict) else None


def _parent_faults(name: str, kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[InputError]:
    """An adapter is what it was, and what it was trained on is not."""
    remedy = "train it again on what it is stacked on, or restore that, or delete the lock file"
    found = []
    if kept.get("base") != now["base"]:
        found.append(("the base", kept.get("base"), now["base"]))
    earlier = kept.get("adapters") or {}
    for parent, digest in now["adapters"].items():
        if parent in earlier and earlier[parent] != digest:
            found.append((repr(parent), earlier[parent], digest))
    return [
        InputError(
            f"was trained on {what} {_short(old)}, which is now {_short(new)}",
            where=f"adapter {name!r}",
            remedy=remedy,
        )
        for what, old, new in found
    ]


def write_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Write *lock* to *path*, whole or not at all; a file a line, so that a diff can be read."""
    write_text(path, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")


def lock_faults(
    path: Path, stack: AdapterStack, *, progress: Progress | None = None
) -> list[InputError]:
    """What of *stack* is not as the lock in *path* says; empty if all is.

    Raises:
        InputError: the lock, or a file of the stack, cannot be read.
    """
    held = read_json_object(path, what="the lock file", remedy="run: lora-stack lock")
    if held.get("form") != _FORM:
        raise InputError(
            f"form: {quoted(held.get('form'))} is not {_FORM}",
            where=path,
            remedy="write it anew with: lora-stack lock",
        )
    now = make_lock(stack, progress=progress)
    faults = _named_faults(path, held, now)
    if not faults:
        faults += _part_faults(path, "base", held.get("base"), now["base"], stack.base.path)
        for adapter in stack.adapters:
            entry = held["adapters"][adapter.name]
            ours = now["adapters"][adapter.name]
            part = f"adapter {adapter.name!r}"
            faults += _part_faults(path, part, entry, ours, adapter.path)
    if not faults:
        for adapter in stack.adapters:
            kept = held["adapters"][adapter.name].get("parent")
            if isinstance(kept, dict):
                ours = now["adapters"][adapter.name]["parent"]
                faults += _parent_faults(adapter.name, kept, ours)
    return faults


def _named_faults(path: Path, held: Mapping[str, Any], now: Mapping[str, Any]) -> list[InputError]:
    """The lock is of another stack: its adapters have other names, or another order."""
    theirs, ours = held.get("adapters"), list(now["adapters"])
    names = list(theirs) if isinstance(theirs, dict) else []
    sound = all(isinstance(entry, dict) for entry in (theirs or {}).values()) if names else True
    if names == ours and sound:
        return []
    return [
        InputError(
            f"adapters: holds {names}, the stack is {ours}",
            where=path,
            remedy="write it anew with: lora-stack lock; or pass --lock none",
        )
    ]


def _part_faults(
    path: Path, part: str, held: Any, now: Mapping[str, Any], folder: Path
) -> list[InputError]:
    theirs = held.get("files") if isinstance(held, dict) else None
    if not isinstance(theirs, dict):
        return [InputError(f"{part}: holds no files", where=path, remedy="run: lora-stack lock")]
    faults = []
    for name in dict.fromkeys([*theirs, *now["files"]]):
        old, new = theirs.get(name), now["files"].get(name)
        if old == new:
            continue
        if new is None:
            fault = f"is gone; {path.name} holds {_short(old)}"
        elif old is None:
            fault = f"is new; {path.name} does not hold it"
        else:
            fault = f"has changed: sha256 {_short(new)}, {path.name} holds {_short(old)}"
        faults.append(InputError(f"{part}: {fault}", where=folder / name, remedy=_AGAIN))
    return faults


def _short(digest: object) -> str:
    return digest[:12] if isinstance(digest, str) else quoted(digest)
