"""The verdict on a snapshot: held, tie, drift, changed, missing, incomparable, unreadable."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.comparing import judge_snapshot
from harness.errors import InputError
from harness.evidence import Evidence, stored
from harness.noise import NoiseFloor
from harness.snapshot import snapshot_of
from harness.tests.test_snapshot import completion
from harness.verdict import Outcome

FLOAT32 = NoiseFloor(
    dtype="float32",
    device="cpu",
    chosen=1e-6,
    gaps=1e-6,
    worst=3e-6,
    close=2e-6,
    tokens=96,
    ways=("alone",),
)
BFLOAT16 = NoiseFloor(
    dtype="bfloat16",
    device="cpu",
    chosen=0.015,
    gaps=0.02,
    worst=0.06,
    close=0.04,
    tokens=96,
    ways=("alone",),
)
IDS = tuple(range(10, 42))


def evidence(ids=IDS, *, margin=2.0, seed=0, moved=0.0):
    """Evidence of greedy tokens, each before a token 1000 higher; logits moved at random."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(0.3, (len(ids), 5)) + np.array([0, margin, 0.5, 0.5, 0.5])
    logits = -np.cumsum(gaps, axis=1)
    logits += moved * np.random.default_rng(99).standard_normal(logits.shape)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) + 0.001)
    order = np.argsort(-logprobs, axis=1)
    top_ids = np.array(ids)[:, None] + np.array([0, 1000, 2000, 3000, 4000])
    return Evidence(
        logprobs=logprobs[:, 0].copy(),
        top_ids=np.take_along_axis(top_ids, order, axis=1),
        top_logprobs=np.take_along_axis(logprobs, order, axis=1),
    )


def accepted(ids=IDS, *, seen=None, dtype="float32", **changes):
    seen = evidence(ids) if seen is None else seen
    made = completion(token_ids=ids, evidence=stored(seen, ids), **changes)
    return snapshot_of(made, {"dtype": dtype, "base": "b"}, {"base": "0", "adapter_style": "0"})


def fresh(ids=IDS, *, seen=None, contents=None, made_with=None, **changes):
    seen = evidence(ids) if seen is None else seen
    made = completion(token_ids=ids, evidence=seen, **changes)
    return snapshot_of(
        made,
        {"dtype": "float32", "base": "b", **(made_with or {})},
        {"base": "0", "adapter_style": "0", **(contents or {})},
    )


def outcome(then, now, floor=FLOAT32, **arguments):
    return judge_snapshot("case", then, now, floor, **arguments).verdict.outcome


def lines(then, now, floor=FLOAT32, **arguments):
    return "\n".join(judge_snapshot("case", then, now, floor, **arguments).verdict.evidence)


def test_same_tokens_and_probabilities_are_held_whatever_the_versions():
    now = fresh(made_with={"torch": "9", "device": "cuda:0"}, contents={"base": "1"})
    assert outcome(accepted(), now) is Outcome.HELD
    assert "over 32 same tokens log-probabilities moved by" in lines(accepted(), now)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 64))
@settings(max_examples=80, deadline=None)
def test_rounding_of_what_is_stored_is_never_a_drift(seed, count):
    ids = tuple(range(10, 10 + count))
    seen = evidence(ids, seed=seed, margin=seed % 7 / 3)
    assert outcome(accepted(ids, seen=seen), fresh(ids, seen=seen)) is Outcome.HELD


@pytest.mark.parametrize("moved", [0.01, 0.03, 1.0])
def test_moved_probabilities_under_the_same_tokens_are_a_drift(moved):
    now = fresh(seen=evidence(moved=moved), contents={"adapter_style": "1"})
    assert outcome(accepted(), now) is Outcome.DRIFT
    found = lines(accepted(), now)
    assert "the noise floor is 1e-06 nats" in found
    assert "adapter_style: other contents than when accepted" in found


def test_what_float32_calls_a_drift_is_rounding_in_bfloat16():
    now = fresh(seen=evidence(moved=0.02), made_with={"dtype": "bfloat16"})
    assert outcome(accepted(), now, FLOAT32) is Outcome.DRIFT
    assert outcome(accepted(), now, BFLOAT16) is Outcome.HELD


def at(place, margin_then, margin_now):
    """Accepted and fresh, which differ at *place* by the second token coming first."""
    then = evidence()
    then.top_logprobs[place, 1] = then.top_logprobs[place, 0] - margin_then
    other = (*IDS[:place], IDS[place] + 1000, 7, 8)
    now = evidence(other)
    now.top_ids[:place], now.top_logprobs[:] = then.top_ids[:place], now.top_logprobs
    now.logprobs[:place] = then.logprobs[:place]
    now.top_logprobs[:place] = then.top_logprobs[:place]
    now.top_ids[place] = then.top_ids[place][[1, 0, 2, 3, 4]]
    now.top_logprobs[place] = then.top_logprobs[place]
    now.top_logprobs[place, 1] = now.top_logprobs[place, 0] - margin_now
    return accepted(seen=then), fresh(other, seen=now, text="In the barn.")


@pytest.mark.parametrize("place", [0, 5, 31])
def test_a_margin_within_the_floor_is_a_tie_and_passes(place):
    then, now = at(place, 0.0, 1e-6)
    found = judge_snapshot("case", then, now, FLOAT32)
    assert found.verdict.outcome is Outcome.TIE
    assert found.verdict.passed
    assert found.first == place


