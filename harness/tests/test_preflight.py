"""The preflight: run by every command and suite, all faults at once, without torch."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from harness.cli import main
from harness.tests.hostile.folders import A0, B0, CONFIG, INDEX, Folders


@pytest.fixture
def folders(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "sound"
    shutil.copytree(tiny.base, root / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, root / name)
    return Folders(tmp_path / "case", root)


def commands(f):
    style, instruct = str(f.style), str(f.instruct)
    return {
        "run": ["run", *f.arguments],
        "verify": ["verify", *f.arguments],
        "stopping": ["stopping", *f.arguments],
        "bench": ["bench", *f.arguments],
        "check-files": ["check-files", *f.arguments],
        "lock": ["lock", *f.arguments],
        "merge": ["merge", "--base", str(f.base), "--adapters", style, instruct, "--output", "o"],
        "flatten": ["flatten", "--adapters", style, instruct, "--output", "o"],
        "analyze": ["analyze", style, "--output", "o"],
        "compare": ["compare", style, instruct, "--output", "o"],
    }


COMMANDS = (
    "run", "verify", "stopping", "bench", "check-files", "lock", "merge", "flatten", "analyze",
    "compare",
)  # fmt: skip
LOADING = ("run", "verify", "stopping", "bench", "check-files", "merge", "flatten")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_broken_header(folders, capsys, command):
    folders.header(lambda h: h[A0].update(dtype="F31"))
    assert main(commands(folders)[command]) == 2
    assert f"style/adapter_model.safetensors: tensor '{A0}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", LOADING)
def test_what_uses_an_adapter_refuses_nan_in_it(folders, capsys, command):
    folders.poke(A0, float("nan"))
    assert main(commands(folders)[command]) == 2
    assert f"tensor '{A0}': holds NaN at [0, 5]" in capsys.readouterr().err


def test_engine_refuses_it_for_whoever_loads_without_a_command(folders):
    from harness import InputError, load_engine, resolve_stack

    folders.poke(A0, float("inf"))
    stack = resolve_stack(base_model=folders.base, adapters={"a": folders.style})
    with pytest.raises(InputError, match=r"holds Inf at \[0, 5\]"):
        load_engine(stack)


@pytest.mark.parametrize(("change", "words"), [("config", "the config says 7"), ("nan", "NaN at")])
def test_suites_refuse_it(pytester, folders, change, words):
    if change == "config":
        folders.config(r=7)
    else:
        folders.poke(A0, float("nan"))
    pytester.chdir()
    pytester.makepyfile("def test_it(lora_engine): pass")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *folders.arguments)
    assert result.ret != 0
    assert words in result.stdout.str() + result.stderr.str()


def test_all_faults_of_a_stack_are_told_at_once(folders, capsys):
    folders.config(r=7, use_rslora="false", bias="some", frobnicate=1)
    folders.header(lambda h: (h[A0].update(dtype="F31"), h.update(__metadata__=[])))
    folders.json(f"instruct/{CONFIG}", lora_alpha=-1)
    folders.json("base/config.json", num_hidden_layers=7, vocab_size=3)
    assert main(["check-files", *folders.arguments]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    for words in ("use_rslora", "bias", "frobnicate", "unknown dtype 'F31'", "__metadata__",
                  "lora_alpha: -1", "num_hidden_layers: claims 7", "claims [3, 32]"):  # fmt: skip
        assert sum(words in line for line in lines) >= 1, words
    assert all(line.startswith("error: ") and "→" in line for line in lines)


def test_what_is_in_the_tensors_is_told_beside_what_is_in_the_headers(folders, capsys):
    """Whoever mends the headers must not find the next fault only then."""
    folders.config(r=7)
    folders.poke(B0, float("nan"))
    folders.json("base/config.json", num_hidden_layers=7)
    folders.poke("model.norm.weight", float("inf"), path=folders.model)
    (folders.base / "tokenizer.json").unlink()
    (folders.base / "chat_template.jinja").write_text("{% if %}")
    words = (f"tensor '{B0}': holds NaN", "the config says 7", "num_hidden_layers: claims 7",
             "'model.norm.weight': holds Inf", "no tokenizer", "line 1: ")  # fmt: skip
    for arguments in (folders.arguments, [str(folders.style), str(folders.base)]):
        assert main(["check-files", *arguments]) == 2
        lines = capsys.readouterr().err.strip().split("\n")
        for word in words:
            assert sum(word in line for line in lines) >= 1, (word, arguments)
        assert len(lines) == len(set(lines)), "each fault once"


def test_sound_shards_are_read_though_the_index_lies(folders, capsys):
    folders.index(lambda places: places.update(ghost=next(iter(places.values()))))
    folders.poke("model.norm.weight", float("nan"), path=_shard_of(folders, "model.norm.weight"))
    assert main(["check-files", *folders.arguments]) == 2
    told = capsys.readouterr().err
    assert "'ghost'" in told
    assert "'model.norm.weight': holds NaN" in told


def _shard_of(folders, name):
    places = json.loads((folders.base / INDEX).read_text())["weight_map"]
    return folders.base / places[name]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no files in memory here")
def test_a_stack_that_lies_in_memory_is_sound(folders):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        there = Folders(Path(memory) / "case", folders.root)
        there.config(base_model_name_or_path=str(there.base))
        assert main(["check-files", *there.arguments]) == 0


def test_json_says_the_same(folders, capsys):
    folders.config(r=7)
    assert main(["check-files", "--json", str(folders.style), str(folders.base)]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "failed"
    assert [check["verdict"] for check in report["checks"]] == ["failed", "held"]
    assert len(report["checks"][0]["evidence"]) == 14


def test_single_folders_and_a_stack_are_not_mixed(folders, capsys):
    assert main(["check-files", str(folders.style), *folders.arguments]) == 2
    assert "both given" in capsys.readouterr().err


def test_it_imports_no_torch(folders):
    code = (
        "import sys; from harness.cli import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check-files", *folders.arguments], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_remote_code_is_let_through_when_it_is_trusted(folders, capsys):
    folders.json("base/config.json", auto_map={"AutoConfig": "x.Y"})
    assert main(["check-files", *folders.arguments]) == 2
    assert main(["check-files", *folders.arguments, "--trust-remote-code"]) == 0


def test_adapters_names_that_peft_cannot_hold_are_those_of_torch():
    import torch

    from harness.stack import _MODULE_DICT_NAMES, _NAME

    taken = {name for name in dir(torch.nn.ModuleDict()) if _NAME.fullmatch(name)}
    assert taken <= _MODULE_DICT_NAMES


def test_large_base_is_read_once(folders, monkeypatch, tmp_path):
    from harness import preflight
    from harness.checkpoint_files import read_checkpoint
    from harness.files import soundness

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(soundness, "_WORTH_REMEMBERING", 1)
    os.utime(folders.model, ns=(1, 1))  # long ago: writing it again gives it another time
    monkeypatch.setattr(soundness, "_SETTLED_NS", -(1 << 62))
    checkpoint = read_checkpoint(folders.base)
    reads = []
    real = preflight.value_ranges
    monkeypatch.setattr(preflight, "value_ranges", lambda file: reads.append(file) or real(file))
    for _ in range(2):
        soundness.forget()
        preflight.check_base_values(checkpoint, [])
    assert len(reads) == 1
    folders.poke("model.norm.weight", float("nan"), path=folders.model)
    soundness.forget()
    faults = []
    preflight.check_base_values(read_checkpoint(folders.base), faults)
    assert len(faults) == 1, "a file that was written again is read again"


def test_a_base_that_was_written_just_now_is_not_taken_for_known(folders, monkeypatch):
    """Written again within one tick of the file system's clock, it has the same stamp."""
    from harness import preflight
    from harness.checkpoint_files import read_checkpoint
    from harness.files import soundness

    real, stamps = preflight.stamp_of, []

    def stamp(*arguments):
        stamps.append(stamps[0] if stamps else real(*arguments))
        return stamps[0]

    monkeypatch.setattr(preflight, "stamp_of", stamp)
    monkeypatch.setattr(soundness, "_SETTLED_NS", 1 << 62)  # however slow this is
    faults = []
    preflight.check_base_values(read_checkpoint(folders.base), faults)
    assert faults == []
    folders.poke("model.norm.weight", float("nan"), path=folders.model)
    preflight.check_base_values(read_checkpoint(folders.base), faults)
    assert len(faults) == 1
    assert len(stamps) == 2


