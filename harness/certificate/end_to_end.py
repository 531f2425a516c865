"""The whole model against the files: logits of live, flattened and merged applications.

One short forward pass whose rows are the variants: all adapters as the files have them, none, each
left out, null adapters (random factors of the same norm), all merged into the weight, and the live
layers as they are. Each adapted layer's call is replaced for its duration; nothing of the model is
switched, merged or copied, and the file's weight is read again only where the live one differs.
Knows nothing of generation.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.certificate.capture import Capture, forward
from harness.certificate.claim import Claim
from harness.certificate.values import failed, held
from harness.engines.inspection import LiveLayer, LiveModel
from harness.lora import LoraPair, flatten_pairs
from harness.verdict import Outcome, Verdict

__all__ = ["AGREEMENT", "EFFECT", "PADDED", "check_end_to_end"]

AGREEMENT = "live, flattened and merged logits"
EFFECT = "each adapter's effect"
PADDED = "left-padded batch"
_TOKENS = 4  # of the shortest prompt: every token costs a variant's row in every layer
_NULLS = 4
_NULL_RANK = 8  # enough directions for a norm to mean something; drawing more is what costs
_POOL = 1 << 20
_TIMES = 4.0  # how far the live logits may be from the flattened ones, in units of the merged ones
_FLOOR = 16.0  # eps of the logits' spread below which no difference is believed
_BLOCK = 1 << 18  # elements of a weight that is merged at a time: 1 MiB in float32
_MERGED, _LIVE = "merged", "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One row: a weight for each adapter, and which of them is replaced by null draw `null`."""

    weights: Mapping[str, float]
    replaced: str | None = None
    null: int = 0


def check_end_to_end(
    live: LiveModel, claim: Claim, seen: Capture, sound: Collection[str]
) -> tuple[list[Verdict], dict[str, Any]]:
    """Agreement of the applications, each adapter's share in the logits, and padding.

    Args:
        sound: layers whose live weight is the file's, bit for bit.
    """
    number = min(range(len(seen.rows)), key=lambda n: len(seen.rows[n]))
    row = list(seen.rows[number][:_TOKENS])
    variants = _variants(claim)
    try:
        found = _run(live, claim, row, variants, sound)
    except _OtherShapeError as error:
        undecided = Verdict(
            name=AGREEMENT,
            outcome=Outcome.UNDECIDED,
            evidence=(str(error),),
            remedy="certify a model whose adapted layers see the prompt's tokens one for one",
        )
        return [undecided], {}
    logits = dict(zip((*variants, _MERGED, _LIVE), found, strict=True))
    alone = logits[_LIVE]
    agreement, figures = _agreement(alone, logits["all"], logits[_MERGED], seen.logits.dtype)
    padded = _padding(alone, seen, number, figures)
    if not claim.mode.adapters:
        return [agreement, padded], figures
    effect, more = _effects(claim, logits, figures["noise"])
    return [agreement, effect, padded], figures | more


def _variants(claim: Claim) -> dict[str, _Variant]:
    on = {name: weight for name, weight in claim.weights.items() if weight}
    variants = {"all": _Variant(weights=on)}
    if on:
        variants["base"] = _Variant(weights={})
    for name in on:
        variants[f"without {name}"] = _Variant(weights={n: w for n, w in on.items() if n != name})
        if len(on) > 2:  # of two, each is what is left without the other
            variants[f"only {name}"] = _Variant(weights={name: on[name]})
        for draw in range(_NULLS):
            variants[f"null {draw} for {name}"] = _Variant(weights=on, replaced=name, null=draw)
    return variants


class _OtherShapeError(Exception):
    """An adapted layer sees something else than the prompt's tokens."""


