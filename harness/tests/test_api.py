"""The public names are there, flat, and cost nothing until used."""

import importlib
import subprocess
import sys

import harness

PROMISED = {
    "Adapter", "AdapterStack", "Application", "Completion", "Engine", "GenerationSettings",
    "HarnessError", "InputError", "Mode", "Prompt", "StopReason", "Verdict", "load_engine",
    "load_preset", "load_prompts", "resolve_stack", "certify_stack", "check_training_stack",
    "merge_lora_adapters", "flatten_adapters", "analyze_lora_weights", "compare_lora_adapters",
    "LoRAAnalyzer", "UnifiedAnalyzer", "Certificate", "MergeReport",
}  # fmt: skip


def test_every_promised_name_is_exported():
    assert set(harness.__all__) >= PROMISED
    assert sorted(harness.__all__) == harness.__all__ == list(harness._HOMES)


def test_every_exported_name_is_there_with_a_docstring():
    for name in harness.__all__:
        value = getattr(harness, name)
        assert value.__doc__, name
        home = importlib.import_module(harness._HOMES[name])
        assert name in home.__all__


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(harness, "nothing_of_the_kind")
    assert "resolve_stack" in dir(harness)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, harness; assert not {'torch', 'numpy', 'pytest', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
