"""Does every mode stop, or not, as the stack's TOML declares?"""

import pytest

from harness.verdict import judge_stopping

pytestmark = pytest.mark.stopping


def test_mode_stops_as_declared(lora_stack, lora_declared_mode, lora_completions, lora_judge):
    mode = lora_declared_mode
    lora_judge(judge_stopping(mode.name, lora_stack.stops[mode.name], lora_completions.of(mode)))


def test_nothing_follows_an_eos(lora_mode, lora_completions, lora_engine):
    for completion in lora_completions.of(lora_mode):
        assert not set(completion.token_ids[:-1]) & set(lora_engine.eos_token_ids)
