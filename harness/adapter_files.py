"""A PEFT LoRA folder and the values in it, read without PEFT; every check a folder can fail.

Follows PEFT 0.21's checkpoint format
(https://huggingface.co/docs/peft/developer_guides/checkpoint): `adapter_config.json` beside
`adapter_model.safetensors`, whose keys are `base_model.model.<module>.lora_A.weight` and so on.
Knows nothing of stacks, live models or where the folder came from.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.strict_json import read_json_object
from harness.tensor_files import TensorEntry, TensorFile, read_tensor_file

if TYPE_CHECKING:
    from harness.lora import LoraPair

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterConfig",
    "AdapterFiles",
    "PairEntry",
    "adapter_digest",
    "checkpoints_inside",
    "nested_adapter_hint",
    "read_adapter",
    "read_adapter_config",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_KEY_PREFIX = "base_model.model."
_MAX_RANK = 1 << 16
_ADAPTER_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight"
    r"|(?P<embedding>.+)\.(?P<embedding_factor>lora_embedding_A|lora_embedding_B)"
)
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")

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
        """The rank that the config claims for *module* (`rank_pattern`, else `r`)."""
        key = _pattern_key(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """The alpha of *module* (`alpha_pattern`, else `lora_alpha`)."""
        key = _pattern_key(self.alpha_pattern, module)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, module: str) -> float:
        """`s` of *module*: `alpha/r`, or `alpha/√r` for rsLoRA."""
        from harness.lora import lora_scale

        return lora_scale(
            alpha=self.alpha_of(module), rank=self.rank_of(module), rslora=self.rslora
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEntry:
    """Where one module's two factors lie in the weights file."""

    module: str
    a: TensorEntry
    b: TensorEntry
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """A sound adapter folder: its config, and one pair of factors a module.

    Attributes:
        pairs: by module name as in the base model (`model.layers.0.self_attn.q_proj`), in the
            natural order (layer 2 before layer 10).
        base_copies: copies of base weights by their name in the base. PEFT saves them beside an
            adapter of an embedding or head and writes them over the base when it loads them, so
            whoever knows the base must hold them against it.
    """

    folder: Path
    config: AdapterConfig
    tensors: TensorFile
    pairs: Mapping[str, PairEntry]
    base_copies: Mapping[str, TensorEntry]

    def pair(self, module: str) -> LoraPair:
        """The factors of *module* as views of the mapped file, with their scale.

        Raises:
            InputError: the adapter has no such module.
        """
        entry = self.pairs.get(module)
        if entry is None:
            raise InputError(f"adapts no module {module!r}", where=self.folder)
        from harness.lora import LoraPair

        return LoraPair(
            module=module,
            a=self.tensors.tensor(entry.a.name),
            b=self.tensors.tensor(entry.b.name),
            scale=self.config.scale_of(module),
            transposed=self.config.fan_in_fan_out or entry.embedding,
        )

    @property
    def parameters(self) -> int:
        """The number of parameters in the pairs."""
        return sum(entry.a.count + entry.b.count for entry in self.pairs.values())


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


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check an adapter folder; headers only, the tensors stay on disk.

    Raises:
        InputError: whatever `read_adapter_config` raises; a pickle instead of safetensors; a
            broken file; a key that is no LoRA factor or names a base weight; half a pair; a rank
            other than the config's; a dtype that no adapter has.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        for name in _PICKLE_NAMES:
            if (folder / name).exists():
                raise InputError(
                    "is a pickle, which can run code when loaded, and is not read",
                    where=folder / name,
                    remedy="load it once where you trust it and save it with "
                    "save_pretrained(…, safe_serialization=True)",
                )
    tensors = read_tensor_file(
        path, what=WEIGHTS_NAME, remedy="copy or save the adapter's weights again"
    )
    return AdapterFiles(
        folder=folder,
        config=config,
        tensors=tensors,
        pairs=_pairs(tensors, config),
        base_copies={
            f"{match['module']}.weight".removeprefix(_KEY_PREFIX): entry
            for name, entry in tensors.entries.items()
            if (match := _BASE_COPY.fullmatch(name))
        },
    )


def _pairs(tensors: TensorFile, config: AdapterConfig) -> dict[str, PairEntry]:
    factors: dict[str, dict[str, TensorEntry]] = {}
    strangers: list[str] = []
    for key, entry in tensors.entries.items():
        match = _KEY.fullmatch(key)
        if match is None or not key.startswith(_KEY_PREFIX):
            if _BASE_COPY.fullmatch(key) is None:
                strangers.append(key)
            continue
        module = (match["module"] or match["embedding"]).removeprefix(_KEY_PREFIX)
        factors.setdefault(module, {})[match["factor"] or match["embedding_factor"]] = entry
    if strangers and not config.not_additive:
        raise InputError(
            f"tensor {strangers[0]!r} is no LoRA factor of a plain adapter"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else "")
            + "; PEFT would ignore it or write it over the base",
            where=tensors.path,
            remedy=f"keys read {_KEY_PREFIX}<module>.lora_A.weight and …lora_B.weight",
        )
    if not factors:
        raise InputError(
            "holds no LoRA factors", where=tensors.path, remedy="save the trained adapter again"
        )
    return {
        module: _pair(module, factors[module], tensors.path, config)
        for module in sorted(factors, key=natural_order)
    }


def _pair(
    module: str, found: Mapping[str, TensorEntry], path: Path, config: AdapterConfig
) -> PairEntry:
    embedding = any(name.startswith("lora_embedding") for name in found)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(found) != set(names):
        (missing,) = set(names) - set(found) or {"the other half"}
        raise InputError(
            f"module {module!r}: {missing} is missing", where=path, remedy="save the adapter again"
        )
    a, b = found[names[0]], found[names[1]]
    for entry in (a, b):
        if entry.dtype not in _ADAPTER_DTYPES:
            raise InputError(
                f"tensor {entry.name!r} is {entry.dtype}, which no LoRA factor is",
                where=path,
                remedy="save it as F32, BF16 or F16",
            )
        if len(entry.shape) != 2:
            raise InputError(
                f"tensor {entry.name!r} has shape {list(entry.shape)}, not two dimensions",
                where=path,
                remedy="save the adapter again",
            )
    claimed = config.rank_of(module)
    if a.shape[0] != b.shape[1] or a.shape[0] != claimed:
        raise InputError(
            f"module {module!r}: A has rank {a.shape[0]}, B has rank {b.shape[1]}, "
            f"the config says {claimed}",
            where=path,
            remedy=f"mend r or rank_pattern in {CONFIG_NAME}, or save the adapter again",
        )
    return PairEntry(module=module, a=a, b=b, embedding=embedding)


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the contents of the config and the weights file, in this order."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
