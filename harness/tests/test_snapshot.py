"""Accepted completions: what is stored is read back, and differences are named."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.errors import InputError
from harness.snapshot import differences, read_snapshot, snapshot_name, snapshot_of, write_form

# TOML cannot hold lone surrogates, and no tokenizer decodes to them.
texts = st.text(st.characters(exclude_categories=("Cs",)))
ids = st.lists(st.integers(0, 200_000), max_size=8).map(tuple)


def completion(**changes):
    made = Completion(
        prompt=Prompt(id="fox", text="Where is the fox?"),
        mode="stacked",
        application=Application.LIVE,
        prompt_token_ids=(1, 2),
        token_ids=(3, 4, 5),
        text="In the wood.",
        stop_reason=StopReason.EOS,
        settings=GenerationSettings(max_new_tokens=8),
    )
    return replace(made, **changes)


@given(text=texts, tokens=ids, prompt=texts, reason=st.sampled_from(StopReason))
def test_stored_form_is_read_back_exactly(text, tokens, prompt, reason):
    snapshot = snapshot_of(
        completion(
            text=text, token_ids=tokens, stop_reason=reason, prompt=Prompt(id="fox", text=prompt)
        ),
        {"device": "cpu"},
    )
    assert read_snapshot(write_form(snapshot), where="x") == snapshot


@given(settings=st.builds(GenerationSettings, seed=st.none() | st.integers(0, 9),
                          stop_strings=st.lists(st.text("ab", min_size=1)).map(tuple)))  # fmt: skip
def test_settings_are_stored_without_nulls(settings):
    snapshot = snapshot_of(completion(settings=settings), {})
    assert read_snapshot(write_form(snapshot), where="x").settings == snapshot.settings


@given(st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=6, unique=True))
def test_no_two_cases_share_a_file(cases):
    names = [snapshot_name(*case) for case in cases]
    assert len(set(names)) == len(names)
    assert not any(set('/\\?*:|"<>') & set(name) for name in names)


def lines(**changes):
    accepted = snapshot_of(completion(), {"dtype": "float32"})
    return "\n".join(
        differences(accepted, snapshot_of(completion(**changes), {"dtype": "float16"}))
    )


def test_same_tokens_are_no_difference_whatever_the_versions():
    assert lines() == ""


def test_changed_token_is_named_with_words_and_provenance():
    found = lines(token_ids=(3, 9, 5), text="In the barn.")
    assert "token 2 is the first that differs: 4 accepted, 9 now" in found
    assert "In the [-wood-]{+barn+}." in found
    assert "dtype: float32 accepted, float16 now" in found


def test_missing_eos_is_a_difference_though_the_text_is_the_same():
    found = lines(token_ids=(3, 4), stop_reason=StopReason.LENGTH)
    assert "token 3 is the first that differs: 5 accepted, the end now" in found
    assert "the text is the same" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": (1,)},
        {"mode": "base"},
        {"settings": GenerationSettings(max_new_tokens=9)},
    ],
)
def test_other_conditions_are_incomparable(changes):
    assert lines(**changes).startswith("incomparable")


FORM = write_form(snapshot_of(completion(), {}))


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        ("", "has form None"),
        (FORM.replace("form = 1", "form = 2"), "has form 2"),
        (FORM.replace("prompt_text", "prompt_txt"), "'prompt_text' is missing"),
        (FORM.replace("3 4 5", "3 x 5"), "malformed"),
        (FORM.replace("3 4 5", "3 -4 5"), "negative"),
        (FORM.replace('"eos"', '"whim"'), "malformed"),
        (FORM.replace("[tokens]", "<<<<<<< HEAD\n[tokens]"), "line 9: a merge-conflict marker"),
        (FORM[:120], "not valid TOML"),
        (FORM.replace("[made_with]", "[made]"), "'made_with' is missing"),
    ],
    ids=lambda value: value if len(value) < 40 else "form",
)
def test_broken_form_is_unreadable_and_says_where(form, complaint):
    with pytest.raises(InputError, match=complaint):
        read_snapshot(form, where="x.toml")
