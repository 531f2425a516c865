"""A token is shown as what it stands for, bytes by name; neighbours join to the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from harness.display.pieces import joined_pieces, token_piece

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def loaded(inner, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def byte_level():
    """Every byte a token; `çĽ` the first two bytes of 盐; a special token."""
    vocabulary = {name: place for place, name in enumerate([*ALPHABET, "çĽ", "Ġt", "Ġç"])}
    merges = [("ç", "Ľ"), ("Ġ", "t"), ("Ġ", "ç")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return loaded(inner, eos_token="<|end|>")


@pytest.fixture(scope="module")
def sentence_piece():
    """As Llama's and Gemma's: a mark for the blank, a token a byte where nothing else fits."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "e", "▁t", "▁te"]
    vocabulary = {name: place for place, name in enumerate(names)}
    merges = [("▁", "t"), ("▁t", "e")]
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    blank = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    words = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*words, decoders.Strip(" ", 1, 0)])
    return loaded(inner)


def pieces(tokenizer, text):
    return [token_piece(tokenizer, token) for token in tokenizer(text)["input_ids"]]


def test_bytes_that_are_no_character_are_named(byte_level):
    salt = ["<0xE7><0x9B>", "<0x90>"]
    assert pieces(byte_level, "t盐 竹") == ["t", *salt, " <0xE7>", "<0xAB>", "<0xB9>"]
    assert pieces(byte_level, "\ufffd<|end|>")[-1] == "<|end|>"
    assert token_piece(byte_level, byte_level.convert_tokens_to_ids("Ġt")) == " t"


def test_a_token_that_is_a_byte_keeps_its_name_and_one_of_words_its_blank(sentence_piece):
    assert pieces(sentence_piece, "te 竹") == [" te", " ", "<0xE7>", "<0xAB>", "<0xB9>"]


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("token", [-1, 100_000, 1 << 70])
def test_what_is_no_token_is_named_by_its_number(request, tokenizer, token):
    assert token_piece(request.getfixturevalue(tokenizer), token) == f"<{token}>"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_joined_pieces_are_the_text_and_no_part_of_it_is_lost(byte_level, text, data):
    found = pieces(byte_level, text)
    assert joined_pieces(found) == text
    # Cut anywhere, what is left of a character is named, and the halves make it again.
    place = data.draw(st.integers(0, len(found)))
    before, after = joined_pieces(found[:place]), joined_pieces(found[place:])
    assert joined_pieces([before, after]) == text
    assert (before + after).count("\ufffd") == text.count("\ufffd")
