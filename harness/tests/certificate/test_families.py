"""Base models of other families as the hub has them, and code that is replaced in a process.

What the tiny Qwen3 of the corpus does not have: biases, buffers that no file holds, heads that are
tied without `config.json` saying so.
"""

import copy
import json

import pytest

from harness.tests.certificate.subject import load_live, write_stack
from harness.tests.peft_models import build

FAMILIES = ("gpt2", "gptj", "gpt_neox", "bloom", "gemma3", "mistral")
WEIGHTS, BUFFERS, HOOKS = "base weights", "buffers", "hooks and patches"


def live_stack(folder, family, *, tie_said=True, targets="all-linear"):
    """A stack on a model of *family*: the live model with its one adapter, and the stack."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from harness import resolve_stack

    base = build(family)
    base.save_pretrained(folder / "base")
    if not tie_said:
        file = folder / "base" / "config.json"
        config = json.loads(file.read_text())
        assert config.pop("tie_word_embeddings")
        file.write_text(json.dumps(config))
    config = LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=family == "gpt2"
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.data.normal_(std=0.05)
    wrapped.save_pretrained(folder / "style", save_embedding_layers=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, folder / "style", adapter_name="style").eval()
    return model, resolve_stack(base_model=folder / "base", adapters={"style": folder / "style"})


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return live_stack(tmp_path_factory.mktemp("gemma"), "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_stack_of_a_family_is_certified(family, tmp_path):
    from harness import certify_stack

    certificate = certify_stack(*live_stack(tmp_path, family))
    assert certificate.verdict == "held", certificate.explain()
    assert "not judged" not in "".join(certificate.check(BUFFERS).evidence)


def test_adapter_of_an_embedding_that_scales_is_certified_live_and_caught_where_it_is_not(tmp_path):
    import torch

    from harness import certify_stack

    model, stack = live_stack(tmp_path, "gemma3", targets=["embed_tokens", "q_proj"])
    for dtype in (torch.float32, torch.bfloat16):
        certificate = certify_stack(model.to(dtype), stack)
        for name in (
            "module outputs",
            "live, flattened and merged logits",
            "each adapter's effect",
        ):
            assert certificate.check(name).passed, certificate.explain()
    layer = model.base_model.model.model.embed_tokens
    layer.scaling["style"] *= 2
    found = certify_stack(model.float(), stack, end_to_end=False).check("module outputs")
    assert "the scale of adapter style is off by 2×" in "".join(found.evidence)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bloom"])
def test_head_that_is_tied_unsaid_is_certified(family, tmp_path):
    from harness import certify_stack

    certificate = certify_stack(*live_stack(tmp_path, family, tie_said=False))
    assert certificate.verdict == "held", certificate.explain()


def test_bias_that_is_lost_is_named(tmp_path):
    subject = load_live(write_stack(tmp_path, family="qwen2"))
    assert subject.certify().verdict == "held"
    name = "model.layers.1.self_attn.k_proj"
    subject.layer(name).base_layer.bias = None
    found = subject.certify(end_to_end=False).check(WEIGHTS)
    assert found.outcome == "failed"
    assert f"{name}.bias: the files have it and the model does not" in found.evidence


def test_norm_that_was_cast_alone_is_named(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    stack = write_stack(tmp_path)
    file = stack.base.path / "model.safetensors"
    # The tiny base's norms are ones, which a cast leaves alone.
    norm = torch.linspace(0.9, 1.1, 32)
    save_file(load_file(file) | {"model.norm.weight": norm}, file, metadata={"format": "pt"})
    subject = load_live(stack)
    assert subject.certify(end_to_end=False).passed
    subject.layer("model.norm").to(torch.bfloat16)
    found = subject.certify(end_to_end=False).check(WEIGHTS)
    assert found.outcome == "failed"
    assert "model.norm.weight: it was rounded through bfloat16" in found.evidence


def test_layer_that_stands_in_for_another_is_named_and_left_as_it_was(subject):
    layers = subject.bare.model.layers
    layers[1] = layers[0]
    certificate = subject.certify()
    assert certificate.check("architecture").outcome == "failed"
    assert certificate.check(WEIGHTS).outcome == "failed"
    assert not any("forward" in vars(module) for module in subject.bare.modules())


def test_buffers_that_no_file_holds_are_computed_from_the_config(gemma):
    from harness import certify_stack

    model, stack = gemma
    names = [name for name, _ in model.named_buffers()]
    assert any(name.endswith("embed_scale") for name in names)
    for name in names:
        changed = copy.deepcopy(model)
        changed.get_buffer(name).mul_(1.001)
        found = certify_stack(changed, stack, end_to_end=False).check(BUFFERS)
        assert found.outcome == "failed", name
        assert name.removeprefix("base_model.model.") in found.evidence[0]


def test_hook_on_every_module_of_the_process_is_judged_by_the_logits(subject):
    from torch.nn.modules.module import register_module_forward_hook

    kind = type(subject.layer("model.layers.0"))

    def steer(module, args, output):
        return output + 0.05 if type(module) is kind else None

    for hook, outcome in ((steer, "failed"), (lambda *_: None, "held")):
        handle = register_module_forward_hook(hook)
        try:
            found = subject.certify(end_to_end=False).check(HOOKS)
        finally:
            handle.remove()
        assert found.outcome == outcome
        assert "every module: forward hook" in found.evidence[0]
    assert subject.certify(end_to_end=False).passed


def test_code_of_the_model_that_is_replaced_in_the_process_decides_nothing(subject, monkeypatch):
    import functools
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = type(subject.layer("model.layers.0.mlp"))
    rotary = sys.modules[kind.__module__].apply_rotary_pos_emb
    own = kind.forward

    @functools.wraps(own)
    def weaker(self, x):
        return own(self, x) * 0.9

    def turned(*arguments, **options):
        return rotary(*arguments, **options)

    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    patches = {
        f"{kind.__name__}.forward is": lambda: monkeypatch.setattr(kind, "forward", weaker),
        "apply_rotary_pos_emb of": lambda: monkeypatch.setattr(
            sys.modules[kind.__module__], "apply_rotary_pos_emb", turned
        ),
        "the attention function sdpa is": lambda: monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: attention(*a, **k)
        ),
    }
    for words, patch in patches.items():
        patch()
        certificate = subject.certify(end_to_end=False)
        monkeypatch.undo()
        found = certificate.check(HOOKS)
        assert found.outcome == "undecided"
        assert not certificate.passed
        assert words in found.evidence[0]
    assert subject.certify(end_to_end=False).passed


def test_checks_that_need_a_tokenizer_say_that_none_was_given(subject):
    from harness import certify_stack

    certificate = certify_stack(subject.model, subject.stack, end_to_end=False)
    assert certificate.passed
    for name in ("padding and mask", "chat template", "token ids"):
        assert certificate.check(name).outcome == "skipped"
        assert "no tokenizer was given" in certificate.check(name).evidence[0]
    assert "tokenizer" not in certificate.check("EOS ids").evidence[0]


def test_what_is_no_stack_or_prompt_is_bad_input(subject):
    from harness import InputError, certify_stack

    with pytest.raises(InputError, match="str is no stack"):
        certify_stack(subject.model, "stack.toml")
    with pytest.raises(InputError, match="list is no prompt"):
        certify_stack(subject.model, subject.stack, prompts=[["a"]])
    subject.prompts = "one two three"  # one prompt, not thirteen
    assert subject.certify(end_to_end=False).figures["prompt_tokens"] == len(subject.prompts)
    subject.prompts = (subject.prompts,)
    assert subject.certify(end_to_end=False).figures["prompt_tokens"] == len(subject.prompts[0])


def test_model_that_is_offloaded_is_undecided_and_runs(subject):
    import torch
    from accelerate import cpu_offload

    cpu_offload(subject.bare, execution_device=torch.device("cpu"))
    certificate = subject.certify()
    for name in ("adapters in memory", WEIGHTS):
        assert certificate.check(name).outcome == "undecided", certificate.explain()
    assert certificate.verdict == "undecided", certificate.explain()
