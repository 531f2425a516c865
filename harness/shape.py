"""Shapes without weights: what `random:qwen3-8b` means, and any `config.json` behind `random:`.

Latency does not depend on the values of the weights, so a base can be measured that nobody has
downloaded: the published shape, filled with seeded random numbers. Such a base says nothing
sensible and is marked wherever it appears. Knows nothing of torch or of engines.

Sources: the `config.json` files of Qwen/Qwen3-{0.6B,1.7B,4B,8B,14B,32B} on the Hugging Face hub
(Qwen3 technical report, arXiv:2505.09388).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.files.file_kinds import is_folder, is_there, whole_path
from harness.files.strict_json import read_json_object

__all__ = ["NAMED_SHAPES", "RANDOM_PREFIX", "Shape", "is_random", "read_shape"]

RANDOM_PREFIX = "random:"

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 40960, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 151936, "bos_token_id": 151643,
    "eos_token_id": 151645,
}  # fmt: skip


def _qwen3(hidden: int, wide: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        **_QWEN3,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


#: The published values of `config.json`, by the name after `random:`.
NAMED_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a model is built from when there are no weights.

    Attributes:
        name: a name of `NAMED_SHAPES`, or the file as given.
        config: the contents of `config.json`.
    """

    name: str
    config: Mapping[str, Any]


def is_random(source: str) -> bool:
    """Whether *source* asks for a shape instead of a checkpoint."""
    return source.lower().startswith(RANDOM_PREFIX)


def read_shape(source: str, *, where: str, folder: Path) -> tuple[Shape, Path]:
    """The shape that `random:NAME` or `random:PATH` asks for, and the file it came from.

    A name stands for published values and for no file: the path then is *source* itself. A path
    (relative to *folder*) may be a `config.json` or a folder that holds one.

    Raises:
        InputError: an unknown name and no such file, a file that is no model's config.
    """
    wanted = source[len(RANDOM_PREFIX) :]
    named = NAMED_SHAPES.get(wanted.lower())
    if named is not None:
        return Shape(name=wanted.lower(), config=named), Path(source)
    path = whole_path(wanted, folder)
    file = path / "config.json" if is_folder(path) else path
    if not wanted or not is_there(file):
        near = difflib.get_close_matches(wanted.lower(), NAMED_SHAPES, n=1)
        raise InputError(
            f"{source!r} is neither a known shape nor a config.json",
            where=where,
            remedy=f"did you mean random:{near[0]}?"
            if near
            else f"use random:PATH/config.json, or one of {', '.join(NAMED_SHAPES)}",
        )
    config = read_json_object(file, what="config.json", remedy="give a model's config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError("names no model_type", where=file, remedy="give a model's config.json")
    return Shape(name=wanted, config=config), file
