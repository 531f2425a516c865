"""The mechanics of stage 2: train one adapter on top of frozen ones, and save that one alone.

For tests and for users' own training scripts. Four things go wrong silently when PEFT is used in
the obvious way, and each has its function here: the frozen adapter drops out of the forward pass,
it becomes trainable or noisy, the end-of-turn label is masked away, and the file is not where the
next tool looks for it.

Knows nothing of corpora, presets, certificates or of what a good loss is.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "IGNORED_LABEL",
    "encode_conversation",
    "masked_batch",
    "prepare_stage_two",
    "save_adapter",
    "train_steps",
]

IGNORED_LABEL = -100
"""The label that the loss leaves out (`ignore_index` of torch's cross entropy)."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def prepare_stage_two(
    peft_model: Any, *, frozen: Sequence[str] = ("style",), trainable: str = "instruct"
) -> None:
    """Put every adapter into the forward pass and let `trainable` alone learn.

    Call it last before training: `disable_adapter()`, `set_adapter()` and enabling the adapter
    layers all make the frozen adapters trainable again. The model is left in training mode, with
    the frozen adapters' dropout off: they must act as they will act at inference.

    Raises:
        ValueError: an adapter is unknown, named twice, or has nothing to train.
    """
    names = [*frozen, trainable]
    if len(set(names)) != len(names):
        raise ValueError(f"an adapter is named twice: {names}")
    unknown = [name for name in names if name not in peft_model.peft_config]
    if unknown:
        known = sorted(peft_model.peft_config)
        raise ValueError(f"adapters {unknown} are not loaded; the model has {known}")
    peft_model.train()
    # Layers that were switched off stay off through set_adapter.
    peft_model.base_model.enable_adapter_layers()
    # PeftModel.set_adapter takes one name and would switch the others off.
    peft_model.base_model.set_adapter(names)
    for parameter in peft_model.parameters():
        parameter.requires_grad_(False)
    peft_model.set_requires_grad(trainable, True)
    for module in peft_model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, torch.nn.ModuleDict):
            for name in frozen:
                if name in dropouts:
                    dropouts[name].eval()
    moving = [name for name, value in peft_model.named_parameters() if value.requires_grad]
    if not moving:
        raise ValueError(f"adapter {trainable!r} has no parameter to train")
    strangers = [name for name in moving if trainable not in name.split(".")]
    if strangers:
        raise ValueError(f"{len(strangers)} parameters outside {trainable!r} would be trained")


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, end_of_turn: str = "<|im_end|>"
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels: the assistant's words and their end of turn.

    The spans come from rendering the conversation turn by turn, so the template needs no
    `{% generation %}` marks. Labels never depend on the padding token: with `pad == eos`,
    masking by padding would hide the end of turn, and the model would never learn to stop.

    Raises:
        ValueError: the template does not render a turn as a continuation of what came before
            it, or does not end the assistant's turn with `end_of_turn`.
    """
    rows = [dict(message) for message in messages]
    text: str = tokenizer.apply_chat_template(rows, tokenize=False)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(rows):
        if message["role"] != "assistant":
            continue
        before: str = tokenizer.apply_chat_template(
            rows[:number], tokenize=False, add_generation_prompt=True
        )
        if not text.startswith(before):
            raise ValueError(f"the chat template changes what precedes message {number}")
        # Counted from behind the content: it may hold the end of turn's letters itself.
        content_end = len(before) + len(message["content"])
        if not text.startswith(end_of_turn, content_end):
            raise ValueError(f"the chat template does not end message {number} by {end_of_turn}")
        spans.append((len(before), content_end + len(end_of_turn)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    labels = [
        token if any(start <= left and right <= end for start, end in spans) else IGNORED_LABEL
        for token, (left, right) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def masked_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_token_id: int
) -> dict[str, Tensor]:
    """Encoded conversations, right-padded into one batch; padding has no label."""
    width = max(len(ids) for ids, _ in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for number, (ids, row_labels) in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        labels[number, : len(ids)] = torch.tensor(row_labels)
        attention_mask[number, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train_steps(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    max_gradient_norm: float = 1.0,
    schedule: Callable[[int], float] | None = None,
) -> list[float]:
    """One AdamW step a batch on whatever is trainable now; the loss of each step.

    Args:
        schedule: the factor on `learning_rate` at each step, counted from 0; constant if None.

    Raises:
        ValueError: nothing is trainable.
        FloatingPointError: a loss is not finite; the model is left as it was before that step.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter")
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas
    )
    losses: list[float] = []
    for step, batch in enumerate(batches):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step)
        loss = model(**batch, use_cache=False).loss
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss of step {step} is {value}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
        optimizer.step()
        losses.append(value)
    optimizer.zero_grad(set_to_none=True)
    return losses


def save_adapter(model: Any, name: str, folder: str | Path) -> Path:
    """Save one adapter so that `folder` itself holds adapter_config.json; returns `folder`.

    PEFT writes a named adapter into a folder below the one it is given, with a README. Here the
    two files alone are moved to where loaders look for them. Files are written beside `folder`
    first; other files in it stay as they are.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    if name not in model.peft_config:
        raise ValueError(f"no adapter {name!r}; the model has {sorted(model.peft_config)}")
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        model.save_pretrained(scratch, selected_adapters=[name])
        # The adapter named "default" is the one that PEFT does not put into a folder below.
        written = Path(scratch) if name == "default" else Path(scratch, name)
        target.mkdir(exist_ok=True)
        for file in _ADAPTER_FILES:
            shutil.move(written / file, target / file)
    return target
