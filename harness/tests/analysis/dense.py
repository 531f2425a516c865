"""Dense float64 oracles and hand-made adapter folders for the tests of `harness.analysis`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_pair(seed: int, *, rank: int = 4, out: int = 24, columns: int = 16, **values: Any) -> Any:
    """A seeded `LoraPair`; `a`, `b` and `scale` can be replaced."""
    import torch

    from harness.lora import LoraPair

    generator = torch.Generator().manual_seed(seed)
    made = {
        "module": "model.layers.0.self_attn.q_proj",
        "a": torch.randn(rank, columns, generator=generator),
        "b": torch.randn(out, rank, generator=generator),
        "scale": 1.5,
    }
    return LoraPair(**(made | values))


def write_adapter(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """Write `{module.lora_A: tensor}` as PEFT would; the rank is that of the first A."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    keyed = {f"base_model.model.{name}.weight": value for name, value in tensors.items()}
    rank = next(value.shape[0] for name, value in tensors.items() if name.endswith("lora_A"))
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save_file(keyed, folder / "adapter_model.safetensors")
    return folder


def layered_adapter(
    folder: Path, *, seed: int, layers: int = 3, kinds: tuple[str, ...] = ("q_proj", "down_proj"),
    rank: int = 4, factor: float = 1.0,
) -> Path:  # fmt: skip
    """An adapter of random float32 factors over several layers and module types."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for kind in kinds:
            name = f"model.layers.{layer}.mlp.{kind}"
            tensors[f"{name}.lora_A"] = torch.randn(rank, 16, generator=generator)
            tensors[f"{name}.lora_B"] = torch.randn(24, rank, generator=generator) * factor
    return write_adapter(folder, tensors)
