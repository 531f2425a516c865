"""`adapter_config.json`, read strictly: types, ranges, the base it names, and what it really is.

Follows PEFT 0.21 (`peft.LoraConfig`); says of every setting that is more than `W + s·B·A` why it
is. What the settings mean for a module is `harness.adapter_settings`'. Knows nothing of weights,
stacks or live models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.adapter_settings import AdapterConfig
from harness.errors import InputError, combined, gathering, quoted
from harness.files.config_fields import FieldReader, field_name
from harness.files.file_kinds import is_folder, is_systems, is_there
from harness.files.strict_json import read_json_object

__all__ = [
    "CONFIG_NAME",
    "AdapterConfig",
    "checkpoints_inside",
    "natural_order",
    "nested_adapter_hint",
    "read_adapter_config",
]

CONFIG_NAME = "adapter_config.json"
#: The most that one module's scale may be: beyond it every logit is noise, and no trainer goes.
_MAX_SCALE = 1e4
_MEGATRON = "megatron.core"  # what PEFT writes by default, and never imports without its config

# What makes an adapter more than `W + s·B·A`, by key of adapter_config.json. Each entry says why.
_NOT_ADDITIVE: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight; its deltas do not add up",
    "lora_bias": "lora_bias adds a bias that merging cannot hold",
    "modules_to_save": "modules_to_save replaces whole base modules instead of adding to them",
    "trainable_token_indices": "trainable_token_indices replaces embedding rows",
    "target_parameters": "target_parameters adapts parameters, not modules",
    "layer_replication": "layer_replication rebuilds the base with copied layers",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) is switched on by the prompt's tokens",
    "use_qalora": "QALoRA pools its input",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "arrow_config": "Arrow routes between adapters token by token",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA changes the layer's computation",
    "kasa_config": "KaSA changes the base weights",
    "megatron_config": "Megatron layers are built by code that the file names",
}
# Initialisations that subtract something from the base weights when the adapter is loaded, so
# that the base and every other mode change with it.
_BASE_MOVING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KNOWN_KEYS = frozenset(_NOT_ADDITIVE) | frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip


#: The fields that are lists of names, or one name or pattern.
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_FLAGS = (
    "use_dora", "lora_bias", "use_qalora", "use_rslora", "fan_in_fan_out", "inference_mode",
    "ensure_weight_tying",
)  # fmt: skip
_TABLES = (
    "auto_mapping", "runtime_config", "megatron_config", "eva_config", "loftq_config",
    "corda_config", "lora_ga_config",
)  # fmt: skip
#: Fields that make a loader import or run code; no LoRA needs them.
_CODE = ("auto_map", "custom_modules", "_custom_modules", "custom_generate", "trust_remote_code")
_OTHER_TUNERS = frozenset(
    {
        "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE",
        "CPT", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
        "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
        "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING",
        "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
        "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA",
    }
)  # fmt: skip


def checkpoints_inside(folder: Path) -> list[str]:
    """Names of `checkpoint-N` folders and others one level down that hold an adapter."""
    try:
        found = [child.name for child in folder.iterdir() if (child / CONFIG_NAME).is_file()]
    except OSError:
        return []
    return sorted(found, key=natural_order)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    parts = re.split(r"([0-9]+)", name)  # the odd ones are the numbers
    return [
        (0, len(digits := part.lstrip("0")), digits) if place % 2 else (1, 0, part)
        for place, part in enumerate(parts)
        if part
    ]


def nested_adapter_hint(folder: Path) -> str | None:
    """A remedy that names the checkpoint inside *folder*, if there is one."""
    inside = checkpoints_inside(folder)
    if not inside:
        return None
    choice = f"give {folder / inside[-1]}"
    return choice if len(inside) == 1 else f"{choice} (or another of: {', '.join(inside)})"


def read_adapter_config(folder: Path, *, trust_remote_code: bool = False) -> AdapterConfig:
    """Read `adapter_config.json` strictly; needs no torch. All its faults at once.

    Args:
        trust_remote_code: let through the fields by which a file makes loaders run code.

    Raises:
        InputError: no folder, no config (a checkpoint inside is named), another kind of adapter,
            a value of a wrong type or range, a field that runs code, a field that is not known.
    """
    if not is_folder(folder):
        fault = "is not a folder" if is_there(folder) else "no such folder"
        raise InputError(fault, where=folder, remedy=f"give the folder that holds {CONFIG_NAME}")
    path = folder / CONFIG_NAME
    if not is_there(path) and (hint := nested_adapter_hint(folder)):
        raise InputError(f"holds no {CONFIG_NAME} itself", where=folder, remedy=hint)
    raw = read_json_object(
        path, what=CONFIG_NAME, remedy="give a folder written by PEFT's save_pretrained"
    )
    read = FieldReader(raw, path)
    _check_kind(raw, read)
    found: list[InputError] = read.faults
    with gathering(found):
        _check_code(raw, read, trust_remote_code)
    rank_pattern = read.pattern_table("rank_pattern", read.rank)
    alpha_pattern = read.pattern_table("alpha_pattern", read.alpha)
    for key in _NAMES:
        read.names(key)
    read.listed_names("target_parameters")
    for key in _FLAGS:
        read.flag(key)
    for key in _TABLES:
        read.table(key)
    read.layers("layers_to_transform")
    _check_layers(raw, read)
    read.share("lora_dropout")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        read.fault("bias", f"{quoted(raw['bias'])} is unknown", "write none")
    if not isinstance(raw.get("init_lora_weights", True), bool | str | None):
        read.fault("init_lora_weights", "is neither true, false nor a name", "write true")
    for key in ("peft_version", "task_type", "megatron_core"):
        read.text(key)
    for key in raw:
        if key not in _KNOWN_KEYS and key not in _CODE and raw[key]:
            read.fault(
                field_name(key),
                f"is not known to this version and is set to {quoted(raw[key])}",
                "remove it if it changes nothing, or update the harness",
            )
    targets = raw.get("target_modules")
    if not targets and not raw.get("target_parameters"):
        read.fault(
            "target_modules",
            "names nothing (PEFT would guess by the model's type)",
            "list the modules that were trained",
        )
    config = AdapterConfig(
        path=path,
        rank=read.rank("r", raw.get("r", 8)),
        alpha=read.alpha("lora_alpha", raw["lora_alpha"]) if "lora_alpha" in raw else 1.0,
        rslora=read.flag("use_rslora"),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
        base=_base_claim(raw, read),
        base_revision=read.text("revision"),
        not_additive=tuple(_reasons(raw)),
        raw=raw,
    )
    if "lora_alpha" not in raw:
        read.fault(
            "lora_alpha", "is missing (PEFT would silently assume 8)", "write the trained value"
        )
    if not found:
        with gathering(found):
            config.refuse_slow_patterns(())
        scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        if scale > _MAX_SCALE:
            read.fault(
                "lora_alpha",
                f"{config.alpha:g} with r = {config.rank} scales by {scale:g}, "
                f"beyond {_MAX_SCALE:g}",
                "write the alpha trained",
            )
    if found:
        raise combined(found)
    return config


def _check_kind(raw: Mapping[str, Any], read: FieldReader) -> None:
    """Raises unless the config is a LoRA's: the other fields mean something else elsewhere."""
    kind = raw.get("peft_type")
    if kind == "LORA":
        return
    if isinstance(kind, str) and kind.upper() in _OTHER_TUNERS:
        fault = f"{kind!r} is not LORA: it does not add s·B·A to the weights"
    elif kind is None and "architectures" in raw:
        fault = "is missing, and architectures is there: this is a model's config"
    elif kind is None:
        fault = "is missing"
    else:
        fault = f"{quoted(kind)} is not LORA, and no type that PEFT knows"
    raise InputError(
        f"peft_type: {fault}", where=read.path, remedy="only LoRA adapters can be stacked"
    )


