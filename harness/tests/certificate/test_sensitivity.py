"""How small a fault is caught, in float32 and in bfloat16, and that clean stacks stay silent."""

import pytest

from harness.tests.certificate.subject import load_live, write_stack

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OUTPUTS, WEIGHTS = "module outputs", "base weights"


def module_names(layers=(0, 1)):
    return [
        f"model.layers.{layer}.{'self_attn' if name in MODULES[:4] else 'mlp'}.{name}"
        for layer in layers
        for name in MODULES
    ]


@pytest.mark.parametrize("name", module_names(layers=(1,)))
def test_float32_outputs_show_5_percent_in_any_one_module(name, subject):
    subject.layer(name).scaling["style"] *= 1.05
    found = subject.certify(end_to_end=False).check(OUTPUTS)
    assert found.outcome == "failed"
    (line,) = [line for line in found.evidence if line.startswith(f"{name}:")]
    assert "the scale of adapter style is off by 1.05×" in line


def test_float32_outputs_show_a_single_sign_flip(subject):
    name = "model.layers.0.mlp.down_proj"
    a = subject.layer(name).lora_A["style"].weight.data
    a[0, 0] = -a[0, 0]
    certificate = subject.certify(end_to_end=False)
    assert certificate.check(OUTPUTS).outcome == "failed"
    assert certificate.check("adapters in memory").outcome == "failed"


@pytest.mark.parametrize("which", ["A", "B", "W"])
def test_float32_shows_a_single_sign_flip_in_every_module_wherever_it_is(which, subject):
    import torch

    generator = torch.Generator().manual_seed(ord(which))
    for name in module_names():
        layer = subject.layer(name)
        weights = {
            "A": layer.lora_A["style"].weight, "B": layer.lora_B["style"].weight,
            "W": layer.base_layer.weight,
        }  # fmt: skip
        flat = weights[which].data.view(-1)
        place = int(torch.randint(0, len(flat), (), generator=generator))
        flat[place] = -flat[place]
    certificate = subject.certify(end_to_end=False)
    found = certificate.check(WEIGHTS if which == "W" else "adapters in memory")
    assert found.outcome == "failed"
    shown = "\n".join(found.evidence)
    assert f"{len(module_names())} " in found.evidence[0]
    assert shown.count("1 of " if which == "W" else f"the sign of 1 entries of {which}") == 5


def test_float32_outputs_show_an_adapter_rounded_through_bfloat16(subject):
    for name in module_names():
        for factor in (subject.layer(name).lora_A, subject.layer(name).lora_B):
            weight = factor["style"].weight.data
            weight.copy_(weight.bfloat16())
    found = subject.certify(end_to_end=False).check(OUTPUTS)
    assert found.outcome == "failed"
    assert "adapter style was rounded through bfloat16" in "\n".join(found.evidence)


@pytest.mark.parametrize("name", module_names(layers=(0,)))
def test_bfloat16_outputs_show_twice_the_scale_in_any_one_module(name, pristine_bfloat16):
    subject = pristine_bfloat16.copied()
    subject.layer(name).scaling["style"] *= 2
    found = subject.certify(end_to_end=False).check(OUTPUTS)
    assert found.outcome == "failed"
    assert any(line.startswith(f"{name}:") for line in found.evidence), found.evidence


@pytest.mark.parametrize("name", module_names(layers=(1,)))
def test_bfloat16_merge_shows_twice_the_scale_in_any_one_module(name, pristine_bfloat16):
    subject = pristine_bfloat16.copied()
    subject.layer(name).scaling["style"] *= 2
    subject.model = subject.model.merge_and_unload()
    found = subject.certify(end_to_end=False).check(WEIGHTS)
    assert found.outcome == "failed"
    (line,) = [line for line in found.evidence if line.startswith(f"{name}.weight")]
    assert "adapter style is off by" in line


def test_bfloat16_shows_small_deltas_at_twice_the_scale(tmp_path):
    from harness.testing.tiny import AdapterSpec

    # Per entry the delta is far below bfloat16's rounding of the weight.
    spec = AdapterSpec(rank=4, alpha=8, size=0.002)
    subject = load_live(write_stack(tmp_path, adapters={"style": spec}), "bfloat16")
    name = "model.layers.1.self_attn.q_proj"
    subject.layer(name).scaling["style"] *= 2
    assert subject.certify().check("adapters in memory").outcome == "failed"


