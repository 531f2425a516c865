"""What `harness.tests.crashing` kills and fails: every writer of the harness, by name.

Each lays down an old state, writes a new one over it, and says which results a reader sees.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.errors import InputError

__all__ = ["CACHES", "WITHOUT_A_STACK", "WRITERS", "Writer", "writers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Something that writes below a folder.

    Attributes:
        before: lays the old state down (`old` is False for writers of new things only).
        write: what is killed; writes into the folder that it is given.
        look: the visible results in a folder by name; `_contents` if None.
        optional: a write that fails is no error: nothing is remembered.
        gap: there may be no result for a moment, until the next writer puts the old one back.
    """

    write: Callable[[Path], object]
    before: Callable[[Path], object] | None = None
    look: Callable[[Path], dict[str, str]] | None = None
    optional: bool = False
    gap: bool = False


def _bytes(folder: Path, letter: bytes) -> None:
    from harness.files.staging import write_bytes

    write_bytes(folder / "deep" / "file", letter * 100_000)


def _folder(folder: Path, letter: str) -> None:
    from harness.files.staging import staged_folder

    with staged_folder(folder / "out", replace=True) as staged:
        (staged / "below").mkdir()
        for name in ("first", "below/second"):
            (staged / name).write_text(letter * 1000)


def _without_exchange(folder: Path) -> None:
    from harness.files import staging

    real = staging._exchange
    staging._exchange = lambda first, second: False
    try:
        _folder(folder, "n")
    finally:
        staging._exchange = real


def _merge(tiny: Any, folder: Path, adapters: list[str]) -> None:
    from harness import merge_lora_adapters

    os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")  # no part of the result
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


def _plots() -> list[Any]:
    """A plot that nobody has to draw."""
    return [SimpleNamespace(name="one", title="one", caption="", png=b"png" * 100, svg="<svg/>")]


def _analysis(figures: Any, folder: Path) -> None:
    from harness.analysis.writing import write_report

    write_report(figures, folder / "out", plots=_plots())


def _latency(folder: Path) -> None:
    from harness.report import plots
    from harness.report.latency import LatencyReport, write_latency
    from harness.tests.values import latency_results

    results = latency_results()
    real = plots.draw_latency
    plots.draw_latency = lambda *_: _plots()  # type: ignore[assignment]
    try:
        report = LatencyReport(results=results, verdicts=(), changes=(), history=(results,))
        write_latency(report, folder / "out")
    finally:
        plots.draw_latency = real


def _stopping(folder: Path) -> None:
    from harness.report.stopping import write_stopping
    from harness.stopping.values import StoppingReport

    report = StoppingReport(subject="s", source="s", findings=(), modes={}, verdicts=(), causes=())
    write_stopping(report, folder / "out", plots=_plots())


def _lock(tiny: Any, folder: Path, name: str) -> None:
    from harness.resolve import resolve_stack
    from harness.stack_lock import make_lock, write_lock

    lock = make_lock(resolve_stack(base_model=tiny.base, adapters=tiny.adapters))
    write_lock(folder / "stack.lock.json", lock | {"stack": name})


def _pending(folder: Path, now: str) -> None:
    from harness.tests.review.factory import case, recorded

    cases = [case("p-1", now=now), case("p-2", now=now)]
    recorded(folder, *cases, conditions={"base": now})


def _changed(folder: Path) -> None:
    """Two accepted snapshots, and a run that found both changed."""
    from harness.tests.review.factory import case, recorded

    recorded(folder, case("p-1", root=folder), case("p-2", root=folder))


def _accept(folder: Path) -> None:
    from harness.pending import accept, read_records

    for decided in accept(folder, read_records(folder).pending):
        if decided.refused is not None:
            raise InputError(decided.refused)


def _decisions(folder: Path) -> dict[str, str]:
    """What a reader finds: each snapshot with its evidence, each decision."""
    from harness.pending import read_records
    from harness.snapshot_files import evidence_of, read_pair

    found = {}
    for path in sorted((folder / "snapshots").rglob("*.toml")):
        pair = read_pair(path)
        try:
            found[path.stem] = f"{pair.text!r} {evidence_of(pair, where=path)!r}"
        except InputError as error:
            found[path.stem] = f"partial: {error}"
    records = read_records(folder)
    found |= {f"decision on {r.name}": r.decision or "pending" for r in records.cases}
    return found | {f"broken {b.path.name}": b.fault for b in records.broken}


def _pages(inputs: Path) -> tuple[str, str]:
    """The review as HTML and Markdown; made once: a page has a random nonce."""
    from harness.pending import read_records
    from harness.report.review_html import as_html
    from harness.report.review_markdown import as_markdown
    from harness.tests.review.factory import a_grid

    records = read_records(a_grid(inputs / "project"))
    return as_html(records), as_markdown(records)


def _review_pages(pages: tuple[str, str], folder: Path) -> None:
    from harness.files.staging import write_text

    write_text(folder / "review.html", pages[0])
    write_text(folder / "review.md", pages[1])