def _check_layers(raw: Mapping[str, Any], read: FieldReader) -> None:
    """What PEFT refuses when it loads the adapter."""
    advice = "remove it, or save the adapter again with save_pretrained"
    if isinstance(raw.get("target_modules"), str):
        for key in ("layers_to_transform", "layers_pattern"):
            if raw.get(key) is not None:
                read.fault(key, "is set, and target_modules is a pattern", advice)
    elif raw.get("layers_pattern") and raw.get("layers_to_transform") is None:
        read.fault("layers_pattern", "is set, and layers_to_transform is not", advice)


def _check_code(raw: Mapping[str, Any], read: FieldReader, trusted: bool) -> None:
    if trusted:
        return
    advice = "remove it; or pass --trust-remote-code if you trust this folder"
    for key in _CODE:
        if raw.get(key):
            read.fault(key, f"{quoted(raw[key])} makes loaders run code of the folder's", advice)
    core = raw.get("megatron_core")
    if core is not None and core != _MEGATRON:
        read.fault("megatron_core", f"{quoted(core)} would be imported and run", advice)
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and not str(library).startswith("transformers."):
        read.fault("auto_mapping", f"parent_library {quoted(library)} would be imported", advice)


def _base_claim(raw: Mapping[str, Any], read: FieldReader) -> str | None:
    """`base_model_name_or_path`: a hub id or a folder, and nothing that reaches elsewhere."""
    key = "base_model_name_or_path"
    claim = read.text(key)
    if not claim:
        return None
    parts = claim.replace("\\", "/").split("/")
    steps = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
    fault = None
    if "://" in claim:
        fault = "is a URL; nothing is fetched from it"
    elif "\0" in claim or len(claim) > 4096:
        fault = "can be no path"
    elif is_systems("/".join([*parts, ""])):
        fault = "lies in the system's own folders"
    elif ".." in parts[steps:]:
        fault = "climbs out of a folder that it goes into"
    elif steps >= len(read.path.parent.absolute().parts) - 1 > 0:
        fault = "climbs to the root of the file system"
    if fault is not None:
        read.fault(key, f"{quoted(claim)} {fault}", "write the base's folder or hub id")
        return None
    return claim


def _reasons(raw: Mapping[str, Any]) -> list[str]:
    """Why the adapter is not additive, a line a reason."""
    # An empty table is enough to switch a variant on.
    reasons = [
        f"{key}: {why}"
        for key, why in _NOT_ADDITIVE.items()
        if raw.get(key) or isinstance(raw.get(key), dict)
    ]
    bias = raw.get("bias", "none")
    if bias != "none":
        reasons.append(
            f"bias={quoted(bias).strip(chr(39))}: the adapter's biases leak into other modes"
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_MOVING_INITS):
        reasons.append(
            f"init_lora_weights={init}: loading moves the base weights, for every mode "
            "(convert it with save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    return reasons
