"""How long does each mode take? On a CPU a smoke at a tiny length; `-m gpu` measures."""

import pytest

pytestmark = pytest.mark.latency


@pytest.fixture
def measure(benchmark, lora_engine, lora_preset, lora_mode):
    from dataclasses import replace

    def run(*, new_tokens, rounds):
        settings = replace(lora_preset.settings, max_new_tokens=new_tokens)

        def generate():
            return lora_engine.generate(lora_preset.prompts, lora_mode, settings)

        completions = benchmark.pedantic(generate, rounds=rounds, warmup_rounds=1)
        benchmark.group = "generate"
        benchmark.extra_info.update(
            mode=lora_mode.name,
            device=lora_engine.device,
            dtype=lora_engine.dtype,
            prompts=len(completions),
            new_tokens=sum(len(completion.token_ids) for completion in completions),
        )
        return completions

    return run


def test_generation_smoke(measure, lora_preset):
    assert len(measure(new_tokens=4, rounds=2)) == len(lora_preset.prompts)


@pytest.mark.gpu
def test_generation_on_the_gpu(measure, lora_preset, lora_engine):
    assert lora_engine.device.startswith("cuda"), "the stack was loaded elsewhere: see --device"
    assert len(measure(new_tokens=64, rounds=10)) == len(lora_preset.prompts)
