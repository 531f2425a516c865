"""What must hold for any bytes: strictly refused, or read as the reference reads them.

The two targets of the fuzzer (`harness.tests.fuzz.drive`) and of the replay in the fast tests.
Knows nothing of the fuzzer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from harness.errors import InputError

__all__ = ["TARGETS", "check_header", "check_json", "file_of"]


def check_json(data: bytes, scratch: Path) -> bool:
    """Whether *data* was accepted as a JSON object; raises if it was accepted and is another.

    Raises:
        AssertionError: accepted, but the standard library reads something else, or a refusal that
            is not one line.
    """
    from harness.files.strict_json import parse_json_object

    try:
        found = parse_json_object(data, where="fuzz.json")
    except InputError as error:
        _one_line_a_fault(error)
        return False
    assert found == json.loads(data), "read as something else"
    json.dumps(found, allow_nan=False).encode()  # no NaN, no lone surrogate came through
    return True


def file_of(data: bytes) -> bytes:
    """The safetensors file that the fuzzer's *data* stands for.

    The first byte chooses: even, the rest is the file as it is; odd, the rest is a header and,
    after an empty line, the data, and the length of the header is put before it.
    """
    if not data or data[0] % 2 == 0:
        return data[1:]
    header, _, body = data[1:].partition(b"\n\n")
    return struct.pack("<Q", len(header)) + header + body


def check_header(data: bytes, scratch: Path) -> bool:
    """Whether `file_of(data)` was accepted as safetensors.

    Raises:
        AssertionError: accepted, but the format's own implementation refuses it or reads other
            names, dtypes, shapes or bytes.
    """
    import safetensors

    from harness.files.tensor_files import read_tensor_file

    content = file_of(data)
    path = scratch / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        found = read_tensor_file(path, what="the weights")
    except InputError as error:
        _one_line_a_fault(error)
        return False
    reference = dict(safetensors.deserialize(content))
    assert set(reference) == set(found.entries)
    for name, entry in found.entries.items():
        other = reference[name]
        assert (other["dtype"], tuple(other["shape"])) == (entry.dtype, entry.shape)
        assert bytes(other["data"]) == content[entry.start : entry.end]
    return True


def _one_line_a_fault(error: InputError) -> None:
    lines = str(error).split("\n")
    assert len(lines) <= 2 + len(error.faults), "a fault is one line"
    assert len(str(error)) < 40_000, "a message that nobody can read"


TARGETS: dict[str, Callable[[bytes, Path], bool]] = {
    "header": check_header,
    "json": check_json,
}
