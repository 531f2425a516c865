"""`adapter_config.json`, read strictly: ranks, scales, the base it names, and what it really is.

Follows PEFT 0.21 (`peft.LoraConfig`); says of every setting that is more than `W + s·B·A` why it
is. Knows nothing of weights, stacks or live models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import InputError
from harness.strict_json import read_json_object

__all__ = [
    "CONFIG_NAME",
    "AdapterConfig",
    "checkpoints_inside",
    "natural_order",
    "nested_adapter_hint",
    "read_adapter_config",
]

CONFIG_NAME = "adapter_config.json"
_MAX_RANK = 1 << 16

_N = TypeVar("_N", int, float)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, types checked.

    Attributes:
        base: `base_model_name_or_path` as written, or None.
        patterns: `(rank_pattern, alpha_pattern)`, keys matched as PEFT does.
        not_additive: why this adapter is not `W + s·B·A`; empty for a plain LoRA.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    base: str | None
    base_revision: str | None
    not_additive: tuple[str, ...]
    raw: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """The rank that the config claims for *module* (`rank_pattern`, else `r`).

        Raises:
            InputError: *module* holds several `target_parameters` whose patterns differ: which
                of them a factor belongs to is not in the files.
        """
        return self._setting("rank_pattern", self.rank_pattern, self.rank, module)

    def alpha_of(self, module: str) -> float:
        """The alpha of *module* (`alpha_pattern`, else `lora_alpha`); raises as `rank_of`."""
        return self._setting("alpha_pattern", self.alpha_pattern, self.alpha, module)

    def _setting(self, key: str, patterns: Mapping[str, _N], default: _N, module: str) -> _N:
        found = set()
        for name in self._adapted_names(module):
            pattern = _pattern_key(patterns, name)
            found.add(default if pattern is None else patterns[pattern])
        if len(found) > 1:
            raise InputError(
                f"{key} differs between the parameters of {module!r}, and the file does not say "
                "which factor is whose",
                where=self.path,
                remedy=f"give the parameters of one module the same {key}",
            )
        return found.pop()

    def _adapted_names(self, module: str) -> list[str]:
        """What PEFT matches patterns with: *module*, or its parameters if those are adapted."""
        given = self.raw.get("target_parameters")
        targets = [t for t in given if isinstance(t, str)] if isinstance(given, list) else []
        bare = module.replace(".base_layer", "")
        names = [f"{bare}.{target.rpartition('.')[2]}" for target in targets]
        known = [
            name for name, target in zip(names, targets, strict=True)
            if name == target or name.endswith(f".{target}")
        ]  # fmt: skip
        return known or [module]

    def scale_of(self, module: str) -> float:
        """`s` of *module*: `alpha/r`, or `alpha/√r` for rsLoRA."""
        from harness.lora import lora_scale

        return lora_scale(
            alpha=self.alpha_of(module), rank=self.rank_of(module), rslora=self.rslora
        )


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first key that names *module*, matched as `peft.utils.other.get_pattern_key` does."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return None


def checkpoints_inside(folder: Path) -> list[str]:
    """Names of `checkpoint-N` folders and others one level down that hold an adapter."""
    if not folder.is_dir():
        return []
    found = [child.name for child in folder.iterdir() if (child / CONFIG_NAME).is_file()]
    return sorted(found, key=natural_order)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def nested_adapter_hint(folder: Path) -> str | None:
    """A remedy that names the checkpoint inside *folder*, if there is one."""
    inside = checkpoints_inside(folder)
    if not inside:
        return None
    choice = f"give {folder / inside[-1]}"
    return choice if len(inside) == 1 else f"{choice} (or another of: {', '.join(inside)})"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json` strictly; needs no torch.

    Raises:
        InputError: no folder, no config (a checkpoint inside is named), or a value of a wrong
            type or range.
    """
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "no such folder"
        raise InputError(fault, where=folder, remedy=f"give the folder that holds {CONFIG_NAME}")
    path = folder / CONFIG_NAME
    if not path.exists() and (hint := nested_adapter_hint(folder)):
        raise InputError(f"holds no {CONFIG_NAME} itself", where=folder, remedy=hint)
    raw = read_json_object(
        path, what=CONFIG_NAME, remedy="give a folder written by PEFT's save_pretrained"
    )
    read = _ConfigReader(raw, path)
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise read.refuse(
            "peft_type", f"{peft_type!r} is not LORA", "only LoRA adapters can be stacked"
        )
    if "lora_alpha" not in raw:
        raise read.refuse(
            "lora_alpha",
            "is missing (PEFT would silently assume 8)",
            "write the trained value",
        )
    unknown = [key for key in raw if key not in _KNOWN_KEYS and raw[key]]
    if unknown:
        raise read.refuse(
            unknown[0],
            f"is not known to this version and is set to {raw[unknown[0]]!r}",
            "remove it if it changes nothing, or update the harness",
        )
    targets = raw.get("target_modules")
    return AdapterConfig(
        path=path,
        rank=read.rank("r", raw.get("r", 8)),
        alpha=read.alpha("lora_alpha", raw["lora_alpha"]),
        rslora=read.flag("use_rslora"),
        rank_pattern={k: read.rank("rank_pattern", v) for k, v in read.table("rank_pattern")},
        alpha_pattern={k: read.alpha("alpha_pattern", v) for k, v in read.table("alpha_pattern")},
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
        base=read.text("base_model_name_or_path") or None,
        base_revision=read.text("revision"),
        not_additive=tuple(_reasons(raw, read)),
        raw=raw,
    )


class _ConfigReader:
    """Typed access to a raw config, with errors that name the file and the key."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def refuse(self, key: str, fault: str, remedy: str) -> InputError:
        return InputError(f"{key}: {fault}", where=self.path, remedy=remedy)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, f"{value!r} is not true or false", "write true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, f"{value!r} is not a string", "write a string or null")
        return value

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 < value <= _MAX_RANK:
            raise self.refuse(key, f"{value!r} is not a rank", f"write 1 to {_MAX_RANK}")
        return value

    def alpha(self, key: str, value: object) -> float:
        if type(value) not in (int, float) or not math.isfinite(float(value)):  # type: ignore[arg-type]
            raise self.refuse(key, f"{value!r} is not a finite number", "write the alpha trained")
        return float(value)  # type: ignore[arg-type]

    def table(self, key: str) -> list[tuple[str, object]]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self.refuse(key, f"{value!r} is not a table", "write {} or {pattern: number}")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.refuse(key, f"{pattern!r}: {error}", "mend the pattern") from error
        return list(value.items())


def _reasons(raw: Mapping[str, Any], read: _ConfigReader) -> list[str]:
    """Why the adapter is not additive, a line a reason."""
    for key in ("use_dora", "lora_bias", "use_qalora"):
        read.flag(key)
    reasons = [f"{key}: {why}" for key, why in _NOT_ADDITIVE.items() if raw.get(key)]
    bias = raw.get("bias", "none")
    if bias != "none":
        reasons.append(f"bias={bias}: the adapter's biases leak into other modes")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_MOVING_INITS):
        reasons.append(
            f"init_lora_weights={init}: loading moves the base weights, for every mode "
            "(convert it with save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    return reasons
