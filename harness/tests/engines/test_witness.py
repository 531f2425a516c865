"""What changes behind the engine's back is noticed before a mode, or after it."""

import pytest

from harness.completion import Message, Prompt
from harness.errors import InputError


@pytest.fixture
def engine(tiny):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with load_engine(resolve_stack(adapters=tiny.adapters), device="cpu") as engine:
        yield engine


def parameter(engine, ending):
    found = [p for name, p in engine.model.named_parameters() if name.endswith(ending)]
    return found[0]


ENDINGS = ("norm.weight", "embed_tokens.weight", "q_proj.base_layer.weight",
           "lora_A.style.weight", "lora_B.instruct.weight")  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_bit_of_a_weight_is_noticed_before_the_mode(engine, ending):
    import torch

    from harness.engines.loading import ActivationError

    weight = parameter(engine, ending)
    weight.data.view(torch.int32).view(-1)[3] ^= 1
    with pytest.raises(ActivationError, match=r"before mode base: .*is other"), engine.mode("base"):
        pytest.fail("the mode was entered")


@pytest.mark.parametrize("application", ["live", "merged"])
def test_what_a_mode_leaves_behind_is_noticed_after_it(engine, application):
    from harness.completion import Application
    from harness.engines.loading import ActivationError

    with (
        pytest.raises(ActivationError, match=r"after mode stacked: .*norm.*is other"),
        engine.mode("stacked", Application(application)),
    ):
        parameter(engine, "norm.weight").data += 1e-3


def test_training_mode_is_noticed(engine):
    from harness.engines.loading import ActivationError

    engine.model.train()
    with pytest.raises(ActivationError, match="training mode"), engine.mode("style"):
        pytest.fail("the mode was entered")


def test_a_large_model_is_summed_by_a_sample_of_every_tensor(engine, monkeypatch):
    from harness.engines import witness

    monkeypatch.setattr(witness, "_WHOLE_ELEMENTS", 10)
    monkeypatch.setattr(witness, "_SAMPLE", 8)
    seen = witness.Witness(engine.model)
    assert seen.sampled
    parameter(engine, "norm.weight").data += 1e-3
    with pytest.raises(witness.ActivationError, match="norm"):
        seen.check(engine.model, "now")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_sample_notices_a_scaled_tensor_whichever_it_is(engine, monkeypatch, ending):
    from harness.engines import witness

    monkeypatch.setattr(witness, "_WHOLE_ELEMENTS", 10)
    seen = witness.Witness(engine.model)
    parameter(engine, ending).data *= 1.02
    with pytest.raises(witness.ActivationError, match="is other"):
        seen.check(engine.model, "now")


@pytest.mark.parametrize("shape", [(4097,), (64, 4096), (1536, 576), (3, 9001)])
def test_a_sample_is_spread_over_the_whole_tensor_and_most_of_its_columns(shape):
    import torch

    from harness.engines.witness import _spread

    size = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    places = _spread(torch.arange(size), 4096).flatten()
    assert len(places.unique()) == 4096
    assert int(places.min()) == 0
    assert size - 64 <= int(places.max()) < size
    assert len((places % shape[-1]).unique()) > min(shape[-1], 4096) // 2


def test_base_in_memory_is_held_against_the_shards(engine):
    from harness.engines import witness

    count = len(engine.checkpoint.places)
    assert witness.compare_base_with_files(engine.model, engine.checkpoint) == count
    parameter(engine, "down_proj.base_layer.weight").data[0, 0] += 1
    with pytest.raises(witness.ActivationError, match=r"differs from .*model.safetensors"):
        witness.compare_base_with_files(engine.model, engine.checkpoint)


def test_template_that_hangs_on_one_prompt_is_refused(engine, monkeypatch):
    monkeypatch.setattr("harness.engines.templating._TEMPLATE_SECONDS", 0.2)
    engine.tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    prompt = Prompt(id="p", messages=(Message(role="user", content="x"),))
    with pytest.raises(InputError, match=r"prompt p: the chat template .*0\.2 seconds"):
        engine.token_ids(prompt)


def test_template_that_holds_an_interrupt_back_is_interrupted_again(monkeypatch):
    """As jinja2 can, which goes on after any exception where it looks an attribute up."""
    import signal
    import time
    from types import SimpleNamespace

    from harness.engines.templating import templated_ids

    monkeypatch.setattr("harness.engines.templating._TEMPLATE_SECONDS", 0.1)
    held_back = []

    def render(*_, **__):
        while time.process_time() < end:
            try:
                while time.process_time() < end:
                    pass
            except TimeoutError as error:
                if held_back:
                    raise
                held_back.append(error)
        return [1]

    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=render)
    prompt = Prompt(id="p", messages=(Message(role="user", content="x"),))
    end = time.process_time() + 5
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match=r"more than 0\.1 seconds"):
        templated_ids(tokenizer, prompt)
    assert len(held_back) == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before
