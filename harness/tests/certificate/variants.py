"""Every LoRA variant that PEFT 0.21 can save, and what the certificate answers.

Row ids are those of the table in docs/certificate.md.
"""

from __future__ import annotations

from typing import Any

#: Rows that are additive and proven: options for the adapter, and for the base where it matters.
ADDITIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "rank_pattern": {"options": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}}},
    "alpha_pattern": {"options": {"alpha_pattern": {"v_proj": 3}}},
    "rank_pattern, alpha_pattern and rslora": {
        "rslora": True,
        "options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    },
    "different ranks and target modules": {"rank": 3, "targets": ("k_proj", "gate_proj")},
    "all-linear": {"targets": "all-linear"},
    "regular expression as target_modules": {"targets": r".*\.(q|v)_proj"},
    "lm_head": {"targets": ("q_proj", "lm_head")},
    "embed_tokens": {"targets": ("q_proj", "embed_tokens")},
    "embed_tokens, tied": {"targets": ("q_proj", "embed_tokens"), "tied": True},
    "lm_head, tied": {"targets": ("q_proj", "lm_head"), "tied": True},
    "Conv1D (fan_in_fan_out)": {
        "family": "gpt2", "targets": ("c_attn", "c_proj"), "options": {"fan_in_fan_out": True}
    },
    "layers_to_transform": {"options": {"layers_to_transform": [1], "layers_pattern": "layers"}},
    "exclude_modules": {"targets": "all-linear", "options": {"exclude_modules": ["k_proj"]}},
    "init_lora_weights: gaussian": {"options": {"init_lora_weights": "gaussian"}},
    "init_lora_weights: orthogonal": {"options": {"init_lora_weights": "orthogonal"}},
    "init_lora_weights: mica": {"options": {"init_lora_weights": "mica"}},
    "init_lora_weights: eva": {"options": {"init_lora_weights": "eva"}},
    "lora_dropout": {"options": {"lora_dropout": 0.1}},
    "ensure_weight_tying": {
        "targets": ("q_proj", "embed_tokens"), "tied": True,
        "options": {"ensure_weight_tying": True},
    },
    "attention of a mixture of experts": {"family": "qwen3_moe", "targets": ("q_proj", "o_proj")},
}  # fmt: skip

#: Rows that are refused: keys of adapter_config.json, and words of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "its deltas do not add up"),
    "lora_bias": ({"lora_bias": True}, "a bias that merging cannot hold"),
    "bias: all": ({"bias": "all"}, "leak into other modes"),
    "bias: lora_only": ({"bias": "lora_only"}, "leak into other modes"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "replaces whole base modules"),
    "target_parameters (experts)": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]}, "parameters, not modules"
    ),
    "trainable_token_indices": ({"trainable_token_indices": [1, 2]}, "replaces embedding rows"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "copied layers"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "switched on by the prompt's tokens"),
    "init_lora_weights: pissa": ({"init_lora_weights": "pissa"}, "loading moves the base"),
    "init_lora_weights: pissa_niter": (
        {"init_lora_weights": "pissa_niter_4"}, "loading moves the base"
    ),
    "init_lora_weights: olora": ({"init_lora_weights": "olora"}, "loading moves the base"),
    "init_lora_weights: corda": ({"init_lora_weights": "corda"}, "loading moves the base"),
    "init_lora_weights: loftq": ({"init_lora_weights": "loftq"}, "loading moves the base"),
    "init_lora_weights: lora_ga": ({"init_lora_weights": "lora_ga"}, "loading moves the base"),
    "QALoRA": ({"use_qalora": True}, "pools its input"),
    "BD-LoRA": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "block-diagonal"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "routes between adapters"),
    "VeLoRA": ({"velora_config": {"num_groups": 2}}, "changes the layer's computation"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 2}}, "samples its weights"),
    "KaSA": ({"kasa_config": {"x": 1}}, "changes the base weights"),
    "Megatron": ({"megatron_config": {"x": 1}}, "code that the file names"),
    "types other than LoRA": ({"peft_type": "IA3"}, "is not LORA"),
}  # fmt: skip
#: Refused when the model is read, not the folder.
REFUSED_LIVE = ("quantised base",)

_INITIALISATIONS = (
    "plain", *(row for row in (*ADDITIVE, *REFUSED) if row.startswith("init_lora_weights"))
)  # fmt: skip
_NOWHERE = ("plain",)  # fields that every adapter has, and that change no product
#: Every field of PEFT 0.21's `LoraConfig`, and the rows that answer for it.
FIELDS: dict[str, tuple[str, ...]] = {
    "alora_invocation_tokens": ("aLoRA",),
    "alpha_pattern": ("alpha_pattern",),
    "arrow_config": ("Arrow",),
    "auto_mapping": _NOWHERE,
    "base_model_name_or_path": _NOWHERE,
    "bias": ("bias: all", "bias: lora_only"),
    "corda_config": ("init_lora_weights: corda",),
    "ensure_weight_tying": ("ensure_weight_tying",),
    "eva_config": ("init_lora_weights: eva",),
    "exclude_modules": ("exclude_modules",),
    "fan_in_fan_out": ("Conv1D (fan_in_fan_out)",),
    "inference_mode": _NOWHERE,
    "init_lora_weights": _INITIALISATIONS,
    "kasa_config": ("KaSA",),
    "layer_replication": ("layer_replication",),
    "layers_pattern": ("layers_to_transform",),
    "layers_to_transform": ("layers_to_transform",),
    "loftq_config": ("init_lora_weights: loftq",),
    "lora_alpha": _NOWHERE,
    "lora_bias": ("lora_bias",),
    "lora_dropout": ("lora_dropout",),
    "lora_ga_config": ("init_lora_weights: lora_ga",),
    "megatron_config": ("Megatron",),
    "megatron_core": ("Megatron",),
    "modules_to_save": ("modules_to_save",),
    "monteclora_config": ("MonteCLoRA",),
    "peft_type": ("types other than LoRA",),
    "peft_version": _NOWHERE,
    "qalora_group_size": ("QALoRA",),
    "r": ("different ranks and target modules",),
    "rank_pattern": ("rank_pattern",),
    "revision": _NOWHERE,
    "runtime_config": _NOWHERE,  # is not saved
    "target_modules": (
        "different ranks and target modules", "all-linear",
        "regular expression as target_modules", "lm_head", "embed_tokens",
    ),
    "target_parameters": ("target_parameters (experts)",),
    "task_type": _NOWHERE,
    "trainable_token_indices": ("trainable_token_indices",),
    "use_bdlora": ("BD-LoRA",),
    "use_dora": ("DoRA",),
    "use_qalora": ("QALoRA",),
    "use_rslora": ("rslora",),
    "velora_config": ("VeLoRA",),
}  # fmt: skip
