"""Qwen3-shaped checkpoints and adapters of any size, for measuring: random, but written in seconds.

Plausible to loaders (config, shards, index, PEFT folders); the weights are noise. Needs numpy
alone. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_sized_adapter", "write_sized_base", "write_sized_tokenizer"]

_HIDDEN, _WIDE, _KV, _VOCABULARY, _HEAD = 2048, 6144, 1024, 151936, 128
_MODULES = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_KV, _HIDDEN),
    "self_attn.v_proj": (_KV, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_WIDE, _HIDDEN),
    "mlp.up_proj": (_WIDE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _WIDE),
}


def write_sized_base(folder: Path, *, layers: int, vocabulary: int = _VOCABULARY) -> Path:
    """A tied bfloat16 Qwen3 of *layers* layers at the widths of Qwen3-1.7B, 100 MB a layer, in
    shards of about 400 MB."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in _tensors(layers, vocabulary):
        bytes_ = 2 * int(np.prod(shape))
        if size and size + bytes_ > 420_000_000:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        _write(folder / file, tensors, "BF16", seed=number, size=0.02)
    total = sum(2 * int(np.prod(s)) for t in shards for s in t.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    end = min(151643, vocabulary - 1)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
        "hidden_size": _HIDDEN, "intermediate_size": _WIDE, "num_hidden_layers": layers,
        "num_attention_heads": _HIDDEN // _HEAD, "num_key_value_heads": _KV // _HEAD,
        "head_dim": _HEAD, "vocab_size": vocabulary, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "eos_token_id": end, "bos_token_id": end,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


def write_sized_tokenizer(folder: Path, *, vocabulary: int = _VOCABULARY) -> None:
    """Beside a base: `tokenizer.json` and a template as large as Qwen3's (11 MB), for what reading
    them costs; no text can be tokenized with it."""
    words = [f"{number * 2654435761 % 2**32:08x}"[: 3 + number % 6] + f"{number:x}" for number
             in range(vocabulary - 293)]  # fmt: skip
    added = [
        {"id": len(words) + number, "content": f"<|{number}|>", "special": True, "lstrip": False,
         "rstrip": False, "single_word": False, "normalized": False}
        for number in range(26)
    ]  # fmt: skip
    model = {
        "type": "BPE", "vocab": {word: number for number, word in enumerate(words)},
        "merges": [[word[:2], word[2:]] for word in words],
    }  # fmt: skip
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|0|>{{ message.role }}\n{{ message.content }}<|1|>\n"
        "{% endfor %}" + "{# as long as others #}" * 200
    )


def write_sized_adapter(folder: Path, base: Path, *, layers: int, rank: int, seed: int) -> Path:
    """An all-linear float32 adapter for a base of `write_sized_base`."""
    folder.mkdir(parents=True)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for module, (rows, columns) in _MODULES.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = (rank, columns)
            tensors[f"{stem}.lora_B.weight"] = (rows, rank)
    _write(folder / "adapter_model.safetensors", tensors, "F32", seed=seed, size=0.01)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "base_model_name_or_path": str(base), "bias": "none", "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in _MODULES}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def _tensors(layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, _HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        yield f"{stem}input_layernorm.weight", (_HIDDEN,)
        for module, shape in _MODULES.items():
            yield f"{stem}{module}.weight", shape
        yield f"{stem}self_attn.q_norm.weight", (_HEAD,)
        yield f"{stem}self_attn.k_norm.weight", (_HEAD,)
        yield f"{stem}post_attention_layernorm.weight", (_HIDDEN,)
    yield "model.norm.weight", (_HIDDEN,)


def _write(
    path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, *, seed: int, size: float
) -> None:
    width = 2 if dtype == "BF16" else 4
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = np.random.default_rng(seed)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 22)
                numbers = generator.standard_normal(count, dtype=np.float32) * np.float32(size)
                data = (numbers.view(np.uint32) >> 16).astype(np.uint16) if width == 2 else numbers
                file.write(data.data)
                left -= count