def _run(
    live: LiveModel,
    claim: Claim,
    row: list[int],
    variants: Mapping[str, _Variant],
    sound: Collection[str],
) -> list[Tensor]:
    """Logits, `(tokens, vocabulary)` a row: the variants, all merged, and the live layers."""
    names = dict.fromkeys((*live.lora_layers, *(m for m in claim.modules if m in live.layers)))
    count = len(variants)
    replaced: list[tuple[nn.Module, Any]] = []

    def call_of(layer: LiveLayer, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
            if x.shape[:2] != (count + 2, len(row)):
                raise _OtherShapeError(f"{layer.name} is called on {list(x.shape)}")
            now = own(x[count + 1 :], *args, **options)
            parts = [
                _flattened(layer, claim, variants, x[:count], _weight(layer, claim, sound)),
                _merged(layer, claim, x[count : count + 1], _weight(layer, claim, sound)),
            ]
            return torch.cat([part.to(now.dtype) for part in parts] + [now])

        return call

    try:
        for name in names:
            layer = live.layers[name]
            replaced.append((layer.outer, vars(layer.outer).get("forward")))
            layer.outer.forward = call_of(layer, layer.outer.forward)
        ids = torch.tensor([row] * (count + 2))
        logits = forward(live.root, ids, torch.ones_like(ids))
    finally:
        for module, own in replaced:
            del module.forward
            if own is not None:
                module.forward = own
    return [logits[number].float() for number in range(count + 2)]


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
    layer: LiveLayer, claim: Claim, variants: Mapping[str, _Variant], x: Tensor, weight: Tensor
) -> Tensor:
    """Base plus one low-rank path a row, in float32, from the files."""
    result = _base(layer, x, weight).float()
    for name, pair in claim.pairs(layer.name).items():
        rows = {place: v for place, v in enumerate(variants.values()) if v.weights.get(name)}
        real = [place for place, v in rows.items() if v.replaced != name]
        if real:
            factors = torch.tensor([rows[p].weights[name] for p in real], device=x.device)
            result[real] += factors[:, None, None] * _path(layer, pair, x[real])
        if len(real) == len(rows):
            continue
        norm = _norm(pair.a, pair.b)
        for place, variant in rows.items():
            if variant.replaced == name:
                null = _null(pair, variant.null, norm)
                result[place] += variant.weights[name] * _path(layer, null, x[place])
    return result


