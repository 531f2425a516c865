"""`lora-stack verify`: exit codes, and one JSON object alone on standard output."""

import json
import sys

import pytest


def run(arguments, capsys):
    from harness.cli import main

    code = main(arguments)
    return code, capsys.readouterr().out


@pytest.fixture
def stack_arguments(written_stack, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\nthree\n")
    arguments = ["--base_model", str(written_stack.base.path), "--prompts", str(prompts)]
    for adapter in written_stack.adapters:
        arguments += ["--adapter", f"{adapter.name}={adapter.path}"]
    return arguments


def test_sound_stack_exits_0_with_one_json_object(stack_arguments, capsys):
    code, out = run(["verify", *stack_arguments, "--json"], capsys)
    document = json.loads(out)
    assert code == 0
    assert document["verdict"] == "held"
    assert set(document["checks"][0]) == {"name", "verdict", "evidence", "remedy"}
    assert set(document["modes"]) == {"base", "style", "instruct", "stacked"}


def test_failing_stack_exits_1_and_says_where(stack_arguments, capsys, written_stack, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(written_stack.base.path, base)
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    stack_arguments[1] = str(base)
    code, out = run(["verify", *stack_arguments, "--modes", "stacked"], capsys)
    assert code == 1
    assert "✗ EOS ids" in out
    assert "→ set eos_token_id" in out


def test_quantised_base_is_refused_before_anything_is_loaded(
    stack_arguments, capsys, written_stack, tmp_path
):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(written_stack.base.path, base)
    file = base / "config.json"
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    stack_arguments[1] = str(base)
    from harness.cli import main

    assert main(["verify", *stack_arguments]) == 2
    err = capsys.readouterr().err
    assert "the base is quantised ('bitsandbytes')" in err
    assert "pip install" not in err


def test_settings_that_act_only_in_other_programs_are_named(
    stack_arguments, capsys, written_stack, tmp_path
):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(written_stack.base.path, base)
    file = base / "generation_config.json"
    # The engine passes all settings itself; whoever else loads the folder obeys it.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suppress_tokens": [258]}))
    stack_arguments[1] = str(base)
    code, out = run(["verify", *stack_arguments, "--modes", "base"], capsys)
    assert code == 1
    assert "suppress_tokens = [258] in generation_config.json" in out


def test_a_prompt_that_the_template_refuses_is_bad_input(
    stack_arguments, capsys, written_stack, tmp_path
):
    import shutil

    from harness.cli import main

    base = tmp_path / "base"
    shutil.copytree(written_stack.base.path, base)
    (base / "chat_template.jinja").write_text("{{ raise_exception('no such turn') }}")
    stack_arguments[1:4] = [str(base), "--preset", "elegant_style"]
    assert main(["verify", *stack_arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: prompt ")
    assert "the chat template refuses it: no such turn → " in said


def test_help_imports_no_torch():
    import subprocess

    script = (
        "import sys\nfrom harness.cli import main\n"
        "try:\n    main(['verify', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def failing_in(monkeypatch):
    """Certifying a mode raises what is given for it."""
    import harness.certificate

    real = harness.certificate.certify_stack

    def plan(**errors):
        def certify(model, stack, *, mode, **named):
            if mode.name in errors:
                raise errors[mode.name]
            return real(model, stack, mode=mode, **named)

        monkeypatch.setattr(harness.certificate, "certify_stack", certify)

    return plan


def test_a_mode_without_memory_is_named_and_the_others_are_certified(
    stack_arguments, capsys, failing_in
):
    failing_in(style=MemoryError("8 GiB asked"))
    code, out = run(["verify", *stack_arguments, "--json"], capsys)
    assert code == 1
    failed = [check for check in json.loads(out)["checks"] if check["verdict"] == "failed"]
    assert [(c["name"], c["evidence"]) for c in failed] == [
        ("style: run", ["out of memory: 8 GiB asked"])
    ]
    assert json.loads(out)["modes"]["stacked"]


def test_after_a_broken_device_the_rest_is_said_not_to_have_run(
    stack_arguments, capsys, failing_in
):
    failing_in(style=RuntimeError("CUDA error: device-side assert triggered"))
    code, out = run(["verify", *stack_arguments, "--json"], capsys)
    undecided = [c["name"] for c in json.loads(out)["checks"] if c["verdict"] == "undecided"]
    assert (code, undecided) == (1, ["instruct: run", "stacked: run"])


def test_interrupted_says_how_many_modes_were_certified(stack_arguments, capsys, failing_in):
    failing_in(instruct=KeyboardInterrupt())
    code, out = run(["verify", *stack_arguments], capsys)
    assert code == 130
    assert "interrupted: 2 of 4 modes were certified" in out
    assert "verdict: undecided" in out
