"""What can be opened for analysis: Conv1D adapters, several expert parameters, hub ids."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.tests.analysis.dense import layered_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _figures(source: Path | str, **options: Any) -> Any:
    from harness.analysis.running import analyze

    return analyze(source, **options)


def test_conv1d_adapters_are_set_against_the_transposed_base(tmp_path: Path) -> None:
    import torch

    from harness.adapter_files import read_adapter
    from harness.checkpoint_files import read_checkpoint
    from harness.testing.tiny import AdapterSpec, tiny_adapter
    from harness.tests.conv1d import gpt2_base

    base = gpt2_base(tmp_path / "base")
    spec = AdapterSpec(targets=("c_attn", "c_proj"), options={"fan_in_fan_out": True})
    folder = tiny_adapter(tmp_path / "a", base, spec, seed=1)
    figures = _figures(folder, base_model=base, intruders=3)
    assert {module.kind for module in figures.modules} == {"c_attn", "c_proj"}
    files, checkpoint = read_adapter(folder), read_checkpoint(base)
    for module in figures.modules:
        name = checkpoint.weight_name(module.module)
        assert name is not None
        weight, delta = checkpoint.tensor(name).double(), files.pair(module.module).delta()
        assert delta.shape == weight.shape
        assert (module.in_features, module.out_features) == tuple(weight.shape)
        assert module.norm_delta == pytest.approx(float(delta.norm()), rel=1e-9)
        assert module.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)
        # Intruders are output directions: left singular vectors of the (out, in) matrix.
        before = torch.linalg.svd(weight.T).U
        after = torch.linalg.svd((weight + delta).T).U[:, :3]
        foreign = (before.T @ after).abs().max(dim=0).values < 0.5
        assert module.intruders == int(foreign.sum())


_EXPERTS = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")


def _of_experts(folder: Path, *parameters: str, seed: int) -> Any:
    """A PEFT model of a tiny Qwen3-MoE, saved to *folder*, its experts' parameters adapted."""
    import torch
    from peft import LoraConfig, get_peft_model

    from harness.testing.tiny import tiny_model

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=list(parameters),
    )  # fmt: skip
    wrapped = get_peft_model(tiny_model("qwen3_moe"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return wrapped.base_model.model.model.layers[1].mlp.experts


def _deltas(layer: Any) -> Any:
    return layer.get_delta_weight("default").detach().double()


def test_two_expert_parameters_of_one_module_are_analysed_apart(tmp_path: Path) -> None:
    outer = _of_experts(tmp_path / "a", *_EXPERTS, seed=0)
    figures = _figures(tmp_path / "a")
    found = {module.module: module for module in figures.modules}
    assert len(found) == 2 * (1 + 2 * 4)
    for layer, name in ((outer, "down_proj"), (outer.base_layer, "gate_up_proj")):
        assert layer.parameter_name == name
        for expert, dense in enumerate(_deltas(layer)):
            module = found[f"model.layers.1.mlp.experts.{name}#{expert}"]
            assert module.norm_delta == pytest.approx(float(dense.norm()), rel=1e-6)
            assert (module.out_features, module.in_features) == tuple(dense.shape)
    assert {module.kind for module in figures.modules} == {
        "q_proj", "experts.down_proj", "experts.gate_up_proj",
    }  # fmt: skip


def test_experts_are_compared_by_parameter_however_peft_wraps_them(tmp_path: Path) -> None:
    from harness.analysis.running import compare

    both = _of_experts(tmp_path / "both", *_EXPERTS, seed=1)
    # Alone, gate_up_proj is saved under the name that down_proj has beside it.
    alone = _of_experts(tmp_path / "alone", "mlp.experts.gate_up_proj", seed=2)
    (pair,) = compare([tmp_path / "both", tmp_path / "alone"]).pairs
    found = {module.module: module for module in pair.modules}
    assert len(found) == 2 * (1 + 4)
    assert {name.partition("#")[0] for name in pair.only_first} == {
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)
    }
    assert pair.only_second == ()
    for expert, (one, two) in enumerate(zip(_deltas(both.base_layer), _deltas(alone), strict=True)):
        expected = float((one * two).sum() / (one.norm() * two.norm()))
        module = found[f"model.layers.1.mlp.experts.gate_up_proj#{expert}"]
        assert module.cosine == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_set_against_the_bases_own(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base
    from harness.tests.merge.test_kinds import gpt_oss

    if family == "gpt_oss":
        base = gpt_oss(tmp_path / "base")
    else:
        base = tiny_base(tmp_path / "base", family)
    spec = AdapterSpec(targets=("q_proj",), options={"target_parameters": list(_EXPERTS)})
    figures = _figures(tiny_adapter(tmp_path / "a", base, spec, seed=1), base_model=base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    assert len(figures.modules) > 2
    for module in figures.modules:
        name, _, expert = module.module.partition("#")
        weight = dict(model.named_parameters())[name if expert else f"{name}.weight"]
        own = weight[int(expert)] if expert else weight
        expected = module.norm_delta / float(own.detach().double().norm())
        assert module.relative_norm == pytest.approx(expected, rel=1e-6), module.module


def _cached(home: Path, repository: str, folder: Path) -> None:
    """Put *folder* into a hub cache as `hf download` leaves it."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    shutil.copytree(folder, place / "snapshots" / COMMIT)


def test_a_hub_id_is_read_from_the_local_cache_without_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.cli import main

    adapter = layered_adapter(tmp_path / "plain", seed=1)
    _cached(tmp_path / "home", "someone/style-lora", adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    figures = _figures("someone/style-lora")
    assert figures.name == "style-lora"
    assert figures.source == f"someone/style-lora ({COMMIT})"
    assert math.isclose(figures.total.norm_delta, _figures(adapter).total.norm_delta)
    # The same by branch, by commit, and from the command line.
    for revision in ("main", COMMIT):
        assert _figures(f"someone/style-lora@{revision}").source.endswith(f"({COMMIT})")
    argv = ["compare", "someone/style-lora", str(adapter), "--names", "hub", "here", "--json"]
    assert main([*argv, "--output", str(tmp_path / "report"), "--no-plots"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"][0]["total"]["cosine"] == pytest.approx(1.0)


def test_a_hub_id_that_is_not_in_the_cache_says_so_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as caught:
        _figures("someone/absent")
    assert "hf download someone/absent" in (caught.value.remedy or "")
