"""`lora-stack stopping` on the embedded stack: exit codes, JSON alone, the report's folder."""

import json
import subprocess
import sys

import pytest


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in an empty folder; gives its exit code and output."""
    from harness.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main(["stopping", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_held_out_prompts_prove_the_embedded_declaration(run):
    code, out, err = run("--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (0, "held")
    assert report["modes"]["stacked"]["total"] == 74
    assert {c["verdict"] for c in report["checks"]} == {"held"}
    assert report["blame"]["stacked"]["sentence"].startswith("instruct raises EOS by")
    assert "embedded" in err


def test_few_prompts_are_undecided_and_say_how_many_are_needed(run, tmp_path):
    (tmp_path / "few.txt").write_text("Where does the fox live?\n狐狸住在哪里？\n")
    code, out, _ = run("--prompts", "few.txt", "--modes", "stacked", "--output", "out")
    assert code == 1
    assert "undecided" in out
    assert "2 prompts are too few to decide; 73 would" in " ".join(out.split())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "plots", "report.html", "report.md", "stopping.json",
    ]  # fmt: skip


def test_files_alone_take_no_model(run, monkeypatch, stack_copy):
    import harness.engines

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness.engines, "load_engine", refuse)
    adapters = ["--style-adapter", stack_copy.root / "style",
                "--instruct-adapter", stack_copy.root / "instruct"]  # fmt: skip
    given = ["--files-only", "--json", "--base-model", stack_copy.base, *adapters]
    code, out, _ = run(*given)
    assert (code, json.loads(out)["generated"]) == (0, 0)
    stack_copy.change("base/generation_config.json", eos_token_id=637)
    code, out, _ = run(*given)
    assert code == 1
    assert [c["kind"] for c in json.loads(out)["causes"]] == ["end of turn is no EOS"]


def test_accepted_completions_are_examined_without_generating(run, monkeypatch):
    from pathlib import Path

    from harness.engines.peft import PeftEngine

    def refuse(*_, **__):
        raise AssertionError("something was generated")

    monkeypatch.setattr(PeftEngine, "generate", refuse)
    folder = Path(__file__).parents[3] / "snapshots"
    code, out, _ = run("--snapshots", folder, "--preset", "elegant_style", "--json")
    report = json.loads(out)
    assert (report["generated"], report["modes"]["stacked"]["stopped"]) == (0, 8)
    # Every accepted token is what the stack would say now: the snapshots are replayed.
    assert (
        report["modes"]["stacked"]["eos"]["replayed"] == report["modes"]["stacked"]["eos"]["tokens"]
    )
    assert code == 1  # 8 prompts prove no rate


def test_data_set_is_checked(run, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "no end"}\n{"text": "an end<|im_end|>"}\n')
    code, out, _ = run("--files-only", "--dataset", "data.jsonl", "--labels", "all")
    assert code == 1
    assert "1 of 2 examples (50.0%) end with an EOS that is in the loss" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments", [["--samples", "-1"], ["--snapshots", "nowhere"], ["--labels", "x", "--dataset",
                                                                   "y", "--files-only"]]
)  # fmt: skip
def test_bad_usage_is_refused(run, arguments, monkeypatch):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")


def test_help_imports_no_torch():
    code = (
        "import sys; from harness.cli import main\n"
        "try: main(['stopping', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--sweep" in done.stdout
