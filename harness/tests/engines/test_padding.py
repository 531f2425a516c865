"""Rows of any length become one block, and the mask says what is padding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def padded():
    from harness.engines.padding import padded

    return padded


@settings(deadline=None)
@given(rows=ROWS, side=st.sampled_from(["left", "right"]), least=st.integers(0, 3))
def test_what_the_mask_shows_is_the_rows_and_the_rest_is_padding(padded, rows, side, least):
    ids, mask = padded(rows, 100, side=side, least=least)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)) + least)
    assert [kept[seen == 1].tolist() for kept, seen in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == 100).all()


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[0, 0, 7], [1, 2, 3]], [[0, 0, 1], [1, 1, 1]]),
        ("right", [[7, 0, 0], [1, 2, 3]], [[1, 0, 0], [1, 1, 1]]),
    ],
)
def test_padding_lies_on_the_side_that_is_named(padded, side, ids, mask):
    block, seen = padded([[7], [1, 2, 3]], 0, side=side)
    assert (block.tolist(), seen.tolist()) == (ids, mask)
