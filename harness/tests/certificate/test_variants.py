"""Each row of the variant table in docs/certificate.md: additive and proven, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.tests.certificate.subject import load_live
from harness.tests.certificate.variants import ADDITIVE, FIELDS, REFUSED, REFUSED_LIVE

TIED = ("embed_tokens, tied", "lm_head, tied", "ensure_weight_tying")
DOCUMENT = Path(__file__).parents[3] / "docs" / "certificate.md"


def write_variant(folder, row):
    """A stack of a plain adapter and one of the row's kind; also the bare base's folder."""
    from harness import resolve_stack
    from harness.testing.tiny import AdapterSpec, tiny_adapter, tiny_base
    from harness.tests.conv1d import gpt2_base

    row = dict(row)
    family, tied = row.pop("family", "qwen3"), row.pop("tied", False)
    if family == "gpt2":
        base = gpt2_base(folder / "base")
        plain = AdapterSpec(targets=("c_attn",), options={"fan_in_fan_out": True})
    else:
        base = tiny_base(folder / "base", family, tie_word_embeddings=tied)
        plain = AdapterSpec(targets=("q_proj", "v_proj"))
    adapters = {
        "style": tiny_adapter(folder / "style", base, plain, seed=1),
        "variant": tiny_adapter(folder / "variant", base, AdapterSpec(**row), seed=2),
    }
    return resolve_stack(base_model=base, adapters=adapters)


@pytest.mark.parametrize("row", list(ADDITIVE))
def test_additive_variant_is_proven_and_a_wrong_one_is_caught(row, tmp_path):
    import torch

    subject = load_live(write_variant(tmp_path, ADDITIVE[row]))
    certificate = subject.certify()
    assert certificate.verdict == "held", certificate.explain()
    # PEFT's own delta agrees with the files' in float32 rounding, module by module.
    from harness.adapter_files import read_adapter

    files = read_adapter(subject.stack.adapter("variant").path)
    for module in files.pairs:
        layer = subject.layer(module)
        ours = files.pair(module).delta()
        theirs = layer.get_delta_weight("variant").double()
        assert float((ours - theirs).norm()) <= 1e-6 * float(ours.norm()), module
    module = next(iter(files.pairs))
    subject.layer(module).scaling["variant"] *= 1.05
    wrong = subject.certify(end_to_end=False)
    assert not wrong.check("adapters in memory").passed
    assert not wrong.check("module outputs").passed
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    "row",
    [r for r in ADDITIVE if r not in TIED and "embed" not in r and "experts" not in r],
)
def test_merge_of_an_additive_variant_is_certified(row, tmp_path):
    subject = load_live(write_variant(tmp_path, ADDITIVE[row]))
    subject.model = subject.model.merge_and_unload()
    certificate = subject.certify()
    assert certificate.verdict == "held", certificate.explain()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("row", TIED)
def test_peft_merge_into_tied_embeddings_is_caught(row, tmp_path):
    subject = load_live(write_variant(tmp_path, ADDITIVE[row]))
    subject.model = subject.model.merge_and_unload()
    assert not subject.certify().check("base weights").passed


@pytest.mark.parametrize("row", list(REFUSED))
def test_refused_variant_says_why(row, adapter_copy):
    from harness import InputError, resolve_stack

    keys, words = REFUSED[row]
    folder = adapter_copy(**keys)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        resolve_stack(adapters={"variant": folder})
    assert caught.value.remedy


def test_quantised_base_is_refused(subject):
    import torch

    from harness import InputError

    linear = subject.layer("model.layers.0.mlp.up_proj").base_layer
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="is quantised"):
        subject.certify()


@pytest.mark.slow
def test_cat_of_rslora_adapters_is_said_to_be_overscaled(tmp_path):
    from harness.testing.tiny import AdapterSpec
    from harness.tests.certificate.subject import write_stack

    spec = AdapterSpec(rank=9, alpha=9, rslora=True)
    subject = load_live(write_stack(tmp_path, adapters={"style": spec, "instruct": spec}))
    subject.model.add_weighted_adapter(
        ["style", "instruct"], [1.0, 1.0], "both", combination_type="cat"
    )
    subject.model.set_adapter("both")
    found = subject.certify().check("adapters in memory")
    assert found.outcome == "failed"
    assert "off by" in "\n".join(found.evidence)


def test_table_in_the_document_has_a_row_for_each_test():
    rows = re.findall(r"^\| ([^|]+?) \| (additive|refused|own oracle)", DOCUMENT.read_text(), re.M)
    assert {row.replace("`", "") for row, _ in rows} == {*ADDITIVE, *REFUSED, *REFUSED_LIVE}
    refused = {row.replace("`", "") for row, answer in rows if answer == "refused"}
    assert refused == {*REFUSED, *REFUSED_LIVE}


def test_every_field_of_peft_s_config_is_answered_by_a_row():
    import dataclasses

    from peft import LoraConfig

    assert set(FIELDS) == {field.name for field in dataclasses.fields(LoraConfig)}
    assert {row for rows in FIELDS.values() for row in rows} <= {*ADDITIVE, *REFUSED}


def test_every_way_of_initialising_that_peft_names_is_answered_by_a_row():
    from typing import get_args, get_type_hints

    from peft import LoraConfig

    names = {
        name.partition("_[")[0]
        for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"])
        for name in get_args(kind)
    }
    assert "pissa_niter" in names
    answered = {row.partition(": ")[2] for row in FIELDS["init_lora_weights"]}
    assert names <= answered


def test_every_other_kind_of_adapter_that_peft_has_is_refused_by_its_name(adapter_copy):
    from peft import PeftType

    from harness import InputError, resolve_stack

    kinds = sorted({kind.value for kind in PeftType} - {"LORA"})
    assert len(kinds) > 30
    for kind in kinds:
        folder = adapter_copy(kind, peft_type=kind)
        with pytest.raises(InputError, match=f"'{kind}' is not LORA: it does not add"):
            resolve_stack(adapters={"variant": folder})
