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
import dataclasses
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
#: Squared norms below this share of their terms are taken from QR: Gram matrices leave 1e-16.
_CANCELLED_SQUARE = 1e-9
_ROUNDING = 16 * torch.finfo(torch.float64).eps
_BLOCK_ROWS = 512
#: A product of float32 Gram matrices that is smaller than this share of what its terms add up to
#: by chance is taken in float64: measured, its error is up to 4e-7 of the latter.
_CANCELLED = 0.4
_SMALLEST = 1e-28  # squared norms below which float32 loses entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One pair with its Gram matrices in float64.

    Attributes:
        gram_a: `A Aᵀ`, `(r, r)`. gram_b: `BᵀB`, `(r, r)`.
    """

    pair: LoraPair
    gram_a: Tensor
    gram_b: Tensor

    @property
    def rank(self) -> int:
        return self.pair.rank

    @property
    def scale(self) -> float:
        """`s`, any sign."""
        return self.pair.scale

    @property
    def a(self) -> Tensor:
        """`(r, in)` in float64."""
        return self.pair.a.detach().to(torch.float64)

    @property
    def b(self) -> Tensor:
        """`(out, r)` in float64."""
        return self.pair.b.detach().to(torch.float64)


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
    """*pair* with its Gram matrices."""
    grams = _Grams.of((pair,), torch.float64)
    return Factors(pair=pair, gram_a=grams.wide[0, 0], gram_b=grams.tall[0, 0])


def delta_norm(factors: Factors) -> float:
    """`‖ΔW‖_F = |s|·√(Σ (A Aᵀ)∘(BᵀB))`; 0 where all that is left is float64's own rounding.

    Ranks that cancel (an adapter less itself) leave a sum far below its terms: then the norm is
    that of the core, whose roots come from QR.
    """
    square = float((factors.gram_a * factors.gram_b).sum())
    terms = float(factors.gram_a.trace() * factors.gram_b.trace())
    if square > _CANCELLED_SQUARE * terms:
        return abs(factors.scale) * math.sqrt(square)
    left = float(_core(factors, exact=True).norm())
    floor = _ROUNDING * math.sqrt(terms)
    return abs(factors.scale) * left if left > floor else 0.0


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
        return delta_norm(factors_of(pair))
    return abs(pair.scale) * math.sqrt(square)


def cosine(first: LoraPair, second: LoraPair) -> float:
    """`⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖)`, 0 where one is zero; the shapes must agree.

    As quick as `pair_norm`. The error is below 1e-6, relative to the cosine or, where it is
    smaller, to that of random directions, `1/√(out·in)`: below it a cosine has nothing to say.
    """
    quick = _quick((first, second))
    one = two = crossed = None
    if quick is not None:
        one, two, crossed = (quick.product(i, j) for i, j in ((0, 0), (1, 1), (0, 1)))
    if one is not None and two is not None and crossed is not None:
        sizes = math.sqrt(one) * math.sqrt(two)
    else:
        x, y = (factors_of(dataclasses.replace(pair, scale=1.0)) for pair in (first, second))
        crossed, sizes = inner_product(x, y), delta_norm(x) * delta_norm(y)
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
    def of(cls, pairs: Sequence[LoraPair], dtype: torch.dtype) -> _Grams:
        """The Gram matrices, multiplied in *dtype*."""
        return cls(
            wide=_gathered([pair.a.detach().T for pair in pairs], dtype),
            tall=_gathered([pair.b.detach() for pair in pairs], dtype),
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


def _gathered(parts: Sequence[Tensor], dtype: torch.dtype) -> dict[_Place, Tensor]:
    """`XᵢᵀXⱼ` in float64 of tall *parts* `(n, rᵢ)`, a block of rows that stays in the cache."""
    sums = {
        (i, j): torch.zeros(parts[i].shape[1], parts[j].shape[1], dtype=torch.float64)
        for j in range(len(parts))
        for i in range(j + 1)
    }
    for start in range(0, parts[0].shape[0], _BLOCK_ROWS):
        rows = [part[start : start + _BLOCK_ROWS].to(dtype) for part in parts]
        for (i, j), total in sums.items():
            total += rows[i].T @ rows[j]
    return sums


def singular_values(factors: Factors) -> Tensor:
    """All `r` singular values of `ΔW`, descending, zeros included; `(r,)` float64."""
    core = _core(factors)
    values = torch.linalg.svdvals(core)
    padded = torch.zeros(factors.rank, dtype=torch.float64)
    padded[: len(values)] = values * abs(factors.scale)
    return padded


def _core(factors: Factors, *, exact: bool = False) -> Tensor:
    """`L_BᵀL_A`; *exact* takes both roots from QR."""
    left = _root(factors.pair.b.detach().T, factors.gram_b, exact=exact)
    return left.T @ _root(factors.pair.a.detach(), factors.gram_a, exact=exact)


def _root(wide: Tensor, gram: Tensor, *, exact: bool = False) -> Tensor:
    """`L` with `L Lᵀ = wide·wideᵀ = gram`, `(r, min(r, n))`; *wide* is `(r, n)`, any dtype."""
    eigenvalues = torch.zeros(1) if exact else torch.linalg.eigvalsh(gram)
    if eigenvalues[0] > _GRAM_SPREAD * eigenvalues[-1]:
        root: Tensor = torch.linalg.cholesky(gram)
    else:
        root = torch.linalg.qr(wide.T.to(torch.float64), mode="r").R.T
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
