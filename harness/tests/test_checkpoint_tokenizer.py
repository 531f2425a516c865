"""A base's tokenizer files agree, or the folder is refused: moved ids are the quietest fault."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.checkpoint_files import read_checkpoint
from harness.checkpoint_tokenizer import check_tokenizer, embedding_rows

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<new>", "<newer>", "a"]
NUMBERS = st.sampled_from([0, 5, 256, 257, 258, 259, 260, 300])
ENTRIES = st.dictionaries(st.sampled_from(WORDS), NUMBERS, max_size=4)


def faults_of(folder, rows=300):
    found = []
    check_tokenizer(folder, rows, found, trust_remote_code=False)
    return [str(fault) for fault in found]


def changed(folder, name, **values):
    path = folder / name
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | values))


@pytest.fixture
def base(tiny, tmp_path):
    return shutil.copytree(tiny.base, tmp_path / "base")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["Qwen2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"]),
    decoder=st.none() | ENTRIES,
    added=st.none() | ENTRIES,
    padding=st.sampled_from([None, "<|endoftext|>", "<pad>"]),
    extra=st.sampled_from([[], ["<extra>"], ["<|im_end|>", "<extra>", "<more>"]]),
)
def test_what_is_let_through_keeps_every_id(tiny, kind, decoder, added, padding, extra):
    """The oracle is transformers: the tokenizer that it builds has tokenizer.json's ids."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(tiny.base, Path(scratch) / "base")
        stored = json.loads((folder / "tokenizer.json").read_text())
        ids = stored["model"]["vocab"] | {t["content"]: t["id"] for t in stored["added_tokens"]}
        values = {"tokenizer_class": kind, "extra_special_tokens": extra}
        if padding is not None:
            values["pad_token"] = padding
        if decoder is not None:
            values["added_tokens_decoder"] = {str(n): {"content": t} for t, n in decoder.items()}
        changed(folder, "tokenizer_config.json", **values)
        if added is not None:
            changed(folder, "added_tokens.json", **added)
        if faults_of(folder, rows=261):
            return
        held = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
        assert {token: held.get(token) for token in ids} == ids
        assert max(held.values()) < 261, "every id has a row"


def test_tokens_that_follow_on_are_sound_where_there_are_rows(base):
    assert faults_of(base, 259) == []
    changed(base, "added_tokens.json", **{"<new>": 259, "<newer>": 260, "<|im_end|>": 258})
    assert faults_of(base, 261) == []
    assert faults_of(base, None) == [], "an embedding of an unknown name has no rows to count"
    (fault,) = faults_of(base, 260)
    assert "added_tokens.json: '<newer>' would get the id 260, the embedding has 260 rows" in fault


def test_the_same_tokens_said_twice_are_sound(base):
    added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(t["id"]): {"content": t["content"]} for t in added}
    changed(
        base, "tokenizer_config.json", added_tokens_decoder=decoder,
        tokenizer_class="Qwen2Tokenizer", extra_special_tokens={"end": "<|im_end|>"},
    )  # fmt: skip
    changed(base, "special_tokens_map.json", unknown="<never read beside a decoder>")
    assert faults_of(base, 259) == []


def test_a_vocabulary_of_scores_is_counted(base):
    stored = json.loads((base / "tokenizer.json").read_text())
    stored["model"] = {"vocab": [["<unk>", 0.0], ["a", -1.0], []]}
    stored["added_tokens"] = None
    (base / "tokenizer.json").write_text(json.dumps(stored))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (base / name).write_text("{}")
    assert faults_of(base, 3) == faults_of(base, 300) == []
    (fault,) = faults_of(base, 2)
    assert "tokenizer.json: model: gives the id 2, the embedding has 2 rows" in fault


def test_a_base_without_a_usual_embedding_has_no_rows_to_count(base):
    class Bare:
        places = ()

    assert embedding_rows(read_checkpoint(base)) == 259
    assert embedding_rows(Bare()) is None


def test_an_engine_refuses_a_tokenizer_whose_ids_moved(base, monkeypatch):
    """What the preflight cannot know of, the comparison after loading finds."""
    from harness import InputError, load_engine, resolve_stack

    changed(base, "added_tokens.json", **{"<new>": 3})
    changed(base, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    monkeypatch.setattr("harness.preflight.check_tokenizer", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"tokenizer\.json: '.*' has the id 2\d\d, in memory"):
        load_engine(resolve_stack(base_model=base), device="cpu")
