"""What is to be merged, found and held against each other before the first byte is written.

The base is checked as `check-files` does it, for the output is a base: what is broken in it would
be copied. Knows nothing of strategies' arithmetic or of how the output is written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME, AdapterFiles, read_adapter
from harness.checkpoint_claims import check_claims
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.checkpoint_tokenizer import embedding_rows, has_tokenizer
from harness.errors import InputError, combined
from harness.files.digests import file_digests
from harness.files.file_kinds import is_folder, whole_path
from harness.fit import check_adapter_covers
from harness.locating import choose_base, locate_adapters
from harness.merge.factors import DOUBLED_WEIGHT, Source, open_sources
from harness.merge.places import Watch, check_output, files_beside
from harness.merge.targets import MERGEABLE
from harness.preflight import check_base_tokenizer, check_base_values, check_templates
from harness.stack import Adapter, Base

__all__ = ["Hashing", "MergeInputs", "adapter_inputs", "check_inputs", "open_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInputs:
    """Everything that is read.

    Attributes:
        adapters: in the order given; `sources` are the same ones in canonical order.
        beside: what is copied along with the weights, relative to the base's folder.
        watched: every file that the result depends on; `watch` saw them before they were read.
    """

    base: Base
    checkpoint: CheckpointFiles
    adapters: tuple[Adapter, ...]
    sources: tuple[Source, ...]
    beside: tuple[Path, ...]
    watch: Watch
    watched: tuple[Path, ...]

    def check_unchanged(self) -> None:
        """Raises `InputError` if one of the files is not what was read."""
        self.watch.check(self.watched)


class Hashing:
    """The SHA-256 of files: remembered from an earlier run, or read on a core's spare time while
    others compute. Leaving the block ends it, whatever is left to read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._digests = self._pool.submit(file_digests, list(paths), stop=self._stop)

    def result(self) -> dict[Path, str]:
        """The digests (hex) by file, once all are read; raises as `file_digests`."""
        return self._digests.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)


def open_inputs(
    base_model: str | Path,
    named: Mapping[str, str],
    weights: Mapping[str, float],
    output: Path,
    *,
    force: bool,
    trust_remote_code: bool,
) -> MergeInputs:
    """Find the folders and read their headers, and the adapters' numbers.

    Args:
        named: the adapters' folders or hub ids by name.
        weights: what each adapter's deltas are multiplied with, by name.

    Raises:
        InputError: a folder that cannot be had or is broken; a base that does not hold what its
            config claims (plain 8-bit floats without a word about them are numbers here); an
            adapter that is not additive, or changes nothing; two with the same weights; an
            *output* in an input, or in the way.
    """
    adapters = locate_adapters(named, doubled=DOUBLED_WEIGHT)
    # Looked at before they are read: what changes from then on is not what was checked and hashed.
    watch = Watch()
    watched = adapter_inputs(adapters)
    watch.look(watched)
    files = {
        adapter.name: read_adapter(adapter.path, trust_remote_code=trust_remote_code)
        for adapter in adapters
    }
    base = choose_base(base_model, "--base", adapters, files, Path.cwd())
    check_output(output, [base.path, *(a.path for a in adapters)], force=force)
    beside = files_beside(base.path)
    watch.look([*base.path.glob("*.safetensors"), *(base.path / name for name in beside)])
    faults: list[InputError] = []
    checkpoint = read_checkpoint(base.path, faults=faults)
    if not faults:  # what is missing was told of
        check_claims(checkpoint, faults, trust_remote_code=trust_remote_code, plain_float8=True)
    if faults:
        raise combined(faults)
    watched += [shard.path for shard in checkpoint.shards]
    watched += [base.path / name for name in beside]
    watch.look(watched)
    sources = open_sources(
        adapters,
        [weights[adapter.name] for adapter in adapters],
        accept=MERGEABLE,
        trust_remote_code=trust_remote_code,
    )
    return MergeInputs(
        base=base,
        checkpoint=checkpoint,
        adapters=tuple(adapters),
        sources=sources,
        beside=tuple(beside),
        watch=watch,
        watched=tuple(watched),
    )


def check_inputs(inputs: MergeInputs, *, trust_remote_code: bool) -> list[str]:
    """Hold the parts against each other, and look into the base; reads all of its numbers. Returns
    what a reader should know and is no fault.

    Raises:
        InputError: what `check-files` refuses in a base's numbers, tokenizer, template or settings
            (but a base without a tokenizer can be merged); an adapter that is merged into it, was
            trained on another one, or has no weights for what it targets.
    """
    base, checkpoint, adapters = inputs.base, inputs.checkpoint, inputs.adapters
    files = {source.name: source.files for source in inputs.sources}
    notes = _check_claims(base, adapters, files, checkpoint)
    faults: list[InputError] = []
    for adapter in adapters:
        check_adapter_covers(adapter, files[adapter.name], checkpoint, base, faults)
    check_base_values(checkpoint, faults)
    check_base_tokenizer(
        checkpoint.folder,
        embedding_rows(checkpoint),
        faults,
        trust_remote_code=trust_remote_code,
        required=False,
    )
    check_templates([checkpoint.folder, *(a.path for a in reversed(adapters))], faults)
    if faults:
        raise combined(faults)
    if not has_tokenizer(checkpoint.folder):
        notes.append("The base holds no tokenizer, and neither does the output.")
    return notes


def adapter_inputs(adapters: Iterable[Adapter]) -> list[Path]:
    """The files of *adapters* that a result depends on."""
    return [a.path / name for a in adapters for name in (CONFIG_NAME, WEIGHTS_NAME)]


def _check_claims(
    base: Base,
    adapters: Sequence[Adapter],
    files: Mapping[str, AdapterFiles],
    checkpoint: CheckpointFiles,
) -> list[str]:
    """Hold the bases that the adapters name against the one given.

    A claimed base that is at hand and whose weights differ is refused; one that is elsewhere can
    only be noted.
    """
    notes = []
    for source in adapters:
        claim = files[source.name].config.base
        if not claim:
            continue
        places = [whole_path(claim, root) for root in (source.path, Path.cwd())]
        here = next((place for place in places if is_folder(place)), None)
        if here is None:
            if Path(claim).name not in (base.path.name, Path(base.source).name):
                notes.append(
                    f"{source.name} says that it was trained on {claim!r}, which is not here to "
                    "compare; shapes fit."
                )
        elif here != base.path and not _same_weights(here, checkpoint):
            raise InputError(
                f"was trained on {claim}, whose weights differ from {base.source}",
                where=source.path / CONFIG_NAME,
                remedy=f"give --base {claim}",
            )
    return notes


def _same_weights(folder: Path, checkpoint: CheckpointFiles) -> bool:
    """Whether *folder* holds the same tensors, by shape and by the first 4 KiB of each."""
    try:
        other = read_checkpoint(folder)
    except InputError:
        return True  # nothing to compare with
    if len(other.places) != len(checkpoint.places):
        return False
    for name, shard in checkpoint.places.items():
        same = other.stored_name(name)
        if same is None:
            return False
        mine, theirs = checkpoint.entry(name), other.entry(same)
        if mine.shape != theirs.shape:
            return False
        if mine.dtype != theirs.dtype:
            continue  # a conversion of the same model: shapes are all that can be compared
        heads = []
        for file, entry in ((shard, mine), (other.places[same], theirs)):
            with file.path.open("rb") as stream:
                stream.seek(entry.start)
                heads.append(stream.read(min(4096, entry.end - entry.start)))
        if heads[0] != heads[1]:
            return False
    return True
