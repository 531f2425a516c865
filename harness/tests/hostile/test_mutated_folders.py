"""Folders that nobody thought of: mutated at random, they are refused, or the result is right.

Right means: the base in memory is the files', and the live stack's logits are those of a float64
model whose weights were computed from the same, mutated files; a merge holds those weights. What
may not happen is anything else: another exception, another number, a hang.
"""

import contextlib
import io
import json
import shutil
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError, InputError
from harness.tests.hostile.mutations import CHANGES

#: A change that finds no longer what it would change, because another one came first.
BROKEN = (
    ValueError, LookupError, AttributeError, TypeError, OSError, ArithmeticError, struct.error,
)  # fmt: skip


def test_there_are_30_kinds_of_change():
    assert len(CHANGES) >= 30


@contextlib.contextmanager
def mutated(sound, draw, *first):
    """A copy of *sound* after one to three changes, the *first* of them given or drawn too."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "case"
        shutil.copytree(sound, root)
        others = st.lists(st.sampled_from(sorted(CHANGES)), min_size=1 - len(first), max_size=2)
        for name in (*first, *draw(others)):
            with contextlib.suppress(*BROKEN):
                CHANGES[name](root, draw)
            event(f"change: {name}")
            if name == "replace":
                break  # what is a pipe or a device now is not for another change to read
        yield root


def arguments_of(root):
    return [
        "--base-model", str(root / "base"), "--style-adapter", str(root / "style"),
        "--instruct-adapter", str(root / "instruct"),
    ]  # fmt: skip


def loaded_is_refused_or_right(sound, draw, *first):
    from harness.tests.hostile.test_sound_corpus import largest_difference

    with mutated(sound, draw, *first) as root:
        refusal = None
        try:
            error, size = largest_difference(arguments_of(root))
        except HarnessError as told:
            refusal = told
        if refusal is None:
            event("right")
            assert error <= 1e-4 * max(1.0, size), f"{error} of {size}"
        elif isinstance(refusal, InputError):
            event("refused")
            assert all(str(root) in line for line in str(refusal).split("\n")[:20]), str(refusal)
        else:
            event("refused after loading")


def merge_is_refused_or_right(sound, draw, *first):
    """`merge` reads the files by itself: no model tells it what they mean."""
    from harness.cli import main

    with mutated(sound, draw, *first) as root:
        output = root.parent / "merged"
        words = ["merge", "--base", str(root / "base"), "--adapters", str(root / "style"),
                 str(root / "instruct"), "--output", str(output)]  # fmt: skip
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        event(f"merge: {code}")
        if code == 0:
            assert_merged(root, output)
        else:
            assert code == 2, told.getvalue()
            assert str(root) in told.getvalue()
            assert not output.exists()


def assert_merged(root, output):
    """Every tensor is the base's, or the float64 sum rounded to its dtype."""
    import torch

    from harness.adapter_files import read_adapter
    from harness.checkpoint_files import read_checkpoint
    from harness.lora import add_deltas

    base, merged = read_checkpoint(root / "base"), read_checkpoint(output)
    adapters = [read_adapter(root / name) for name in ("style", "instruct")]
    assert set(base.places) == set(merged.places)
    for name in base.places:
        module = name.removesuffix(".weight")
        terms = [(1.0, files.pair(module)) for files in adapters if module in files.pairs]
        held, plain = merged.tensor(name), base.tensor(name)
        if terms:
            exact = add_deltas(plain, terms)
            step = torch.finfo(plain.dtype).eps * exact.abs().max()
            assert (held.double() - exact).abs().max() <= 2 * step, name
        else:
            assert torch.equal(held.view(torch.uint8), plain.view(torch.uint8)), name


def command_is_refused_or_right(sound, draw, *first):
    """The commands that read files alone: they refuse, or finish; what is written is right."""
    from harness.cli import main
    from harness.tests.hostile.test_every_command import READS, words_of

    command = draw(st.sampled_from(sorted(set(READS) - {"merge"})))
    with mutated(sound, draw, *first) as root:
        output = root.parent / "output"
        folders = SimpleNamespace(
            base=root / "base",
            style=root / "style",
            instruct=root / "instruct",
            arguments=arguments_of(root),
        )
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(words_of(command, folders, output))
        event(f"{command}: {code}")
        if code == 2:
            lines = told.getvalue().rstrip("\n").split("\n")
            assert all(line.startswith("error: ") for line in lines), told.getvalue()
            assert str(root) in told.getvalue()
            assert not output.exists()
            return
        assert code in (0, 1), told.getvalue()
        assert output.exists() or (command == "lock" and code == 1)
        if command == "flatten":
            assert_flattened(root, output)
        elif command == "analyze":
            assert_analysed(root, output)


def assert_flattened(root, output):
    """Every module's delta is the float64 sum of the adapters'."""
    from harness.adapter_files import read_adapter

    adapters = [read_adapter(root / name) for name in ("style", "instruct")]
    flat = read_adapter(output)
    assert set(flat.pairs) == {module for files in adapters for module in files.pairs}
    for module in flat.pairs:
        exact = sum(dense(files, module) for files in adapters if module in files.pairs)
        assert (dense(flat, module) - exact).norm() <= 1e-5 * exact.norm() + 1e-30, module


def assert_analysed(root, output):
    """Every module's norm is its dense delta's."""
    from harness.adapter_files import read_adapter

    style = read_adapter(root / "style")
    norms = {
        module["module"]: module["norm_delta"]
        for module in json.loads((output / "analysis.json").read_text())["adapters"][0]["modules"]
    }
    assert set(norms) == set(style.pairs)
    for module, norm in norms.items():
        exact = float(dense(style, module).norm())
        assert abs(norm - exact) <= 1e-6 * exact + 1e-30, module


def dense(files, module):
    pair = files.pair(module)
    delta = pair.scale * (pair.b.double() @ pair.a.double())
    return delta.T if pair.transposed else delta


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("mutated")
    shutil.copytree(tiny.base, root / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, root / name)
    return root


_KEPT = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@settings(max_examples=30, **_KEPT)
@given(data=st.data())
def test_mutated_folder_is_refused_or_right(sound, data):
    loaded_is_refused_or_right(sound, data.draw)


@settings(max_examples=30, **_KEPT)
@given(data=st.data())
def test_merge_of_a_mutated_folder_is_refused_or_right(sound, data):
    merge_is_refused_or_right(sound, data.draw)


@settings(max_examples=30, **_KEPT)
@given(data=st.data())
def test_a_command_on_a_mutated_folder_refuses_or_is_right(sound, data):
    command_is_refused_or_right(sound, data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("first", CHANGES)
@settings(max_examples=8, **_KEPT)
@given(data=st.data())
def test_a_command_after_every_kind_of_change_refuses_or_is_right(sound, first, data):
    command_is_refused_or_right(sound, data.draw, first)


@pytest.mark.slow
@pytest.mark.parametrize("first", CHANGES)
@settings(max_examples=8, **_KEPT)
@given(data=st.data())
def test_every_kind_of_change_is_refused_or_right(sound, first, data):
    loaded_is_refused_or_right(sound, data.draw, first)


@pytest.mark.slow
@pytest.mark.parametrize("first", CHANGES)
@settings(max_examples=8, **_KEPT)
@given(data=st.data())
def test_merge_after_every_kind_of_change_is_refused_or_right(sound, first, data):
    merge_is_refused_or_right(sound, data.draw, first)
