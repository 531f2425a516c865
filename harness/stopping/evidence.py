"""What the model held EOS for at each step of a completion, by one forward pass (teacher forcing).

The statistics alone are kept: a batch's logits, 600 KB a position at Qwen3's vocabulary, are let go
before the next. Nothing is generated. Knows nothing of verdicts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.completion import Application, Completion
from harness.snapshot_form import Snapshot

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.stack import Mode

__all__ = ["EosTrace", "eos_log_odds", "eos_traces", "in_batches"]

_BATCH_BYTES = 256 << 20
_MOST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EosTrace:
    """EOS along one completion; entry *t* is about the choice of token *t*.

    Attributes:
        probability: of all EOS ids together.
        rank: of the likeliest EOS id; 1 is what greedy decoding takes.
        margin: its logit over the best other token's, in nats.
        likeliest: tokens that are the arg-max of their position; `tokens` of them for a
            completion that greedy decoding would produce again.
    """

    prompt: str
    probability: tuple[float, ...]
    rank: tuple[int, ...]
    margin: tuple[float, ...]
    likeliest: int

    @property
    def tokens(self) -> int:
        return len(self.probability)


def eos_log_odds(logits: Tensor, ids: Collection[int]) -> Tensor:
    """log p(EOS) − log p(anything else), in nats; `(…, vocabulary)` to `(…)`.

    Log-odds do not saturate where a probability is near 0 or 1, and a shift of all logits, which
    changes nothing, leaves them alone.
    """
    chosen = torch.tensor(sorted(ids), dtype=torch.long, device=logits.device)
    others = logits.index_fill(-1, chosen, float("-inf"))
    ends = torch.logsumexp(logits.index_select(-1, chosen), dim=-1)
    return ends - torch.logsumexp(others, dim=-1)


def in_batches(rows: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[int]]:
    """Places of rows of like length together, each batch's float32 logits within 256 MiB."""
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place]), place))
    batch: list[int] = []
    for place in order:
        width = len(rows[place])  # the longest so far: they come in order of length
        too_large = (len(batch) + 1) * width * vocabulary * 4 > _BATCH_BYTES
        if batch and (too_large or len(batch) == _MOST_ROWS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def eos_traces(
    engine: PeftEngine,
    completions: Sequence[Completion | Snapshot],
    mode: Mode | str,
    ids: Collection[int],
    *,
    application: Application = Application.LIVE,
) -> tuple[EosTrace, ...]:
    """The trace of each completion under *mode*, in their order.

    Args:
        ids: the EOS ids; those outside the vocabulary are left out. Empty gives empty traces.
    """
    vocabulary = int(engine.model.config.vocab_size)
    ends = [n for n in ids if 0 <= n < vocabulary]
    rows = [[*c.prompt_token_ids, *c.token_ids] for c in completions]
    found: dict[int, EosTrace] = {}
    for batch in in_batches(rows, vocabulary):
        logits = engine.logits([rows[place] for place in batch], mode, application=application)
        for place, row in zip(batch, logits, strict=True):
            completion = completions[place]
            start = len(completion.prompt_token_ids) - 1
            found[place] = _trace(completion, row[start:-1], ends)
    return tuple(found[place] for place in range(len(completions)))


def _trace(completion: Completion | Snapshot, logits: Tensor, ends: Sequence[int]) -> EosTrace:
    name = completion.prompt if isinstance(completion, Snapshot) else completion.prompt.id
    chosen = torch.tensor(completion.token_ids, dtype=torch.long)
    likeliest = int((logits.argmax(-1) == chosen).sum()) if len(chosen) else 0
    if not ends or not len(chosen):
        zeros = (0.0,) * len(chosen)
        return EosTrace(prompt=name, probability=zeros, rank=(logits.shape[-1],) * len(chosen),
                        margin=zeros, likeliest=likeliest)  # fmt: skip
    index = torch.tensor(sorted(ends), dtype=torch.long)
    best = logits.index_select(-1, index).amax(-1)
    others = logits.index_fill(-1, index, float("-inf"))
    return EosTrace(
        prompt=name,
        probability=tuple(torch.sigmoid(eos_log_odds(logits, ends)).tolist()),
        rank=tuple((1 + (others > best[:, None]).sum(-1)).tolist()),
        margin=tuple((best - others.amax(-1)).tolist()),
        likeliest=likeliest,
    )
