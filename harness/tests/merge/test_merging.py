"""Merged checkpoints against float64 from the files, transformers, and accidents."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness import InputError, merge_lora_adapters
from harness.checkpoint_files import read_checkpoint
from harness.merge import ProofError, RoundingLossError, StrategyOptions, flatten_adapters
from harness.merge.storage import DTYPE_NAMES, RAW, decode, encode

_NEW_FILES = {"README.md", "merge_proof.json", "merge_report.md"}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of *folder*."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored(folder: Path, name: str) -> tuple[np.ndarray, str]:
    """A checkpoint's tensor as stored, and its dtype."""
    checkpoint = read_checkpoint(folder)
    entry = checkpoint.entry(name)
    data = np.fromfile(checkpoint.places[name].path, np.uint8)[entry.start : entry.end]
    return data.view(RAW[entry.dtype]).reshape(entry.shape), entry.dtype


def numbers(folder: Path, name: str) -> np.ndarray:
    raw, dtype = stored(folder, name)
    return decode(raw, dtype, np.float64)


def reference(base: Path, adapters: list[Path], factors: list[float]) -> dict[str, np.ndarray]:
    """`W + Σ wᵢ·sᵢ·BᵢAᵢ` in float64 through the harness' own oracle, by tensor."""
    from harness.adapter_files import read_adapter
    from harness.lora import add_deltas

    checkpoint = read_checkpoint(base)
    files = [read_adapter(path) for path in adapters]
    found = {}
    for module in {module for file in files for module in file.pairs}:
        terms = [
            (w, f.pair(module)) for w, f in zip(factors, files, strict=True) if module in f.pairs
        ]
        name = f"{module}.weight"
        found[name] = add_deltas(checkpoint.tensor(name), terms).numpy()
    return found


