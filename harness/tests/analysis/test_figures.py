"""Figures of whole adapters: against dense deltas, and what is said of odd and broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.tests.analysis.dense import layered_adapter, write_adapter


def _figures(folder: Path, **options: Any) -> Any:
    from harness.analysis.running import analyze

    return analyze(folder, **options)


def _texts(figures: Any, level: str) -> str:
    from harness.analysis import findings_of

    return "\n".join(f.text for f in findings_of(figures) if f.level == level)


def test_every_figure_of_a_module_follows_its_definition(tmp_path: Path) -> None:
    import torch

    from harness.adapter_files import read_adapter

    folder = layered_adapter(tmp_path / "a", seed=1)
    module = _figures(folder, exact_entries=True).modules[2]
    pair = read_adapter(folder).pair(module.module)
    delta = pair.delta()
    values = torch.linalg.svdvals(delta)[:4]
    shares = values / values.sum()
    energy = values.square().cumsum(0) / values.square().sum()
    assert (module.kind, module.layer, module.rank, module.scale) == ("down_proj", 1, 4, 2.0)
    assert module.parameters == 4 * 16 + 24 * 4
    assert module.bytes == 4 * module.parameters
    expected = {
        "norm_a": pair.a.double().norm(),
        "norm_b": pair.b.double().norm(),
        "norm_delta": delta.norm(),
        "spectral_norm": values[0],
        "stable_rank": (delta.norm() / values[0]) ** 2,
        "effective_rank": torch.exp(-(shares * shares.log()).sum()),
        "rms": delta.square().mean().sqrt(),
    }
    for name, value in expected.items():
        assert getattr(module, name) == pytest.approx(float(value), rel=1e-9), name
    assert module.energy_top == pytest.approx({1: energy[0].item(), 2: energy[1].item(), 4: 1.0})
    assert module.rank_99 == int((energy < 0.99).sum()) + 1
    assert module.entries_delta.mean == pytest.approx(float(delta.mean()), rel=1e-9)
    assert module.entries_delta.std == pytest.approx(float(delta.std(correction=0)), rel=1e-9)
    assert module.entries_b.max_magnitude == pytest.approx(float(pair.b.abs().max()), rel=1 / 128)


def test_groups_add_norms_in_squares_and_count_each_module_once(tmp_path: Path) -> None:
    figures = _figures(layered_adapter(tmp_path / "a", seed=2, layers=3))
    assert [group.name for group in figures.layers] == ["0", "1", "2"]
    assert {group.name for group in figures.kinds} == {"q_proj", "down_proj"}
    for groups in (figures.layers, figures.kinds):
        total = sum(group.norm_delta**2 for group in groups)
        assert total == pytest.approx(figures.total.norm_delta**2)
        assert sum(group.parameters for group in groups) == figures.total.parameters


def test_rslora_and_patterns_change_the_scale(tmp_path: Path) -> None:
    import torch

    tensors = {
        "model.layers.0.mlp.q_proj.lora_A": torch.ones(4, 8),
        "model.layers.0.mlp.q_proj.lora_B": torch.ones(8, 4),
        "model.layers.1.mlp.k_proj.lora_A": torch.ones(2, 8),
        "model.layers.1.mlp.k_proj.lora_B": torch.ones(8, 2),
    }
    folder = write_adapter(
        tmp_path / "a", tensors, use_rslora=True, rank_pattern={"k_proj": 2},
        alpha_pattern={"k_proj": 6},
    )  # fmt: skip
    by_kind = {module.kind: module.scale for module in _figures(folder).modules}
    assert by_kind == pytest.approx({"q_proj": 8 / 4**0.5, "k_proj": 6 / 2**0.5})


def test_an_untrained_adapter_and_dead_ranks_are_found(tmp_path: Path) -> None:
    import torch

    name = "model.layers.0.mlp.q_proj"
    a, b = torch.randn(4, 8), torch.zeros(8, 4)
    folder = write_adapter(tmp_path / "a", {f"{name}.lora_A": a, f"{name}.lora_B": b})
    figures = _figures(folder)
    assert figures.modules[0].untrained
    assert "never trained" in _texts(figures, "fault")
    b = torch.randn(8, 4)
    b[:, 2] = 0
    folder = write_adapter(tmp_path / "b", {f"{name}.lora_A": a, f"{name}.lora_B": b})
    figures = _figures(folder)
    assert figures.modules[0].dead_ranks == 1
    assert "1 ranks of b are dead" in _texts(figures, "attention")


def test_an_outlier_layer_is_named(tmp_path: Path) -> None:
    import torch

    tensors = {}
    for layer in range(12):
        generator = torch.Generator().manual_seed(layer)
        name = f"model.layers.{layer}.mlp.q_proj"
        size = 20.0 if layer == 7 else 1.0
        tensors[f"{name}.lora_A"] = torch.randn(4, 64, generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(64, 4, generator=generator) * size
    text = _texts(_figures(write_adapter(tmp_path / "a", tensors)), "attention")
    assert "q_proj in layer 7" in text
    assert "model.layers.7.mlp.q_proj" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_by_file_and_tensor(tmp_path: Path, value: float) -> None:
    import torch

    tensors = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.q_proj"
        tensors[f"{name}.lora_A"] = torch.randn(4, 8)
        tensors[f"{name}.lora_B"] = torch.randn(8, 4)
    tensors["model.layers.1.mlp.q_proj.lora_B"][3, 2] = value
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(InputError, match=r"adapter_model.*layers\.1.*lora_B.*1 of 32"):
        _figures(folder)
    kept = _figures(folder, keep_going=True)
    assert [module.module for module in kept.modules] == ["model.layers.0.mlp.q_proj"]
    assert "layers.1" in str(kept.faults[0])


def test_half_a_pair_and_a_truncated_file_leave_the_sound_part(tmp_path: Path) -> None:
    folder = layered_adapter(tmp_path / "a", seed=3, layers=4)
    path = folder / "adapter_model.safetensors"
    whole = _figures(folder)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="ends at byte"):
        _figures(folder)
    kept = _figures(folder, keep_going=True)
    assert 0 < len(kept.modules) < len(whole.modules)
    faults = "\n".join(map(str, kept.faults))
    assert "ends at byte" in faults
    assert "is missing" in faults
    assert all(module in whole.modules for module in kept.modules)


def test_a_rank_other_than_the_configs_is_refused_or_left_out(tmp_path: Path) -> None:
    import torch

    tensors = {
        "model.layers.0.mlp.q_proj.lora_A": torch.randn(4, 8),
        "model.layers.0.mlp.q_proj.lora_B": torch.randn(8, 4),
        "model.layers.0.mlp.k_proj.lora_A": torch.randn(3, 8),
        "model.layers.0.mlp.k_proj.lora_B": torch.randn(8, 3),
    }
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(InputError, match=r"k_proj.*rank 3.*config says 4"):
        _figures(folder)
    kept = _figures(folder, keep_going=True)
    assert [module.kind for module in kept.modules] == ["q_proj"]


def test_the_relative_norm_is_that_of_the_bases_own_weight(tmp_path: Path) -> None:
    from harness.adapter_files import read_adapter
    from harness.checkpoint_files import read_checkpoint
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(tmp_path)
    figures = _figures(stack.adapters["style"], base_model=stack.base, intruders=2)
    checkpoint = read_checkpoint(stack.base)
    files = read_adapter(stack.adapters["style"])
    for module in figures.modules:
        weight = checkpoint.tensor(f"{module.module}.weight").double()
        expected = files.pair(module.module).delta().norm() / weight.norm()
        assert module.relative_norm == pytest.approx(float(expected), rel=1e-9)
    assert figures.total.relative_norm == pytest.approx(
        figures.total.norm_delta
        / sum((m.norm_delta / m.relative_norm) ** 2 for m in figures.modules) ** 0.5
    )


def test_a_large_foreign_direction_is_an_intruder_and_a_familiar_one_is_not() -> None:
    import torch

    from harness.analysis.against_base import count_intruders
    from harness.analysis.reading import AnalysedPair
    from harness.tests.analysis.dense import make_pair

    weight = torch.diag(torch.linspace(1, 2, 16))
    mixed = torch.ones(16, 1) / 4
    familiar = torch.eye(16)[:, -1:]
    for direction, expected in ((mixed, 1), (familiar, 0)):
        pair = make_pair(0, a=direction.T * 9, b=direction, scale=1.0)
        analysed = AnalysedPair(pair=pair, path=Path("x"), name_a="a", name_b="b")
        assert count_intruders(weight, analysed, top=1) == expected


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"use_dora": True}, {"q_proj", "v_proj"}),
        ({"modules_to_save": ["lm_head"]}, {"q_proj", "v_proj"}),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"q_proj", "embed_tokens"}),
    ],
)
def test_what_peft_saves_beyond_plain_lora_can_be_analysed(
    tmp_path: Path, options: dict[str, Any], kinds: set[str]
) -> None:
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base

    base = tiny_base(tmp_path / "base")
    options = dict(options)
    targets = options.pop("target_modules", ["q_proj", "v_proj"])
    spec = AdapterSpec(targets=targets, options=options)
    figures = _figures(tiny_adapter(tmp_path / "a", base, spec, seed=1), base_model=base)
    assert {module.kind for module in figures.modules} == kinds
    assert all(module.relative_norm for module in figures.modules)
    if options.get("use_dora"):
        assert all(module.magnitude for module in figures.modules)
    if options:
        assert next(iter(options)) in _texts(figures, "note")


def test_expert_parameters_are_analysed_expert_by_expert(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from harness.testing.tiny import tiny_model

    model = tiny_model("qwen3_moe")
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=[], target_parameters=["mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "a")
    figures = _figures(tmp_path / "a")
    assert len(figures.modules) == 2 * 4
    layer = wrapped.base_model.model.model.layers[1].mlp.experts
    dense = layer.get_delta_weight("default").detach().double()
    for expert in range(4):
        (found,) = [
            m
            for m in figures.modules
            if m.module == f"model.layers.1.mlp.experts.down_proj#{expert}"
        ]
        assert found.norm_delta == pytest.approx(float(dense[expert].norm()), rel=1e-6)
