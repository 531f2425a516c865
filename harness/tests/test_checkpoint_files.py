"""Base checkpoints: whole ones are read from one shard or many, broken ones are named."""

import json
import shutil

import pytest

from harness.checkpoint_files import INDEX_NAME, SINGLE_NAME, checkpoint_digest, read_checkpoint
from harness.errors import InputError


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    from harness.testing.tiny import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"), max_shard_size="50KB")


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "base")
    return tmp_path / "base"


def test_sharded_and_single_checkpoints_hold_the_same_tensors(sharded, tiny):
    import torch

    many, one = read_checkpoint(sharded), read_checkpoint(tiny.base)
    assert len(many.shards) > 1
    assert len(one.shards) == 1
    assert set(many.places) == set(one.places)
    assert all(torch.equal(many.tensor(n), one.tensor(n)) for n in many.places)


def test_head_of_a_tied_base_is_the_embedding(tmp_path):
    from harness.testing.tiny import tiny_base

    tied = read_checkpoint(tiny_base(tmp_path / "tied", tied=True))
    assert tied.weight_name("lm_head") == "model.embed_tokens.weight"
    assert read_checkpoint(tmp_path / "tied").weight_name("nope") is None


def test_digest_follows_the_contents(copy, sharded):
    before = checkpoint_digest(read_checkpoint(copy))
    assert before == checkpoint_digest(read_checkpoint(sharded))
    (copy / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert before != checkpoint_digest(read_checkpoint(copy))


def edit_index(folder, change):
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.pop("model.norm.weight"), "'model.norm.weight': is left out"),
        (lambda m: m.update({"ghost": next(iter(m.values()))}), "'ghost': is said to lie in"),
        (lambda m: m.update({"model.norm.weight": "../x"}), "no safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": "gone.safetensors"}), "is missing"),
        (lambda m: m.clear(), "weight_map: is missing or empty"),
    ],
    ids=["left-out", "ghost", "outside", "missing-shard", "empty"],
)
def test_lying_index_is_named(copy, change, complaint):
    edit_index(copy, change)
    with pytest.raises(InputError, match=complaint):
        read_checkpoint(copy)


def test_pickled_base_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="pickle"):
        read_checkpoint(tmp_path)


def test_missing_weights_and_folder_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"{SINGLE_NAME} is missing"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_checkpoint(tmp_path / "gone")


def test_adapter_lying_in_the_base_folder_is_refused(copy, tiny):
    shutil.copy(tiny.adapters["style"] / "adapter_config.json", copy)
    with pytest.raises(InputError, match="transformers would apply it unasked"):
        read_checkpoint(copy)


def test_a_tensor_that_is_not_there_is_said(copy):
    checkpoint = read_checkpoint(copy)
    for ask in (checkpoint.entry, checkpoint.tensor):
        with pytest.raises(InputError, match="holds no tensor 'nope'"):
            ask("nope")


def test_a_checkpoint_one_folder_down_is_named(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "run" / "checkpoint-9")
    with pytest.raises(InputError, match=r"give .*run/checkpoint-9"):
        read_checkpoint(tmp_path / "run")


def test_a_config_may_name_the_weights_that_are_read(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_weights": INDEX_NAME}))
    assert len(read_checkpoint(copy).shards) > 1
    path.write_text(json.dumps(config | {"transformers_weights": SINGLE_NAME}))
    with pytest.raises(InputError, match=rf"'{SINGLE_NAME}'.* instead of {INDEX_NAME}"):
        read_checkpoint(copy)


def test_head_that_config_leaves_unsaid_is_tied_as_transformers_ties_it():
    from transformers import CONFIG_MAPPING

    from harness.checkpoint_files import _TIED_UNSAID

    for kind in _TIED_UNSAID:
        assert CONFIG_MAPPING[kind]().tie_word_embeddings, kind
    for kind in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt_neox", "gptj"):
        assert kind not in _TIED_UNSAID
        assert not CONFIG_MAPPING[kind]().tie_word_embeddings, kind


def test_biases_are_expected_where_the_family_has_them(tmp_path):
    from safetensors.torch import load_file, save_file

    from harness.checkpoint_claims import check_claims
    from harness.testing.tiny import tiny_base

    base = tiny_base(tmp_path / "base", family="qwen2")
    faults = []
    check_claims(read_checkpoint(base), faults, trust_remote_code=False)
    assert faults == []
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    biases = [name for name in tensors if name.endswith(".bias")]
    kept = {name: value for name, value in tensors.items() if name not in biases}
    # What old checkpoints store beside their weights is no fault.
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[biases[0]]
    save_file(kept, weights, metadata={"format": "pt"})
    check_claims(read_checkpoint(base), faults, trust_remote_code=False)
    said = [fault.fault.split("'")[1] for fault in faults]
    assert sorted(said) == sorted(biases)

    base, faults = tiny_base(tmp_path / "llama", family="llama"), []
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    check_claims(read_checkpoint(base), faults, trust_remote_code=False)
    missing = {fault.fault.split("'")[1].split(".", 3)[3] for fault in faults}
    assert missing == {f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}


def test_kinds_of_attention_that_have_their_window_are_sound(tmp_path):
    from harness.checkpoint_claims import check_claims
    from harness.testing.tiny import tiny_base

    base, faults = tiny_base(tmp_path / "base", family="qwen2"), []
    config = json.loads((base / "config.json").read_text())
    kinds = ["full_attention"] * (config["num_hidden_layers"] - 1) + ["sliding_attention"]
    config |= {"layer_types": kinds, "sliding_window": 8, "use_sliding_window": True}
    (base / "config.json").write_text(json.dumps(config))
    check_claims(read_checkpoint(base), faults, trust_remote_code=False)
    assert faults == []


@pytest.mark.parametrize("said", [{"quant_method": "gptq", "bits": 4}, "awq"])
def test_a_quantised_base_is_nobodys_truth(copy, said):
    config = json.loads((copy / "config.json").read_text())
    read_checkpoint(copy).refuse_quantised()
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    method = said if isinstance(said, str) else said["quant_method"]
    with pytest.raises(InputError, match=f"quantised \\('{method}'\\)"):
        read_checkpoint(copy).refuse_quantised()
