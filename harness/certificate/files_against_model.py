"""The files against the live model, module by module: the heart of the certificate.

Every layer's weight is compared with the base's file bit for bit (or, where adapters are merged,
within the rounding of the dtype), every adapted layer's output with
`(W + Σ wᵢ·sᵢ·BᵢAᵢ)x (+ bias)` from the files in float64. The rounding unit is measured on this
model, in this run: the wrapped layers inside, and the layers that no adapter touches, show what
the dtype alone does. Knows nothing of generation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.adapter_config import natural_order
from harness.certificate.capture import Capture
from harness.certificate.claim import Claim
from harness.certificate.factors import aliases, check_factors
from harness.certificate.layers import LayerFinding, examine_layer
from harness.certificate.values import failed, held, listed
from harness.certificate.weights import OFFLOADED, WeightFinding, compare_tensor
from harness.engines.inspection import LiveLayer, LiveModel
from harness.lora import LoraPair
from harness.verdict import Outcome, Verdict

__all__ = ["OUTPUTS", "WEIGHTS", "FilesReport", "check_files", "expected_in_weights"]

OUTPUTS = "module outputs"
WEIGHTS = "base weights"
_TIMES = 8.0  # measured rounding units that an adapted layer may be off; a clean one takes 1 to 3
_FLOOR = 0.25  # units below which the measured rounding is not believed (short sums are exact)
_COARSE = 64.0  # measured units beyond which the layers do not compute in their dtype


@dataclass(frozen=True, kw_only=True)
class FilesReport:
    """Checks and figures of the comparison; `sound` are layers whose weight is the file's."""

    checks: tuple[Verdict, ...]
    figures: Mapping[str, Any]
    sound: frozenset[str]


def expected_in_weights(live: LiveModel, claim: Claim) -> dict[str, dict[str, float]]:
    """By layer, which adapters belong in the live weight itself, and how much of them.

    In a plain model, all of the mode's. In a PEFT model, those that a layer lists as merged; and
    those that the layer does not add, if its weight is not the base's (merged before the others
    were loaded, or by hand). Not where a stranger acts in their place (a flattened adapter).
    """
    names = aliases(live, claim)
    back = {alias: name for name, alias in names.items()}
    expected: dict[str, dict[str, float]] = {}
    for module in claim.modules:
        layer = live.layers.get(module)
        terms = {name: weight for name, (weight, _) in claim.terms(module).items()}
        if layer is None or not terms:
            continue
        if not live.lora_layers:
            expected[module] = terms
            continue
        acting = set(layer.merged) or {part.name for part in layer.applied}
        if acting - set(back):
            expected[module] = terms if layer.merged else {}
        elif layer.merged:
            expected[module] = {n: w for n, w in terms.items() if names.get(n) in acting}
        else:
            absent = {n: w for n, w in terms.items() if names.get(n) not in acting}
            if absent and not _is_base(layer, claim):
                expected[module] = absent
    return expected


def _is_base(layer: LiveLayer, claim: Claim) -> bool:
    """Whether the live weight is the file's, bit for bit."""
    parts = claim.parts(f"{layer.name}.weight")
    return bool(parts) and compare_tensor(layer.name, layer.weight, parts[0].stored).equal


def check_files(live: LiveModel, claim: Claim, seen: Capture | None) -> FilesReport:
    """All checks of files against the model.

    Args:
        seen: one forward pass; None if the model cannot be run (then outputs are not judged).
    """
    names = aliases(live, claim)
    in_weight = expected_in_weights(live, claim)

    def others(adapter: str, pair: LoraPair) -> Iterable[tuple[str, LoraPair]]:
        return _others(claim, adapter, pair)

    factors = check_factors(live, claim, names, in_weight, others)
    findings = [
        examine_layer(
            layer,
            None if seen is None else seen.probes.get(name),
            claim,
            in_weight=in_weight.get(name, {}),
            others=others,
        )
        for name, layer in live.layers.items()
    ]
    weights = _check_weights(live, claim, findings, in_weight)
    outputs, figures = _check_outputs(claim, findings, seen is not None)
    return FilesReport(
        checks=(factors, outputs, weights),
        figures=figures,
        sound=frozenset(f.name for f in findings if f.weight is not None and f.weight.equal),
    )


