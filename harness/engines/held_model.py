"""A loaded model that is held for a block: where it lies, in which dtype, and its end.

Knows nothing of stacks, adapters or tokens.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["HeldModel"]


class HeldModel:
    """A context manager over `model`: what every engine that loads one in this process is.

    Attributes:
        model: None once it is closed.
    """

    model: Any

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back. The engine cannot be used after."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def device(self) -> str:
        """Where inputs go: the device of the embedding."""
        return str(self.model.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> str:
        """The dtype of the base's weights, e.g. `float32`."""
        return str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
