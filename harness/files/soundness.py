"""What was found sound, remembered while the files stay as they are.

In this process, and for what takes long to check between runs as well: a small file each in
`$XDG_CACHE_HOME/lora-stack/sound`, which may be deleted at any time. As in git's index, a file that
was written just now is not remembered: written again within a tick of the clock, it would have the
same stamp. Knows nothing of what is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError
from harness.files.digests import cache_folder, text_digest
from harness.files.staging import write_text

__all__ = ["Stamp", "forget", "known_sound", "remember_sound", "stamp_of"]

_WORTH_REMEMBERING = 1 << 20  # bytes; below, checking is as quick as looking it up
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system ticks once in two seconds
#: Changes when a check becomes stricter: what an older one found sound is checked again.
_FORM = 2

_sound: set[Stamp] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a check depends on, and how the files were before it.

    Attributes:
        key: the check's name and the paths: one memory each.
        state: sizes, times and inodes, and whatever else the verdict depends on.
        settled: whether another content would have another stamp.
        lasting: whether it is worth remembering between runs.
    """

    key: str
    state: tuple[str, ...]
    settled: bool
    lasting: bool


def stamp_of(check: str, paths: Iterable[Path], *terms: object) -> Stamp:
    """How *paths* are now, for the check called *check*; a path may lead nowhere.

    Args:
        terms: what the verdict depends on besides the files. Without *paths*, the key too.

    Raises:
        OSError: a file is there and cannot be looked at.
    """
    state = [str(_FORM), *map(str, terms)]
    newest = size = 0
    places = []
    for path in paths:
        places.append(os.path.realpath(path))
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            state.append("absent")
            continue
        newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
        size += found.st_size
        state.append(
            f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino} {found.st_dev}"
        )
    return Stamp(
        key="\0".join([check, *(places or state)]),
        state=tuple(state),
        settled=time.time_ns() - newest > _SETTLED_NS,
        lasting=size >= _WORTH_REMEMBERING or not places,
    )


def known_sound(stamp: Stamp) -> bool:
    """Whether `remember_sound` was told of the same stamp."""
    if not stamp.settled:
        return False
    if stamp in _sound:
        return True
    if not stamp.lasting:
        return False
    try:
        held: object = json.loads(_memory(stamp).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if held != [stamp.key, *stamp.state]:
        return False
    _sound.add(stamp)
    return True


def remember_sound(stamp: Stamp) -> None:
    """What *stamp* was made of, before it was checked, was found sound."""
    if not stamp.settled:
        return
    _sound.add(stamp)
    if stamp.lasting:
        with contextlib.suppress(InputError):  # no place for a cache: checked again next time
            write_text(_memory(stamp), json.dumps([stamp.key, *stamp.state]))


def forget() -> None:
    """Nothing is known in this process any more; what lies in the cache stays."""
    _sound.clear()


def _memory(stamp: Stamp) -> Path:
    return cache_folder("sound") / f"{text_digest(stamp.key)[:40]}.json"
