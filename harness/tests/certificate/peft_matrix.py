"""PEFT's own test matrix of LoRA configurations, as far as it applies to causal language models.

Taken by hand from huggingface/peft at v0.20.0 (commit a5526d27a9d4, the last release whose tests
could be read), file by file; each row names where it stands there. Rows of PEFT's toy modules are
put onto the layers of a causal model that play the same part: `lin0`, `lin1`, `linear` onto
projections, `emb` onto the embedding, transformers' `Conv1D` onto GPT-2. Left out: convolutions,
`nn.MultiheadAttention`, encoder-decoder, diffusion and quantised models, which are no causal
language models on a CPU, and tests of error messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ROWS", "Row"]

_DECODERS = "test_decoder_models.py::ALL_CONFIGS × PEFT_DECODER_MODELS_TO_TEST"
_CUSTOM = "test_custom_models.py::TEST_CASES"
_ACTIVE = "test_custom_models.py::MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"
_INIT = "test_initialization.py::TestLoraInitialization"
_TUNERS = "test_tuners_utils.py"
_PARAMETERS = "test_target_parameters.py::ALL_CONFIGS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration.

    Attributes:
        source: file and test in PEFT's `tests` folder.
        family: of `harness.tests.peft_models`.
        options: for `LoraConfig`, as there.
        refused: words of the reason why such an adapter cannot be stacked; None for a plain one.
        converted: saved through `path_initial_model_for_weight_conversion`, which makes a plain
            adapter of one that moved the base.
        count: how many layers PEFT adapts, where the test there says so.
    """

    id: str
    source: str
    family: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    tied: bool = False
    converted: bool = False
    count: int | None = None


_GRID: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
_LIN0, _LIN1 = "q_proj", "up_proj"
_MOVES = "loading moves the base"
_PARAMETER = "parameters, not modules"


def _parameters(family: str, block: str) -> list[Row]:
    def row(name: str, modules: list[str] | None, parameters: list[str], **more: Any) -> Row:
        options = {"lora_dropout": 0.0, "target_modules": modules} | more
        options["target_parameters"] = parameters
        return Row(
            id=f"{family}: {name}",
            source=f"{_PARAMETERS} ({family})",
            family=family,
            options=options,
            refused=_PARAMETER,
        )

    down, both = f"{block}.experts.down_proj", f"{block}.experts.gate_up_proj"
    return [
        row("down_proj of the experts", [], [down]),
        row("one parameter a layer", [], [f"0.{both}", f"1.{down}"]),
        row("two parameters of one module", None, [down, both], r=8, lora_alpha=32),
        row("modules and a parameter", ["q_proj", "v_proj"], [down]),
        row(
            "rank_pattern on a parameter", ["q_proj", "v_proj"], [both], r=8, lora_alpha=32,
            rank_pattern={"experts.gate_up_proj": 2},
        ),
    ]  # fmt: skip


def _moving(init: str) -> list[Row]:
    """An initialisation that moves the base, plain and with each knob PEFT tests it with."""
    knobs: dict[str, dict[str, Any]] = {
        "": {},
        ", rslora": {"use_rslora": True},
        ", rank_pattern": {"rank_pattern": {"o_proj": 16}},
        ", alpha_pattern": {"alpha_pattern": {"o_proj": 5}},
    }
    options = {"init_lora_weights": init, "target_modules": ["o_proj"], "r": 8}
    rows = [
        Row(id=f"{init}{name}", source=f"{_INIT}::test_lora_{init}_*", options=options | knob,
            refused=_MOVES)
        for name, knob in knobs.items()
    ]  # fmt: skip
    converted = [
        Row(
            id=f"{init}{name}, converted",
            source=f"{_INIT}::test_lora_{init}_conversion_same_output_after_loading*",
            options=options | knob,
            converted=True,
        )
        for name, knob in knobs.items()
    ]
    return rows + converted


