"""A PEFT LoRA folder: its factors, read without PEFT, and every check that they can fail.

Its config is read by `harness.adapter_config`. Follows PEFT 0.21's checkpoint format
(https://huggingface.co/docs/peft/developer_guides/checkpoint): `adapter_config.json` beside
`adapter_model.safetensors`, whose keys are `base_model.model.<module>.lora_A.weight` and so on.
Knows nothing of stacks, live models or where the folder came from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.adapter_config import CONFIG_NAME, natural_order, read_adapter_config
from harness.adapter_settings import AdapterConfig
from harness.errors import InputError, combined, enough, gathering, quoted
from harness.files.file_kinds import is_folder, is_there
from harness.files.tensor_files import TensorEntry, TensorFile, read_tensor_file

if TYPE_CHECKING:
    from harness.lora import LoraPair

__all__ = [
    "KEY_PREFIX",
    "WEIGHTS_NAME",
    "AdapterFiles",
    "PairEntry",
    "adapter_digest",
    "read_adapter",
    "unwrapped",
]

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
#: What PEFT puts before a base model's names.
KEY_PREFIX = "base_model.model."
# The parameters of a fused experts module, in the order in which transformers registers them:
# PEFT wraps them one around the other in this order, the first innermost.
_PARAMETERS = ("gate_up_proj", "down_proj", "weight")
_WRAPPER = ".base_layer"
_MOST_STRANGERS = 1000  # are told of; a header can hold a million
_ADAPTER_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight"
    r"|(?P<embedding>.+)\.(?P<embedding_factor>lora_embedding_A|lora_embedding_B)"
)
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEntry:
    """Where one module's two factors lie in the weights file.

    Attributes:
        experts: how many experts' ranks a fused parameter (`target_parameters`) holds side by
            side, `A: (experts·r, in)`; 1 for a module.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    embedding: bool = False
    experts: int = 1

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

    def targeted(self, module: str) -> tuple[str, ...]:
        """The parameters of *module* that `target_parameters` names, by their full names, in
        PEFT's order of wrapping."""
        inner = unwrapped(module)
        targets = self.config.raw.get("target_parameters") or ()
        names = (f"{inner}.{name}" for name in _PARAMETERS)
        return tuple(n for n in names if any(f".{n}".endswith(f".{target}") for target in targets))

    def parameter(self, module: str) -> str | None:
        """The parameter that the pair of *module* adapts, by its full name.

        None for the weight of a module, and where the config does not name as many parameters of
        it as the file holds. PEFT calls the pairs of several parameters `experts`,
        `experts.base_layer` and so on, the last wrapped first: which name is whose depends on
        which of them the adapter adapts.
        """
        inner, names = unwrapped(module), self.targeted(module)
        held = sum(unwrapped(other) == inner for other in self.pairs) if names else 0
        if not names or held != len(names):
            return None
        return names[len(names) - 1 - (len(module) - len(inner)) // len(_WRAPPER)]

    @property
    def parameters(self) -> int:
        """The number of parameters in the pairs."""
        return sum(entry.a.count + entry.b.count for entry in self.pairs.values())


def unwrapped(module: str) -> str:
    """The name of a module in the base, of that of a wrapper that PEFT put around it."""
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


def read_adapter(
    folder: Path,
    *,
    faults: list[InputError] | None = None,
    trust_remote_code: bool = False,
) -> AdapterFiles:
    """Read and check an adapter folder; headers only, the tensors stay on disk.

    Args:
        faults: broken pairs are left out and their faults added here, instead of raised.
        trust_remote_code: let through config fields by which loaders run code.

    Raises:
        InputError: whatever `read_adapter_config` raises; a pickle instead of safetensors; a
            broken file; a key that is no LoRA factor or names a base weight; half a pair; a rank
            other than the config's; a module that the config does not target; a dtype that no
            adapter has. All faults of the folder at once.
    """
    found: list[InputError] = []
    tensors = None
    beyond: list[InputError] = []
    config = _config(folder, found, trust_remote_code=trust_remote_code)
    if is_folder(folder):
        with gathering(found):
            tensors = _weights(folder, None if faults is None else beyond)
    if tensors is None:
        raise combined(found)
    found += beyond
    factors, strangers, base_copies = _sorted_keys(tensors)
    if config is None:  # what is wrong without it, too: one run tells all
        for module in sorted(factors, key=natural_order):
            with gathering(found):
                _pair(module, factors[module], tensors.path, None)
        raise combined(found)
    if not config.not_additive:
        found += [_stranger(key, tensors.path) for key in strangers[:_MOST_STRANGERS]]
    if not factors:
        found.append(
            InputError(
                "holds no LoRA factors", where=tensors.path, remedy="save the trained adapter again"
            )
        )
        raise combined(found)
    config.refuse_slow_patterns(list(factors))
    pairs: dict[str, PairEntry] = {}
    for module in sorted(factors, key=natural_order):
        if enough(found):
            break
        with gathering(found):
            pairs[module] = _pair(module, factors[module], tensors.path, config)
    if found and faults is None:
        raise combined(found)
    if faults is not None:
        faults += found
    return AdapterFiles(
        folder=folder, config=config, tensors=tensors, pairs=pairs, base_copies=base_copies
    )


def _config(
    folder: Path, faults: list[InputError], *, trust_remote_code: bool
) -> AdapterConfig | None:
    """The config; None if it is broken, and *faults* say how."""
    try:
        return read_adapter_config(folder, trust_remote_code=trust_remote_code)
    except InputError as error:
        faults += error.faults
        return None


def _weights(folder: Path, beyond: list[InputError] | None) -> TensorFile:
    path = folder / WEIGHTS_NAME
    if not is_there(path):
        for name in _PICKLE_NAMES:
            if is_there(folder / name):
                raise InputError(
                    "is a pickle, which can run code when loaded, and is not read",
                    where=folder / name,
                    remedy="load it once where you trust it and save it with "
                    "save_pretrained(…, safe_serialization=True)",
                )
    return read_tensor_file(
        path,
        what=WEIGHTS_NAME,
        remedy="copy or save the adapter's weights again",
        faults=beyond,
    )


def _sorted_keys(
    tensors: TensorFile,
) -> tuple[dict[str, dict[str, TensorEntry]], list[str], dict[str, TensorEntry]]:
    """Factors by module, keys that are no factors, and copies of base weights."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    strangers: list[str] = []
    copies: dict[str, TensorEntry] = {}
    for key, entry in tensors.entries.items():
        match = _KEY.fullmatch(key) if key.startswith(KEY_PREFIX) else None
        copy = _BASE_COPY.fullmatch(key)
        if match is not None:
            module = (match["module"] or match["embedding"]).removeprefix(KEY_PREFIX)
            if module.startswith(KEY_PREFIX):
                strangers.append(key)
            else:
                factor = match["factor"] or match["embedding_factor"]
                factors.setdefault(module, {})[factor] = entry
        elif copy is not None:
            copies[f"{copy['module']}.weight".removeprefix(KEY_PREFIX)] = entry
        else:
            strangers.append(key)
    return factors, strangers, copies


def _stranger(key: str, path: Path) -> InputError:
    """Why *key* is no factor of a plain adapter."""
    plain = f"keys read {KEY_PREFIX}<module>.lora_A.weight and …lora_B.weight"
    if key.startswith(KEY_PREFIX * 2):
        fault, remedy = "has the prefix twice; PEFT would ignore it", plain
    elif re.search(r"\.lora_[AB]\.[^.]+\.weight$", key):
        fault = "has an adapter's name in it, as in a model's own state; PEFT would ignore it"
        remedy = f"save it with save_pretrained; {plain}"
    elif re.search(r"lora_(A|B|embedding_A|embedding_B)", key):
        fault, remedy = f"lacks the prefix {KEY_PREFIX}; PEFT would ignore it", plain
    elif re.search(r"lora_(down|up)|\.lora\.|^lora_(unet|te)", key):
        fault, remedy = "is another library's LoRA; PEFT would ignore it", f"convert it; {plain}"
    elif "lora_magnitude_vector" in key:
        fault = "belongs to DoRA, and use_dora is not set"
        remedy = "a DoRA adapter cannot be stacked; otherwise save the adapter again"
    elif key.endswith((".weight", ".bias")) and "lora" not in key:
        fault = "names a base weight; PEFT would write it over the base, for every mode"
        remedy = "remove it, or save the adapter again with save_pretrained"
    else:
        fault = "is no LoRA factor of a plain adapter; PEFT would ignore it"
        remedy = plain
    return InputError(f"tensor {quoted(key)}: {fault}", where=path, remedy=remedy)


def _pair(
    module: str, found: Mapping[str, TensorEntry], path: Path, config: AdapterConfig | None
) -> PairEntry:
    """The pair of *module*, held against *config* if there is one that can be read."""

    def refuse(fault: str, remedy: str = "save the adapter again") -> InputError:
        return InputError(f"module {quoted(module)}: {fault}", where=path, remedy=remedy)

    embedding = any(name.startswith("lora_embedding") for name in found)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in found:
            raise refuse(f"{name} is missing")
    if len(found) > len(names):
        raise refuse("has factors of a linear layer and of an embedding")
    a, b = found[names[0]], found[names[1]]
    for entry in (a, b):
        where = f"tensor {quoted(entry.name)}"
        if entry.dtype not in _ADAPTER_DTYPES:
            raise InputError(
                f"{where} is {entry.dtype}, which no LoRA factor is",
                where=path,
                remedy="save it as F32, BF16 or F16",
            )
        if len(entry.shape) != 2 or not entry.count:
            fault = "not two dimensions" if len(entry.shape) != 2 else "no elements"
            raise InputError(
                f"{where} has shape {list(entry.shape)}, {fault}",
                where=path,
                remedy="save the adapter again",
            )
    if config is None:
        if a.shape[0] != b.shape[1]:
            raise refuse(f"A has rank {a.shape[0]}, B has rank {b.shape[1]}")
        return PairEntry(module=module, a=a, b=b, embedding=embedding)
    # With ensure_weight_tying PEFT adapts the tied partner too, which no target names.
    if config.targets(module) is False and not config.raw.get("ensure_weight_tying"):
        raise refuse(
            "has weights, which target_modules does not name: PEFT drops them",
            f"mend target_modules in {CONFIG_NAME}, or save the adapter again",
        )
    claimed = config.rank_of(module)
    experts = 1
    if config.raw.get("target_parameters") and a.shape[0] == b.shape[1]:
        experts = max(1, a.shape[0] // claimed)
    if a.shape[0] != b.shape[1] or a.shape[0] != claimed * experts:
        raise refuse(
            f"A has rank {a.shape[0]}, B has rank {b.shape[1]}, the config says {claimed}",
            f"mend r or rank_pattern in {CONFIG_NAME}, or save the adapter again",
        )
    return PairEntry(module=module, a=a, b=b, embedding=embedding, experts=experts)


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the contents of the config and the weights file, in this order."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
