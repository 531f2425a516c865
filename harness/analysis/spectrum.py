"""Norms, inner products and singular values of `ΔW = s·B·A`, from the factors alone.

With `A Aᵀ = L_A L_Aᵀ` and `BᵀB = L_B L_Bᵀ` (two `r × r` Gram matrices), `A = L_A Q_Aᵀ` and
`B = Q_B L_Bᵀ` with orthonormal `Q_A: (in, r)`, `Q_B: (out, r)`, so that the singular values of `ΔW`
are those of the `r × r` core `s·L_Bᵀ L_A`. Everything is float64: a naive float32 norm is wrong by
up to 4e-3. A Gram matrix squares the condition number, so a factor whose condition is beyond 1e4
(a dead or doubled rank among them) goes through QR instead, at three times the cost; the
singular values below that bound are good to about `eps·1e8 = 2e-8`, relative to each.

Works on values: knows nothing of files, adapters as a whole, or what the figures are for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from harness.lora import LoraPair

__all__ = [
    "Factors",
    "cosine",
    "delta_norm",
    "factors_of",
    "inner_product",
    "joint_roots",
    "one_thread",
    "pair_norm",
    "singular_values",
]

#: Eigenvalues of a Gram matrix spread wider than this send the factor through QR.
_GRAM_SPREAD = 1e-8
_BLOCK_ROWS = 512
#: A product of float32 Gram matrices that is smaller than this share of what its terms add up to
#: by chance is taken in float64: measured, its error is up to 4e-7 of the latter.
_CANCELLED = 0.4
_SMALLEST = 1e-28  # squared norms below which float32 loses entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One pair's factors in float64 with their Gram matrices.

    Attributes:
        a: `(r, in)`. b: `(out, r)`.
        gram_a: `A Aᵀ`, `(r, r)`. gram_b: `BᵀB`, `(r, r)`.
        scale: `s`, any sign.
    """

    a: Tensor
    b: Tensor
    gram_a: Tensor
    gram_b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: its threads wait on each other longer than these products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def factors_of(pair: LoraPair) -> Factors:
    """The factors of *pair* in float64 and their Gram matrices."""
    a, b = pair.a.detach().to(torch.float64), pair.b.detach().to(torch.float64)
    return Factors(a=a, b=b, gram_a=a @ a.T, gram_b=b.T @ b, scale=pair.scale)


def delta_norm(factors: Factors) -> float:
    """`‖ΔW‖_F = |s|·√(Σ (A Aᵀ)∘(BᵀB))`."""
    square = float((factors.gram_a * factors.gram_b).sum())
    return abs(factors.scale) * math.sqrt(max(square, 0.0))


def inner_product(first: Factors, second: Factors) -> float:
    """`⟨ΔW₁, ΔW₂⟩ = s₁s₂·Σ (B₁ᵀB₂)∘(A₁A₂ᵀ)`; exact up to float64 rounding."""
    crossed = float(((first.b.T @ second.b) * (first.a @ second.a.T)).sum())
    return first.scale * second.scale * crossed


def pair_norm(pair: LoraPair) -> float:
    """`‖ΔW‖_F` of one pair, as `delta_norm`, at half the cost for bfloat16 and float16 factors.

    Two such entries have an exact product in float32, so their Gram matrices are summed there in
    blocks and gathered in float64; the error is below 1e-6, relative. Where ranks cancel so far
    that it would not be, and for wider factors, everything is float64.
    """
    quick = _quick((pair,))
    square = None if quick is None else quick.product(0, 0)
    if square is None:
        square = _Grams.of((pair,), torch.float64).exact(0, 0)
    return abs(pair.scale) * math.sqrt(max(square, 0.0))


def cosine(first: LoraPair, second: LoraPair) -> float:
    """`⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖)`, 0 where one is zero; the shapes must agree.

    As quick as `pair_norm`. The error is below 1e-6, relative to the cosine or, where it is
    smaller, to that of random directions, `1/√(out·in)`: below it a cosine has nothing to say.
    """
    pairs = (first, second)
    quick = _quick(pairs)
    found = {
        place: None if quick is None else quick.product(*place)
        for place in ((0, 0), (1, 1), (0, 1))
    }
    if any(value is None for value in found.values()):
        wanted = [place for place, value in found.items() if value is None]
        wide = _Grams.of(pairs, torch.float64, wanted)
        found |= {place: wide.exact(*place) for place in wanted}
    one, two, crossed = (value or 0.0 for value in found.values())
    sizes = math.sqrt(max(one, 0.0)) * math.sqrt(max(two, 0.0))
    if not sizes or not first.scale or not second.scale:
        return 0.0
    sign = math.copysign(1.0, first.scale * second.scale)
    return max(-1.0, min(1.0, sign * crossed / sizes))


