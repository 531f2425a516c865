"""What will be written: every shard's header, every tensor's place, and where its bytes come from.

Where nothing but values changes, the base's own header and offsets are kept to the byte. `--dtype`
and untying a head make a new header. Pure: headers in, plans out; reads no tensor and writes
nothing. Knows nothing of strategies or workers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError
from harness.files.tensor_files import DTYPE_BYTES, TensorEntry, TensorFile
from harness.merge.factors import Term
from harness.merge.quantised import Scale, is_quantised, scale_tensors, scales_of
from harness.merge.storage import FLOATS
from harness.merge.targets import Placement, SavedTensor

__all__ = ["MergePlan", "OutputTensor", "ShardPlan", "changed_config", "changed_index", "make_plan"]

_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, dtype, shape, start, end: as in a header; the range counts from the file's start.
        source: the tensor that it is made of, in `source_file`: the base's, or one that an adapter
            saved whole.
        terms: what is added; empty for a tensor that is copied or only converted.
        scale: what the source's 8-bit numbers are multiplied with; None for plain numbers.
        stacked_in: the header's name for the tensor of which this is one expert, else None.
        saved_by: the adapter that saved the source, if one did.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    source: TensorEntry
    source_file: TensorFile
    terms: tuple[Term, ...] = ()
    scale: Scale | None = None
    stacked_in: str | None = None
    saved_by: str | None = None

    @property
    def stored_name(self) -> str:
        """The name in the header."""
        return self.stacked_in or self.name

    @property
    def copied(self) -> bool:
        """Whether the bytes are the base's own."""
        return not self.terms and self.scale is None and self.dtype == self.source.dtype

    @property
    def count(self) -> int:
        return self.source.count


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file: its head (length and header), then the tensors in file order."""

    name: str
    head: bytes
    tensors: tuple[OutputTensor, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The whole output.

    Attributes:
        dtype: the safetensors name that all floating tensors get, or None to keep each one's.
        untied: whether the head gets a tensor of its own that the base did not have.
        dequantised: whether the base is stored as 8-bit numbers with scales, the output is not.
    """

    shards: tuple[ShardPlan, ...]
    dtype: str | None
    untied: bool
    dequantised: bool = False

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def merged(self) -> tuple[OutputTensor, ...]:
        """The tensors that adapters change."""
        return tuple(t for shard in self.shards for t in shard.tensors if t.terms)

    @property
    def replaced(self) -> tuple[OutputTensor, ...]:
        """The tensors whose place one that an adapter saved takes."""
        return tuple(t for shard in self.shards for t in shard.tensors if t.saved_by)

    @property
    def stored_names(self) -> dict[str, str]:
        """Which shard holds each tensor of the headers."""
        return {t.stored_name: shard.name for shard in self.shards for t in shard.tensors}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A tensor that the output shall have: like `entry`, made of `source`."""

    name: str
    entry: TensorEntry
    source: TensorEntry
    file: TensorFile
    dtype: str
    saved_by: str | None = None


def make_plan(checkpoint: CheckpointFiles, placement: Placement, *, dtype: str | None) -> MergePlan:
    """Place every tensor of the output.

    Raises:
        InputError: a target that is no floating tensor; a quantised base that cannot be read, or
            without a *dtype* to store its numbers as.
    """
    quantised = is_quantised(checkpoint, dtype)
    scales = scales_of(checkpoint) if quantised else {}
    dropped = scale_tensors(checkpoint) if quantised else frozenset()
    embedding = checkpoint.embedding_name if checkpoint.tied else None
    changed = placement.terms.keys() | placement.saved.keys()
    for name in placement.terms.keys() & checkpoint.places.keys():
        stored = checkpoint.entry(name).dtype
        if stored not in FLOATS:
            raise InputError(
                f"{name!r} is stored as {stored}, which is quantised",
                where=checkpoint.places[name].path,
                remedy="merge into the unquantised base",
            )
    untied = embedding is not None and bool({_HEAD, embedding} & changed)
    shards = []
    for file in checkpoint.shards:
        found = [
            (entry.name, entry, file)
            for entry in file.entries.values()
            if entry.name not in dropped
        ]
        if untied and embedding is not None:
            found = _with_own_head(found, checkpoint, embedding, file)
        wanted = [
            _wanted(name, entry, place, placement.saved.get(name), dtype)
            for name, entry, place in found
        ]
        shards.append(_place(file, wanted, placement.terms, scales))
    return MergePlan(shards=tuple(shards), dtype=dtype, untied=untied, dequantised=quantised)


def _wanted(
    name: str, entry: TensorEntry, file: TensorFile, saved: SavedTensor | None, dtype: str | None
) -> _Wanted:
    stored = dtype if dtype and entry.dtype in FLOATS else entry.dtype
    if saved is None:
        return _Wanted(name=name, entry=entry, source=entry, file=file, dtype=stored)
    return _Wanted(
        name=name,
        entry=entry,
        source=saved.entry,
        file=saved.file,
        dtype=stored,
        saved_by=saved.source.name,
    )


def _with_own_head(
    wanted: list[tuple[str, TensorEntry, TensorFile]],
    checkpoint: CheckpointFiles,
    embedding: str,
    file: TensorFile,
) -> list[tuple[str, TensorEntry, TensorFile]]:
    """The head as a tensor made of the embedding: what a tied head is before anything is added."""
    holder = checkpoint.places[embedding]
    if _HEAD in checkpoint.places:  # stored, but loaders overwrite it with the embedding
        return [
            (name, holder.entries[embedding], holder) if name == _HEAD else (name, entry, place)
            for name, entry, place in wanted
        ]
    return [*wanted, (_HEAD, holder.entries[embedding], holder)] if file is holder else wanted


def _place(
    file: TensorFile,
    wanted: Sequence[_Wanted],
    terms: Mapping[str, tuple[Term, ...]],
    scales: Mapping[str, Scale],
) -> ShardPlan:
    same = [one.name for one in wanted] == list(file.entries) and all(
        one.dtype == file.entries[one.name].dtype for one in wanted
    )
    if same:
        with file.path.open("rb") as source:
            head = source.read(file.data_start)
    else:
        head = _head([(one.name, one.dtype, one.entry.shape) for one in wanted], file.metadata)
    position = len(head)
    tensors: list[OutputTensor] = []
    for one in wanted:
        size = one.entry.count * DTYPE_BYTES[one.dtype]
        tensor = OutputTensor(
            name=one.name,
            dtype=one.dtype,
            shape=one.entry.shape,
            start=position,
            end=position + size,
            source=one.source,
            source_file=one.file,
            terms=terms.get(one.name, ()),
            scale=scales.get(one.source.name) if one.saved_by is None else None,
            saved_by=one.saved_by,
        )
        tensors += _expert_by_expert(tensor) if _stacks_experts(tensor) else [tensor]
        position += size
    return ShardPlan(name=file.path.name, head=head, tensors=tuple(tensors), size=position)


def _stacks_experts(tensor: OutputTensor) -> bool:
    """Whether *tensor* stacks experts that adapters change one by one."""
    return len(tensor.shape) == 3 and bool(tensor.terms)


def _expert_by_expert(tensor: OutputTensor) -> list[OutputTensor]:
    """A stacked tensor `(experts, rows, columns)` as one piece an expert."""
    experts, rows, columns = tensor.shape
    new = (tensor.end - tensor.start) // experts
    old = (tensor.source.end - tensor.source.start) // experts
    pieces = []
    for expert in range(experts):
        start = tensor.source.start + expert * old
        source = replace(tensor.source, shape=(rows, columns), start=start, end=start + old)
        pieces.append(
            replace(
                tensor,
                name=f"{tensor.name}[{expert}]",
                shape=(rows, columns),
                start=tensor.start + expert * new,
                end=tensor.start + (expert + 1) * new,
                source=source,
                terms=tuple(term for term in tensor.terms if term.expert == expert),
                stacked_in=tensor.name,
            )
        )
    return pieces


def _head(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + DTYPE_BYTES[dtype] * _product(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def changed_index(checkpoint: CheckpointFiles, plan: MergePlan) -> dict[str, Any] | None:
    """The index, where it has to say something else than the base's; otherwise None."""
    if checkpoint.index is None or (plan.dtype is None and not plan.untied):
        return None
    metadata = dict(checkpoint.index.get("metadata") or {})
    metadata["total_size"] = sum(t.end - t.start for shard in plan.shards for t in shard.tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(t.count for s in plan.shards for t in s.tensors)
    places = dict(sorted(plan.stored_names.items()))
    return {**checkpoint.index, "metadata": metadata, "weight_map": places}


def changed_config(checkpoint: CheckpointFiles, plan: MergePlan) -> dict[str, Any] | None:
    """`config.json`, where dtype, tying or quantisation changed; otherwise None."""
    if plan.dtype is None and not plan.untied:
        return None
    config = dict(checkpoint.config)
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.dequantised:
        config.pop("quantization_config", None)
    if plan.dtype is not None:
        name = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[
            plan.dtype
        ]
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
        if "torch_dtype" in config and "dtype" in config:
            config["dtype"] = name
    return config
