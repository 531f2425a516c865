"""The checks of a stack that look into its files: the numbers, the tokenizer, the template, the
lock. `harness.resolve` has read the headers; this runs before PEFT and transformers touch anything.

Without torch, in blocks. What was found sound is remembered while the files keep their size and
times. Knows nothing of devices, engines or reports.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from harness.adapter_files import AdapterFiles, read_adapter
from harness.checkpoint_claims import PLAIN_FAMILIES
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.checkpoint_tokenizer import check_tokenizer, embedding_rows
from harness.errors import InputError, combined, gathering, quoted
from harness.files.digests import cache_folder, text_digest
from harness.files.staging import write_text
from harness.files.tensor_files import TensorFile
from harness.files.tensor_values import ValueRange, value_ranges
from harness.stack import AdapterStack
from harness.stack_lock import lock_faults
from harness.template_probe import check_template, template_of

__all__ = ["check_adapter_values", "check_base_values", "check_stack_files"]

#: The most that an entry of a factor may be. Trained ones stay below 10; a flipped high bit of
#: the exponent gives 1e30.
MOST_OF_A_FACTOR = 1e4
#: The most that a weight of a base may be; the largest in use are some hundreds.
MOST_OF_A_BASE = 1e6
_WORTH_REMEMBERING = 64 << 20
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system ticks once in two seconds
_FORM = 1

# What this process has found sound: a run checks before it loads torch, and once more when loading.
_sound: set[tuple[str, ...]] = set()

Progress = Callable[[str], None]


def check_stack_files(
    stack: AdapterStack,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Check what the headers do not show; returns what a reader should know and is no fault.

    Args:
        progress: told what is being read.

    Raises:
        InputError: NaN, infinity or an absurd size in a tensor; an adapter that changes nothing
            (unless declared `untrained`); a tokenizer, template or generation setting that
            cannot be used; a file that is not as the lock says. All faults at once.
    """
    faults: list[InputError] = []
    notes: list[str] = []
    tell = progress or (lambda _: None)
    for adapter in stack.adapters:
        tell(f"reading {adapter.name}")
        with gathering(faults):
            files = read_adapter(adapter.path, faults=faults, trust_remote_code=trust_remote_code)
            notes += check_adapter_values(files, faults, untrained=adapter.name in stack.untrained)
    tell("reading the base")
    rows = None
    with gathering(faults):
        checkpoint = read_checkpoint(stack.base.path, faults=faults)
        rows = embedding_rows(checkpoint)
        check_base_values(checkpoint, faults)
    check_tokenizer(stack.base.path, rows, faults, trust_remote_code=trust_remote_code)
    _check_templates(stack, faults)
    if stack.lock is not None:
        tell("comparing with the lock")
        with gathering(faults):
            faults += lock_faults(stack.lock, stack)
    if faults:
        raise combined(faults)
    return tuple(notes)


def check_adapter_values(
    files: AdapterFiles, faults: list[InputError], *, untrained: bool = False
) -> list[str]:
    """Hold every number against what a trained adapter can hold; returns notes."""
    path = files.tensors.path
    zero: set[str] = set()
    factors = {entry.name for pair in files.pairs.values() for entry in (pair.a, pair.b)}
    try:
        for found in value_ranges(files.tensors):
            most = MOST_OF_A_FACTOR if found.entry.name in factors else math.inf
            if fault := _value_fault(found, most):
                faults.append(InputError(fault, where=path, remedy="save or train it again"))
            elif found.zero:
                zero.add(found.entry.name)
    except OSError as error:
        faults.append(InputError(f"cannot be read: {error.strerror}", where=path))
        return []
    dead = [m for m, pair in files.pairs.items() if {pair.a.name, pair.b.name} & zero]
    if not dead:
        return []
    if len(dead) == len(files.pairs) and not untrained:
        pair = files.pairs[dead[0]]
        name = pair.b.name if pair.b.name in zero else pair.a.name
        faults.append(
            InputError(
                f"tensor {quoted(name)}: is all zeros, as in all {len(dead)} modules: the adapter "
                "changes nothing",
                where=path,
                remedy="save it after training; a fresh one on purpose is declared in stack.toml "
                "as untrained",
            )
        )
        return []
    return [
        f"{path}: {len(dead)} of {len(files.pairs)} modules change nothing, the first is {dead[0]}"
    ]


def _value_fault(found: ValueRange, most: float) -> str | None:
    name = f"tensor {quoted(found.entry.name)}"
    if found.bad is not None:
        return f"{name}: holds {found.kind} at {list(found.bad)}"
    if found.largest > most:
        return f"{name}: holds {found.largest:.3g}, beyond {most:g}"
    return None


def check_base_values(checkpoint: CheckpointFiles, faults: list[InputError]) -> None:
    """Find NaN, infinity, and matrices that were never written, in the base's shards."""
    written = checkpoint.config.get("model_type") in PLAIN_FAMILIES
    for shard in checkpoint.shards:
        before = len(faults)
        try:
            stamp = _stamp(shard, written)
            # As git's index does: what can still change without its stamp showing it is read again.
            settled = time.time_ns() - max(int(stamp[4]), int(stamp[5])) > _SETTLED_NS
            if settled and (stamp in _sound or _recalled(shard, stamp)):
                _sound.add(stamp)
                continue
            for found in value_ranges(shard):
                fault = _value_fault(found, MOST_OF_A_BASE)
                if fault is None and written and found.zero and len(found.entry.shape) == 2:
                    fault = f"tensor {quoted(found.entry.name)}: is all zeros: it was never written"
                if fault is not None:
                    faults.append(
                        InputError(fault, where=shard.path, remedy="copy the base model again")
                    )
        except OSError as error:
            faults.append(InputError(f"cannot be read: {error.strerror}", where=shard.path))
        if len(faults) == before and settled:
            _sound.add(stamp)
            _remember(shard, stamp)


def _stamp(file: TensorFile, written: bool) -> tuple[str, ...]:
    state = file.path.stat()
    return (
        str(file.path.resolve()), str(_FORM), str(written), str(state.st_size),
        str(state.st_mtime_ns), str(state.st_ctime_ns), str(state.st_ino), str(state.st_dev),
    )  # fmt: skip


def _memory(stamp: tuple[str, ...]) -> Path:
    return cache_folder("values") / f"{text_digest(stamp[0])[:40]}.json"


def _recalled(file: TensorFile, stamp: tuple[str, ...]) -> bool:
    if file.size < _WORTH_REMEMBERING:
        return False
    try:
        held: object = json.loads(_memory(stamp).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return held == list(stamp)


def _remember(file: TensorFile, stamp: tuple[str, ...]) -> None:
    if file.size >= _WORTH_REMEMBERING:
        with contextlib.suppress(InputError):  # no place for a cache: read again next time
            write_text(_memory(stamp), json.dumps(list(stamp)))


def _check_templates(stack: AdapterStack, faults: list[InputError]) -> None:
    """The base's template, or that of the last adapter which has one."""
    for folder in (stack.base.path, *(a.path for a in reversed(stack.adapters))):
        found = template_of(folder, faults)
        if found is None:
            continue
        template, path = found
        key = ("template", text_digest(template))
        if key not in _sound:
            before = len(faults)
            check_template(template, path, faults)
            if len(faults) == before:
                _sound.add(key)
        return
