"""The lock: written, held against, kept, and what it says when an adapter's parent changed."""

import json
import random
import shutil

import pytest

from harness.cli import main
from harness.errors import InputError
from harness.resolve import StackOptions, stack_from_options
from harness.stack_lock import lock_faults, make_lock, write_lock


@pytest.fixture
def root(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.base, tmp_path / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "stack.toml").write_text(
        'base = "base"\n[adapters]\nstyle = "style"\ninstruct = "instruct"\n'
        '[parents]\ninstruct = ["style"]\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def stack():
    return stack_from_options(StackOptions(stack_file="stack.toml"))


def test_lock_beside_the_declaration_is_checked_on_every_run(root, capsys):
    assert main(["lock", "--stack", "stack.toml"]) == 0
    assert "10 files" in capsys.readouterr().out
    assert stack().lock == root / "stack.lock.json"
    assert main(["lock", "--stack", "stack.toml", "--check"]) == 0
    flip(root / "base" / "model.safetensors", 8 * 60_000)
    for command in ("run", "verify", "check-files"):
        capsys.readouterr()
        assert main([command, "--stack", "stack.toml"]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert "base/model.safetensors: base: has changed: sha256" in line
        assert "stack.lock.json holds" in line
    assert main(["lock", "--stack", "stack.toml", "--check"]) == 1
    assert main(["check-files", "--stack", "stack.toml", "--lock", "none"]) == 0
    assert main(["lock", "--stack", "stack.toml"]) == 2, "instruct was trained on the other base"


def test_lock_names_every_file_and_every_parent(root):
    lock = make_lock(stack())
    assert set(lock["base"]["files"]) == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert set(lock["adapters"]["style"]["files"]) == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    parent = lock["adapters"]["instruct"]["parent"]
    assert set(parent["adapters"]) == {"style"}
    assert lock["adapters"]["style"]["parent"]["adapters"] == {}
    assert parent["base"] == lock["adapters"]["style"]["parent"]["base"]


def test_code_and_every_kind_of_tokenizer_file_in_the_base_is_locked(root):
    for name in ("modeling_mine.py", "vocab.txt", "spiece.model"):
        (root / "base" / name).write_text("1")
    write_lock(root / "stack.lock.json", make_lock(stack()))
    assert lock_faults(root / "stack.lock.json", stack()) == []
    for name in ("modeling_mine.py", "vocab.txt", "spiece.model"):
        (root / "base" / name).write_text("2")
    said = [str(fault) for fault in lock_faults(root / "stack.lock.json", stack())]
    assert [line.split(": ")[0].rpartition("/")[2] for line in said] == [
        "vocab.txt", "spiece.model", "modeling_mine.py",
    ]  # fmt: skip


def test_adapter_whose_parent_was_trained_again_is_named(root):
    write_lock(root / "stack.lock.json", make_lock(stack()))
    before = json.loads((root / "stack.lock.json").read_text())
    flip(root / "style" / "adapter_model.safetensors", -8 * 20)
    with pytest.raises(InputError, match=r"adapter 'instruct': was trained on 'style' .* is now"):
        make_lock(stack(), before=before)
    flip(root / "instruct" / "adapter_model.safetensors", -8 * 20)
    after = make_lock(stack(), before=before)
    assert after["adapters"]["instruct"]["parent"] != before["adapters"]["instruct"]["parent"]


def test_same_files_give_the_same_lock(root):
    assert make_lock(stack()) == make_lock(stack())


@pytest.mark.parametrize("declared", ['["instruct"]', '["nobody"]', '"style"', "3"])
def test_parents_are_adapters_before_it_in_the_stack(root, declared):
    text = (root / "stack.toml").read_text().replace('["style"]', declared)
    (root / "stack.toml").write_text(text)
    with pytest.raises(InputError, match="parents"):
        stack()


def test_300_random_flips_of_one_bit_are_all_found(root):
    lock = root / "stack.lock.json"
    subject = stack()
    write_lock(lock, make_lock(subject))
    chance = random.Random(0)
    files = [root / name / file for name in ("style", "instruct")
             for file in ("adapter_config.json", "adapter_model.safetensors")]  # fmt: skip
    found = 0
    for _ in range(300):
        file = chance.choice(files)
        sound = file.read_bytes()
        flip(file, chance.randrange(8 * len(sound)))
        try:
            found += any(str(file) in str(fault) for fault in lock_faults(lock, subject))
        except InputError:  # the config cannot be read any more
            found += 1
        file.write_bytes(sound)
    assert found == 300
    assert lock_faults(lock, subject) == []


def test_untrained_adapter_is_refused_unless_declared(root, capsys):
    from harness.tests.hostile.folders import Folders

    at = Folders.__new__(Folders)
    at.weights = root / "style" / "adapter_model.safetensors"
    at.tensors(
        lambda t: t.update({n: (d, s, b"\0" * len(r)) for n, (d, s, r) in t.items() if "_B" in n})
    )
    assert main(["check-files", "--stack", "stack.toml"]) == 2
    assert "changes nothing" in capsys.readouterr().err
    text = (root / "stack.toml").read_text()
    (root / "stack.toml").write_text('untrained = ["style"]\n' + text)
    assert main(["check-files", "--stack", "stack.toml"]) == 0
    assert "14 of 14 modules change nothing" in capsys.readouterr().out
