"""The judge: rates by their interval, counterexamples at once, too few prompts never a pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.errors import InputError
from harness.expectation import read_expectation
from harness.stopping.judging import judge_samples, judge_stopping
from harness.verdict import Outcome


def completion(number, *, reason=StopReason.EOS, tokens=(1, 2), text="A sentence. "):
    return Completion(
        prompt=Prompt(id=f"p-{number}", text="x"),
        mode="m",
        application=Application.LIVE,
        prompt_token_ids=(1,),
        token_ids=tokens,
        text=text,
        stop_reason=reason,
        settings=GenerationSettings(),
    )


def said(stopped, ran_on, cut_off=0):
    found = [completion(n) for n in range(stopped)]
    found += [completion(n, reason=StopReason.LENGTH) for n in range(ran_on)]
    return found + [completion(n, reason=StopReason.LENGTH, text="not yet") for n in range(cut_off)]


@pytest.mark.parametrize(
    ("expected", "stopped", "ran_on", "cut_off", "outcome"),
    [
        ("always", 73, 0, 0, Outcome.HELD),
        ("always", 72, 0, 0, Outcome.UNDECIDED),
        ("always", 8, 0, 0, Outcome.UNDECIDED),
        ("always", 200, 1, 0, Outcome.FAILED),
        ("always", 80, 0, 1, Outcome.UNDECIDED),
        ("always", 0, 0, 80, Outcome.UNDECIDED),
        ("never", 0, 73, 0, Outcome.HELD),
        ("never", 0, 8, 0, Outcome.UNDECIDED),
        ("never", 1, 200, 0, Outcome.FAILED),
        ("never", 0, 0, 80, Outcome.UNDECIDED),
        ({"min_rate": 0.5}, 40, 10, 0, Outcome.HELD),
        ({"min_rate": 0.5}, 26, 24, 0, Outcome.UNDECIDED),
        ({"min_rate": 0.5}, 10, 40, 0, Outcome.FAILED),
        ({"min_rate": 0.5}, 40, 0, 40, Outcome.UNDECIDED),
        ({"max_rate": 0.5}, 10, 40, 0, Outcome.HELD),
        ({"max_rate": 0.5}, 40, 10, 0, Outcome.FAILED),
        ({"min_rate": 0.2, "max_rate": 0.8}, 50, 50, 0, Outcome.HELD),
        ("always", 0, 0, 0, Outcome.UNDECIDED),
    ],
)
def test_declaration_is_judged_on_the_interval(expected, stopped, ran_on, cut_off, outcome):
    verdict = judge_stopping("m", expected, said(stopped, ran_on, cut_off))
    assert verdict.outcome is outcome
    assert verdict.passed == (outcome is Outcome.HELD)


@pytest.mark.parametrize(
    ("expected", "answers", "empty", "outcome"),
    [
        ("always", 80, 1, Outcome.FAILED),
        ("always", 0, 80, Outcome.FAILED),
        ({"min_rate": 0.5}, 40, 10, Outcome.HELD),
        ({"min_rate": 0.5}, 10, 40, Outcome.FAILED),
        ("never", 0, 80, Outcome.FAILED),  # it did stop
        ({"max_rate": 0.5}, 0, 80, Outcome.FAILED),
    ],
)
def test_completion_that_says_nothing_is_no_answer_that_ended(expected, answers, empty, outcome):
    silent = [completion(n, tokens=(2,), text="") for n in range(empty)]
    verdict = judge_stopping("m", expected, said(answers, 0) + silent)
    assert verdict.outcome is outcome
    if expected == "always":
        assert "said nothing" in verdict.evidence[-1]


def test_too_few_prompts_say_how_many_are_needed():
    verdict = judge_stopping("m", "always", said(8, 0))
    assert "8 prompts are too few to decide; 73 would, if the rest do likewise" in verdict.evidence
    run = judge_stopping("m", "always", said(8, 0), too_few=Outcome.SKIPPED)
    assert run.outcome is Outcome.SKIPPED


@pytest.mark.parametrize("cut_off", [2, 80])
def test_cut_off_answers_are_undecided_even_where_few_prompts_are_skipped(cut_off):
    cut = judge_stopping("m", "always", said(0, 0, cut_off), too_few=Outcome.SKIPPED)
    assert cut.outcome is Outcome.UNDECIDED
    assert "max_new_tokens = 64 is too small to decide" in cut.evidence


def test_offenders_are_named_with_what_they_did():
    verdict = judge_stopping("m", "always", said(1, 1))
    assert "p-0: ended by length after 2 tokens" in verdict.evidence
    verdict = judge_stopping("m", "never", said(1, 1))
    assert "p-0: ended with EOS after 2 tokens" in verdict.evidence


def test_overrun_and_loops_are_judged_where_they_are_declared():
    looping = [*said(73, 0), completion(99, tokens=(5, 6) * 10, text="ab" * 10)]
    assert judge_stopping("m", "always", looping).outcome is Outcome.HELD
    verdict = judge_stopping("m", {"stops": "always", "loops": False}, looping)
    assert verdict.outcome is Outcome.FAILED
    assert "1 end in a repetition loop, of period 2 tokens" in verdict.evidence
    asked = completion(7, tokens=(9,) * 5, text="It is red.\nQuestion: what is blue?")
    assert judge_stopping("m", {"max_rate": 0.99, "max_overrun": 0}, [asked]).outcome is (
        Outcome.FAILED
    )


@given(st.integers(0, 90), st.integers(0, 90))
@settings(max_examples=40, deadline=None)
def test_held_means_that_the_interval_is_beyond_the_bound(stopped, ran_on):
    from harness.stopping.intervals import rate_interval

    verdict = judge_stopping("m", {"min_rate": 0.6}, said(stopped, ran_on))
    if verdict.passed:
        assert rate_interval(stopped, stopped + ran_on).low > 0.6


def test_samples_are_judged_by_prompts():
    assert judge_samples("m", "always", [8] * 73, 8).outcome is Outcome.HELD
    assert judge_samples("m", "always", [64] * 10, 64).outcome is Outcome.UNDECIDED
    assert judge_samples("m", "always", [0] * 20, 4).outcome is Outcome.FAILED


def test_samples_that_say_nothing_are_no_answers_that_ended():
    counts, empty = [8] * 73, [1] * 73
    told = judge_samples("m", {"min_rate": 0.95}, counts, 8, empty=empty)
    assert told.outcome is Outcome.FAILED
    assert "511 of 584 samples of 73 prompts ended an answer, 73 more said nothing" in str(told)
    # Where answers must not end, one that says nothing did end.
    assert judge_samples("m", "never", counts, 8, empty=empty).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    "wrong",
    ["sometimes", {}, {"min_rate": 2}, {"min_rate": True}, {"stops": "always", "min_rate": 0.5},
     {"max_overrun": -1}, {"max_overrun": 1.5}, {"loops": "no"}, {"rate": 1}, 3,
     {"min_rate": 0.9, "max_rate": 0.1}],
)  # fmt: skip
def test_meaningless_declaration_is_refused(wrong):
    with pytest.raises(InputError, match="declares no stopping"):
        read_expectation(wrong)
