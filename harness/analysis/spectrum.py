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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    "singular_values",
]

#: Eigenvalues of a Gram matrix spread wider than this send the factor through QR.
_GRAM_SPREAD = 1e-8
_BLOCK_ROWS = 512


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


def cosine(first: LoraPair, second: LoraPair) -> float:
    """`⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖)`, 0 where one is zero; the shapes must agree.

    All three Gram matrices of a side come from one walk over blocks that stay in the cache.
    """
    rank = first.rank
    tall_b = _three_grams(first.b, second.b)
    tall_a = _three_grams(first.a.T, second.a.T)
    products = [b * a for b, a in zip(tall_b, tall_a, strict=True)]
    mixed = products[0]
    sizes = math.sqrt(max(0.0, float(mixed[:rank].sum())) * max(0.0, float(products[1].sum())))
    sign = math.copysign(1.0, first.scale * second.scale)
    if not sizes or not first.scale or not second.scale:
        return 0.0
    return max(-1.0, min(1.0, sign * float(mixed[rank:].sum()) / sizes))


def _three_grams(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`[X|Y]ᵀX` and `YᵀY` in float64 of tall *first* `X: (n, r₁)` and *second* `Y: (n, r₂)`."""
    ranks, columns = first.shape[1], first.shape[1] + second.shape[1]
    block = torch.empty(_BLOCK_ROWS, columns, dtype=torch.float64)
    if first.stride(0) == 1:  # a transposed view: the block lies the same way, or copying crawls
        block = torch.empty(columns, _BLOCK_ROWS, dtype=torch.float64).T
    mixed = torch.zeros(columns, ranks, dtype=torch.float64)
    own = torch.zeros(second.shape[1], second.shape[1], dtype=torch.float64)
    for start in range(0, first.shape[0], _BLOCK_ROWS):
        rows = block[: min(_BLOCK_ROWS, first.shape[0] - start)]
        rows[:, :ranks].copy_(first.detach()[start : start + _BLOCK_ROWS])
        rows[:, ranks:].copy_(second.detach()[start : start + _BLOCK_ROWS])
        mixed.addmm_(rows.T, rows[:, :ranks])
        own.addmm_(rows[:, ranks:].T, rows[:, ranks:])
    return mixed, own


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
