"""A base checkpoint's folder: config, shards, index, and its tensors as views of the files.

The neighbour of `harness.adapter_files`. Follows the layout that transformers writes
(`config.json`, `model.safetensors` or shards with `model.safetensors.index.json`). Reads headers
only, without torch; knows nothing of adapters, stacks or live models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, combined, enough, gathering, quoted
from harness.files.file_kinds import is_folder, is_there
from harness.files.strict_json import MAX_JSON_BYTES, read_json_object
from harness.files.tensor_files import TensorEntry, TensorFile, read_tensor_file

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX_NAME", "SINGLE_NAME", "CheckpointFiles", "checkpoint_digest", "read_checkpoint"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PREFIXES = ("model.", "transformer.")
_HEADS = frozenset({"lm_head", "embed_out", "output"})
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
#: Kinds of model that transformers ties where `config.json` does not say: it leaves a class's own
#: default out, so that Gemma's and GPT-2's folders on the hub have neither the key nor a head.
_TIED_UNSAID = frozenset(
    {"bloom", "cohere", "cohere2", "ctrl", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3",
     "gemma3_text", "gemma3n", "gemma3n_text", "gpt2", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2",
     "mpt", "openai-gpt", "opt", "recurrent_gemma", "smollm3", "starcoder2", "xglm"}
)  # fmt: skip
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_AGAIN = "copy the base model again"
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
        unsaid = self.config.get("model_type") in _TIED_UNSAID
        return bool(self.config.get("tie_word_embeddings", unsaid))

    def refuse_quantised(self) -> None:
        """Raise `InputError` for weights that are stored quantised: they are nobody's truth."""
        said = self.config.get("quantization_config")
        if said:
            method = said.get("quant_method") if isinstance(said, Mapping) else said
            raise InputError(
                f"quantization_config: the base is quantised ({quoted(method)}); a live model "
                "cannot be held against such weights",
                where=self.folder / "config.json",
                remedy="give the base that was not quantised, and load it in bfloat16 or float32",
            )

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


def read_checkpoint(folder: Path, *, faults: list[InputError] | None = None) -> CheckpointFiles:
    """Read and check a base checkpoint's headers; all its faults at once.

    Args:
        faults: where some weights can be read, faults are added here instead of raised.

    Raises:
        InputError: no folder or config; an adapter among the base's files; only pickles; a
            missing, broken, doubled or stray shard; two checkpoints in one folder; an index that
            names a tensor its shard does not hold, or points outside the folder; a config that
            sends transformers to other weights.
    """
    if not is_folder(folder):
        fault = "is not a folder" if is_there(folder) else "no such folder"
        raise InputError(fault, where=folder, remedy="give the base model's folder")
    found: list[InputError] = []
    config: dict[str, Any] = {}
    index = None
    shards: dict[str, TensorFile] = {}
    places: dict[str, TensorFile] = {}
    alone = not is_there(folder / "config.json")
    if is_there(folder / "adapter_config.json"):
        found.append(
            InputError(
                "this is an adapter's folder, not a base's"
                if alone
                else "an adapter lies in the base's folder; transformers would apply it unasked",
                where=folder / "adapter_config.json",
                remedy="give the base model's folder"
                if alone
                else "move the adapter into a folder of its own",
            )
        )
        if alone:
            raise combined(found)
    with gathering(found):
        config = read_json_object(
            folder / "config.json",
            what="config.json",
            remedy="give the folder of a model saved by transformers' save_pretrained",
        )
    _check_named_weights(config, folder, found)
    if is_there(folder / INDEX_NAME):
        with gathering(found):
            index = read_json_object(folder / INDEX_NAME, what=INDEX_NAME, limit=MAX_JSON_BYTES)
            shards, places = _indexed(folder, index, found)
    else:
        with gathering(found):
            single = _single(folder)
            shards, places = {SINGLE_NAME: single}, dict.fromkeys(single.entries, single)
    if shards:
        named = set(shards) | set(map(str, (index or {}).get("weight_map", {}).values()))
        _check_strays(folder, named, index is not None, found)
    if found and (faults is None or not shards):
        raise combined(found)
    if faults is not None:
        faults += found
    return CheckpointFiles(
        folder=folder, config=config, shards=tuple(shards.values()), index=index, places=places
    )


