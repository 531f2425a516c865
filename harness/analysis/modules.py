"""The figures of one adapted module, from its two factors.

Norms and spectra are those of `ΔW = s·B·A`, computed from the algebra of the factors
(`harness.analysis.spectrum`); the distributions of entries are counted. Knows nothing of other
modules or of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from harness.analysis.entries import EntryCounts, count_entries, delta_counts
from harness.analysis.reading import AnalysedPair
from harness.analysis.spectrum import delta_norm, factors_of, singular_values
from harness.errors import InputError
from harness.preflight import MOST_OF_A_FACTOR

__all__ = [
    "ENERGY_RANKS",
    "EntryFigures",
    "ModuleFigures",
    "entry_figures",
    "grouped",
    "kind_of",
    "layer_name",
    "layer_of",
    "module_figures",
]

_M = TypeVar("_M")
#: The ranks `k` whose share of the energy is reported.
ENERGY_RANKS = (1, 2, 4, 8, 16, 32)
_ENERGY_KEPT = 0.99
_AGAIN = "train or save the adapter again; --keep-going leaves the module out"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFigures:
    """A distribution of entries in a few numbers; `count` is how many were looked at.

    `mean` and `std` are exact also where the quantiles come from a sample, whose distribution
    function has the `standard_error` (0 if every entry was counted). The quantiles are of `|x|`,
    to within 1/128.
    """

    count: int
    mean: float
    std: float
    zero_share: float
    median_magnitude: float
    p99_magnitude: float
    max_magnitude: float
    exact: bool
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFigures:
    """The figures of one adapted module; `σ` are the singular values of `ΔW = s·B·A`.

    Attributes:
        kind: the module's type, e.g. `q_proj`; `layer`: its number, None outside the layers.
        bytes: on disk. scale: `s`.
        norm_a, norm_b, norm_delta: Frobenius norms. spectral_norm: `σ₁`.
        stable_rank: `‖ΔW‖_F²/σ₁²`. effective_rank: `exp(H(σ/Σσ))`.
        energy_top: share of `Σσ²` in the first k of `ENERGY_RANKS` (as far as the rank goes).
        rank_99: how many directions hold 99 % of `Σσ²`. rank_wasted: `rank − rank_99`.
        dead_ranks: ranks whose row of A or column of B is all zero.
        untrained: B is all zero, as it is initialised: `ΔW = 0`.
        rms: `‖ΔW‖_F/√(out·in)`, the size of a typical entry.
        relative_norm: `‖ΔW‖_F/‖W‖_F`, None without a base.
        magnitude: DoRA's magnitude vector in a few numbers, None without one.
        intruders: directions of `W + ΔW` foreign to `W`, None unless asked for.
    """

    module: str
    kind: str
    layer: int | None
    out_features: int
    in_features: int
    rank: int
    scale: float
    dtype: str
    parameters: int
    bytes: int
    norm_a: float
    norm_b: float
    norm_delta: float
    spectral_norm: float
    singular_values: tuple[float, ...]
    stable_rank: float
    effective_rank: float
    energy_top: Mapping[int, float]
    rank_99: int
    rank_wasted: int
    dead_ranks: int
    untrained: bool
    rms: float
    entries_a: EntryFigures
    entries_b: EntryFigures
    entries_delta: EntryFigures
    relative_norm: float | None = None
    magnitude: Mapping[str, float] | None = None
    intruders: int | None = None


def layer_of(module: str) -> int | None:
    """The layer's number in a dotted module name: the first part that is a number."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found[1]) if found else None


def layer_name(layer: int | None) -> str:
    """A layer's number as a group's name; `outside the layers` for embeddings and heads."""
    return "outside the layers" if layer is None else str(layer)


