"""Is W_base + Σ ΔW what the model does, live and merged, in any order, and without a trace?"""

import pytest

from harness.completion import Application
from harness.reference import reference_weights
from harness.stack import Mode

pytestmark = pytest.mark.stacking

# Of the largest logit: what one forward pass may round differently.
LOGIT_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def prompt_ids(lora_engine, lora_preset):
    return [lora_engine.token_ids(prompt) for prompt in lora_preset.prompts[:4]]


@pytest.fixture(scope="module")
def assert_logits_agree(lora_engine):
    import torch

    def check(first, second):
        for a, b in zip(first, second, strict=True):
            tolerance = LOGIT_TOLERANCE[lora_engine.dtype] * float(a.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)

    return check


def test_merged_weights_are_base_plus_deltas(lora_engine, lora_mode):
    import torch

    with lora_engine.mode(lora_mode, Application.MERGED) as model:
        modules = dict(getattr(model, "base_model", model).model.named_modules())
        for name, expected in reference_weights(
            lora_engine.checkpoint, lora_engine.files, lora_mode
        ):
            weight = modules[name].get_base_layer().weight
            step = torch.finfo(weight.dtype).eps * expected.abs().clamp(min=1e-30)
            off = (weight.double().cpu() - expected).abs()
            # One rounding to the weight's dtype, and the accumulation's own in float32.
            allowed = step + 1e-6 * expected.abs().max()
            assert bool((off <= allowed).all()), f"{name}: off by {float(off.max()):.2e}"


def test_live_logits_are_the_merged_ones(lora_engine, lora_mode, prompt_ids, assert_logits_agree):
    live = lora_engine.logits(prompt_ids, lora_mode)
    merged = lora_engine.logits(prompt_ids, lora_mode, application=Application.MERGED)
    assert_logits_agree(live, merged)


def test_order_of_adapters_does_not_matter(lora_engine, lora_mode, prompt_ids, assert_logits_agree):
    import torch

    turned = Mode(name="turned", weights=tuple(reversed(lora_mode.weights)))
    assert_logits_agree(
        lora_engine.logits(prompt_ids, lora_mode), lora_engine.logits(prompt_ids, turned)
    )
    merged = Application.MERGED
    for a, b in zip(
        lora_engine.logits(prompt_ids, lora_mode, application=merged),
        lora_engine.logits(prompt_ids, turned, application=merged),
        strict=True,
    ):
        assert torch.equal(a, b), "merged weights depend on the order of the adapters"


def test_mode_leaves_no_trace_in_the_base(lora_engine, lora_stack, lora_mode, prompt_ids):
    import torch

    base = Mode(name="base")
    before = lora_engine.logits(prompt_ids, base)
    for mode in (lora_mode, *lora_stack.modes, lora_mode):
        for application in (Application.LIVE, Application.MERGED):
            lora_engine.logits(prompt_ids, mode, application=application)
    after = lora_engine.logits(prompt_ids, base)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("application", [Application.LIVE, Application.MERGED])
def test_stack_is_certified(lora_engine, lora_stack, lora_mode, lora_preset, application):
    from harness import certify_stack

    with lora_engine.mode(lora_mode, application) as model:
        certificate = certify_stack(
            model,
            lora_stack,
            mode=lora_mode,
            tokenizer=lora_engine.tokenizer,
            prompts=lora_preset.prompts[:4],
            generation=lora_preset.settings,
            end_to_end=application is Application.LIVE,
        )
    assert certificate.passed, certificate.explain()
