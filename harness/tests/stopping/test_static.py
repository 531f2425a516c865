"""The files alone: families by their tokens, vocabulary, padding, rows; no torch for the JSON."""

import json
import subprocess
import sys

import pytest

from harness.ending import read_ending
from harness.stopping.families import FAMILIES, family_of
from harness.stopping.static import ending_findings, examine_files
from harness.verdict import Outcome

TURNS = "{% for m in messages %}START{{ m['role'] }}\n{{ m['content'] }}TURN\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}STARTassistant\n{% endif %}"


@pytest.fixture
def folder_of(tmp_path):
    """A folder with the JSON files of a family, generation stopping at the given strings."""

    def build(family, stops, **tokenizer):
        specials = family.ids
        added = [{"id": n, "content": token, "special": True} for token, n in specials.items()]
        template = TEMPLATE.replace("START", family.turn_start).replace("TURN", family.turn_end)
        files = {
            "config.json": {
                "model_type": family.model_types[0], "vocab_size": 200_000,
                "eos_token_id": specials[stops[0]],
            },
            "generation_config.json": {"eos_token_id": [specials[token] for token in stops]},
            "tokenizer.json": {"model": {"vocab": {"a": 50}}, "added_tokens": added},
            "tokenizer_config.json": {
                "eos_token": stops[0], "chat_template": template, **tokenizer,
            },
        }  # fmt: skip
        for name, values in files.items():
            (tmp_path / name).write_text(json.dumps(values))
        return tmp_path

    return build


def failing(folder):
    ending = read_ending(folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    found = ending_findings(ending, family_of(ending, model_type))
    return {f.verdict.name: f.verdict for f in found if not f.verdict.passed}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name.replace(" ", "-"))
def test_family_is_known_by_its_tokens_and_sound_with_its_turn_end(folder_of, family):
    both = list(dict.fromkeys([family.turn_end, family.text_end]))
    stops = [family.text_end] if family.name == "Qwen3 base" else both
    folder = folder_of(family, stops)
    ending = read_ending(folder)
    assert family_of(ending, family.model_types[0]) == family
    assert ending.turn_end == (family.turn_end, family.ids[family.turn_end])
    names = set(failing(folder))
    assert names == ({"end of turn"} if family.name == "Qwen3 base" else set())


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.turn_end != f.text_end], ids=lambda f: f.name
)
def test_chat_that_stops_at_the_end_of_texts_alone_is_found(folder_of, family):
    verdict = failing(folder_of(family, [family.text_end]))["end of turn"]
    assert repr(family.turn_end) in verdict.evidence[0]
    assert str(family.ids[family.turn_end]) in verdict.remedy


def test_padding_that_ends_a_turn_is_found(folder_of):
    family = FAMILIES[1]
    folder = folder_of(family, [family.turn_end], pad_token=family.turn_end)
    assert "mask the EOS label" in failing(folder)["padding"].evidence[0]


def test_ordinary_token_as_eos_is_found(folder_of):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [50, 151645]}')
    assert "'a' (50), which is an ordinary token" in failing(folder)["EOS ids"].evidence[0]


def test_no_eos_is_found(folder_of):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"])
    (folder / "generation_config.json").write_text("{}")
    assert "names no EOS id" in failing(folder)["EOS ids"].evidence[0]


def test_template_that_refuses_is_skipped_with_the_reason(folder_of):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"], chat_template="{{ raise_exception('no') }}")
    ending = read_ending(folder)
    assert "no" in ending.trouble
    assert not failing(folder)


