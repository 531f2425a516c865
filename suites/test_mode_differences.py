"""Does every adapter change what the model says?"""

from harness.verdict import judge_effect


def test_more_adapters_say_something_else(lora_mode_pair, lora_completions, lora_judge):
    fewer, more = lora_mode_pair
    first, second = lora_completions.of(fewer), lora_completions.of(more)
    lora_judge(judge_effect(f"{fewer.name} ≠ {more.name}", first, second))


def test_every_completion_says_something(lora_mode, lora_completions):
    empty = [c.prompt.id for c in lora_completions.of(lora_mode) if not c.token_ids]
    assert not empty, f"{lora_mode.name} says nothing to: {', '.join(empty)}"
