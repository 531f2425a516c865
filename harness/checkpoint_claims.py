"""What a base's config claims, held against its tensors.

transformers builds the model by `config.json` and fills it by name: what has no tensor is drawn
at random, what has no place is dropped, both with a log line at most. Knows nothing of adapters.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError, enough, quoted
from harness.files.config_fields import FieldReader
from harness.files.tensor_files import same_bytes

__all__ = ["FLOAT8", "PLAIN_FAMILIES", "check_claims"]

#: Families whose tensors are called as their modules are, one layer like the next.
PLAIN_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
#: 8-bit floats, which mean numbers with a scale beside them, or by themselves.
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_AGAIN = "copy the base model again, config and weights from one place"
_TRUST = "remove it; or pass --trust-remote-code if you trust this folder"


def check_claims(
    checkpoint: CheckpointFiles,
    faults: list[InputError],
    *,
    trust_remote_code: bool,
    plain_float8: bool = False,
) -> None:
    """Hold `config.json` against the tensors' names, shapes and dtypes; headers only.

    Layer counts, sizes and ties are judged for `PLAIN_FAMILIES`; what loaders would run, and
    quantised dtypes without a word about them, for every family.

    Args:
        plain_float8: whether 8-bit floats without scales are read as the numbers they are.
    """
    read = FieldReader(checkpoint.config, checkpoint.folder / "config.json")
    if not trust_remote_code:
        _refuse_code(read)
    family = read.text("model_type")
    if family is None:
        read.fault("model_type", "is missing", _AGAIN)
    quantised = read.table("quantization_config")
    if "quantization_config" in checkpoint.config and quantised:
        if not isinstance(quantised.get("quant_method"), str):
            read.fault("quantization_config", "names no quant_method", _AGAIN)
    else:
        known = _WEIGHT_DTYPES | FLOAT8 if plain_float8 else _WEIGHT_DTYPES
        _check_dtypes(checkpoint, known, faults)
    if family in PLAIN_FAMILIES and not quantised:
        _check_plain(checkpoint, read, faults)
    faults += read.faults


def _refuse_code(read: FieldReader) -> None:
    if read.raw.get("auto_map"):
        fault = "the model needs Python code from its own folder"
        read.fault("auto_map", fault, "pass --trust-remote-code if you trust that code")
    for key in ("custom_pipelines", "custom_generate"):
        if read.raw.get(key):
            read.fault(key, "makes loaders run code of the folder's", _TRUST)
    for key, value in read.raw.items():
        # A name with a slash is a kernel that transformers fetches from the hub and runs.
        if key.endswith("_implementation") and "/" in str(value):
            read.fault(key, f"{quoted(value)} would be fetched and run", _TRUST)


def _check_dtypes(
    checkpoint: CheckpointFiles, known: frozenset[str], faults: list[InputError]
) -> None:
    faults.extend(
        InputError(
            f"tensor {quoted(entry.name)}: is {entry.dtype}, and config.json has no "
            "quantization_config that says how to read it",
            where=shard.path,
            remedy=_AGAIN,
        )
        for shard in checkpoint.shards
        for entry in shard.entries.values()
        if entry.name.endswith("weight") and entry.dtype not in known and not enough(faults)
    )


def _check_plain(checkpoint: CheckpointFiles, read: FieldReader, faults: list[InputError]) -> None:
    raw = checkpoint.config
    keys = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size")  # fmt: skip
    before = len(read.faults)
    sizes = {key: read.count(key, raw.get(key)) for key in keys}
    heads = sizes["num_attention_heads"]
    pairs = read.count("num_key_value_heads", raw.get("num_key_value_heads") or heads)
    width = read.count("head_dim", raw.get("head_dim") or sizes["hidden_size"] // max(heads, 1))
    read.flag("tie_word_embeddings")
    if read.flag("is_encoder_decoder"):
        read.fault("is_encoder_decoder", "is true, and the tensors are a decoder's alone", _AGAIN)
    if len(read.faults) > before:
        return
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    expected = {_EMBEDDING: [sizes["vocab_size"], hidden], _NORM: [hidden]}
    if _HEAD in checkpoint.places or not checkpoint.tied:
        expected[_HEAD] = [sizes["vocab_size"], hidden]
    of_layer = {
        "self_attn.q_proj.weight": [heads * width, hidden],
        "self_attn.k_proj.weight": [pairs * width, hidden],
        "self_attn.v_proj.weight": [pairs * width, hidden],
        "self_attn.o_proj.weight": [hidden, heads * width],
        "mlp.gate_proj.weight": [middle, hidden],
        "mlp.up_proj.weight": [middle, hidden],
        "mlp.down_proj.weight": [hidden, middle],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }
    if read.raw.get("model_type") == "qwen3":
        of_layer |= {f"self_attn.{name}_norm.weight": [width] for name in "qk"}
    for name in _biased(read):
        of_layer[f"{name}.bias"] = of_layer[f"{name}.weight"][:1]
    layers = sizes["num_hidden_layers"]
    _check_attention(read, layers)
    present = {int(m[1]) for name in checkpoint.places if (m := _LAYER.fullmatch(name))}
    if len(present) != layers or max(present, default=-1) != layers - 1:
        read.fault(
            "num_hidden_layers",
            f"claims {layers} layers, the tensors hold {len(present)}"
            + (f" up to number {max(present)}" if present else ""),
            _AGAIN,
        )
    else:
        for layer in range(layers):
            expected |= {f"model.layers.{layer}.{name}": s for name, s in of_layer.items()}
        _check_dropped(checkpoint, set(of_layer), faults)
    for name, shape in expected.items():
        if not enough(faults):
            _check_shape(checkpoint, name, shape, faults)
    _check_tie(checkpoint, faults)


def _biased(read: FieldReader) -> list[str]:
    """The projections of a layer that have a bias: its absence is a row of zeros in silence."""
    family = read.raw["model_type"]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    if family == "qwen2":
        return attention[:3]
    found = attention if family in ("llama", "qwen3") and read.flag("attention_bias") else []
    if family == "llama" and read.flag("mlp_bias"):
        found = [*found, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    return found


def _check_dropped(checkpoint: CheckpointFiles, known: set[str], faults: list[InputError]) -> None:
    """Tensors of a layer that the model has no place for."""
    faults.extend(
        InputError(
            f"tensor {quoted(name)}: has no place in the model that config.json claims; "
            "transformers would drop it",
            where=shard.path,
            remedy=_AGAIN,
        )
        for name, shard in checkpoint.places.items()
        if (match := _LAYER.fullmatch(name)) is not None
        and match[2] not in known
        # Old checkpoints store what is computed from the config.
        and not match[2].endswith("rotary_emb.inv_freq")
        and not enough(faults)
    )


def _check_attention(read: FieldReader, layers: int) -> None:
    """The kind of each layer's attention: transformers finds out while it generates."""
    kinds = read.raw.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        count = f"{len(kinds)} kinds" if isinstance(kinds, list) else quoted(kinds)
        read.fault("layer_types", f"{count} for {layers} layers", _AGAIN)
        return
    window = read.raw.get("sliding_window")
    switched_off = str(read.raw["model_type"]).startswith("qwen") and not read.flag(
        "use_sliding_window"
    )
    if "sliding_attention" in kinds and (switched_off or not window):
        read.fault("layer_types", "names sliding_attention, and there is no sliding_window", _AGAIN)


