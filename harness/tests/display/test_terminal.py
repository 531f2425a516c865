"""Foreign text is shown, never obeyed."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from harness.display.terminal import shown


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    result = shown(text)
    assert not [c for c in result if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [c for c in result if c in "\u202e\u2066\u2069\u200f"]
    assert not any(line.lstrip().startswith("::") for line in result.split("\n"))


def test_ordinary_text_stays_as_it_is():
    text = "Grüße,\n\t你好 🙂 (a::b)"
    assert shown(text) == text


def test_escape_is_named():
    assert shown("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"


def test_a_command_is_none_wherever_a_line_is_broken():
    for command in ("::error file=a.py::x", "::group::x", "::stop-commands::x", "##[error]x",
                    "##vso[task.x]", "##teamcity[x]"):  # fmt: skip
        result = shown(f"word {command}")
        assert command[:4] not in result
        assert result.replace("\u200b", "") == f"word {command}"


def test_a_likely_secret_is_shown_by_its_beginning_only():
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"
    for secret in ("hf_" + "a1B2" * 9, "ghp_" + "x" * 36, "AKIA" + "A1" * 8, "sk-" + "q" * 40, key):
        result = shown(f"the key is {secret}, keep it")
        assert secret not in result
        assert result.startswith(f"the key is {secret[:7]}")
        assert f"[likely a secret: {len(secret)} characters], keep it" in result
