"""A shape filled with random numbers is a sound model: the same arithmetic, the modes, no trace."""

import pytest

from harness.completion import Application
from harness.errors import InputError
from harness.resolve import StackOptions, random_stack, resolve_stack, stack_from_options


@pytest.fixture(scope="module")
def engine(tiny_shape):
    from harness.engines import load_for_timing

    with load_for_timing(random_stack(f"random:{tiny_shape}"), device="cpu", dtype="float32") as e:
        yield e


def logits(engine, mode, application=Application.LIVE):
    import torch

    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode(), engine.mode(mode, application) as model:
        return model(input_ids=ids).logits


def test_the_model_is_the_one_that_transformers_builds_from_the_config(engine):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(engine.stack.base.shape.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with engine.mode("base"):
        inner = engine.model.base_model.model
        state = {
            name.replace("base_layer.", ""): value
            for name, value in inner.state_dict().items()
            if "lora_" not in name
        }
    expected.load_state_dict(state)
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(
            expected(input_ids=ids).logits, logits(engine, "base"), rtol=0, atol=0
        )
    assert not any(value.is_meta for value in state.values())


def test_every_application_says_the_same_and_adapters_do_something(engine):
    import torch

    live = logits(engine, "stacked")
    assert bool(live.isfinite().all())
    for application in (Application.FLATTENED, Application.MERGED):
        torch.testing.assert_close(logits(engine, "stacked", application), live,
                                   rtol=0, atol=1e-5)  # fmt: skip
    assert not torch.allclose(live, logits(engine, "base"), atol=1e-3)
    assert not torch.allclose(live, logits(engine, "style"), atol=1e-3)


def test_modes_leave_no_trace_and_weights_are_seeded(engine, tiny_shape):
    import torch

    from harness.engines import load_for_timing

    before = logits(engine, "base")
    for mode in engine.stack.modes:
        for application in Application:
            logits(engine, mode, application)
    assert torch.equal(before, logits(engine, "base"))
    assert list(engine.model.peft_config) == ["style", "instruct"]
    stack = random_stack(f"random:{tiny_shape}")
    with load_for_timing(stack, device="cpu", dtype="float32") as again:
        assert torch.equal(logits(engine, "stacked"), logits(again, "stacked"))


def test_without_wrappers_no_layer_of_peft_is_left(engine):
    import torch

    from harness.engines.application import without_wrappers

    ids = torch.arange(24).reshape(2, 12)
    merged = logits(engine, "stacked", Application.MERGED)
    with engine.mode("stacked", Application.MERGED), without_wrappers(engine.model) as model:
        assert not [name for name, _ in model.named_modules() if "lora" in name]
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, merged)
    assert [name for name, _ in engine.model.named_modules() if "lora" in name]


def test_ranks_are_those_asked_for(tiny_shape):
    stack = random_stack(f"random:{tiny_shape}", ranks={"one": 3})
    from harness.engines import load_for_timing

    with load_for_timing(stack, device="cpu") as engine:
        assert {pair.rank for pair in engine.files["one"].pairs.values()} == {3}
        assert engine.dtype == "bfloat16"
    with pytest.raises(InputError, match="no rank"):
        random_stack(f"random:{tiny_shape}", ranks={"one": 0})


def test_real_adapters_can_lie_on_a_random_base(tiny):
    import torch

    from harness.engines import load_for_timing

    stack = random_stack(f"random:{tiny.base}", adapters=tiny.adapters)
    with load_for_timing(stack, device="cpu", dtype="float32") as engine:
        torch.testing.assert_close(
            logits(engine, "stacked"), logits(engine, "stacked", Application.MERGED),
            rtol=0, atol=1e-4,
        )  # fmt: skip


def test_a_random_base_is_refused_where_words_count(tiny_shape):
    source = f"random:{tiny_shape}"
    for resolve in (
        lambda: resolve_stack(base_model=source),
        lambda: stack_from_options(StackOptions(base_model=source)),
    ):
        with pytest.raises(InputError, match="only its speed means anything"):
            resolve()


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_built(monkeypatch):
    from harness.engines import random_weights

    monkeypatch.setattr(random_weights, "_free_bytes", lambda device: 1e9)
    shape = random_stack("random:qwen3-32b").base.shape
    with pytest.raises(InputError, match=r"needs 65\.5 GB, and 1\.0 GB are free on cpu"):
        random_weights.build_shape(shape, device="cpu", dtype=None)