def _others(claim: Claim, adapter: str, pair: LoraPair) -> Iterator[tuple[str, LoraPair]]:
    """The same projection of other layers, and what the stack's other adapters have here."""
    kind = pair.module.rsplit(".", 1)[-1]
    for name, files in claim.files.items():
        for module, entry in files.pairs.items():
            if module.rsplit(".", 1)[-1] != kind or (name, module) == (adapter, pair.module):
                continue
            if entry.a.shape == tuple(pair.a.shape) and entry.b.shape == tuple(pair.b.shape):
                owner = "" if name == adapter else f" of adapter {name}"
                yield f"the one of {module}{owner}", files.pair(module)


def _check_weights(
    live: LiveModel,
    claim: Claim,
    findings: Sequence[LayerFinding],
    in_weight: Mapping[str, Mapping[str, float]],
) -> Verdict:
    layered = {f"{name}.weight" for name in live.layers}
    compared: list[WeightFinding] = [f.weight for f in findings if f.weight is not None]
    compared += list(_other_tensors(live, claim, layered))
    wrong = [found for found in compared if found.cause is not None]
    merged = sum(any(terms.values()) for terms in in_weight.values())
    if not wrong:
        lines = [f"{len(compared) - merged} tensors equal the base's files bit for bit"]
        if merged:
            worst = max((f for f in compared), key=lambda f: f.units)
            lines.append(
                f"{merged} hold the adapters within rounding; the worst, {worst.name}, is "
                f"{worst.units:.2f} eps off (RMS of a row or column)"
            )
        return held(WEIGHTS, *lines)
    away = [f for f in wrong if f.cause == OFFLOADED]
    if len(away) == len(wrong):
        return Verdict(
            name=WEIGHTS,
            outcome=Outcome.UNDECIDED,
            evidence=(f"{len(away)} of {len(compared)} tensors are offloaded, the rest are right",),
            remedy="load the model without offloading (more memory, or --device cpu) and certify",
        )
    unmerged = [f for f in wrong if not any(in_weight.get(_module(f.name), {}).values())]
    plain = [f for f in compared if not any(in_weight.get(_module(f.name), {}).values())]
    wrong.sort(key=lambda f: natural_order(f.name))
    lines = [f"{len(wrong)} of {len(compared)} tensors are not what the files say"]
    if len(plain) > 4 and len(unmerged) > len(plain) / 2:
        lines.append("most of the base differs: this is a wrong base, or another revision of it")
    return failed(
        WEIGHTS,
        *lines,
        *listed([f"{f.name}: {f.cause}" for f in wrong], "tensors"),
        remedy="load the base again from the stack's folder; merge with accumulation in float32 "
        "and one rounding (lora-stack merge)",
    )


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _other_tensors(live: LiveModel, claim: Claim, layered: set[str]) -> Iterator[WeightFinding]:
    """Norms, biases, routers, fused experts: whatever no layer above has covered, either way."""
    bare: Any = live.bare
    ignored = getattr(bare, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in claim.unclaimed((*live.tensors, *live.buffers), ignored):
        yield WeightFinding(
            name=name, equal=False, units=0.0, cause="the files have it and the model does not"
        )
    finest = min(
        (layer.weight.dtype for layer in live.layers.values()),
        key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32,
    )  # fmt: skip
    for name, tensor in live.tensors.items():
        if name in layered:
            continue
        if torch.finfo(tensor.dtype).eps > torch.finfo(finest).eps:
            tensor = tensor.to(finest)  # one that was cast alone has lost what the others have
        parts = claim.parts(name)
        if not parts:
            yield WeightFinding(
                name=name, equal=False, units=0.0, cause="the files have no tensor of this name"
            )
            continue
        found = [compare_tensor(name, tensor[part.index], part.stored) for part in parts]
        yield next((f for f in found if f.cause is not None), found[0])


def _check_outputs(
    claim: Claim, findings: Sequence[LayerFinding], ran: bool
) -> tuple[Verdict, dict[str, Any]]:
    if not ran:
        return (
            Verdict(
                name=OUTPUTS,
                outcome=Outcome.UNDECIDED,
                evidence=(
                    "the model was not run: running it would change it, see the other checks",
                ),
                remedy="mend what the other checks name, then certify again",
            ),
            {},
        )
    probed = [f for f in findings if f.out is not None]
    never = [
        module for module in claim.modules
        if claim.terms(module) and module not in {f.name for f in probed}
    ]  # fmt: skip
    measured_unit, measured_row = _units(probed)
    unit, row_unit = max(measured_unit, _FLOOR), max(measured_row, 2 * _FLOOR)
    figures: dict[str, Any] = {
        "rounding_unit": measured_unit,
        "rounding_unit_row": measured_row,
        "layers": len(probed),
        "adapted": sum(f.adapted for f in probed),
    }
    wrong = [f for f in probed if _off(f, claim, unit, row_unit)]
    if probed:
        worst = max(probed, key=lambda f: f.out or 0.0)
        figures |= {"worst_module": worst.name, "worst_units": (worst.out or 0.0) / unit}
    if not probed:
        return Verdict(name=OUTPUTS, outcome=Outcome.UNDECIDED,
                       evidence=("no layer was called",)), figures  # fmt: skip
    dtype = str(probed[0].dtype).removeprefix("torch.")
    measured = f"rounding of {dtype} measured here: {measured_unit:.2g} eps of a layer's output"
    if wrong or never:
        wrong.sort(key=lambda f: -(f.out or 0.0))
        lines = [
            f"{f.name}: {f.out / unit:.3g} times the rounding"  # type: ignore[operator]
            + (f"; looks like: {f.diagnosis.cause}" if f.diagnosis else "")
            for f in wrong
        ]
        lines += [f"{module}: was never called in the forward pass" for module in never]
        return (
            failed(
                OUTPUTS,
                f"{len(wrong)} of {len(probed)} layers do not compute what the files say",
                measured,
                *listed(lines, "layers"),
                remedy="read the causes: they name the adapter and what happened to it; then load "
                "or merge the stack again",
            ),
            figures,
        )
    lines = [
        f"{len(probed)} layers ({figures['adapted']} adapted) return (W + Σ w·s·B·A)x within "
        f"{_TIMES:g} times the rounding; {measured}",
        f"the worst is {worst.name}: {(worst.out or 0.0) / unit:.2g} times",
    ]
    hidden = sum(1 for f in probed if f.adapted and _unresolved(f))
    if hidden:
        lines.append(
            f"{hidden} adapted layers have an adapter too small to be seen behind {dtype}'s "
            "rounding in their output; its factors are judged in memory"
        )
    if unit > _COARSE:
        return (
            Verdict(
                name=OUTPUTS,
                outcome=Outcome.UNDECIDED,
                evidence=(*lines, f"the layers compute {unit:.0f} times coarser than {dtype}"),
                remedy="switch reduced-precision matrix products (TF32, autocast) off",
            ),
            figures,
        )
    return held(OUTPUTS, *lines), figures


def _units(probed: Sequence[LayerFinding]) -> tuple[float, float]:
    """The dtype's own rounding: medians over wrapped layers inside and unadapted layers.

    An embedding looks rows up and rounds nothing, so it does not count.
    """
    sound = [f for f in probed if f.weight is not None and f.weight.equal]
    pairs = [(f.base_out or 0.0, f.base_row or 0.0) for f in sound if f.base_out is not None]
    if not pairs:
        pairs = [(f.out or 0.0, f.row or 0.0) for f in sound if not f.adapted and f.out]
    if not pairs:
        pairs = [(f.out or 0.0, f.row or 0.0) for f in probed if f.out]
    if not pairs:
        return 0.0, 0.0
    unit = statistics.median(pair[0] for pair in pairs)
    row = statistics.median(pair[1] for pair in pairs)
    return unit, row


def _off(finding: LayerFinding, claim: Claim, unit: float, row_unit: float) -> bool:
    assert finding.out is not None
    assert finding.row is not None
    if not finding.out <= _TIMES * unit or not finding.row <= 2 * _TIMES * row_unit:
        return True
    return bool(_crooked(finding, claim))


def _slack(finding: LayerFinding) -> float:
    """What a coefficient may be off beside its standard error: rounding is not quite random."""
    assert finding.dtype is not None
    return 0.005 if torch.finfo(finding.dtype).eps < 1e-5 else 0.1


def _crooked(finding: LayerFinding, claim: Claim) -> list[str]:
    """Adapters whose coefficient is not the mode's weight, beyond what rounding can do."""
    errors = finding.errors or {}
    return [
        name
        for name, value in (finding.coefficients or {}).items()
        if abs(value - claim.weights[name]) > _slack(finding) + 10 * errors[name]
    ]


def _unresolved(finding: LayerFinding) -> bool:
    return any(10 * error > 0.5 for error in (finding.errors or {}).values())
