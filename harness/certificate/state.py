"""The state that the user left a live model in: what is active, merged, training, random.

Reads; never runs or switches anything. Knows nothing of files beyond the names of a mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from harness.certificate.claim import Claim
from harness.certificate.values import failed, held, listed
from harness.engines.inspection import LiveModel
from harness.verdict import Outcome, Verdict

__all__ = ["ACTIVE", "EVALUATION", "MERGED", "check_state", "may_run"]

ACTIVE = "active adapters"
EVALUATION = "evaluation mode"
MERGED = "merged flags"


def may_run(live: LiveModel) -> bool:
    """Whether a forward pass leaves the weights alone: PEFT unmerges a layer that is disabled."""
    return not any(layer.merged and layer.disabled for layer in live.lora_layers.values())


def check_state(
    live: LiveModel, claim: Claim, names: Mapping[str, str], *, applied_right: bool
) -> list[Verdict]:
    """Active adapters, merged flags, evaluation mode.

    Args:
        names: the stack's adapters by their names in memory.
        applied_right: whether what the layers add equals the files, under whatever names.
    """
    return [
        _active(live, claim, names, applied_right),
        _merged(live, claim, names),
        _evaluation(live.root),
    ]


def _active(
    live: LiveModel, claim: Claim, names: Mapping[str, str], applied_right: bool
) -> Verdict:
    if not live.lora_layers:
        return Verdict(
            name=ACTIVE, outcome=Outcome.SKIPPED, evidence=("a plain model: nothing to switch",)
        )
    wanted = Counter(names[n] for n in claim.mode.adapters if n in names)
    faults = (
        []
        if applied_right
        else [f"adapter {n!r} is not loaded" for n in claim.mode.adapters if n not in names]
    )
    different = 0
    for name, layer in live.lora_layers.items():
        if layer.merged:
            continue
        have = Counter(part.name for part in layer.applied)
        should = Counter({n: c for n, c in wanted.items() if n in layer.adapters})
        unknown = [n for n in layer.active if n not in live.adapters]
        if unknown and not layer.disabled:
            faults.append(f"{name}: {unknown[0]!r} is listed as active and is not loaded")
        if have == should:
            continue
        different += 1
        if applied_right:
            continue
        twice = [n for n, count in have.items() if count > 1]
        if layer.disabled and should:
            faults.append(f"{name}: its adapters are disabled")
        elif twice:
            faults.append(f"{name}: {twice[0]!r} is active twice")
        else:
            faults.append(f"{name}: {sorted(have) or 'nothing'} is active, not {sorted(should)}")
    if faults:
        wanted_names = [names.get(n, n) for n in claim.mode.adapters]
        return failed(
            ACTIVE,
            f"mode {claim.mode.name} is {claim.mode.formula}",
            *listed(faults, "layers"),
            remedy=f"model.base_model.set_adapter({wanted_names!r}); PeftModel.set_adapter takes "
            "one name and switches the others off"
            if wanted_names
            else "use `with model.disable_adapter():` for the base",
        )
    lines = [f"{claim.mode.formula} in {len(live.lora_layers)} layers"]
    if different:
        lines.append(f"{different} layers apply it under other names; what they add is the same")
    return held(ACTIVE, *lines)


def _merged(live: LiveModel, claim: Claim, names: Mapping[str, str]) -> Verdict:
    layers = live.lora_layers
    merged = {name: layer.merged for name, layer in layers.items() if layer.merged}
    if not merged:
        return held(MERGED, "no layer has adapters merged into its weight")
    faults = [
        f"{name}: merged and disabled at once; the next forward pass unmerges it, with rounding"
        for name in merged
        if layers[name].disabled
    ]
    wanted = {names[n] for n in claim.mode.adapters if n in names}
    for name, layer in layers.items():
        should = wanted & set(layer.adapters)
        twice = [n for n, count in Counter(layer.merged).items() if count > 1]
        if twice:
            faults.append(f"{name}: {twice[0]!r} is merged twice")
        elif set(layer.merged) & wanted != should and set(layer.merged) <= wanted:
            absent = ", ".join(sorted(should - set(layer.merged)))
            faults.append(f"{name}: {absent} is not merged here, and a merged layer adds no other")
        elif not set(layer.merged) <= wanted and set(layer.merged) <= set(names.values()):
            strange = sorted(set(layer.merged) - wanted)[0]
            faults.append(f"{name}: {strange!r} is merged and is not in the mode")
    if faults:
        return failed(
            MERGED,
            *listed(faults, "layers"),
            remedy="load the stack again (unmerging does not restore the base's bits), then merge "
            "every adapter of the mode in one call",
        )
    return held(MERGED, f"{len(merged)} of {len(layers)} layers are merged, as the mode says")


def _evaluation(root: nn.Module) -> Verdict:
    """Whether anything random acts; training mode without dropout changes nothing."""
    acting = [
        f"{name}: dropout of {module.p:g} is on"
        for name, module in root.named_modules()
        if isinstance(module, nn.Dropout) and module.training and module.p > 0
    ]
    for name, module in root.named_modules():
        share = getattr(module, "attention_dropout", 0.0)
        if module.training and isinstance(share, float) and share > 0:
            acting.append(f"{name}: attention dropout of {share:g} is on")
    if acting:
        return failed(EVALUATION, *listed(acting, "modules"), remedy="call model.eval()")
    training = sum(module.training for module in root.modules())
    if training:
        return held(EVALUATION, f"{training} modules are in training mode; no dropout acts")
    precise = "" if torch.is_grad_enabled() else "; gradients are off"
    return held(EVALUATION, f"every module is in evaluation mode{precise}")