def _merged(layer: LiveLayer, claim: Claim, x: Tensor, weight: Tensor) -> Tensor:
    """The deltas added into the weight a block of rows at a time, accumulated in float32."""
    terms = list(claim.terms(layer.name).values())
    if not terms:
        return _base(layer, x, weight)
    flat = flatten_pairs([(factor, _plain(pair)) for factor, pair in terms])
    a, b = (factor.to(weight.device, torch.float32) for factor in (flat.a, flat.b))
    if layer.kind != "linear":
        a, b = b.T, a.T
    if layer.kind == "embedding":  # the rows that are looked up are all that is merged
        ids = x.reshape(-1)
        looked = torch.addmm(weight[ids].float(), b[ids], a).to(weight.dtype)
        scale = getattr(layer.inner, "embed_scale", None)
        rows = looked.reshape(*x.shape, -1)
        return rows if scale is None else rows * scale
    step = max(1, _BLOCK // weight.shape[1])
    room = torch.empty((min(step, weight.shape[0]), weight.shape[1]), device=weight.device)
    out = []
    for start in range(0, weight.shape[0], step):
        block = room[: min(step, weight.shape[0] - start)]
        here = slice(start, start + len(block))
        block.copy_(weight[here])
        merged = block.addmm_(b[here], a).to(weight.dtype)
        if layer.kind == "linear":
            bias = None if layer.bias is None else layer.bias[here]
            out.append(nn.functional.linear(x, merged, bias))
        else:
            out.append(x[..., here].float() @ merged.float())
    if layer.kind == "linear":
        return torch.cat(out, dim=-1)
    total = torch.stack(out).sum(dim=0)
    return total if layer.bias is None else total + layer.bias.float()


def _path(layer: LiveLayer, pair: LoraPair, x: Tensor) -> Tensor:
    a, b = pair.a.to(x.device, torch.float32), pair.b.to(x.device, torch.float32)
    inner = a.T[x] if layer.kind == "embedding" else x.float() @ a.T
    return (inner @ b.T) * pair.scale


def _null(pair: LoraPair, draw: int, norm: float) -> LoraPair:
    """Random factors whose product has the norm of the pair's (and a rank of its or a few).

    They are cut out of one pool of normal numbers: drawing fresh ones took longer than using them.
    """
    rank = min(pair.rank, _NULL_RANK)
    shapes = ((rank, pair.a.shape[1]), (pair.b.shape[0], rank))
    place = zlib.crc32(f"{pair.module} {pair.rank} {draw}".encode())
    factors = []
    for shape in shapes:
        size = math.prod(shape)
        pool = _pool(max(_POOL, 1 << (2 * size).bit_length()))
        place = (place * 1103515245 + 12345) % (1 << 31)
        start = place % (len(pool) - size)
        factors.append(pool[start : start + size].reshape(shape))
    a, b = factors
    own = _norm(a, b)
    return LoraPair(module=pair.module, a=a, b=b * (norm / own if own else 0.0), scale=pair.scale)


@functools.lru_cache(maxsize=2)
def _pool(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _norm(a: Tensor, b: Tensor) -> float:
    """`‖B·A‖`, from the two Gram matrices."""
    a, b = a.float(), b.float()
    gram = ((a @ a.T) * (b.T @ b)).double()
    return math.sqrt(max(0.0, float(gram.sum())))


def _plain(pair: LoraPair) -> LoraPair:
    """The pair without its mark of transposition: adapters of one layer may differ in it."""
    return LoraPair(module=pair.module, a=pair.a, b=pair.b, scale=pair.scale)


def _rms(difference: Tensor) -> float:
    value = float(difference.double().square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


def _agreement(
    live: Tensor, flattened: Tensor, merged: Tensor, dtype: torch.dtype
) -> tuple[Verdict, dict[str, Any]]:
    spread = float(flattened.std())
    floor = _FLOOR * torch.finfo(dtype).eps * spread
    between = _rms(flattened - merged)
    noise = max(between, floor)
    away = _rms(live.to(flattened.device) - flattened)
    away_merged = _rms(live.to(merged.device) - merged)
    agree = int((live.argmax(-1) == flattened.argmax(-1)).sum())
    figures = {
        "noise": noise,
        "live_against_flattened": away,
        "live_against_merged": away_merged,
        "flattened_against_merged": between,
        "logits_spread": spread,
    }
    lines = (
        f"RMS of logits, spread {spread:.3g}: live against flattened {away:.3g}, against merged "
        f"{away_merged:.3g}; flattened against merged {between:.3g}",
        f"the likeliest token is the same at {agree} of {len(live)} positions",
    )
    # A merged live model lies as far from the flattened one as any merge in its dtype.
    if away <= _TIMES * noise:
        return held(AGREEMENT, *lines), figures
    return (
        failed(
            AGREEMENT,
            *lines,
            f"that is {away / noise:.3g} times what the dtype explains",
            remedy="see the checks of modules, weights, buffers and hooks: one of them names the "
            "place",
        ),
        figures,
    )


def _padding(alone: Tensor, seen: Capture, number: int, figures: Mapping[str, Any]) -> Verdict:
    """The shortest prompt alone, against its row in the padded batch of all prompts."""
    start = seen.starts[number]
    batched = seen.logits[number, start : start + len(alone)].float().to(alone.device)
    noise, away = figures["noise"], _rms(batched - alone)
    line = (
        f"prompt {number}, behind {start} tokens of padding, has the logits that it has alone: "
        f"RMS {away:.3g} apart, rounding is {noise:.3g}"
    )
    if away <= _TIMES * noise:
        return held(PADDED, line)
    return failed(
        PADDED,
        f"prompt {number}: behind {start} tokens of padding its logits are {away:.3g} RMS from "
        f"those that it has alone, {away / noise:.3g} times what rounding explains",
        remedy="the attention mask or the positions are lost on the way: generate prompts one by "
        "one, or mend the model's attention",
    )


def _effects(
    claim: Claim, logits: Mapping[str, Tensor], noise: float
) -> tuple[Verdict, dict[str, Any]]:
    lines: list[str] = []
    figures: dict[str, Any] = {"effects": {}}
    silent: list[str] = []
    hidden: list[str] = []
    for name in claim.mode.adapters:
        without = logits[f"without {name}"]
        effect = _rms(logits["all"] - without)
        nulls = torch.tensor(
            [_rms(logits[f"null {draw} for {name}"] - without) for draw in range(_NULLS)]
        )
        deviation = max(float(nulls.std()), 1e-12)
        z = (effect - float(nulls.mean())) / deviation
        figures["effects"][name] = {"rms": effect, "null_rms": float(nulls.mean()), "z": z}
        larger = "more" if z > 3 else "less" if z < -3 else "no more and no less"
        lines.append(
            f"{name} changes the logits by {effect:.3g} RMS, {larger} than random adapters of the "
            f"same norm ({float(nulls.mean()):.3g}; z = {z:.1f})"
        )
        if not any(
            _norm(files.a.float(), files.b.float()) > 0
            for files in (claim.files[name].pair(m) for m in claim.files[name].pairs)
        ):
            silent.append(f"{name}: every B·A is zero: it was never trained, or saved too early")
        elif effect <= noise:
            hidden.append(f"{name}: its effect is within rounding ({noise:.3g})")
    if len(claim.mode.adapters) > 1:
        both = logits["all"] - logits["base"]
        alone = sum(
            (logits[_only(name, claim)] - logits["base"] for name in claim.mode.adapters),
            torch.zeros_like(both),
        )
        figures["interaction"] = _rms(both - alone)
        lines.append(
            f"interaction (stacked − Σ each alone, relative to the base): {_rms(both - alone):.3g} "
            f"RMS of {_rms(both):.3g}; reported, not judged"
        )
    if silent:
        return failed(EFFECT, *silent, *lines, remedy="save the trained adapter again"), figures
    outcome = Outcome.TIE if hidden else Outcome.HELD
    return Verdict(name=EFFECT, outcome=outcome, evidence=(*hidden, *lines)), figures


def _only(name: str, claim: Claim) -> str:
    """The variant in which *name* acts alone."""
    others = [other for other in claim.mode.adapters if other != name]
    return f"without {others[0]}" if len(others) == 1 else f"only {name}"
