"""Writing a merged checkpoint shard by shard, in bounded memory, with any number of workers.

Untouched ranges are copied; adapted rows are read into one reused buffer, added and rounded in
place, and written at their offset. Work is cut at fixed rows, so the bytes do not depend on who
does it. Knows nothing of options, reports or how the folder gets its final name.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from harness.errors import InputError
from harness.files.tensor_files import DTYPE_BYTES
from harness.merge.factors import too_large
from harness.merge.kernel import ROWS, Scratch, add_block
from harness.merge.outputs import OutputFile, Pen, copy_range, read_into
from harness.merge.plan import MergePlan, OutputTensor, ShardPlan
from harness.merge.recipe import Recipe, make_delta, splittable
from harness.merge.storage import RAW, accumulator, decode, encode, largest
from harness.preflight import MOST_OF_A_BASE

__all__ = ["Flusher", "Progress", "default_workers", "write_shards"]

Array = NDArray[Any]
#: Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]

_CHUNK_ROWS = 32 * ROWS
_COPY_BYTES = 64 << 20
_CONVERT_ENTRIES = 1 << 19
#: Deltas that stay below cannot make a sound base unsound: what they make is not looked at again.
_USUAL = 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One worker's piece: a byte range to copy, or rows of a tensor to compute."""

    shard: int
    size: int
    copy: tuple[int, int, int, int] | None = None  # source number, from, to, bytes
    tensor: OutputTensor | None = None
    rows: slice = field(default_factory=lambda: slice(0, 0))


class _Cancelled(Exception):
    """Another worker failed."""


class Flusher:
    """Sends files to the disk in the background: it works while others are computed and proven."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._held: list[int] = []
        self._flushes: list[Future[None]] = []

    def __call__(self, descriptor: int) -> None:
        """Begin to flush the file of *descriptor*, which may be closed meanwhile."""
        self._held.append(os.dup(descriptor))
        self._flushes.append(self._pool.submit(os.fdatasync, self._held[-1]))

    def wait(self) -> None:
        """Until everything is on disk; raises the `OSError` of what could not be written."""
        for flush in self._flushes:
            flush.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._held:
            os.close(descriptor)


def default_workers() -> int:
    """One a core that this process may use and one more, which computes while another waits for
    the disk; at most 8 (the disk is the limit then)."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


def write_shards(
    folder: Path,
    plan: MergePlan,
    recipe: Recipe,
    *,
    workers: int,
    flusher: Flusher,
    progress: Progress | None = None,
) -> None:
    """Write every shard of *plan* into *folder*; *flusher* is given each as soon as it is whole.

    Raises:
        InputError: a result that its dtype cannot hold, or beyond what a model computes with; a
            file that became shorter while it was read.
        OSError: the disk is full or fails.
    """
    from threadpoolctl import threadpool_limits

    sources: dict[Path, int] = {}
    outputs: list[OutputFile] = []
    stop = threading.Event()

    def finished(shard: int) -> None:
        outputs[shard].finish()
        flusher(outputs[shard].descriptor)

    try:
        for shard in plan.shards:
            for tensor in shard.tensors:
                path = tensor.source_file.path
                if path not in sources:
                    sources[path] = os.open(path, os.O_RDONLY)
            outputs.append(OutputFile(folder / shard.name, shard.size))
            outputs[-1].write_edge(memoryview(shard.head), 0)
        every = [list(_tasks(s, n, sources, recipe)) for n, s in enumerate(plan.shards)]
        tasks = _interleaved(every, workers)
        worker = _Worker(outputs, sources, recipe, stop)
        # One thread a worker: threads inside BLAS would fight them, and could cut the sums anew.
        with threadpool_limits(limits=1, user_api="blas"):
            _run_all(tasks, worker, workers, stop, progress, finished)
    finally:
        for descriptor in sources.values():
            os.close(descriptor)
        for output in outputs:
            output.close()


