"""Entering and leaving a mode on a live PEFT model, without a trace.

PEFT's own switches go wrong silently: an unknown name in `set_adapter` is skipped, a doubled one
is applied twice, `set_adapter` turns gradients on, `merge_adapter` and `unmerge_adapter` do not
restore the base's bits. So the mode is set, then read back layer by layer; and a merged mode swaps
parameters, a flattened one forward passes, and both put the originals back. At rest every adapter
is off. Knows nothing of prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from harness.adapter_files import AdapterFiles
from harness.engines.loading import ActivationError, lora_layers
from harness.errors import InputError
from harness.lora import LoraPair, add_deltas
from harness.stack import Mode

__all__ = ["apply_flattened", "apply_live", "apply_merged", "check_active", "rest"]


@contextlib.contextmanager
def apply_live(model: Any, mode: Mode) -> Iterator[None]:
    """PEFT's forward pass with exactly the adapters of *mode*, each at its weight.

    Raises:
        ActivationError: some layer, read back, has other adapters active or another scale.
    """
    layers = lora_layers(model)
    scales = {name: dict(layer.scaling) for name, layer in layers.items()}
    try:
        if mode.weights:
            model.base_model.enable_adapter_layers()
            model.base_model.set_adapter(list(mode.adapters), inference_mode=True)
            for layer in layers.values():
                for adapter, weight in mode.weights:
                    if weight != 1 and adapter in layer.scaling:
                        layer.scaling[adapter] *= weight
        check_active(layers, mode, scales)
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling.update(scales[name])
        rest(model)


@contextlib.contextmanager
def apply_flattened(model: Any, mode: Mode) -> Iterator[None]:
    """*mode*'s adapters as one: `A = [w₁s₁A₁; w₂s₂A₂]`, `B = [B₁|B₂]`, from what is in memory.

    Every layer's forward pass is replaced for the block, so that one product with A and one with B
    stand for those of each adapter.

    Raises:
        InputError: an adapted layer is no linear one.
    """
    layers = lora_layers(model)
    replaced: list[Any] = []
    try:
        for name, layer in layers.items():
            terms = [(n, w) for n, w in mode.weights if n in layer.lora_A]
            if any(n in layer.lora_embedding_A for n, _ in mode.weights):
                raise InputError(
                    f"{name} is an embedding, which is not flattened in memory",
                    where="application flattened",
                    remedy="use live or merged",
                )
            if terms:
                # An entry of the instance hides the class's method, and is taken out after.
                vars(layer)["forward"] = _flattened_forward(layer, terms)
                replaced.append(layer)
        check_active(layers, Mode(name=mode.name), {})
        yield
    finally:
        for layer in replaced:
            del vars(layer)["forward"]
        rest(model)


def _flattened_forward(layer: Any, terms: list[tuple[str, float]]) -> Any:
    a = torch.cat([layer.lora_A[n].weight * (layer.scaling[n] * w) for n, w in terms])
    b = torch.cat([layer.lora_B[n].weight for n, _ in terms], dim=1)
    linear = torch.nn.functional.linear

    def forward(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        result: torch.Tensor = layer.base_layer(x, *arguments, **named)
        return result + linear(linear(x.to(a.dtype), a), b).to(result.dtype)

    return forward


def rest(model: Any) -> None:
    """Switch every adapter off and every gradient off."""
    model.base_model.disable_adapter_layers()
    model.requires_grad_(False)


def check_active(
    layers: Mapping[str, LoraLayer], mode: Mode, scales: Mapping[str, Mapping[str, float]]
) -> None:
    """Read back, layer by layer, which adapters are active and with what scale."""
    for name, layer in layers.items():
        if layer.merged:
            raise ActivationError(f"{name}: adapters are merged into the weights")
        if layer.disable_adapters != (not mode.weights):
            state = "off" if layer.disable_adapters else "on"
            raise ActivationError(f"{name}: adapters are {state} in mode {mode.name}")
        if not mode.weights:
            continue
        if tuple(layer.active_adapters) != mode.adapters:
            raise ActivationError(
                f"{name}: {list(layer.active_adapters)} are active in mode {mode.name}, "
                f"not {list(mode.adapters)}"
            )
        for adapter, weight in mode.weights:
            if adapter in layer.scaling:
                expected = scales[name][adapter] * weight
                if layer.scaling[adapter] != expected:
                    raise ActivationError(
                        f"{name}: {adapter} has scale {layer.scaling[adapter]}, not {expected}"
                    )


@contextlib.contextmanager
def apply_merged(model: Any, mode: Mode, files: Mapping[str, AdapterFiles]) -> Iterator[None]:
    """The deltas of *mode*, from the files, added into the weights; originals put back after.

    Accumulated in float32 and rounded once to the weight's dtype. A layer gets a parameter of its
    own, so that a tied partner keeps the base's. Costs one more copy of the adapted weights.

    Raises:
        InputError: a weight lies on no device here (offloaded), or is quantised.
    """
    layers = lora_layers(model)
    originals: dict[str, torch.nn.Parameter] = {}
    try:
        for name, layer in layers.items():
            terms = [
                (weight, files[adapter].pair(name))
                for adapter, weight in mode.weights
                if name in files[adapter].pairs
            ]
            if not terms:
                continue
            linear = layer.get_base_layer()
            weight = linear.weight
            if weight.device.type == "meta" or not weight.dtype.is_floating_point:
                raise InputError(
                    f"{name} is offloaded or quantised and cannot be merged in memory",
                    where="application merged",
                    remedy="use the live application",
                )
            moved = [(factor, _on(pair, weight.device)) for factor, pair in terms]
            merged = add_deltas(weight.data, moved, accumulate=torch.float32).to(weight.dtype)
            originals[name] = weight
            linear.weight = torch.nn.Parameter(merged, requires_grad=False)
        check_active(layers, Mode(name=mode.name), {})
        yield
    finally:
        for name, parameter in originals.items():
            layers[name].get_base_layer().weight = parameter
        rest(model)


def _on(pair: LoraPair, device: torch.device) -> LoraPair:
    return dataclasses.replace(pair, a=pair.a.to(device), b=pair.b.to(device))
