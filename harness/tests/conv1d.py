"""A base whose layers are `Conv1D`, with weights as `(in, out)`: a tiny GPT-2, for tests."""

from __future__ import annotations

import json
from pathlib import Path


def gpt2_base(folder: Path) -> Path:
    """A tiny GPT-2 with the tiny tokenizer; its layers are Conv1D, weights as (in, out)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from harness.testing import tiny

    tiny.tiny_base(folder)
    (folder / "model.safetensors").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            eos_token_id=258, bos_token_id=None, initializer_range=0.1,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    return folder
