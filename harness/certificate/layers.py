"""One live layer against the files: its weight, and its output in float64.

Knows nothing of thresholds over several layers; `files_against_model` sets them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.certificate.capture import Probe
from harness.certificate.claim import Claim
from harness.certificate.diagnosis import Diagnosis, diagnose, fit, respond
from harness.certificate.weights import (
    OFFLOADED,
    Others,
    Scan,
    WeightFinding,
    named_others,
    scan_embedding,
    scan_linear,
)
from harness.engines.inspection import LiveLayer
from harness.lora import LoraPair

__all__ = ["LayerFinding", "examine_layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinding:
    """One layer's figures; units are eps of the coarsest dtype involved, times the output's size.

    Attributes:
        out: RMS error of the output; `row` of its worst output row.
        base_out: the same of the wrapped layer inside: the dtype's own rounding, measured.
        coefficients: what each adapter contributes, by least squares; `errors` their standard
            errors.
        diagnosis: named where the figures looked wrong at once.
    """

    name: str
    adapted: bool
    weight: WeightFinding | None
    out: float | None = None
    row: float | None = None
    base_out: float | None = None
    base_row: float | None = None
    dtype: torch.dtype | None = None
    coefficients: Mapping[str, float] | None = None
    errors: Mapping[str, float] | None = None
    diagnosis: Diagnosis | None = None


def examine_layer(
    layer: LiveLayer,
    probe: Probe | None,
    claim: Claim,
    *,
    in_weight: Mapping[str, float],
    others: Others,
) -> LayerFinding:
    """Judge one layer.

    Args:
        in_weight: weights of the adapters that belong in the live weight itself (merged).
        others: candidate pairs of other modules, for the diagnosis.
    """
    pairs = claim.pairs(layer.name)
    weights = {name: claim.weights[name] for name in pairs}
    adapted = any(weights.values())
    merged = {name: in_weight[name] for name in pairs if in_weight.get(name)}
    parts = claim.parts(f"{layer.name}.weight")
    if not parts:
        return LayerFinding(
            name=layer.name,
            adapted=adapted,
            weight=WeightFinding(
                name=f"{layer.name}.weight", equal=False, units=0.0,
                cause="the files have no tensor of this name",
            ),
        )  # fmt: skip
    stored, live = parts[0].stored, layer.weight
    if stored.shape != live.shape or live.device.type == "meta":
        cause = (
            OFFLOADED
            if live.device.type == "meta"
            else f"its shape is {list(live.shape)}, the file's {list(stored.shape)}"
        )
        weight = WeightFinding(name=f"{layer.name}.weight", equal=False, units=0.0, cause=cause)
        return LayerFinding(name=layer.name, adapted=adapted, weight=weight)
    device = live.device if live.device.type == "cuda" else torch.device("cpu")
    x = None if probe is None else probe.x.to(device)
    if layer.kind == "embedding":
        scanned = scan_embedding(layer, stored, merged, pairs, device, others, x)
    else:
        scanned = scan_linear(layer, stored, merged, pairs, device, others, x)
    if probe is None or x is None or scanned.reference is None:
        return LayerFinding(name=layer.name, adapted=adapted, weight=scanned.weight)
    return _outputs(layer, probe, x, scanned, weights, pairs, adapted, others)


def _outputs(
    layer: LiveLayer,
    probe: Probe,
    x: Tensor,
    scanned: Scan,
    weights: Mapping[str, float],
    pairs: Mapping[str, LoraPair],
    adapted: bool,
    others: Others,
) -> LayerFinding:
    assert scanned.reference is not None
    reference, weight = scanned.reference, scanned.weight
    device = reference.device
    if layer.bias is not None:
        reference = reference + layer.bias.to(device, torch.float64)[: reference.shape[1]]
    rows = reference.shape[1]
    # Gemma scales inside the embedding, what adapters add included; the factor is a buffer.
    scaled = getattr(layer.inner, "embed_scale", None) if layer.kind == "embedding" else None
    factor = 1.0 if scaled is None else float(scaled.to(layer.weight.dtype))
    y = probe.y[:, :rows].to(device, torch.float64) / factor
    responses = {name: respond(pair, x) for name, pair in pairs.items()}
    claimed = sum((weights[n] * responses[n] for n in pairs), torch.zeros_like(reference))
    error = y - reference - claimed
    dtypes = [probe.y.dtype, layer.weight.dtype]
    if probe.x.dtype.is_floating_point:
        dtypes.append(probe.x.dtype)
    coarse = max(dtypes, key=lambda d: torch.finfo(d).eps)
    eps = torch.finfo(coarse).eps
    size = float((reference + claimed).square().mean().sqrt())
    if layer.kind != "embedding":
        # Where the products cancel, the output is smaller than what was rounded on the way.
        size += float(x.double().norm()) * scanned.norm / math.sqrt(x.shape[0] * rows * x.shape[1])
    size += sum(abs(weights[n]) * float(r.square().mean().sqrt()) for n, r in responses.items())
    unit = eps * max(size, 1e-300)
    base_error = None
    if probe.base_y is not None and weight.equal:
        base_error = probe.base_y[:, :rows].to(device, torch.float64) / factor - reference
    out, row = _rms(error) / unit, _worst(error) / unit
    own = 0.3 if base_error is None else max(_rms(base_error) / unit, 0.05)
    found = fit(y - reference, responses, own * unit)
    slack = 0.005 if eps < 1e-5 else 0.1
    crooked = any(
        abs(c - weights[n]) > slack + 10 * found.errors[n] for n, c in found.coefficients.items()
    )
    diagnosis = None
    if crooked or not out <= 3 * max(own, 0.3) or not row <= 6 * max(own, 0.3):
        diagnosis = diagnose(
            y - reference, x, weights, pairs, noise=own * unit,
            others=list(named_others(layer.name, pairs, others)),
        )  # fmt: skip
    return LayerFinding(
        name=layer.name,
        adapted=adapted,
        weight=weight,
        out=out,
        row=row,
        base_out=None if base_error is None else _rms(base_error) / unit,
        base_row=None if base_error is None else _worst(base_error) / unit,
        dtype=coarse,
        coefficients=found.coefficients,
        errors=found.errors,
        diagnosis=diagnosis,
    )


def _rms(error: Tensor) -> float:
    value = float(error.square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


def _worst(error: Tensor) -> float:
    """RMS of the worst output row."""
    value = float(error.square().mean(dim=0).max().sqrt())
    return value if math.isfinite(value) else math.inf
