"""Training data: does each example end with an EOS that is in the loss?"""

import json

import pytest

from harness.embedded import embedded_folder
from harness.errors import InputError
from harness.stopping.training_data import Fault, check_training_data
from harness.verdict import Outcome

STOPS = {637, 639}


@pytest.fixture
def tokenizer():
    from harness.engines.described import fresh_tokenizer

    return fresh_tokenizer(embedded_folder() / "stages" / "base")


@pytest.fixture
def check(tokenizer, tmp_path):
    def run(*examples, stops=STOPS, **arguments):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(json.dumps(example) for example in examples))
        return check_training_data(file, tokenizer, stops=stops, **arguments)

    return run


def chat(answer="The fox is red."):
    return {"messages": [{"role": "user", "content": "What?"},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


SHAREGPT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]}
PAIR = {"prompt": "What?", "completion": "It.<|im_end|>"}


@pytest.mark.parametrize("example", [chat(), SHAREGPT, PAIR, {"text": "It.<|endoftext|>"}])
def test_example_that_teaches_its_end(check, example):
    figures = check(example)
    assert (figures.share, figures.verdict.outcome) == (1.0, Outcome.HELD)


@pytest.mark.parametrize(
    ("example", "arguments", "fault"),
    [
        ({"text": "It is red."}, {}, Fault.NO_EOS),
        (chat(), {"labels": "words"}, Fault.MASKED),
        ({"text": "It.<|endoftext|>"}, {"labels": "collator"}, Fault.PADDING),
        (chat(), {"max_length": 5}, Fault.TRUNCATED),
        ({"messages": chat()["messages"][:1]}, {}, Fault.NO_ANSWER),
        ({"input_ids": [1, 2, 639], "labels": [-100, 2, -100]}, {}, Fault.MASKED),
    ],
)
def test_example_that_teaches_no_end_is_named(check, example, arguments, fault):
    figures = check(chat() if arguments.get("labels") is None else example, example, **arguments)
    assert figures.offenders[-1].fault is fault
    assert figures.offenders[-1].line == 2
    assert figures.verdict.outcome is Outcome.FAILED
    assert figures.cause is not None


def test_padding_that_is_eos_masks_every_label(check, tokenizer):
    tokenizer.pad_token = "<|im_end|>"
    figures = check(*[chat()] * 9, labels="collator")
    assert (figures.taught, figures.faults) == (0, {Fault.PADDING.value: 9})
    assert len(figures.offenders) == 5
    assert "padding token that is no EOS" in figures.verdict.remedy


def test_given_labels_and_appended_eos_count(check):
    assert check({"input_ids": [1, 639], "labels": [1, 639]}).share == 1.0
    assert check({"text": "It is red."}, append_eos=True).share == 1.0


@pytest.mark.parametrize(
    ("example", "fault"),
    [
        # Padding is <|endoftext|> (637), at which generation stops, too.
        ({"input_ids": [1, 639, 637, 637], "labels": [1, 639, -100, -100]}, None),
        ({"input_ids": [1, 639, 637, 637], "labels": [1, -100, -100, -100]}, Fault.MASKED),
        ({"input_ids": [1, 637, 637, 637], "labels": [1, -100, -100, -100]}, Fault.MASKED),
        ({"input_ids": [1, 2, 637, 637], "labels": [1, 2, 637, -100],
          "attention_mask": [1, 1, 1, 0]}, None),
        ({"input_ids": [1, 2, 637, 637], "labels": [1, 2, 637, 637],
          "attention_mask": [1, 1, 0, 0]}, Fault.NO_EOS),
    ],
)  # fmt: skip
def test_padding_behind_an_encoded_example_is_not_its_end(check, example, fault):
    found = [offender.fault for offender in check(example).offenders]
    assert found == ([] if fault is None else [fault])


def test_embedded_stages_were_taught_to_end(check):
    import sys

    sys.path.insert(0, str(embedded_folder() / "stages"))
    try:
        import corpus
    finally:
        sys.path.pop(0)
    examples = [{"messages": m} for m in corpus.conversations(count=40, seed=3)]
    assert check(*examples).share == 1.0


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "holds no example"),
        ('{"text": "a"}\n{', "line 2: is not JSON"),
        ('{"text": "\xe9"}', "line 1: is not JSON: not UTF-8"),
        ("[" * 100_000, "line 1: is not JSON: nested too deeply"),
        ("[1]", "line 1: is not an object"),
        ('{"nothing": 1}', "line 1: is no example"),
        ('{"messages": [{"role": "user"}]}', "line 1: is no example"),
        ('{"input_ids": [1, 2], "labels": [1]}', "2 input_ids and 1 labels"),
    ],
)
def test_faulty_file_is_refused_with_the_line(tokenizer, tmp_path, lines, complaint):
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines.encode("latin-1"))
    with pytest.raises(InputError, match=complaint):
        check_training_data(file, tokenizer, stops=STOPS)


def test_unknown_labels_and_unmarked_templates_are_refused(check):
    with pytest.raises(InputError, match="unknown labels"):
        check(chat(), labels="some")
    with pytest.raises(InputError, match="marks no generation"):
        check(chat(), labels="template")