def grouped(modules: Iterable[_M], key: Callable[[_M], str]) -> dict[str, list[_M]]:
    """*modules* by *key*, both in the order given."""
    groups: dict[str, list[_M]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def kind_of(module: str) -> str:
    """The module's type: its name's last part, `experts.` before an expert's."""
    last = re.sub(r"#\d+$", "", module).rpartition(".")[2]
    return f"experts.{last}" if ".experts." in module else last


def entry_figures(counts: EntryCounts, *, mean: float, square: float, whole: int) -> EntryFigures:
    """Sum up *counts*; *mean* and *square* (`Σx²`) are the exact ones of all *whole* entries."""
    variance = max(0.0, square / whole - mean * mean)
    median, p99, largest = counts.magnitude_quantiles(0.5, 0.99, 1.0)
    return EntryFigures(
        count=counts.total,
        mean=mean,
        std=math.sqrt(variance),
        zero_share=counts.zero / max(1, counts.total),
        median_magnitude=median,
        p99_magnitude=p99,
        max_magnitude=largest,
        exact=counts.exact,
        standard_error=counts.standard_error,
    )


def module_figures(
    analysed: AnalysedPair, *, exact_entries: bool = False
) -> tuple[ModuleFigures, dict[str, EntryCounts]]:
    """The figures of one module, and the counts behind its distributions by `a`, `b`, `delta`.

    Raises:
        InputError: a factor holds NaN, infinities or an absurd size; the tensor is named.
    """
    pair = analysed.pair
    counts = {"a": count_entries(pair.a), "b": count_entries(pair.b)}
    for key, name in (("a", analysed.name_a), ("b", analysed.name_b)):
        if bad := counts[key].nan + counts[key].infinite:
            raise InputError(
                f"tensor {name!r}: {bad} of {counts[key].total} entries are NaN or infinite",
                where=analysed.path,
                remedy=_AGAIN,
            )
    for factor, key, name in (
        (pair.a, "a", analysed.name_a),
        (pair.b, "b", analysed.name_b),
    ):
        # The counts know the largest entry but for its last digits: only then is it looked for.
        near = counts[key].magnitude_quantiles(1.0)[0]
        if near > MOST_OF_A_FACTOR / 2 and (most := float(factor.abs().max())) > MOST_OF_A_FACTOR:
            raise InputError(
                f"tensor {name!r}: holds {most:.3g}, beyond {MOST_OF_A_FACTOR:g}",
                where=analysed.path,
                remedy=_AGAIN,
            )
    factors = factors_of(pair)
    counts["delta"] = delta_counts(pair, exact=exact_entries)
    values = singular_values(factors)
    norm = delta_norm(factors)
    rows, columns, rank = pair.b.shape[0], pair.a.shape[1], factors.rank
    square_a, square_b = float(factors.gram_a.trace()), float(factors.gram_b.trace())
    sum_a, sum_b = (
        pair.a.sum(dim=1, dtype=torch.float64),
        pair.b.sum(dim=0, dtype=torch.float64),
    )
    mean_delta = factors.scale * float(sum_b @ sum_a) / (rows * columns)
    alive = (factors.gram_a.diagonal() > 0) & (factors.gram_b.diagonal() > 0)
    spectrum = _spectrum_figures(values.numpy())
    return ModuleFigures(
        module=pair.module,
        kind=kind_of(pair.module),
        layer=layer_of(pair.module),
        out_features=rows,
        in_features=columns,
        rank=rank,
        scale=pair.scale,
        dtype=str(pair.a.dtype).removeprefix("torch."),
        parameters=pair.a.numel() + pair.b.numel(),
        bytes=pair.a.nbytes + pair.b.nbytes,
        norm_a=math.sqrt(square_a),
        norm_b=math.sqrt(square_b),
        norm_delta=norm,
        singular_values=tuple(values.tolist()),
        dead_ranks=rank - int(alive.sum()),
        untrained=square_b == 0,
        rms=norm / math.sqrt(rows * columns),
        entries_a=entry_figures(
            counts["a"],
            mean=float(sum_a.sum()) / pair.a.numel(),
            square=square_a,
            whole=pair.a.numel(),
        ),
        entries_b=entry_figures(
            counts["b"],
            mean=float(sum_b.sum()) / pair.b.numel(),
            square=square_b,
            whole=pair.b.numel(),
        ),
        entries_delta=entry_figures(
            counts["delta"], mean=mean_delta, square=norm * norm, whole=rows * columns
        ),
        magnitude=None if analysed.magnitude is None else _magnitude_figures(analysed),
        spectral_norm=spectrum.largest,
        stable_rank=spectrum.stable_rank,
        effective_rank=spectrum.effective_rank,
        energy_top=spectrum.energy_top,
        rank_99=spectrum.rank_99,
        rank_wasted=rank - spectrum.rank_99,
    ), counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spectrum:
    largest: float
    stable_rank: float
    effective_rank: float
    energy_top: Mapping[int, float]
    rank_99: int


def _spectrum_figures(values: NDArray[np.float64]) -> _Spectrum:
    largest = float(values[0])
    if largest == 0:
        return _Spectrum(largest=0.0, stable_rank=0.0, effective_rank=0.0, energy_top={}, rank_99=0)
    relative = values / largest  # squares of tiny values would underflow
    energy = np.cumsum(relative**2)
    shares = relative[relative > 0] / relative.sum()
    return _Spectrum(
        largest=largest,
        stable_rank=float(energy[-1]),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        energy_top={k: float(energy[k - 1] / energy[-1]) for k in ENERGY_RANKS if k <= len(values)},
        rank_99=int(np.searchsorted(energy, _ENERGY_KEPT * energy[-1])) + 1,
    )


def _magnitude_figures(analysed: AnalysedPair) -> dict[str, float]:
    assert analysed.magnitude is not None
    vector = analysed.magnitude.double()
    if not bool(vector.isfinite().all()):
        raise InputError(
            f"module {analysed.pair.module!r}: its DoRA magnitude holds NaN or infinities",
            where=analysed.path,
            remedy="train or save the adapter again; --keep-going leaves the module out",
        )
    return {
        "mean": float(vector.mean()),
        "std": float(vector.std(correction=0)),
        "min": float(vector.min()),
        "max": float(vector.max()),
    }
