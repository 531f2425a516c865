"""Natural ends, loops and survival are found in tokens and text alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.stopping.endings import EndSign, ends_a_sentence, find_loop, natural_end
from harness.stopping.figures import Ending, survival

WORDS = (
    "", "The fox", " is red", ".", "\n", "Where", " is it", "?", "User:", " Hello", "狐狸在林中",
    "。", "<|im_end|>", "A", " list",
)  # fmt: skip


def decode(ids):
    return "".join(WORDS[n] for n in ids if n != 12)


def sign_of(ids, prompt="Who lives there?", **arguments):
    end = natural_end(ids, decode(ids), prompt, decode=decode, loop=find_loop(ids), **arguments)
    return None if end is None else (end.sign, end.tokens)


@pytest.mark.parametrize(
    ("ids", "prompt", "expected"),
    [
        ([1, 2, 3], "x", None),
        ([1, 2, 3, 4, 1, 2, 3], "x", None),  # a second paragraph is no overrun
        ([1, 2, 3, 4, 5, 6, 7], "x", (EndSign.QUESTION, 4)),
        ([1, 2, 3, 4, 8, 9], "x", (EndSign.ROLE_HEADER, 4)),
        ([1, 2, 3, 12, 4, 9], "x", (EndSign.END_TOKEN, 3)),
        ([1, 2, 3, 9, 9], "Hello", (EndSign.PROMPT_AGAIN, 4)),
        ([9, 1, 2, 3], "Hello", None),  # an answer may take the question up
        ([10, 11, 10, 11], "x", None),
        ([10, 11] + [13, 14] * 4, "x", (EndSign.LOOP, 4)),
    ],
)
def test_natural_end_is_where_something_else_begins(ids, prompt, expected):
    assert sign_of(ids, prompt, turn_ids={12}) == expected


def test_question_that_closes_an_answer_is_asked_of_the_user():
    asking = [1, 2, 3, 4, 5, 6, 7]  # "The fox is red.\nWhere is it?"
    assert sign_of(asking) == (EndSign.QUESTION, 4)  # cut off: who knows what follows
    assert sign_of(asking, ended=True) is None
    assert sign_of([*asking, 4, 1, 2, 3], ended=True) == (EndSign.QUESTION, 4)


def test_token_that_stops_generation_is_no_overrun():
    assert sign_of([1, 2, 3, 12], turn_ids={12}, stops={12}) is None


def test_place_is_estimated_without_a_tokenizer():
    end = natural_end([1, 2, 3, 4, 8, 9], "The fox is red.\nUser: Hello", "x")
    assert (end.sign, end.exact) == (EndSign.ROLE_HEADER, False)


@given(
    st.lists(st.integers(0, 30), max_size=20),
    st.lists(st.integers(0, 30), min_size=1, max_size=9),
    st.integers(3, 6),
)
@settings(max_examples=60, deadline=None)
def test_planted_loop_is_found_with_a_period_that_repeats(head, period, rounds):
    ids = head + period * rounds
    loop = find_loop(ids)
    if len(period) * rounds < 8:
        return
    assert loop is not None
    assert len(period) % loop.period == 0 or loop.period < len(period)
    tail = ids[loop.start :]
    assert all(a == b for a, b in zip(tail, tail[loop.period :], strict=False))


@pytest.mark.parametrize("ids", [[], [1], [1, 2] * 2, [7, 7, 7], list(range(50))])
def test_little_repetition_is_no_loop(ids):
    assert find_loop(ids) is None


@pytest.mark.parametrize("text", ["It ends.", "好。", 'He said "no." Then', "Really?"])
def test_places_where_an_answer_could_end(text):
    assert ends_a_sentence(text)


@pytest.mark.parametrize("text", ["", "no end", "3.14", "e.g,", "狐狸"])
def test_no_place_where_an_answer_could_end(text):
    assert not ends_a_sentence(text)


def ending(tokens, stopped):
    from harness.completion import StopReason

    return Ending(
        prompt="p", stop_reason=StopReason.EOS if stopped else StopReason.LENGTH, tokens=tokens,
        sign=None, natural_end=None, overrun=0, loop=None, loop_text="", counted=True,
        undecided=False,
    )  # fmt: skip


def test_survival_is_kaplan_and_meiers():
    # 4 completions: one stops at 1, one is cut off at 2, one stops at 3, one is cut off at 3.
    curve = survival([ending(1, True), ending(2, False), ending(3, True), ending(3, False)])
    assert curve.at_risk == (4, 3, 2)
    assert curve.hazard == (0.25, 0.0, 0.5)
    assert curve.running == (0.75, 0.75, 0.375)
    assert survival([]).running == ()
