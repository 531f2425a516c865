"""What a person sees of a run."""

from harness.completion import Application
from harness.preset import load_prompts
from harness.report.run import RunReport, judge_run
from harness.report.terminal import print_banner, print_report
from harness.resolve import resolve_stack


def test_modes_are_side_by_side_with_new_words_marked(tiny, tiny_engine, tmp_path):
    from rich.console import Console

    (tmp_path / "p.txt").write_text("Hello\n")
    preset = load_prompts(tmp_path / "p.txt").with_settings(max_new_tokens=3)
    stack = resolve_stack(adapters=tiny.adapters)
    said = {m.name: tiny_engine.generate(preset.prompts, m, preset.settings) for m in stack.modes}
    out = Console(record=True, width=120, file=open("/dev/null", "w"), markup=False)  # noqa: SIM115, PTH123
    print_banner(out, stack, preset, embedded=False)
    report = RunReport(
        stack=stack, preset=preset, device="cpu", dtype="float32",
        application=Application.LIVE.value, completions=said,
        verdicts=judge_run(stack, said), seconds={},
    )  # fmt: skip
    print_report(out, report, tmp_path / "runs" / "x")
    out.file.close()
    text = out.export_text()
    assert "W = W_base + ΔW_style + ΔW_instruct" in text
    for mode in said:
        assert f"\n {mode} " in text
    assert "verdict: " in text
    assert "length" in text
