"""Prompt files of every form, and every fault they can have."""

import pytest

from harness.errors import InputError
from harness.preset import load_preset, load_prompts, preset_names

GOOD = """
description = "d"
[generation]
max_new_tokens = 7
stop_strings = ["END"]
[[prompts]]
id = "one"
text = "Hello"
system = "Be brief."
[[prompts]]
id = "two"
messages = [{role = "user", content = "Hi"}, {role = "assistant", content = "Well"}]
"""


def test_toml_preset_holds_prompts_and_settings(tmp_path):
    (tmp_path / "mine.toml").write_text(GOOD)
    preset = load_prompts(tmp_path / "mine.toml")
    assert preset.name == "mine"
    assert (preset.settings.max_new_tokens, preset.settings.stop_strings) == (7, ("END",))
    assert [m.role for m in preset.prompts[0].messages] == ["system", "user"]
    assert preset.with_settings(max_new_tokens=None) is preset
    assert preset.with_settings(max_new_tokens=3).settings.max_new_tokens == 3


def test_text_and_json_lines_are_read(tmp_path):
    (tmp_path / "p.txt").write_text("First\n\n 第二 \n")
    prompts = load_prompts(tmp_path / "p.txt").prompts
    assert [(p.id, p.shown) for p in prompts] == [("prompt-1", "First"), ("prompt-3", "第二")]
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "as is"}\n{"id": "b", "messages": [{"role": "user", "content": "hi"}]}\n'
    )
    first, second = load_prompts(tmp_path / "p.jsonl").prompts
    assert (first.text, second.id, second.messages[0].content) == ("as is", "b", "hi")


def test_embedded_presets_are_found_and_own_ones_win(tmp_path, monkeypatch):
    assert {"elegant_style", "held_out"} <= set(preset_names())
    assert any(
        "\u4e00" <= c <= "\u9fff" for p in load_preset("elegant_style").prompts for c in p.shown
    )
    (tmp_path / "fixtures" / "presets").mkdir(parents=True)
    (tmp_path / "fixtures" / "presets" / "elegant_style.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_preset("elegant_style").description == "d"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GOOD.replace("one", "One"), "no slug"),
        (GOOD.replace('"two"', '"one"'), "two prompts have the id 'one'"),
        (GOOD.replace("text =", "txt ="), "did you mean text"),
        (GOOD.replace("max_new_tokens", "max_tokens"), "did you mean max_new_tokens"),
        (GOOD.replace("= 7", "= 0"), "max_new_tokens = 0"),
        (GOOD.replace("= 7", "= true"), "max_new_tokens = True"),
        (GOOD.replace("max_new_tokens = 7", "do_sample = true"), "needs a seed"),
        (GOOD.replace('"Hello"', '" "'), "is empty"),
        (GOOD.replace('"user"', '"usr"'), "role 'usr'"),
        ("description = 'x'", "holds no prompt"),
        ("format = 'html'", "neither"),
        ("prompts = 3", "not a list of tables"),
        ("[[prompts]]\nid = 'a'", "needs text or messages"),
        ("generation = 3\n[[prompts]]\nid='a'\ntext='b'", "is not a table"),
    ],
)
def test_faulty_preset_is_named(tmp_path, text, complaint):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        load_prompts(tmp_path / "p.toml")
    assert "p.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.jsonl", "{", "line 1"),
        ("p.jsonl", "[1]", "entry 1: holds a list, not an object"),
        ("p.txt", "\xff".encode("latin-1").decode("latin-1"), None),
        ("p.csv", "a", "no form of a prompt file"),
        ("p.txt", "\n", "holds no prompt"),
    ],
)
def test_faulty_lines_are_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    if complaint is None:
        assert load_prompts(tmp_path / name).prompts
        return
    with pytest.raises(InputError, match=complaint):
        load_prompts(tmp_path / name)


def test_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_prompts(tmp_path / "p.txt")


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(InputError, match="did you mean elegant_style"):
        load_preset("elegant_stile")
    with pytest.raises(InputError, match="unknown preset"):
        load_preset("../presets/elegant_style")
