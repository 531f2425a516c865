"""The certificate: proofs that a stack is applied as claimed, from its files.

`certify_stack` judges a live model, in whatever state its user left it, against the files of a
stack; `check_training_stack` judges a model that is about to be trained. The files are read
without PEFT and in float64; the live model is the defendant, and is left as it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.certificate.values import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from harness.completion import Prompt
    from harness.stack import AdapterStack, Mode

__all__ = ["Certificate", "certify_stack", "check_training_stack"]


def certify_stack(
    model: Any,
    stack: AdapterStack,
    *,
    mode: Mode | str = "stacked",
    tokenizer: Any = None,
    prompts: Sequence[Prompt | str] | None = None,
    generation: Any = None,
    end_to_end: bool = True,
) -> Certificate:
    """Judge a live model, as it stands, against the files of *stack* in *mode*.

    Args:
        model: PEFT-wrapped, adapters loaded by transformers, or plain after a merge. It is run
            (in eval mode, without gradients) and left as it was found.
        mode: what it is claimed to be in; `stacked` is every adapter at weight 1.
        tokenizer: what will encode the prompts; without it its checks are left out, and random
            token ids probe the layers.
        prompts: real prompts to probe with; texts, or `Prompt`s (a single text is one prompt).
        generation: what will be passed to `generate`: a dict of arguments, a `GenerationConfig`,
            or declared `GenerationSettings`.
        end_to_end: whether to run the whole model with the files' adapters in their place (one
            more short forward pass).

    Raises:
        InputError: files that cannot be read or are not additive; a quantised base; no model,
            stack or prompts where they should be.
    """
    from harness.certificate.judging import judge_model

    return judge_model(
        model,
        stack,
        mode=mode,
        tokenizer=tokenizer,
        prompts=prompts,
        generation=generation,
        end_to_end=end_to_end,
    )


def check_training_stack(
    model: Any,
    *,
    frozen: str | Sequence[str],
    trainable: str | Sequence[str],
    saved: str | Path | None = None,
) -> Certificate:
    """Judge a PEFT model that is about to be trained on top of frozen adapters.

    Args:
        frozen: names of adapters that act and do not learn; `trainable` of those that learn.
        saved: a folder that the training script has already written, to be judged as well.

    Raises:
        InputError: the model has no adapters of these names.
    """
    from harness.certificate.training import judge_training

    return judge_training(model, frozen=frozen, trainable=trainable, saved=saved)
