"""8-bit float weights with a scale beside them, as Qwen3-FP8 and DeepSeek-V3 are published.

`W = w · s`, with `w` in F8_E4M3 and one scale `s` a block (`weight_scale_inv`, blocks of
`weight_block_size`), a row or a tensor (`weight_scale`). The product in float32 is the base's
number, as transformers' own dequantisation makes it. Merging stores it in a wider dtype and drops
the scales: rounding to 8 bits again would lose most of ΔW. Knows nothing of adapters or outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.checkpoint_claims import FLOAT8
from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError
from harness.files.tensor_files import TensorEntry
from harness.merge.storage import RAW, decode

__all__ = ["Scale", "is_quantised", "scale_tensors", "scales_of"]

Array = NDArray[Any]

_SUFFIXES = ("_scale_inv", "_scale")
#: Scales of activations: of no use once the weights are plain numbers.
_ACTIVATIONS = (".input_scale", ".activation_scale")
_METHODS = frozenset({"fp8", "fbgemm_fp8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What the 8-bit numbers of one tensor are multiplied with.

    Attributes:
        values: float32, `(blocks of rows, blocks of columns)`.
        block: rows and columns that share one value.
    """

    values: Array
    block: tuple[int, int]

    def rows(self, rows: slice, columns: int) -> Array:
        """The factors of *rows*, `(rows, columns)` or what broadcasts to it; float32."""
        high, wide = self.block
        first, last = rows.start // high, (rows.stop - 1) // high + 1
        own = np.repeat(self.values[first:last], high, axis=0)
        own = own[rows.start - first * high : rows.stop - first * high]
        whole: Array = np.repeat(own, wide, axis=1)[:, :columns]
        return whole


def is_quantised(checkpoint: CheckpointFiles, dtype: str | None) -> bool:
    """Whether the base is 8-bit floats with scales, which are to become *dtype*.

    Raises:
        InputError: it is quantised in another way, or no *dtype* is chosen.
    """
    config = checkpoint.config.get("quantization_config")
    scaled = any(
        name.endswith((".weight_scale_inv", ".weight_scale")) for name in checkpoint.places
    )
    if not config and not scaled:
        return False
    method = config.get("quant_method") if isinstance(config, dict) else None
    if config and method not in _METHODS:
        raise InputError(
            f"is quantised ({method or 'quantization_config'}); adding to such weights is not "
            "exact",
            where=checkpoint.folder / "config.json",
            remedy="merge into the unquantised base, then quantise the result",
        )
    if dtype is None:
        raise InputError(
            "is quantised (8-bit floats with scales); the sum cannot be stored as it is",
            where=checkpoint.folder / "config.json",
            remedy="choose --dtype bfloat16: the output is the dequantised base with the adapters "
            "merged in; or merge into the unquantised base",
        )
    return True


def scale_tensors(checkpoint: CheckpointFiles) -> frozenset[str]:
    """The tensors that hold scales, which an output of plain numbers does not have."""
    own = {f"{name}{suffix}" for name in _float8(checkpoint) for suffix in _SUFFIXES}
    spare = {name for name in checkpoint.places if name.endswith(_ACTIVATIONS)}
    return frozenset((own & checkpoint.places.keys()) | spare)


def scales_of(checkpoint: CheckpointFiles) -> Mapping[str, Scale]:
    """The scale of every 8-bit tensor, by the tensor's name; some thousandths of the weights' size.

    Raises:
        InputError: an 8-bit tensor without a scale, or with one of a shape that does not fit.
    """
    found = {}
    for name in _float8(checkpoint):
        entry = checkpoint.entry(name)
        scale = next((name + s for s in _SUFFIXES if name + s in checkpoint.places), None)
        if scale is None:
            raise InputError(
                f"{name!r} is stored as {entry.dtype} in a quantised base, without a scale",
                where=checkpoint.folder,
                remedy="merge into the unquantised base",
            )
        found[name] = _scale(checkpoint, entry, checkpoint.entry(scale))
    return found


def _float8(checkpoint: CheckpointFiles) -> list[str]:
    return [n for n in checkpoint.places if checkpoint.entry(n).dtype in FLOAT8]


def _scale(checkpoint: CheckpointFiles, entry: TensorEntry, scale: TensorEntry) -> Scale:
    def refuse(why: str) -> InputError:
        return InputError(
            f"{scale.name!r} {why}",
            where=checkpoint.folder,
            remedy="merge into the unquantised base",
        )

    if scale.dtype not in RAW or len(entry.shape) != 2:
        raise refuse(f"is {scale.dtype} for a weight of {list(entry.shape)}, which is not known")
    with checkpoint.places[scale.name].path.open("rb") as file:
        file.seek(scale.start)
        raw = np.frombuffer(file.read(scale.end - scale.start), RAW[scale.dtype])
    values = decode(raw, scale.dtype, np.float32)
    if not np.isfinite(values).all():
        raise refuse("holds NaN or infinity")
    rows, columns = entry.shape
    config = checkpoint.config.get("quantization_config") or {}
    block = config.get("weight_block_size") if isinstance(config, dict) else None
    if scale.count == 1:
        return Scale(values=values.reshape(1, 1), block=(rows, columns))
    if scale.shape in ((rows,), (rows, 1)):
        return Scale(values=values.reshape(rows, 1), block=(1, columns))
    if (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
        and scale.shape == (-(-rows // block[0]), -(-columns // block[1]))
    ):
        return Scale(values=values.reshape(scale.shape), block=(block[0], block[1]))
    raise refuse(f"of {list(scale.shape)} does not fit a weight of {list(entry.shape)}")
