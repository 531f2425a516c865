"""Faults planted in the trained stack: each is named by its cause, and the sound stack has none."""

import sys

import pytest

from harness.embedded import embedded_folder
from harness.stopping.causes import CauseKind
from harness.verdict import Outcome

GENERATION = "base/generation_config.json"


def kinds(report):
    return [cause.kind for cause in report.causes]


def test_sound_stack_has_no_cause(stack_copy, examine):
    report = examine(stack_copy, prompts=74)
    assert report.verdict is Outcome.HELD
    assert report.causes == ()
    blame = report.blame["stacked"]
    assert [effect.adapter for effect in blame.adapters] == ["style", "instruct"]
    assert blame.adapters[1].effect > 10
    assert "instruct raises EOS" in blame.sentence


def test_eos_id_off_by_one(stack_copy, examine):
    stack_copy.change(GENERATION, eos_token_id=[638])
    stack_copy.change("base/config.json", eos_token_id=638)
    report = examine(stack_copy)
    assert kinds(report)[0] is CauseKind.EOS_ID
    assert "off by one from '<|im_end|>' (639)" in report.causes[0].text
    assert report.causes[0].remedy.startswith("set eos_token_id to [639]")
    assert report.verdicts[0].outcome is Outcome.FAILED


def test_eos_id_off_by_one_beyond_the_vocabulary(stack_copy):
    from harness.ending import read_ending
    from harness.stopping.diagnosis import static_causes
    from harness.stopping.static import ending_findings

    stack_copy.change(GENERATION, eos_token_id=[640])
    stack_copy.change("base/config.json", eos_token_id=640)
    (cause,) = static_causes(ending_findings(read_ending(stack_copy.base), None))
    assert cause.kind is CauseKind.EOS_ID
    assert "outside the vocabulary of 640: off by one from '<|im_end|>' (639)" in cause.text


@pytest.mark.slow
def test_eos_list_without_the_end_of_turn(stack_copy, examine):
    stack_copy.change(GENERATION, eos_token_id=[637])
    report = examine(stack_copy)
    assert kinds(report) == [CauseKind.EOS_LIST]
    assert "'<|im_end|>' (639)" in report.causes[0].text
    # What was generated shows it too: the turn ends, and goes on.
    figures = report.modes["stacked"]
    assert figures.signs["end token"] == figures.total
    assert figures.longest_overrun > 20


@pytest.mark.slow
def test_tokenizer_whose_eos_is_another(stack_copy, examine):
    stack_copy.change("base/tokenizer_config.json", eos_token="<|im_start|>")
    report = examine(stack_copy)
    assert kinds(report) == [CauseKind.TOKENIZER_EOS]
    assert "the tokenizer's EOS is '<|im_start|>' (638)" in report.causes[0].text


@pytest.mark.slow
def test_style_weight_three_times(stack_copy, examine):
    stack_copy.change("style/adapter_config.json", lora_alpha=48)
    report = examine(stack_copy, prompts=40)
    assert [(c.kind, c.adapter) for c in report.causes] == [(CauseKind.SUPPRESSED, "style")]
    assert report.verdicts[0].outcome is Outcome.FAILED
    assert report.blame["stacked"].adapters[0].effect < 0


@pytest.mark.slow
def test_inactive_instruct(stack_copy, examine):
    from safetensors.torch import load_file, save_file

    file = stack_copy.root / "instruct" / "adapter_model.safetensors"
    tensors = {k: v * 0 if "lora_B" in k else v for k, v in load_file(file).items()}
    # All zeros are refused before anything is loaded; one number that rounds away is not.
    next(v for k, v in tensors.items() if "lora_B" in k)[0, 0] = 1e-30
    save_file(tensors, file)
    report = examine(stack_copy)
    assert [(c.kind, c.adapter) for c in report.causes] == [(CauseKind.INACTIVE, "instruct")]


@pytest.mark.slow
def test_too_few_new_tokens_decide_nothing(stack_copy, examine):
    report = examine(stack_copy, max_new_tokens=4)
    assert kinds(report) == [CauseKind.MAX_NEW_TOKENS]
    assert report.verdicts[0].outcome is Outcome.UNDECIDED
    # Half of the answers have a sentence's end within 12, and none is said to run on.
    report = examine(stack_copy, max_new_tokens=12)
    assert kinds(report) == [CauseKind.MAX_NEW_TOKENS]
    assert report.verdicts[0].outcome is Outcome.UNDECIDED


@pytest.mark.slow
def test_looping_adapter(stack_copy, examine):
    stack_copy.change("style/adapter_config.json", lora_alpha=96)
    report = examine(stack_copy)
    loop = report.causes[0]
    assert (loop.kind, loop.adapter) == (CauseKind.LOOPS, "style")
    assert "of period 1 tokens" in loop.text
    assert "without style 0 of" in loop.text


