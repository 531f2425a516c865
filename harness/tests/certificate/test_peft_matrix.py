"""Our ΔW against PEFT's `get_delta_weight` on every LoRA configuration of PEFT's own tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from harness.tests.certificate.peft_matrix import ROWS, Row
from harness.tests.peft_models import build


def write(row: Row, folder: Path) -> Any:
    """Save an adapter of the row's configuration with random factors; returns the bare base."""
    import torch
    from peft import LoraConfig, MontecloraConfig, VeloraConfig, get_peft_model

    base = build(row.family, tied=row.tied)
    options = dict(row.options)
    for key, made in (("velora_config", VeloraConfig), ("monteclora_config", MontecloraConfig)):
        if key in options:
            options[key] = made(**options[key])
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **options))
    initial = folder / "initial"
    if row.converted:
        config = model.peft_config["default"]
        config.init_lora_weights = True
        model.save_pretrained(initial)
        config.init_lora_weights = row.options["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn_like(parameter) * 0.1
    if row.converted:
        model.save_pretrained(
            folder / "adapter", path_initial_model_for_weight_conversion=str(initial)
        )
    else:
        model.save_pretrained(folder / "adapter")
    return base


def _params() -> list[Any]:
    """Every row; all but the first of each of PEFT's files and answers are slow together."""
    seen: set[tuple[str, bool]] = set()
    params = []
    for row in ROWS:
        kind = (row.source.partition("::")[0], row.refused is None)
        marks = [pytest.mark.slow] if kind in seen else []
        seen.add(kind)
        params.append(pytest.param(row, id=row.id, marks=marks))
    return params


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", _params())
def test_every_lora_configuration_that_peft_tests_has_its_delta_or_its_reason(
    row: Row, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from harness.adapter_config import read_adapter_config
    from harness.analysis.reading import open_adapter

    base = write(row, tmp_path)
    reasons = read_adapter_config(tmp_path / "adapter").not_additive
    if row.refused is None:
        assert not reasons
    else:
        assert any(row.refused in reason for reason in reasons), reasons
        if not row.options.get("target_parameters"):
            return  # it is more than s·B·A, so there is no ΔW to agree on
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = {pair.pair.module: pair.pair for pair in open_adapter(tmp_path / "adapter").pairs()}
    adapted = {
        _plain_name(name.removeprefix("base_model.model."), layer): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {module.partition("#")[0] for module in ours} == set(adapted)
    assert len(adapted) == (row.count or len(adapted))
    assert len(adapted) > 0
    for module, layer in adapted.items():
        theirs = layer.get_delta_weight("default").detach().double()
        experts = getattr(layer, "num_experts", 1)
        for expert in range(experts):
            pair = ours[module if experts == 1 else f"{module}#{expert}"]
            mine, other = pair.delta(), theirs if experts == 1 else theirs[expert]
            if experts > 1 and not layer._did_swap_in_out_features:
                other = other.T  # the model keeps its experts as (experts, in, out)
            # A row of ΔW sums `rank` products of float32; PEFT adds, scales and casts in it.
            bound = 4 * torch.finfo(torch.float32).eps * pair.rank**0.5
            assert float(mine.norm()) > 0, module
            assert float((mine - other).norm()) <= bound * float(mine.norm()), module


def _plain_name(module: str, layer: Any) -> str:
    """A fused parameter's own name, whatever PEFT wrapped around it."""
    parameter = getattr(layer, "parameter_name", "weight")
    inner = module.replace(".base_layer", "")
    return module if parameter == "weight" else f"{inner}.{parameter}"


@pytest.mark.filterwarnings("ignore")
def test_parameters_of_one_module_with_different_ranks_are_refused(tmp_path: Path) -> None:
    from harness import InputError
    from harness.analysis.reading import open_adapter

    targets = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    options = {"target_modules": [], "target_parameters": targets, "r": 4}
    options["rank_pattern"] = {"experts.down_proj": 2}
    write(Row(id="x", source="", family="qwen3_moe", options=options), tmp_path)
    with pytest.raises(InputError, match="which factor is whose"):
        open_adapter(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["cat", "linear"])
@pytest.mark.parametrize("rslora", [True, False])
def test_where_peft_adds_adapters_wrongly_the_certificate_says_so(
    way: str, rslora: bool, tmp_path: Path
) -> None:
    from harness.testing.tiny import AdapterSpec
    from harness.tests.certificate.subject import load_live, write_stack

    spec = AdapterSpec(rank=4, alpha=8, rslora=rslora)
    subject = load_live(write_stack(tmp_path, adapters={"style": spec, "instruct": spec}))
    subject.model.add_weighted_adapter(
        ["style", "instruct"], [1.0, 1.0], "both", combination_type=way
    )
    subject.model.set_adapter("both")
    found = subject.certify()
    if way == "cat" and not rslora:  # the one that is right
        assert found.verdict == "held", found.explain()
        return
    words = "cross terms" if way == "linear" else "off by"
    for name in ("adapters in memory", "module outputs"):
        check = found.check(name)
        assert check.outcome == "failed"
        assert words in "\n".join(check.evidence), check.evidence


def test_the_matrix_holds_each_configuration_once() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {row.source.partition("::")[0] for row in ROWS} >= {
        "test_decoder_models.py", "test_custom_models.py", "test_initialization.py",
        "test_target_parameters.py", "test_tuners_utils.py",
    }  # fmt: skip
    keys = {key for row in ROWS for key in row.options}
    assert keys >= {
        "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
        "exclude_modules", "target_parameters", "fan_in_fan_out", "init_lora_weights",
    }  # fmt: skip
