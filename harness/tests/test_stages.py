"""The embedded trained stack behaves as its declaration and README say."""

import json
import subprocess
import sys

import pytest

from harness.embedded import embedded_folder
from harness.preset import load_preset
from harness.resolve import StackOptions, stack_from_options


@pytest.fixture(scope="module")
def held_out():
    """What every mode says to the held-out prompts, live; stacked merged as well."""
    from harness.completion import Application
    from harness.engines import load_engine

    preset = load_preset("held_out")
    with load_engine(stack_from_options(StackOptions()), device="cpu", dtype="float32") as engine:
        said = {
            mode.name: engine.generate(preset.prompts, mode, preset.settings)
            for mode in engine.stack.modes
        }
        said["merged"] = engine.generate(
            preset.prompts, "stacked", preset.settings, application=Application.MERGED
        )
    return said


def stop_rate(completions):
    return sum(c.stopped for c in completions) / len(completions)


def test_base_and_style_run_on_and_stacked_stops(held_out):
    assert len(held_out["stacked"]) >= 50
    assert stop_rate(held_out["base"]) <= 0.02
    assert stop_rate(held_out["style"]) <= 0.02
    assert stop_rate(held_out["stacked"]) >= 0.98


def test_merged_says_the_stacked_tokens(held_out):
    assert [c.token_ids for c in held_out["merged"]] == [c.token_ids for c in held_out["stacked"]]


def test_instruct_alone_is_visibly_another(held_out):
    pairs = zip(held_out["instruct"], held_out["stacked"], strict=True)
    differing = sum(a.text != b.text for a, b in pairs)
    assert differing >= 0.9 * len(held_out["stacked"])


def test_folder_is_laid_out_as_users_have_it():
    stages = embedded_folder() / "stages"
    (checkpoint,) = (stages / "stage1_style_injection").iterdir()
    assert checkpoint.name.startswith("checkpoint-")
    for adapter in (checkpoint, stages / "stage2_instruct_new_adapter"):
        assert {f.name for f in adapter.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert (adapter / base).resolve() == (stages / "base").resolve()
    assert sum(f.stat().st_size for f in (stages / "base").iterdir()) < 6_000_000


@pytest.mark.slow
def test_one_command_rebuilds_it(tmp_path):
    script = embedded_folder() / "stages" / "train.py"
    subprocess.run([sys.executable, script, "--output", tmp_path / "new"], check=True, cwd=tmp_path)
    (checkpoint,) = (tmp_path / "new" / "stage1_style_injection").iterdir()
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "run", "--preset", "held_out", "--json",
         "--style-adapter", checkpoint,
         "--instruct-adapter", tmp_path / "new" / "stage2_instruct_new_adapter"],
        check=True, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    rates = {
        row["mode"]: row["stopped"] / row["completions"]
        for row in json.loads(done.stdout)["summary"]
    }
    assert rates["base"] <= 0.02
    assert rates["style"] <= 0.02
    assert rates["stacked"] >= 0.98
