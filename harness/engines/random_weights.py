"""A stack of random numbers on a shape, built where it runs; for measuring time alone.

The modules are made on `meta` and filled on the device itself: no copy ever lies in host memory
beside a GPU. Norms are 1, biases 0, every other weight is N(0, 0.02²) from a fixed seed, so that
activations stay finite. There is no tokenizer, and nothing that such a model says means anything.
Knows nothing of time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from harness.adapter_files import read_adapter
from harness.completion import Application
from harness.engines.application import Factors, apply_mode, rest
from harness.engines.held_model import HeldModel
from harness.engines.loading import (
    choose_device,
    choose_dtype,
    load_adapters,
    lora_layers,
    quiet_tools,
)
from harness.errors import InputError
from harness.lora import LoraPair
from harness.shape import Shape
from harness.stack import AdapterStack, Mode

__all__ = ["FactorsInMemory", "RandomEngine", "build_shape"]

_SEED = 20_250_509
_SIZE = 0.02
_ROOM = 0.9  # of free memory that the weights may take


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorsInMemory:
    """One random adapter's pairs, as the live layers hold them; the counterpart of its files."""

    pairs: Mapping[str, LoraPair]

    def pair(self, module: str) -> LoraPair:
        """The pair of *module*; raises `KeyError` if there is none."""
        return self.pairs[module]


class RandomEngine(HeldModel):
    """A loaded shape. The part of `harness.engines.peft.PeftEngine` that measuring needs.

    Attributes:
        model: the PEFT-wrapped model (plain for a stack without adapters); at rest.
        files: the factors of each adapter by name: of its files, or in memory.
    """

    def __init__(
        self, stack: AdapterStack, *, device: str | None = None, dtype: str | None = None
    ) -> None:
        if stack.base.shape is None:
            raise InputError("is a checkpoint, not a shape", where=stack.base.source)
        self.stack = stack
        self.files: dict[str, Factors] = {}
        model = build_shape(stack.base.shape, device=device, dtype=dtype)
        place = str(next(model.parameters()).device)
        generator = torch.Generator(device=place).manual_seed(_SEED + 1)
        random = [a for a in stack.adapters if a.random_rank is not None]
        if stack.adapters and not random:
            read = {a.name: read_adapter(a.path) for a in stack.adapters}
            self.files |= read
            model = load_adapters(model, stack.adapters, read, place)
        for adapter in random:
            assert adapter.random_rank is not None
            model = _add_random_adapter(model, adapter.name, adapter.random_rank, generator)
            self.files[adapter.name] = _factors_in_memory(model, adapter.name)
        self.model = model
        if stack.adapters:
            rest(model)

    def close(self) -> None:
        """Give the model's memory back, and the factors'. The engine cannot be used after."""
        self.files.clear()
        super().close()

    @contextlib.contextmanager
    def mode(
        self, mode: Mode | str, application: Application = Application.LIVE
    ) -> Iterator[torch.nn.Module]:
        """Enter *mode* for the block; yields the model with exactly its adapters applied.

        Raises:
            ActivationError: what is active, read back per layer, is not the mode.
            InputError: an unknown mode.
        """
        chosen = self.stack.mode(mode) if isinstance(mode, str) else mode
        if not self.stack.adapters:
            yield self.model
            return
        with apply_mode(self.model, chosen, application, self.files):
            yield self.model


def build_shape(shape: Shape, *, device: str | None, dtype: str | None) -> Any:
    """*shape* as a transformers model of seeded random weights, in `eval()`, without gradients.

    Args:
        device: as `load_engine` takes it; a shape is never spread over devices.
        dtype: a name, or None for the config's own.

    Raises:
        InputError: a config that transformers cannot build, a device that is absent or too small.
    """
    chosen = choose_dtype(dtype)
    try:
        values = dict(shape.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        torch_dtype = chosen if isinstance(chosen, torch.dtype) else _own_dtype(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(
            f"cannot be built: {str(error).splitlines()[0] if str(error) else error!r}",
            where=f"random:{shape.name}",
            remedy="give a causal language model's config.json",
        ) from error
    model.tie_weights()
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    place = choose_device(device, size)
    free = _free_bytes(place if place != "auto" else "cuda")
    if place == "auto" or size > free * _ROOM:
        raise InputError(
            f"needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
            f"{'one device' if place == 'auto' else place}",
            where=f"random:{shape.name}",
            remedy="take a smaller shape, --dtype bfloat16, or another --device",
        )
    _fill(model, place)
    model.generation_config = GenerationConfig()
    model.requires_grad_(False)
    return model.eval()


def _own_dtype(config: Any) -> torch.dtype:
    """The config's dtype; transformers names it `dtype`, older files `torch_dtype`."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _free_bytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")


def _fill(model: Any, device: str) -> None:
    """Give every parameter and buffer of a `meta` model storage and values on *device*."""
    rotary = [
        (name, module)
        for name, module in model.named_modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    model.to_empty(device=device)
    model.tie_weights()  # `to_empty` may part what was tied
    generator = torch.Generator(device=device).manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim < 2:
                parameter.fill_(1)
            else:
                parameter.normal_(0.0, _SIZE, generator=generator)
        for name, module in rotary:
            _fill_buffers(model, name, module, device)


def _fill_buffers(model: Any, name: str, module: Any, device: str) -> None:
    """Buffers are computed when a module is made (rotary frequencies): make it again, there."""
    try:
        with torch.device(device):
            fresh = type(module)(config=model.config)
    except TypeError as error:
        raise InputError(
            f"{name} ({type(module).__name__}) keeps buffers that cannot be made apart",
            where="random:",
            remedy="use a family whose buffers are rotary frequencies alone (qwen3, llama, …)",
        ) from error
    for buffer, value in fresh.named_buffers(recurse=False):
        setattr(module, buffer, value)


def _add_random_adapter(model: Any, name: str, rank: int, generator: torch.Generator) -> Any:
    """PEFT's adapter *name* on every linear layer but the head, filled where the base lies.

    The factors' dtype is PEFT's choice for loaded adapters (float32 on a 16-bit base), so that
    the same work is done as with a trained adapter.
    """
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM",
        inference_mode=True,
    )  # fmt: skip
    with quiet_tools():
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
    for layer in lora_layers(model).values():
        device = layer.get_base_layer().weight.device
        for holder in (layer.lora_A, layer.lora_B):
            linear = holder[name]
            value = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=device)
            value.normal_(0.0, _SIZE, generator=generator)
            linear.weight = torch.nn.Parameter(value, requires_grad=False)
    model.requires_grad_(False)
    return model.eval()


def _factors_in_memory(model: Any, name: str) -> FactorsInMemory:
    return FactorsInMemory(
        pairs={
            module: LoraPair(
                module=module,
                a=layer.lora_A[name].weight.detach(),
                b=layer.lora_B[name].weight.detach(),
                scale=layer.scaling[name],
            )
            for module, layer in lora_layers(model).items()
            if name in layer.lora_A
        }
    )
