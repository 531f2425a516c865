"""One adapter for two: its delta is the stack's, PEFT loads it, and servers can too."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness import InputError, flatten_adapters
from harness.adapter_files import read_adapter


def deltas(folder) -> dict[str, np.ndarray]:
    files = read_adapter(folder)
    return {module: files.pair(module).delta().numpy() for module in files.pairs}


def summed(folders, weights) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


@pytest.mark.parametrize("weights", [None, [0.7, -0.3]])
@pytest.mark.parametrize("compress", [False, True])
def test_the_flattened_delta_is_the_weighted_sum(tiny, tmp_path, weights, compress):
    folders = list(tiny.adapters.values())
    report = flatten_adapters(
        folders, tmp_path / "flat", weights=weights, compress=compress, verify="full"
    )
    wanted, found = summed(folders, weights or [1, 1]), deltas(tmp_path / "flat")
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        np.testing.assert_allclose(found[module], delta, atol=3e-7 * np.abs(delta).max())
    config = json.loads((tmp_path / "flat" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 12
    assert config["use_rslora"] is False
    assert report.details["max_lora_rank"] == 16
    assert report.rounding_loss < 1e-6


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Adapters with rsLoRA, rank and alpha patterns, chosen layers and an embedding."""
    from harness.testing.tiny import AdapterSpec, tiny_stack

    return tiny_stack(
        tmp_path_factory.mktemp("odd"),
        adapters={
            "style": AdapterSpec(
                rank=4, alpha=8, rslora=True, targets=("q_proj", "embed_tokens"),
                options={"rank_pattern": {"layers.0.self_attn.q_proj": 2},
                         "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
            ),
            "instruct": AdapterSpec(
                rank=8, alpha=4, targets=("q_proj", "down_proj"),
                options={"layers_to_transform": [1]},
            ),
        },
    )  # fmt: skip


@pytest.mark.parametrize("compress", [False, True])
def test_peft_loads_it_and_the_logits_are_the_live_stacks(odd, tmp_path, compress):
    import torch

    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    flatten_adapters(odd.adapters, tmp_path / "flat", compress=compress, verify="full")
    ids = torch.arange(12)[None]
    found = []
    for adapters, mode in ((odd.adapters, "stacked"), ({"flat": tmp_path / "flat"}, "flat")):
        with (
            load_engine(resolve_stack(adapters=adapters), device="cpu") as engine,
            engine.mode(mode) as model,
            torch.inference_mode(),
        ):
            found.append(model(ids).logits)
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=5e-6 * scale)


def test_modules_that_one_adapter_lacks_get_zero_blocks(tiny, tmp_path):
    flatten_adapters(tiny.adapters, tmp_path / "flat")
    flat, instruct = read_adapter(tmp_path / "flat"), read_adapter(tiny.adapters["instruct"])
    module = next(m for m in flat.pairs if m not in instruct.pairs)
    pair = flat.pair(module)
    assert pair.a.shape[0] == 12
    assert not pair.a[4:].any()
    assert not pair.b[:, 4:].any()
    targets = json.loads((tmp_path / "flat" / "adapter_config.json").read_text())["target_modules"]
    assert "q_proj" in targets, "servers match modules by their last name"


def test_a_truncation_is_the_best_and_reports_its_error(tiny, tmp_path):
    folders = list(tiny.adapters.values())
    report = flatten_adapters(folders, tmp_path / "flat", rank=3, verify="full")
    lost = norm = 0.0
    found = deltas(tmp_path / "flat")
    for module, delta in summed(folders, [1, 1]).items():
        s = np.linalg.svd(delta)[1]
        assert np.linalg.norm(found[module] - delta) == pytest.approx(
            np.linalg.norm(s[3:]), rel=1e-4
        )
        lost, norm = lost + (s[3:] ** 2).sum(), norm + (s**2).sum()
    assert report.details["relative truncation error"] == pytest.approx((lost / norm) ** 0.5)
    assert report.details["max_lora_rank"] == 8
    assert report.rounding_loss == pytest.approx((lost / norm) ** 0.5, rel=0.1)
    said = "\n".join(report.summary())
    assert f"truncated from {report.details['sum of ranks']}) is off by" in said


def test_two_runs_write_the_same_bytes(tiny, tmp_path):
    from harness.tests.merge.test_merging import digests

    for name in ("first", "second"):
        flatten_adapters(tiny.adapters, tmp_path / name, compress=True)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("inf")]}, "not a finite number"),
        ({"rank": 0}, "is not a rank"),
        ({"dtype": "int4"}, "no dtype to store"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tiny, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        flatten_adapters(tiny.adapters, tmp_path / "flat", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_different_shapes_are_refused(tiny, tmp_path):
    from harness.testing.tiny import tiny_adapter, tiny_base

    wide = tiny_adapter(tmp_path / "wide", tiny_base(tmp_path / "base", hidden=64), seed=1)
    with pytest.raises(InputError, match="for style"):
        flatten_adapters({"style": tiny.adapters["style"], "wide": wide}, tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