def _run_all(
    tasks: Sequence[_Task],
    worker: _Worker,
    workers: int,
    stop: threading.Event,
    progress: Progress | None,
    finished_shard: Callable[[int], None],
) -> None:
    total = sum(task.size for task in tasks)
    done = 0
    left = Counter(task.shard for task in tasks)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="merge")
    try:
        pending: dict[Future[None], _Task] = {pool.submit(worker, t): t for t in tasks}
        while pending:
            finished, _ = wait(pending, timeout=0.25, return_when=FIRST_EXCEPTION)
            if progress is not None and not finished:
                finished = {future for future in pending if future.done()}
            for future in finished:
                future.result()
                task = pending.pop(future)
                done += task.size
                left[task.shard] -= 1
                if not left[task.shard]:
                    finished_shard(task.shard)
            if progress is not None:
                progress(done, total)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _interleaved(shards: Sequence[Sequence[_Task]], workers: int) -> list[_Task]:
    """The tasks so that workers write to different files: the kernel lets one in at a time."""
    found: list[_Task] = []
    for first in range(0, len(shards), workers):
        together = shards[first : first + workers]
        for step in range(max(len(tasks) for tasks in together)):
            found += [tasks[step] for tasks in together if step < len(tasks)]
    return found


def _tasks(
    shard: ShardPlan, number: int, sources: dict[Path, int], recipe: Recipe
) -> Iterator[_Task]:
    run: tuple[int, int, int, int] | None = None
    for tensor in shard.tensors:
        if not tensor.copied:
            if run:
                yield from _copies(number, run)
                run = None
            yield from _computed(number, tensor, recipe)
            continue
        source = sources[tensor.source_file.path]
        size = tensor.end - tensor.start
        if run and run[0] == source and run[1] + run[3] == tensor.source.start:
            run = (*run[:3], run[3] + size)  # neighbours in both files: one range
        else:
            if run:
                yield from _copies(number, run)
            run = (source, tensor.source.start, tensor.start, size)
    if run:
        yield from _copies(number, run)


def _copies(shard: int, run: tuple[int, int, int, int]) -> Iterator[_Task]:
    source, start, target, size = run
    for offset in range(0, size, _COPY_BYTES):
        count = min(_COPY_BYTES, size - offset)
        yield _Task(shard=shard, size=count, copy=(source, start + offset, target + offset, count))


def _computed(shard: int, tensor: OutputTensor, recipe: Recipe) -> Iterator[_Task]:
    if tensor.scale is not None and not tensor.terms:
        count, step = tensor.shape[0], _CHUNK_ROWS
    elif not tensor.terms:
        count, step = tensor.count, _CONVERT_ENTRIES * 16
    else:
        count = tensor.shape[0]
        step = _CHUNK_ROWS if splittable(recipe) else count
    width = (tensor.end - tensor.start) // max(count, 1)
    for start in range(0, count, max(step, 1)):
        rows = slice(start, min(start + step, count))
        yield _Task(shard=shard, size=(rows.stop - start) * width, tensor=tensor, rows=rows)


