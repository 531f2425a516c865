"""The algebra of s·B·A: laws, drawn by hypothesis, in float64."""

from hypothesis import given, settings
from hypothesis import strategies as st

stacks = st.fixed_dictionaries(
    {
        "out": st.integers(1, 12),
        "into": st.integers(1, 12),
        "ranks": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "seed": st.integers(0, 2**31),
        "transposed": st.booleans(),
    }
)
quick = settings(max_examples=40, deadline=None)


def draw(stack):
    import torch

    from harness.lora import LoraPair

    generator = torch.Generator().manual_seed(stack["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pairs = [
        LoraPair(
            module="m",
            a=normal(rank, stack["into"]),
            b=normal(stack["out"], rank),
            scale=0.5 + number,
            transposed=stack["transposed"],
        )
        for number, rank in enumerate(stack["ranks"])
    ]
    shape = (stack["out"], stack["into"])
    weight = normal(*(reversed(shape) if stack["transposed"] else shape))
    return weight, [(1.0 + 0.25 * n, pair) for n, pair in enumerate(pairs)]


@quick
@given(stack=stacks)
def test_sum_does_not_depend_on_the_order_by_a_bit(stack):
    import torch

    from harness.lora import add_deltas

    weight, terms = draw(stack)
    for dtype in (torch.float32, torch.float64):
        forward = add_deltas(weight, terms, accumulate=dtype)
        assert torch.equal(forward, add_deltas(weight, terms[::-1], accumulate=dtype))


@quick
@given(stack=stacks)
def test_flattened_pair_is_the_sum_of_the_deltas(stack):
    import torch

    from harness.lora import flatten_pairs

    _, terms = draw(stack)
    total = sum(factor * pair.delta() for factor, pair in terms)
    flat = flatten_pairs(terms)
    assert flat.rank == sum(stack["ranks"])
    torch.testing.assert_close(flat.delta(), total, rtol=1e-5, atol=1e-5)


@quick
@given(stack=stacks)
def test_applying_is_multiplying_by_the_sum(stack):
    import torch

    from harness.lora import add_deltas, apply_linear

    weight, terms = draw(stack | {"transposed": False})
    x = torch.randn(3, stack["into"], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(stack["out"], generator=torch.Generator().manual_seed(2))
    expected = x.double() @ add_deltas(weight, terms).T + bias.double()
    torch.testing.assert_close(
        apply_linear(x, weight, terms, bias), expected, rtol=1e-12, atol=1e-12
    )


@quick
@given(stack=stacks)
def test_a_delta_and_its_negation_leave_the_weight(stack):
    import torch

    from harness.lora import add_deltas

    weight, terms = draw(stack)
    (_, pair), *_ = terms
    result = add_deltas(weight, [(1.0, pair), (-1.0, pair)])
    assert torch.equal(result, weight.double())


def test_no_terms_give_a_copy_of_the_weight():
    import torch

    from harness.lora import add_deltas

    weight = torch.ones(2, 2, dtype=torch.float64)
    result = add_deltas(weight, [])
    result += 1
    assert torch.equal(weight, torch.ones(2, 2, dtype=torch.float64))


def test_scale_is_alpha_over_r_and_over_root_r_for_rslora():
    from harness.lora import lora_scale

    assert lora_scale(alpha=16, rank=4, rslora=False) == 4
    assert lora_scale(alpha=16, rank=4, rslora=True) == 8


def simple_pair(**values):
    import torch

    from harness.lora import LoraPair

    given = {
        "module": "m", "a": torch.full((1, 2), 0.1), "b": torch.full((3, 1), 0.3), "scale": 0.7,
    }  # fmt: skip
    return LoraPair(**(given | values))


def test_float64_is_the_default_and_another_dtype_is_kept_throughout():
    import torch

    from harness.lora import add_deltas, apply_linear

    pair = simple_pair()
    assert pair.delta().dtype == torch.float64
    assert pair.delta(torch.float32).dtype == torch.float32
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    for terms in ([], [(1.0, pair)], [(1.0, pair)] * 2, [(1.0, pair)] * 3):
        assert add_deltas(weight, terms).dtype == torch.float64
        assert add_deltas(weight, terms, accumulate=torch.float32).dtype == torch.float32
        once = (pair.b.float() @ pair.a.float()) * pair.scale
        expected = torch.stack([once] * len(terms)).sum(0) if terms else weight.float()
        assert torch.equal(add_deltas(weight, terms, accumulate=torch.float32), expected)
    bias = torch.full((3,), 0.1, dtype=torch.bfloat16)
    found = apply_linear(torch.zeros(1, 2), weight, [], bias)
    assert found.dtype == torch.float64
    assert torch.equal(found, bias.double().unsqueeze(0))
    assert torch.equal(apply_linear(torch.zeros(1, 2), weight, []), torch.zeros(1, 3).double())


def test_only_pairs_of_one_module_and_layout_are_concatenated():
    import pytest
    import torch

    from harness.lora import flatten_pairs

    pair = simple_pair()
    for other in (simple_pair(module="n"), simple_pair(transposed=True)):
        with pytest.raises(ValueError, match=r"^only pairs of one module can be concatenated$"):
            flatten_pairs([(1.0, pair), (1.0, other)])
    flat = flatten_pairs([(2.0, simple_pair(transposed=True))])
    assert (flat.module, flat.transposed, flat.scale, flat.rank) == ("m", True, 1.0, 1)
    assert torch.equal(flat.a, pair.a * 1.4)


def test_a_flattened_pair_is_float32_at_least_and_float64_if_one_is():
    import torch

    from harness.lora import flatten_pairs

    def of(dtype):
        pair = simple_pair()
        return simple_pair(a=pair.a.to(dtype), b=pair.b.to(dtype))

    for dtypes, expected in (
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
        ([torch.float64, torch.bfloat16], torch.float64),
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.float16], torch.float32),
    ):
        flat = flatten_pairs([(1.0, of(dtype)) for dtype in dtypes])
        assert (flat.a.dtype, flat.b.dtype) == (expected, expected)
