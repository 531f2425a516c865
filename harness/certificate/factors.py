"""The adapters in memory against their files, layer by layer, exactly.

What counts is the sum that the forward pass adds, `Σ s·B·A` over what is applied in the layer: it
is compared with the files' in factored form (a QR of the stacked A's), so that other factors of
the same product (permuted ranks, powers of two moved from A to B) are no fault, and one flipped
bit is. Knows nothing of outputs or of base weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from harness.certificate.claim import Claim, same_bits
from harness.certificate.diagnosis import diagnose
from harness.certificate.values import failed, held, listed
from harness.engines.inspection import LiveAdapter, LiveLayer, LiveModel
from harness.lora import LoraPair
from harness.verdict import Outcome, Verdict

__all__ = ["ADAPTERS", "aliases", "check_factors"]

ADAPTERS = "adapters in memory"
_EXACT = 1e-12  # relative to the product: what float64 itself rounds
_FLATTENED = 64  # eps of the factors' dtype, for adapters that were concatenated and rescaled
_DIRECTIONS = 16
_AWAY = "adapters are offloaded and not here to be compared"

Others = Callable[[str, LoraPair], Iterable[tuple[str, LoraPair]]]


def aliases(live: LiveModel, claim: Claim) -> dict[str, str]:
    """The name in memory of each adapter of the stack that is loaded.

    An adapter that the user called otherwise (`default`) is known by its factors.
    """
    found = {name: name for name in claim.files if name in live.adapters}
    for name, files in claim.files.items():
        if name in found:
            continue
        module = next((m for m in files.pairs if m in live.layers), None)
        if module is None:
            continue
        pair = files.pair(module)
        for stranger in live.adapters:
            part = live.layers[module].adapters.get(stranger)
            if stranger in found.values() or part is None or part.a.shape != pair.a.shape:
                continue
            if torch.equal(part.a.cpu(), pair.a.to(part.a.dtype)):
                found[name] = stranger
                break
    return found


def check_factors(
    live: LiveModel,
    claim: Claim,
    names: Mapping[str, str],
    in_weight: Mapping[str, Mapping[str, float]],
    others: Others,
) -> Verdict:
    """Compare what each layer would add with what the files say, adapter by adapter.

    Args:
        names: the stack's adapters by their names in memory (`aliases`).
        in_weight: by layer, what belongs in the weight and so not in the forward pass.
    """
    if not live.lora_layers and not live.foreign:
        return Verdict(
            name=ADAPTERS,
            outcome=Outcome.SKIPPED,
            evidence=("the model is plain: no LoRA layer; the weights are judged instead",),
        )
    faults: list[str] = [
        f"{foreign.name or 'the model'}: a {foreign.kind} of PEFT acts here, which is no plain "
        "LoRA layer"
        for foreign in live.foreign
    ]
    notes: set[str] = set()
    compared = 0
    for name in dict.fromkeys((*live.lora_layers, *claim.modules)):
        layer = live.layers.get(name)
        wanted = {
            adapter: (weight - in_weight.get(name, {}).get(adapter, 0.0), pair)
            for adapter, (weight, pair) in claim.terms(name).items()
        }
        wanted = {n: (w, p) for n, (w, p) in wanted.items() if w}
        if layer is None or (not layer.wrapped and wanted):
            where = "has no such module" if layer is None else "has no adapter at this module"
            faults += [f"{name}: adapter {a} is missing here: the model {where}" for a in wanted]
            continue
        if layer.merged:
            notes.add("adapters are merged into the weights, which are judged instead")
            continue
        compared += len(wanted)
        fault = _layer_fault(layer, claim, wanted, names, others, notes)
        if fault:
            faults.append(f"{name}: {fault}")
    if faults:
        return failed(
            ADAPTERS,
            f"{len(faults)} layers hold something else than the files",
            *listed(faults, "layers"),
            remedy="load the stack again: harness.load_engine(stack), or PeftModel.from_pretrained "
            "and model.base_model.set_adapter([...]) with every adapter's name",
        )
    if _AWAY in notes:
        return Verdict(
            name=ADAPTERS,
            outcome=Outcome.UNDECIDED,
            evidence=(_AWAY,),
            remedy="load the model without offloading (more memory, or --device cpu) and certify",
        )
    called = [f"{name} is called {alias!r} in memory" for name, alias in names.items()
              if name != alias]  # fmt: skip
    return held(ADAPTERS, f"{compared} pairs equal their files", *called, *sorted(notes))


def _layer_fault(
    layer: LiveLayer,
    claim: Claim,
    wanted: Mapping[str, tuple[float, LoraPair]],
    names: Mapping[str, str],
    others: Others,
    notes: set[str],
) -> str | None:
    for part in layer.applied:
        if part.extra is not None:
            return f"adapter {part.name} is more than s·B·A: {part.extra}"
        if "meta" in (part.a.device.type, part.b.device.type):
            notes.add(_AWAY)
            return None
        sums = [float(factor.sum(dtype=torch.float64)) for factor in (part.a, part.b)]
        if not all(map(math.isfinite, sums)):
            return f"adapter {part.name} holds NaN or infinity"
    if _same_parts(layer, wanted, names):
        return None
    own = {names.get(adapter) for adapter in wanted}
    flattened = bool(layer.applied) and all(p.name not in own for p in layer.applied)
    live_a, live_b = _stacked([(1.0, _pair(layer, p)) for p in layer.applied], layer)
    cast = {n: (w, _cast(layer, n, p, names)) for n, (w, p) in wanted.items()}
    file_a, file_b = _stacked(list(cast.values()), layer)
    distance = _product_norm(torch.cat([live_a, file_a]), torch.cat([live_b, -file_b], dim=1))
    size = max(_product_norm(live_a, live_b), _product_norm(file_a, file_b))
    if size == 0:
        return None
    eps = max((torch.finfo(p.a.dtype).eps for p in layer.applied), default=_EXACT)
    if distance <= (_FLATTENED * eps if flattened else _EXACT) * size:
        if flattened:
            together = " and ".join(sorted({p.name for p in layer.applied}))
            notes.add(f"applied as one adapter called {together!r}")
        elif wanted:
            notes.add("some pairs are other factors of the same product")
        return None
    cause = _cause(layer, claim, {n: p for n, (_, p) in cast.items()}, others)
    return f"{cause} ({distance / size:.2g} of the product){_activity(layer, wanted, names)}"


def _same_parts(
    layer: LiveLayer, wanted: Mapping[str, tuple[float, LoraPair]], names: Mapping[str, str]
) -> bool:
    """The common case, without arithmetic: the same adapters with the same bits and scales."""
    applied = [part.name for part in layer.applied]
    if sorted(applied) != sorted(names.get(n, "") for n in wanted):
        return False
    for name, (weight, pair) in wanted.items():
        part = layer.adapters[names[name]]
        scale = weight * pair.scale
        if abs(part.scale - scale) > 1e-9 * abs(scale):
            return False
        lossless = part.a.dtype in (pair.a.dtype, torch.float32, torch.float64)
        if not lossless and part.a.dtype != layer.weight.dtype:
            return False
        for live, stored in ((part.a, pair.a), (part.b, pair.b)):
            if live.device.type != "meta" and not same_bits(live.cpu(), stored.to(live.dtype)):
                return False
    return True


def _cast(layer: LiveLayer, name: str, pair: LoraPair, names: Mapping[str, str]) -> LoraPair:
    """The file's pair as a correct loader leaves it: in the base's dtype, where memory has that."""
    part = layer.adapters.get(names.get(name, name))
    if part is None or part.a.dtype != layer.weight.dtype:
        return pair
    dtype = part.a.dtype
    return dataclasses.replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))


def _pair(layer: LiveLayer, part: LiveAdapter) -> LoraPair:
    return LoraPair(module=layer.name, a=part.a.cpu(), b=part.b.cpu(), scale=part.scale)


def _stacked(terms: Sequence[tuple[float, LoraPair]], layer: LiveLayer) -> tuple[Tensor, Tensor]:
    """`A` and `B` in float64 whose product is the sum of the terms."""
    rows, columns = layer.weight.shape
    if layer.kind != "linear":
        rows, columns = columns, rows
    a = [torch.zeros((0, columns), dtype=torch.float64)]
    b = [torch.zeros((rows, 0), dtype=torch.float64)]
    for weight, pair in terms:
        a.append(pair.a.double())
        b.append(pair.b.double() * (weight * pair.scale))
    return torch.cat(a), torch.cat(b, dim=1)


def _product_norm(a: Tensor, b: Tensor) -> float:
    """`‖B·A‖` (Frobenius) without forming the product; accurate also where terms cancel."""
    if a.shape[0] == 0:
        return 0.0
    upper = torch.linalg.qr(a.T, mode="r").R
    return float((b @ upper.T).norm())


def _cause(layer: LiveLayer, claim: Claim, wanted: Mapping[str, LoraPair], others: Others) -> str:
    """Read the sum that the layer applies through random inputs, and name what is wrong."""
    pairs = {**claim.pairs(layer.name), **wanted}
    generator = torch.Generator().manual_seed(0)
    live_a, live_b = _stacked([(1.0, _pair(layer, p)) for p in layer.applied], layer)
    x = torch.randn((_DIRECTIONS, live_a.shape[1]), generator=generator, dtype=torch.float64)
    excess = x @ live_a.T @ live_b.T
    flipped = _signs(layer, wanted)
    if flipped:
        return flipped
    candidates = [found for n in wanted for found in others(n, pairs[n])]
    weights = {name: claim.weights[name] for name in pairs}
    return diagnose(excess, x, weights, pairs, noise=0.0, others=candidates).cause


def _signs(layer: LiveLayer, wanted: Mapping[str, LoraPair]) -> str | None:
    """A few entries that differ in their sign alone."""
    for name, pair in wanted.items():
        part = layer.adapters.get(name)
        if part is None or part.a.shape != pair.a.shape or part.b.shape != pair.b.shape:
            continue
        for factor, live, stored in (("A", part.a, pair.a), ("B", part.b, pair.b)):
            now, then = live.cpu().double(), stored.double()
            changed = now != then
            count = int(changed.sum())
            if 0 < count < now.numel() and bool((now[changed] == -then[changed]).all()):
                return f"adapter {name}: the sign of {count} entries of {factor} is flipped"
            if 0 < count <= max(1, now.numel() // 4):
                return (
                    f"adapter {name}: {count} of {now.numel()} entries of {factor} differ: "
                    "another version of the file"
                )
    return None


def _activity(
    layer: LiveLayer, wanted: Mapping[str, tuple[float, LoraPair]], names: Mapping[str, str]
) -> str:
    """Why an adapter is not applied, where the layer itself says so."""
    off = [n for n in wanted if names.get(n) not in [p.name for p in layer.applied]]
    if not off:
        return ""
    if layer.disabled:
        return "; the layer's adapters are disabled"
    loaded = [n for n in off if names.get(n) in layer.adapters]
    if loaded:
        return f"; {' and '.join(loaded)} is loaded here and not active"
    return f"; {' and '.join(off)} is not loaded here"