_Place: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grams:
    """`A_i A_jᵀ` and `B_iᵀ B_j` of several pairs by `(i, j)`, `i ≤ j`, gathered in float64."""

    wide: Mapping[_Place, Tensor]
    tall: Mapping[_Place, Tensor]
    lengths: tuple[int, int]

    @classmethod
    def of(
        cls,
        pairs: Sequence[LoraPair],
        dtype: torch.dtype,
        places: Sequence[_Place] | None = None,
    ) -> _Grams:
        """The Gram matrices at *places* (all of them if None), multiplied in *dtype*."""
        if places is None:
            places = [(i, j) for j in range(len(pairs)) for i in range(j + 1)]
        return cls(
            wide=_gathered([pair.a.detach().T for pair in pairs], dtype, places),
            tall=_gathered([pair.b.detach() for pair in pairs], dtype, places),
            lengths=(pairs[0].a.shape[1], pairs[0].b.shape[0]),
        )

    def exact(self, i: int, j: int) -> float:
        """`⟨B_iA_i, B_jA_j⟩`, without the scales."""
        return float((self.wide[i, j] * self.tall[i, j]).sum())

    @property
    def by_chance(self) -> float:
        """The cosine of random directions, root mean square: `1/√(out·in)`."""
        return 1 / math.sqrt(math.prod(self.lengths))

    def product(self, i: int, j: int) -> float | None:
        """As `exact`, or None where rounding in float32 may reach 1e-6 of it (or of chance's).

        The sum of `n` products of entries rounds as a walk of their size does, so an entry of a
        Gram matrix is taken to be no better than one of random rows of the same norms.
        """
        terms = self.wide[i, j] * self.tall[i, j]
        spread = torch.ones((), dtype=torch.float64)
        for grams, length in zip((self.wide, self.tall), self.lengths, strict=True):
            rows, columns = grams[i, i].diagonal(), grams[j, j].diagonal()
            smallest = torch.minimum(rows.min(), columns.min())
            if not float(smallest) > _SMALLEST:  # float32 lost it, or a dead rank
                return None
            random = torch.outer(rows, columns) / length
            spread = spread * torch.maximum(grams[i, j].square(), random)
        value = float(terms.sum())
        size = abs(value)
        if i != j:
            size = max(size, math.sqrt(abs(self.exact(i, i) * self.exact(j, j))) * self.by_chance)
        return value if size > _CANCELLED * float(spread.sum().sqrt()) else None


def _quick(pairs: Sequence[LoraPair]) -> _Grams | None:
    """The Gram matrices in float32, where the products of entries are exact in it."""
    narrow = all(t.dtype.itemsize == 2 for pair in pairs for t in (pair.a, pair.b))
    return _Grams.of(pairs, torch.float32) if narrow else None


def _gathered(
    parts: Sequence[Tensor], dtype: torch.dtype, places: Sequence[_Place]
) -> dict[_Place, Tensor]:
    """`XᵢᵀXⱼ` in float64 of tall *parts* `(n, rᵢ)`, a block of rows that stays in the cache."""
    sums = {
        (i, j): torch.zeros(parts[i].shape[1], parts[j].shape[1], dtype=torch.float64)
        for i, j in places
    }
    for start in range(0, parts[0].shape[0], _BLOCK_ROWS):
        rows = [part[start : start + _BLOCK_ROWS].to(dtype) for part in parts]
        for (i, j), total in sums.items():
            total += rows[i].T @ rows[j]
    return sums


def singular_values(factors: Factors) -> Tensor:
    """All `r` singular values of `ΔW`, descending, zeros included; `(r,)` float64."""
    core = _root(factors.b.T, factors.gram_b).T @ _root(factors.a, factors.gram_a)
    values = torch.linalg.svdvals(core)
    padded = torch.zeros(factors.rank, dtype=torch.float64)
    padded[: len(values)] = values * abs(factors.scale)
    return padded


def _root(wide: Tensor, gram: Tensor) -> Tensor:
    """`L` with `L Lᵀ = wide·wideᵀ = gram`, `(r, min(r, n))`; *wide* is `(r, n)`."""
    eigenvalues = torch.linalg.eigvalsh(gram)
    if eigenvalues[0] > _GRAM_SPREAD * eigenvalues[-1]:
        root: Tensor = torch.linalg.cholesky(gram)
    else:
        root = torch.linalg.qr(wide.T, mode="r").R.T
    return root


def joint_roots(pairs: Sequence[LoraPair]) -> tuple[list[Tensor], list[Tensor]]:
    """Square roots of the joint Gram matrices of several pairs of one shape, cut up by pair.

    Returns `L_Bᵢ` and `L_Aᵢ`, each `(rᵢ, R)` with `R ≤ Σr`, such that `Bᵢ = Q_B·L_Bᵢᵀ` and
    `Aᵢ = L_Aᵢ·Q_Aᵀ` with the same orthonormal `Q_B` and `Q_A` for every pair.
    """
    ranks = [pair.rank for pair in pairs]
    wide_b = torch.cat([pair.b.detach().to(torch.float64) for pair in pairs], dim=1).T
    wide_a = torch.cat([pair.a.detach().to(torch.float64) for pair in pairs])
    root_b, root_a = _root(wide_b, wide_b @ wide_b.T), _root(wide_a, wide_a @ wide_a.T)
    return list(torch.split(root_b, ranks)), list(torch.split(root_a, ranks))
