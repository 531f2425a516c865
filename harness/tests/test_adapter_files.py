"""Adapter folders: what is read is what PEFT has, and every fault is named."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.adapter_config import checkpoints_inside, natural_order, read_adapter_config
from harness.adapter_files import adapter_digest, read_adapter
from harness.errors import InputError
from harness.testing import cases


def test_deltas_are_those_that_peft_computes(tiny, tiny_engine):
    import torch

    from harness.engines.loading import lora_layers

    for name in tiny.adapters:
        files = tiny_engine.files[name]
        for module, layer in lora_layers(tiny_engine.model).items():
            if name in layer.lora_A:
                expected = layer.get_delta_weight(name)
                torch.testing.assert_close(files.pair(module).delta().float(), expected)


@pytest.mark.parametrize("options", cases.PLAIN_LORA, ids=cases.label)
def test_every_plain_lora_configuration_has_pefts_deltas(options, tiny, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from harness.engines.loading import lora_layers
    from harness.testing.tiny import AdapterSpec, tiny_adapter

    folder = tiny_adapter(tmp_path / "a", tiny.base, AdapterSpec(**options), seed=3)
    files = read_adapter(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny.base)
    layers = lora_layers(PeftModel.from_pretrained(model, folder))
    assert set(files.pairs) == set(layers)
    for module, layer in layers.items():
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(files.pair(module).delta().float(), expected)


def test_natural_order_puts_layer_2_before_layer_10():
    names = ["layers.10.x", "layers.2.x", "layers.02.x", "a", "10", "9", f"x.{'9' * 5000}", "0²0"]
    assert sorted(names, key=natural_order) == [
        "0²0", "9", "10", "a", "layers.2.x", "layers.02.x", "layers.10.x", f"x.{'9' * 5000}",
    ]  # fmt: skip


def test_digest_follows_the_contents(adapter_copy, tiny):
    same, other = adapter_copy("same"), adapter_copy("other", lora_alpha=9)
    assert adapter_digest(same) == adapter_digest(adapter_copy("again"))
    assert adapter_digest(same) != adapter_digest(other)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not LORA"),
        ({"r": 0}, "r: 0 is not a rank"),
        ({"r": 10**9}, "is not a rank"),
        ({"r": True}, "r: True is not a rank"),
        ({"r": 5}, "A has rank 4, B has rank 4, the config says 5"),
        ({"lora_alpha": "8"}, "lora_alpha: '8' is not a finite number"),
        ({"use_rslora": "false"}, "use_rslora: 'false' is not true or false"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '\\('"),
        ({"rank_pattern": [4]}, "is not a table"),
        ({"base_model_name_or_path": 3}, "is not a string"),
        ({"frobnicate": 1}, "frobnicate: is not known"),
    ],
)
def test_faulty_config_is_named(adapter_copy, config, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        read_adapter(adapter_copy(**config))
    assert "broken" in str(caught.value)
    assert caught.value.remedy


def test_missing_alpha_is_not_assumed(adapter_copy):
    folder = adapter_copy()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="lora_alpha: is missing"):
        read_adapter(folder)


@pytest.mark.parametrize("key", cases.NOT_ADDITIVE, ids=str)
def test_what_is_not_additive_says_why(adapter_copy, key):
    config = read_adapter(adapter_copy(**cases.NOT_ADDITIVE[key])).config
    assert any(key in reason for reason in config.not_additive)


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(FIRST), "lora_A is missing"),
        (
            lambda t: t.update({"lm_head.weight": t[FIRST] * 1}),
            "'lm_head.weight': names a base weight",
        ),
        (lambda t: t.update({FIRST: t[FIRST].flatten()}), "not two dimensions"),
        (lambda t: t.update({FIRST: t[FIRST].char()}), "is I8"),
        (lambda t: t.update({FIRST: t[FIRST][:3].clone()}), "A has rank 3, B has rank 4"),
        (lambda t: t.clear(), "holds no LoRA factors"),
        (
            lambda t: t.update({FIRST.removeprefix("base_model."): t.pop(FIRST)}),
            "lacks the prefix",
        ),
    ],
    ids=["half", "base-weight", "flat", "int8", "rank", "empty", "prefix"],
)
def test_faulty_tensors_are_named(adapter_copy, change, complaint):
    folder = adapter_copy()
    rewrite(folder, change)
    with pytest.raises(InputError, match=complaint):
        read_adapter(folder)


def test_faults_of_the_config_and_of_the_weights_are_told_at_once(adapter_copy):
    folder = adapter_copy(r="4", fan_in_fan_out="false")
    second = FIRST.replace("layers.0", "layers.1")

    def change(tensors):
        tensors[FIRST] = tensors[FIRST][:3].clone()
        tensors.pop(second)

    rewrite(folder, change)
    with pytest.raises(InputError) as raised:
        read_adapter(folder)
    assert [str(fault).split(": ", 1)[1].split(" → ")[0] for fault in raised.value.faults] == [
        "fan_in_fan_out: 'false' is not true or false",
        "r: '4' is not a rank",
        "module 'model.layers.0.mlp.down_proj': A has rank 3, B has rank 4",
        "module 'model.layers.1.mlp.down_proj': lora_A is missing",
    ]


def test_pickle_is_refused_and_not_read(adapter_copy):
    folder = adapter_copy()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickle.*safe_serialization"):
        read_adapter(folder)


def test_checkpoint_inside_is_named(adapter_copy, tmp_path):
    adapter_copy("run/checkpoint-90")
    adapter_copy("run/checkpoint-531")
    with pytest.raises(InputError, match="checkpoint-531"):
        read_adapter(tmp_path / "run")


MODULES = (
    "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj", "layers.1.mlp.up_proj", "model.layers.1.mlp.experts.0.up_proj",
    "transformer.h.1.attn.q_proj", "q_proj", "1.q_proj", "vision.blocks.1.layers.0.q_proj",
)  # fmt: skip
NAMES = st.lists(st.sampled_from(["q_proj", "up_proj", "attn.q_proj", "lm_head", "1"]), max_size=3,
                 unique=True)  # fmt: skip
PATTERNS = st.sampled_from([r".*\.q_proj", r"model\.layers\.\d+\.mlp\..*", "q_proj", r".*", r"x"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    targets=NAMES.filter(bool) | PATTERNS,
    excluded=st.none() | NAMES | PATTERNS,
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "h", "blocks", ["h", "layers"], [], "x"]),
)
def test_modules_are_targeted_as_peft_targets_them(
    adapter_copy, targets, excluded, layers, pattern
):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    plain = isinstance(targets, str)
    options = {
        "target_modules": targets, "exclude_modules": excluded,
        "layers_to_transform": None if plain else layers,
        "layers_pattern": None if plain or layers is None else pattern,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **options}
        (Path(scratch) / "adapter_config.json").write_text(json.dumps(raw))
        ours = read_adapter_config(Path(scratch))
    theirs = LoraConfig(**options)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


def test_words_that_do_not_decide_are_left_open(adapter_copy):
    for options in ({"target_modules": "All-Linear"}, {"target_parameters": ["mlp.experts.down"]}):
        config = read_adapter_config(
            adapter_copy(**options, name=f"a{len(options)}{next(iter(options))}")
        )
        assert config.targets("model.layers.0.self_attn.q_proj") is None


def test_parameters_of_one_module_share_its_rank(adapter_copy):
    """The file holds one pair for a fused module: which parameter's rank it has must not matter."""
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    alike = read_adapter_config(adapter_copy("alike", **fused, rank_pattern={"experts": 2}))
    mixed = read_adapter_config(adapter_copy("mixed", **fused, rank_pattern={"down_proj": 2}))
    module = "model.layers.0.mlp.experts.base_layer"
    assert alike.rank_of(module) == 4, "the pattern names a module, and the parameters are meant"
    assert mixed.alpha_of(module) == 8
    with pytest.raises(InputError, match="rank_pattern differs between the parameters"):
        mixed.rank_of(module)


def test_a_place_that_is_no_folder_has_no_checkpoints(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert checkpoints_inside(file) == []
    for place, complaint in ((file, "is not a folder"), (tmp_path / "gone", "no such folder"),
                             (tmp_path / ("a" * 300), "no such folder")):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            read_adapter(place)


def test_a_pair_tells_its_sizes_and_no_other_module_has_one(adapter_copy):
    files = read_adapter(adapter_copy())
    module, entry = next(iter(files.pairs.items()))
    pair = files.pair(module)
    assert (entry.rank, entry.in_features) == tuple(pair.a.shape)
    assert (entry.out_features, entry.rank) == tuple(pair.b.shape)
    with pytest.raises(InputError, match="adapts no module 'lm_head'"):
        files.pair("lm_head")
