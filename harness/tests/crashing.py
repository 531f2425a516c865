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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.tests.faults import fail_at, interposed, kill_at

__all__ = ["WITHOUT_A_STACK", "WRITERS", "fail_everywhere", "kill_everywhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Something that writes below a folder.

    Attributes:
        before: lays the old state down (`old` is False for writers of new things only).
        write: what is killed; writes into the folder that it is given.
        look: the visible results in a folder by name; `_contents` if None.
        gap: there may be no result for a moment, until the next writer puts the old one back.
    """

    write: Callable[[Path], object]
    before: Callable[[Path], object] | None = None
    look: Callable[[Path], dict[str, str]] | None = None
    gap: bool = False


def _bytes(folder: Path, letter: bytes) -> None:
    from harness.staging import write_bytes

    write_bytes(folder / "deep" / "file", letter * 100_000)


def _folder(folder: Path, letter: str) -> None:
    from harness.staging import staged_folder

    with staged_folder(folder / "out", replace=True) as staged:
        (staged / "below").mkdir()
        for name in ("first", "below/second"):
            (staged / name).write_text(letter * 1000)


def _without_exchange(folder: Path) -> None:
    from harness import staging

    real = staging._exchange
    staging._exchange = lambda first, second: False
    try:
        _folder(folder, "n")
    finally:
        staging._exchange = real


def _merge(tiny: Any, folder: Path, adapters: list[str]) -> None:
    from harness import merge_lora_adapters

    merge_lora_adapters(
        tiny.base, [tiny.adapters[name] for name in adapters], folder / "out", force=True,
        workers=1,
    )  # fmt: skip


def _flatten(tiny: Any, folder: Path, weights: list[float]) -> None:
    from harness import flatten_adapters

    flatten_adapters(tiny.adapters, folder / "out", weights=weights, force=True)


def _snapshots(tiny: Any, folder: Path, token: int) -> None:
    from harness.tests.many_writers import accept

    for number in range(3):
        accept(folder, number, token)


def _accepted(folder: Path) -> dict[str, str]:
    """A snapshot is two files; what a reader makes of them is one result."""
    from harness.tests.many_writers import accepted

    found = {}
    for path in sorted(folder.rglob("*.toml")):
        try:
            found[path.stem] = str(accepted(folder, int(path.stem[2:])))
        except Exception as error:
            found[path.stem] = f"partial: {error}"
    return found


def _report(tiny: Any, folder: Path) -> None:
    from harness.report.run import write_run
    from harness.tests.values import run_report

    write_run(run_report(tiny), folder / "out")


def writers(tiny: Any) -> Mapping[str, Writer]:
    """Every writer by name; *tiny* is a `TinyStack`."""
    both = ["style", "instruct"]
    return {
        "bytes": Writer(write=lambda f: _bytes(f, b"n"), before=lambda f: _bytes(f, b"o")),
        "new bytes": Writer(write=lambda f: _bytes(f, b"n")),
        "folder": Writer(write=lambda f: _folder(f, "n"), before=lambda f: _folder(f, "o")),
        "new folder": Writer(write=lambda f: _folder(f, "n")),
        "folder without exchange": Writer(
            write=_without_exchange, before=lambda f: _folder(f, "o"), gap=True
        ),
        "merge": Writer(
            write=lambda f: _merge(tiny, f, both), before=lambda f: _merge(tiny, f, ["style"])
        ),
        "flatten": Writer(
            write=lambda f: _flatten(tiny, f, [1.0, 2.0]),
            before=lambda f: _flatten(tiny, f, [1.0, 1.0]),
        ),
        "run report": Writer(write=lambda f: _report(tiny, f)),
        "snapshots": Writer(
            write=lambda f: _snapshots(tiny, f, 2),
            before=lambda f: _snapshots(tiny, f, 1),
            look=_accepted,
        ),
    }


#: The writers that need no stack on disk, and no torch.
WITHOUT_A_STACK = ("bytes", "new bytes", "folder", "new folder", "folder without exchange")
WRITERS = (*WITHOUT_A_STACK, "snapshots", "run report", "flatten", "merge")


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
    from harness.staging import check_place

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
            assert look(folder) == after
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
    known = writers(tiny)
    figures = {}
    for name in sys.argv[2:] or WRITERS:
        figures[name] = {
            "killed": kill_everywhere(known[name], root / "work", root / "inputs"),
            "full": fail_everywhere(known[name], root / "work", root / "inputs", errno.ENOSPC),
            "broken": fail_everywhere(known[name], root / "work", root / "inputs", errno.EIO),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
