"""The algebra of `s·B·A`, never materialised unless asked.

`ΔW = s·B·A` with `A: (r, in)`, `B: (out, r)`, `s = alpha/r` (Hu et al. 2021, arXiv:2106.09685)
or `alpha/√r` (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). A stack is additive:
`W = W_base + Σ wᵢ·ΔWᵢ`. The float64 functions here are the oracle that PEFT and the live model
are judged by. torch is imported by the first function that computes: reading an adapter's header
costs none of it. Knows nothing of files, PEFT or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LoraPair", "add_deltas", "apply_linear", "flatten_pairs", "lora_scale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two factors of one module's delta.

    Attributes:
        module: the dotted name of the adapted module in the base, e.g.
            `model.layers.0.self_attn.q_proj`.
        a: `(r, in)`, any floating dtype.
        b: `(out, r)`, any floating dtype.
        scale: `s`.
        transposed: the base keeps this weight as `(in, out)` (`Conv1D` with `fan_in_fan_out`,
            embeddings), so the delta is transposed before it is added.
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """`s·B·A` in the base weight's own layout, computed in *dtype* (float64 if None)."""
        import torch

        dtype = torch.float64 if dtype is None else dtype
        product = (self.b.to(dtype) @ self.a.to(dtype)) * self.scale
        return product.T if self.transposed else product


def lora_scale(*, alpha: float, rank: int, rslora: bool) -> float:
    """`alpha/r`, or `alpha/√r` for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def add_deltas(
    weight: Tensor,
    terms: Iterable[tuple[float, LoraPair]],
    *,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """`W + Σ wᵢ·sᵢ·BᵢAᵢ`, accumulated in *accumulate* (float64 if None), returned in it:
    nothing is rounded.

    The terms are added in the order of their module-independent content: floating-point
    addition does not commute over three or more terms, so they are first summed among
    themselves in a canonical order. The result does not depend on the order given.
    """
    import torch

    accumulate = torch.float64 if accumulate is None else accumulate
    deltas = [pair.delta(accumulate) * factor for factor, pair in terms]
    total = weight.to(accumulate)
    if not deltas:
        return total.clone()
    if len(deltas) > 2:
        # Sorting entry by entry is the only order that no relabelling can change.
        return total + torch.stack(deltas).sort(dim=0).values.sum(dim=0)
    return total + (deltas[0] if len(deltas) == 1 else deltas[0] + deltas[1])


def apply_linear(
    inputs: Tensor,
    weight: Tensor,
    terms: Iterable[tuple[float, LoraPair]],
    bias: Tensor | None = None,
) -> Tensor:
    """`(W + Σ wᵢ·sᵢ·BᵢAᵢ)x (+ bias)` in float64; `inputs: (…, in)`, `weight: (out, in)`."""
    import torch

    x = inputs.to(torch.float64)
    result = x @ weight.to(torch.float64).T
    for factor, pair in terms:
        result += (factor * pair.scale) * (x @ pair.a.to(x.dtype).T @ pair.b.to(x.dtype).T)
    return result if bias is None else result + bias.to(x.dtype)


def flatten_pairs(terms: Sequence[tuple[float, LoraPair]]) -> LoraPair:
    """One pair whose delta is `Σ wᵢ·sᵢ·BᵢAᵢ`: `A = [w₁s₁A₁; w₂s₂A₂; …]`, `B = [B₁|B₂|…]`, s = 1.

    Raises:
        ValueError: the terms belong to different modules or layouts.
    """
    import torch

    first = terms[0][1]
    if any(p.module != first.module or p.transposed != first.transposed for _, p in terms):
        raise ValueError("only pairs of one module can be concatenated")
    dtype = torch.promote_types(
        torch.float32, max((p.a.dtype for _, p in terms), key=lambda d: d.itemsize)
    )
    return LoraPair(
        module=first.module,
        a=torch.cat([p.a.to(dtype) * (factor * p.scale) for factor, p in terms]),
        b=torch.cat([p.b.to(dtype) for _, p in terms], dim=1),
        scale=1.0,
        transposed=first.transposed,
    )