def _check_named_weights(config: Mapping[str, Any], folder: Path, found: list[InputError]) -> None:
    """transformers loads the file that `transformers_weights` names, whatever else lies there."""
    named = config.get("transformers_weights")
    read = INDEX_NAME if is_there(folder / INDEX_NAME) else SINGLE_NAME
    if named is not None and named != read:
        found.append(
            InputError(
                f"transformers_weights: names {quoted(named)}, which transformers would load "
                f"instead of {read}",
                where=folder / "config.json",
                remedy=f"remove it, and keep the weights in {read}",
            )
        )


def _single(folder: Path) -> TensorFile:
    path = folder / SINGLE_NAME
    if not is_there(path):
        if is_there(folder / "pytorch_model.bin"):
            raise InputError(
                "is a pickle, which can run code when loaded, and is not read",
                where=folder / "pytorch_model.bin",
                remedy="save the model once with save_pretrained(safe_serialization=True)",
            )
        if any(_SHARD.fullmatch(name) for name in _names(folder)):
            raise InputError(
                "is missing, and shards are there",
                where=folder / INDEX_NAME,
                remedy="copy the index beside its shards",
            )
        inside = [name for name in _names(folder) if is_there(folder / name / "config.json")]
        if inside:
            raise InputError(
                f"holds no {SINGLE_NAME}",
                where=folder,
                remedy=f"give {folder / sorted(inside)[-1]}",
            )
    return read_tensor_file(path, what=SINGLE_NAME, remedy=_AGAIN)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _check_strays(
    folder: Path, named: Collection[str], indexed: bool, found: list[InputError]
) -> None:
    """Weights that transformers would, or would not, read instead of those that were read."""
    for name in _names(folder):
        if name in named or enough(found):
            continue
        if name == SINGLE_NAME and indexed:
            fault = f"lies beside {INDEX_NAME}, which does not name it: two checkpoints in a folder"
        elif _SHARD.fullmatch(name):
            fault = (
                f"is a shard that {INDEX_NAME} does not name"
                if indexed
                else f"is a shard beside {SINGLE_NAME}: two checkpoints in a folder"
            )
        else:
            continue
        found.append(
            InputError(fault, where=folder / name, remedy="keep one checkpoint in the folder")
        )


def _indexed(
    folder: Path, index: Mapping[str, Any], found: list[InputError]
) -> tuple[dict[str, TensorFile], dict[str, TensorFile]]:
    path = folder / INDEX_NAME
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("weight_map: is missing or empty", where=path, remedy=_AGAIN)
    shards: dict[str, TensorFile] = {}
    broken: set[object] = set()
    for name in dict.fromkeys(value for value in weight_map.values() if isinstance(value, str)):
        if enough(found):
            break
        with gathering(found):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"weight_map: names {quoted(name)}, which is no safetensors file beside it",
                    where=path,
                    remedy=_AGAIN,
                )
            shards[name] = read_tensor_file(
                folder / name, what="a shard that the index names", remedy=_AGAIN
            )
    places: dict[str, TensorFile] = {}
    for tensor, name in weight_map.items():
        if enough(found):
            break
        if not isinstance(name, str):
            if not broken:
                found.append(
                    InputError(
                        f"{quoted(tensor)}: lies in {quoted(name)}, which is no file's name",
                        where=path,
                        remedy=_AGAIN,
                    )
                )
            broken.add(tensor)
            continue
        if name not in shards:
            continue  # told of already
        if tensor not in shards[name].entries:
            fault = f"tensor {quoted(tensor)}: is said to lie in {name}, which does not hold it"
            found.append(InputError(fault, where=path, remedy=_AGAIN))
        else:
            places[tensor] = shards[name]
    for shard in shards.values():
        for tensor in shard.entries:
            if weight_map.get(tensor) == shard.path.name or enough(found):
                continue
            if tensor not in weight_map:
                fault = (
                    f"tensor {quoted(tensor)}: is left out, and lies in {shard.path.name}; "
                    "loaders would initialise it at random"
                )
            else:
                fault = (
                    f"tensor {quoted(tensor)}: lies in both {shard.path.name} and "
                    f"{quoted(weight_map[tensor])}"
                )
            found.append(InputError(fault, where=path, remedy=_AGAIN))
    return shards, places


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
