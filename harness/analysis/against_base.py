"""Figures that need the base: ‖ΔW‖ relative to ‖W‖, and intruder dimensions.

The base is read tensor by tensor in blocks of rows. Knows nothing of adapters as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from harness.analysis.modules import ModuleFigures
from harness.analysis.reading import AnalysedPair
from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError

__all__ = ["INTRUDER_COSINE", "count_intruders", "frobenius_norm", "refine_with_base"]

#: A direction with no cosine to the base's directions at or above this is an intruder.
INTRUDER_COSINE = 0.5
_BLOCK_ENTRIES = 1 << 20


def frobenius_norm(weight: torch.Tensor) -> float:
    """`‖W‖_F` of a 2-D *weight*, summed in float64 in blocks of rows."""
    step = max(1, _BLOCK_ENTRIES // max(1, weight.shape[1]))
    squares = 0.0
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step].to(torch.float64)
        squares += float(torch.linalg.vector_norm(block)) ** 2
    return math.sqrt(squares)


def count_intruders(
    weight: torch.Tensor, analysed: AnalysedPair, *, top: int, cosine: float = INTRUDER_COSINE
) -> int:
    """How many of the *top* left singular vectors of `W + ΔW` are foreign to all of `W`'s.

    A vector is an intruder if its largest |cosine| to `W`'s left singular vectors is below
    *cosine* (Shuttleworth et al. 2024, arXiv:2410.21228, Algorithm 1). Two dense singular value
    decompositions: seconds to minutes for a large module.
    """
    dense = weight.to(torch.float64).numpy()
    changed = dense + analysed.pair.delta().numpy()
    if analysed.pair.transposed:  # stored as (in, out): output directions are the right ones
        dense, changed = dense.T, changed.T
    base_left = np.linalg.svd(dense, full_matrices=False)[0]
    left = np.linalg.svd(changed, full_matrices=False)[0][:, :top]
    nearest = np.abs(base_left.T @ left).max(axis=0)
    return int(np.count_nonzero(nearest < cosine))


def refine_with_base(
    checkpoint: CheckpointFiles, *, intruders: int = 0
) -> Callable[[ModuleFigures, AnalysedPair], ModuleFigures]:
    """A function that adds `relative_norm`, and `intruders` among the top *intruders* vectors.

    A module that the base names otherwise keeps None. The function raises `InputError` for a
    base weight of another shape, or one that holds NaN.
    """

    def refine(figures: ModuleFigures, analysed: AnalysedPair) -> ModuleFigures:
        name = checkpoint.weight_name(figures.module)
        if name is None:
            return figures
        weight = checkpoint.tensor(name)
        shape = [figures.out_features, figures.in_features]
        if analysed.pair.transposed:
            shape.reverse()
        if list(weight.shape) != shape:
            raise InputError(
                f"module {figures.module!r}: the adapter needs a base weight of {shape}, the base "
                f"has {list(weight.shape)}",
                where=analysed.path,
                remedy="give the base that the adapter was trained on as --base-model",
            )
        norm = frobenius_norm(weight)
        if not math.isfinite(norm):
            raise InputError(
                f"tensor {name!r}: holds NaN or infinities",
                where=checkpoint.folder,
                remedy="copy the base model again",
            )
        return dataclasses.replace(
            figures,
            relative_norm=figures.norm_delta / norm if norm else None,
            intruders=count_intruders(weight, analysed, top=intruders) if intruders else None,
        )

    return refine
