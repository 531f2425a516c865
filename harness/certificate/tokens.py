"""What the tokenizer makes of the prompts: padding, masks, the chat template, token ids, order.

The tokenizer at hand is held against the one in the base's files, and the rows that will be
generated from against the prompts. Knows nothing of weights or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness.certificate.values import failed, held, listed
from harness.completion import Prompt
from harness.engines.described import fresh_tokenizer
from harness.errors import InputError
from harness.verdict import Outcome, Verdict

__all__ = [
    "PADDING",
    "TEMPLATE",
    "TOKENS",
    "check_padding",
    "check_template",
    "check_tokens",
    "effective",
    "fresh_of",
    "prompt_ids",
]

PADDING = "padding and mask"
TEMPLATE = "chat template"
TOKENS = "token ids"


def effective(key: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """What a call of `generate` goes by: what it is *given*, else the model's *own* config."""
    value = given.get(key)
    return own.get(key) if value is None else value


def fresh_of(folder: Path) -> Any:
    try:
        return fresh_tokenizer(folder)
    except InputError:
        return None


def check_padding(
    tokenizer: Any,
    prompts: Sequence[Prompt | str],
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    vocabulary: int,
) -> Verdict:
    faults: list[str] = []
    pad = effective("pad_token_id", given, own)
    if pad is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
    if pad is not None and vocabulary and not 0 <= int(pad) < vocabulary:
        faults.append(f"the padding id {pad} is outside the vocabulary of {vocabulary}")
    if tokenizer is not None:
        side = getattr(tokenizer, "padding_side", "left")
        if side != "left":
            faults.append(f"the tokenizer pads on the {side}: generation goes on from the padding")
        if tokenizer.pad_token_id is None:
            faults.append("the tokenizer has no padding token: prompts cannot be batched")
        elif "attention_mask" not in tokenizer.model_input_names:
            faults.append("the tokenizer returns no attention mask: padding would be read as text")
        if getattr(tokenizer, "truncation_side", "left") != "left" and _truncates(tokenizer):
            faults.append("the tokenizer truncates long prompts on the right: the question is lost")
    mask, ids = _rows(given.get("attention_mask")), _rows(given.get("input_ids"))
    faults += list(_position_faults(_rows(given.get("position_ids")), ids, mask))
    if mask is not None and ids is not None:
        faults += list(_mask_faults(ids, mask, pad))
    elif ids is not None and len(ids) > 1 and any(row and pad in (row[0], row[-1]) for row in ids):
        faults.append("padded input_ids come without attention_mask: padding is read as text")
    if faults:
        return failed(
            PADDING,
            *faults,
            remedy="tokenizer.padding_side = 'left', a padding token, and pass attention_mask",
        )
    if tokenizer is None and ids is None:
        return Verdict(
            name=PADDING,
            outcome=Outcome.SKIPPED,
            evidence=("no tokenizer was given, and no input_ids",),
        )
    known = "" if tokenizer is None else f"; padding id {tokenizer.pad_token_id}, on the left"
    return held(PADDING, f"{len(prompts)} prompts{known}")


