"""Which adapters are merged, with what factor, in which order, and their factors as arrays.

The order is canonical (by the contents' SHA-256), so that no relabelling and no order on the
command line can change a bit of the result. Reads safetensors with numpy alone. Knows nothing of
bases, strategies' arithmetic or outputs.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.adapter_files import AdapterFiles, adapter_digest, read_adapter
from harness.errors import InputError, combined
from harness.merge.storage import RAW, decode
from harness.preflight import check_adapter_values
from harness.stack import Adapter
from harness.tensor_files import TensorEntry

__all__ = ["Source", "Term", "adapter_names", "check_weights", "open_sources", "terms_by_module"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One adapter of a merge.

    Attributes:
        weight: what its deltas are multiplied with.
        digest: SHA-256 of its config and weights.
    """

    name: str
    files: AdapterFiles
    weight: float
    digest: str
    data: mmap.mmap

    def array(self, entry: TensorEntry, dtype: type[np.floating[Any]]) -> Array:
        """The tensor of *entry* as numbers of *dtype*; a read-only view where that is possible."""
        raw = np.frombuffer(self.data, np.uint8, entry.end - entry.start, entry.start)
        kind = np.dtype(RAW[entry.dtype])
        aligned = raw if entry.start % kind.itemsize == 0 else raw.copy()
        numbers = aligned.view(kind).reshape(entry.shape)
        return numbers if kind == dtype else decode(numbers, entry.dtype, dtype)

    def release(self, entry: TensorEntry) -> None:
        """Give the pages of *entry* back; they are read again from the file when needed."""
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one adapter adds to one weight: `weight · scale · left @ right`.

    `left: (rows, r)` and `right: (r, columns)` in the stored weight's own layout; for embeddings
    and `Conv1D` that is Aᵀ and Bᵀ.
    """

    source: Source
    module: str

    @property
    def scale(self) -> float:
        """`s` of the module (`alpha/r`, or `alpha/√r`)."""
        return self.source.files.config.scale_of(self.module)

    @property
    def rank(self) -> int:
        return self.source.files.pairs[self.module].rank

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is `(in, out)`."""
        files = self.source.files
        return files.config.fan_in_fan_out or files.pairs[self.module].embedding

    def release(self) -> None:
        """Give the factors' pages back: memory stays flat however large the adapters are."""
        pair = self.source.files.pairs[self.module]
        self.source.release(pair.a)
        self.source.release(pair.b)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the stored weight that the term belongs to."""
        pair = self.source.files.pairs[self.module]
        shape = (pair.out_features, pair.in_features)
        return shape[::-1] if self.transposed else shape

    def left(self, dtype: type[np.floating[Any]], rows: slice = slice(None)) -> Array:
        """The left factor's *rows*, without scale or weight; not to be written to."""
        pair = self.source.files.pairs[self.module]
        entry = pair.a if self.transposed else pair.b
        whole = self.source.array(entry, dtype)
        return (whole.T if self.transposed else whole)[rows]

    def right(self, dtype: type[np.floating[Any]]) -> Array:
        """The right factor, without scale or weight; not to be written to."""
        pair = self.source.files.pairs[self.module]
        whole = self.source.array(pair.b if self.transposed else pair.a, dtype)
        return whole.T if self.transposed else whole


def adapter_names(paths: Sequence[str | Path]) -> dict[str, str]:
    """A name for each adapter folder, made of its path: `style`, `stage1-checkpoint-120`, …"""
    named: dict[str, str] = {}
    for number, source in enumerate(paths, start=1):
        path = Path(source)
        name = _slug(path.name)
        if name.startswith("checkpoint") and path.parent.name:
            name = _slug(f"{path.parent.name}-{name}")
        if not name or name in named or name in ("base", "stacked", "all", "none"):
            name = f"adapter{number}"
        named[name] = str(source)
    return named


def _slug(text: str) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in text)
    plain = plain.strip("-_")
    return plain if plain[:1].isalpha() else ""


def check_weights(
    weights: Sequence[float] | None, names: Sequence[str], *, where: str = "--weights"
) -> tuple[float, ...]:
    """One finite weight an adapter, in the order of *names*; 1 each if None.

    Raises:
        InputError: another number of weights than adapters, or NaN or infinity among them.
    """
    if weights is None:
        return (1.0,) * len(names)
    if len(weights) != len(names):
        raise InputError(
            f"{len(weights)} weights for {len(names)} adapters",
            where=where,
            remedy="give one number an adapter, in the order of --adapters",
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise InputError(
                f"{weight} for {name} is not a finite number", where=where, remedy="e.g. 0.7 0.3"
            )
    return tuple(float(weight) for weight in weights)


def open_sources(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Source, ...]:
    """Open the adapters, in canonical order, and check that every number in them is finite.

    Raises:
        InputError: a broken or non-additive adapter; NaN, infinity or an absurd size in a factor;
            an adapter that changes nothing.
    """
    sources = []
    faults: list[InputError] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        files = read_adapter(adapter.path)
        check_adapter_values(files, faults)
        if files.config.not_additive:
            raise InputError(
                f"cannot be merged: {files.config.not_additive[0]}",
                where=files.config.path,
                remedy="only plain LoRA and rsLoRA adapters are additive",
            )
        with files.tensors.path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        source = Source(
            name=adapter.name,
            files=files,
            weight=weight,
            digest=adapter_digest(adapter.path),
            data=data,
        )
        sources.append(source)
    if faults:
        raise combined(faults)
    return tuple(sorted(sources, key=lambda source: (source.digest, source.weight)))


def terms_by_module(sources: Sequence[Source]) -> Mapping[str, tuple[Term, ...]]:
    """The terms of every adapted module, in the sources' order."""
    found: dict[str, list[Term]] = {}
    for source in sources:
        for module in source.files.pairs:
            found.setdefault(module, []).append(Term(source=source, module=module))
    return {module: tuple(terms) for module, terms in found.items()}
