"""Names that lead nowhere, or where nobody meant: given to every option that takes a path, each is
a line that says so."""

import os
import shutil

import pytest

from harness.cli import main

_LONG = "x" * 300
ODD = {
    "a link in a circle": "circle",
    "below a link in a circle": "circle/base",
    "a link to nowhere": "nowhere",
    "an unknown user's home": "~nobody-of-this-name/base",
    "a name too long": _LONG,
    "below a name too long": f"{_LONG}/base",
    "a pipe": "pipe",
    "a device": "/dev/null",
    "a file of the system's": "/proc/self/mem",
    "below a file": "file/base",
    "nothing": "",
    "a line break": "a\nb",
    "half a character": os.fsdecode(b"a\xff"),
    "a bidirectional mark": "a\u202eb",
    "the root": "/",
}
#: A command line by what the odd path is; `{}` stands for it.
GIVEN = {
    "an adapter of a stack": "check-files --base-model base --lora-model {}",
    "a base": "check-files --base-model {} --lora-model style",
    "a declaration": "check-files --stack {}",
    "a lock": "check-files --base-model base --lora-model style --lock {}",
    "a folder": "check-files {}",
    "a lock to write": "lock --base-model base --lora-model style --lock {}",
    "a base to merge into": "merge --base {} --adapters style --output out",
    "an adapter to merge": "merge --base base --adapters style {} --output out",
    "a merge's output": "merge --base base --adapters style --output {}",
    "an adapter to flatten": "flatten --adapters style {} --output out",
    "a flattened adapter's output": "flatten --adapters style --output {}",
    "an adapter to analyse": "analyze {} --output out",
    "a base to analyse against": "analyze style --base-model {} --output out",
    "an analysis' output": "analyze style --no-plots --output {}",
    "an adapter to compare": "compare style {} --output out",
    "prompts": "run --base-model base --lora-model style --prompts {}",
    "a preset": "run --base-model base --lora-model style --preset {}",
    "a run's output": "run --base-model base --lora-model style --output {}",
    "a merged copy": "stopping --files-only --base-model base --lora-model style --merged {}",
    "training data": "stopping --files-only --base-model base --lora-model style --dataset {}",
    "a root of records": "review --root {}",
    "a shape": "bench --base-model random:{} --output out",
    "a result to compare with": "bench --base-model base --lora-model style --against {}",
}
#: Names that a new file may well have.
_NAMES = ("an unknown user's home", "a line break", "half a character", "a bidirectional mark")


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapters["style"], tmp_path / "style")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("no-such-place")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_path_is_refused_in_a_line_wherever_it_is_given(place, capsys, odd):
    before = sorted(place.rglob("*"))
    for what, line in GIVEN.items():
        if odd in _NAMES and ("output" in what or "to write" in what):
            continue
        code = main([word.replace("{}", ODD[odd]) for word in line.split(" ")])
        told = capsys.readouterr()
        nothing_recorded = (odd, what) == ("the root", "a root of records")
        assert code == (5 if nothing_recorded else 2), f"{what}: {told}"
        lines = told.err.rstrip("\n").split("\n")
        assert all(line.startswith("error: ") for line in lines), f"{what}: {told.err}"
        assert told.err.replace("\n", "").replace("\u200b", "").isprintable()
        assert told.out == ""
        assert sorted(place.rglob("*")) == before, what


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["run", "--base-model", "base", "--lora-model", ""], "--lora-model"),
        (["run", "--lora_model="], "--lora-model"),
        (["run", "--stack", ""], "--stack"),
        (["merge", "--base", "base", "--adapters", "style", "", "--output", "o"], "--adapters"),
        (["check-files", ""], "an argument"),
    ],
)
def test_an_option_of_an_unset_variable_is_no_other_stack(place, capsys, words, option):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}: is empty, as of a variable")


@pytest.mark.parametrize("option", ["--lora-model", "--stack", "--preset", "--lock", "--modes"])
def test_pytest_takes_no_option_of_an_unset_variable_for_the_standing_stack(pytester, option):
    pytester.makepyfile("def test_one(): pass")
    result = pytester.runpytest(f"{option}=")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{option}: is empty, as of a variable that is not set*"])
