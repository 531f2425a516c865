"""What a wrong module looks like: missing, off by a factor, transposed, another adapter's, …

A judge of linear responses. A module's excess over the base, `z = y − Wx`, should be
`Σ wᵢ·sᵢ·BᵢAᵢx`. Least squares gives the coefficient that each adapter really has; where the
adapters do not span what was found, named hypotheses are tried, and the one that explains it
down to the rounding is reported. The same arithmetic reads outputs (x is what the module was
given) and weights (x is random). Knows nothing of models, files or thresholds of dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.lora import LoraPair

__all__ = ["Diagnosis", "Fit", "diagnose", "fit", "respond"]

_SAME = 0.02  # relative: a coefficient this near to a hypothesis is called by its name
_EXPLAINED = 0.1  # a hypothesis explains an excess if it leaves less than this share of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Least-squares coefficients of the adapters in an excess.

    Attributes:
        coefficients: by adapter; the claimed value is the adapter's weight in the mode.
        errors: one standard error each, from the noise that was given.
        residual: RMS of what no combination of the adapters explains.
    """

    coefficients: Mapping[str, float]
    errors: Mapping[str, float]
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The likeliest cause, in words that begin the same way for the same fault."""

    cause: str
    coefficients: Mapping[str, float]


def respond(pair: LoraPair, x: Tensor) -> Tensor:
    """`s·BAx` in float64, `(n, out)`; *x* is `(n, in)`, or `(n,)` token ids for an embedding."""
    a, b = pair.a.to(x.device, torch.float64), pair.b.to(x.device, torch.float64)
    inner = x.to(torch.float64) @ a.T if x.dtype.is_floating_point else a.T[x]
    return (inner @ b.T) * pair.scale


def fit(excess: Tensor, responses: Mapping[str, Tensor], noise: float) -> Fit:
    """Fit `excess ≈ Σ cᵢ·responses[i]`; all `(n, out)` float64, *noise* the RMS of an entry."""
    names = [name for name, response in responses.items() if float(response.norm()) > 0]
    if not names or not bool(torch.isfinite(excess).all()):
        return Fit(coefficients={}, errors={}, residual=float(excess.square().mean().sqrt()))
    flat = torch.stack([responses[name].reshape(-1) for name in names])
    norms = flat.norm(dim=1)
    unit = flat / norms[:, None]
    gram = unit @ unit.T
    inverse = torch.linalg.pinv(gram, rcond=1e-10)
    scaled = inverse @ (unit @ excess.reshape(-1))
    left = excess.reshape(-1) - scaled @ unit
    coefficients = scaled / norms
    errors = noise * inverse.diagonal().clamp(min=0).sqrt() / norms
    return Fit(
        coefficients=dict(zip(names, coefficients.tolist(), strict=True)),
        errors=dict(zip(names, errors.tolist(), strict=True)),
        residual=float(left.square().mean().sqrt()),
    )


def diagnose(
    excess: Tensor,
    x: Tensor,
    weights: Mapping[str, float],
    pairs: Mapping[str, LoraPair],
    *,
    noise: float,
    others: Iterable[tuple[str, LoraPair]] = (),
) -> Diagnosis:
    """Name the cause of a wrong excess.

    Args:
        excess: what was found beyond the base, `(n, out)` float64.
        x: the inputs, as `respond` takes them.
        weights: the claimed coefficients; 0 for adapters that should be off.
        pairs: the factors that the files have for this module, by adapter.
        noise: RMS of the rounding in an entry of *excess*.
        others: pairs of other modules of the same shape, each with its place in words.
    """
    if not bool(torch.isfinite(excess).all()):
        return Diagnosis(cause="NaN or infinity in what the module returns", coefficients={})
    responses = {name: respond(pair, x) for name, pair in pairs.items()}
    found = fit(excess, responses, noise)
    size = float(excess.square().mean().sqrt())
    floor = max(4 * noise, 1e-10 * size)
    claimed = sum((weights[n] * r for n, r in responses.items()), torch.zeros_like(excess))
    wrong = excess - claimed
    if found.residual <= max(floor, 0.05 * float(wrong.square().mean().sqrt())):
        return Diagnosis(
            cause=_of_coefficients(found, weights, pairs), coefficients=found.coefficients
        )
    best, cause = _EXPLAINED * float(wrong.norm()), ""
    for label, hypothesis in _hypotheses(weights, pairs, responses, x, others):
        left = float((wrong - hypothesis).norm())
        if left < best:
            best, cause = left, label
    if cause:
        return Diagnosis(cause=cause, coefficients=found.coefficients)
    return Diagnosis(
        cause=_unexplained(excess, claimed, found, weights), coefficients=found.coefficients
    )


def _of_coefficients(
    found: Fit, weights: Mapping[str, float], pairs: Mapping[str, LoraPair]
) -> str:
    wanted = {n: w for n, w in weights.items() if n in found.coefficients}
    near = {
        n: abs(found.coefficients[n] - w) <= max(_SAME * abs(w or 1.0), 4 * found.errors[n])
        for n, w in wanted.items()
    }
    gone = [
        n
        for n, w in wanted.items()
        if w and abs(found.coefficients[n]) <= max(_SAME, 4 * found.errors[n]) and not near[n]
    ]
    present = [n for n, w in wanted.items() if w and n not in gone]
    if gone and not present:
        return f"no adapter is applied here ({' and '.join(gone)} missing)"
    words = [f"adapter {name} is missing here: {' and '.join(present)} only" for name in gone]
    for name, weight in wanted.items():
        if name in gone or near[name]:
            continue
        coefficient = found.coefficients[name]
        if weight == 0:
            words.append(f"adapter {name} is applied here ({coefficient:.4g}×) and should be off")
        else:
            words.append(_of_ratio(name, coefficient / weight, pairs[name]))
    if not words:
        worst = max(wanted, key=lambda n: abs(found.coefficients[n] - wanted[n]), default=None)
        if worst is None:
            return "differs from the files"
        if wanted[worst] == 0:
            return f"adapter {worst} is applied here ({found.coefficients[worst]:.4g}×)"
        words.append(_of_ratio(worst, found.coefficients[worst] / wanted[worst], pairs[worst]))
    return "; ".join(words)


def _of_ratio(name: str, ratio: float, pair: LoraPair) -> str:
    if abs(ratio + 1) <= _SAME:
        return f"the sign of adapter {name} is flipped"
    note = ""
    root = math.sqrt(pair.rank)
    alpha = pair.scale * pair.rank
    if pair.rank > 1 and abs(ratio / root - 1) <= _SAME:
        note = f", which is √r with r = {pair.rank}: rsLoRA's scale (or PEFT's cat of rsLoRA)"
    elif pair.rank > 1 and abs(ratio * root - 1) <= _SAME:
        note = f", which is 1/√r: alpha/r where rsLoRA was meant, r = {pair.rank}"
    elif alpha and abs(ratio * alpha / 8 - 1) <= _SAME < abs(alpha / 8 - 1):
        note = ", which is what PEFT's default alpha of 8 gives"
    elif abs(ratio * pair.scale - 1) <= _SAME < abs(pair.scale - 1):
        note = ", which is a scale of 1: alpha/r was left out"
    elif abs(ratio - 2) <= _SAME:
        note = ", as if it were applied twice"
    return f"the scale of adapter {name} is off by {ratio:.4g}×{note}"


def _hypotheses(
    weights: Mapping[str, float],
    pairs: Mapping[str, LoraPair],
    responses: Mapping[str, Tensor],
    x: Tensor,
    others: Iterable[tuple[str, LoraPair]],
) -> Iterator[tuple[str, Tensor]]:
    """What the difference from the claim would be under each hypothesis."""
    active = [n for n in pairs if weights[n] != 0]
    claimed = sum((weights[n] * responses[n] for n in active), torch.zeros(()))
    for name in active:
        pair, weight = pairs[name], weights[name]
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            rounded = dataclasses.replace(
                pair, a=pair.a.to(dtype).to(pair.a.dtype), b=pair.b.to(dtype).to(pair.b.dtype)
            )
            label = f"adapter {name} was rounded through {str(dtype).removeprefix('torch.')}"
            yield label, weight * (respond(rounded, x) - responses[name])
        if pair.a.shape[1] == pair.b.shape[0] and x.dtype.is_floating_point:
            turned = dataclasses.replace(pair, a=pair.b.T, b=pair.a.T)
            yield (
                f"adapter {name}'s delta is transposed",
                weight * (respond(turned, x) - responses[name]),
            )
        for other in pairs:
            if other == name:
                continue
            swapped = (pairs[other].a.shape, pairs[other].b.shape)
            if swapped == (pair.a.shape, pair.b.shape):
                for label, a, b in (
                    (f"A of {other} with B of {name}", pairs[other].a, pair.b),
                    (f"A of {name} with B of {other}", pair.a, pairs[other].b),
                ):
                    mixed = dataclasses.replace(pair, a=a, b=b)
                    yield label, weight * (respond(mixed, x) - responses[name])
    crossed = _crossed([pairs[n] for n in active], [weights[n] for n in active])
    if crossed is not None:
        label = "A and B were summed apart (PEFT's `linear`): B·A has cross terms"
        yield label, respond(crossed, x) - claimed
        # With rsLoRA, PEFT gives the sum alpha = r and scales it once more, by r/√r.
        root = math.sqrt(crossed.rank)
        yield (
            f"{label}, all of it √r = {root:.3g} times too large",
            (root * respond(crossed, x) - claimed),
        )
    for place, pair in others:
        for name in active:
            if (pairs[name].a.shape, pairs[name].b.shape) == (pair.a.shape, pair.b.shape):
                label = f"adapter {name} here is {place}"
                yield label, weights[name] * (respond(pair, x) - responses[name])


def _crossed(pairs: list[LoraPair], weights: list[float]) -> LoraPair | None:
    """What `add_weighted_adapter(…, "linear")` gives: `(Σ√(ws)B)(Σ√(ws)A)`, if it can exist."""
    if len(pairs) < 2 or len({(p.a.shape, p.b.shape) for p in pairs}) > 1:
        return None
    factors = [w * p.scale for w, p in zip(weights, pairs, strict=True)]
    if any(f <= 0 for f in factors):
        return None
    a = sum((math.sqrt(f) * p.a.double() for f, p in zip(factors, pairs, strict=True)),
            torch.zeros(()))  # fmt: skip
    b = sum((math.sqrt(f) * p.b.double() for f, p in zip(factors, pairs, strict=True)),
            torch.zeros(()))  # fmt: skip
    return dataclasses.replace(pairs[0], a=a, b=b, scale=1.0)


def _unexplained(excess: Tensor, claimed: Tensor, found: Fit, weights: Mapping[str, float]) -> str:
    wrong = excess - claimed
    size = float(claimed.norm())
    if size == 0:
        return "something is added here that is none of the stack's adapters"
    share = float(wrong.norm()) / size
    rows = wrong.norm(dim=0)
    odd = int((rows > 1e-3 * float(rows.max())).sum())
    if odd * 4 <= wrong.shape[1] and share < 0.5:
        return f"{odd} of {wrong.shape[1]} output rows differ: another version of the file"
    whole = {n: found.coefficients.get(n, 0.0) for n, w in weights.items() if w}
    lost = [n for n, c in whole.items() if abs(c) < 0.2]
    if share < 0.5:
        return f"differs from the files by {share:.2g} of the adapters' effect: another version"
    if lost:
        return f"another version of adapter {' and '.join(lost)}, or another adapter in its place"
    return "another version of the file, or a changed base weight"