class _Worker(threading.local):
    """Runs tasks; every thread that calls it gets buffers of its own."""

    def __init__(
        self,
        outputs: Sequence[OutputFile],
        sources: dict[Path, int],
        recipe: Recipe,
        stop: threading.Event,
    ) -> None:
        self.outputs, self.sources, self.recipe, self.stop = outputs, sources, recipe, stop
        self.scratch = Scratch()
        self.pen = Pen()

    def __call__(self, task: _Task) -> None:
        try:
            self._go_on()
            if task.copy is not None:
                source, start, target, size = task.copy
                copy_range(self.outputs[task.shard], target, source, start, size, self.pen)
            elif task.tensor is not None and task.tensor.terms:
                self._merge(self.outputs[task.shard], task.tensor, task.rows)
            elif task.tensor is not None and task.tensor.scale is not None:
                self._dequantise(self.outputs[task.shard], task.tensor, task.rows)
            elif task.tensor is not None:
                self._convert(self.outputs[task.shard], task.tensor, task.rows)
        except _Cancelled:
            return
        except BaseException:
            self.stop.set()
            raise

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise _Cancelled

    def _merge(self, output: OutputFile, tensor: OutputTensor, rows: slice) -> None:
        source = self.sources[tensor.source_file.path]
        delta = make_delta(self.recipe, tensor.terms, rows, tensor.dtype)
        columns = tensor.shape[1]
        wide = columns * DTYPE_BYTES[tensor.source.dtype]
        written = columns * DTYPE_BYTES[tensor.dtype]
        narrow = tensor.dtype not in ("F64", "F32", "BF16")
        watched = narrow or not delta.bound <= _USUAL  # NaN is not usual either
        self.pen.at(output, tensor.start + rows.start * written)
        for first in range(rows.start, rows.stop, ROWS):
            self._go_on()
            last = min(first + ROWS, rows.stop)
            space = self.pen.space((last - first) * wide)
            read_into(source, space, tensor.source.start + first * wide)
            raw = np.frombuffer(space, RAW[tensor.source.dtype]).reshape(last - first, columns)
            inside = slice(first - rows.start, last - rows.start)
            result = add_block(
                raw, delta, inside, self.scratch,
                stored=tensor.source.dtype, wanted=tensor.dtype,
                scale=None if tensor.scale is None
                else tensor.scale.rows(slice(first, last), columns),
            )  # fmt: skip
            if watched:
                _check_size(result, tensor)
            if result is raw:
                self.pen.wrote(len(space))
            else:
                self.pen.put(result.data.cast("B"))
        self.pen.end()
        for term in tensor.terms:
            term.release()

    def _dequantise(self, output: OutputFile, tensor: OutputTensor, rows: slice) -> None:
        source, scale, columns = (
            self.sources[tensor.source_file.path],
            tensor.scale,
            tensor.shape[1],
        )
        assert scale is not None
        old, new = DTYPE_BYTES[tensor.source.dtype], DTYPE_BYTES[tensor.dtype]
        self.pen.at(output, tensor.start + rows.start * columns * new)
        for first in range(rows.start, rows.stop, ROWS):
            self._go_on()
            some = slice(first, min(first + ROWS, rows.stop))
            space = self.pen.space((some.stop - first) * columns * old)
            read_into(source, space, tensor.source.start + first * columns * old)
            raw = np.frombuffer(space, RAW[tensor.source.dtype]).reshape(-1, columns)
            numbers = decode(raw, tensor.source.dtype, np.float32) * scale.rows(some, columns)
            result = encode(numbers, tensor.dtype)
            _check_size(result, tensor)
            self.pen.put(result.data.cast("B"))
        self.pen.end()

    def _convert(self, output: OutputFile, tensor: OutputTensor, entries: slice) -> None:
        source = self.sources[tensor.source_file.path]
        old, new = DTYPE_BYTES[tensor.source.dtype], DTYPE_BYTES[tensor.dtype]
        into = np.float64 if tensor.source.dtype == "F64" else np.float32
        self.pen.at(output, tensor.start + entries.start * new)
        for first in range(entries.start, entries.stop, _CONVERT_ENTRIES):
            self._go_on()
            last = min(first + _CONVERT_ENTRIES, entries.stop)
            space = self.pen.space((last - first) * old)
            read_into(source, space, tensor.source.start + first * old)
            numbers = decode(
                np.frombuffer(space, RAW[tensor.source.dtype]), tensor.source.dtype, into
            )
            result = encode(numbers, tensor.dtype)
            _check_size(result, tensor)
            self.pen.put(result.data.cast("B"))
        self.pen.end()


def _check_size(result: Array, tensor: OutputTensor) -> None:
    """Refuse what the dtype cannot hold, and what no model computes with: the base was found to be
    neither, so it is the dtype or the weights."""
    most = float(np.abs(decode(result, tensor.dtype, accumulator(tensor.dtype))).max(initial=0))
    if most <= MOST_OF_A_BASE:
        return
    if not math.isfinite(most) and largest(tensor.dtype) <= MOST_OF_A_BASE:
        raise InputError(
            f"{tensor.name!r}: a number does not fit into {tensor.dtype}",
            where="--dtype",
            remedy="choose bfloat16 or float32",
        )
    raise too_large(tensor.name, most, MOST_OF_A_BASE, tensor.terms)