def _benchmark_file(folder: Path, value: int) -> None:
    """The end of a session with `--benchmark-json`; all of one: `harness.tests.many_writers`."""
    from harness.plugin import saving

    config: Any = SimpleNamespace(stash={saving.UNSAVED: []})
    logger = SimpleNamespace(info=lambda *_, **__: None)
    session = SimpleNamespace(json=folder / "benchmark.json", logger=logger)
    saving._save_json(config, session, {"benchmarks": [{"seconds": [value] * 1000}]})
    for line in config.stash[saving.UNSAVED]:
        raise InputError(line)


def _digests(inputs: Path, folder: Path) -> None:
    from harness.files.digests import file_digests

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    assert file_digests([inputs / "large"]) == {inputs / "large": _LARGE_SHA256}


def _sound(inputs: Path, folder: Path) -> None:
    from harness.files import soundness

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    stamp = soundness.stamp_of("values", [inputs / "large"])
    soundness.remember_sound(stamp)
    assert soundness.known_sound(stamp)


def _settled(file: Path) -> None:
    """What was written just now is not remembered: wait until it was not."""
    while time.time() - file.stat().st_ctime < 2.1:
        time.sleep(0.1)


_LARGE = b"large" * 300_000  # digests of smaller files are not remembered
_LARGE_SHA256 = hashlib.sha256(_LARGE).hexdigest()


def _noise(folder: Path) -> None:
    from harness import noise

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    floor = noise.NoiseFloor(
        dtype="float32", device="cpu", chosen=1e-5, gaps=1e-5, worst=1e-4, close=1e-4, tokens=9,
        ways=("again",),
    )  # fmt: skip
    engine: Any = SimpleNamespace(dtype="float32", device="cpu")
    mode: Any = SimpleNamespace(formula="base")
    real = noise.measure_floor
    noise.measure_floor = lambda *_, **__: floor  # type: ignore[assignment]
    try:
        assert noise.noise_floor(engine, mode, (), contents={"base": "b"}) == floor
    finally:
        noise.measure_floor = real


def writers(tiny: Any, inputs: Path) -> Mapping[str, Writer]:
    """Every writer by name.

    Args:
        tiny: a `TinyStack`; None if only those without a stack are asked for.
        inputs: a folder that nobody may change; the stack lies there.
    """
    known = {
        "bytes": Writer(write=lambda f: _bytes(f, b"n"), before=lambda f: _bytes(f, b"o")),
        "new bytes": Writer(write=lambda f: _bytes(f, b"n")),
        "folder": Writer(write=lambda f: _folder(f, "n"), before=lambda f: _folder(f, "o")),
        "new folder": Writer(write=lambda f: _folder(f, "n")),
        "folder without exchange": Writer(
            write=_without_exchange, before=lambda f: _folder(f, "o"), gap=True
        ),
    }
    if tiny is None:
        return known
    from harness.analysis.running import analyze, compare

    both = ["style", "instruct"]
    one, two = analyze(tiny.adapters["style"]), compare([tiny.adapters[name] for name in both])
    pages = _pages(inputs)
    (inputs / "large").write_bytes(_LARGE)
    return known | {
        "snapshots": Writer(
            write=lambda f: _snapshots(tiny, f, 2),
            before=lambda f: _snapshots(tiny, f, 1),
            look=_accepted,
        ),
        "pending folder": Writer(
            write=lambda f: _pending(f, "n"), before=lambda f: _pending(f, "o")
        ),
        "review acceptance": Writer(write=_accept, before=_changed, look=_decisions),
        "review pages": Writer(
            write=lambda f: _review_pages(pages, f),
            before=lambda f: _review_pages(("old", "old"), f),
        ),
        "run report": Writer(write=lambda f: _report(tiny, f)),
        "analysis report": Writer(write=lambda f: _analysis(one, f)),
        "comparison report": Writer(write=lambda f: _analysis(two, f)),
        "stopping report": Writer(write=_stopping),
        "latency report": Writer(write=_latency),
        "benchmark file": Writer(
            write=lambda f: _benchmark_file(f, 2), before=lambda f: _benchmark_file(f, 1)
        ),
        "lock file": Writer(
            write=lambda f: _lock(tiny, f, "n"), before=lambda f: _lock(tiny, f, "o")
        ),
        "digest cache": Writer(
            write=lambda f: _digests(inputs, f),
            before=lambda f: _settled(inputs / "large"),
            optional=True,
        ),
        "soundness cache": Writer(
            write=lambda f: _sound(inputs, f),
            before=lambda f: _settled(inputs / "large"),
            optional=True,
        ),
        "noise cache": Writer(write=_noise, optional=True),
        "flatten": Writer(
            write=lambda f: _flatten(tiny, f, [1.0, 2.0]),
            before=lambda f: _flatten(tiny, f, [1.0, 1.0]),
        ),
        "merge": Writer(
            write=lambda f: _merge(tiny, f, both), before=lambda f: _merge(tiny, f, ["style"])
        ),
    }  # fmt: skip


#: The writers that need no stack on disk, and no torch.
WITHOUT_A_STACK = ("bytes", "new bytes", "folder", "new folder", "folder without exchange")
#: Without a place for them nothing is remembered, and nobody complains.
CACHES = ("digest cache", "soundness cache", "noise cache")
WRITERS = (
    *WITHOUT_A_STACK, "snapshots", "pending folder", "review acceptance", "review pages",
    "run report", "analysis report", "comparison report", "stopping report", "latency report",
    "benchmark file", "lock file", *CACHES, "flatten", "merge",
)  # fmt: skip
