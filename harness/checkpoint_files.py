"""A base checkpoint's folder: config, shards, index, and its tensors as views of the files.

The neighbour of `harness.adapter_files`. Follows the layout that transformers writes
(`config.json`, `model.safetensors` or shards with `model.safetensors.index.json`). Reads headers
only, without torch; knows nothing of adapters, stacks or live models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.strict_json import read_json_object
from harness.tensor_files import TensorEntry, TensorFile, read_tensor_file

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX_NAME", "SINGLE_NAME", "CheckpointFiles", "checkpoint_digest", "read_checkpoint"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PREFIXES = ("model.", "transformer.")
_HEADS = frozenset({"lm_head", "embed_out", "output"})
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_GENERATION_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """A sound base checkpoint.

    Attributes:
        config: `config.json`.
        shards: the weight files, in the order of the index (one for a single file).
        index: the index file's contents, or None for a single file.
        places: which shard holds each tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[TensorFile, ...]
    index: Mapping[str, Any] | None
    places: Mapping[str, TensorFile]

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight (`tie_word_embeddings`)."""
        return bool(self.config.get("tie_word_embeddings", False))

    def entry(self, name: str) -> TensorEntry:
        """The header entry of tensor *name*; raises `InputError` if there is none."""
        return self._shard(name).entries[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor *name* as a view of the mapped shard; raises `InputError` if there is none."""
        return self._shard(name).tensor(name)

    def weight_name(self, module: str) -> str | None:
        """The tensor that holds *module*'s weight; a tied head's is the embedding's."""
        found = self.stored_name(f"{module}.weight")
        if found is None and self.tied and module in _HEADS:
            return self.embedding_name
        return found

    @property
    def embedding_name(self) -> str | None:
        """The token embedding's tensor, where its name is one that transformers uses."""
        ends = [name for name in self.places if name.endswith(_EMBEDDINGS)]
        return ends[0] if len(ends) == 1 else None

    def stored_name(self, name: str) -> str | None:
        """The stored tensor that transformers loads as *name*: it adds or drops the prefix of the
        bare model while loading (the hub's GPT-2 stores `h.0…` for `transformer.h.0…`)."""
        dropped = [name.removeprefix(prefix) for prefix in _PREFIXES]
        added = [prefix + name for prefix in _PREFIXES]
        candidates = [name, *dropped, *added]
        return next((candidate for candidate in candidates if candidate in self.places), None)

    def _shard(self, name: str) -> TensorFile:
        shard = self.places.get(name)
        if shard is None:
            raise InputError(f"holds no tensor {name!r}", where=self.folder)
        return shard


def read_checkpoint(folder: Path) -> CheckpointFiles:
    """Read and check a base checkpoint's headers.

    Raises:
        InputError: no folder or config; only pickles; a missing, broken or doubled shard; an
            index that names a tensor its shard does not hold, or points outside the folder.
    """
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "no such folder"
        raise InputError(fault, where=folder, remedy="give the base model's folder")
    config = read_json_object(
        folder / "config.json",
        what="config.json",
        remedy="give the folder of a model saved by transformers' save_pretrained",
    )
    if (folder / "adapter_config.json").exists():
        raise InputError(
            "an adapter lies in the base's folder; transformers would apply it unasked",
            where=folder / "adapter_config.json",
            remedy="move the adapter into a folder of its own",
        )
    if (folder / INDEX_NAME).exists():
        index = read_json_object(folder / INDEX_NAME, what=INDEX_NAME)
        shards, places = _indexed(folder, index)
    else:
        index = None
        if not (folder / SINGLE_NAME).exists() and (folder / "pytorch_model.bin").exists():
            raise InputError(
                "is a pickle, which can run code when loaded, and is not read",
                where=folder / "pytorch_model.bin",
                remedy="save the model once with save_pretrained(safe_serialization=True)",
            )
        single = read_tensor_file(
            folder / SINGLE_NAME, what=SINGLE_NAME, remedy="copy the base model again"
        )
        shards, places = (single,), dict.fromkeys(single.entries, single)
    return CheckpointFiles(folder=folder, config=config, shards=shards, index=index, places=places)


def _indexed(
    folder: Path, index: Mapping[str, Any]
) -> tuple[tuple[TensorFile, ...], dict[str, TensorFile]]:
    path = folder / INDEX_NAME
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", where=path, remedy="copy the base model again")
    shards: dict[str, TensorFile] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"names {name!r}, which is not a file beside it", where=path)
        shards[name] = read_tensor_file(
            folder / name, what="a shard that the index names", remedy="copy the base model again"
        )
    places: dict[str, TensorFile] = {}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].entries:
            raise InputError(
                f"places {tensor!r} in {name}, which does not hold it",
                where=path,
                remedy="copy the base model again",
            )
        places[tensor] = shards[name]
    for shard in shards.values():
        for tensor in shard.entries:
            if tensor not in places:
                raise InputError(
                    f"leaves out {tensor!r}, which lies in {shard.path.name}; loaders would "
                    "initialise it at random",
                    where=path,
                    remedy="copy the base model again",
                )
            if places[tensor] is not shard:
                raise InputError(
                    f"{tensor!r} lies in both {shard.path.name} and {places[tensor].path.name}",
                    where=path,
                    remedy="copy the base model again",
                )
    return tuple(shards.values()), places


def checkpoint_digest(checkpoint: CheckpointFiles) -> str:
    """SHA-256 (hex) over the weights' and the generation files' contents, by file name.

    Reads every byte of the checkpoint: seconds for gigabytes.
    """
    digest = hashlib.sha256()
    names = sorted(
        {shard.path.name for shard in checkpoint.shards}
        | {name for name in _GENERATION_FILES if (checkpoint.folder / name).is_file()}
    )
    for name in names:
        with (checkpoint.folder / name).open("rb") as file:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
