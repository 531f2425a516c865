"""The mechanics of stage 2."""

import pytest


@pytest.fixture
def wrapped(tiny):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with load_engine(resolve_stack(adapters=tiny.adapters), device="cpu") as engine:
        yield engine.model


def test_only_the_trainable_adapter_gets_gradients(wrapped):
    from harness.testing.training import prepare_stage_two

    prepare_stage_two(wrapped, frozen=["style"], trainable="instruct")
    assert wrapped.active_adapters == ["style", "instruct"]
    moving = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    assert moving
    assert all(".instruct." in name for name in moving)
    assert wrapped.training


@pytest.mark.parametrize(
    ("frozen", "trainable", "complaint"),
    [
        (["style"], "style", "named twice"),
        (["stile"], "instruct", "not loaded"),
        (["style"], "instrukt", "not loaded"),
    ],
)
def test_wrong_names_are_refused(wrapped, frozen, trainable, complaint):
    from harness.testing.training import prepare_stage_two

    with pytest.raises(ValueError, match=complaint):
        prepare_stage_two(wrapped, frozen=frozen, trainable=trainable)


def test_loss_is_on_the_answer_and_its_end_of_turn_alone(tiny_engine):
    from harness.testing.training import IGNORED_LABEL, encode_conversation

    tokenizer = tiny_engine.tokenizer
    ids, labels = encode_conversation(
        tokenizer,
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|> yes"}],
    )
    kept = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL]
    assert tokenizer.decode(kept) == "<|im_end|> yes<|im_end|>"


def test_padding_has_no_label_even_where_it_is_the_eos():
    from harness.testing.training import IGNORED_LABEL, masked_batch

    batch = masked_batch([([1, 9], [1, 9]), ([9], [9])], pad_token_id=9)
    assert batch["labels"].tolist() == [[1, 9], [9, IGNORED_LABEL]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_adapter_is_saved_into_the_folder_itself(wrapped, tmp_path):
    from harness.adapter_files import read_adapter
    from harness.testing.training import save_adapter

    folder = save_adapter(wrapped, "instruct", tmp_path / "out")
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert read_adapter(folder).pairs
    with pytest.raises(ValueError, match="no adapter 'x'"):
        save_adapter(wrapped, "x", tmp_path / "out")


def test_nothing_to_train_and_a_loss_that_is_not_finite_are_refused(wrapped):
    import torch

    from harness.testing.training import masked_batch, prepare_stage_two, train_steps

    batch = masked_batch([([1, 2, 3], [1, 2, 3])], pad_token_id=0)
    wrapped.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        train_steps(wrapped, [batch], learning_rate=1e-3)
    prepare_stage_two(wrapped, frozen=["style"], trainable="instruct")
    with torch.no_grad():
        # Not in q or k: attention on a CPU turns a NaN there into finite, wrong logits.
        values = dict(wrapped.named_parameters()).items()
        next(v for n, v in values if v.requires_grad and "v_proj" in n).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train_steps(wrapped, [batch], learning_rate=1e-3)
