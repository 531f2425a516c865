"""safetensors files: sound ones are read exactly, broken ones are named."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from harness.files.tensor_files import read_tensor_file, same_bytes


def written(path, header, data=b"", length=None):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int64", "uint8"]),
)
def test_tensors_are_those_that_safetensors_wrote(tmp_path_factory, shapes, dtype):
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensors = {
        f"t{n}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        for n, shape in enumerate(shapes)
    }
    save_file(tensors, path, metadata={"format": "pt"})
    read = read_tensor_file(path, what="weights")
    assert dict(read.metadata) == {"format": "pt"}
    assert set(read.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.tensor(name), tensor)


def test_changing_a_tensor_leaves_the_file_alone(tmp_path):
    path = written(tmp_path / "x.safetensors", {"a": entry()}, struct.pack("<f", 2.5))
    before = path.read_bytes()
    tensor = read_tensor_file(path, what="weights").tensor("a")
    tensor += 1
    assert (float(tensor), path.read_bytes()) == (3.5, before)


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(tmp_path, monkeypatch):
    path = written(tmp_path / "x", {"a": entry()}, b"\0" * 4)
    larger = written(tmp_path / "y", {"a": entry(), "b": entry(offsets=(4, 8))}, b"\0" * 8)
    real = Path.open

    def opened(self, *arguments, **named):
        file = real(self, *arguments, **named)
        larger.replace(path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        read = read_tensor_file(path, what="weights")
    assert set(read.entries) == {"a"}
    with pytest.raises(InputError, match="has changed since its header was read"):
        read.tensor("a")
    assert set(read_tensor_file(path, what="weights").entries) == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        ({"a": entry()}, b"", "ends at byte"),
        ({"a": entry()}, b"\0" * 8, "4 bytes after the last tensor"),
        ({"a": entry(offsets=(4, 8))}, b"\0" * 8, "follows a hole"),
        ({"a": entry(), "b": entry()}, b"\0" * 4, "overlaps"),
        ({"a": entry(shape=(2,))}, b"\0" * 4, "needs 8 bytes, its range holds 4"),
        ({"a": entry(dtype="F12")}, b"\0" * 4, "unknown dtype 'F12'"),
        ({"a": entry(shape=(-1,))}, b"\0" * 4, "not a list of sizes"),
        ({"a": entry(shape=(True,))}, b"\0" * 4, "not a list of sizes"),
        ({"a": entry(offsets=(4, 0))}, b"\0" * 4, "not a byte range"),
        ({"a": {"dtype": "F32"}}, b"", "is not {dtype, shape, data_offsets}"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b'{"__metadata__": {"a": 1}}', b"", "__metadata__"),
    ],
)
def test_lying_header_is_refused(tmp_path, header, data, complaint):
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=complaint):
        read_tensor_file(path, what="weights")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"PK\x03\x04" + b"\0" * 40, "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"", "an empty file"),
        (b"\xff" * 16, "claims"),
    ],
)
def test_other_formats_are_recognised(tmp_path, content, complaint):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_tensor_file(path, what="weights")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200))
def test_truncated_file_is_refused(tmp_path_factory, cut):
    whole = written(
        tmp_path_factory.mktemp("t") / "x.safetensors",
        {"a": entry(shape=(30,), offsets=(0, 120))},
        b"\0" * 120,
    )
    data = whole.read_bytes()
    if cut >= len(data):
        return
    whole.write_bytes(data[:cut])
    with pytest.raises(InputError):
        read_tensor_file(whole, what="weights")


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + bytes(4))
    assert list(read_tensor_file(path, what="weights").entries) == ["a"]


def test_tensor_that_is_not_there_is_said(tmp_path):
    path = written(tmp_path / "x.safetensors", {"a": entry()}, bytes(4))
    with pytest.raises(InputError, match=r"x\.safetensors: holds no tensor 'b'"):
        read_tensor_file(path, what="weights").tensor("b")


def test_tensor_that_begins_at_an_odd_byte_is_read(tmp_path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (1,), (1, 5))}
    text = json.dumps(header).encode()
    path = written(
        tmp_path / "x.safetensors",
        text.ljust(len(text) + -len(text) % 8),
        b"\7" + struct.pack("<f", 2.5),
    )
    assert read_tensor_file(path, what="weights").tensor("b").tolist() == [2.5]


def test_same_bytes_are_the_same_size_and_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.files.tensor_files._BLOCK_BYTES", 3)
    header = {"a": entry(), "b": entry("F32", (2,), (4, 12)), "c": entry("F32", (1,), (12, 16))}
    path = written(tmp_path / "x.safetensors", header, b"1234" + b"12341234" + b"1235")
    file = read_tensor_file(path, what="weights")
    a, b, c = (file.entries[name] for name in "abc")
    assert same_bytes(file, a, file, a)
    assert not same_bytes(file, a, file, b), "a prefix is not the same"
    assert not same_bytes(file, a, file, c), "the last byte counts"


def test_weights_that_the_disk_does_not_give_are_said(tmp_path, monkeypatch):
    path = written(tmp_path / "x.safetensors", {"a": entry()}, bytes(4))

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pathlib.Path.open", broken)
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be read: Input/output error"):
        read_tensor_file(path, what="weights")


def test_path_that_no_file_can_have_is_said(tmp_path):
    for path, complaint in (
        (tmp_path / ("a" * 300), "cannot be looked up: File name too long"),
        (tmp_path / "a\0b", "cannot be looked up: embedded null byte"),
        (tmp_path / "x" / "y", "weights is missing"),
    ):
        with pytest.raises(InputError, match=complaint):
            read_tensor_file(path, what="weights")


@pytest.mark.parametrize("kind", ["overlap", "beyond", "nonsense"])
def test_a_thousand_faults_are_enough(tmp_path, kind):
    """A hostile header can hold a million: each costs memory, and nobody reads them."""
    offsets = {"overlap": lambda n: (0, 4), "beyond": lambda n: (4 * n, 4 * n + 4)}
    header = {
        f"a{n}": 1 if kind == "nonsense" else entry(offsets=offsets[kind](n)) for n in range(1500)
    }
    path = written(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(InputError) as caught:
        read_tensor_file(path, what="weights")
    assert 1000 <= len(caught.value.faults) <= 1001
    if kind == "beyond":
        aside = []
        whole = read_tensor_file(path, what="weights", faults=aside)
        assert (list(whole.entries), len(aside)) == (["a0"], 1000)
