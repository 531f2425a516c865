"""A few tokens through the whole model, every adapted layer computed in several ways at once.

One forward pass whose rows are variants: base plus low-rank paths from the files, random factors in
an adapter's place, the deltas merged into the weight, and the live layers as they are. Each adapted
layer's call is replaced for its duration; nothing of the model is switched, merged or copied, and
the file's weight is read again only where the live one differs. Knows nothing of verdicts.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.certificate.capture import forward
from harness.certificate.claim import Claim
from harness.engines.inspection import LiveLayer, LiveModel
from harness.lora import LoraPair, flatten_pairs

__all__ = ["OtherShapeError", "Variant", "product_norms", "run_variants"]

_NULL_RANK = 8  # enough directions for a norm to mean something; drawing more is what costs
_POOL = 1 << 20
_BLOCK = 1 << 21  # elements of a weight that is merged at a time: 4 MiB in bfloat16
_DEVICE_BLOCK = 1 << 24  # on an accelerator: launches cost more than memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a weight for each adapter, and which of them is replaced by a null adapter."""

    weights: Mapping[str, float]
    replaced: str | None = None


class OtherShapeError(Exception):
    """An adapted layer sees something else than the prompt's tokens."""


def run_variants(
    live: LiveModel,
    claim: Claim,
    row: Sequence[int],
    beginning: Sequence[int],
    variants: Mapping[str, Variant],
    sound: Collection[str],
) -> list[Tensor]:
    """Logits, `(tokens, vocabulary)` a row: of *row* in each of *variants*, with all adapters
    merged and from the live layers; and of *beginning*, which is as long, from the live layers.

    Args:
        sound: layers whose live weight is the file's, bit for bit.

    Raises:
        OtherShapeError: an adapted layer does not see the rows as they are.
    """
    names = dict.fromkeys((*live.lora_layers, *(m for m in claim.modules if m in live.layers)))
    count = len(variants)
    replaced: list[tuple[nn.Module, Any]] = []

    def call_of(layer: LiveLayer, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
            if x.shape[:2] != (count + 3, len(row)):
                raise OtherShapeError(f"{layer.name} is called on {list(x.shape)}")
            now = own(x[count + 1 :], *args, **options)
            weight, pairs = _weight(layer, claim, sound), claim.pairs(layer.name)
            terms = [(claim.weights[n], pair) for n, pair in pairs.items() if claim.weights[n]]
            parts = [
                _flattened(layer, pairs, variants, x[:count], weight),
                _merged(layer, terms, x[count : count + 1], weight),
            ]
            return torch.cat([part.to(now.dtype) for part in parts] + [now])

        return call

    try:
        for name in names:
            layer = live.layers[name]
            replaced.append((layer.outer, vars(layer.outer).get("forward")))
            layer.outer.forward = call_of(layer, layer.outer.forward)
        ids = torch.tensor([row] * (count + 2) + [beginning])
        logits = forward(live.root, ids, torch.ones_like(ids))
    finally:
        for module, own in reversed(replaced):  # a shared module is there twice
            del module.forward
            if own is not None:
                module.forward = own
    return [logits[number].float() for number in range(count + 3)]


def _weight(layer: LiveLayer, claim: Claim, sound: Collection[str]) -> Tensor:
    """The base's weight as the file has it, from memory where that is known to be the same."""
    if layer.name in sound:
        return layer.weight
    stored = claim.parts(f"{layer.name}.weight")[0].stored
    return stored.to(layer.weight.device, layer.weight.dtype)


def _base(layer: LiveLayer, x: Tensor, weight: Tensor) -> Tensor:
    """What the base's layer returns with *weight*."""
    if layer.kind == "embedding":
        scale = getattr(layer.inner, "embed_scale", None)
        rows = nn.functional.embedding(x, weight)
        return rows if scale is None else rows * scale
    turned = weight.T if layer.kind == "conv1d" else weight
    return nn.functional.linear(x, turned, layer.bias)


def _flattened(
    layer: LiveLayer,
    pairs: Mapping[str, LoraPair],
    variants: Mapping[str, Variant],
    x: Tensor,
    weight: Tensor,
) -> Tensor:
    """Base plus one low-rank path a row, in float32, from the files."""
    result = _base(layer, x, weight).float()
    for name, pair in pairs.items():
        rows = {place: v for place, v in enumerate(variants.values()) if v.weights.get(name)}
        real = [place for place, v in rows.items() if v.replaced != name]
        null = [place for place, v in rows.items() if v.replaced == name]
        factors = _factors(pair, x.device)
        for places in (real, null):
            if places:
                a, b = factors if places is real else _nulls(pair, factors, len(null))
                size = torch.tensor([rows[p].weights[name] * pair.scale for p in places])
                path = _path(layer, a, b, x[places])
                result[places] += path * size[:, None, None].to(x.device)
    return result


def _merged(
    layer: LiveLayer, terms: Sequence[tuple[float, LoraPair]], x: Tensor, weight: Tensor
) -> Tensor:
    """The deltas added into the weight a block of rows at a time, rounded to its dtype once.

    The matrix product takes the factors in the weight's dtype and accumulates in float32, as
    processors do; in bfloat16 the factors' own rounding is 2⁻⁹ of the delta, where the merged
    weight is rounded by 2⁻⁹ of itself, and float32 takes three times as long.
    """
    if not terms:
        return _base(layer, x, weight)
    flat = flatten_pairs([(factor, _plain(pair)) for factor, pair in terms])
    a, b = flat.a.to(weight.device, weight.dtype), flat.b.to(weight.device, weight.dtype)
    if layer.kind != "linear":
        a, b = b.T, a.T
    if layer.kind == "embedding":  # the rows that are looked up are all that is merged
        ids = x.reshape(-1)
        looked = torch.addmm(weight[ids], b[ids], a)
        scale = getattr(layer.inner, "embed_scale", None)
        rows = looked.reshape(*x.shape, -1)
        return rows if scale is None else rows * scale
    step = max(1, (_DEVICE_BLOCK if weight.device.type == "cuda" else _BLOCK) // weight.shape[1])
    out = []
    for start in range(0, weight.shape[0], step):
        here = slice(start, start + step)
        merged = torch.addmm(weight[here], b[here], a)
        if layer.kind == "linear":
            bias = None if layer.bias is None else layer.bias[here]
            out.append(nn.functional.linear(x, merged, bias))
        else:
            out.append(x[..., here].float() @ merged.float())
    if layer.kind == "linear":
        return torch.cat(out, dim=-1)
    total = torch.stack(out).sum(dim=0)
    return total if layer.bias is None else total + layer.bias.float()


def _factors(pair: LoraPair, device: torch.device) -> tuple[Tensor, Tensor]:
    return pair.a.to(device, torch.float32), pair.b.to(device, torch.float32)


def _path(layer: LiveLayer, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """`BAx` of every row; *a* and *b* one pair for all rows, or one for each."""
    if layer.kind != "embedding":
        return (x.float() @ a.mT) @ b.mT
    if a.ndim == 2:
        inner = a.T[x]
    else:
        inner = torch.stack([table.T[ids] for table, ids in zip(a, x, strict=True)])
    scale = getattr(layer.inner, "embed_scale", None)
    return inner @ b.mT if scale is None else (inner @ b.mT) * scale


def _nulls(pair: LoraPair, factors: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """*count* random pairs whose product has the norm of the pair's (and a rank of its or a few).

    They are cut out of one pool of normal numbers: drawing fresh ones took longer than using them.
    """
    rank = min(pair.rank, _NULL_RANK)
    shapes = ((count, rank, factors[0].shape[1]), (count, factors[1].shape[0], rank))
    place = zlib.crc32(f"{pair.module} {pair.rank}".encode())
    drawn = []
    for shape in shapes:
        size = math.prod(shape)
        pool = _pool(max(_POOL, 1 << (2 * size).bit_length()), factors[0].device)
        place = (place * 1103515245 + 12345) % (1 << 31)
        start = place % (len(pool) - size)
        drawn.append(pool[start : start + size].reshape(shape))
    a, b = drawn
    own = product_norms(a, b).clamp(min=1e-30)
    return a, b * (product_norms(*factors) / own)[:, None, None].float()


@functools.lru_cache(maxsize=2)
def _pool(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)


def product_norms(a: Tensor, b: Tensor) -> Tensor:
    """`‖B·A‖` of each pair, float64, from the two Gram matrices."""
    grams = ((a @ a.mT) * (b.mT @ b)).double()
    return grams.sum(dim=(-2, -1)).clamp(min=0).sqrt()


def _plain(pair: LoraPair) -> LoraPair:
    """The pair without its mark of transposition: adapters of one layer may differ in it."""
    return LoraPair(module=pair.module, a=pair.a, b=pair.b, scale=pair.scale)
