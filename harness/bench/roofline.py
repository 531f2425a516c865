"""The least work of a decode step and of a prefill: bytes to be read, floating-point operations.

Arithmetic alone, from a model's `config.json` and its adapters' sizes; docs/latency.md has it in
words. Counts what no implementation can avoid: each weight once a step, each row's keys and values
once, two operations a weight and token. Knows nothing of torch, devices or measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.bench.cells import Work

__all__ = ["ModelArithmetic", "arithmetic_of", "balance_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArithmetic:
    """The numbers of a dense decoder.

    Attributes:
        layer_parameters: of all layers and the final norm; the embedding and the head left out.
        head_parameters: of the output head (the embedding's, where they are tied).
        embedding_parameters: of the embedding table.
        linear_parameters: of `layer_parameters`, those in matrix products.
        kv_values: key and value numbers that one token adds to the cache, over all layers.
        attention_width: heads × head size × layers.
        itemsize: bytes of a weight and of a cache entry.
    """

    layer_parameters: int
    linear_parameters: int
    head_parameters: int
    embedding_parameters: int
    tied: bool
    kv_values: int
    attention_width: int
    itemsize: int

    @property
    def parameters(self) -> int:
        """All parameters as checkpoints count them."""
        head = 0 if self.tied else self.head_parameters
        return self.layer_parameters + self.embedding_parameters + head

    @property
    def step_weight_bytes(self) -> int:
        """Weights that every decode step reads: all but the embedding table, of which a step
        reads a row a token."""
        return (self.layer_parameters + self.head_parameters) * self.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one position of one row takes."""
        return self.kv_values * self.itemsize

    def decode_step(
        self, *, rows: int, context: float, adapter_bytes: float = 0, adapter_parameters: int = 0
    ) -> Work:
        """One token for each of *rows*, each with *context* positions in its cache."""
        per_token = 2 * (self.linear_parameters + self.head_parameters + adapter_parameters)
        attention = 4 * self.attention_width * context
        return Work(
            bytes_read=self.step_weight_bytes
            + adapter_bytes
            + rows * context * self.kv_bytes_per_token,
            flops=rows * (per_token + attention),
        )

    def prefill(
        self, *, rows: int, length: int, adapter_bytes: float = 0, adapter_parameters: int = 0
    ) -> Work:
        """*length* tokens of each of *rows*, the head at the last position alone.

        Attention is causal: position i looks at i positions.
        """
        per_token = 2 * (self.linear_parameters + adapter_parameters)
        attention = 4 * self.attention_width * length * (length + 1) / 2
        return Work(
            bytes_read=self.step_weight_bytes + adapter_bytes,
            flops=rows * (length * per_token + attention + 2 * self.head_parameters),
        )


def arithmetic_of(config: Mapping[str, Any], *, itemsize: int) -> ModelArithmetic | None:
    """The numbers of a dense decoder with grouped-query attention and a gated MLP (Llama, Mistral,
    Qwen2, Qwen3 and their like); None for another architecture, whose work is then not stated.

    Args:
        config: `config.json`.
        itemsize: bytes of a weight, 2 for bfloat16.
    """
    biases = {"qwen2": 1, "qwen3": 0, "llama": 0, "mistral": 0}
    kind = config.get("model_type")
    if kind not in biases or config.get("quantization_config"):
        return None
    try:
        hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        vocabulary = int(config["vocab_size"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    query, keys = heads * head, kv_heads * head
    linear = hidden * (2 * query + 2 * keys) + 3 * hidden * wide
    norms = 2 * hidden + (2 * head if kind == "qwen3" else 0)
    bias = (query + 2 * keys) * (biases[kind] or int(bool(config.get("attention_bias", False))))
    if kind != "qwen2" and config.get("attention_bias"):
        bias += hidden
    return ModelArithmetic(
        layer_parameters=layers * (linear + norms + bias) + hidden,
        linear_parameters=layers * linear,
        head_parameters=vocabulary * hidden,
        embedding_parameters=vocabulary * hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
        kv_values=2 * layers * keys,
        attention_width=layers * query,
        itemsize=itemsize,
    )


def balance_tokens(*, bandwidth: float, rate: float, itemsize: int) -> float:
    """Tokens in flight below which a decode step is bound by memory: FLOP/s over bytes/s, for two
    operations a weight of *itemsize* bytes."""
    return rate / bandwidth * itemsize / 2
