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
from harness.merge.targets import EXPERT_PARTS, stores_experts_transposed

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


def _weight_of(
    checkpoint: CheckpointFiles, module: str, analysed: AnalysedPair
) -> tuple[str, torch.Tensor] | None:
    """The base's weight that *module* changes, and its name; of a fused parameter the expert's."""
    if analysed.parameter is None:
        name = checkpoint.weight_name(module)
        return None if name is None else (name, checkpoint.tensor(name))
    inner, _, parameter = analysed.parameter.rpartition(".")
    name = checkpoint.stored_name(analysed.parameter)
    if name is not None:
        stacked = checkpoint.tensor(name)
        if stacked.ndim != 3 or stacked.shape[0] <= analysed.expert:
            return None
        own = stacked[analysed.expert]
        return name, own.T if stores_experts_transposed(checkpoint) else own
    names = [
        checkpoint.stored_name(f"{inner}.{analysed.expert}.{half}.weight")
        for half in EXPERT_PARTS.get(parameter, ())
    ]
    known = [name for name in names if name is not None]
    if not known or len(known) != len(names):
        return None
    return known[0], torch.cat([checkpoint.tensor(name) for name in known])


def refine_with_base(
    checkpoint: CheckpointFiles, *, intruders: int = 0
) -> Callable[[ModuleFigures, AnalysedPair], ModuleFigures]:
    """A function that adds `relative_norm`, and `intruders` among the top *intruders* vectors.

    A module that the base names otherwise keeps None. The function raises `InputError` for a
    base weight of another shape, or one that holds NaN.
    """

    def refine(figures: ModuleFigures, analysed: AnalysedPair) -> ModuleFigures:
        found = _weight_of(checkpoint, figures.module, analysed)
        if found is None:
            return figures
        name, weight = found
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
