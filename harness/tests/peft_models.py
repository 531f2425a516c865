"""Tiny random models of the families that PEFT's own tests run LoRA on, in memory."""

from __future__ import annotations

from typing import Any

FAMILIES = (
    "opt", "gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma3", "bloom",
    "qwen3_moe", "llama4", "gpt_oss",
)  # fmt: skip


def build(family: str, *, tied: bool = False) -> Any:
    """A model of *family* with the architecture's own layers; the same weights every time."""
    import torch
    import transformers as t

    sizes = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    old = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    new = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    mixture = {"num_local_experts": 3, "num_experts_per_tok": 1, "num_hidden_layers": 2}
    made: dict[str, Any] = {
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(
            **sizes, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**sizes, **old)),
        "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(**sizes, **old, rotary_dim=4)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
            **sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64,
        )),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(
            **sizes, hidden_size=32, n_layer=5, n_head=4,
        )),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes, **new)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, **new)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, **new)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            **sizes, **new | {"tie_word_embeddings": True}, head_dim=8,
        )),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
            **sizes, **new | {"num_hidden_layers": 2}, head_dim=8, num_experts=3,
            num_experts_per_tok=1, moe_intermediate_size=24,
        )),
        "llama4": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(
            **sizes, **new | mixture, head_dim=8, intermediate_size_mlp=48,
            interleave_moe_layer_step=1,
        )),
        "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(
            **sizes, **new | mixture, head_dim=8,
        )),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made[family]().eval()
