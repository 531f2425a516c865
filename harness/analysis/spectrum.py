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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from harness.lora import LoraPair

__all__ = [
    "Array",
    "Factors",
    "delta_norm",
    "factors_of",
    "inner_product",
    "joint_roots",
    "one_thread",
    "singular_values",
]

#: float64 throughout; numpy types what `linalg` returns more widely.
Array: TypeAlias = NDArray[np.floating[Any]]

#: Eigenvalues of a Gram matrix spread wider than this send the factor through QR.
_GRAM_SPREAD = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One pair's factors in float64 with their Gram matrices.

    Attributes:
        a: `(r, in)`. b: `(out, r)`.
        gram_a: `A Aᵀ`, `(r, r)`. gram_b: `BᵀB`, `(r, r)`.
        scale: `s`, any sign.
    """

    a: Array
    b: Array
    gram_a: Array
    gram_b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


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
    """The factors of *pair* in float64 and their Gram matrices; `A @ A.T` runs as BLAS syrk."""
    a, b = _float64(pair.a), _float64(pair.b)
    return Factors(a=a, b=b, gram_a=a @ a.T, gram_b=b.T @ b, scale=pair.scale)


def _float64(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().to(torch.float64).contiguous().numpy()
    return array


def delta_norm(factors: Factors) -> float:
    """`‖ΔW‖_F = |s|·√(Σ (A Aᵀ)∘(BᵀB))`."""
    square = float(np.vdot(factors.gram_a, factors.gram_b))
    return abs(factors.scale) * float(np.sqrt(max(square, 0.0)))


def inner_product(first: Factors, second: Factors) -> float:
    """`⟨ΔW₁, ΔW₂⟩ = s₁s₂·Σ (B₁ᵀB₂)∘(A₁A₂ᵀ)`; exact up to float64 rounding."""
    crossed = float(np.vdot(first.b.T @ second.b, first.a @ second.a.T))
    return first.scale * second.scale * crossed


def singular_values(factors: Factors) -> Array:
    """All `r` singular values of `ΔW`, descending, zeros included; `(r,)`."""
    core = _root(factors.b.T, factors.gram_b).T @ _root(factors.a, factors.gram_a)
    values: Array = np.linalg.svd(core, compute_uv=False)
    padded = np.zeros(factors.rank)
    padded[: len(values)] = values * abs(factors.scale)
    return padded


def _sound(gram: Array) -> bool:
    eigenvalues = np.linalg.eigvalsh(gram)
    return bool(eigenvalues[0] > _GRAM_SPREAD * eigenvalues[-1])


def _root(wide: Array, gram: Array) -> Array:
    """`L` with `L Lᵀ = wide·wideᵀ`, `(r, min(r, n))`; *wide* is `(r, n)`."""
    if _sound(gram):
        return np.linalg.cholesky(gram)
    upper: Any = np.linalg.qr(wide.T, mode="r")
    root: Array = upper.T
    return root


def joint_roots(pairs: Sequence[LoraPair]) -> tuple[list[Array], list[Array]]:
    """Square roots of the joint Gram matrices of several pairs of one shape, cut up by pair.

    Returns `L_Bᵢ` and `L_Aᵢ`, each `(rᵢ, R)` with `R ≤ Σr`, such that `Bᵢ = Q_B·L_Bᵢᵀ` and
    `Aᵢ = L_Aᵢ·Q_Aᵀ` with the same orthonormal `Q_B` and `Q_A` for every pair.
    """
    ends = np.cumsum([pair.rank for pair in pairs])[:-1].tolist()
    wide_b = np.concatenate([_float64(pair.b).T for pair in pairs])
    wide_a = np.concatenate([_float64(pair.a) for pair in pairs])
    root_b, root_a = _root(wide_b, wide_b @ wide_b.T), _root(wide_a, wide_a @ wide_a.T)
    return np.split(root_b, ends), np.split(root_a, ends)
