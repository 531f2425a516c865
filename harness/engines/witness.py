"""Whether a live model is still what was loaded: base, factors and `eval()`, before and after
each mode.

The sum of a parameter's bits, read as integers, changes with every single bit; where parameters
are large, an even sample of each is summed, so that a check costs milliseconds. Knows nothing of
modes or prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from harness.checkpoint_files import CheckpointFiles
from harness.engines.loading import ActivationError

__all__ = ["Witness", "compare_base_with_files"]

_WHOLE_ELEMENTS = 1 << 22  # a model of this many parameters is summed whole
_SAMPLE = 4096
_RUN = 64  # neighbours that a sample takes together: they cost one look at memory
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Witness:
    """Remembers sums over every parameter and buffer of a model, at rest."""

    def __init__(self, model: Any) -> None:
        total = sum(parameter.numel() for parameter in model.parameters())
        self._sample = None if total <= _WHOLE_ELEMENTS else _SAMPLE
        self._sums, _ = self._read(model)
        self.sampled = self._sample is not None

    def check(self, model: Any, when: str) -> None:
        """Hold the model against what was remembered.

        Args:
            when: for the message, e.g. `after mode stacked`.

        Raises:
            ActivationError: a parameter is other, gone or new; a module is in training mode.
        """
        now, training = self._read(model)
        if training is not None:
            raise ActivationError(f"{when}: {training or 'the model'} is in training mode")
        for name in [*self._sums, *now]:
            if self._sums.get(name) != now.get(name):
                state = "gone" if name not in now else "new" if name not in self._sums else "other"
                raise ActivationError(f"{when}: {name} is {state} than what was loaded")

    def _read(self, model: Any) -> tuple[dict[str, tuple[int, ...]], str | None]:
        """Sum and shape of every tensor, and the first module that is in training mode."""
        sums: dict[str, tuple[int, ...]] = {}
        training = None
        for path, module in model.named_modules(remove_duplicate=False):
            if module.training and training is None:
                training = path
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or tensor.device.type == "meta":
                    continue  # none, or offloaded to disk: not here to be summed
                data = tensor.detach()
                total = _bit_sum(data, self._sample)
                key = f"{path}.{name}" if path else name
                sums[key] = (0 if total is None else int(total.item()), *data.shape)
        return sums, training


def _bit_sum(data: Tensor, sample: int | None) -> Tensor | None:
    """The sum of *data*'s bits as integers, modulo 2^64, on its own device."""
    if not data.numel():
        return None
    if data.is_complex() or data.dtype is torch.bool:
        data = torch.view_as_real(data) if data.is_complex() else data.to(torch.int8)
    flat = data.reshape(-1)
    if sample is not None and flat.numel() > sample:
        flat = _spread(flat, sample)
    return flat.contiguous().view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def _spread(flat: Tensor, sample: int) -> Tensor:
    """*sample* elements in runs, evenly spread from the first element to about the last."""
    runs = max(1, sample // _RUN)
    length = sample // runs
    step = (flat.numel() - length) // max(1, runs - 1)
    return flat.as_strided((runs, length), (step, 1))


def compare_base_with_files(model: Any, checkpoint: CheckpointFiles) -> int:
    """Hold the base's weights in memory against the shards; returns how many were compared.

    Names that transformers maps while loading, and weights on no device, are passed over. Large
    tensors are compared on an even sample.

    Raises:
        ActivationError: a weight in memory differs from the file's, in the dtype it was loaded in.
    """
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    compared = 0
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        stored_name = name.replace(".base_layer.", ".")
        shard = checkpoint.places.get(stored_name)
        if shard is None or parameter.device.type == "meta":
            continue
        live, stored = parameter.detach(), shard.tensor(stored_name)
        if live.shape != stored.shape or not live.dtype.is_floating_point:
            continue
        step = max(1, live.numel() // (_WHOLE_ELEMENTS if live.numel() < 1 << 16 else _SAMPLE))
        ours = live.reshape(-1)[::step].cpu()
        theirs = stored.reshape(-1)[::step].to(live.dtype)
        if not torch.equal(ours, theirs):
            raise ActivationError(f"{name} in memory differs from {shard.path}")
        compared += 1
    return compared
