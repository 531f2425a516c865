"""Kinds of bases and adapters: experts, saved modules, Conv1D, 8-bit floats, other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import InputError, merge_lora_adapters
from harness.adapter_files import read_adapter
from harness.checkpoint_files import read_checkpoint
from harness.merge.storage import encode
from harness.tests.merge.test_merging import digests, exact_share, numbers, reference, stored

_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def peft_merged(base: Path, adapters: list[Path]) -> Any:
    """PEFT's own merge, in float32, of adapters loaded together."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=f"a{number}")
    model.base_model.set_adapter([f"a{n}" for n in range(len(adapters))])
    return model.merge_and_unload().eval()


def assert_same_model(folder: Path, expected: Any) -> None:
    """Every parameter within float32's rounding, and the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = dict(expected.named_parameters())
    assert set(dict(found.named_parameters())) == set(wanted)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=2e-6, msg=name)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A float32 Qwen3-MoE of 5 experts and two adapters of all experts and of attention."""
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    root = tmp_path_factory.mktemp("moe")
    base = tiny_base(root / "base", "qwen3_moe", num_experts=5, moe_intermediate_size=24)
    adapters = []
    for number, (rank, rslora) in enumerate(((4, False), (3, True))):
        spec = AdapterSpec(
            rank=rank, rslora=rslora, targets=("q_proj",), options={"target_parameters": _EXPERTS}
        )
        adapters.append(tiny_adapter(root / f"a{number}", base, spec, seed=number))
    return base, adapters


def test_adapters_of_fused_experts_fit_the_base_that_stores_them_one_by_one(moe):
    from harness.fit import check_adapter_on_base
    from harness.stack import Adapter, Base

    base, adapters = moe
    checkpoint, faults = read_checkpoint(base), []
    for folder in adapters:
        adapter = Adapter(name="a", path=folder, source=str(folder))
        whole = Base(path=base, source=str(base), chosen_by="--base")
        check_adapter_on_base(adapter, read_adapter(folder), checkpoint, whole, faults)
    assert faults == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 2])
def test_adapters_of_fused_experts_merge_to_what_peft_merges(moe, tmp_path, count):
    base, adapters = moe
    report = merge_lora_adapters(base, adapters[:count], tmp_path / "out", verify="full")
    assert_same_model(tmp_path / "out", peft_merged(base, adapters[:count]))
    # q_proj, and gate, up and down of 5 experts, in each of 2 layers.
    assert report.details["tensors merged"] == 2 * (1 + 5 * 3)
    assert report.exact_share == 1.0
    changed = numbers(tmp_path / "out", "model.layers.1.mlp.experts.4.down_proj.weight")
    assert np.abs(changed - numbers(base, "model.layers.1.mlp.experts.4.down_proj.weight")).max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parameter", _EXPERTS)
def test_one_fused_parameter_alone_is_found_by_its_place(moe, tmp_path, parameter):
    from harness.testing.tiny import AdapterSpec, tiny_adapter

    base, _ = moe
    spec = AdapterSpec(targets=("q_proj",), options={"target_parameters": [parameter]})
    adapter = tiny_adapter(tmp_path / "one", base, spec, seed=7)
    merge_lora_adapters(base, [adapter], tmp_path / "out", verify="full")
    assert_same_model(tmp_path / "out", peft_merged(base, [adapter]))


