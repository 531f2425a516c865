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
