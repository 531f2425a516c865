"""What a verdict says, word for word: name, evidence and remedy reach every report."""

import pytest

from harness.completion import Prompt
from harness.tests.values import completion
from harness.verdict import Outcome, Verdict, judge_effect, overall


def said(*tokens):
    return [
        completion(Prompt(id=f"p-{number}", text="x"), token_ids=(token,))
        for number, token in enumerate(tokens)
    ]


def test_an_effect_is_told_with_its_share():
    verdict = judge_effect("effect: base ≠ style", said(1, 2, 3), said(1, 5, 6))
    assert verdict == Verdict(
        name="effect: base ≠ style",
        outcome=Outcome.HELD,
        evidence=("2 of 3 completions differ",),
        remedy=None,
    )


def test_no_effect_is_told_with_what_to_do():
    verdict = judge_effect("effect: base ≠ style", said(1, 2), said(1, 2))
    assert verdict == Verdict(
        name="effect: base ≠ style",
        outcome=Outcome.FAILED,
        evidence=("all 2 completions are the same, token for token",),
        remedy="run lora-stack verify: an adapter may be inactive, empty, or scaled to nothing",
    )


def test_modes_with_other_numbers_of_completions_are_not_compared():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        judge_effect("e", said(1, 2), said(1))


def test_the_form_of_a_check_in_json():
    verdict = Verdict(name="n", outcome=Outcome.TIE, evidence=("a", "b"), remedy="r")
    assert verdict.as_json() == {
        "name": "n", "verdict": "tie", "evidence": ["a", "b"], "remedy": "r"
    }  # fmt: skip
    assert verdict.passed


def test_the_order_of_outcomes_is_from_harmless_to_bad():
    for number, outcome in enumerate(Outcome):
        worst = overall(Verdict(name="v", outcome=o) for o in list(Outcome)[: number + 1])
        assert worst is outcome
    assert overall([]) is Outcome.UNDECIDED
    assert [o for o in Outcome if o.passed] == [Outcome.HELD, Outcome.TIE, Outcome.SKIPPED]
