"""How the entries of a tensor are distributed, counted exactly in 65,536 fixed bins.

A bin is the upper half of a float32's bit pattern: sign, exponent and seven bits of mantissa, 128
bins an octave. bfloat16 entries fall on bins one to one, so their counts lose nothing; float16 and
float32 entries are placed to within 1/128 of their size. As the bins never depend on the data,
counts of different modules, layers and adapters add up and compare. NaN and infinities have bins
of their own.

The entries of `ΔW` are counted on seeded blocks of random rows × random columns, never on the
whole matrix at once, or exactly in blocks of rows where asked. Knows nothing of files or adapters.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from harness.lora import LoraPair

__all__ = ["EntryCounts", "count_entries", "delta_blocks", "delta_counts", "sum_counts"]

Array: TypeAlias = NDArray[np.float64]

_BINS = 1 << 16
_SAMPLE_BLOCKS, _SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 64, 256
_EXACT_ROWS = 128
_ERROR_BINS = _BINS >> 6

# The float32 value of each bin's lower end; the halves are mirrored, and 0x7F80/0xFF80 are the
# infinities, with NaN above them.
_PATTERNS = np.arange(_BINS, dtype=np.uint32)
_LOWER = (_PATTERNS << 16).view(np.float32)
_ORDER = np.concatenate([np.arange(0xFF80, 0x7FFF, -1), np.arange(0x0000, 0x7F81)])
_NAN = np.concatenate([np.arange(0x7F81, 0x8000), np.arange(0xFF81, _BINS)])
_INFINITE = np.array([0x7F80, 0xFF80])


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryCounts:
    """Counts of entries by bin.

    Attributes:
        counts: `(65536,)` int64, by the upper 16 bits of the float32 pattern.
        exact: every entry was counted; otherwise a sample was.
        standard_error: for a sample, the largest standard error of the distribution function
            over the bins, from the spread between independent blocks; 0 if exact.
    """

    counts: NDArray[np.int64]
    exact: bool = True
    standard_error: float = 0.0

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def nan(self) -> int:
        return int(self.counts[_NAN].sum())

    @property
    def infinite(self) -> int:
        return int(self.counts[_INFINITE].sum())

    @property
    def zero(self) -> int:
        return int(self.counts[0] + self.counts[0x8000])

    def quantile(self, share: float) -> float:
        """The smallest bin value below which at least *share* of the finite entries lie."""
        ordered = self.counts[_ORDER]
        reached = np.searchsorted(np.cumsum(ordered), share * ordered.sum())
        return float(_LOWER[_ORDER[min(int(reached), len(_ORDER) - 1)]])

    def magnitude_quantiles(self, *shares: float) -> tuple[float, ...]:
        """As `quantile`, of the absolute values; one for each of *shares*."""
        summed = np.cumsum(self.counts[:0x7F80] + self.counts[0x8000:0xFF80])
        reached = np.searchsorted(summed, np.asarray(shares) * summed[-1])
        return tuple(_LOWER[np.minimum(reached, 0x7F7F)].tolist())

    def histogram(self, edges: Array) -> Array:
        """Density over *edges* (ascending, linear scale); a bin is put at its middle."""
        middles = _middles()[_ORDER]
        return _density(middles, self.counts[_ORDER], edges)

    def magnitude_histogram(self, edges: Array) -> Array:
        """Share of entries a step of *edges* in `|x|` (ascending, > 0); zeros are left out."""
        folded = self.counts[:0x7F80] + self.counts[0x8000:0xFF80]
        shares, _ = np.histogram(np.abs(_middles()[:0x7F80])[1:], bins=edges, weights=folded[1:])
        return np.asarray(shares / max(1, int(folded.sum())), dtype=np.float64)


def _middles() -> Array:
    """The middle of each bin; the bins of zero stand at zero."""
    with np.errstate(invalid="ignore"):  # the NaN bins have no place
        middles = (_PATTERNS << 16 | 0x8000).view(np.float32).astype(np.float64)
    return np.where(_LOWER == 0, 0.0, middles)


def _density(places: Array, counts: NDArray[np.int64], edges: Array) -> Array:
    found, _ = np.histogram(places, bins=edges, weights=counts)
    return np.asarray(found / (max(1, int(counts.sum())) * np.diff(edges)), dtype=np.float64)


def count_entries(tensor: torch.Tensor) -> EntryCounts:
    """Count every entry of a floating *tensor* of any dtype and shape; one pass, no sorting.

    float64 is rounded to float32 first.
    """
    return EntryCounts(counts=_counted(tensor.detach()))


def _counted(tensor: torch.Tensor) -> NDArray[np.int64]:
    return np.bincount(_patterns(tensor), minlength=_BINS).astype(np.int64, copy=False)


def _patterns(tensor: torch.Tensor) -> NDArray[np.uint16]:
    """Each entry's bin, flat."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16).ravel()
    single = tensor.to(torch.float32).contiguous().numpy()
    return (single.view(np.uint32) >> 16).astype(np.uint16).ravel()


