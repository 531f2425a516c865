"""A model that its user switches at random: the certificate says what state it is in, each time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from harness.tests.certificate.subject import load_live, write_stack

MODES = {"base": (), "style": ("style",), "instruct": ("instruct",),
         "stacked": ("style", "instruct")}  # fmt: skip
modes = st.sampled_from(sorted(MODES))
orders = st.sampled_from(
    [["style"], ["instruct"], ["style", "instruct"], ["instruct", "style"], ["style", "style"]]
)


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """A live stack whose style adapter has dropout."""
    from harness.testing.tiny import AdapterSpec

    adapters = {
        "style": AdapterSpec(targets=("q_proj", "up_proj"), options={"lora_dropout": 0.5}),
        "instruct": AdapterSpec(targets=("q_proj", "v_proj"), rank=3),
    }
    return load_live(write_stack(tmp_path_factory.mktemp("switched") / "stack", adapters=adapters))


def switches(pristine):
    """A machine that switches a copy of *pristine* as users do, and knows what state that gives."""
    import torch

    ids = torch.tensor([[1, 2, 3, 4, 5]])
    logits: dict[object, torch.Tensor] = {}

    class Switches(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.subject = pristine.copied()
            self.active, self.off, self.training = ["style", "instruct"], False, False
            self.odd_layer: list[str] | None = None
            self.cached = False

        @property
        def model(self):
            return self.subject.model

        @rule(names=orders)
        def activate(self, names):
            self.model.base_model.set_adapter(names)
            self.active, self.odd_layer = names, None

        @rule(name=st.sampled_from(["style", "instruct"]))
        def activate_one(self, name):
            self.model.set_adapter(name)
            self.active, self.odd_layer = [name], None

        @rule(off=st.booleans())
        def switch_all(self, off):
            layers = self.model.base_model
            layers.disable_adapter_layers() if off else layers.enable_adapter_layers()
            self.off = off  # a layer keeps its own list of active adapters over it

        @rule(names=orders)
        def switch_one_layer(self, names):
            self.subject.layer("model.layers.1.self_attn.q_proj")._active_adapter = names
            self.odd_layer = names

        @rule(training=st.booleans())
        def train(self, training):
            self.model.train(training)
            self.training = training

        @rule(wanted=st.booleans())
        def require_gradients(self, wanted):
            self.model.requires_grad_(wanted)

        @rule()
        def pass_by_an_exception(self):
            with pytest.raises(KeyboardInterrupt), self.model.disable_adapter():
                raise KeyboardInterrupt

        @rule()
        def carry_a_cache_over(self):
            with torch.no_grad():
                cache = self.model(ids, use_cache=True).past_key_values
            self.subject.generation |= {"past_key_values": cache}
            self.cached = True

        @rule()
        def drop_the_cache(self):
            self.subject.generation.pop("past_key_values", None)
            self.cached = False

        @rule(mode=modes)
        def certify(self, mode):
            self.subject.mode = mode
            certificate = self.subject.certify(end_to_end=False)
            wanted = Counter(MODES[mode])
            lists = [self.active, self.active if self.odd_layer is None else self.odd_layer]
            right = all(Counter([] if self.off else names) == wanted for names in lists)
            told = certificate.explain()
            assert certificate.check("active adapters").passed == right, told
            assert certificate.check("adapters in memory").passed == right, told
            assert certificate.check("module outputs").passed == right, told
            assert certificate.check("evaluation mode").passed != self.training, told
            assert certificate.check("key-value cache").passed != self.cached, told
            assert certificate.passed == (right and not self.training and not self.cached), told

        @invariant()
        def every_state_has_its_logits_bit_for_bit(self):
            if self.training:
                return
            with torch.no_grad():
                now = self.model(ids).logits
            odd = None if self.odd_layer is None else tuple(self.odd_layer)
            state = "off" if self.off else (tuple(self.active), odd or tuple(self.active))
            assert torch.equal(logits.setdefault(state, now), now)

        def teardown(self):
            if self.off or self.odd_layer or len(set(self.active)) < len(self.active):
                return
            self.model.eval()
            self.drop_the_cache()
            self.model.merge_adapter()
            self.subject.mode = next(m for m, n in MODES.items() if {*n} == {*self.active})
            certificate = self.subject.certify()
            assert certificate.passed, certificate.explain()

    return Switches, logits


def run(machine, examples, steps):
    quiet = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=quiet)


def test_the_certificate_tells_what_state_the_user_left_the_model_in(switched):
    machine, logits = switches(switched)
    run(machine, examples=8, steps=8)
    assert len(logits) >= 4


@pytest.mark.slow
def test_the_certificate_tells_what_state_long_switching_left_the_model_in(switched):
    machine, logits = switches(switched)
    run(machine, examples=25, steps=16)
    assert len(logits) >= 10
