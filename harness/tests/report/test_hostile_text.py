"""Foreign text in prompts and outputs: stored faithfully, shown inert, by every renderer."""

import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SECRET = "hf_" + "aB3" * 12
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07 \x00\x08\x9b31m", "\u202ereversed\u2066x\u2069 \u200f",
    "\ud800 half \udfff", "::error file=a.py,line=1::boo", "x\n::stop-commands::x\r::group::",
    "##[error]boo", "a ##vso[task.complete]", "```\n# out of the fence\n```", "````~~~~",
    "<script>alert(1)</script><img src=x onerror=alert(1)>", "</details></td><!--", "&lt;b&gt;",
    "| a | b |\n|---|---|", "[x](javascript:alert(1)) ![y](http://x.invalid/z.png)",
    "@everyone @octo-cat #12", "]]> <![CDATA[ x", "\u2028::error::a\u2029", "\r\n\t\x0b\x0c\x85",
    f"token {SECRET}", "你好 🙂 नमस्ते שלום مرحبا \u0300\u0301 🏳️‍🌈", "{{ 7 * 7 }} {% raw %} ${x}",
    "[bold]rich[/bold] [link=http://x.invalid]y[/link]", "a" * 300 + "::error::b", "",
)  # fmt: skip

texts = st.lists(
    st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=[]), max_size=12),
    min_size=1, max_size=4,
).map(" ".join)  # fmt: skip
quick = settings(max_examples=60, deadline=None)


def assert_inert(page):
    """What holds for text on a terminal, in a log and in a file."""
    left = {c for c in page if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n", "\t"}
    assert not left
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", page)
    assert SECRET not in page
    for line in page.split("\n"):
        # As GitHub's runner reads a line (github.com/actions/runner, ActionCommand.cs).
        assert not re.match(r"\s*::[\w-]+( .*)?::", line)
        assert "##[" not in line
        assert "##vso[" not in line
    page.encode("utf-8")


@pytest.fixture(scope="module")
def report(tiny):
    from harness.tests.values import run_report
    from harness.verdict import Outcome, Verdict

    def report(prompt, text):
        verdict = Verdict(name=text, outcome=Outcome.FAILED, evidence=(text, prompt), remedy=text)
        return run_report(tiny, prompt=prompt, text=text, verdicts=(verdict,), notes=(text,))

    return report


@quick
@given(prompt=texts, text=texts, width=st.integers(30, 120))
def test_on_a_terminal_of_any_width(report, prompt, text, width):
    from pathlib import Path

    from rich.console import Console

    from harness.report.terminal import print_report

    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    print_report(out, report(prompt, text), Path("runs/x"))
    assert_inert(out.file.getvalue())


@quick
@given(prompt=texts, text=texts)
def test_in_markdown_nothing_leaves_its_cell_or_fence(report, prompt, text):
    from harness.report.run import as_markdown

    page = as_markdown(report(prompt, text))
    assert_inert(page)
    outside, fence = [], None
    for line in page.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence is None and ticks and line.endswith("text"):
            fence = ticks[0]
        elif fence is not None and line.strip() == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    ours = {"</details>", "<details><summary>", "</summary>"}
    for line in outside:
        assert set(re.findall(r"</?(?:details|summary)>(?:<summary>)?", line)) <= ours
        assert not re.search(r"<(?!/?(?:details|summary)>)", line)
        assert not re.search(r"(?<!\\)(?:\[[^\]]*\]\(|`)", line)
        assert not re.search(r"@[\w-]", line)
    heads = [line for line in outside if line.startswith("#")]
    assert len(heads) == 4
    table = outside[outside.index("## Verdicts") + 2 :][:3]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [5, 5, 5]


@quick
@given(prompt=texts, text=texts)
def test_in_the_report_file_it_is_what_was_said(report, prompt, text, tmp_path_factory):
    from harness.report.run import write_run

    folder = tmp_path_factory.mktemp("run") / "out"
    write_run(report(prompt, text), folder)
    document = json.loads((folder / "report.json").read_bytes())
    assert [c["text"] for c in document["completions"]] == [text] * 4
    assert {c["prompt_text"] for c in document["completions"]} == {prompt}
    assert document["notes"] == [text]


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text.append(data)


@quick
@given(text=texts)
def test_in_a_page_it_is_text(text, tmp_path_factory):
    from harness.display.page import render

    folder = tmp_path_factory.mktemp("page")
    (folder / "cell.html.jinja").write_text(
        '<p title="{{ value | show }}">{{ value | show }}</p>', encoding="utf-8"
    )
    page = render(folder / "cell.html.jinja", value=text)
    assert_inert(page)
    tags = _Tags()
    tags.feed(page)
    tags.close()
    assert tags.found == [("p", ("title",))]


@quick
@given(text=texts)
def test_a_snapshot_gives_it_back(text):
    from harness.snapshot import read_snapshot, snapshot_of, write_form
    from harness.tests.values import completion

    said = completion(text=text)
    form = write_form(snapshot_of(said, {"dtype": "float32"}))
    form.encode("utf-8")
    assert read_snapshot(form, where="x").text == text


def test_under_pytest_in_the_log_and_in_junit(pytester):
    hostile = [text.encode("utf-8", "surrogatepass").hex() for text in HOSTILE]
    pytester.makepyfile(
        f"""
        import pytest
        from harness.verdict import Outcome, Verdict

        @pytest.mark.parametrize("number", range({len(hostile)}))
        def test_says(number, lora_judge):
            text = bytes.fromhex({hostile!r}[number]).decode("utf-8", "surrogatepass")
            lora_judge(Verdict(name=text, outcome=Outcome.FAILED, evidence=(text, text), remedy=text))
        """  # noqa: E501
    )
    result = pytester.runpytest_subprocess("--junitxml=out.xml", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=len(hostile))
    assert_inert(result.stdout.str())
    tree = ElementTree.parse(pytester.path / "out.xml")
    failures = tree.findall(".//failure")
    assert len(failures) == len(hostile)
    for failure in failures:
        assert_inert("".join(failure.itertext()))
        assert_inert(failure.get("message"))


def test_an_error_line_of_the_command_is_inert(capsys):
    from harness.cli import main

    for text in HOSTILE:
        name = text.replace("\0", "").replace("/", "_").encode("utf-8", "replace").decode()[:80]
        assert main(["run", f"--base-model=./{name}"]) == 2
        out, err = capsys.readouterr()
        assert_inert(out + err)