@pytest.fixture
def merged(stack_copy):
    from harness.merge import merge_lora_adapters

    folder = stack_copy.root / "merged"
    adapters = {name: stack_copy.root / name for name in ("style", "instruct")}
    merge_lora_adapters(stack_copy.base, adapters, folder)
    return folder


def static_kinds(stack_copy, folder):
    from harness.stopping.diagnosis import static_causes
    from harness.stopping.static import examine_files

    return static_causes(examine_files(stack_copy.stack(), merged=folder))


def test_merged_copy_with_a_changed_eos(stack_copy, merged):
    assert static_kinds(stack_copy, merged) == []
    stack_copy.change("merged/generation_config.json", eos_token_id=637)
    (cause,) = static_kinds(stack_copy, merged)
    assert cause.kind is CauseKind.MERGED
    assert "[637] in the merged copy, [637, 639] in the base" in cause.text


def test_merged_copy_whose_template_or_settings_changed(stack_copy, merged):
    template = merged / "chat_template.jinja"
    sound = template.read_text()
    template.write_text(sound.replace("assistant\\n", "assistant:\\n"))
    (cause,) = static_kinds(stack_copy, merged)
    assert (cause.kind, cause.text) == (
        CauseKind.MERGED, "the chat template is another than the base's"
    )  # fmt: skip
    template.write_text(sound.replace("add_generation_prompt", "false"))
    assert [c.kind for c in static_kinds(stack_copy, merged)] == [
        CauseKind.MERGED, CauseKind.OPENING
    ]  # fmt: skip
    template.write_text(sound)
    stack_copy.change("merged/generation_config.json", suppress_tokens=[639])
    assert [c.kind for c in static_kinds(stack_copy, merged)] == [CauseKind.SETTINGS]


def test_tied_head_that_reloading_overwrites(stack_copy, merged):
    from safetensors.torch import load_file, save_file

    file = merged / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    head[639] *= 3  # EOS made likelier in a head of its own
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    causes = static_kinds(stack_copy, merged)
    assert [cause.kind for cause in causes] == [CauseKind.HEAD]
    assert "the EOS row 639 moves by 66.7%" in causes[0].text


def test_untied_head_that_a_merged_copy_ties(tmp_path):
    from transformers import AutoModelForCausalLM

    from harness.merge import merge_lora_adapters
    from harness.resolve import resolve_stack
    from harness.stopping.static import examine_files
    from harness.testing.tiny import tiny_stack

    tiny = tiny_stack(tmp_path, tied=False)
    merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "merged")
    stack = resolve_stack(adapters=tiny.adapters)
    sound = examine_files(stack, merged=tmp_path / "merged")
    assert all(finding.verdict.passed for finding in sound)
    # What saving a model whose config was set to tied does: the head is gone.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    for file in (tmp_path / "merged").glob("*token*"):
        (tmp_path / "tied" / file.name).write_bytes(file.read_bytes())
    failing = {f.kind: f.verdict for f in examine_files(stack, merged=tmp_path / "tied")
               if not f.verdict.passed}  # fmt: skip
    assert "the EOS row" in failing[CauseKind.HEAD].evidence[1]


@pytest.mark.slow
def test_instruct_trained_with_masked_eos(stack_copy, examine):
    """Trained as fixtures/stages/train.py does it, but for the label of the end of turn."""
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.testing.training import (
        encode_conversation,
        masked_batch,
        prepare_stage_two,
        save_adapter,
        train_steps,
    )

    sys.path.insert(0, str(embedded_folder() / "stages"))
    try:
        import corpus
    finally:
        sys.path.pop(0)
    tokenizer = AutoTokenizer.from_pretrained(stack_copy.base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stack_copy.base, dtype=torch.float32),
        stack_copy.root / "style",
        adapter_name="style",
    )
    torch.manual_seed(0)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.add_adapter(
        "instruct",
        LoraConfig(r=12, lora_alpha=12, target_modules=modules, task_type="CAUSAL_LM"),
    )
    prepare_stage_two(model, frozen=["style"], trainable="instruct")
    rows = [
        encode_conversation(tokenizer, messages, end_of_turn="<|im_end|>")
        for messages in corpus.conversations(count=70 * 16, seed=3)
    ]
    masked = [(ids, [-100 if n == 639 else n for n in labels]) for ids, labels in rows]
    batches = (masked_batch(masked[n : n + 16], pad_token_id=637) for n in range(0, 70 * 16, 16))
    train_steps(model, batches, learning_rate=2e-3)
    base = {"base_model_name_or_path": "../base"}
    save_adapter(model, "instruct", stack_copy.root / "instruct")
    stack_copy.change("instruct/adapter_config.json", **base)
    report = examine(stack_copy)
    assert [(c.kind, c.adapter) for c in report.causes] == [(CauseKind.NOT_LEARNED, "instruct")]
    assert "--dataset" in report.causes[0].remedy
