"""Seeded tiny random models, tokenizers and adapters, written as the folders that users have.

Random weights are enough wherever only the algebra matters; every `lora_B` is non-zero, so each
adapter changes the logits. Everything follows from the seed. Knows nothing of what the folders are
used for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = [
    "ALL_LINEAR",
    "FAMILIES",
    "AdapterSpec",
    "TinyStack",
    "tiny_adapter",
    "tiny_base",
    "tiny_model",
    "tiny_stack",
]

#: The linear modules of an attention block with a gated MLP.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: The families that a tiny base can have.
FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What one random adapter looks like; fields as in `peft.LoraConfig`.

    Attributes:
        size: the standard deviation of the entries of B; A is drawn as PEFT draws it.
        options: more arguments for `LoraConfig` (`rank_pattern`, `fan_in_fan_out`, …).
    """

    rank: int = 4
    alpha: float = 8
    targets: Sequence[str] | str = ALL_LINEAR
    rslora: bool = False
    size: float = 0.05
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyStack:
    """Where a tiny stack was written: a base folder and adapter folders by name."""

    base: Path
    adapters: Mapping[str, Path]


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
    )


def tiny_model(
    family: str = "qwen3",
    *,
    seed: int = 0,
    tied: bool = False,
    layers: int = 2,
    hidden: int = 32,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> torch.nn.Module:
    """A seeded random causal language model with grouped-query attention (4 heads, 2 of KV).

    Args:
        family: one of `FAMILIES`.
        config: more values for the family's configuration class.

    Raises:
        ValueError: an unknown family.
    """
    tokenizer = _tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # A wider draw than 0.02: near-flat logits would make every comparison a rounding tie.
        "initializer_range": 0.15,
    }
    if family in ("qwen3", "qwen3_moe"):
        values["head_dim"] = hidden // 4
    if family == "qwen3_moe":
        values |= {"moe_intermediate_size": hidden, "num_experts": 4, "num_experts_per_tok": 2}
    classes = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }
    if family not in classes:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    config_class, model_class = classes[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(values | config)))
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    built: torch.nn.Module = model.to(dtype).eval()
    return built


def tiny_base(folder: Path, family: str = "qwen3", **arguments: Any) -> Path:
    """Write a tiny base checkpoint with its tokenizer to *folder*; arguments as `tiny_model`.

    `max_shard_size` (e.g. `"50KB"`) splits it into shards.
    """
    shard_size = arguments.pop("max_shard_size", "1GB")
    model: Any = tiny_model(family, **arguments)
    model.save_pretrained(folder, max_shard_size=shard_size)
    _tokenizer().save_pretrained(folder)
    return folder


def tiny_adapter(folder: Path, base: Path, spec: AdapterSpec | None = None, *, seed: int) -> Path:
    """Write a random adapter for the base in folder *base* to *folder*."""
    from transformers import AutoModelForCausalLM

    spec = spec or AdapterSpec()
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = spec.targets
    if model.config.model_type == "qwen3_moe" and not isinstance(targets, str):
        # The experts are fused parameters, not modules.
        targets = [target for target in targets if target in _ATTENTION]
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=spec.rslora,
        task_type="CAUSAL_LM",
        **(spec.options or {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                drawn = "lora_B" in name or "lora_embedding_" in name
                if drawn or ("lora_" in name and not bool(parameter.any())):
                    parameter.normal_(std=spec.size)
                if "lora_" in name:
                    parameter.data = parameter.data.to(spec.dtype)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def tiny_stack(
    folder: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    adapters: Mapping[str, AdapterSpec] | None = None,
    **base: Any,
) -> TinyStack:
    """Write a base and its adapters (a *style* of rank 4 and an *instruct* of rank 8 by default).

    The same arguments give the same bytes.
    """
    specs = adapters or {
        "style": AdapterSpec(rank=4, alpha=8),
        "instruct": AdapterSpec(rank=8, alpha=8, targets=("q_proj", "v_proj", "down_proj")),
    }
    base_folder = tiny_base(folder / "base", family, seed=seed, **base)
    return TinyStack(
        base=base_folder,
        adapters={
            name: tiny_adapter(folder / name, base_folder, spec, seed=seed * 1000 + number)
            for number, (name, spec) in enumerate(specs.items(), start=1)
        },
    )
