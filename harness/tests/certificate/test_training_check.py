"""`check_training_stack`: a right recipe passes, each wrong one is named, nothing stays touched."""

import pytest

FORWARD, TRAINABLE = "both in the forward pass", "what may learn"
NOISE, GRADIENTS, STEP, SAVED = "frozen adapters' dropout", "gradients", "one step", "saved folder"


def check(model, **arguments):
    from harness.certificate import check_training_stack

    return check_training_stack(model, frozen=["style"], trainable=["instruct"], **arguments)


@pytest.fixture
def ready(subject):
    """The subject as the stage-2 recipe leaves it."""
    from harness.testing.training import prepare_stage_two

    prepare_stage_two(subject.model, frozen=["style"], trainable="instruct")
    return subject


def test_right_recipe_passes(ready):
    certificate = check(ready.model)
    assert certificate.verdict == "held", certificate.explain()
    assert [c.name for c in certificate.checks] == [
        FORWARD, TRAINABLE, NOISE, GRADIENTS, STEP, SAVED
    ]  # fmt: skip


def test_new_adapter_whose_b_is_zero_passes(ready):
    for name, parameter in ready.model.named_parameters():
        if "lora_B.instruct" in name:
            parameter.data.zero_()
    certificate = check(ready.model)
    assert certificate.passed, certificate.explain()


def test_right_recipe_written_by_hand_passes(subject):
    subject.model.train()
    subject.model.base_model.set_adapter(["style", "instruct"])
    subject.model.set_requires_grad("style", False)
    assert check(subject.model).passed


def only_instruct_active(s):
    s.model.set_adapter("instruct")


def everything_trainable(s):
    s.model.base_model.set_adapter(["style", "instruct"])


def base_unfrozen(s):
    s.bare.model.norm.weight.requires_grad_(True)


def style_never_loaded(s):
    for name, parameter in s.model.named_parameters():
        if "lora_B.style" in name:
            parameter.data.zero_()


def style_of_scale_0_in_one_layer(s):
    s.layer("model.layers.1.mlp.up_proj").scaling["style"] = 0.0


def style_broken_in_one_layer(s):
    s.layer("model.layers.1.mlp.up_proj").lora_B["style"].weight.data[0, 0] = float("nan")


def nothing_trainable(s):
    s.model.requires_grad_(False)


def one_pair_frozen(s):
    layer = s.layer("model.layers.0.self_attn.q_proj")
    layer.lora_A["instruct"].weight.requires_grad_(False)
    layer.lora_B["instruct"].weight.requires_grad_(False)


def dropout_on_style(s):
    import torch

    layer = s.layer("model.layers.0.self_attn.q_proj")
    layer.lora_dropout["style"] = torch.nn.Dropout(0.1)
    s.model.train()


def disable_adapter_unfreezes(s):
    with s.model.disable_adapter():
        pass


def style_merged(s):
    s.model.merge_adapter(["style"])


def one_layer_without_style(s):
    s.layer("model.layers.1.mlp.down_proj")._active_adapter = ["instruct"]


def style_twice(s):
    s.model.base_model.set_adapter(["style", "style", "instruct"])
    s.model.set_requires_grad("style", False)


@pytest.mark.parametrize(
    ("wrong", "where", "words"),
    [
        (only_instruct_active, FORWARD, "style is not in the forward pass"),
        (everything_trainable, TRAINABLE, "parameters of style would be trained"),
        (base_unfrozen, TRAINABLE, "parameters of base would be trained"),
        (nothing_trainable, GRADIENTS, "the backward pass failed"),
        (one_pair_frozen, GRADIENTS, "layers.0.self_attn.q_proj: no gradient arrives"),
        (dropout_on_style, NOISE, "dropout of 0.1 acts on style"),
        (disable_adapter_unfreezes, TRAINABLE, "(style) requires a gradient"),
        (style_merged, FORWARD, "style is merged into the weight"),
        (one_layer_without_style, FORWARD, "model.layers.1.mlp.down_proj"),
        (style_twice, FORWARD, "applied twice"),
        (style_never_loaded, FORWARD, "style adds nothing: every B is zero"),
        (style_of_scale_0_in_one_layer, FORWARD, "up_proj: style has a scale of 0"),
        (style_broken_in_one_layer, FORWARD, "up_proj: style holds NaN or infinity"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_recipe_is_named(wrong, where, words, ready):
    wrong(ready)
    certificate = check(ready.model)
    assert certificate.verdict != "held"
    found = certificate.check(where)
    assert found.outcome == "failed", certificate.explain()
    assert words in "\n".join(found.evidence), certificate.explain()


def test_nothing_stays_touched(ready):
    import torch

    model = ready.model
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    check(model)
    assert all(torch.equal(values[n], p) for n, p in model.named_parameters())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_folder_of_the_script_is_judged(ready, tmp_path):
    from harness.testing.training import save_adapter

    right = save_adapter(ready.model, "instruct", tmp_path / "right")
    assert check(ready.model, saved=right).passed
    style = save_adapter(ready.model, "style", tmp_path / "style")
    wrong = check(ready.model, saved=style)
    assert wrong.check("folder style").outcome == "failed"
    ready.model.save_pretrained(tmp_path / "all")
    above = check(ready.model, saved=tmp_path / "all").check("folder all")
    assert above.outcome == "failed"
    assert "instruct, style" in above.evidence[0]


def test_unknown_adapter_is_bad_input(ready):
    from harness.certificate import check_training_stack
    from harness.errors import InputError

    with pytest.raises(InputError, match="no adapter 'nope'"):
        check_training_stack(ready.model, frozen="style", trainable="nope")
