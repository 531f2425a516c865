"""A sound subject to plant faults in: a tiny stack on disk and its live model, copied for each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = ("one two three", "the letter q", "Bäume und Meer")


@dataclass
class Subject:
    """What a fault is planted in, and what is then certified."""

    stack: Any
    model: Any
    tokenizer: Any
    mode: Any = "stacked"
    prompts: tuple[str, ...] = PROMPTS
    generation: Any = field(default_factory=lambda: {"max_new_tokens": 16, "do_sample": False})

    def layer(self, name: str) -> Any:
        """The (LoRA) layer *name* of the base."""
        return self.bare.get_submodule(name)

    @property
    def bare(self) -> Any:
        from harness.engines.inspection import bare_model

        return bare_model(self.model)

    def certify(self, **arguments: Any) -> Any:
        from harness.certificate import certify_stack

        return certify_stack(
            self.model,
            self.stack,
            mode=self.mode,
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            generation=self.generation,
            **arguments,
        )

    def encoded(self) -> dict[str, Any]:
        """The prompts as a batch for `generate`."""
        batch = self.tokenizer(list(self.prompts), padding=True, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def copied(self) -> Subject:
        return Subject(
            stack=self.stack,
            model=copy.deepcopy(self.model),
            tokenizer=copy.deepcopy(self.tokenizer),
            mode=self.mode,
        )


def write_stack(folder: Path, **arguments: Any) -> Any:
    """Write a tiny stack whose two adapters share rank and some modules; returns it resolved."""
    from harness import resolve_stack
    from harness.testing.tiny import AdapterSpec, tiny_stack

    adapters = arguments.pop("adapters", None) or {
        "style": AdapterSpec(rank=4, alpha=8),
        "instruct": AdapterSpec(
            rank=4, alpha=12, targets=("q_proj", "v_proj", "o_proj", "down_proj")
        ),
    }
    tiny = tiny_stack(folder, adapters=adapters, **arguments)
    return resolve_stack(base_model=tiny.base, adapters=tiny.adapters)


def load_live(stack: Any, dtype: str = "float32") -> Subject:
    """Load *stack* with PEFT as its manual says, every adapter active."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(stack.base.path, dtype=getattr(torch, dtype))
    first, *rest = stack.adapters
    model = PeftModel.from_pretrained(base, str(first.path), adapter_name=first.name)
    for adapter in rest:
        model.load_adapter(str(adapter.path), adapter.name)
    model.base_model.set_adapter([adapter.name for adapter in stack.adapters])
    tokenizer = AutoTokenizer.from_pretrained(stack.base.path, padding_side="left")
    return Subject(stack=stack, model=model.eval(), tokenizer=tokenizer)
