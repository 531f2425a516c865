"""What a user does without the harness: one process a mode, prompts one after the other.

The other side of `harness.bench.one_load`, run by it as a process of its own; so it uses PEFT
directly and none of the harness.

    python -m harness.bench.one_by_one BASE 'STYLE INSTRUCT' PROMPTS NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(base: str, adapters: list[str], prompts_file: str, new_tokens: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    if adapters:
        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="adapter0")
        for number, folder in enumerate(adapters[1:], start=1):
            model.load_adapter(folder, f"adapter{number}")
        model.base_model.set_adapter([f"adapter{n}" for n in range(len(adapters))])
        model.eval()
    for prompt in json.loads(Path(prompts_file).read_text(encoding="utf-8")):
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(), sys.argv[3], int(sys.argv[4]))
