"""Judges are pure: values in, verdicts out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.verdict import Outcome, Verdict, judge_effect, judge_stopping, overall


def completion(number, *, reason=StopReason.EOS, tokens=(1, 2)):
    return Completion(
        prompt=Prompt(id=f"p-{number}", text="x"),
        mode="m",
        application=Application.LIVE,
        prompt_token_ids=(1,),
        token_ids=tokens,
        text="t",
        stop_reason=reason,
        settings=GenerationSettings(),
    )


def stopped(yes, no):
    found = [completion(n) for n in range(yes)]
    return found + [completion(yes + n, reason=StopReason.LENGTH) for n in range(no)]


@pytest.mark.parametrize(
    ("expected", "yes", "no", "outcome"),
    [
        ("always", 3, 0, Outcome.HELD),
        ("always", 3, 1, Outcome.FAILED),
        ("never", 0, 3, Outcome.HELD),
        ("never", 1, 3, Outcome.FAILED),
        ({"min_rate": 0.5}, 1, 1, Outcome.HELD),
        ({"min_rate": 0.6}, 1, 1, Outcome.FAILED),
        ({"max_rate": 0.4}, 1, 1, Outcome.FAILED),
        ("always", 0, 0, Outcome.UNDECIDED),
    ],
)
def test_stopping_is_held_against_the_declaration(expected, yes, no, outcome):
    verdict = judge_stopping("m", expected, stopped(yes, no))
    assert verdict.outcome is outcome
    assert verdict.passed == (outcome is Outcome.HELD)


def test_offenders_are_named_with_what_they_did():
    verdict = judge_stopping("m", "always", stopped(1, 1))
    assert "p-1: ended by length after 2 tokens" in verdict.evidence
    verdict = judge_stopping("m", "never", stopped(1, 1))
    assert "p-0: ended with EOS after 2 tokens" in verdict.evidence


def test_equal_outputs_are_no_effect():
    same = [completion(1), completion(2)]
    assert judge_effect("e", same, same).outcome is Outcome.FAILED
    other = [completion(1), completion(2, tokens=(1, 3))]
    assert judge_effect("e", same, other).outcome is Outcome.HELD
    assert judge_effect("e", [], []).outcome is Outcome.UNDECIDED


@given(st.lists(st.sampled_from(Outcome), min_size=1))
def test_worst_outcome_stands_for_all(outcomes):
    verdicts = [Verdict(name="v", outcome=o) for o in outcomes]
    assert overall(verdicts).passed == all(v.passed for v in verdicts)
    assert overall(verdicts) in outcomes


def test_no_verdict_is_not_a_pass():
    assert not overall([]).passed
