"""What reports hand to JSON is plain, all through."""

import json
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from harness.completion import StopReason
from harness.display.plain_values import plain


class Odd(Enum):
    ONE = 1


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers(), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_strict_json_holds_whatever_comes_out(value):
    written = json.dumps(plain(value), allow_nan=False)
    assert json.loads(written) == plain(value)


def test_numbers_that_are_not_finite_are_none_at_any_depth():
    assert plain({"a": (1.5, float("nan"), [float("-inf")])}) == {"a": [1.5, None, [None]]}


def test_enums_are_their_values_and_the_rest_is_text():
    assert plain([Odd.ONE, StopReason.EOS]) == [1, "eos"]
    assert type(plain(StopReason.EOS)) is str
    assert plain(MappingProxyType({0: Path("a/b")})) == {"0": "a/b"}