def exact_share(folder: Path, wanted: dict[str, np.ndarray], dtype: str) -> float:
    """The share of all entries that are the rounded float64 sum; of a small tensor's alone, one
    near-tie, which every processor sums in an order of its own, would be much."""
    same = total = 0
    for name, expected in wanted.items():
        raw, found = stored(folder, name)
        assert found == dtype
        same += int(np.count_nonzero(raw == encode(expected, dtype)))
        total += raw.size
    return same / total


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A bfloat16 base in several shards, and two adapters of other ranks, scales and targets."""
    import torch

    from harness.testing.tiny import AdapterSpec, tiny_stack

    return tiny_stack(
        tmp_path_factory.mktemp("sharded"),
        adapters={
            "style": AdapterSpec(rank=4, alpha=8),
            "instruct": AdapterSpec(
                rank=8, alpha=8, rslora=True, targets=("q_proj", "v_proj"), dtype=torch.bfloat16
            ),
        },
        dtype=torch.bfloat16,
        hidden=64,
        max_shard_size="100KB",
    )


@pytest.mark.parametrize(
    ("strategy", "weights", "factors"),
    [
        ("sequential", None, [1.0, 1.0]),
        ("weighted", [0.7, -0.3], [0.7, -0.3]),
        ("average", None, [0.5, 0.5]),
        ("average", [3.0, 1.0], [0.75, 0.25]),
        ("svd", None, [1.0, 1.0]),
    ],
)
def test_every_merged_entry_is_the_rounded_float64_sum(
    sharded, tmp_path, strategy, weights, factors
):
    adapters = list(sharded.adapters.values())
    report = merge_lora_adapters(
        sharded.base, adapters, tmp_path / "out", merge_strategy=strategy, weights=weights,
        verify="full",
    )  # fmt: skip
    wanted = reference(sharded.base, adapters, factors)
    assert report.exact_share == exact_share(tmp_path / "out", wanted, "BF16") >= 0.999
    for name in set(read_checkpoint(sharded.base).places) - set(wanted):
        np.testing.assert_array_equal(
            stored(tmp_path / "out", name)[0], stored(sharded.base, name)[0]
        )


def test_layout_and_every_other_file_are_the_bases(sharded, tmp_path):
    (sharded.base / "modeling_own.py").write_text("raise SystemExit('never run')\n")
    merge_lora_adapters(sharded.base, list(sharded.adapters.values()), tmp_path / "out")
    base, out = digests(sharded.base), digests(tmp_path / "out")
    assert set(out) == set(base) | _NEW_FILES
    assert len(read_checkpoint(sharded.base).shards) > 2
    changed = {name for name in base if base[name] != out[name]}
    assert changed
    assert all(name.endswith(".safetensors") for name in changed)
    for shard in read_checkpoint(sharded.base).shards:
        head = shard.path.read_bytes()[: shard.data_start]
        assert (tmp_path / "out" / shard.path.name).read_bytes()[: shard.data_start] == head


@pytest.mark.parametrize("strategy", ["sequential", "dare_ties", "knots"])
def test_workers_order_and_repetition_change_no_byte(sharded, tmp_path, strategy):
    style, instruct = sharded.adapters.values()
    runs = []
    for number, (adapters, workers) in enumerate(
        [([style, instruct], 1), ([style, instruct], 3), ([instruct, style], 2)]
    ):
        out = tmp_path / str(number)
        merge_lora_adapters(sharded.base, adapters, out, merge_strategy=strategy, workers=workers)
        runs.append(digests(out))
    assert runs[0] == runs[1]
    weights = [name for name in runs[0] if name.endswith(".safetensors")]
    assert {name: runs[0][name] for name in weights} == {name: runs[2][name] for name in weights}


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
def test_transformers_loads_the_result_and_says_what_the_live_stack_says(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    made = tiny_stack(tmp_path / "made", family=family)
    merge_lora_adapters(made.base, made.adapters, tmp_path / "out", verify="full")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12)[None]
    with load_engine(resolve_stack(adapters=made.adapters), device="cpu") as engine:
        with engine.mode("stacked") as live, torch.inference_mode():
            expected = live(ids).logits
        with engine.mode("base") as live, torch.inference_mode():
            plain = live(ids).logits
    with torch.inference_mode():
        found = merged(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_untied_when_an_adapter_changes_one_of_the_two(target, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from harness.testing.tiny import AdapterSpec, tiny_stack

    made = tiny_stack(
        tmp_path / "made", tied=True,
        adapters={"style": AdapterSpec(targets=("q_proj", target), options={
            "ensure_weight_tying": False})},
    )  # fmt: skip
    merge_lora_adapters(made.base, made.adapters, tmp_path / "out", verify="full")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    original = numbers(made.base, "model.embed_tokens.weight")
    head = numbers(tmp_path / "out", "lm_head.weight")
    table = numbers(tmp_path / "out", "model.embed_tokens.weight")
    kept, changed = (head, table) if target == "embed_tokens" else (table, head)
    np.testing.assert_array_equal(kept, original)
    assert np.abs(changed - original).max() > 1e-3
    from peft import PeftModel

    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base), made.adapters["style"]
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_another_dtype_is_rounded_once_and_said_in_the_config(tiny, tmp_path, dtype):
    adapters = list(tiny.adapters.values())
    report = merge_lora_adapters(tiny.base, adapters, tmp_path / "out", dtype=dtype, verify="full")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    wanted = reference(tiny.base, adapters, [1.0, 1.0])
    assert exact_share(tmp_path / "out", wanted, DTYPE_NAMES[dtype]) >= 0.999
    norm = "model.norm.weight"
    np.testing.assert_array_equal(
        stored(tmp_path / "out", norm)[0],
        encode(numbers(tiny.base, norm), stored(tmp_path / "out", norm)[1]),
    )
    assert report.rounding_loss is not None


def test_the_ledger_is_the_loss_counted_by_hand(sharded, tmp_path):
    adapters = list(sharded.adapters.values())
    report = merge_lora_adapters(sharded.base, adapters, tmp_path / "out", verify="full")
    row = next(r for r in report.tensors if r.name.endswith("layers.1.self_attn.q_proj.weight"))
    before, after = numbers(sharded.base, row.name), numbers(tmp_path / "out", row.name)
    wanted = reference(sharded.base, adapters, [1.0, 1.0])[row.name]
    lost = np.linalg.norm(after - wanted) / np.linalg.norm(wanted - before)
    assert row.rounding_loss == pytest.approx(lost, rel=1e-6)
    assert row.unmoved == np.count_nonzero((after == before) & (wanted != before))
    assert row.checked == after.size
    assert report.one_by_one_loss > report.rounding_loss > 0
    sampled = merge_lora_adapters(sharded.base, adapters, tmp_path / "sampled")
    assert sampled.rounding_loss == pytest.approx(report.rounding_loss, rel=0.2)
    assert sum(r.checked for r in sampled.tensors) < sum(r.checked for r in report.tensors)


def test_a_loss_above_the_gate_keeps_nothing(sharded, tmp_path):
    adapters = list(sharded.adapters.values())
    with pytest.raises(RoundingLossError, match="nothing was written") as caught:
        merge_lora_adapters(sharded.base, adapters, tmp_path / "out", max_rounding_loss=1e-6)
    assert caught.value.report.rounding_loss > 1e-6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verify", ["sampled", "full"])
def test_a_flipped_byte_is_found_before_the_output_gets_its_name(
    sharded, tmp_path, monkeypatch, verify
):
    from harness.merge import merging

    write = merging.write_shards

    def flip(folder, plan, *rest, **more):
        write(folder, plan, *rest, **more)
        # Where a sampled check looks too: the last row of a merged tensor, its exponent's byte.
        tensor = plan.merged[0]
        shard = next(s.name for s in plan.shards if tensor in s.tensors)
        with (folder / shard).open("r+b") as file:
            file.seek(tensor.end - 1)
            byte = file.read(1)[0]
            file.seek(tensor.end - 1)
            file.write(bytes([byte ^ 0x40]))

    monkeypatch.setattr(merging, "write_shards", flip)
    with pytest.raises(ProofError, match="read back"):
        merge_lora_adapters(
            sharded.base, list(sharded.adapters.values()), tmp_path / "out", verify=verify
        )
    assert list(tmp_path.iterdir()) == []


def test_full_verification_records_every_hash_and_beside_the_weights_lies_the_proof(
    sharded, tmp_path
):
    report = merge_lora_adapters(sharded.base, sharded.adapters, tmp_path / "out", verify="full")
    proof = json.loads((tmp_path / "out" / "merge_proof.json").read_text())
    out = digests(tmp_path / "out")
    assert proof["sha256"]["output"] == {n: out[n] for n in proof["sha256"]["output"]}
    assert len(proof["sha256"]["base"]) == len(read_checkpoint(sharded.base).shards)
    assert [a["name"] for a in proof["adapters"]] == ["style", "instruct"]
    assert "seconds" not in proof
    assert report.as_json()["seconds"] > 0
    markdown = (tmp_path / "out" / "merge_report.md").read_text()
    assert "| style" in markdown
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_strategy": "slerp"}, "unknown strategy"),
        ({"merge_strategy": "weighted"}, "needs one weight"),
        ({"merge_strategy": "weighted", "weights": [1.0]}, "1 weights for 2 adapters"),
        ({"merge_strategy": "weighted", "weights": [1.0, float("nan")]}, "not a finite number"),
        ({"merge_strategy": "average", "weights": [1.0, -1.0]}, "sum to zero"),
        ({"weights": [1.0, 1.0]}, "takes no weights"),
        ({"dtype": "int8"}, "no dtype to store"),
        ({"workers": 0}, "0 workers"),
        ({"max_rounding_loss": -1.0}, "no share"),
        ({"verify": "twice"}, "is not known"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tiny, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_would_destroy_something_is_refused(tiny, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(tiny.base, made / "base")
    style = tiny.adapters["style"]
    for place, message in (
        (made / "base", "lies inside an input"),
        (made / "base" / "merged", "lies inside an input"),
        (made, "holds an input"),
    ):
        with pytest.raises(InputError, match=message):
            merge_lora_adapters(made / "base", [style], place, force=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        merge_lora_adapters(made / "base", [style], tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    merge_lora_adapters(made / "base", [style], tmp_path / "full", force=True)
    assert not (tmp_path / "full" / "thesis.txt").exists()
    assert digests(made / "base") == digests(tiny.base)


def test_an_adapter_of_another_base_is_refused_although_the_shapes_fit(tiny, tmp_path):
    from harness.testing.tiny import tiny_base

    other = tiny_base(tmp_path / "other", seed=99)
    with pytest.raises(InputError, match="whose weights differ"):
        merge_lora_adapters(other, tiny.adapters, tmp_path / "out")
    wide = tiny_base(tmp_path / "wide", hidden=64)
    with pytest.raises(InputError, match="needs a base weight of"):
        merge_lora_adapters(wide, tiny.adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}]
)
def test_what_is_not_additive_is_refused_with_its_reason(tiny, tmp_path, adapter_copy, config):
    with pytest.raises(InputError, match=next(iter(config))):
        merge_lora_adapters(tiny.base, [adapter_copy(**config)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_adapter_twice_is_refused_with_the_way_to_double_it(tiny, adapter_copy, tmp_path):
    style = tiny.adapters["style"]
    for copy, what in ((style, "are the same folder"), (adapter_copy(), "hold the same weights")):
        for run in (
            lambda twice: merge_lora_adapters(tiny.base, twice, tmp_path / "out"),
            lambda twice: flatten_adapters(twice, tmp_path / "out"),
        ):
            with pytest.raises(InputError, match=f"{what}.* for a double weight use --weights 2"):
                run({"one": style, "two": copy})
    assert not (tmp_path / "out").exists()


def test_nan_in_an_adapter_is_refused(tiny, tmp_path, adapter_copy):
    folder = adapter_copy()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds NaN at \["):
        merge_lora_adapters(tiny.base, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(InputError, match="quantised"):
        merge_lora_adapters(base, tiny.adapters, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.norm.weight"])
def test_a_result_too_large_for_float16_is_refused(tiny, adapter_copy, tmp_path, name):
    base, style = tmp_path / "base", adapter_copy(base_model_name_or_path=None)
    shutil.copytree(tiny.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name].flat[0] = 1e5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=f"{name}': a number does not fit into F16"):
        merge_lora_adapters(base, [style], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["weighted", "ties", "svd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_that_no_model_computes_with_is_refused(
    tiny, adapter_copy, tmp_path, strategy, dtype
):
    style, out = adapter_copy(lora_alpha=9000 * 4), tmp_path / "out"
    adapters = [style, tiny.adapters["instruct"]]
    with pytest.raises(InputError, match=r"weight': would hold [0-9.e+]+, beyond 1e\+06 → choose"):
        merge_lora_adapters(
            tiny.base, adapters, out, merge_strategy=strategy, weights=[9000, 1], dtype=dtype
        )
    with pytest.raises(InputError, match=r"would hold [0-9.e+]+, beyond 10000 → choose smaller"):
        flatten_adapters(adapters, out, weights=[9000, 1], dtype=dtype)
    assert not out.exists()


def test_weights_of_other_formats_and_hidden_files_are_not_carried_along(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    for name in ("pytorch_model.bin", "model.gguf", ".secret", "README.md"):
        (base / name).write_text("the base's")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("the base's")
    merge_lora_adapters(base, tiny.adapters, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.name in _NEW_FILES or path.name not in (
            "pytorch_model.bin", "model.gguf", ".secret", ".git", "config"
        )  # fmt: skip
    assert "the base's" not in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_a_base_without_a_template_gets_the_last_adapters(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    (base / "chat_template.jinja").unlink()
    adapters = {}
    for name, path in tiny.adapters.items():
        adapters[name] = tmp_path / name
        shutil.copytree(path, adapters[name])
        (adapters[name] / "chat_template.jinja").write_text(f"{{# {name} #}}")
    merge_lora_adapters(base, adapters, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{# instruct #}"


@pytest.mark.parametrize("written", [b"\x80", b"", b"[1]", b'{"chat_template": 1, }'])
def test_a_base_whose_tokenizer_config_cannot_be_read_is_refused(tiny, tmp_path, written):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_bytes(written)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        merge_lora_adapters(base, dict(tiny.adapters), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["ties", "della", "tsv", "iso_c", "magnitude_prune"])
def test_other_strategies_write_their_own_delta(sharded, tmp_path, strategy):
    report = merge_lora_adapters(
        sharded.base, sharded.adapters, tmp_path / "out", merge_strategy=strategy,
        options=StrategyOptions(density=0.4), verify="full",
    )  # fmt: skip
    assert report.exact_share >= 0.999
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = reference(sharded.base, list(sharded.adapters.values()), [1.0, 1.0])[name]
    assert np.abs(numbers(tmp_path / "out", name) - plain).max() > 0.01