ROWS: tuple[Row, ...] = (
    # test_decoder_models.py: the LoRA rows of the grid on every decoder there.
    *(
        Row(id=f"grid on {family}", source=_DECODERS, family=family, options=_GRID)
        for family in ("opt", "gpt2", "gptj", "llama", "qwen2", "gemma3")
    ),
    Row(id="grid on mistral", source="test_decoder_models.py::SMALL_GRID_MODELS",
        family="mistral", options=_GRID),
    Row(id="grid, aLoRA", source=_DECODERS, options=_GRID | {"alora_invocation_tokens": [1]},
        refused="aLoRA"),
    Row(id="grid, aLoRA that is never invoked", source=_DECODERS,
        options=_GRID | {"alora_invocation_tokens": [1000]}, refused="aLoRA"),
    Row(id="grid, trainable tokens", source=_DECODERS,
        options=_GRID | {"trainable_token_indices": [0, 1, 3]}, refused="replaces embedding rows"),
    Row(id="layer replication", source="test_decoder_models.py::test_lora_layer_replication",
        options={"target_modules": ["gate_proj", "up_proj"], "layer_replication": [[0, 2], [1, 3]]},
        refused="copied layers"),
    Row(id="a layer and the embedding",
        source="test_decoder_models.py::test_save_pretrained_targeting_lora_to_embedding_layer",
        options={"target_modules": ["q_proj", "embed_tokens"]}),
    Row(id="the embedding by a regular expression",
        source="test_decoder_models.py::test_save_pretrained_targeting_lora_to_embedding_layer",
        options={"target_modules": r".*\.embed_tokens"}, count=1),
    Row(id="an embedding that is scaled",
        source="test_decoder_models.py::test_lora_embed_scale_is_applied", family="gemma3",
        options={"target_modules": ["embed_tokens"]}, count=1),
    Row(id="an embedding that is scaled, DoRA",
        source="test_decoder_models.py::test_lora_embed_scale_is_applied", family="gemma3",
        options={"target_modules": ["embed_tokens"], "use_dora": True}, refused="DoRA"),
    Row(id="a tied embedding",
        source="test_decoder_models.py::test_merge_and_unload_fixes_tie_word_embeddings_config",
        options={"target_modules": ["embed_tokens"]}, tied=True),
    # test_custom_models.py, its LoRA rows.
    Row(id="MLP 1", source=_CUSTOM, options={"target_modules": rf".*\.{_LIN0}"}, count=4),
    Row(id="MLP 2", source=_CUSTOM, options={"target_modules": [_LIN0]}, count=4),
    Row(id="MLP 3", source=_CUSTOM, options={"target_modules": [_LIN1]}, count=4),
    Row(id="MLP 4", source=_CUSTOM, options={"target_modules": [_LIN0, _LIN1]}, count=8),
    Row(id="MLP 5, modules_to_save", source=_CUSTOM,
        options={"target_modules": [_LIN0], "modules_to_save": ["lm_head"]},
        refused="replaces whole base modules"),
    Row(id="MLP 6, alpha and dropout", source=_CUSTOM,
        options={"target_modules": [_LIN0], "lora_alpha": 4, "lora_dropout": 0.1}),
    Row(id="MLP 7 to 9, DoRA", source=_CUSTOM,
        options={"target_modules": [_LIN0, _LIN1], "use_dora": True, "lora_alpha": 32},
        refused="DoRA"),
    Row(id="MLP, MiCA", source=_CUSTOM,
        options={"target_modules": [_LIN0], "init_lora_weights": "mica", "r": 4}),
    Row(id="MLP 10 to 12, VeLoRA", source=_CUSTOM,
        options={"target_modules": [_LIN0], "velora_config": {"num_groups": 2}},
        refused="VeLoRA"),
    Row(id="MLP, MonteCLoRA", source=_CUSTOM,
        options={"target_modules": [_LIN0], "monteclora_config": {"num_samples": 2}},
        refused="MonteCLoRA"),
    Row(id="Conv1D", source=_CUSTOM, family="gpt2", options={"target_modules": ["c_attn"]}),
    Row(id="embedding beside Conv1D", source=_CUSTOM, family="gpt2",
        options={"target_modules": ["wte"]}, tied=True),
    Row(id="embedding and Conv1D", source=_CUSTOM, family="gpt2",
        options={"target_modules": ["wte", "c_attn"]}, tied=True),
    Row(id="Conv1D, DoRA", source=_CUSTOM, family="gpt2",
        options={"target_modules": ["c_attn"], "use_dora": True}, refused="DoRA"),
    Row(id="Conv1D, trainable tokens", source=_CUSTOM, family="gpt2",
        options={"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [0, 10]}},
        refused="replaces embedding rows"),
    Row(id="Conv1D, fan_in_fan_out given", source="test_arrow.py::_create_and_save_adapter",
        family="gpt2", options={"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    Row(id="lora_bias", source=_CUSTOM,
        options={"target_modules": [_LIN0, _LIN1], "lora_bias": True, "lora_alpha": 32},
        refused="a bias that merging cannot hold"),
    Row(id="nn.Parameter", source=_CUSTOM,
        options={"target_modules": [], "target_parameters": [f"{_LIN0}.weight"]},
        refused=_PARAMETER),
    Row(id="a module and an nn.Parameter", source=_CUSTOM,
        options={"target_modules": [_LIN0], "target_parameters": [f"{_LIN1}.weight"]},
        refused=_PARAMETER),
    Row(id="active together, same layers", source=_ACTIVE, options={"target_modules": [_LIN0]}),
    Row(id="active together, other layers", source=_ACTIVE, options={"target_modules": [_LIN1]}),
    Row(id="rank_pattern below r", source="test_custom_models.py::TestRequiresGrad",
        options={"target_modules": [_LIN0, _LIN1], "r": 8, "rank_pattern": {_LIN0: 2}}),
    Row(id="rank_pattern above r", source="test_custom_models.py::TestRequiresGrad",
        options={"target_modules": [_LIN0, _LIN1], "r": 8, "rank_pattern": {_LIN0: 16}}),
    Row(id="rank_pattern and alpha_pattern by module",
        source="test_custom_models.py::test_add_weighted_adapter_cat_with_rank_pattern",
        options={"target_modules": [_LIN0, _LIN1], "r": 8, "lora_alpha": 8,
                 "rank_pattern": {_LIN0: 4}, "alpha_pattern": {_LIN0: 4}}),
    Row(id="rank_pattern and alpha_pattern by layer",
        source="test_custom_models.py::test_multirank_2",
        options={"target_modules": [_LIN0, _LIN1], "r": 4, "lora_alpha": 8,
                 "rank_pattern": {f"layers.{i}.{m}": 64 // (i + 1) for i in range(4)
                                  for m in (f"self_attn.{_LIN0}", f"mlp.{_LIN1}")},
                 "alpha_pattern": {f"layers.{i}.{m}": 128 // (i + 1) for i in range(4)
                                   for m in (f"self_attn.{_LIN0}", f"mlp.{_LIN1}")}}),
    # test_target_parameters.py
    *_parameters("llama4", "feed_forward"),
    *_parameters("gpt_oss", "mlp"),
    # test_low_level_api.py, test_integrations.py, test_helpers.py, test_lora_conversion.py
    Row(id="two parameters of linear layers",
        source="test_low_level_api.py::test_inject_from_state_dict_and_from_config_target_params",
        options={"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]},
        refused=_PARAMETER),
    Row(id="ranges of layers in a regular expression",
        source="test_low_level_api.py::test_inject_from_state_dict_and_from_config_target_same",
        options={"target_modules": r".*\.[0-1]\.self_attn\.v_proj|.*\.[1-3]\.self_attn\.k_proj"},
        count=5),
    Row(id="linear layers of a mixture of experts",
        source="test_integrations.py::test_qwen3_moe_regex_not_naming_experts", family="qwen3_moe",
        options={"target_modules": r".*\.q_proj"}, count=2),
    Row(id="experts named as modules",
        source="test_integrations.py::test_qwen3_moe_works", family="qwen3_moe",
        options={"target_modules": ["gate_proj", "up_proj", "down_proj"]}, refused=_PARAMETER),
    Row(id="all-linear of a mixture of experts",
        source="test_integrations.py::test_qwen3_moe_all_linear_target_modules_works",
        family="qwen3_moe", options={"target_modules": "all-linear"}, refused=_PARAMETER),
    Row(id="patterns on one projection", source="test_helpers.py::TestScalingAdapters",
        options={"r": 4, "lora_alpha": 4, "target_modules": ["k_proj", "v_proj"],
                 "lora_dropout": 0.1, "bias": "none", "rank_pattern": {"k_proj": 2},
                 "alpha_pattern": {"k_proj": 8}}),
    Row(id="rank 16 by default targets", source="test_lora_conversion.py", options={"r": 16}),
    # test_initialization.py
    *(
        Row(id=f"init {init}", source=f"{_INIT}::test_lora_linear_init_*",
            options={"target_modules": ["o_proj"], "init_lora_weights": init})
        for init in (True, False, "gaussian", "orthogonal")
    ),
    *(
        Row(id=f"init {init} of an embedding", source=f"{_INIT}::test_lora_embedding_*",
            options={"target_modules": ["embed_tokens"], "init_lora_weights": init})
        for init in (True, False, "gaussian")
    ),
    Row(id="MiCA of a layer", source=f"{_INIT}::test_lora_mica_linear_init_default",
        options={"target_modules": ["o_proj"], "init_lora_weights": "mica", "r": 8}),
    Row(id="MiCA of an embedding", source=f"{_INIT}::test_lora_mica_embedding_init",
        options={"target_modules": ["embed_tokens"], "init_lora_weights": "mica", "r": 3}),
    Row(id="scale alpha/r", source=f"{_INIT}::test_lora_scaling_default",
        options={"target_modules": ["o_proj", "embed_tokens"], "lora_alpha": 3, "r": 16,
                 "use_rslora": False}),
    Row(id="scale alpha/√r", source=f"{_INIT}::test_lora_rslora_scaling",
        options={"target_modules": ["o_proj", "embed_tokens"], "lora_alpha": 3, "r": 16,
                 "use_rslora": True}),
    *(
        Row(id=f"patterns, rslora {rslora}",
            source=f"{_INIT}::test_lora_{'rslora' if rslora else 'default'}_scaling_pattern",
            options={"target_modules": ["o_proj", "embed_tokens", "up_proj"],
                     "rank_pattern": {"embed_tokens": 9, "up_proj": 16},
                     "alpha_pattern": {"o_proj": 11, "up_proj": 13},
                     "lora_alpha": 17, "r": 25, "use_rslora": rslora})
        for rslora in (False, True)
    ),
    Row(id="an alpha_pattern with a layer's number",
        source=f"{_INIT}::test_lora_scaling_alpha_pattern",
        options={"target_modules": ["o_proj"], "lora_alpha": 1, "r": 8,
                 "rank_pattern": {"o_proj": 8}, "alpha_pattern": {"0.self_attn.o_proj": 2}}),
    Row(id="patterns by full layer names",
        source="test_initialization.py::TestScaling::test_scaling_rank_pattern_and_alpha_pattern",
        options={"r": 8, "lora_alpha": 8, "target_modules": ["k_proj"],
                 "rank_pattern": {"layers.1.self_attn.k_proj": 16, "layers.2.self_attn.k_proj": 32},
                 "alpha_pattern": {"layers.2.self_attn.k_proj": 4,
                                   "layers.3.self_attn.k_proj": 16}}),
    Row(id="rslora on one projection",
        source="test_initialization.py::TestScaling::test_scaling_with_rslora",
        options={"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["k_proj"]}),
    *(row for init in ("pissa", "olora") for row in _moving(init)),
    Row(id="pissa_niter", source=f"{_INIT}::test_lora_pissa_*",
        options={"init_lora_weights": "pissa_niter_3", "target_modules": ["o_proj"]},
        refused=_MOVES),
    *(
        Row(id=f"tied, target {targets}, tying {ensure}",
            source="test_initialization.py::TestWeightTying", tied=True,
            options={"target_modules": ["o_proj", *targets], "ensure_weight_tying": ensure})
        for targets, ensure in (
            ((), True), (("embed_tokens",), True), (("lm_head",), True), (("lm_head",), False),
        )
    ),
    Row(id="tied, modules_to_save", source="test_initialization.py::TestWeightTying", tied=True,
        options={"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"],
                 "ensure_weight_tying": True},
        refused="replaces whole base modules"),
    # test_tuners_utils.py
    *(
        Row(id=f"all-linear on {family}",
            source=f"{_TUNERS}::MAYBE_INCLUDE_ALL_LINEAR_LAYERS_TEST_CASES",
            family=family, options={"target_modules": "all-linear"}, count=4 * kinds)
        for family, kinds in (("llama", 7), ("gpt2", 4), ("gpt_neox", 4))
    ),
    Row(id="a regular expression for two projections",
        source=f"{_TUNERS}::MAYBE_INCLUDE_ALL_LINEAR_LAYERS_TEST_INTERNALS",
        options={"target_modules": ".*(q_proj|v_proj)$"}, count=8),
    *(
        Row(id=f"layers_to_transform {layers}, pattern {pattern}, {'+'.join(modules)}",
            source=f"{_TUNERS}::REGEX_TEST_CASES", family="gptj",
            options={"target_modules": modules, "layers_to_transform": layers,
                     "layers_pattern": pattern},
            count=len(modules) * (1 if isinstance(layers, int) else len(layers)))
        for modules, layers, pattern in (
            (["q_proj"], [1], ["h"]), (["q_proj"], [0, 1, 2], ["h"]),
            (["q_proj", "v_proj"], [0, 1, 2], ["h"]), (["q_proj"], [1], None), (["q_proj"], 1, "h"),
        )
    ),
    Row(id="exclude_modules by a regular expression",
        source=f"{_TUNERS}::test_two_excluded_module_regex",
        options={"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.q_proj"}, count=4),
    Row(id="exclude_modules by a list", source=f"{_TUNERS}::test_multiple_excluded_modules_list",
        options={"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["q_proj"]}, count=4),
    Row(id="exclude_modules by a full name", source=f"{_TUNERS}::test_realistic_example",
        family="bloom",
        options={"exclude_modules": "transformer.h.2.self_attention.query_key_value"}, count=4),
)  # fmt: skip
