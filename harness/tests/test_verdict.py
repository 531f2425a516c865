"""Judges are pure: values in, verdicts out."""

from hypothesis import given
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.verdict import Outcome, Verdict, judge_effect, overall


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