def _check_shape(
    checkpoint: CheckpointFiles, name: str, shape: list[int], faults: list[InputError]
) -> None:
    shard = checkpoint.places.get(name)
    if shard is None:
        where: Path = checkpoint.folder
        instead = "fill it with zeros" if name.endswith(".bias") else "draw it at random"
        fault = f"tensor {quoted(name)}: is missing; transformers would {instead}"
    else:
        where, found = shard.path, list(shard.entries[name].shape)
        if found == shape:
            return
        fault = f"tensor {quoted(name)}: has shape {found}, config.json claims {shape}"
    faults.append(InputError(fault, where=where, remedy=_AGAIN))


def _check_tie(checkpoint: CheckpointFiles, faults: list[InputError]) -> None:
    """A tied head that is stored too must be the embedding: transformers drops it silently."""
    head, embedding = checkpoint.places.get(_HEAD), checkpoint.places.get(_EMBEDDING)
    if not checkpoint.tied or head is None or embedding is None:
        return
    if not same_bytes(head, head.entries[_HEAD], embedding, embedding.entries[_EMBEDDING]):
        faults.append(
            InputError(
                "tie_word_embeddings: is true, and lm_head.weight differs from the embedding; "
                "transformers would drop it",
                where=checkpoint.folder / "config.json",
                remedy="set it to false, or copy the base model again",
            )
        )
