"""The broken and hostile folders given to the commands that read them by themselves: the preflight
is no matter of `check-files` alone. `run`, `verify`, `bench` and the suites check the stack before
they load it; these load nothing."""

import os

import pytest

from harness.cli import main
from harness.tests.hostile.rows import ROWS

# The engine's matter: an analysis reads no tokenizer, and merging takes a base without one.
_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "additional_chat_templates/default.jinja",
)  # fmt: skip
#: More than `W + s·B·A`: an analysis tells what it leaves out, and of adapters that do nothing.
_ANALYSED = frozenset(
    {
        "config: bias all", "config: arrow, an empty table", "config: montecarlo, an empty table",
        "config: dora", "config: lora_bias", "config: pissa", "config: modules to save",
        "config: trainable tokens", "config: layer replication", "config: megatron_config",
        "tensors: every A zero", "tensors: every B zero", "tensors: everything zero",
    }
)  # fmt: skip
#: What only a base can tell.
_OF_THE_BASE = frozenset(
    {
        "tensors: a module left out", "tensors: targets widened",
        "tensors: another model's modules", "tensors: base copy that differs",
        "tensors: base copy of nothing", "tensors: layers that the base lacks",
        "tensors: a layer of 400 digits", "tensors: a layer called 0²0",
    }
)  # fmt: skip


def _analysis(name, file):
    group = name.partition(":")[0]
    loads = file in _TEXT_FILES or name == "base: no tokenizer"
    return group != "stack" and name not in _ANALYSED and not loads


#: Whether a command reads what the row called *name* breaks in *file*. Rows of the group `stack`
#: break the options that name a stack, which some commands do not take.
READS = {
    "merge": lambda name, _: not name.startswith("stack") and name != "base: no tokenizer",
    "flatten": lambda name, _: (
        name.partition(":")[0] in ("weights", "tensors", "config") and name not in _OF_THE_BASE
    ),
    "analyze": _analysis,
    "compare": _analysis,
    "stopping": lambda *_: True,
    # It writes the lock anew; that it does not hold is said by everyone else.
    "lock": lambda name, _: not name.startswith(("stack: locked", "stack: lock ")),
}
#: Where a command finds the fault in another file than `check-files`.
NAMED = {
    ("merge", "config: modules to save"): "adapter_model.safetensors",
    ("flatten", "tensors: transposed by the config"): "adapter_config.json",
    # `check-files` tells of the first hundred.
    "base: index of 50,000 shards": "x9.safetensors",
    "base: 1,500 stray shards": "model-00009-of-00002.safetensors",
}


def words_of(command, folders, output):
    base, pair = str(folders.base), [str(folders.style), str(folders.instruct)]
    given = {
        "merge": ["--base", base, "--adapters", *pair, "--output"],
        "flatten": ["--adapters", *pair, "--output"],
        "analyze": [pair[0], "--base-model", base, "--no-plots", "--output"],
        "compare": [*pair, "--base-model", base, "--no-plots", "--output"],
        "stopping": ["--files-only", *folders.arguments, "--output"],
        "lock": [*folders.arguments, "--lock"],
    }[command]
    return [command, *given, str(output)]


#: One or two of each kind are not slow.
FEW = {
    "weights: nothing", "tensors: NaN in A", "tensors: targets widened", "config: rank 0",
    "base: NaN in the base", "base: Inf in the base", "base: a matrix of zeros",
    "base: five layers claimed", "base: tokenizer not JSON", "base: EOS a string",
    "base: template that does not parse", "base: remote code", "stack: one folder twice",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "build"),
    [
        pytest.param(name, file, build, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, file, _, build in ROWS
    ],
)
def test_broken_folder_is_refused_by_every_command_that_reads_it(
    folders, tmp_path, capsys, name, file, build
):
    build(folders)
    capsys.readouterr()
    for command, reads in READS.items():
        if not reads(name, file):
            continue
        output = tmp_path / f"out-{command}"
        code = main(words_of(command, folders, output))
        told = capsys.readouterr()
        assert code == 2, f"{command}: {told}"
        lines = told.err.rstrip("\n").split("\n")
        assert all(line.startswith("error: ") for line in lines), f"{command}: {told.err}"
        named = NAMED.get((command, name)) or NAMED.get(name, file)
        assert any(named in line for line in lines), f"{command}: {told.err}"
        assert told.out == ""
        assert not os.path.lexists(output)
        assert not os.path.lexists("canary"), "code of the folder's ran"


def test_sound_folders_are_taken_by_every_command(folders, tmp_path, capsys):
    for command in READS:
        assert main(words_of(command, folders, tmp_path / f"out-{command}")) == 0, command
        capsys.readouterr()