def gpt_oss(folder: Path, **more: Any) -> Path:
    """Experts stacked in one tensor of the file, `(experts, in, out)`."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2, initializer_range=0.1, pad_token_id=0, **more,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_experts_stacked_in_the_file_merge_expert_by_expert(tmp_path):
    from harness.testing.tiny import AdapterSpec, tiny_adapter

    base = gpt_oss(tmp_path / "base")
    spec = AdapterSpec(targets=("q_proj",), options={"target_parameters": _EXPERTS})
    adapter = tiny_adapter(tmp_path / "adapter", base, spec, seed=3)
    report = merge_lora_adapters(base, [adapter], tmp_path / "out", verify="full")
    assert_same_model(tmp_path / "out", peft_merged(base, [adapter]))
    assert report.details["tensors merged"] == 2 * 3
    assert read_checkpoint(tmp_path / "out").entry(
        "model.layers.0.mlp.experts.gate_up_proj"
    ).shape == (3, 32, 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_module_saved_whole_takes_the_bases_place(tmp_path, tied, saved):
    import torch
    from transformers import AutoModelForCausalLM

    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    base = tiny_base(tmp_path / "base", tied=tied)
    spec = AdapterSpec(targets=("q_proj",), options={"modules_to_save": [saved]})
    adapter = tiny_adapter(tmp_path / "adapter", base, spec, seed=1)
    other = tiny_adapter(tmp_path / "other", base, seed=2)
    _change_saved(adapter)
    report = merge_lora_adapters(base, [adapter, other], tmp_path / "out", verify="full")
    if tied:  # merged by PEFT, a tied head follows the embedding or the other way round
        from peft import PeftModel

        live: Any = AutoModelForCausalLM.from_pretrained(base)
        live = PeftModel.from_pretrained(live, adapter, adapter_name="a")
        live.load_adapter(other, adapter_name="b")
        live.base_model.set_adapter(["a", "b"])
        ids = torch.arange(12)[None]
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.inference_mode():
            torch.testing.assert_close(merged(ids).logits, live.eval()(ids).logits, rtol=1e-4,
                                       atol=1e-3)  # fmt: skip
    else:
        assert_same_model(tmp_path / "out", peft_merged(base, [adapter, other]))
    assert report.details["tensors replaced"] == 1
    assert any("in place of the base's" in note for note in report.notes)


def _change_saved(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_" not in name:
            tensors[name] = tensors[name] * np.float32(0.5) + np.float32(0.01)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def savers(tmp_path_factory):
    """A base and two adapters that save the same module, with the same numbers."""
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    root = tmp_path_factory.mktemp("savers")
    base = tiny_base(root / "base")
    spec = AdapterSpec(targets=("q_proj",), options={"modules_to_save": ["lm_head"]})
    return base, [tiny_adapter(root / f"a{n}", base, spec, seed=n) for n in range(2)]


def test_two_adapters_that_save_the_same_numbers_agree_and_others_are_refused(savers, tmp_path):
    base, (first, second) = savers
    merge_lora_adapters(base, [first, second], tmp_path / "agree", verify="full")
    changed = tmp_path / "changed"
    shutil.copytree(second, changed)
    _change_saved(changed)
    with pytest.raises(InputError, match="saved whole by both"):
        merge_lora_adapters(base, [first, changed], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"merge_strategy": "weighted", "weights": [0.5, 1.0]},
        {"merge_strategy": "average"},
        {"merge_strategy": "ties"},
    ],
)
def test_a_saved_module_has_no_half_and_no_vote(savers, tmp_path, arguments):
    base, adapters = savers
    with pytest.raises(InputError, match="replaces whole modules"):
        merge_lora_adapters(base, adapters, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
    merge_lora_adapters(
        base, adapters, tmp_path / "out", merge_strategy="weighted", weights=[1.0, 1.0]
    )


def test_a_module_saved_by_one_and_adapted_by_another_is_refused(savers, tmp_path):
    from harness.testing.tiny import AdapterSpec, tiny_adapter

    base, (first, _) = savers
    head = tiny_adapter(tmp_path / "head", base, AdapterSpec(targets=("lm_head",)), seed=5)
    with pytest.raises(InputError, match=r"saved whole by .* and adapted by"):
        merge_lora_adapters(base, [first, head], tmp_path / "out")


def test_a_tensor_that_no_setting_names_is_refused(savers, tmp_path):
    from safetensors.numpy import load_file, save_file

    base, (first, _) = savers
    folder = tmp_path / "stray"
    shutil.copytree(first, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.model.norm.weight": np.ones(32, np.float32)}, path)
    with pytest.raises(InputError, match="neither a LoRA factor"):
        merge_lora_adapters(base, [folder], tmp_path / "out")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(InputError, match="of which it holds no tensor"):
        merge_lora_adapters(base, [folder], tmp_path / "out")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2, whose layers are `Conv1D`, and an adapter of them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from harness.testing.tiny import AdapterSpec, tiny_adapter

    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                        initializer_range=0.15)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(root / "base")
    spec = AdapterSpec(
        targets=("c_attn", "c_fc", "c_proj"), options={"fan_in_fan_out": True}, rank=4
    )
    return root / "base", tiny_adapter(root / "adapter", root / "base", spec, seed=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bare", [False, True])
def test_conv1d_layers_merge_to_what_peft_merges_also_under_the_bare_models_names(
    gpt2, tmp_path, bare
):
    base, adapter = gpt2
    if bare:  # the hub's GPT-2 stores `h.0…` for `transformer.h.0…`
        from safetensors.numpy import load_file, save_file

        shutil.copytree(base, tmp_path / "bare")
        base = tmp_path / "bare"
        path = base / "model.safetensors"
        tensors = load_file(path)
        renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    merge_lora_adapters(base, [adapter], tmp_path / "out", verify="full")
    assert_same_model(tmp_path / "out", peft_merged(base, [adapter]))
    assert read_checkpoint(tmp_path / "out").places.keys() == read_checkpoint(base).places.keys()


def _rewritten(base: Path, folder: Path, change: Any, **config: Any) -> Path:
    """A copy of *base* whose tensors *change* made anew."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def test_weights_stored_as_plain_float8_are_rounded_once_to_float8(tiny, tmp_path):
    import torch

    def narrow(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor}

    base = _rewritten(tiny.base, tmp_path / "base", narrow)
    adapters = [_foreign(path, tmp_path / name) for name, path in tiny.adapters.items()]
    report = merge_lora_adapters(base, adapters, tmp_path / "out", verify="full")
    wanted = reference(base, adapters, [1.0, 1.0])
    assert exact_share(tmp_path / "out", wanted, "F8_E4M3") >= 0.999
    assert report.exact_share is not None
    assert report.exact_share >= 0.999
    assert "F8_E4M3" in report.dtype


