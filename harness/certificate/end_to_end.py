"""The whole model against the files: logits of live, flattened and merged applications.

One short forward pass whose rows are the variants: all adapters as the files have them, none, each
left out, null adapters (random factors of the same norm), all merged into the weight, and the live
layers as they are (`applications`). They see a few tokens from the middle of the shortest prompt;
one more row of the live layers sees how that prompt begins, to be held against the padded batch.
Knows nothing of generation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.certificate.applications import (
    OtherShapeError,
    Variant,
    product_norms,
    run_variants,
)
from harness.certificate.capture import Capture
from harness.certificate.claim import Claim
from harness.certificate.values import failed, held
from harness.engines.inspection import LiveModel
from harness.verdict import Outcome, Verdict

__all__ = ["AGREEMENT", "EFFECT", "PADDED", "check_end_to_end"]

AGREEMENT = "live, flattened and merged logits"
EFFECT = "each adapter's effect"
PADDED = "left-padded batch"
_TOKENS = 3  # of the shortest prompt: every token costs a variant's row in every layer
_NULLS = 6  # draws in all, and at least three for each adapter
_TIMES = 4.0  # how far the live logits may be from the flattened ones, in units of the merged ones
_FLOOR = 16.0  # eps of the logits' spread below which no difference is believed
_COARSE = 1e-5  # eps from which rounding hides what adapters do
_MERGED, _LIVE, _BEGUN = "merged", "live", "the prompt's beginning"


def check_end_to_end(
    live: LiveModel, claim: Claim, seen: Capture, sound: Collection[str]
) -> tuple[list[Verdict], dict[str, Any]]:
    """Agreement of the applications, each adapter's share in the logits, and padding.

    Args:
        sound: layers whose live weight is the file's, bit for bit.
    """
    number = min(range(len(seen.rows)), key=lambda n: len(seen.rows[n]))
    prompt = seen.rows[number]
    middle = max(0, len(prompt) - _TOKENS) // 2  # a chat's prompts all begin and end alike
    variants = _variants(claim)
    try:
        found = run_variants(
            live, claim, prompt[middle : middle + _TOKENS], prompt[:_TOKENS], variants, sound
        )
    except OtherShapeError as error:
        undecided = Verdict(
            name=AGREEMENT,
            outcome=Outcome.UNDECIDED,
            evidence=(str(error),),
            remedy="certify a model whose adapted layers see the prompt's tokens one for one",
        )
        return [undecided], {}
    logits = dict(zip((*variants, _MERGED, _LIVE, _BEGUN), found, strict=True))
    agreement, figures = _agreement(
        logits[_LIVE], logits["all"], logits[_MERGED], seen.logits.dtype
    )
    padded = _padding(logits[_BEGUN], seen, number, figures)
    if not claim.mode.adapters:
        return [agreement, padded], figures
    floor = _floor(seen.logits.dtype, figures["logits_spread"])
    effect, more = _effects(claim, logits, figures["noise"], floor, seen.logits.dtype)
    return [agreement, effect, padded], figures | more


def _variants(claim: Claim) -> dict[str, Variant]:
    on = {name: weight for name, weight in claim.weights.items() if weight}
    variants = {"all": Variant(weights=on)}
    if on:
        variants["base"] = Variant(weights={})
    for name in on:
        if len(on) > 1:  # a single one left out leaves the base
            rest = {n: w for n, w in on.items() if n != name}
            variants[f"without {name}"] = Variant(weights=rest)
        if len(on) > 2:  # of two, each is what is left without the other
            variants[f"only {name}"] = Variant(weights={name: on[name]})
        for draw in range(_draws(len(on))):
            variants[f"null {draw} for {name}"] = Variant(weights=on, replaced=name)
    return variants


def _draws(adapters: int) -> int:
    """Null adapters for each of *adapters*."""
    return max(3, _NULLS // adapters)


def _floor(dtype: torch.dtype, spread: float) -> float:
    """What the logits round, whatever was measured."""
    return _FLOOR * torch.finfo(dtype).eps * spread


def _rms(difference: Tensor) -> float:
    value = float(difference.double().square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


def _agreement(
    live: Tensor, flattened: Tensor, merged: Tensor, dtype: torch.dtype
) -> tuple[Verdict, dict[str, Any]]:
    spread = float(flattened.std())
    floor = _floor(dtype, spread)
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
    claim: Claim,
    logits: Mapping[str, Tensor],
    noise: float,
    floor: float,
    dtype: torch.dtype,
) -> tuple[Verdict, dict[str, Any]]:
    lines: list[str] = []
    figures: dict[str, Any] = {"effects": {}}
    silent: list[str] = []
    hidden: list[str] = []
    idle: list[str] = []
    without = {name: logits[_without(name, claim)] for name in claim.mode.adapters}
    draws = range(_draws(len(without)))
    nulls = {
        name: torch.tensor([_rms(logits[f"null {d} for {name}"] - rest) for d in draws])
        for name, rest in without.items()
    }
    share = _spread([sizes for sizes in nulls.values() if float(sizes.mean()) > 0])
    for name, rest in without.items():
        effect, null = _rms(logits["all"] - rest), float(nulls[name].mean())
        z = (effect - null) / max(share * null, 1e-12)
        figures["effects"][name] = {"rms": effect, "null_rms": null, "z": z}
        larger = "more" if z > 3 else "less" if z < -3 else "no more and no less"
        lines.append(
            f"{name} changes the logits by {effect:.3g} RMS, {larger} than random adapters of the "
            f"same norm ({null:.3g}; z = {z:.1f})"
        )
        if not any(
            float(product_norms(pair.a.float(), pair.b.float())) > 0
            for pair in (claim.files[name].pair(m) for m in claim.files[name].pairs)
        ):
            silent.append(f"{name}: every B·A is zero: it was never trained, or saved too early")
        elif effect <= floor and torch.finfo(dtype).eps < _COARSE:
            # In bfloat16 a small adapter that works can hide in the rounding; here it cannot.
            idle.append(f"{name}: its effect is within rounding ({floor:.3g})")
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
    if idle:
        remedy = "check the adapter's training, its scale and its weight"
        return failed(EFFECT, *idle, *lines, remedy=remedy), figures
    outcome = Outcome.TIE if hidden else Outcome.HELD
    return Verdict(name=EFFECT, outcome=outcome, evidence=(*hidden, *lines)), figures


def _spread(nulls: Sequence[Tensor]) -> float:
    """The standard deviation of a null adapter's effect, relative to its mean, over all adapters'
    draws: a few draws each say little alone."""
    squares = sum(float((sizes / sizes.mean() - 1).square().sum()) for sizes in nulls)
    return math.sqrt(squares / max(1, sum(len(sizes) - 1 for sizes in nulls)))


def _without(name: str, claim: Claim) -> str:
    """The variant in which *name* is left out."""
    return f"without {name}" if len(claim.mode.adapters) > 1 else "base"


def _only(name: str, claim: Claim) -> str:
    """The variant in which *name* acts alone."""
    others = [other for other in claim.mode.adapters if other != name]
    return f"without {others[0]}" if len(others) == 1 else f"only {name}"
