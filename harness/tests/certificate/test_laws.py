"""The laws of stacking, on drawn stacks: what must hold for the certificate to mean anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from harness.tests.certificate.subject import load_live, write_stack

DTYPES = ("float64", "float32", "bfloat16", "float16")
few = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def terms(draw, count=(1, 3)):
    """A base weight, weighted pairs of one module in drawn shapes and dtypes, and inputs."""
    import torch

    from harness.lora import LoraPair

    width, out = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def tensor(*shape):
        dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pairs = []
    for _ in range(draw(st.integers(*count))):
        rank = draw(st.integers(1, 5))
        scale = draw(st.sampled_from((0.25, 0.5, 1.0, 2.0, 3.7)))
        pair = LoraPair(module="m", a=tensor(rank, width), b=tensor(out, rank), scale=scale)
        pairs.append((draw(st.sampled_from((1.0, 0.5, -1.0, 1.3))), pair))
    return tensor(out, width), pairs, torch.randn((4, width), generator=generator).double()


def close(first, second):
    import torch

    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)


@few
@given(terms())
def test_identity_no_adapter_is_the_base(drawn):
    import torch

    from harness.lora import add_deltas

    weight, _, _ = drawn
    assert torch.equal(add_deltas(weight, []), weight.double())


@few
@given(terms(), st.booleans())
def test_zero_weight_or_zero_b_adds_nothing(drawn, by_weight):
    import dataclasses

    from harness.lora import apply_linear

    weight, pairs, x = drawn
    nothing = [(0.0, p) if by_weight else (w, dataclasses.replace(p, b=p.b * 0)) for w, p in pairs]
    close(apply_linear(x, weight, nothing), apply_linear(x, weight, []))


@few
@given(terms())
def test_negation_undoes(drawn):
    from harness.lora import apply_linear

    weight, pairs, x = drawn
    undone = [*pairs, *((-w, p) for w, p in pairs)]
    close(apply_linear(x, weight, undone), apply_linear(x, weight, []))


@few
@given(terms(count=(2, 4)), st.randoms(use_true_random=False))
def test_permutation_of_adapters_changes_no_bit(drawn, random):
    import torch

    from harness.lora import add_deltas

    weight, pairs, _ = drawn
    turned = random.sample(pairs, len(pairs))
    assert torch.equal(add_deltas(weight, pairs), add_deltas(weight, turned))


@few
@given(terms(count=(2, 4)))
def test_association_stage_by_stage_is_all_at_once(drawn):
    from harness.lora import add_deltas

    weight, pairs, _ = drawn
    staged = add_deltas(add_deltas(weight, pairs[:1]), pairs[1:])
    close(staged, add_deltas(weight, pairs))


@few
@given(terms())
def test_flattened_is_stacked_is_merged(drawn):
    import dataclasses

    from harness.lora import add_deltas, apply_linear, flatten_pairs

    weight, pairs, x = drawn
    wide = [(w, dataclasses.replace(p, a=p.a.double(), b=p.b.double())) for w, p in pairs]
    stacked = apply_linear(x, weight, wide)
    close(apply_linear(x, weight, [(1.0, flatten_pairs(wide))]), stacked)
    close(x @ add_deltas(weight, wide).T, stacked)


@few
@given(terms(count=(1, 3)))
def test_fit_finds_the_weights_that_were_applied(drawn):
    import torch

    from harness.certificate.diagnosis import fit, respond

    _, pairs, x = drawn
    responses = {str(n): respond(p, x) for n, (_, p) in enumerate(pairs)}
    excess = sum((w * r for (w, _), r in zip(pairs, responses.values(), strict=True)),
                 torch.zeros(()))  # fmt: skip
    found = fit(excess, responses, 0.0)
    left = excess - sum((found.coefficients[n] * responses[n] for n in found.coefficients),
                        torch.zeros(()))  # fmt: skip
    size = float(excess.norm()) + sum(float(r.norm()) for r in responses.values())
    assert float(left.norm()) <= 1e-6 * size


stacks = st.fixed_dictionaries(
    {
        "family": st.sampled_from(("qwen3", "qwen2", "llama")),
        "tied": st.booleans(),
        "seed": st.integers(0, 99),
        "ranks": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "alphas": st.tuples(*[st.sampled_from((1, 4, 8.5, 32))] * 2),
        "rslora": st.booleans(),
        "targets": st.tuples(
            *[
                st.lists(
                    st.sampled_from(("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")),
                    min_size=1,
                    unique=True,
                )
            ]
            * 2
        ),
        "stored": st.sampled_from(("float32", "bfloat16")),
        "live": st.sampled_from(("float32", "bfloat16")),
    }
)


def drawn_subject(folder, drawn):
    import torch

    from harness.testing.tiny import AdapterSpec

    adapters = {
        name: AdapterSpec(
            rank=rank, alpha=alpha, targets=targets, rslora=drawn["rslora"],
            dtype=getattr(torch, drawn["stored"]),
        )
        for name, rank, alpha, targets in zip(
            ("style", "instruct"), drawn["ranks"], drawn["alphas"], drawn["targets"], strict=True
        )
    }  # fmt: skip
    stack = write_stack(
        folder, family=drawn["family"], tied=drawn["tied"], seed=drawn["seed"], adapters=adapters
    )
    return load_live(stack, drawn["live"])


def certify_every_application(drawn):
    """Live, in the other order, saved and loaded again, merged: each is certified."""
    with tempfile.TemporaryDirectory() as scratch:
        subject = drawn_subject(Path(scratch), drawn)
        assert subject.certify().passed, subject.certify().explain()
        subject.model.base_model.set_adapter(["instruct", "style"])
        assert subject.certify(end_to_end=False).passed
        subject.model.save_pretrained(Path(scratch, "saved"))
        reloaded = _saved_stack(subject.stack, Path(scratch, "saved"))
        subject.stack = reloaded
        assert subject.certify(end_to_end=False).passed, subject.certify().explain()
        subject.model = subject.model.merge_and_unload()
        assert subject.certify().passed, subject.certify().explain()


def _saved_stack(stack, folder):
    from harness import resolve_stack

    adapters = {adapter.name: folder / adapter.name for adapter in stack.adapters}
    return resolve_stack(base_model=stack.base.path, adapters=adapters)


@settings(few, max_examples=2)
@given(stacks)
def test_drawn_stacks_are_certified_in_every_application(drawn):
    certify_every_application(drawn)


@pytest.mark.slow
@settings(few, max_examples=40)
@given(stacks)
def test_many_drawn_stacks_are_certified_in_every_application(drawn):
    certify_every_application(drawn)


def test_mode_switches_in_any_order_leave_every_mode_bit_identical(written_stack):
    """Random sequences of modes, applications, generation and failures between them."""
    import torch

    from harness.completion import Application, GenerationSettings, Prompt
    from harness.engines import load_engine

    modes = st.sampled_from(("base", "style", "instruct", "stacked", "style*0.5+instruct"))
    with load_engine(written_stack, device="cpu", dtype="float32") as engine:
        ids = [engine.token_ids(Prompt(id="p", text="any words"))]
        first: dict[object, torch.Tensor] = {}

        def look(mode, application):
            now = engine.logits(ids, mode, application=application)[0]
            assert torch.equal(first.setdefault((mode, application), now), now)

        class Switches(RuleBasedStateMachine):
            @rule(mode=modes, application=st.sampled_from(list(Application)[::2]))
            def enter(self, mode, application):
                look(mode, application)

            @rule(mode=modes)
            def generate_with_a_cache(self, mode):
                few_tokens = GenerationSettings(max_new_tokens=3)
                engine.generate([Prompt(id="p", text="abc")], mode, few_tokens)

            @rule(mode=modes)
            def leave_by_an_exception(self, mode):
                with pytest.raises(KeyboardInterrupt), engine.mode(mode):
                    raise KeyboardInterrupt

            @rule(mode=modes)
            def certify_inside(self, mode):
                from harness.certificate import certify_stack

                with engine.mode(mode) as model:
                    certificate = certify_stack(
                        model, written_stack, mode=written_stack.mode(mode), end_to_end=False
                    )
                assert certificate.passed, certificate.explain()

        run_state_machine_as_test(
            Switches, settings=settings(few, max_examples=6, stateful_step_count=10)
        )
        assert len(first) >= 5
        fresh = dict(first)
    with load_engine(written_stack, device="cpu", dtype="float32") as engine:
        for (mode, application), logits in fresh.items():
            again = engine.logits(ids, mode, application=application)[0]
            assert torch.equal(again, logits)
