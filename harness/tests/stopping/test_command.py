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


def test_what_was_found_is_shown_where_the_report_cannot_be_written(run, monkeypatch, stack_copy):
    import harness.report.stopping
    from harness.errors import InputError

    def write(report, folder, **_):
        raise InputError("cannot be written: No space left on device", where=folder)

    monkeypatch.setattr(harness.report.stopping, "write_stopping", write)
    code, out, err = run("--files-only", "--base-model", stack_copy.base, "--output", "out")
    assert code == 2
    assert "verdict: held" in out
    assert "report:" not in out
    assert err.endswith("error: out: cannot be written: No space left on device\n")


@pytest.mark.slow
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


@pytest.mark.parametrize("more", [["--sweep"], ["--samples", "2"], ["--snapshots", "."]])
def test_files_alone_generate_nothing(run, more):
    code, out, err = run("--files-only", *more)
    assert (code, out) == (2, "")
    assert "--files-only: loads no model" in err


def test_accepted_completions_are_replayed_without_generating(
    run, monkeypatch, tmp_path, embedded_engine
):
    from harness.engines.peft import PeftEngine
    from harness.preset import load_preset
    from harness.snapshot import snapshot_name, snapshot_of, write_form

    preset = load_preset("elegant_style")
    (tmp_path / "accepted").mkdir()
    for one in embedded_engine.generate(preset.prompts, "stacked", preset.settings):
        name = f"{snapshot_name(preset.name, one.prompt.id, 'stacked')}.toml"
        form = write_form(snapshot_of(one, {}))
        (tmp_path / "accepted" / name).write_text(form, encoding="utf-8")

    def refuse(*_, **__):
        raise AssertionError("something was generated")

    monkeypatch.setattr(PeftEngine, "generate", refuse)
    code, out, _ = run(
        "--snapshots", "accepted", "--preset", "elegant_style", "--modes", "stacked", "--json"
    )
    report = json.loads(out)
    stacked = report["modes"]["stacked"]
    assert (report["generated"], stacked["stopped"], stacked["total"]) == (0, 8, 8)
    assert stacked["eos"]["replayed"] == stacked["eos"]["tokens"]
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