def sum_counts(parts: Iterable[EntryCounts]) -> EntryCounts:
    """Counts of several tensors together; the largest of their standard errors is kept."""
    total = np.zeros(_BINS, dtype=np.int64)
    exact, error = True, 0.0
    for part in parts:
        total += part.counts
        exact &= part.exact
        error = max(error, part.standard_error)
    return EntryCounts(counts=total, exact=exact, standard_error=error)


def delta_counts(pair: LoraPair, *, exact: bool = False) -> EntryCounts:
    """The distribution of the entries of `ΔW`, on a sample of eight blocks unless *exact*."""
    whole = pair.a.shape[1] * pair.b.shape[0]
    if exact or whole <= _SAMPLE_BLOCKS * _SAMPLE_ROWS * _SAMPLE_COLUMNS:
        total = np.zeros(_BINS, dtype=np.int64)
        a = pair.a.to(torch.float32)
        for start in range(0, pair.b.shape[0], _EXACT_ROWS):
            rows = pair.b[start : start + _EXACT_ROWS].to(torch.float32) * pair.scale
            total += _counted(rows @ a)
        return EntryCounts(counts=total)
    patterns = np.stack([_patterns(block[0]) for block in delta_blocks([pair])])
    # Entries of one block share rows and columns, so only whole blocks are independent draws.
    places = (patterns >> 6) + (np.arange(len(patterns)) * _ERROR_BINS)[:, None]
    parts = np.bincount(places.ravel(), minlength=len(patterns) * _ERROR_BINS)
    coarse, half = parts.reshape(len(patterns), _ERROR_BINS), _ERROR_BINS // 2
    ascending = np.concatenate([coarse[:, : half - 1 : -1], coarse[:, :half]], axis=1)
    distribution = np.cumsum(ascending, axis=1) / patterns.shape[1]
    error = distribution.std(axis=0, ddof=1).max() / np.sqrt(len(patterns))
    counts = np.bincount(patterns.ravel(), minlength=_BINS).astype(np.int64, copy=False)
    return EntryCounts(counts=counts, exact=False, standard_error=float(error))


def delta_blocks(pairs: Sequence[LoraPair]) -> Iterator[list[torch.Tensor]]:
    """Eight blocks of random rows × columns of each pair's `ΔW`, the same places for each.

    Yields, block by block, one float32 tensor of at most `(64, 256)` a pair. The places depend
    on the module's name and the shape alone, so that results repeat and adapters compare.
    """
    module, columns, rows = pairs[0].module, pairs[0].a.shape[1], pairs[0].b.shape[0]
    generator = np.random.default_rng(zlib.crc32(f"{module}:{rows}:{columns}".encode()))
    for _ in range(_SAMPLE_BLOCKS):
        row = torch.from_numpy(generator.integers(0, rows, min(rows, _SAMPLE_ROWS)))
        column = torch.from_numpy(generator.integers(0, columns, min(columns, _SAMPLE_COLUMNS)))
        yield [
            (pair.b.index_select(0, row).to(torch.float32) * pair.scale)
            @ pair.a.index_select(1, column).to(torch.float32)
            for pair in pairs
        ]
