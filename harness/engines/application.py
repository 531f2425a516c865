"""Entering and leaving a mode on a live PEFT model, without a trace.

PEFT's own switches go wrong silently: an unknown name in `set_adapter` is skipped, a doubled one
is applied twice, `set_adapter` turns gradients on, `merge_adapter` and `unmerge_adapter` do not
restore the base's bits. So the mode is set, then read back layer by layer; a flattened mode is one
more adapter, taken away after; and a merged mode swaps parameters and puts the originals back. At
rest every adapter is off. Knows nothing of prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from harness.completion import Application
from harness.engines.loading import ActivationError, lora_layers, quiet_tools
from harness.errors import InputError
from harness.lora import LoraPair, add_deltas, flatten_pairs
from harness.stack import Mode

__all__ = [
    "Factors",
    "apply_flattened",
    "apply_live",
    "apply_merged",
    "apply_mode",
    "check_active",
    "rest",
    "without_wrappers",
]

_FLATTENED = "flattened-in-memory"


class Factors(Protocol):
    """Where one adapter's pairs come from: its files (`AdapterFiles`), or memory."""

    @property
    def pairs(self) -> Mapping[str, Any]: ...

    def pair(self, module: str) -> LoraPair: ...


def apply_mode(
    model: Any, mode: Mode, application: Application, files: Mapping[str, Factors]
) -> contextlib.AbstractContextManager[None]:
    """The context in which *model* is in *mode*, applied as *application* says."""
    if application is Application.LIVE or not mode.weights:
        return apply_live(model, mode)
    if application is Application.FLATTENED:
        return apply_flattened(model, mode, files)
    return apply_merged(model, mode, files)


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
def apply_flattened(model: Any, mode: Mode, files: Mapping[str, Factors]) -> Iterator[None]:
    """The adapters of *mode* concatenated by rank into one more adapter, which alone is active.

    `A = [w₁s₁A₁; w₂s₂A₂; …]`, `B = [B₁|B₂|…]` (`harness.lora.flatten_pairs`), in float32 as PEFT
    keeps adapters; the adapter is removed after.

    Raises:
        InputError: an adapter of an embedding, or of a layer that keeps its weight transposed.
        ActivationError: what is active, read back, is not that adapter alone.
    """
    layers = lora_layers(model)
    pairs: dict[str, LoraPair] = {}
    for name, layer in layers.items():
        terms = [
            (weight, _on(files[adapter].pair(name), layer.get_base_layer().weight.device))
            for adapter, weight in mode.weights
            if name in files[adapter].pairs
        ]
        if terms:
            pairs[name] = flatten_pairs(terms)
    odd = [name for name, pair in pairs.items() if pair.transposed]
    if odd:
        raise InputError(
            f"{odd[0]} is no plain linear layer and is not flattened in memory",
            where="application flattened",
            remedy="write the flattened adapter with lora-stack flatten and load that",
        )
    ranks = {name: pair.rank for name, pair in pairs.items()}
    usual = max(ranks.values())
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(pairs),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        inference_mode=True,
    )
    try:
        # On "meta", so that PEFT initialises nothing that is replaced at once.
        with quiet_tools():
            model.add_adapter(_FLATTENED, config, low_cpu_mem_usage=True)
        for name, layer in lora_layers(model).items():
            if name in pairs:
                for holder, value in (
                    (layer.lora_A, pairs[name].a), (layer.lora_B, pairs[name].b)
                ):  # fmt: skip
                    holder[_FLATTENED].weight = torch.nn.Parameter(value, requires_grad=False)
        model.eval()
        with apply_live(model, Mode(name=mode.name, weights=((_FLATTENED, 1.0),))):
            yield
    finally:
        if _FLATTENED in model.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it was active: known, and left next
                model.delete_adapter(_FLATTENED)
        rest(model)


@contextlib.contextmanager
def without_wrappers(model: Any) -> Iterator[Any]:
    """The transformers model inside a PEFT one, its LoRA layers taken out for the block.

    What is left is what a user who merged (or never had adapters) would run: no layer of PEFT's
    in the forward pass, the same weights. The layers are put back in their places after.
    """
    inner = model.base_model.model
    layers = lora_layers(model)
    places = [(*_parent(inner, name), layer) for name, layer in layers.items()]
    try:
        for parent, child, layer in places:
            setattr(parent, child, layer.get_base_layer())
        yield inner
    finally:
        for parent, child, layer in places:
            setattr(parent, child, layer)


def _parent(root: Any, name: str) -> tuple[Any, str]:
    path, _, child = name.rpartition(".")
    return root.get_submodule(path), child


@contextlib.contextmanager
def apply_merged(model: Any, mode: Mode, files: Mapping[str, Factors]) -> Iterator[None]:
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
