"""The pull request's comment: inert whatever a model says, and never too long."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from harness.cli import main
from harness.pending import read_records
from harness.report.review_markdown import LIMIT, MARKER, annotation_lines, as_markdown, length
from harness.tests.review.factory import HOSTILE, a_grid, case, recorded
from harness.verdict import Outcome

#: Put into every foreign text: where it is seen outside code, that text is alive.
SIGN = "ZQX"
foreign = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=12),
              st.sampled_from(["`", "```", "````\n", "\n\n", "|", "</code>", "\n</details>\n\n"])),
    min_size=1, max_size=4,
).map(SIGN.join).map(lambda text: SIGN + text + SIGN)  # fmt: skip

_TAGS = re.compile(r"</?(?:details|summary|code)>|<!-- lora-stack review -->")


def tokens(text: str) -> list[Token]:
    """The tokens of a real Markdown parser, tables and HTML allowed as on GitHub."""
    found: list[Token] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        found.append(token)
        found += token.children or []
    return found


def assert_inert(text: str) -> None:
    for token in tokens(text):
        assert token.type not in ("link_open", "image", "html_inline"), token
        if token.type == "html_block":
            # What is ours, and escaped text inside <code>, which GitHub leaves alone.
            left = re.sub(r"<code>[^<>]*</code>", "", token.content)
            assert not re.search("[<>]", _TAGS.sub("", left)), token.content
            assert SIGN not in left
        elif token.type == "text":
            assert SIGN not in token.content, token.content
        elif token.type in ("fence", "code_inline"):
            assert not re.search(
                "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", token.content
            )
            assert not re.search(r"^\s*(::|##\[)", token.content, re.M)
    opened = sum(t.content.count("<details>") for t in tokens(text) if t.type == "html_block")
    closed = sum(t.content.count("</details>") for t in tokens(text) if t.type == "html_block")
    assert opened == closed
    text.encode()  # no lone surrogate


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(then=st.none() | foreign, now=foreign, other=foreign, line=foreign)
def test_nothing_that_a_model_says_comes_alive(
    tmp_path: Path, then: str | None, now: str, other: str, line: str
):
    outcome = Outcome.MISSING if then is None else Outcome.CHANGED
    recorded(
        tmp_path,
        case(outcome=outcome, then=then, now=now, prompt_text=other, evidence=(line, other)),
        case(mode="style", outcome=Outcome.DRIFT, then=other, prompt_text=now, evidence=(line,)),
    )
    assert_inert(as_markdown(read_records(tmp_path)))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=foreign, fault=foreign)
def test_names_of_prompts_modes_and_files_do_not_come_alive(tmp_path: Path, name: str, fault: str):
    item = dataclasses.replace(
        case(stop_reason=name), prompt=name, mode=fault, preset=name, snapshot=Path(SIGN + "a`b<i>")
    )
    recorded(tmp_path, item, dataclasses.replace(item, name="another", mode=name))
    (tmp_path / ".pending" / f"<b>{SIGN}`|.json").write_text(
        fault.encode("utf-8", "replace").decode()
    )
    assert_inert(as_markdown(read_records(tmp_path)))


def test_the_property_would_see_what_comes_alive():
    for alive in (f"[{SIGN}](https://x)", f"![x](https://{SIGN})", "<b>x</b>", f"@{SIGN}", "<u>\n"):
        with pytest.raises(AssertionError):
            assert_inert(alive)


def test_the_comment_shows_grid_changes_and_how_to_accept(tmp_path: Path):
    text = as_markdown(read_records(a_grid(tmp_path)))
    assert text.startswith(f"{MARKER}\n### LoRA stack review: 4 of 12 cases are pending")
    assert "| `black-tea-taste` | ✓ held | ✗ changed | ✓ held | ✗ changed |" in text
    assert text.count("<details>") == 3  # the group of two is one
    assert "[-unfolds-]{+offers+}" in text
    assert "58.9 %    21.7 %  ' unfolds'" in text
    assert "lora-stack review --accept" in text


@pytest.mark.parametrize(("cases", "size"), [(120, 400), (40, 3_000), (2, 70_000)])
def test_it_stays_under_the_limit_by_leaving_out_whole_cases(tmp_path: Path, cases: int, size: int):
    words = [f"w{n} 😀" for n in range(size // 6)]
    for number in range(cases):
        then, now = " ".join([str(number), *words]), " ".join([*words, "now", str(number)])
        item = case(prompt=f"p{number}")
        sides = {
            "then": dataclasses.replace(item.now, text=then[:size], positions=()),
            "now": dataclasses.replace(item.now, text=now[-size:], positions=()),
        }
        recorded(tmp_path, dataclasses.replace(item, **sides))
    text = as_markdown(read_records(tmp_path))
    assert length(text) <= LIMIT < 60_000
    assert_inert(text)
    shown = text.count("<details>")
    assert shown < cases
    left = re.search(r"^(\d+) more changes are left out here", text, re.M)
    assert left is not None
    assert int(left[1]) + shown == cases


def test_many_rows_are_counted_not_listed(tmp_path: Path):
    item = case(then=None, outcome=Outcome.MISSING)
    for number in range(250):
        name = f"prompt-{number:04}-{'long' * 15}"
        now = dataclasses.replace(item.now, text=f"Now {number}.", positions=())
        recorded(tmp_path, dataclasses.replace(item, name=name, prompt=name, now=now))
    text = as_markdown(read_records(tmp_path))
    assert length(text) <= LIMIT
    assert re.search(r"\d+ more prompts are left out of the table", text)


# ---- on GitHub Actions


def test_annotations_point_at_the_snapshots(tmp_path: Path):
    lines = annotation_lines(read_records(a_grid(tmp_path)))
    assert len(lines) == 4
    path = "snapshots/test_generation/elegant--black-tea-taste--instruct.toml"
    assert lines[0].startswith(
        f"::error file={path},title=changed%3A black-tea-taste × instruct::[-unfolds-]{{+offers+}}"
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=foreign)
def test_an_annotation_is_one_line_and_one_command(tmp_path: Path, text: str):
    item = case(now=text, evidence=(text,))
    recorded(
        tmp_path,
        dataclasses.replace(item, prompt=text, mode=text, snapshot=Path(f"a,b:c%{SIGN}")),
    )
    (line,) = annotation_lines(read_records(tmp_path))
    assert len(line.splitlines()) == 1
    properties, _, _ = line.removeprefix("::error ").partition("::")
    assert re.fullmatch(r"file=[^,:]*,title=[^,:]*", properties)
    assert "a%2Cb%3Ac%25" in properties


def test_more_annotations_than_github_shows_are_counted(tmp_path: Path):
    recorded(tmp_path, *(case(prompt=f"p{number}") for number in range(40)))
    lines = annotation_lines(read_records(tmp_path))
    assert len(lines) == 10
    assert lines[-1].endswith("::31 more pending")


def test_the_steps_summary_gets_the_comment_and_the_log_the_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    root = a_grid(tmp_path / "root")
    comment = tmp_path / "comment.md"
    assert main(["review", "--root", str(root), "--markdown", str(comment)]) == 1
    assert summary.read_text() == "before\n" + comment.read_text()
    captured = capsys.readouterr()
    assert captured.err.count("::error file=snapshots/") == 4
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert main(["review", "--root", str(root), "--markdown", str(comment)]) == 2
    assert f"error: {tmp_path}: cannot be written: Is a directory → " in capsys.readouterr().err
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert main(["review", "--root", str(root), "--markdown"]) == 1
    assert capsys.readouterr().out == comment.read_text()
