"""One generation of fixed length, with a call at every token; what is measured is what users run.

`generate` itself decodes, greedily and with its key-value cache, and a stopping criterion that
never stops anything is asked after each token: there the caller's `mark` is called. Ends of
sequence are ignored. Knows nothing of clocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.errors import HarnessError

__all__ = ["Decoding", "generate_marked", "plain_generation", "random_ids"]


class Decoding(StrEnum):
    """How `generate` keeps its cache and runs a decode step."""

    DYNAMIC = "dynamic"  #: a cache that grows; transformers' default
    STATIC = "static"  #: a cache of fixed size, steps run as written
    COMPILED = "compiled"  #: fixed size, and torch.compile with CUDA graphs; on CUDA alone


class _Marker(StoppingCriteria):  # type: ignore[misc]
    """Calls `mark` after each token; its answer, "nobody is done", is made once."""

    def __init__(self, mark: Callable[[], None], nobody: Tensor) -> None:
        self.mark, self.nobody = mark, nobody

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.mark()
        return self.nobody


def random_ids(vocabulary: int, rows: int, length: int, device: str, seed: int = 0) -> Tensor:
    """Token ids `(rows, length)`, drawn once from a seed: latency does not depend on the words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(device)


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Hide the model's own generation settings: `generate` would fill ours up from them."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def generate_marked(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    mark: Callable[[], None] | None,
    decoding: Decoding = Decoding.DYNAMIC,
) -> Tensor:
    """Greedily append exactly *new_tokens* to each row of *ids*; *mark* is called after each.

    Args:
        ids: `(rows, length)`, without padding.
        mark: None leaves the hook out, as the bare loop that overhead is measured against.

    Returns:
        `(rows, length + new_tokens)`.

    Raises:
        HarnessError: `generate` made another number of tokens.
    """
    fixed = decoding is not Decoding.DYNAMIC
    settings: dict[str, Any] = {"cache_implementation": "static"} if fixed else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        use_cache=True,
        disable_compile=decoding is not Decoding.COMPILED,
        **settings,
    )
    extra: dict[str, Any] = {}
    if mark is not None:
        nobody = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        extra["stopping_criteria"] = StoppingCriteriaList([_Marker(mark, nobody)])
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        **extra,
    )
    if output.shape[1] != ids.shape[1] + new_tokens:
        made = output.shape[1] - ids.shape[1]
        raise HarnessError(f"generate made {made} tokens instead of {new_tokens}")
    return output