def test_a_shard_that_goes_after_its_header_was_read_is_said(folders):
    from harness import preflight
    from harness.checkpoint_files import read_checkpoint

    checkpoint, faults = read_checkpoint(folders.base), []
    folders.model.unlink()
    preflight.check_base_values(checkpoint, faults)
    assert [str(fault) for fault in faults] == [
        f"{folders.model}: cannot be read: No such file or directory"
    ]


def test_ctrl_c_does_not_wait_for_the_other_shards(folders, monkeypatch):
    from harness import preflight
    from harness.checkpoint_files import read_checkpoint
    from harness.files.tensor_values import value_ranges

    folders.shard()
    checkpoint, begun, stopped = read_checkpoint(folders.base), threading.Event(), []

    def interrupted(file):
        if file is checkpoint.shards[0]:
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        found = next(iter(value_ranges(file)))
        try:
            while True:
                yield found
        finally:
            stopped.append(file)

    monkeypatch.setattr(preflight, "value_ranges", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preflight.check_base_values(checkpoint, [])
    assert stopped == [checkpoint.shards[1]]


def test_files_that_shrink_while_they_are_read_are_said(folders):
    from harness import preflight
    from harness.adapter_files import read_adapter
    from harness.checkpoint_files import read_checkpoint

    files, checkpoint, faults = read_adapter(folders.style), read_checkpoint(folders.base), []
    for path in (folders.weights, folders.model):
        path.write_bytes(path.read_bytes()[:-64])
    assert preflight.check_adapter_values(files, faults) == []
    preflight.check_base_values(checkpoint, faults)
    assert [fault.where for fault in faults] == [str(folders.weights), str(folders.model)]
    assert all("became shorter while it was read" in str(fault) for fault in faults)


def test_a_base_of_another_folders_name_does_not_stop_one_that_is_given(folders):
    """The config may name any base: what it names is looked at, and need not be there."""
    folders.config(base_model_name_or_path=f"../{'a' * 300}")
    assert main(["check-files", *folders.arguments]) == 0


def test_modules_that_transformers_maps_while_loading_are_left_to_the_engine(folders):
    """In a family whose tensors are called otherwise than its modules, a name decides nothing."""
    folders.json("base/config.json", model_type="someone_elses")
    folders.tensors(lambda stored: stored.update(
        {name.replace("layers.1.", "blocks.1."): stored.pop(name) for name in list(stored)}
    ))  # fmt: skip
    assert main(["check-files", *folders.arguments]) == 0


def test_a_child_that_stands_still_is_not_waited_for(folders, monkeypatch, capsys):
    import subprocess

    def stands_still(*_, **__):
        raise subprocess.TimeoutExpired("python", 120, output=b"0\n1\n")

    from harness.files.patterns import SLOW, pattern_fault

    monkeypatch.setattr(subprocess, "run", stands_still)
    (folders.base / "chat_template.jinja").write_text("{{ 'not tried out before' }}")
    assert pattern_fault(["(a)*", "(b)*", "(c)*"], ["x"]) == ("(b)*", SLOW)
    assert main(["check-files", str(folders.base)]) == 2
    assert "chat_template.jinja: chat_template: takes more than" in capsys.readouterr().err


def test_a_child_that_the_system_ended_is_not_called_slow(folders, monkeypatch, capsys):
    import subprocess

    def ended(words, **_):
        return subprocess.CompletedProcess(words, returncode=-9, stdout="")

    monkeypatch.setattr(subprocess, "run", ended)
    (folders.base / "chat_template.jinja").write_text("{{ 'not tried out before either' }}")
    assert main(["check-files", str(folders.base)]) == 2
    told = capsys.readouterr().err
    assert "could not be tried, its process was ended by signal 9 → free some memory" in told


def test_a_template_that_was_found_sound_is_not_tried_again(folders, monkeypatch, tmp_path):
    from harness import preflight
    from harness.files import soundness

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folders.base / "chat_template.jinja").write_text("{{ 'tried out once' }}")
    tried, real = [], preflight.check_template
    monkeypatch.setattr(
        preflight, "check_template", lambda *given: tried.append(given) or real(*given)
    )
    for _ in range(2):
        soundness.forget()
        preflight.check_templates([folders.base], [])
    assert len(tried) == 1
    (folders.base / "chat_template.jinja").write_text("{% broken")
    for _ in range(2):
        faults = []
        preflight.check_templates([folders.base], faults)
        assert len(faults) == 1
    assert len(tried) == 3


