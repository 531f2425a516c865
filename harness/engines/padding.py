"""Rows of token ids as one block, with the mask that tells padding from tokens.

Knows nothing of models, nor of which side is right for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["padded"]


def padded(
    rows: Sequence[Sequence[int]],
    pad: int,
    *,
    side: Literal["left", "right"],
    least: int = 0,
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of *rows*, `(rows, width)` on the CPU, padded with *pad* on *side*.

    Args:
        least: padding that the longest row gets as well.
    """
    width = max(len(row) for row in rows) + least
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[place, start : start + len(row)] = torch.tensor(row)
        mask[place, start : start + len(row)] = 1
    return ids, mask
