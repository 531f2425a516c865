"""The whole model against the files: logits of live, flattened and merged applications.

The reference is the live network with every adapted layer's output replaced by what the files
say, in one forward pass whose rows are the variants: all adapters, none, each left out, and null
adapters (random factors of the same norm). Nothing of the model is switched, merged or copied.
Knows nothing of generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

__all__ = ["AGREEMENT", "EFFECT", "check_end_to_end"]

AGREEMENT = "live, flattened and merged logits"
EFFECT = "each adapter's effect"
_TOKENS = 16
_NULLS = 4
_NULL_RANK = 8  # enough directions for a norm to mean something; drawing more is what costs
_TIMES = 4.0  # how far the live logits may be from the flattened ones, in units of the merged ones
_FLOOR = 16.0  # eps of the logits' spread below which no difference is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One row: a weight for each adapter, and which of them is replaced by null draw `null`."""

    weights: Mapping[str, float]
    replaced: str | None = None
    null: int = 0


def check_end_to_end(
    live: LiveModel, claim: Claim, rows: Sequence[Sequence[int]], seen: Capture
) -> tuple[list[Verdict], dict[str, Any]]:
    """Agreement of the applications, and each adapter's share in the logits."""
    row = list(rows[0][:_TOKENS])
    variants = _variants(claim)
    try:
        flattened = _run(live, claim, [row] * len(variants), _flattened(claim, variants))
        merged = _run(live, claim, [row], _merged(claim))[0]
    except _OtherShapeError as error:
        undecided = Verdict(
            name=AGREEMENT,
            outcome=Outcome.UNDECIDED,
            evidence=(str(error),),
            remedy="certify a model whose adapted layers see the prompt's tokens one for one",
        )
        return [undecided], {}
    logits = dict(zip(variants, flattened, strict=True))
    now = seen.logits[0, : len(row)].float()
    agreement, figures = _agreement(now, logits["all"], merged, seen.logits.dtype)
    if not claim.mode.adapters:
        return [agreement], figures
    effect, more = _effects(claim, logits, figures["noise"])
    return [agreement, effect], figures | more


def _variants(claim: Claim) -> dict[str, _Variant]:
    on = {name: weight for name, weight in claim.weights.items() if weight}
    variants = {"all": _Variant(weights=on)}
    if on:
        variants["base"] = _Variant(weights={})
    for name in on:
        variants[f"without {name}"] = _Variant(weights={n: w for n, w in on.items() if n != name})
        if len(on) > 1:
            variants[f"only {name}"] = _Variant(weights={name: on[name]})
        for draw in range(_NULLS):
            variants[f"null {draw} for {name}"] = _Variant(weights=on, replaced=name, null=draw)
    return variants


class _OtherShapeError(Exception):
    """An adapted layer sees something else than the prompt's tokens."""


Replace = Callable[[LiveLayer, Tensor, Tensor], Tensor]


def _run(live: LiveModel, claim: Claim, rows: list[list[int]], replace: Replace) -> list[Tensor]:
    """Logits, `(tokens, vocabulary)` a row, with every adapted layer's output replaced."""
    adapted = dict.fromkeys((*live.lora_layers, *(m for m in claim.modules if m in live.layers)))
    handles = []

    def hook_of(layer: LiveLayer) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            if x.shape[0] != len(rows):
                raise _OtherShapeError(f"{layer.name} is called on {list(x.shape)}")
            return replace(layer, x, output)

        return hook

    try:
        for name in adapted:
            layer = live.layers[name]
            handles.append(layer.outer.register_forward_hook(hook_of(layer)))
        ids = torch.tensor(rows)
        logits = forward(live.root, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return [row.float() for row in logits]


def _base(layer: LiveLayer, claim: Claim, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What the base's layer returns, from the file's weight (or another in its place)."""
    if weight is None:
        weight = claim.parts(f"{layer.name}.weight")[0].stored
    weight = weight.to(layer.weight.device, layer.weight.dtype)
    if layer.kind == "embedding":
        scale = getattr(layer.inner, "embed_scale", None)
        rows = nn.functional.embedding(x, weight)
        return rows if scale is None else rows * scale
    turned = weight.T if layer.kind == "conv1d" else weight
    return nn.functional.linear(x, turned, layer.bias)


def _flattened(claim: Claim, variants: Mapping[str, _Variant]) -> Replace:
    """Base plus one low-rank path a row, in float32, from the files."""
    nulls = any(variant.replaced for variant in variants.values())

    def replace(layer: LiveLayer, x: Tensor, output: Tensor) -> Tensor:
        result = _base(layer, claim, x).float()
        for name, pair in claim.pairs(layer.name).items():
            own = _path(layer, pair, x)
            norm = _norm(pair.a, pair.b) if nulls else 0.0
            for place, variant in enumerate(variants.values()):
                weight = variant.weights.get(name, 0.0)
                if not weight:
                    continue
                if variant.replaced == name:
                    null = _null(pair, variant.null, norm)
                    result[place] += weight * _path(layer, null, x[place])
                else:
                    result[place] += weight * own[place]
        return result.to(output.dtype)

    return replace


def _path(layer: LiveLayer, pair: LoraPair, x: Tensor) -> Tensor:
    a, b = pair.a.to(x.device, torch.float32), pair.b.to(x.device, torch.float32)
    inner = a.T[x] if layer.kind == "embedding" else x.float() @ a.T
    return (inner @ b.T) * pair.scale


def _null(pair: LoraPair, draw: int, norm: float) -> LoraPair:
    """Random factors whose product has the norm of the pair's (and a rank of its or a few)."""
    seed = (sum(pair.module.encode()) * 1009 + draw * 7919 + pair.rank) % (1 << 31)
    generator = torch.Generator().manual_seed(seed)
    rank = min(pair.rank, _NULL_RANK)
    a = torch.randn((rank, pair.a.shape[1]), generator=generator)
    b = torch.randn((pair.b.shape[0], rank), generator=generator)
    own = _norm(a, b)
    return LoraPair(module=pair.module, a=a, b=b * (norm / own if own else 0.0), scale=pair.scale)


def _norm(a: Tensor, b: Tensor) -> float:
    """`‖B·A‖`, from the two Gram matrices."""
    a, b = a.float(), b.float()
    gram = ((a @ a.T) * (b.T @ b)).double()
    return math.sqrt(max(0.0, float(gram.sum())))


def _merged(claim: Claim) -> Replace:
    """The deltas added into the file's weight, accumulated in float32 and rounded once."""

    def replace(layer: LiveLayer, x: Tensor, output: Tensor) -> Tensor:
        terms = list(claim.terms(layer.name).values())
        stored = claim.parts(f"{layer.name}.weight")[0].stored
        if not terms:
            return _base(layer, claim, x).to(output.dtype)
        device = layer.weight.device
        flat = flatten_pairs([(factor, _plain(pair)) for factor, pair in terms])
        a, b = flat.a.to(device, torch.float32), flat.b.to(device, torch.float32)
        if layer.kind != "linear":
            a, b = b.T, a.T
        weight = torch.addmm(stored.to(device, torch.float32), b, a)
        return _base(layer, claim, x, weight).to(output.dtype)

    return replace


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
            (logits[f"only {name}"] - logits["base"] for name in claim.mode.adapters),
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