def silent_in_bfloat16(tmp_path, seeds, batches, threads):
    """Alarms of clean bfloat16 stacks, live and merged, and how many certificates were made."""
    import torch

    from harness.testing.tiny import AdapterSpec

    alarms, runs = [], 0
    before = torch.get_num_threads()
    sizes = (0.002, 0.02, 0.05, 0.2)
    try:
        for seed in seeds:
            adapters = {
                "style": AdapterSpec(rank=2 + seed % 7, alpha=8, size=sizes[seed % 4]),
                "instruct": AdapterSpec(
                    rank=1 + seed % 5,
                    alpha=16,
                    size=sizes[(seed + 1) % 4],
                    dtype=(torch.float32, torch.bfloat16)[seed % 2],
                ),
            }
            stack = write_stack(tmp_path / str(seed), seed=seed, adapters=adapters)
            subject = load_live(stack, "bfloat16")
            for count in threads:
                torch.set_num_threads(count)
                for batch in batches:
                    if (batch, count) == (batches[-1], threads[-1]):
                        subject.model = subject.model.merge_and_unload()
                    subject.prompts = tuple(
                        f"prompt {n} of seed {seed}" + " and more" * n for n in range(batch)
                    )
                    certificate = subject.certify()
                    runs += 1
                    if not certificate.passed:
                        alarms.append(f"seed {seed}, {batch} prompts: {certificate.explain()}")
    finally:
        torch.set_num_threads(before)
    return alarms, runs


def test_clean_bfloat16_stacks_are_silent(tmp_path):
    alarms, runs = silent_in_bfloat16(tmp_path, range(2), (1, 3), (1, 2))
    assert runs == 8
    assert not alarms, alarms[0]


@pytest.mark.slow
def test_clean_bfloat16_stacks_are_silent_in_200_runs(tmp_path):
    alarms, runs = silent_in_bfloat16(tmp_path, range(100, 125), (1, 2, 4, 8), (1, 2))
    assert runs == 200
    assert not alarms, f"{len(alarms)} alarms; the first: {alarms[0]}"


def test_logits_show_one_layer_inactive_and_name_no_sound_adapter_empty(subject):
    subject.layer("model.layers.0.self_attn.q_proj")._active_adapter = ["instruct"]
    certificate = subject.certify()
    assert certificate.check("live, flattened and merged logits").outcome == "failed"
    assert certificate.check("each adapter's effect").outcome == "held"


def test_adapter_that_was_never_trained_is_named(tmp_path):
    from harness.testing.tiny import AdapterSpec

    subject = load_live(write_stack(tmp_path, adapters={"style": AdapterSpec(size=0.0)}))
    found = subject.certify().check("each adapter's effect")
    assert found.outcome == "failed"
    assert "it was never trained" in found.evidence[0]


def test_adapter_whose_effect_is_rounding_fails_in_float32(tmp_path):
    from harness.testing.tiny import AdapterSpec

    specs = {"style": AdapterSpec(), "instruct": AdapterSpec(size=1e-12)}
    subject = load_live(write_stack(tmp_path, adapters=specs))
    found = subject.certify().check("each adapter's effect")
    assert found.outcome == "failed"
    assert "instruct: its effect is within rounding" in found.evidence[0]


def test_model_is_left_as_it_was_found(subject):
    import torch

    subject.model.train()
    subject.model.requires_grad_(True)
    parameter = next(subject.model.parameters())
    parameter.grad = torch.ones_like(parameter)

    def fingerprint():
        model = subject.model
        return (
            [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
            [(n, p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()],
            model.active_adapters,
            torch.random.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            model.generation_config.to_dict(),
            None if parameter.grad is None else float(parameter.grad.sum()),
        )

    before = fingerprint()
    values = {n: p.detach().clone() for n, p in subject.model.named_parameters()}
    subject.certify()
    assert fingerprint() == before
    assert all(torch.equal(values[n], p) for n, p in subject.model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_show_that_padding_is_read_as_text(dtype, subject, pristine_bfloat16):
    if dtype == "bfloat16":
        subject = pristine_bfloat16.copied()
    padded = subject.certify().check("left-padded batch")
    assert padded.outcome == "held"
    assert "tokens of padding" in padded.evidence[0]
    inner = subject.model.base_model.model.model
    forward = inner.forward

    def all_visible(*args, attention_mask, **options):
        return forward(*args, attention_mask=attention_mask * 0 + 1, **options)

    inner.forward = all_visible
    certificate = subject.certify()
    assert certificate.check("left-padded batch").outcome == "failed"
    assert "attention mask" in certificate.check("left-padded batch").remedy


def test_logits_show_positions_that_count_the_padding(tmp_path):
    import torch

    from harness.tests.certificate.test_variants import write_variant
    from harness.tests.certificate.variants import ADDITIVE

    # GPT-2 learns a vector for each position: left out, they count from the padding.
    subject = load_live(write_variant(tmp_path, ADDITIVE["Conv1D (fan_in_fan_out)"]))
    assert subject.certify().verdict == "held"
    inner = subject.model.base_model.model.transformer
    forward = inner.forward

    def without_positions(*args, position_ids=None, **options):
        return forward(*args, position_ids=None, **options)

    inner.forward = without_positions
    assert subject.certify().check("left-padded batch").outcome == "failed"
    assert not torch.is_inference_mode_enabled()