def test_a_template_does_not_pay_for_a_slow_start_of_its_child(monkeypatch):
    from harness import template_probe

    slow = "import time\nwhile time.process_time() < 1.1: pass\n"
    monkeypatch.setattr(template_probe, "_CHILD", slow + template_probe._CHILD)
    monkeypatch.setattr(template_probe, "_CPU_SECONDS", 1)
    assert template_probe._tried("{{ 'sound' }}") == ("sound", "")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            [{"name": "tool", "template": "x"}, {"name": "default", "template": "{% if %}"}],
            "line 1",
        ),
        ([{"name": "tool", "template": "{% if %}"}], "line 1"),
        ([], None),
        (3, "chat_template: is no text"),
        ("{{ 'sound' }}", None),
    ],
)
def test_the_template_in_the_tokenizers_settings_is_tried(folders, capsys, template, words):
    (folders.base / "chat_template.jinja").unlink()
    folders.json("base/tokenizer_config.json", chat_template=template)
    assert main(["check-files", str(folders.base)]) == (2 if words else 0)
    assert words is None or words in capsys.readouterr().err


def test_a_number_without_a_decimal_form_is_told_by_its_size():
    from harness.errors import quoted

    assert quoted(10**5000) == "a number of 16610 bits"
    assert quoted([10**5000]) == "?"


