"""Known families of models and what ends a turn in each: strings and ids, from public documents.

The table explains what a tokenizer's files show; it overrules nothing. A family is known by the
strings that its tokenizer holds, and its ids are held against the tokenizer's own. Knows nothing of
weights or generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.ending import EndingFiles

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        turn_end: the string that ends an assistant's turn.
        text_end: the string that ends a document; what a base model ends with, if it ends.
        turn_start: what a following turn would begin with.
        ids: published ids by string.
        note: what goes wrong with it.
        source: where this is documented.
    """

    name: str
    model_types: tuple[str, ...]
    turn_end: str
    text_end: str
    turn_start: str
    ids: Mapping[str, int]
    note: str
    source: str


_QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="Qwen3 base", model_types=("qwen3", "qwen3_moe"),
        turn_end="<|im_end|>", text_end="<|endoftext|>", turn_start="<|im_start|>", ids=_QWEN,
        note="its generation_config.json stops at <|endoftext|> alone, its tokenizer's EOS is "
        "<|im_end|>: an adapter that was taught to end a chat turn is not stopped by it",
        source="https://github.com/QwenLM/Qwen3/issues/1422",
    ),
    Family(
        name="Qwen3 chat", model_types=("qwen3", "qwen3_moe"),
        turn_end="<|im_end|>", text_end="<|endoftext|>", turn_start="<|im_start|>", ids=_QWEN,
        note="its generation_config.json stops at both; config.json names <|im_end|> alone",
        source="https://qwen.readthedocs.io/en/latest/getting_started/concepts.html",
    ),
    Family(
        name="Qwen2.5", model_types=("qwen2",),
        turn_end="<|im_end|>", text_end="<|endoftext|>", turn_start="<|im_start|>", ids=_QWEN,
        note="the base's config.json stops at <|endoftext|>; padding is <|endoftext|> too",
        source="https://github.com/QwenLM/Qwen3/issues/927",
    ),
    Family(
        name="Llama 3", model_types=("llama",),
        turn_end="<|eot_id|>", text_end="<|end_of_text|>", turn_start="<|start_header_id|>",
        ids={"<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|eom_id|>": 128008,
             "<|eot_id|>": 128009},
        note="the base stops at <|end_of_text|>; chat turns end with <|eot_id|>, tool calls with "
        "<|eom_id|>; there is no padding token, and taking the EOS for it masks its label",
        source="https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/",
    ),
    Family(
        name="Gemma 1 and 2", model_types=("gemma", "gemma2"),
        turn_end="<end_of_turn>", text_end="<eos>", turn_start="<start_of_turn>",
        ids={"<eos>": 1, "<start_of_turn>": 106, "<end_of_turn>": 107},
        note="the tokenizer's EOS is <eos>, turns end with <end_of_turn>",
        source="https://ai.google.dev/gemma/docs/core/prompt-structure",
    ),
    Family(
        name="Gemma 3", model_types=("gemma3", "gemma3_text"),
        turn_end="<end_of_turn>", text_end="<eos>", turn_start="<start_of_turn>",
        ids={"<eos>": 1, "<start_of_turn>": 105, "<end_of_turn>": 106},
        note="conversions have lost <end_of_turn> from the EOS ids",
        source="https://github.com/lmstudio-ai/mlx-engine/pull/142",
    ),
    Family(
        name="Mistral", model_types=("mistral", "mixtral"),
        turn_end="</s>", text_end="</s>", turn_start="[INST]", ids={"</s>": 2},
        note="turns and texts end alike; there is no padding token, and taking </s> for it masks "
        "its label",
        source="https://docs.mistral.ai/cookbook/concept-deep-dive-tokenization-chat_templates",
    ),
)  # fmt: skip


def family_of(ending: EndingFiles, model_type: str | None = None) -> Family | None:
    """The family whose strings the tokenizer holds; `model_type` decides between several.

    Qwen3's base and chat models hold the same strings: one that stops at the end of a text alone
    is the base.
    """
    if ending.tokenizer is None:
        return None
    known = ending.tokenizer.specials
    fitting = [f for f in FAMILIES if f.turn_end in known and f.text_end in known]
    # Many tokenizers hold </s>; only a Mistral is taken for one.
    fitting = [f for f in fitting if f.turn_end != "</s>" or model_type in f.model_types]
    typed = [f for f in fitting if model_type in f.model_types] or fitting
    if not typed:
        return None
    if typed[0].name.startswith("Qwen3"):
        stops = {ending.tokenizer.names.get(n) for n in ending.eos}
        return typed[0] if typed[0].turn_end not in stops else typed[-1]
    return typed[0]
