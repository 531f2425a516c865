"""Foreign text is shown, never obeyed."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from harness.terminal import shown


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    result = shown(text)
    assert not [c for c in result if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [c for c in result if c in "\u202e\u2066\u2069\u200f"]
    assert not any(line.lstrip().startswith("::") for line in result.split("\n"))


def test_ordinary_text_stays_as_it_is():
    text = "Grüße,\n\t你好 🙂 (a::b)"
    assert shown(text) == text


def test_escape_is_named():
    assert shown("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"