@pytest.mark.parametrize(
    ("margin_then", "margin_now", "floor"),
    [(0.0, 0.01, FLOAT32), (2.0, 1e-6, FLOAT32), (0.5, 0.5, BFLOAT16), (0.0, 1e-6, None)],
    ids=["now", "then", "both", "no floor"],
)
def test_a_margin_beyond_the_floor_is_a_change(margin_then, margin_now, floor):
    then, now = at(5, margin_then, margin_now)
    assert outcome(then, now, floor) is Outcome.CHANGED


def test_a_tie_after_moved_probabilities_is_a_change():
    then, now = at(20, 0.0, 1e-6)
    now.evidence.top_logprobs[:20, 1:] += 0.05
    assert outcome(then, now) is Outcome.CHANGED


def test_a_tie_that_hides_a_change_further_on_is_a_change():
    then, now = at(5, 0.0, 1e-6)
    whole = evidence()
    whole.top_logprobs[5, 1] = whole.top_logprobs[5, 0]
    assert outcome(then, now, accepted_now=whole) is Outcome.TIE
    whole.top_logprobs[25, 1:] += 1.0
    assert outcome(then, now, accepted_now=whole) is Outcome.CHANGED


def test_change_names_both_tokens_their_chances_the_margin_the_words_and_why_it_ended():
    from harness.completion import StopReason

    then, now = at(5, 2.0, 1.0)
    now = replace(now, stop_reason=StopReason.LENGTH)
    found = lines(then, now, piece=lambda token: f"<{token}>")
    assert (
        "token 6 is the first that differs: '<15>' (15) accepted, '<1015>' (1015) now, "
        "after '<10><11><12><13><14>'" in found
    )
    assert "then: '<15>' " in found
    assert "now: '<15>' " in found
    assert "%; the best is 2 nats before the second" in found
    assert "the noise floor is" in found
    assert "stop reason: eos after 32 tokens accepted, length after 8 now" in found
    assert "In the [-wood-]{+barn+}." in found


def test_an_end_that_is_gone_is_a_change_though_the_text_is_the_same():
    from harness.completion import StopReason

    ids = IDS[:-1]
    now = fresh(ids, seen=evidence().first(31), stop_reason=StopReason.LENGTH)
    assert outcome(accepted(), now) is Outcome.CHANGED
    assert "(41) accepted, the end now" in lines(accepted(), now)
    assert "the text is the same" in lines(accepted(), now)


def test_without_evidence_the_tokens_decide_and_it_is_said():
    now = fresh()
    bare = replace(accepted(), evidence=None)
    assert outcome(bare, now) is Outcome.HELD
    assert "probabilities were not compared: the snapshot has no evidence" in lines(bare, now)
    assert outcome(bare, fresh((1, 2, 3))) is Outcome.CHANGED


def test_probabilities_that_are_no_numbers_are_a_drift():
    broken = evidence()
    broken.logprobs[3] = np.nan
    assert outcome(accepted(), fresh(seen=broken)) is Outcome.DRIFT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_token_ids": (1,)}, "the prompt's token ids differ (2 accepted, 1 now)"),
        ({"mode": "base"}, "the mode was 'stacked', is 'base'"),
        ({"settings": "longer"}, "the setting max_new_tokens was 8, is 9"),
        ({"made_with": {"architecture": "llama"}}, "the base's architecture was None, is llama"),
        ({"made_with": {"composition": "base + style"}}, "the mode was None, is base + style"),
        ({"contents": {"tokenizer": "1"}}, "the tokenizer is another one"),
    ],
)
def test_other_conditions_are_incomparable_and_said(changes, said):
    from harness.completion import GenerationSettings

    if changes.get("settings") == "longer":
        changes = {"settings": GenerationSettings(max_new_tokens=9)}
    now = fresh(**changes)
    assert outcome(accepted(), now) is Outcome.INCOMPARABLE
    assert said in lines(accepted(), now)


@pytest.mark.parametrize(
    ("then", "now", "contents", "expected"),
    [
        ("a/one@0123456789", "a/two@0123456789", "1", Outcome.INCOMPARABLE),
        ("a/one@0123456789", "a/one@main@aaaaaaaaaa", "1", Outcome.HELD),
        ("a/one@0123456789", "a/two@0123456789", "0", Outcome.HELD),
        ("a/one@0123456789", "folder", "1", Outcome.HELD),
        ("one", "two", "1", Outcome.HELD),
    ],
)
def test_another_hub_model_is_incomparable_another_revision_or_folder_is_not(
    then, now, contents, expected
):
    before = replace(accepted(), made_with={"dtype": "float32", "base": then})
    after = fresh(made_with={"base": now}, contents={"base": contents})
    assert outcome(before, after) is expected


def test_nothing_accepted_is_missing_and_damage_unreadable():
    assert outcome(None, fresh()) is Outcome.MISSING
    fault = InputError("line 3: a merge-conflict marker", where="x.toml", remedy="mend it")
    found = judge_snapshot("case", fault, fresh(), None).verdict
    assert found.outcome is Outcome.UNREADABLE
    assert found.evidence == ("x.toml: line 3: a merge-conflict marker",)
    assert found.remedy == "mend it"


def test_hostile_text_and_provenance_are_made_inert():
    then = replace(accepted(), made_with={"dtype": "\x1b[31m", "base": "b"}, text="\x1b]0;x\x07")
    found = lines(then, fresh(IDS[:3], text="\u202eevil"), piece=lambda token: "\x1b[2J")
    assert not {"\x1b", "\x07", "\u202e"} & set(found)
