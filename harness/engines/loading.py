"""Loading a stack with transformers and PEFT, and holding what was loaded against the files.

The faults of the tools underneath are met here: PEFT loads an adapter with renamed or missing
keys without an exception (https://github.com/huggingface/peft/pull/2118 says why), so
every factor in memory is compared with the file's. Knows nothing of modes or generation.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from harness.adapter_files import AdapterFiles
from harness.checkpoint_files import CheckpointFiles
from harness.errors import HarnessError, InputError, quoted
from harness.files.strict_json import read_json_object
from harness.stack import Adapter, AdapterStack

__all__ = [
    "ActivationError",
    "choose_device",
    "choose_dtype",
    "load_adapters",
    "load_base",
    "load_tokenizer",
    "lora_layers",
    "quiet_tools",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROOM = 0.85  # of free device memory that weights may take; the rest is for activations and cache


class ActivationError(HarnessError):
    """The live model is not what the files and the mode say: an adapter absent, off, or altered."""


def choose_device(device: str | None, weight_bytes: int) -> str:
    """The device to load on; `auto` spreads the model over devices.

    Raises:
        InputError: CUDA was asked for and is absent, or the name is no device.
    """
    if device == "auto":
        return device
    if device is None:
        if not torch.cuda.is_available():
            return "cpu"
        free, _ = torch.cuda.mem_get_info()
        return "cuda" if weight_bytes < free * _ROOM else "auto"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"{device!r} is no device", where="--device", remedy="use cpu, cuda, cuda:N or auto"
        ) from error
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            raise InputError(
                f"{device} was asked for, and torch {torch.__version__} sees {count} CUDA devices",
                where="--device",
                remedy="use --device cpu, or install a CUDA build of torch",
            )
    elif wanted.type not in ("cpu", "mps", "xpu"):
        raise InputError(f"{device!r} cannot hold a model", where="--device", remedy="use cpu")
    return device


def choose_dtype(dtype: str | None) -> torch.dtype | str:
    """The torch dtype, or `"auto"` for the checkpoint's own; raises `InputError` if unknown."""
    if dtype in (None, "auto"):
        return "auto"
    if dtype not in _DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r}", where="--dtype", remedy=f"use {', '.join(_DTYPES)} or auto"
        )
    return _DTYPES[str(dtype)]


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Hold back progress bars and advice that does not concern the user."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _as_input_error(where: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:  # what the libraries raise for a strange file is their affair
        said = str(error) if not isinstance(error, KeyError) else f"{error} is not known"
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        if not lines:
            lines = [type(error).__name__]
        # Validation errors say in the first line of what, and in the second what.
        told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise InputError(f"cannot be loaded: {told}", where=where, remedy=remedy) from error


