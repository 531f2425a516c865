"""safetensors files: the header read by hand, the tensors as views of the mapped file.

Follows the format's specification (https://huggingface.co/docs/safetensors): eight bytes of
little-endian header length, a JSON header, then the data. Reading the header needs no torch,
so that a broken file is named in milliseconds; `TensorFile.tensor` imports it when first asked.
Knows nothing of adapters or checkpoints.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, combined, enough, gathering, quoted
from harness.files.file_kinds import foreign_format, regular_file
from harness.files.strict_json import MAX_JSON_BYTES, parse_json_object

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BYTES",
    "TensorEntry",
    "TensorFile",
    "read_tensor_file",
    "same_bytes",
    "torch_dtype",
]

#: Bytes an element, by safetensors dtype name.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

_BLOCK_BYTES = 1 << 24
_MAX_HEADER_BYTES = MAX_JSON_BYTES  # a tenth of the reference's limit; 100,000 tensors fit
_MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 48
_LONGEST_NAME, _MOST_PARTS = 500, 32  # what bounds the work with names: the longest in use have 120


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: its dtype's safetensors name, shape and byte range in the data.

    `start` and `end` count from the beginning of the *file*.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file whose header has been read and found sound.

    Attributes:
        entries: the tensors by name, in the order in which they lie in the file.
        data_start: where the data begins, in bytes from the start of the file.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    _mapped: list[mmap.mmap] = field(default_factory=list, repr=False, compare=False)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor *name* as a view of the memory-mapped file; no bytes are copied.

        The mapping is private (copy on write): changing the tensor never changes the file.

        Raises:
            InputError: the file holds no such tensor, or has got another size.
        """
        import torch

        entry = self.entries.get(name)
        if entry is None:
            raise InputError(f"holds no tensor {name!r}", where=self.path)
        dtype = torch_dtype(entry.dtype)
        if entry.count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if not self._mapped:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise InputError(
                        "has changed since its header was read",
                        where=self.path,
                        remedy="run again when nothing writes there",
                    )
                self._mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        flat = torch.frombuffer(
            self._mapped[0], dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start
        )
        if entry.start % DTYPE_BYTES[entry.dtype]:
            flat = flat.clone()  # the format does not promise alignment
        return flat.view(dtype).reshape(entry.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name such as `BF16`."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def same_bytes(
    first_file: TensorFile, first: TensorEntry, second_file: TensorFile, second: TensorEntry
) -> bool:
    """Whether two stored tensors are the same bytes; read in blocks, without torch."""
    if first.end - first.start != second.end - second.start:
        return False
    with first_file.path.open("rb") as a, second_file.path.open("rb") as b:
        a.seek(first.start)
        b.seek(second.start)
        left = first.end - first.start
        while left:
            size = min(left, _BLOCK_BYTES)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def read_tensor_file(
    path: Path,
    *,
    what: str,
    remedy: str | None = None,
    faults: list[InputError] | None = None,
) -> TensorFile:
    """Read and check the header of a safetensors file.

    Args:
        faults: where the file is cut off, the tensors beyond its end are left out and their
            faults added here, instead of raised.

    Raises:
        InputError: the file is missing, no regular file, or something else (a Git-LFS pointer, an
            HTML page, a pickle, an archive); or its header lies: length, UTF-8, duplicate names,
            unknown dtypes, shapes against byte ranges, overlaps, holes, trailing or missing
            bytes. All faults of the header at once.
    """
    regular_file(path, what=what, remedy=remedy)
    header, length, size = _read_header(path, remedy)
    metadata = header.pop("__metadata__", {})
    found: list[InputError] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found.append(
            InputError(
                "__metadata__: is not a table of strings", where=path, remedy="save the file again"
            )
        )
    data_start = 8 + length
    entries = []
    for name, value in header.items():
        if enough(found):
            break
        with gathering(found):
            entries.append(_entry(name, value, data_start, path))
    if not found:  # a tensor left out would look like a hole
        entries.sort(key=lambda entry: (entry.start, entry.end))
        entries = _check_ranges(entries, data_start, size, path, found, faults)
    if found:
        raise combined(found)
    return TensorFile(
        path=path,
        entries={entry.name: entry for entry in entries},
        metadata=metadata,
        data_start=data_start,
        size=size,
    )


def _read_header(path: Path, remedy: str | None) -> tuple[dict[str, Any], int, int]:
    """The header, its length, and the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # of this file, whatever lies there by now
            head = file.read(1024)
            if (foreign := foreign_format(head, size)) is not None:
                kind, advice = foreign
                raise InputError(f"is {kind}", where=path, remedy=advice)
            if size < 8:
                raise InputError(
                    f"has {size} bytes, too few for safetensors",
                    where=path,
                    remedy=remedy or "copy or save it again",
                )
            (length,) = struct.unpack("<Q", head[:8])
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise InputError(
                    f"its header claims {length} bytes, the file has {size}",
                    where=path,
                    remedy=remedy or "it is truncated or corrupt: copy or save it again",
                )
            file.seek(8)
            return parse_json_object(file.read(length).rstrip(b" "), where=path), length, size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error


def _entry(name: str, value: Any, data_start: int, path: Path) -> TensorEntry:
    def refuse(fault: str) -> InputError:
        return InputError(
            f"tensor {quoted(name)}: {fault}", where=path, remedy="save the file again"
        )

    if len(name) > _LONGEST_NAME or name.count(".") >= _MOST_PARTS:
        raise refuse(f"its name has more than {_LONGEST_NAME} characters, or {_MOST_PARTS} parts")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("its header entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refuse(f"unknown dtype {quoted(dtype)}")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refuse(f"shape {quoted(shape)} is not a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {quoted(offsets)} is not a byte range")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise refuse(
            f"shape {shape} of {dtype} needs {expected} bytes, its range holds "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        end=data_start + offsets[1],
    )


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX_SIZE for n in value)


def _check_ranges(
    entries: list[TensorEntry],
    data_start: int,
    size: int,
    path: Path,
    found: list[InputError],
    beyond: list[InputError] | None,
) -> list[TensorEntry]:
    """The entries that lie in the file. Faults go to *found*; those of tensors beyond the file's
    end to *beyond* if there is such a list."""

    def fault(text: str) -> InputError:
        return InputError(
            text, where=path, remedy="it is truncated or corrupt: copy or save it again"
        )

    position = data_start
    whole = []
    for entry in entries:
        if enough(found) or enough(beyond or ()):
            break
        name = f"tensor {quoted(entry.name)}"
        if entry.end > size:
            text = f"{name}: ends at byte {entry.end}, the file has {size}"
            (found if beyond is None else beyond).append(fault(text))
        else:
            whole.append(entry)
        if entry.start < position:
            text = f"begins at byte {entry.start} and overlaps the one before it, to {position}"
            found.append(fault(f"{name}: {text}"))
        elif entry.start > position:
            text = f"begins at byte {entry.start} and follows a hole from {position}"
            found.append(fault(f"{name}: {text}"))
        position = max(position, entry.end)
    if position < size:
        found.append(fault(f"{size - position} bytes after the last tensor"))
    return whole
