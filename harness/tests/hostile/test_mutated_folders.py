"""Folders that nobody thought of: mutated at random, they are refused, or the result is right.

Right means: the live stack's logits are those of a float64 model whose weights were computed from
the same, mutated files. What may not happen is anything else: another exception, or other logits.
"""

import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError, InputError
from harness.tests.hostile.folders import CONFIG, WEIGHTS, read_header, write_header

FILES = (
    f"style/{CONFIG}", f"style/{WEIGHTS}", f"instruct/{CONFIG}", f"instruct/{WEIGHTS}",
    "base/config.json", "base/model.safetensors", "base/generation_config.json",
)  # fmt: skip
VALUES = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 4.0, 0.5, 1e30, 10**12, "", "4", "false", "q_proj", [], {},
     [0], [1], ["q_proj"], ["down_proj", "q_proj"], {"q_proj": 2}, {"down_proj": 16}, "all-linear",
     r".*\.(q|v)_proj", "none", "gaussian", "../base", "../instruct"]
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I32", "I8", "U8", "F8_E4M3", "BOOL", "X")


def flip(path, draw):
    raw = bytearray(path.read_bytes())
    bit = draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def truncate(path, draw):
    raw = path.read_bytes()
    path.write_bytes(raw[: draw(st.integers(0, len(raw) - 1))])


def extend(path, draw):
    path.write_bytes(path.read_bytes() + draw(st.binary(min_size=1, max_size=64)))


def drop(path, draw):
    """A key of the JSON, a tensor of the weights, or the file."""
    if path.suffix == ".json":
        raw = json.loads(path.read_text())
        raw.pop(draw(st.sampled_from(sorted(raw))))
        path.write_text(json.dumps(raw))
    elif draw(st.booleans()):
        header, data = read_header(path)
        header.pop(draw(st.sampled_from(sorted(header))))
        write_header(path, header, data)
    else:
        path.unlink()


def repeat(path, draw):
    """A key twice in one object."""
    if path.suffix == ".json":
        text = path.read_text().rstrip()
        key = draw(st.sampled_from(sorted(json.loads(text))))
        path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw(VALUES))}}}")
    else:
        header, data = read_header(path)
        key = draw(st.sampled_from(sorted(header)))
        text = json.dumps(header)
        write_header(
            path, f"{text[:-1]}, {json.dumps(key)}: {json.dumps(header[key])}}}".encode(), data
        )


def retype(path, draw):
    """Another value for a key, or another dtype, shape or place for a tensor."""
    if path.suffix == ".json":
        raw = json.loads(path.read_text())
        raw[draw(st.sampled_from(sorted(raw)))] = draw(VALUES)
        path.write_text(json.dumps(raw))
        return
    header, data = read_header(path)
    entry = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    kind = draw(st.sampled_from(["dtype", "shape", "offsets", "name"]))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        entry["shape"] = draw(st.sampled_from([entry["shape"][::-1], [*entry["shape"], 1], [0]]))
    elif kind == "offsets":
        other = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        entry["data_offsets"] = other["data_offsets"]
    else:
        names = sorted(set(header) - {"__metadata__"})
        one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        header[one], header[two] = header[two], header[one]
    write_header(path, header, data)


def exchange(path, draw):
    """Another file of the stack in its place."""
    other = path.parent.parent / draw(st.sampled_from(FILES))
    shutil.copy(other, path.with_suffix(".x"))
    path.with_suffix(".x").replace(path)


CHANGES = (flip, truncate, extend, drop, repeat, retype, exchange)


def refused_or_right(sound, draw):
    from harness.tests.hostile.test_sound_corpus import largest_difference

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "case"
        shutil.copytree(sound, root)
        for _ in range(draw(st.integers(1, 2))):
            change = draw(st.sampled_from(CHANGES))
            path = root / draw(st.sampled_from(FILES))
            if path.exists() and path.stat().st_size:
                try:
                    change(path, draw)
                except (struct.error, ValueError, KeyError, AttributeError, TypeError, IndexError):
                    continue  # the first change broke what the second one reads
        arguments = [
            "--base-model", str(root / "base"), "--style-adapter", str(root / "style"),
            "--instruct-adapter", str(root / "instruct"),
        ]  # fmt: skip
        refusal = None
        try:
            error, size = largest_difference(arguments)
        except HarnessError as told:
            refusal = told
        if refusal is None:
            event("right")
            assert error <= 1e-4 * max(1.0, size), f"{error} of {size}"
        elif isinstance(refusal, InputError):
            event("refused")
            assert str(root) in str(refusal), "the message names no file"
        else:
            event("refused after loading")


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
    "derandomize": True,
    "print_blob": True,
}


@settings(max_examples=25, **_KEPT)
@given(data=st.data())
def test_mutated_folder_is_refused_or_right(sound, data):
    refused_or_right(sound, data.draw)


@pytest.mark.slow
@settings(max_examples=250, **(_KEPT | {"derandomize": False}))
@given(data=st.data())
def test_250_more_mutated_folders_are_refused_or_right(sound, data):
    refused_or_right(sound, data.draw)
