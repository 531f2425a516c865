"""What will be written: every shard's header, every tensor's place, and where its bytes come from.

Where nothing but values changes, the base's own header and offsets are kept to the byte. `--dtype`
and untying a head make a new header. Pure: headers in, plans out; reads no tensor and writes
nothing. Knows nothing of strategies or workers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError
from harness.merge.factors import Term
from harness.merge.storage import FLOATS
from harness.tensor_files import DTYPE_BYTES, TensorEntry, TensorFile

__all__ = ["MergePlan", "OutputTensor", "ShardPlan", "changed_config", "changed_index", "make_plan"]

_HEAD = "lm_head"
_FLOAT8_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, dtype, shape, start, end: as in a header; the range counts from the file's start.
        source: the base's tensor that it is made of, in `source_file`.
        terms: what is added; empty for a tensor that is copied or only converted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    source: TensorEntry
    source_file: TensorFile
    terms: tuple[Term, ...] = ()

    @property
    def copied(self) -> bool:
        """Whether the bytes are the base's own."""
        return not self.terms and self.dtype == self.source.dtype

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
    """

    shards: tuple[ShardPlan, ...]
    dtype: str | None
    untied: bool

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def merged(self) -> tuple[OutputTensor, ...]:
        """The tensors that adapters change."""
        return tuple(t for shard in self.shards for t in shard.tensors if t.terms)


def make_plan(
    checkpoint: CheckpointFiles, terms: Mapping[str, tuple[Term, ...]], *, dtype: str | None
) -> MergePlan:
    """Place every tensor of the output.

    Raises:
        InputError: a module that the base does not hold, another shape, a quantised target.
    """
    if checkpoint.config.get("quantization_config"):
        raise InputError(
            "is quantised (quantization_config); adding to quantised weights is not exact",
            where=checkpoint.folder / "config.json",
            remedy="merge into the unquantised base, then quantise the result",
        )
    embedding = _tied_embedding(checkpoint)
    by_tensor: dict[str, tuple[Term, ...]] = {}
    for module, found in terms.items():
        name = f"{module}.weight"
        if module == _HEAD and embedding is not None:
            name = f"{_HEAD}.weight"
        elif name not in checkpoint.places:
            raise InputError(
                f"has no tensor {name!r}, which {found[0].source.name} adapts",
                where=checkpoint.folder,
                remedy="give the base that the adapter was trained on; experts that transformers "
                "fuses while loading cannot be merged tensor by tensor",
            )
        else:
            _check_target(checkpoint, name, found)
        by_tensor[name] = found
    untied = embedding is not None and (f"{_HEAD}.weight" in by_tensor or embedding in by_tensor)
    shards = []
    for file in checkpoint.shards:
        wanted = [(entry.name, entry, file) for entry in file.entries.values()]
        if untied and embedding is not None:
            wanted = _with_own_head(wanted, checkpoint, embedding, file)
        shards.append(_place(file, wanted, by_tensor, dtype))
    return MergePlan(shards=tuple(shards), dtype=dtype, untied=untied)


def _tied_embedding(checkpoint: CheckpointFiles) -> str | None:
    """The embedding's tensor where the head shares it."""
    if not checkpoint.tied:
        return None
    ends = [name for name in checkpoint.places if name.endswith("embed_tokens.weight")]
    return ends[0] if len(ends) == 1 else None


def _with_own_head(
    wanted: list[tuple[str, TensorEntry, TensorFile]],
    checkpoint: CheckpointFiles,
    embedding: str,
    file: TensorFile,
) -> list[tuple[str, TensorEntry, TensorFile]]:
    """The head as a tensor made of the embedding: what a tied head is before anything is added."""
    head = f"{_HEAD}.weight"
    holder = checkpoint.places[embedding]
    if head in checkpoint.places:  # stored, but loaders overwrite it with the embedding
        return [
            (name, holder.entries[embedding], holder) if name == head else (name, entry, place)
            for name, entry, place in wanted
        ]
    return [*wanted, (head, holder.entries[embedding], holder)] if file is holder else wanted


def _check_target(checkpoint: CheckpointFiles, name: str, terms: Sequence[Term]) -> None:
    entry = checkpoint.entry(name)
    for term in terms:
        if entry.shape != term.shape:
            raise InputError(
                f"{term.module!r} needs a base weight of {list(term.shape)}, "
                f"{checkpoint.folder} has {list(entry.shape)}",
                where=term.source.files.tensors.path,
                remedy="give the base that the adapter was trained on",
            )
    if entry.dtype not in FLOATS:
        raise InputError(
            f"{name!r} is stored as {entry.dtype}, which is quantised", where=checkpoint.folder,
            remedy="merge into the unquantised base",
        )  # fmt: skip
    stem = name.removesuffix("weight")
    for suffix in _FLOAT8_SCALES:
        if stem + suffix in checkpoint.places:
            raise InputError(
                f"{name!r} comes with a scale ({suffix}): it is quantised",
                where=checkpoint.folder,
                remedy="merge into the unquantised base, then quantise the result",
            )


def _place(
    file: TensorFile,
    wanted: Sequence[tuple[str, TensorEntry, TensorFile]],
    terms: Mapping[str, tuple[Term, ...]],
    dtype: str | None,
) -> ShardPlan:
    def stored(entry: TensorEntry) -> str:
        return dtype if dtype and entry.dtype in FLOATS else entry.dtype

    same = [name for name, _, _ in wanted] == list(file.entries) and all(
        stored(entry) == entry.dtype and file.entries[name].dtype == entry.dtype
        for name, entry, _ in wanted
    )
    if same:
        with file.path.open("rb") as source:
            head = source.read(file.data_start)
    else:
        head = _head(
            [(name, stored(entry), entry.shape) for name, entry, _ in wanted], file.metadata
        )
    position = len(head)
    tensors = []
    for name, entry, place in wanted:
        size = entry.count * DTYPE_BYTES[stored(entry)]
        tensors.append(
            OutputTensor(
                name=name,
                dtype=stored(entry),
                shape=entry.shape,
                start=position,
                end=position + size,
                source=entry,
                source_file=place,
                terms=terms.get(name, ()),
            )
        )
        position += size
    return ShardPlan(name=file.path.name, head=head, tensors=tuple(tensors), size=position)


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
    places = {t.name: shard.name for shard in plan.shards for t in shard.tensors}
    metadata = dict(checkpoint.index.get("metadata") or {})
    metadata["total_size"] = sum(t.end - t.start for shard in plan.shards for t in shard.tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(t.count for s in plan.shards for t in s.tensors)
    return {**checkpoint.index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}


def changed_config(checkpoint: CheckpointFiles, plan: MergePlan) -> dict[str, Any] | None:
    """`config.json`, where dtype or tying changed; otherwise None."""
    if plan.dtype is None and not plan.untied:
        return None
    config = dict(checkpoint.config)
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.dtype is not None:
        name = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[
            plan.dtype
        ]
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
        if "torch_dtype" in config and "dtype" in config:
            config["dtype"] = name
    return config
