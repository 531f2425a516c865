"""What a distribution is reduced to, against torch's own functions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def scoring():
    from harness.engines import scoring

    return scoring


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([5, 320, 383, 384, 385, 1000, 4099]),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([2, 50, None]),
    infinite=st.booleans(),
)
def test_the_highest_are_those_of_topk(scoring, size, seed, levels, infinite):
    import torch

    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(3, size, generator=generator)
    if levels is not None:  # many equal ones
        block = (block * levels / 4).round()
    if infinite:
        block[:, size // 2 :] = -torch.inf
    values, places = scoring._highest(block, 5)
    assert torch.equal(values, block.topk(5).values)
    assert torch.equal(block.gather(1, places), values)
    assert all(len(set(row)) == 5 for row in places.tolist())


def test_a_logit_that_is_no_number_comes_first(scoring):
    import torch

    block = torch.zeros(2, 1000)
    block[1, 777] = torch.nan
    values, places = scoring._highest(block, 5)
    assert values[1, 0].isnan()
    assert places[1, 0] == 777
    assert torch.equal(values[0], torch.zeros(5))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_evidence_is_of_the_softmax_of_the_logits(scoring, dtype):
    import torch

    logits = torch.randn(7, 2000, generator=torch.Generator().manual_seed(1)) * 4
    logits = logits.to(getattr(torch, dtype))
    logits[3, 10] = logits[3].max()  # a tie: the arg-max decides which is first
    chosen = torch.arange(7) * 31
    found = scoring._evidence(logits, chosen)
    exact = logits.double().log_softmax(-1)
    assert found.top_ids[:, 0].tolist() == logits.argmax(-1).tolist()
    own = exact[torch.arange(7), chosen]
    assert torch.allclose(torch.from_numpy(found.logprobs), own, atol=1e-5)
    best = exact.gather(1, torch.from_numpy(found.top_ids))
    assert torch.allclose(torch.from_numpy(found.top_logprobs), best, atol=1e-5)
    assert torch.equal(best.sort(descending=True).values, exact.topk(5).values)
