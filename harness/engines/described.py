"""What a checkpoint's folder describes: the model's structure without weights, and its tokenizer.

So that a live architecture and a tokenizer at hand can be held against them. Knows nothing of
live models beyond their class, nor of verdicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import InputError

__all__ = ["fresh_tokenizer", "scalars", "skeleton"]


def skeleton(base: Path, *, like: Any) -> nn.Module:
    """What `config.json` in *base* describes, on the meta device: structure without weights.

    Args:
        like: the live transformers model, whose class is built, and whose dtype and attention
            implementation are used.

    Raises:
        InputError: transformers cannot build it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        wanted = getattr(like.config, "_attn_implementation", None)
        if wanted is not None:
            config._attn_implementation = wanted
        with torch.device("meta"), _default_dtype(like.dtype):
            built: nn.Module = type(like)(config)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise InputError(f"cannot be built: {error}", where=base / "config.json") from error
    return built.eval()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As `from_pretrained` builds: some buffers have the default dtype, some one of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def scalars(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module keeps beside its tensors (eps, scaling, head counts, …)."""
    kept = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "gradient_checkpointing", "name_or_path", "is_loaded_in_4bit")
        and isinstance(value, bool | int | float | str | type(None))
    }
    for name in ("act_fn", "activation_fn", "act"):
        value = getattr(module, name, None)
        if value is not None and name not in kept:
            kept[name] = getattr(value, "__name__", type(value).__name__)
    return kept


def fresh_tokenizer(base: Path) -> Any:
    """The tokenizer that the base's folder holds, untouched by anybody.

    Raises:
        InputError: the folder holds none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"holds no tokenizer that loads: {line}", where=base) from error
