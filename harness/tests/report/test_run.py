"""The run's report: whole, and inert whatever the model said."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.display.markdown import code_block, inline, table
from harness.preset import Preset
from harness.report.run import RunReport, as_json, as_markdown, judge_run, write_run
from harness.resolve import resolve_stack

HOSTILE = "```\n<script>alert(1)</script> @everyone | a\x1b[31m\u202e\n::error::x\n| --- |"


@pytest.fixture
def report(tiny):
    stack = resolve_stack(adapters=tiny.adapters)
    prompts = (Prompt(id="one", text=HOSTILE), Prompt(id="two", text="b"))
    completions = {
        mode.name: tuple(
            Completion(
                prompt=prompt, mode=mode.name, application=Application.LIVE,
                prompt_token_ids=(1,), token_ids=(number, 2), text=f"{HOSTILE} {mode.name}",
                stop_reason=StopReason.EOS, settings=GenerationSettings(),
            )
            for prompt in prompts
        )
        for number, mode in enumerate(stack.modes)
    }  # fmt: skip
    return RunReport(
        stack=replace(stack, stops={"base": "always"}),
        preset=Preset(name="p", description="", prompts=prompts, settings=GenerationSettings()),
        device="cpu",
        dtype="float32",
        application="live",
        completions=completions,
        verdicts=judge_run(replace(stack, stops={"base": "always"}), completions),
        seconds={"load": 1.0},
    )


def test_run_is_judged_by_stopping_and_effect(report):
    assert [v.name for v in report.verdicts] == [
        "stopping: base",
        "effect: base ≠ style",
        "effect: base ≠ instruct",
        "effect: base ≠ stacked",
    ]
    assert report.outcome.value == "held"
    assert replace(report, complete=False).outcome.value == "undecided"


def test_json_holds_everything_and_no_nan(report):
    text = json.dumps(as_json(report), allow_nan=False)
    values = json.loads(text)
    assert values["completions"][0]["text"] == f"{HOSTILE} base"
    assert len(values["completions"]) == 8
    assert values["stack"]["adapters"][0]["sha256"]


def test_markdown_shows_model_output_inert(report):
    text = as_markdown(report)
    assert "\x1b" not in text
    assert "\u202e" not in text
    # Outside fences nothing of the output is left that Markdown or HTML would act on.
    outside, fence = [], None
    for line in text.split("\n"):
        if fence is None and line.startswith("```"):
            fence = line.removesuffix("text")
        elif line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert "<script>" not in "\n".join(outside)
    assert not any(line.startswith("::") for line in text.split("\n"))


def test_report_folder_is_written_whole(report, tmp_path):
    folder = write_run(report, tmp_path / "run")
    assert json.loads((folder / "report.json").read_text())["verdict"] == "held"
    assert (folder / "report.md").read_text().startswith("# Run of")


@given(st.text())
def test_fence_is_longer_than_any_inside(text):
    block = code_block(text)
    fence = block.split("text\n", 1)[0]
    assert block.endswith(f"\n{fence}")
    assert fence not in block[len(fence) : -len(fence)]


@given(st.text())
def test_inline_text_stays_on_its_line_and_in_its_cell(text):
    assert "\n" not in inline(text)
    assert "<" not in inline(text)
    row = table(["a"], [[text]]).split("\n")[2]
    assert row.startswith("| ")
    assert row.replace("\\|", "").count("|") == 2
