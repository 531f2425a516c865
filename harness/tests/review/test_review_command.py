"""`lora-stack review`: what it shows, what its keys and patterns decide, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cli import main
from harness.pending import Alternative, Position, read_records
from harness.tests.review.factory import (
    CONDITIONS,
    HOSTILE,
    a_grid,
    case,
    form,
    recorded,
)
from harness.verdict import Outcome

TEA = "test_generation/elegant--black-tea-taste--stacked"


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve cases, four of them pending; the working directory is their root."""
    monkeypatch.chdir(a_grid(tmp_path))
    return tmp_path


def pending(root: Path) -> set[str]:
    return {record.name.split("--", 1)[1] for record in read_records(root).pending}


def snapshot(root: Path, mode: str = "stacked") -> bytes:
    return (root / f"snapshots/test_generation/elegant--black-tea-taste--{mode}.toml").read_bytes()


ALL = {
    "black-tea-taste--instruct", "black-tea-taste--stacked",
    "fox-home--style", "lotus-place-zh--instruct",
}  # fmt: skip


# ---- without a terminal


def test_it_shows_the_grid_and_every_change_and_says_what_to_run(grid: Path, capsys):
    assert main(["review"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"black-tea-taste +✓ held +✗ changed +✓ held +✗ changed", out)
    assert "[-unfolds-]{+offers+}" in out
    assert "58.9 %" in out
    assert "noise floor 2e-05" in out
    assert "4 of 12 cases are pending: 2 changed, 1 missing, 1 drift" in out
    assert "next: lora-stack review" in out
    assert pending(grid) == ALL


def test_the_same_change_is_shown_as_one_group(grid: Path, capsys):
    main(["review"])
    assert "2 cases, one change: [-unfolds-]{+offers+} … [-tongue-]{+palate+}" in (
        capsys.readouterr().out
    )


def test_differences_by_token_are_shown_on_request(grid: Path, capsys):
    main(["review"])
    assert "Δ nats" not in capsys.readouterr().out
    main(["review", "--tokens"])
    out = capsys.readouterr().out
    assert "Δ nats" in out
    assert re.search(r"3 +‘ unfolds’ +‘ offers’ +58\.9 % +58\.9 %", out)
    assert "-0.3" in out  # the drifting case


def test_a_stop_reason_that_changed_is_shown_then_and_now(tmp_path: Path, capsys):
    recorded(tmp_path, case(now="Black tea unfolds a sumptuous", stop_reason="length"))
    main(["review", "--root", str(tmp_path)])
    assert "eos → length" in capsys.readouterr().out


def test_check_lists_the_names_and_decides_nothing(grid: Path, capsys):
    assert main(["review", "--check"]) == 1
    out = capsys.readouterr().out
    assert TEA in out
    assert pending(grid) == ALL


def test_it_is_found_from_a_folder_below(grid: Path, monkeypatch: pytest.MonkeyPatch):
    (grid / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(grid / "a" / "b")
    assert main(["review", "--check"]) == 1


# ---- exit codes


def test_nothing_pending_is_0(tmp_path: Path):
    recorded(tmp_path, case(outcome=Outcome.HELD), case(mode="base", outcome=Outcome.TIE))
    assert main(["review", "--root", str(tmp_path)]) == 0
    assert main(["review", "--check", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize("options", [[], ["--json"], ["--check"], ["--accept", "*"]])
def test_no_record_at_all_is_5(tmp_path: Path, capsys, options: list[str]):
    assert main(["review", "--root", str(tmp_path), *options]) == 5
    assert "no run of the suites is recorded" in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--accept", "no-such-*"],
        ["--accept", "*", "--reject", "*tea*"],
        ["--check", "--accept", "*"],
        ["--json", "--markdown"],
        ["--root", "/no/such/folder"],
    ],
)
def test_bad_usage_is_2_and_decides_nothing(grid: Path, capsys, options: list[str]):
    assert main(["review", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert pending(grid) == ALL


def test_a_pending_file_that_cannot_be_read_is_named_and_is_1(tmp_path: Path, capsys):
    recorded(tmp_path, case(outcome=Outcome.HELD))
    (tmp_path / ".pending" / "torn.json").write_text('{"form": 1, "na')
    for options in ([], ["--check"], ["--json"]):
        assert main(["review", "--root", str(tmp_path), *options]) == 1
        out = capsys.readouterr().out
        assert ".pending/torn.json" in out
        assert "test_generation" in out or "held" in out or "nothing is pending" in out


# ---- by pattern


def test_accept_writes_what_the_pattern_matches_and_nothing_else(grid: Path, capsys):
    assert main(["review", "--accept", "*--black-tea-taste--*"]) == 1  # two are still pending
    assert pending(grid) == {"fox-home--style", "lotus-place-zh--instruct"}
    assert snapshot(grid) == form("Black tea offers a sumptuous savour upon the palate.")
    assert f"{TEA}: accepted" in capsys.readouterr().out


def test_accept_and_reject_together_leave_nothing_pending(grid: Path):
    before = snapshot(grid)
    options = ["--accept", "*fox*", "--accept", "*lotus*", "--reject", "test_generation/*tea*"]
    assert main(["review", *options]) == 0
    assert pending(grid) == set()
    assert snapshot(grid) == before


def test_a_refused_acceptance_says_why_and_is_1(tmp_path: Path, capsys):
    recorded(tmp_path, case(root=tmp_path, conditions={**CONDITIONS, "adapter_style": "other"}))
    assert main(["review", "--accept", "*", "--root", str(tmp_path)]) == 1
    assert "was made with adapter_style other, the newest run with 5555" in capsys.readouterr().out


def test_json_is_one_object_with_verdict_and_checks(grid: Path, capsys):
    assert main(["review", "--json", "--accept", TEA]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["verdict"] == "changed"
    assert len(report["checks"]) == len(report["cases"]) == 12
    assert set(report["checks"][0]) == {"name", "verdict", "evidence", "remedy"}
    assert [item["decision"] for item in report["decided"]] == ["accepted"]
    assert TEA not in report["pending"]
    assert len(report["pending"]) == 3
    assert f"{TEA}: accepted" in captured.err


# ---- by key, on a terminal


def converse(root: Path, keys: str, *, columns: int = 120) -> tuple[int, str]:
    """The exit code and the output of a review on a pseudo-terminal, given *keys* one by one."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40"}
        os.chdir(root)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        os.execv(sys.executable, [sys.executable, "-m", "harness.cli", "review"])
    shown = ""
    asked = 0
    waiting = iter(keys)
    try:
        for chunk in _reading(terminal):
            shown += chunk
            while shown.count("[q]uit and apply") > asked:
                asked += 1
                key = next(waiting, "")
                os.write(terminal, key.encode())
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown


def _reading(terminal: int) -> Iterator[str]:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the child has closed it
            return
        if not data:
            return
        yield data.decode("utf-8", "replace")
    raise TimeoutError("the review did not end")


def test_a_key_decides_at_once(grid: Path):
    # In order: the group of two (black tea), then lotus (missing), then fox (drift).
    code, shown = converse(grid, "arsa")
    assert code == 1
    assert pending(grid) == {"lotus-place-zh--instruct"}
    assert snapshot(grid, "instruct") == form(
        "Black tea offers a sumptuous savour upon the palate."
    )
    assert snapshot(grid) == form("Black tea unfolds a sumptuous savour upon the tongue.")
    assert "1 of 4" in shown
    assert "4 of 4" in shown


def test_a_group_is_accepted_by_one_key_and_quitting_applies(grid: Path):
    code, _ = converse(grid, "gq")
    assert code == 1
    assert pending(grid) == {"fox-home--style", "lotus-place-zh--instruct"}


def test_tokens_are_shown_on_request_and_other_keys_ask_again(grid: Path):
    _, shown = converse(grid, "txq")
    assert "Δ nats" in shown
    assert pending(grid) == ALL


def test_ctrl_c_leaves_all_as_it_was(grid: Path):
    before = snapshot(grid)
    code, _ = converse(grid, "ga\x03")
    assert code == 130
    assert pending(grid) == ALL
    assert snapshot(grid) == before


def test_everything_accepted_is_0(grid: Path):
    code, _ = converse(grid, "gaa")
    assert code == 0
    assert pending(grid) == set()


# ---- foreign text, and cost


#: Control characters, except line feed and tab, and what turns text around.
_OBEYED = {chr(c) for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"} | set(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def test_what_a_model_says_is_shown_never_obeyed(tmp_path: Path, capsys):
    for number, text in enumerate(HOSTILE):
        recorded(
            tmp_path,
            case(
                prompt=f"p{number}", then=text, now=text + "x", prompt_text=text, evidence=(text,)
            ),
            case(prompt=f"q{number}", mode="base", outcome=Outcome.MISSING, then=None, now=text),
        )
    for options in ([], ["--tokens"], ["--check"], ["--json"], ["--accept", "*p3--*"]):
        main(["review", "--root", str(tmp_path), *options])
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert "Cs" not in {unicodedata.category(character) for character in printed}
        assert not set(printed) & _OBEYED
        assert not re.search(r"^\s*(::|##\[)", printed, re.M)


def test_halves_of_a_character_are_bytes_by_name_on_every_face(tmp_path: Path, capsys):
    # Tea 茶 is E8 8C B6; E8 8C B7 is another character. 竹 (E7 AB B9) before it is whole.
    shared = ["<0xE7>", "<0xAB>", "<0xB9>", " <0xE8><0x8C>"]
    made = case(then="竹 茶", now="竹 茷", prompt="tea")

    def said(side, last: str, rival: str):
        pieces = (*shared, last)
        found = tuple(
            Position(
                token_id=int.from_bytes(piece.encode()[-3:], "big"), piece=piece, logprob=-0.7,
                alternatives=tuple(
                    Alternative(
                        token_id=int.from_bytes(each.encode()[-3:], "big"), piece=each,
                        logprob=-0.7 - place,
                    )
                    for place, each in enumerate((piece, rival))
                ),
            )
            for piece in pieces
        )  # fmt: skip
        return dataclasses.replace(side, positions=found)

    then, now = said(made.then, "<0xB6>", "<0xB7>"), said(made.now, "<0xB7>", "<0xB6>")
    recorded(tmp_path, dataclasses.replace(made, then=then, now=now, first=4))
    root = ["--root", str(tmp_path)]
    main(["review", *root, "--tokens"])
    terminal = capsys.readouterr().out
    assert "token 5: …竹 <0xE8><0x8C>[-<0xB6>-]{+<0xB7>+}" in terminal
    assert terminal.count("‘<0xB6>’") == 2  # as an alternative, and in the table of tokens
    main(["review", *root, "--markdown"])
    comment = capsys.readouterr().out
    assert "…竹 <0xE8><0x8C>[-<0xB6>-]{+<0xB7>+}…" in comment
    assert "'<0xB7>'" in comment
    main(["review", *root, "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "…竹 &lt;0xE8&gt;&lt;0x8C&gt;<del>&lt;0xB6&gt;</del><ins>&lt;0xB7&gt;</ins>…" in page
    assert r'"\u003c0xB7\u003e"' in page
    assert "\ufffd" not in terminal + comment + page


def test_opening_a_review_imports_no_torch_and_nothing_heavy(grid: Path):
    for options in ([], ["--check"], ["--json"], ["--markdown"], ["--html", "r.html"]):
        script = (
            "import sys\nfrom harness.cli import main\n"
            f"main(['review', *{options!r}])\n"
            "heavy = {'torch', 'transformers', 'peft', 'numpy', 'safetensors', 'scipy', 'syrupy', "
            "'huggingface_hub', 'matplotlib', 'pytest', 'tokenizers'}\n"
            "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
        )
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, (options, found.stderr)
