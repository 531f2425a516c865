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

from harness.adapter_config import CONFIG_NAME, AdapterConfig, natural_order, read_adapter_config
from harness.errors import InputError
from harness.tensor_files import TensorEntry, TensorFile, read_tensor_file

if TYPE_CHECKING:
    from harness.lora import LoraPair

__all__ = [
    "KEY_PREFIX",
    "WEIGHTS_NAME",
    "AdapterFiles",
    "PairEntry",
    "adapter_digest",
    "read_adapter",
]

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
#: What PEFT puts before a base model's names.
KEY_PREFIX = "base_model.model."
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

    @property
    def parameters(self) -> int:
        """The number of parameters in the pairs."""
        return sum(entry.a.count + entry.b.count for entry in self.pairs.values())


def read_adapter(folder: Path, *, faults: list[InputError] | None = None) -> AdapterFiles:
    """Read and check an adapter folder; headers only, the tensors stay on disk.

    Args:
        faults: broken pairs are left out and their faults added here, instead of raised.

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
        path,
        what=WEIGHTS_NAME,
        remedy="copy or save the adapter's weights again",
        faults=faults,
    )
    return AdapterFiles(
        folder=folder,
        config=config,
        tensors=tensors,
        pairs=_pairs(tensors, config, faults),
        base_copies={
            f"{match['module']}.weight".removeprefix(KEY_PREFIX): entry
            for name, entry in tensors.entries.items()
            if (match := _BASE_COPY.fullmatch(name))
        },
    )


def _pairs(
    tensors: TensorFile, config: AdapterConfig, faults: list[InputError] | None
) -> dict[str, PairEntry]:
    factors: dict[str, dict[str, TensorEntry]] = {}
    strangers: list[str] = []
    for key, entry in tensors.entries.items():
        match = _KEY.fullmatch(key)
        if match is None or not key.startswith(KEY_PREFIX):
            if _BASE_COPY.fullmatch(key) is None:
                strangers.append(key)
            continue
        module = (match["module"] or match["embedding"]).removeprefix(KEY_PREFIX)
        factors.setdefault(module, {})[match["factor"] or match["embedding_factor"]] = entry
    if strangers and not config.not_additive:
        fault = InputError(
            f"tensor {strangers[0]!r} is no LoRA factor of a plain adapter"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else "")
            + "; PEFT would ignore it or write it over the base",
            where=tensors.path,
            remedy=f"keys read {KEY_PREFIX}<module>.lora_A.weight and …lora_B.weight",
        )
        if faults is None:
            raise fault
        faults.append(fault)
    if not factors:
        raise InputError(
            "holds no LoRA factors", where=tensors.path, remedy="save the trained adapter again"
        )
    pairs: dict[str, PairEntry] = {}
    for module in sorted(factors, key=natural_order):
        try:
            pairs[module] = _pair(module, factors[module], tensors.path, config)
        except InputError as error:
            if faults is None:
                raise
            faults.append(error)
    return pairs


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
    experts = 1
    if config.raw.get("target_parameters") and a.shape[0] == b.shape[1]:
        experts = max(1, a.shape[0] // claimed)
    if a.shape[0] != b.shape[1] or a.shape[0] != claimed * experts:
        raise InputError(
            f"module {module!r}: A has rank {a.shape[0]}, B has rank {b.shape[1]}, "
            f"the config says {claimed}",
            where=path,
            remedy=f"mend r or rank_pattern in {CONFIG_NAME}, or save the adapter again",
        )
    return PairEntry(module=module, a=a, b=b, embedding=embedding, experts=experts)


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the contents of the config and the weights file, in this order."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
