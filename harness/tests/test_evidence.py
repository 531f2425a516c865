"""Evidence is small, is read back to within its steps, and its movements are told apart."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.bench.evidence_size import (
    ENGLISH,
    TOKENS,
    VOCABULARY,
    by_frequency,
    english_size,
    random_evidence,
    uniform,
)
from harness.evidence import (
    GAP_STEP,
    TOP_STEP,
    Evidence,
    decode_evidence,
    encode_evidence,
    shifts,
    stored,
)


def test_evidence_of_128_tokens_takes_at_most_three_times_their_text():
    assert 4.3 * TOKENS < len(ENGLISH) < 4.9 * TOKENS
    for seed in range(20):
        assert english_size(by_frequency, seed=seed).times <= 3


@pytest.mark.parametrize("ids", [by_frequency, uniform])
def test_stored_evidence_is_within_half_a_step(ids):
    evidence = random_evidence(64, vocabulary=VOCABULARY, seed=1, ids=ids)
    back = stored(evidence, evidence.top_ids[:, 0])
    assert (back.top_ids == evidence.top_ids).all()
    assert np.abs(back.logprobs - evidence.logprobs).max() <= TOP_STEP / 2 + 1e-12
    gaps, before = (e.top_logprobs[:, :1] - e.top_logprobs for e in (back, evidence))
    assert np.abs(gaps - before).max() <= GAP_STEP / 2 + 1e-12


@st.composite
def cases(draw):
    """Evidence of any shape: sampled tokens outside the top, tiny vocabularies, none at all."""
    rows, top = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    vocabulary = draw(st.sampled_from([6, 300, 1 << 18]))
    ids = np.array(
        [draw(st.lists(st.integers(0, vocabulary - 1), min_size=top, max_size=top, unique=True))
         for _ in range(rows)], dtype=np.int64,
    ).reshape(rows, top)  # fmt: skip
    values = st.floats(-300, 0, allow_nan=False)
    top_logprobs = np.array(
        [sorted((draw(values) for _ in range(top)), reverse=True) for _ in range(rows)]
    ).reshape(rows, top)
    produced, logprobs = [], []
    for row in range(rows):
        rank = draw(st.integers(0, top))
        outside = draw(st.integers(0, vocabulary - 1).filter(lambda t, row=row: t not in ids[row]))
        produced.append(int(ids[row, rank]) if rank < top else outside)
        logprobs.append(top_logprobs[row, rank] if rank < top else draw(values))
    evidence = Evidence(
        logprobs=np.array(logprobs, dtype=float), top_ids=ids, top_logprobs=top_logprobs
    )
    return evidence, produced


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_evidence_is_read_back(case):
    evidence, produced = case
    back = decode_evidence(encode_evidence(evidence, produced), produced)
    assert (back.top_ids == evidence.top_ids).all()
    held = np.clip(evidence.logprobs, -256, 0)  # what lies farther is stored as this far
    assert (np.abs(back.logprobs - held) <= TOP_STEP / 2 + 1e-9).all()


@given(data=st.data(), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_a_value_error_or_other_evidence(data, seed):
    evidence = random_evidence(6, vocabulary=300, seed=seed, ids=uniform)
    produced = evidence.top_ids[:, 0]
    encoded = bytearray(encode_evidence(evidence, produced))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode_evidence(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]), produced)


def test_every_flipped_bit_is_a_value_error_or_other_evidence():
    evidence = random_evidence(6, vocabulary=300, seed=0, ids=uniform)
    produced = evidence.top_ids[:, 0]
    encoded = encode_evidence(evidence, produced)
    refused = 0
    for bit in range(8 * len(encoded)):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decode_evidence(bytes(flipped), produced)
        except ValueError:
            refused += 1
    assert 0 < refused < 8 * len(encoded), "some break the form, some only a figure"


def test_a_single_candidate_is_chosen_by_any_margin():
    evidence = random_evidence(3, vocabulary=300, seed=0, ids=uniform)
    alone = replace(
        evidence, top_ids=evidence.top_ids[:, :1], top_logprobs=evidence.top_logprobs[:, :1]
    )
    assert alone.margins.tolist() == [np.inf] * 3


def test_figures_that_are_no_numbers_are_not_stored():
    evidence = random_evidence(3, vocabulary=300, seed=0, ids=uniform)
    evidence.logprobs[1] = np.nan
    with pytest.raises(ValueError, match="not one finite row"):
        encode_evidence(evidence, evidence.top_ids[:, 0])


def test_movements_are_of_the_same_tokens_whatever_their_order():
    then = Evidence(
        logprobs=np.log([0.6]),
        top_ids=np.array([[7, 8, 9]]),
        top_logprobs=np.log([[0.6, 0.3, 0.05]]),
    )
    now = Evidence(
        logprobs=np.log([0.6]),
        top_ids=np.array([[7, 9, 8]]),
        top_logprobs=np.log([[0.6, 0.3, 0.05]]),
    )
    moved = shifts(then, now, [7])
    assert moved.chosen == pytest.approx([0])
    assert moved.gaps == pytest.approx([np.log(0.05 / 0.3), np.log(0.3 / 0.05)])
    assert moved.worst == pytest.approx(np.log(6))


def test_a_token_that_left_the_top_moved_at_least_below_the_last_of_it():
    then = Evidence(
        logprobs=np.log([0.6]), top_ids=np.array([[7, 8]]), top_logprobs=np.log([[0.6, 0.3]])
    )
    now = Evidence(
        logprobs=np.log([0.6]), top_ids=np.array([[7, 9]]), top_logprobs=np.log([[0.6, 0.1]])
    )
    assert shifts(then, now, [7]).gaps == pytest.approx([np.log(0.1 / 0.3)])
