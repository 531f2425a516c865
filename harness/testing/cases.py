"""Cases that tests are drawn from: adapter configurations that are plain LoRA, and that are not.

Values only; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NOT_ADDITIVE", "PLAIN_LORA", "label"]

#: Arguments of `harness.testing.tiny.AdapterSpec`, after the LoRA rows for causal models in PEFT's
#: own test matrix (tests/test_decoder_models.py and tests/test_custom_models.py).
PLAIN_LORA: Sequence[Mapping[str, Any]] = (
    {"rank": 8, "alpha": 32, "targets": ("q_proj", "v_proj")},
    {"rank": 1, "alpha": 1, "targets": ("o_proj",)},
    {"rank": 16, "alpha": 3.5},
    {"rank": 8, "alpha": 16, "rslora": True},
    {"rank": 4, "options": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}}},
    {"rank": 4, "options": {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}}},
    {
        "rank": 4,
        "rslora": True,
        "options": {"rank_pattern": {"down_proj": 9}, "alpha_pattern": {"down_proj": 2}},
    },
    {"rank": 4, "targets": ("q_proj",), "options": {"layers_to_transform": [1]}},
    {"rank": 4, "targets": r".*\.(k|v)_proj"},
    {"rank": 4, "targets": "all-linear"},
    {"rank": 4, "targets": "all-linear", "options": {"exclude_modules": ["down_proj"]}},
    {"rank": 4, "targets": ("q_proj", "lm_head")},
    {"rank": 4, "options": {"init_lora_weights": "gaussian"}},
    {"rank": 4, "options": {"init_lora_weights": "orthogonal"}},
    {"rank": 4, "options": {"lora_dropout": 0.3}},
)

#: Changes to a plain `adapter_config.json` that make it more than `W + s·B·A`, by the key at fault.
NOT_ADDITIVE: Mapping[str, Mapping[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias=all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [0]},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "use_qalora": {"use_qalora": True},
    "init_lora_weights=pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights=olora": {"init_lora_weights": "olora"},
    "megatron_config": {"megatron_config": {"a": 1}},
}


def label(case: Mapping[str, Any]) -> str:
    """A short test id for a case."""
    return "-".join(
        f"{key}={value}" for key, value in case.items() if isinstance(value, int | float | str)
    )
