"""docs/review.md: its commands run, and it names every option, key and exit code."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from harness.cli import main
from harness.commands import review
from harness.tests.review.factory import a_grid

PAGE = Path(__file__).parents[3] / "docs" / "review.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    words = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [line[1:] for line in words if line[0] == "lora-stack"]


def test_every_command_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(commands()) >= 7
    for number, command in enumerate(commands()):
        monkeypatch.chdir(a_grid(tmp_path / str(number)))
        refused = command.count("*") == 1 and "--reject" in command
        assert main(command) == (2 if refused else 1), command


def test_every_option_is_named():
    parser = argparse.ArgumentParser(add_help=False)
    review.add_arguments(parser)
    text = PAGE.read_text(encoding="utf-8")
    options = [action.option_strings[0] for action in parser._actions]
    assert len(options) == 8
    assert not [option for option in options if option not in text]
