"""Copies of the embedded trained stack to plant faults in. torch comes when a test asks for it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.embedded import embedded_folder

EXPECTED = {"stops": "always", "max_overrun": 0, "loops": False}


@dataclass(frozen=True)
class Copy:
    """A copy of the embedded stack in folders of its own."""

    root: Path

    @property
    def base(self):
        return self.root / "base"

    def change(self, file, **values):
        """Set keys of a JSON file, named from the root."""
        path = self.root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def stack(self, *modes):
        from harness.resolve import resolve_stack

        return resolve_stack(
            base_model=self.base,
            adapters={name: self.root / name for name in ("style", "instruct")},
            modes=modes or None,
        )


@pytest.fixture
def stack_copy(tmp_path):
    stages = embedded_folder() / "stages"
    root = tmp_path / "stack"
    shutil.copytree(stages / "base", root / "base")
    shutil.copytree(stages / "stage1_style_injection" / "checkpoint-120", root / "style")
    shutil.copytree(stages / "stage2_instruct_new_adapter", root / "instruct")
    return Copy(root)


@pytest.fixture(scope="session")
def held_out():
    from harness.preset import load_preset

    return load_preset("held_out")


@pytest.fixture(scope="session")
def embedded_engine():
    """The embedded stack, loaded. Not to be left changed."""
    from harness.engines import load_engine
    from harness.resolve import StackOptions, stack_from_options

    with load_engine(stack_from_options(StackOptions()), device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture
def examine(held_out):
    """`examine(copy)`: the report on a copy's stacked mode, which should stop at once."""

    def run(copy, *, prompts=12, max_new_tokens=None, **arguments):
        from harness.engines import load_engine
        from harness.stopping import examine_stopping

        settings = held_out.with_settings(max_new_tokens=max_new_tokens).settings
        with load_engine(copy.stack("stacked"), device="cpu", dtype="float32") as engine:
            return examine_stopping(
                engine,
                prompts=held_out.prompts[:prompts],
                settings=settings,
                stops={"stacked": EXPECTED},
                **arguments,
            )

    return run