def _truncates(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(backend, "truncation", None) is not None


def _rows(value: Any) -> list[list[int]] | None:
    if value is None:
        return None
    rows: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return [list(row) for row in rows] if rows and isinstance(rows[0], list) else [rows]


def _mask_faults(ids: list[list[int]], mask: list[list[int]], pad: int | None) -> Iterator[str]:
    for place, (row, seen) in enumerate(zip(ids, mask, strict=False)):
        if len(row) != len(seen):
            yield f"row {place}: {len(row)} ids and a mask of {len(seen)}"
        elif not any(seen):
            yield f"row {place}: the mask hides every token"
        elif seen != sorted(seen):
            yield f"row {place}: the mask hides tokens behind the first visible one"
        elif pad is not None and row[0] == pad and all(seen) and len(set(row)) > 1:
            yield f"row {place}: begins with padding that the mask shows as text"
        elif pad is not None and any(t != pad for t, s in zip(row, seen, strict=True) if not s):
            hidden = sum(1 for s in seen if not s)
            yield f"row {place}: the mask hides {hidden} tokens of the prompt"


def _position_faults(
    positions: list[list[int]] | None, ids: list[list[int]] | None, mask: list[list[int]] | None
) -> Iterator[str]:
    """Positions that do not count from each row's first visible token."""
    for place, row in enumerate(positions or ()):
        length = len(ids[place]) if ids is not None and place < len(ids) else len(row)
        seen = mask[place] if mask is not None and place < len(mask) else [1] * length
        wanted = [count - 1 for count in accumulate(seen)]
        visible = [(now, then) for now, then, s in zip(row, wanted, seen, strict=False) if s]
        if len(row) != len(seen) or any(now != then for now, then in visible):
            yield f"row {place}: position_ids do not count from its first visible token"


def check_template(tokenizer: Any, fresh: Any, adapters: Sequence[Path]) -> Verdict:
    now = getattr(tokenizer, "chat_template", None)
    base = getattr(fresh, "chat_template", None)
    beside = {
        folder.name: (folder / "chat_template.jinja").read_text(encoding="utf-8")
        for folder in adapters
        if (folder / "chat_template.jinja").is_file()
    }
    notes = [
        f"the adapter folder {name} holds another template than the base's"
        for name, text in beside.items()
        if base is not None and text.strip() != str(base).strip()
    ]
    if base is None and not beside:
        if now is None:
            return held(TEMPLATE, "there is none, in the files or in the tokenizer")
        return Verdict(
            name=TEMPLATE,
            outcome=Outcome.UNDECIDED,
            evidence=("the tokenizer has a chat template that none of the stack's folders holds",),
            remedy="save chat_template.jinja beside the adapter that was trained with it",
        )
    wanted = [base] if base is not None else []
    wanted += list(beside.values())
    if now is None:
        return failed(TEMPLATE, "the tokenizer has none, the stack's files do",
                      remedy="load the tokenizer from the stack's base folder")  # fmt: skip
    if not any(str(now).strip() == str(text).strip() for text in wanted):
        return failed(
            TEMPLATE,
            "the tokenizer's chat template is not the one in the stack's files",
            remedy="load the tokenizer from the stack's base folder, and do not replace "
            "chat_template",
        )
    return held(TEMPLATE, "the tokenizer's is the one in the stack's files", *notes)


def prompt_ids(tokenizer: Any, prompt: Prompt | str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt.text is not None or tokenizer.chat_template is None:
        return list(
            tokenizer(prompt.text if prompt.text is not None else prompt.shown)["input_ids"]
        )
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def check_tokens(
    tokenizer: Any,
    fresh: Any,
    prompts: Sequence[Prompt | str],
    given: Mapping[str, Any],
    vocabulary: int,
) -> Verdict:
    if fresh is None:
        return Verdict(
            name=TOKENS,
            outcome=Outcome.UNDECIDED,
            evidence=("the base's folder holds no tokenizer to compare with",),
            remedy="copy the tokenizer's files beside the base's weights",
        )
    faults: list[str] = []
    if fresh.chat_template is None:
        fresh.chat_template = tokenizer.chat_template
    for number, prompt in enumerate(prompts):
        name = f"prompt {prompt.id if isinstance(prompt, Prompt) else number}"
        now, then = prompt_ids(tokenizer, prompt), prompt_ids(fresh, prompt)
        if now != then:
            place = next(
                (i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b),
                min(len(now), len(then)),
            )
            faults.append(
                f"{name}: {len(now)} ids, the base's tokenizer gives {len(then)}; "
                f"they part at position {place}"
            )
        outside = [n for n in now if vocabulary and n >= vocabulary]
        if outside:
            faults.append(f"{name}: id {outside[0]} is outside the vocabulary of {vocabulary}")
    faults += list(_given_ids(tokenizer, fresh, prompts, given))
    if faults:
        return failed(
            TOKENS,
            *listed(faults, "prompts"),
            remedy="load the tokenizer from the stack's base folder; pass prompts in their order, "
            "through the chat template once",
        )
    return held(TOKENS, f"{len(prompts)} prompts have the ids that the base's own tokenizer gives")


def _given_ids(
    tokenizer: Any, fresh: Any, prompts: Sequence[Prompt | str], given: Mapping[str, Any]
) -> Iterator[str]:
    """The rows that will be generated from, against the prompts in their order."""
    ids, mask = _rows(given.get("input_ids")), _rows(given.get("attention_mask"))
    if ids is None or not prompts:
        return
    wanted = [prompt_ids(fresh, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id
    seen: list[list[int]] = []
    for number, row in enumerate(ids):
        if mask is not None and number < len(mask) and len(mask[number]) == len(row):
            seen.append([t for t, keep in zip(row, mask[number], strict=True) if keep])
        else:
            start = next((i for i, t in enumerate(row) if t != pad), 0)
            seen.append(row[start:])
    if seen == wanted:
        return
    if len(seen) != len(wanted):
        yield f"input_ids has {len(seen)} rows for {len(wanted)} prompts"
    elif sorted(seen) == sorted(wanted):
        yield "input_ids holds the prompts in another order: results would go to the wrong prompts"
    else:
        place = next(i for i, (a, b) in enumerate(zip(seen, wanted, strict=True)) if a != b)
        yield f"row {place} of input_ids is not its prompt: {len(seen[place])} ids, not " + str(
            len(wanted[place])
        )