def load_base(
    checkpoint: CheckpointFiles,
    *,
    device: str,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> Any:
    """The base as a transformers model in `eval()` mode, without gradients."""
    where = checkpoint.folder
    with (
        quiet_tools(),
        _as_input_error(where, "check config.json against the weights and transformers"),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            device_map=device,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    model.requires_grad_(False)
    return model.eval()


def load_tokenizer(stack: AdapterStack, *, trust_remote_code: bool) -> tuple[Any, str]:
    """The base's tokenizer, padding left, and where its chat template came from.

    A base without a template takes that of the last adapter whose folder has one: trainers save
    the template they used beside the adapter.
    """
    base = stack.base.path
    copied = "copy the config that belongs to the weights"
    with quiet_tools(), _as_input_error(base / "config.json", copied):
        # The tokenizer's loader reads it, too: what is wrong there is no fault of the tokenizer's.
        AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
    with quiet_tools(), _as_input_error(base, "copy the base's tokenizer files beside its weights"):
        tokenizer = AutoTokenizer.from_pretrained(
            base,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            padding_side="left",
        )
    _compare_tokenizer(tokenizer, base / "tokenizer.json")
    if tokenizer.chat_template is not None:
        return tokenizer, "the base's"
    for adapter in reversed(stack.adapters):
        file = adapter.path / "chat_template.jinja"
        if file.is_file():
            tokenizer.chat_template = file.read_text(encoding="utf-8")
            return tokenizer, f"{adapter.name}'s"
    return tokenizer, "none"


def _compare_tokenizer(tokenizer: Any, path: Path) -> None:
    """Every token of `tokenizer.json` has its id in memory: the files beside it can move ids."""
    if not path.is_file():
        return
    raw = read_json_object(path, what=path.name, limit=path.stat().st_size)
    vocabulary = raw["model"]["vocab"]
    stored = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
    stored |= vocabulary if isinstance(vocabulary, dict) else {}
    held = tokenizer.get_vocab()
    for token, number in stored.items():
        if held.get(token) != number:
            raise InputError(
                f"{quoted(token)} has the id {number}, in memory {held.get(token)}",
                where=path,
                remedy="copy the tokenizer that belongs to this base",
            )


def load_adapters(
    model: Any, adapters: tuple[Adapter, ...], files: Mapping[str, AdapterFiles], device: str
) -> Any:
    """Wrap *model* with every adapter under its own name; compare each factor with its file.

    Raises:
        InputError: a folder that PEFT refuses.
        ActivationError: a factor in memory differs from the file's.
    """
    wrapped = model
    place = "cpu" if device == "auto" else device
    for adapter in adapters:
        remedy = "check that the adapter belongs to this base"
        with quiet_tools(), _as_input_error(adapter.path, remedy), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # missing keys: compared below
            if wrapped is model:
                wrapped = PeftModel.from_pretrained(
                    model, str(adapter.path), adapter_name=adapter.name, torch_device=place
                )
            else:
                wrapped.load_adapter(str(adapter.path), adapter.name, torch_device=place)
        _compare_with_files(wrapped, adapter, files[adapter.name])
    wrapped.requires_grad_(False)
    return wrapped.eval()


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Every LoRA layer of a PEFT-wrapped model, by its module name in the base."""
    inner = model.base_model.model
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def _compare_with_files(wrapped: Any, adapter: Adapter, files: AdapterFiles) -> None:
    live = {
        name: layer
        for name, layer in lora_layers(wrapped).items()
        if adapter.name in layer.lora_A or adapter.name in layer.lora_embedding_A
    }
    if set(live) != set(files.pairs):
        only_live = sorted(set(live) - set(files.pairs))
        only_file = sorted(set(files.pairs) - set(live))
        module, fault = (
            (only_file[0], "has weights, which target_modules does not name: PEFT drops them")
            if only_file
            else (only_live[0], "is named by target_modules and has no weights in the file")
        )
        raise InputError(
            f"module {module!r} {fault}",
            where=files.tensors.path,
            remedy="mend target_modules in adapter_config.json, or save the adapter again",
        )
    for name, layer in live.items():
        entry, pair = files.pairs[name], files.pair(name)
        if entry.embedding:
            in_memory = (layer.lora_embedding_A[adapter.name], layer.lora_embedding_B[adapter.name])
        else:
            in_memory = (layer.lora_A[adapter.name].weight, layer.lora_B[adapter.name].weight)
        for factor, loaded, stored in zip("AB", in_memory, (pair.a, pair.b), strict=True):
            if loaded.device.type == "meta":
                continue  # offloaded to disk: not here to be compared
            if not torch.equal(loaded.detach().cpu(), stored.to(loaded.dtype)):
                raise ActivationError(
                    f"{adapter.name}: factor {factor} of {name} in memory differs from "
                    f"{files.tensors.path}"
                )
        if layer.scaling[adapter.name] != pair.scale:
            raise ActivationError(
                f"{adapter.name}: {name} has scale {layer.scaling[adapter.name]} in memory, "
                f"{pair.scale} by {files.config.path}"
            )