def test_template_that_does_not_parse_is_found(folder_of):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"], chat_template="{{ messages")
    assert "does not parse" in failing(folder)["end of turn"].evidence[0]


def test_template_that_marks_what_is_learned_is_read(folder_of):
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{%- generation -%}"
        "{{ m['content'] }}<|endoftext|>{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = folder_of(FAMILIES[1], ["<|im_end|>"], chat_template=marked)
    assert read_ending(folder).trouble is None
    assert "'<|endoftext|>' (151643)" in failing(folder)["end of turn"].evidence[0]


def test_template_without_a_generation_prompt_is_found(folder_of):
    family = FAMILIES[1]
    turns = TURNS.replace("START", family.turn_start).replace("TURN", family.turn_end)
    folder = folder_of(family, ["<|im_end|>"], chat_template=turns)
    assert (
        "'<|im_start|>assistant\\n' stands before an answer"
        in (failing(folder)["beginning of an answer"].evidence[0])
    )


@pytest.mark.parametrize(
    "template",
    [
        # Mistral's: the question's own end opens the answer.
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}",
        # The first of Llama 3: the answer is opened whether asked for or not.
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if messages[-1]['role'] == 'user' %}<|im_start|>assistant\n{% endif %}",
        # Qwen3's: an answer begins with empty thoughts, the prompt does not.
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
    ids=["mistral", "llama3", "qwen3"],
)
def test_template_that_opens_an_answer_in_its_own_way_is_sound(folder_of, template):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"], chat_template=template)
    assert not failing(folder)


BENDING = {
    "suppress_tokens": [151645],
    "bad_words_ids": [[7], [151645]],
    "sequence_bias": [[[151645], -10.0]],
    "min_new_tokens": 40,
    "min_length": 60,
    "forced_eos_token_id": 151645,
    "exponential_decay_length_penalty": [5, 1.5],
    "stop_strings": ["\n"],
}


@pytest.mark.parametrize("key", BENDING)
def test_checkpoint_whose_settings_bend_the_end_is_found(folder_of, key):
    folder = folder_of(FAMILIES[1], ["<|im_end|>"])
    file = folder / "generation_config.json"
    sound = json.loads(file.read_text()) | {"min_length": 0, "suppress_tokens": [7]}
    file.write_text(json.dumps(sound))
    assert not failing(folder)
    file.write_text(json.dumps(sound | {key: BENDING[key]}))
    assert key in failing(folder)["generation settings of the checkpoint"].evidence[0]


@pytest.mark.parametrize("value", ["151645", True, [[151645]], [151645.0], {"a": 1}])
def test_eos_that_is_no_id_is_bad_input(folder_of, value):
    from harness.errors import InputError

    folder = folder_of(FAMILIES[1], ["<|im_end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match="is no token id"):
        read_ending(folder)


def test_reading_what_ends_a_turn_imports_no_torch():
    code = (
        "import sys; from harness.ending import read_ending; "
        "from harness.embedded import embedded_folder; "
        "print(read_ending(embedded_folder() / 'stages' / 'base').turn_end); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "('<|im_end|>', 639)" in done.stdout


def findings(stack_copy):
    return {f.verdict.name: f.verdict for f in examine_files(stack_copy.stack())}


def test_vocabulary_that_is_too_small_for_the_tokenizer_is_found(stack_copy):
    whole = json.loads((stack_copy.base / "tokenizer.json").read_text())
    extra = whole["added_tokens"][-1] | {"id": 640, "content": "<|more|>"}
    stack_copy.change("base/tokenizer.json", added_tokens=[*whole["added_tokens"], extra])
    verdict = findings(stack_copy)["vocabulary and head"]
    assert (
        "the tokenizer has 641 tokens, model.embed_tokens.weight has 640 rows" in verdict.evidence
    )


def test_dead_eos_row_is_found(stack_copy):
    from safetensors.torch import load_file, save_file

    file = stack_copy.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][639] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert findings(stack_copy)["EOS rows of the head"].outcome is Outcome.FAILED


def test_adapter_of_the_head_is_mentioned(tmp_path):
    from harness.resolve import resolve_stack
    from harness.testing.tiny import AdapterSpec, tiny_stack

    specs = {"style": AdapterSpec(targets=("q_proj", "lm_head"))}
    tiny = tiny_stack(tmp_path, adapters=specs, tied=False)
    found = {
        f.verdict.name: f.verdict for f in examine_files(resolve_stack(adapters=tiny.adapters))
    }
    assert "style adapts lm_head" in found["adapters and the EOS rows"].evidence[0]
    assert found["head at reload"].evidence == ("the head has weights of its own",)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_head_that_is_tied_unsaid_is_the_embedding(tmp_path, kind):
    """The hub's Gemma and GPT-2 have neither a head nor `tie_word_embeddings`."""
    from harness.tests.certificate.test_families import live_stack

    _, stack = live_stack(tmp_path, {"gemma3_text": "gemma3"}.get(kind, kind), tie_said=False)
    found = {f.verdict.name: f.verdict for f in examine_files(stack)}
    assert found["head at reload"].evidence == ("the head is the embedding, as tied",)
    assert "tied to the embedding" in found["EOS rows of the head"].evidence[0]