def test_a_terminal_is_told_a_hundred_faults_and_how_many_more(folders, capsys):
    folders.config(**{f"unknown{n}": 1 for n in range(1500)})
    assert main(["check-files", str(folders.style)]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 101
    assert lines[-1].endswith("and 900 more faults → --json tells all")
    assert main(["check-files", "--json", str(folders.style)]) == 2
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert len(check["evidence"]) == 1000, "of one kind in one file, no more are looked for"


def _empty(names):
    return {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}


@pytest.mark.parametrize("end", ["lora_A.weight", "base_layer.weight", "weight"])
def test_a_thousand_tensors_that_do_not_belong_are_enough(folders, capsys, end):
    folders.header(lambda h: h | _empty(f"base_model.model.x{n}.{end}" for n in range(1500)))
    assert main(["check-files", "--json", *folders.arguments]) == 2
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert 1000 <= len(check["evidence"]) <= 1100


def test_what_a_base_may_say_about_itself_is_sound(folders, capsys):
    """A quantisation with its method, and a tied head that is stored all the same."""

    def tie(stored):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]

    folders.tensors(tie, folders.model)
    folders.json("base/config.json", tie_word_embeddings=True)
    assert main(["check-files", str(folders.base)]) == 0
    folders.json("base/config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert main(["check-files", str(folders.base)]) == 0
    folders.json("base/config.json", custom_generate="evil/decoding")
    assert main(["check-files", str(folders.base)]) == 2
    assert "custom_generate: makes loaders run code" in capsys.readouterr().err
