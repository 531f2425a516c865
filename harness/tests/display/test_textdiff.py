"""Word differences lose nothing."""

from hypothesis import given
from hypothesis import strategies as st

from harness.display.textdiff import Change, split_words, word_diff, word_diff_line


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


def test_a_blank_alone_ties_no_two_texts_together():
    assert word_diff_line("one two three", "four five six") == "[-one two three-]{+four five six+}"
    assert word_diff_line("a  b", "a b") == "a[-  -]{+ +}b"
    assert word_diff_line("the red fox", "the fox") == "the [-red -]fox"


def test_long_texts_are_compared_in_bounded_work():
    # Found by counting pairs, not by the clock: beyond the bound the middle is one replacement.
    before, after = "1 " + "the cat " * 3000, "2 " + "the dog " * 3000
    assert len(word_diff(before, after)) == 3
    assert len(word_diff("same " * 20_000 + "a", "same " * 20_000 + "b")) == 3
