"""The training-data check: do examples end with an EOS that is in the loss?

Takes JSON Lines as trainers do and does to each example what a trainer would, up to the labels. Why
it matters: `DataCollatorForLanguageModeling` gives every token with the padding id the label -100
(https://github.com/huggingface/transformers/issues/23530), so where padding is EOS nothing teaches
to stop. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.files.file_kinds import regular_file
from harness.stopping.causes import Cause, CauseKind
from harness.verdict import Outcome, Verdict

__all__ = ["LABELS", "DatasetFigures", "Fault", "Offender", "check_training_data"]

IGNORED_LABEL = -100
_NAMED = 5
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ENOUGH = 0.95

#: What is in the loss, by the name of the option.
LABELS: Mapping[str, str] = {
    "assistant": "the last answer and what ends its turn",
    "words": "the last answer's words alone",
    "all": "every token",
    "collator": "every token but those with the padding id (DataCollatorForLanguageModeling)",
    "template": "what the chat template marks as generation (TRL's assistant_only_loss)",
}


class Fault(StrEnum):
    """Why an example teaches no end."""

    NO_EOS = "does not end with EOS"
    PADDING = "EOS has the padding id, which the collator masks"
    MASKED = "EOS has the label -100"
    TRUNCATED = "cut off by the maximal length before its EOS"
    NO_ANSWER = "has no assistant turn at its end"
    UNTEMPLATED = "the chat template refuses it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offender:
    """One example: the line in the file, counted from 1, why, and what it ends with."""

    line: int
    fault: Fault
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFigures:
    """How many examples end with an EOS in the loss.

    Attributes:
        faults: examples by fault.
        offenders: the first few.
    """

    path: str
    labels: str
    examples: int
    taught: int
    faults: Mapping[str, int]
    offenders: tuple[Offender, ...]

    @property
    def share(self) -> float:
        return self.taught / self.examples

    @property
    def verdict(self) -> Verdict:
        """Held from 95 % of the examples on."""
        lines = [
            f"{self.taught} of {self.examples} examples ({self.share:.1%}) end with an EOS that is "
            f"in the loss; in the loss: {LABELS.get(self.labels, self.labels)}",
            *(f"{count}: {fault}" for fault, count in self.faults.items()),
            *(f"line {o.line}: {o.fault.value} ({o.detail})" for o in self.offenders),
        ]
        good = self.share >= _ENOUGH
        return Verdict(
            name="training data",
            outcome=Outcome.HELD if good else Outcome.FAILED,
            evidence=tuple(lines),
            remedy=None if good else self._remedy,
        )

    @property
    def _remedy(self) -> str:
        worst = max(self.faults, key=lambda fault: self.faults[fault], default="")
        return {
            Fault.PADDING.value: "give the tokenizer a padding token that is no EOS",
            Fault.TRUNCATED.value: "raise the maximal length, or leave long examples out",
            Fault.MASKED.value: "let the labels cover the token that ends the answer",
            Fault.NO_EOS.value: "end every answer with the EOS, in the template or in the text",
        }.get(worst, "mend the examples that are named")

    @property
    def cause(self) -> Cause | None:
        """The cause that a failing check names."""
        if self.verdict.passed:
            return None
        return Cause(kind=CauseKind.DATASET, text=self.verdict.evidence[0], remedy=self._remedy)


def check_training_data(
    path: Path | str,
    tokenizer: Any,
    *,
    stops: Collection[int],
    labels: str = "assistant",
    max_length: int | None = None,
    append_eos: bool = False,
) -> DatasetFigures:
    """Check every example of a JSON Lines file.

    An example is `{"messages": [{"role", "content"}, …]}`, `{"conversations": [{"from", "value"},
    …]}`, `{"prompt", "completion"}`, `{"text"}`, or already encoded: `{"input_ids", "labels"}`,
    whose own labels count.

    Args:
        tokenizer: a transformers tokenizer with its chat template.
        stops: ids that generation stops at.
        labels: what is in the loss, a key of `LABELS`.
        max_length: tokens that a trainer keeps of an example.
        append_eos: the trainer puts the tokenizer's EOS behind texts and completions.

    Raises:
        InputError: a line that is no example (its number is named), no example at all, an unknown
            *labels*, a template that marks nothing with `labels="template"`.
    """
    if labels not in LABELS:
        raise InputError(
            f"unknown labels {labels!r}", where="--labels", remedy=f"use {', '.join(LABELS)}"
        )
    if not stops:
        raise InputError("generation stops at no id", where="EOS ids",
                         remedy="set eos_token_id in generation_config.json")  # fmt: skip
    reader = _Reader(
        tokenizer=tokenizer, stops=frozenset(stops), labels=labels, max_length=max_length,
        append_eos=append_eos,
    )  # fmt: skip
    faults: Counter[str] = Counter()
    offenders: list[Offender] = []
    examples = 0
    for line, example in _examples(Path(path)):
        examples += 1
        try:
            fault = reader.fault(example)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"is no example: {error}", where=f"{path}: line {line}",
                remedy="see docs/stopping.md for the forms",
            ) from error  # fmt: skip
        if fault is None:
            continue
        faults[fault[0].value] += 1
        if len(offenders) < _NAMED:
            offenders.append(Offender(line=line, fault=fault[0], detail=fault[1]))
    if not examples:
        raise InputError("holds no example", where=str(path), remedy="give a JSON Lines file")
    return DatasetFigures(
        path=str(path),
        labels=labels,
        examples=examples,
        taught=examples - faults.total(),
        faults=dict(faults.most_common()),
        offenders=tuple(offenders),
    )


def _examples(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    regular_file(path, what="the data set", remedy="check the path given to --dataset")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                reason = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}
                raise InputError(
                    f"is not JSON: {reason.get(type(error), str(error))}",
                    where=f"{path}: line {number}",
                    remedy="one JSON object a line, in UTF-8",
                ) from error
            if not isinstance(example, dict):
                raise InputError("is not an object", where=f"{path}: line {number}")
            yield number, example


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    tokenizer: Any
    stops: frozenset[int]
    labels: str
    max_length: int | None
    append_eos: bool

    def fault(self, example: Mapping[str, Any]) -> tuple[Fault, str] | None:
        if "input_ids" in example:
            ids = [int(n) for n in example["input_ids"]]
            given = [int(n) for n in example.get("labels", ids)]
            if len(given) != len(ids):
                raise ValueError(f"{len(ids)} input_ids and {len(given)} labels")
            return self._end_fault(*self._unpadded(ids, given, example.get("attention_mask")))
        messages = _messages(example)
        if messages is not None:
            return self._chat_fault(messages)
        text = example.get("text")
        if text is None:
            text = example["prompt"] + example["completion"]
        if not isinstance(text, str):
            raise TypeError("its text is not a string")
        if self.append_eos:
            text += self.tokenizer.eos_token or ""
        ids = list(self.tokenizer(text)["input_ids"])
        return self._end_fault(ids, ids)

    def _unpadded(
        self, ids: list[int], labels: list[int], mask: Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        """Without the padding that an encoded example ends with, which may be an EOS id, too.

        Padding that is the end of the turn cannot be told from it where no mask is given: what
        is left must still end with EOS.
        """
        if mask is not None:
            kept = [place for place, seen in enumerate(mask) if seen and place < len(ids)]
            return [ids[place] for place in kept], [labels[place] for place in kept]
        length = len(ids)
        while length and (ids[length - 1], labels[length - 1]) == (
            self.tokenizer.pad_token_id, IGNORED_LABEL
        ):  # fmt: skip
            length -= 1
        if self._end(ids[:length]) is None:
            return ids, labels
        return ids[:length], labels[:length]

    def _chat_fault(self, messages: list[dict[str, Any]]) -> tuple[Fault, str] | None:
        if not messages or messages[-1]["role"] != "assistant":
            return Fault.NO_ANSWER, f"ends with {messages[-1]['role'] if messages else 'nothing'}"
        try:
            if self.labels == "template":
                return self._marked_fault(messages)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except InputError:
            raise
        except Exception as error:  # templates raise what they like
            return Fault.UNTEMPLATED, str(error)[:100]
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        labels = list(ids)
        if self.labels == "words":
            place = self._end(ids)
            if place is not None:
                labels[place] = IGNORED_LABEL
        return self._end_fault(ids, labels)

    def _marked_fault(self, messages: list[dict[str, Any]]) -> tuple[Fault, str] | None:
        if not _GENERATION.search(self.tokenizer.chat_template or ""):
            raise InputError(
                "the chat template marks no generation", where="--labels template",
                remedy="put {% generation %} around the answer and its end of turn",
            )  # fmt: skip
        found = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = list(found["input_ids"])
        marks = list(found["assistant_masks"])
        return self._end_fault(
            ids, [n if m else IGNORED_LABEL for n, m in zip(ids, marks, strict=True)]
        )

    def _end(self, ids: Sequence[int]) -> int | None:
        """The place of the EOS that ids end with; whitespace may follow it."""
        for place in range(len(ids) - 1, -1, -1):
            if ids[place] in self.stops:
                return place
            if self.tokenizer.decode([ids[place]]).strip():
                return None
        return None

    def _end_fault(self, ids: Sequence[int], labels: Sequence[int]) -> tuple[Fault, str] | None:
        place = self._end(ids)
        if place is None:
            tail = self.tokenizer.decode(list(ids[-8:])) if ids else ""
            return Fault.NO_EOS, f"ends with {tail!r}"
        if self.max_length is not None and place >= self.max_length:
            return Fault.TRUNCATED, f"its EOS is token {place + 1}"
        if self.labels == "collator" and ids[place] == self.tokenizer.pad_token_id:
            return Fault.PADDING, f"id {ids[place]}"
        if labels[place] == IGNORED_LABEL:
            return Fault.MASKED, f"id {ids[place]}, token {place + 1}"
        return None


def _messages(example: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of a chat example, whatever form they have; None for plain text."""
    if "messages" in example:
        return [{"role": m["role"], "content": m["content"]} for m in example["messages"]]
    if "conversations" in example:
        roles = {"human": "user", "gpt": "assistant"}
        return [
            {"role": roles.get(m["from"], m["from"]), "content": m["value"]}
            for m in example["conversations"]
        ]
    if isinstance(example.get("completion"), list):
        return [*example.get("prompt", ()), *example["completion"]]
    return None
