"""Word differences lose nothing."""

from hypothesis import given
from hypothesis import strategies as st

from harness.textdiff import Change, split_words, word_diff, word_diff_line


@given(st.text())
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text


@given(st.text(max_size=40), st.text(max_size=40))
def test_pieces_lead_from_one_text_to_the_other(before, after):
    pieces = word_diff(before, after)
    assert "".join(p.text for p in pieces if p.change is not Change.ADDED) == before
    assert "".join(p.text for p in pieces if p.change is not Change.REMOVED) == after


def test_words_and_chinese_characters_are_the_unit():
    assert word_diff_line("the red fox", "the grey fox") == "the [-red-]{+grey+} fox"
    assert word_diff_line("小河很清", "小溪很清") == "小[-河-]{+溪+}很清"
