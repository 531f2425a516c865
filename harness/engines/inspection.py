"""Reading a live model as it stands: base tensors, LoRA layers, buffers, hooks, settings.

Takes any live model: PEFT-wrapped, adapters loaded by transformers itself, or plain. Nothing is
switched, nothing is trusted: a LoRA layer is known by what it has (`base_layer`, `lora_A`,
`scaling`), not by its class. Knows nothing of files, stacks or verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from harness.engines.patches import global_hooks, patched_code, patches
from harness.errors import InputError

__all__ = [
    "Foreign",
    "LiveAdapter",
    "LiveLayer",
    "LiveModel",
    "bare_model",
    "read_live",
]

Kind = Literal["linear", "conv1d", "embedding"]

_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.|$)")
# PEFT's variants that compute s·B·A all the same: MiCA only keeps B from being trained.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant")
_QUANTISED = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "EetqLinear",
              "AqlmQuantizedLinear", "QuantizedLinear", "FP8Linear")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAdapter:
    """One adapter's part of one LoRA layer, in memory.

    Attributes:
        a: `(r, in)`; for an embedding `(r, rows)`.
        b: `(out, r)`.
        scale: what the forward pass multiplies with.
        extra: what makes the part more than `s·B·A` (a variant's name, a bias), or None.
        dropout: the probability; `dropping` says whether it acts now.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float
    extra: str | None
    dropout: float
    dropping: bool
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLayer:
    """One linear or embedding layer of the live model.

    Attributes:
        name: its dotted name in the base.
        outer: the module that the forward pass calls; `inner` holds the base weight (the same
            module where nothing is wrapped).
        adapters: by name in memory; empty for a layer that PEFT did not touch.
        active: names as the layer lists them; `merged` those added into the weight.
    """

    name: str
    kind: Kind
    outer: nn.Module
    inner: nn.Module
    adapters: Mapping[str, LiveAdapter]
    active: tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.inner, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def wrapped(self) -> bool:
        return self.outer is not self.inner

    @property
    def applied(self) -> tuple[LiveAdapter, ...]:
        """The parts that the forward pass adds, one entry a time it is added."""
        if self.disabled or self.merged:
            return ()
        return tuple(self.adapters[name] for name in self.active if name in self.adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A module that PEFT put in and that is no plain LoRA layer."""

    name: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A live model, read.

    Attributes:
        root: what the user gave, not compiled; `bare` is the transformers model inside.
        layers: every linear and embedding layer by its name in the base.
        tensors: the base's parameters by name in the base; a tied parameter under both names.
        hooked: modules whose forward pass somebody else's hook or patch can change.
        hooked_everywhere: hooks that torch calls for every module of the process.
        patched: classes and functions of the model whose code is not their package's.
        adapters: every adapter name that some layer holds.
    """

    root: nn.Module
    bare: nn.Module
    layers: Mapping[str, LiveLayer]
    tensors: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    hooked: Mapping[str, tuple[str, ...]]
    hooked_wrappers: tuple[nn.Module, ...]
    hooked_everywhere: tuple[str, ...]
    patched: tuple[str, ...]
    foreign: tuple[Foreign, ...]
    adapters: tuple[str, ...]

    @property
    def lora_layers(self) -> dict[str, LiveLayer]:
        return {name: layer for name, layer in self.layers.items() if layer.wrapped}


def bare_model(model: Any) -> Any:
    """The transformers model inside PEFT, DDP and `torch.compile` wrappers."""
    while True:
        names = {cls.__name__ for cls in type(model).__mro__}
        if "PeftModel" in names:
            model = model.base_model
        elif "BaseTuner" in names:
            model = model.model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif names & {"DistributedDataParallel", "DataParallel"}:
            model = model.module
        else:
            return model


def read_live(model: Any) -> LiveModel:
    """Read *model* as it stands.

    Raises:
        InputError: it is no torch model; its base is quantised (its weights cannot be held
            against the files).
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{type(model).__name__} is no torch model",
            where="model",
            remedy="pass the loaded model, e.g. engine.model",
        )
    # What torch compiled computes the same, and calls no hook that is put in afterwards.
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    bare = bare_model(model)
    if not isinstance(bare, nn.Module):
        raise InputError(f"{type(model).__name__} holds no torch model", where="model")
    _refuse_quantised(bare)
    around = list(_wrappers(model))
    wrappers = [m for m in around if tuple(patches(m))]
    layers: dict[str, LiveLayer] = {}
    modules: dict[str, nn.Module] = {}
    hooked: dict[str, tuple[str, ...]] = {}
    foreign = [  # vectors that PEFT puts before every prompt
        Foreign(name="", kind=type(encoder).__name__)
        for wrapper in around
        for encoder in getattr(wrapper, "prompt_encoder", {}).values()
    ]
    inside_lora: set[str] = set()
    for name, module in bare.named_modules(remove_duplicate=False):
        if _within(name, inside_lora):
            continue
        found = tuple(patches(module))
        if found:
            hooked[name] = found
        canonical = _WRAPPED.sub("", name)
        if _is_lora(module):
            inside_lora |= {
                f"{name}.{child}" for child, _ in module.named_children() if child != "base_layer"
            }
            if _kind(_innermost(module)) is None or type(module).__name__ == "ParamWrapper":
                foreign.append(Foreign(name=canonical, kind=type(module).__name__))
            else:
                layers[canonical] = _lora_layer(canonical, module)
            continue
        if type(module).__module__.startswith("peft.") and canonical not in layers:
            if _acts(module):
                foreign.append(Foreign(name=canonical, kind=type(module).__name__))
            inside_lora |= {f"{name}.modules_to_save", f"{name}.token_adapter"}
            continue
        modules[canonical] = module
        kind = _kind(module)
        if kind is not None and canonical not in layers:
            layers[canonical] = LiveLayer(
                name=canonical, kind=kind, outer=module, inner=module, adapters={}, active=(),
                disabled=False, merged=(),
            )  # fmt: skip
    return LiveModel(
        root=model,
        bare=bare,
        layers=layers,
        tensors=dict(_base_tensors(bare.named_parameters(remove_duplicate=False), inside_lora)),
        buffers=dict(_base_tensors(bare.named_buffers(remove_duplicate=False), inside_lora)),
        modules=modules,
        hooked=hooked,
        hooked_wrappers=tuple(wrappers),
        hooked_everywhere=tuple(global_hooks()),
        patched=tuple(patched_code(bare)),
        foreign=tuple(foreign),
        adapters=tuple(dict.fromkeys(n for layer in layers.values() for n in layer.adapters)),
    )


def _wrappers(model: Any) -> Iterator[nn.Module]:
    """What lies around the transformers model, outermost first."""
    bare = bare_model(model)
    while model is not bare:
        yield model
        names = {cls.__name__ for cls in type(model).__mro__}
        if "PeftModel" in names:
            model = model.base_model
        elif "BaseTuner" in names:
            model = model.model
        else:
            model = getattr(model, "_orig_mod", None) or model.module


def _within(name: str, folders: set[str]) -> bool:
    """Whether *name* is, or lies below, one of the dotted names in *folders*."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in folders for n in range(1, len(parts) + 1))


def _refuse_quantised(bare: nn.Module) -> None:
    method = getattr(getattr(bare, "config", None), "quantization_config", None)
    for name, module in bare.named_modules():
        weight = getattr(module, "weight", None)
        odd = isinstance(weight, Tensor) and (
            not weight.dtype.is_floating_point or weight.dtype.itemsize < 2
        )
        if type(module).__name__ in _QUANTISED or odd:
            kind = type(module).__name__
            raise InputError(
                f"{name} is quantised ({kind}); its weights cannot be held against the files",
                where="model",
                remedy="load the base without quantization_config, in bfloat16 or float32",
            )
    if method is not None:
        raise InputError(
            "the base is loaded with a quantization_config",
            where="model",
            remedy="load the base without quantization_config, in bfloat16 or float32",
        )


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling"))


def _acts(module: nn.Module) -> bool:
    """Whether a PEFT wrapper other than a LoRA layer changes the forward pass."""
    return hasattr(module, "modules_to_save") or hasattr(module, "base_layer")


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return module


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Embedding):
        # One that computes which rows it looks up (OPT's positions) is judged as a tensor alone.
        own = type(module).forward is not nn.Embedding.forward
        return None if own and not hasattr(module, "embed_scale") else "embedding"
    if isinstance(module, nn.Linear):
        return "linear"
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return "conv1d"
    return None


def _lora_layer(name: str, module: Any) -> LiveLayer:
    inner = _innermost(module)
    kind = _kind(inner)
    assert kind is not None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for adapter in module.lora_A:
        factors[adapter] = (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
    for adapter in getattr(module, "lora_embedding_A", {}):
        factors[adapter] = (module.lora_embedding_A[adapter], module.lora_embedding_B[adapter])
    adapters = {
        adapter: _live_adapter(module, adapter, a, b) for adapter, (a, b) in factors.items()
    }
    return LiveLayer(
        name=name,
        kind=kind,
        outer=module,
        inner=inner,
        adapters=adapters,
        active=tuple(module.active_adapters),
        disabled=bool(module.disable_adapters),
        merged=tuple(module.merged_adapters),
    )


def _live_adapter(module: Any, name: str, a: Tensor, b: Tensor) -> LiveAdapter:
    extra = None
    variant = getattr(module, "lora_variant", {}).get(name)
    bias = getattr(module.lora_B[name], "bias", None) if name in module.lora_B else None
    if variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        extra = type(variant).__name__
    elif isinstance(bias, Tensor):
        extra = "a bias beside B (lora_bias)"
    dropouts = dict(module.lora_dropout.items())
    dropout = dropouts.get(name)
    probability = float(getattr(dropout, "p", 0.0))
    return LiveAdapter(
        name=name,
        a=a.detach(),
        b=b.detach(),
        scale=float(module.scaling[name]),
        extra=extra,
        dropout=probability,
        dropping=probability > 0 and bool(dropout is not None and dropout.training),
        trainable=bool(a.requires_grad or b.requires_grad),
    )


def _base_tensors(
    named: Iterator[tuple[str, Tensor]], inside_lora: set[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        if not _within(name, inside_lora):
            yield _WRAPPED.sub("", name), tensor.detach()