def _foreign(adapter: Path, folder: Path) -> Path:
    """A copy that names no base: the one it was made for has other weights."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    return folder


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 12], "activation_scheme": "dynamic"}


def _scaled(layout: str) -> Any:
    """Quantise as Qwen3-FP8 and DeepSeek are published: blocks; or a scale a row, or a tensor."""
    import torch

    def change(name: str, tensor: Any) -> dict[str, Any]:
        if "proj" not in name:
            return {name: tensor.to(torch.bfloat16)}
        rows, columns = tensor.shape
        high, wide = {"blocks": (16, 12), "rows": (1, columns), "tensor": (rows, columns)}[layout]
        tall, broad = -(-rows // high), -(-columns // wide)
        padded = torch.zeros(tall * high, broad * wide)
        padded[:rows, :columns] = tensor
        tiles = padded.reshape(tall, high, broad, wide)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        full = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
        values = {name: (tensor / full).to(torch.float8_e4m3fn)}
        if layout == "blocks":
            return values | {f"{name}_scale_inv": scale.contiguous()}
        return values | {f"{name}_scale": scale.reshape(-1, 1) if layout == "rows" else scale[0]}

    return change


@pytest.mark.parametrize("layout", ["blocks", "rows", "tensor"])
def test_float8_with_scales_is_dequantised_added_and_stored_in_the_wanted_dtype(
    tiny, tmp_path, layout
):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = _BLOCKS if layout == "blocks" else {"quant_method": "fp8"}
    base = _rewritten(tiny.base, tmp_path / "base", _scaled(layout), quantization_config=config)
    adapters = [_foreign(path, tmp_path / name) for name, path in tiny.adapters.items()]
    with pytest.raises(InputError, match="8-bit floats with scales") as caught:
        merge_lora_adapters(base, adapters, tmp_path / "refused")
    assert "--dtype bfloat16" in str(caught.value)
    report = merge_lora_adapters(base, adapters, tmp_path / "out", dtype="bfloat16", verify="full")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    quantised, plain = load_file(base / "model.safetensors"), tmp_path / "plain"
    dequantised = {}
    for name, tensor in quantised.items():
        if name.endswith(("_scale_inv", "_scale")):
            continue
        scale = quantised.get(f"{name}_scale_inv", quantised.get(f"{name}_scale"))
        if scale is not None:
            if layout == "blocks":
                scale = scale.repeat_interleave(16, 0).repeat_interleave(12, 1)
                scale = scale[: tensor.shape[0], : tensor.shape[1]]
            dequantised[name] = tensor.float() * scale
    _rewritten(tiny.base, plain, lambda name, tensor: {name: dequantised.get(name, tensor)})
    wanted = reference(plain, adapters, [1.0, 1.0])
    assert exact_share(tmp_path / "out", wanted, "BF16") >= 0.999
    for name in dequantised.keys() - wanted.keys():
        nearest = encode(numbers(plain, name), "BF16")
        np.testing.assert_array_equal(stored(tmp_path / "out", name)[0], nearest)
    assert read_checkpoint(tmp_path / "out").places.keys() == read_checkpoint(plain).places.keys()
    assert report.exact_share is not None
    assert any("8-bit floats" in note for note in report.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_other_quantisations_and_scales_that_do_not_fit_are_refused(tiny, tmp_path):
    base = _rewritten(
        tiny.base,
        tmp_path / "gptq",
        lambda n, t: {n: t},
        quantization_config={"quant_method": "gptq"},
    )
    with pytest.raises(InputError, match="quantised \\(gptq\\)"):
        merge_lora_adapters(base, tiny.adapters, tmp_path / "out", dtype="bfloat16")
    wrong = {"quant_method": "fp8", "weight_block_size": [7, 7]}
    base = _rewritten(tiny.base, tmp_path / "odd", _scaled("blocks"), quantization_config=wrong)
    with pytest.raises(InputError, match="does not fit a weight"):
        merge_lora_adapters(base, tiny.adapters, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_workers_change_no_byte_of_experts_and_saved_modules(moe, savers, tmp_path):
    for number, (base, adapters) in enumerate((moe, savers)):
        found = []
        for workers in (1, 3):
            out = tmp_path / f"{number}-{workers}"
            merge_lora_adapters(base, adapters, out, workers=workers)
            found.append(digests(out))
        assert found[0] == found[1]
