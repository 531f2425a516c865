"""Kill or fail every writer at every n-th call, for every n; `python -m harness.tests.crashing`.

    python -m harness.tests.crashing FOLDER [WRITER …]     prints a JSON object, by writer

One process imports, then forks a child a kill: importing takes seconds, a write milliseconds. Run
with OMP_NUM_THREADS=1: a forked child cannot use its parent's OpenMP threads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.tests.crashing_writers import WITHOUT_A_STACK, WRITERS, Writer, writers
from harness.tests.faults import fail_at, interposed, kill_at

__all__ = ["fail_everywhere", "kill_everywhere"]


def _contents(folder: Path) -> dict[str, str]:
    """The visible results in *folder* by name: a file's digest, a folder's as a whole (a folder of
    snapshots or the like is not one result, its files are)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith((".staging-", ".replaced-"))
                                     for part in name.parts):  # fmt: skip
            continue
        whole = "out" if name.parts[0] == "out" else str(name)
        found.setdefault(whole, hashlib.sha256()).update(str(name).encode() + path.read_bytes())
    return {name: digest.hexdigest() for name, digest in found.items()}


def _litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith((".staging", ".replaced"))]


def _sweep(folder: Path) -> None:
    """What the next writer does in each of the folders, a minute later."""
    from harness.files.staging import check_place

    old = time.time() - 60
    for entry in _litter(folder):
        os.utime(entry, (old, old), follow_symlinks=False)
    for parent in {entry.parent for entry in _litter(folder)} or {folder}:
        check_place(parent / "next")


def _laid(writer: Writer, folder: Path) -> dict[str, str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if writer.before is not None:
        writer.before(folder)
    return (writer.look or _contents)(folder)


def _as_before_or_after(
    found: Mapping[str, str], before: Mapping[str, str], after: Mapping[str, str]
) -> bool:
    names = {*found, *before, *after}
    return all(found.get(name) in (before.get(name), after.get(name)) for name in names)


def kill_everywhere(writer: Writer, folder: Path, inputs: Path) -> dict[str, int]:
    """Kill a child at call 1, 2, 3 … until one gets to its end; counts what was found after."""
    look = writer.look or _contents
    _laid(writer, folder)
    writer.write(folder)
    after = look(folder)
    held = _contents(inputs)
    seen = {"kills": 0, "before": 0, "after": 0, "partial": 0, "litter": 0, "inputs changed": 0}
    for number in range(1, 10_000):
        before = _laid(writer, folder)
        child = os.fork()
        if child == 0:
            try:
                with interposed(kill_at(number)):
                    writer.write(folder)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
            assert look(folder) == after
            return seen
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = look(folder)
        seen["kills"] += 1
        missing = writer.gap and not found
        if not missing:
            seen["partial"] += not _as_before_or_after(found, before, after)
        _sweep(folder)
        found = look(folder)
        seen["partial"] += not _as_before_or_after(found, before, after)
        seen["before"] += found == before
        seen["after"] += found == after
        seen["litter"] += len(_litter(folder))
        seen["inputs changed"] += _contents(inputs) != held
    raise AssertionError("no child got to its end")


def fail_everywhere(writer: Writer, folder: Path, inputs: Path, code: int) -> dict[str, Any]:
    """Let the 1st, 2nd, 3rd … making call fail with *code* until none is left to fail."""
    look = writer.look or _contents
    _laid(writer, folder)
    writer.write(folder)
    after = look(folder)
    held = _contents(inputs)
    seen: dict[str, Any] = {
        "faults": 0, "clear errors": 0, "absorbed": 0, "partial": 0, "litter": 0,
        "inputs changed": 0, "other errors": [],
    }  # fmt: skip
    for number in range(1, 10_000):
        before = _laid(writer, folder)
        failed: list[str] = []
        try:
            with interposed(fail_at(number, code, failed)):
                writer.write(folder)
        except HarnessError as error:
            clear = os.strerror(code) in str(error) and str(folder) in str(error)
            seen["clear errors"] += clear
            if not clear:
                seen["other errors"].append(f"{failed}: {error}")
        except Exception as error:
            seen["other errors"].append(f"{failed}: {type(error).__name__}: {error}")
        else:
            assert look(folder) == after or (writer.optional and failed)
            if not failed:
                return seen
            seen["absorbed"] += 1  # another way to the same end was taken, and it got there
        seen["faults"] += 1
        seen["partial"] += not _as_before_or_after(look(folder), before, after)
        seen["litter"] += len(_litter(folder))
        seen["inputs changed"] += _contents(inputs) != held
    raise AssertionError("no call got to its end")


def main() -> None:
    root = Path(sys.argv[1])
    (root / "inputs").mkdir()
    tiny = None
    if not set(sys.argv[2:]) or not set(sys.argv[2:]) <= set(WITHOUT_A_STACK):
        from harness.testing.tiny import tiny_stack

        tiny = tiny_stack(root / "inputs")
    known = writers(tiny, root / "inputs")
    figures = {}
    for name in sys.argv[2:] or WRITERS:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures[name] = {
            "killed": kill_everywhere(known[name], root / "work", root / "inputs"),
            "full": fail_everywhere(known[name], root / "work", root / "inputs", errno.ENOSPC),
            "broken": fail_everywhere(known[name], root / "work", root / "inputs", errno.EIO),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
