"""Broken weights files of an adapter: id, the file and the words that the message must name."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from harness.tests.hostile.folders import A0, B0, WEIGHTS, Folders, write_header


def _entry(change: dict[str, Any]) -> Any:
    return lambda f: f.header(lambda h: h[A0].update(change))


def _replace(content: bytes) -> Any:
    return lambda f: f.bytes(f"style/{WEIGHTS}", content)


def _replace_by(make: Any) -> Any:
    def build(f: Folders) -> None:
        f.weights.unlink()
        make(f)

    return build


def _socket(f: Folders) -> None:
    here = Path.cwd()
    os.chdir(f.style)  # a socket's path may have a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(WEIGHTS)
    finally:
        os.chdir(here)


def _length(value: int) -> Any:
    def build(f: Folders) -> None:
        raw = f.weights.read_bytes()
        f.weights.write_bytes(value.to_bytes(8, "little") + raw[8:])

    return build


def _header_bytes(change: Any) -> Any:
    def build(f: Folders) -> None:
        raw = f.weights.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        write_header(f.weights, change(raw[8 : 8 + length]), raw[8 + length :])

    return build


def _twice(header: bytes) -> bytes:
    body = header.strip()
    return body[:-1] + b',"' + A0.encode() + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


def _swap_ranges(h: dict[str, Any]) -> None:
    up = B0.replace("self_attn.q_proj", "mlp.up_proj")
    h[A0]["data_offsets"], h[up]["data_offsets"] = h[up]["data_offsets"], h[A0]["data_offsets"]


def _shift(by: int) -> Any:
    def change(h: dict[str, Any]) -> None:
        names = [n for n in h if n != "__metadata__"]
        last = max(names, key=lambda n: h[n]["data_offsets"][0])
        h[last]["data_offsets"] = [n + by for n in h[last]["data_offsets"]]

    return lambda f: f.header(change)


def _pickle_file(f: Folders) -> None:
    f.weights.rename(f.style / "adapter_model.bin")


class _Canary:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {os.environ['CANARY']}",))


def _live_pickle(f: Folders) -> None:
    import pickle

    f.weights.write_bytes(pickle.dumps({"a": _Canary()}))


def _torch_zip(f: Folders) -> None:
    import pickle
    import zipfile

    with zipfile.ZipFile(f.weights, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": _Canary()}))


def _nest(f: Folders) -> None:
    inner = f.style / "checkpoint-90"
    inner.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (f.style / name).rename(inner / name)


WHOLE = WEIGHTS
ROWS: list[tuple[str, str, str, Any]] = [
    ("weights absent", WHOLE, "is missing", lambda f: f.weights.unlink()),
    ("weights are a pickle", "adapter_model.bin", "pickle", _pickle_file),
    ("live pickle renamed", WHOLE, "pickle", _live_pickle),
    ("torch zip renamed", WHOLE, "pickle", _torch_zip),
    ("plain zip", WHOLE, "zip archive", _replace(b"PK\x03\x04" + b"\0" * 300)),
    ("lfs pointer", WHOLE, "git lfs pull",
     _replace(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    ("html page", WHOLE, "HTML page", _replace(b"<!DOCTYPE html><html>login</html>")),
    ("html after blank lines", WHOLE, "HTML page", _replace(b"\n\n <html><body>404")),
    ("xml error", WHOLE, "HTML page", _replace(b'<?xml version="1.0"?><Error>NoSuchKey')),
    ("json error", WHOLE, "JSON text", _replace(b'{"error":"Repository not found"}')),
    ("gguf", WHOLE, "GGUF", _replace(b"GGUF\x03\0\0\0" + b"\0" * 100)),
    ("gzip", WHOLE, "gzip", _replace(b"\x1f\x8b\x08" + b"\0" * 100)),
    ("tar", WHOLE, "tar archive", _replace(b"a" * 257 + b"ustar" + b"\0" * 300)),
    ("hdf5", WHOLE, "HDF5", _replace(b"\x89HDF\r\n\x1a\n" + b"\0" * 100)),
    ("numpy", WHOLE, "NumPy", _replace(b"\x93NUMPY\x01\0" + b"\0" * 100)),
    ("elf", WHOLE, "a program", _replace(b"\x7fELF\x02\x01\x01" + b"\0" * 100)),
    ("empty file", WHOLE, "empty file", _replace(b"")),
    ("five bytes", WHOLE, "5 bytes", _replace(b"12345")),
    ("zeros only", WHOLE, "never written", _replace(b"\0" * 4096)),
    ("header length 2^64-1", WHOLE, "header claims", _length(2**64 - 1)),
    ("header length 0", WHOLE, "line 1, column 1", _length(0)),
    ("header length one short", WHOLE, "1 bytes after", lambda f: _length(_len(f) - 1)(f)),
    ("header length past the end", WHOLE, "header claims",
     lambda f: _length(f.weights.stat().st_size)(f)),
    ("header is a list", WHOLE, "a list, not an object", _header_bytes(lambda h: b"[]")),
    ("header is not utf-8", WHOLE, "not UTF-8", _header_bytes(lambda h: b"\xff" + h[1:])),
    ("header has a bom", WHOLE, "byte-order mark", _header_bytes(lambda h: b"\xef\xbb\xbf" + h)),
    ("tensor named twice", WHOLE, A0, _header_bytes(_twice)),
    ("header with NaN", WHOLE, "NaN", _header_bytes(lambda h: h.rstrip()[:-1] + b',"x":NaN}')),
    ("header a thousand deep", WHOLE, "levels deep",
     _header_bytes(lambda h: b'{"x":' + b"[" * 1000 + b"]" * 1000 + b"}")),
    ("header 100,000 deep", WHOLE, "levels deep",
     _header_bytes(lambda h: b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    ("header of 7 million lists", WHOLE, "lists and objects",
     _header_bytes(lambda h: b'{"x":[' + b"[]," * 5_000_000 + b"[]]}")),
    ("metadata of numbers", WHOLE, "__metadata__",
     lambda f: f.header(lambda h: h.update(__metadata__={"a": 1}))),
    ("metadata a list", WHOLE, "__metadata__",
     lambda f: f.header(lambda h: h.update(__metadata__=[]))),
    ("unknown dtype", WHOLE, A0, _entry({"dtype": "F31"})),
    ("dtype a list", WHOLE, A0, _entry({"dtype": ["F32"]})),
    ("shape negative", WHOLE, A0, _entry({"shape": [-4, 32]})),
    ("shape of floats", WHOLE, A0, _entry({"shape": [4.0, 32.0]})),
    ("shape of booleans", WHOLE, A0, _entry({"shape": [True, 128]})),
    ("shape a string", WHOLE, A0, _entry({"shape": "4x32"})),
    ("shape beyond memory", WHOLE, A0, _entry({"shape": [2**40, 2**40]})),
    ("shape of thousands of digits", WHOLE, A0, _entry({"shape": [10**4000, 4]})),
    ("shape of a thousand dimensions", WHOLE, A0, _entry({"shape": [1] * 1000})),
    ("shape against bytes", WHOLE, A0, _entry({"shape": [5, 32]})),
    ("offsets backwards", WHOLE, A0, _entry({"data_offsets": [512, 0]})),
    ("offsets of three", WHOLE, A0, _entry({"data_offsets": [0, 256, 512]})),
    ("offsets negative", WHOLE, A0, _entry({"data_offsets": [-512, 0]})),
    ("offsets of floats", WHOLE, A0, _entry({"data_offsets": [0.0, 512.0]})),
    ("entry with one more key", WHOLE, A0, _entry({"extra": 1})),
    ("100,000 entries of nothing", WHOLE, "'a99'",
     _header_bytes(lambda _: json.dumps({f"a{n}": 1 for n in range(100_000)}).encode())),
    ("a name of 600 characters", WHOLE, "more than 500 characters",
     lambda f: f.header(lambda h: h.update({"n" * 600: h.pop(A0)}))),
    ("a name of 40 parts", WHOLE, "32 parts",
     lambda f: f.header(lambda h: h.update({"n." * 40: h.pop(A0)}))),
    ("entry a number", WHOLE, A0, lambda f: f.header(lambda h: h.update({A0: 3}))),
    ("ranges swapped", WHOLE, "needs", lambda f: f.header(_swap_ranges)),
    ("overlap", WHOLE, "overlaps", _shift(-64)),
    ("hole", WHOLE, "hole", _shift(64)),
    ("trailing bytes", WHOLE, "64 bytes after",
     lambda f: f.weights.write_bytes(f.weights.read_bytes() + b"\0" * 64)),
    ("truncated in the data", WHOLE, "ends at byte",
     lambda f: f.weights.write_bytes(f.weights.read_bytes()[:-100])),
    ("truncated in the header", WHOLE, "header claims",
     lambda f: f.weights.write_bytes(f.weights.read_bytes()[:100])),
    ("weights a folder", WHOLE, "a folder", _replace_by(lambda f: f.weights.mkdir())),
    ("weights a pipe", WHOLE, "named pipe", _replace_by(lambda f: os.mkfifo(f.weights))),
    ("weights a socket", WHOLE, "a socket", _replace_by(_socket)),
    ("weights a link to nowhere", WHOLE, "points nowhere",
     _replace_by(lambda f: f.weights.symlink_to("nowhere"))),
    ("weights a link to itself", WHOLE, "points nowhere",
     _replace_by(lambda f: f.weights.symlink_to(WEIGHTS))),
    ("weights /dev/zero", WHOLE, "a device",
     _replace_by(lambda f: f.weights.symlink_to("/dev/zero"))),
    ("weights /proc/kmsg", WHOLE, "the system's",
     _replace_by(lambda f: f.weights.symlink_to("/proc/kmsg"))),
    ("a folder too high", "style", "checkpoint-90", _nest),
]  # fmt: skip


def _len(f: Folders) -> int:
    return int.from_bytes(f.weights.read_bytes()[:8], "little")
