"""The oracle: what the weights of a mode must be, from the files alone, in float64.

Reads base shards and adapter folders, never PEFT or a live model. One module at a time, so that
memory stays bounded by the largest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.adapter_config import natural_order
from harness.adapter_files import AdapterFiles
from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError
from harness.stack import Mode

if TYPE_CHECKING:
    from torch import Tensor

    from harness.lora import LoraPair

__all__ = ["adapted_modules", "mode_terms", "reference_weights"]


def adapted_modules(files: Mapping[str, AdapterFiles]) -> list[str]:
    """Every module that some adapter adapts, in natural order."""
    return sorted({module for adapter in files.values() for module in adapter.pairs},
                  key=natural_order)  # fmt: skip


def mode_terms(
    files: Mapping[str, AdapterFiles], mode: Mode, module: str
) -> list[tuple[float, LoraPair]]:
    """The weighted pairs that *mode* adds to *module*."""
    return [
        (weight, files[name].pair(module))
        for name, weight in mode.weights
        if module in files[name].pairs
    ]


def reference_weights(
    checkpoint: CheckpointFiles, files: Mapping[str, AdapterFiles], mode: Mode
) -> Iterator[tuple[str, Tensor]]:
    """`W_base + Σ wᵢ·sᵢ·BᵢAᵢ` of every adapted module, float64, in the base weight's layout.

    Raises:
        InputError: the base's files hold no weight for an adapted module.
    """
    from harness.lora import add_deltas

    for module in adapted_modules(files):
        name = checkpoint.weight_name(module)
        if name is None:
            raise InputError(f"holds no weight for {module!r}", where=checkpoint.folder)
        yield module, add_deltas(checkpoint.tensor(name), mode_terms(files, mode, module))
