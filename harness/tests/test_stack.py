"""Modes, names and mode expressions."""

import pytest

from harness.errors import InputError
from harness.stack import check_adapter_name, default_modes, parse_modes


@pytest.mark.parametrize(
    ("adapters", "modes"),
    [
        ([], ["base"]),
        (["lora"], ["base", "lora"]),
        (["style", "instruct"], ["base", "style", "instruct", "stacked"]),
        (["a", "b", "c"], ["base", "a", "b", "c", "stacked"]),
    ],
)
def test_modes_follow_from_the_adapters(adapters, modes):
    assert [mode.name for mode in default_modes(adapters)] == modes


def test_expression_gives_weights_in_the_stacks_order():
    (mode,) = parse_modes(["instruct+style*0.5"], ["style", "instruct"])
    assert mode.weights == (("style", 0.5), ("instruct", 1.0))
    assert mode.formula == "W = W_base + 0.5·ΔW_style + ΔW_instruct"


def test_expression_can_be_named():
    (mode,) = parse_modes(["half = style*0.5"], ["style"])
    assert (mode.name, mode.weights) == ("half", (("style", 0.5),))


@pytest.mark.parametrize(
    ("expressions", "complaint"),
    [
        (["styel"], "unknown mode or adapter 'styel'"),
        (["style*x"], "'style\\*x': 'x' is not a finite number"),
        (["style*nan"], "not a finite number"),
        (["style*inf"], "not a finite number"),
        (["style*-1e5"], "the weight '-1e5' is beyond 10000"),
        (["style+style"], "named twice"),
        (["base", "base"], "named twice"),
        (["base=style"], "cannot name a subset"),
        ([], "no mode is named"),
    ],
)
def test_faulty_expression_is_refused(expressions, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_modes(expressions, ["style", "instruct"])


@pytest.mark.parametrize("name", ["", "a.b", "1st", "a b", "base", "stacked", "all"])
def test_name_that_modes_or_peft_cannot_hold_is_refused(name):
    with pytest.raises(InputError):
        check_adapter_name(name, where="--adapter")
