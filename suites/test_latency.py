"""How long does each mode take? On a CPU a smoke at a tiny length; `-m gpu` measures.

pytest-benchmark keeps the results: `--benchmark-json=FILE`, then `lora-stack bench --results FILE
--against …` judges them.
"""

import pytest

pytestmark = pytest.mark.latency


@pytest.fixture
def assert_measured(benchmark, lora_measured, lora_cell):
    def check():
        result = lora_measured(benchmark)
        assert result.key == lora_cell.key
        assert result.itl_s["p50"] <= result.itl_s["p90"] <= result.itl_s["p99"]
        for ttft, tpot, whole in zip(*result.rounds.values(), strict=True):
            # The clock of the device and the host's agree on what a generation is made of.
            assert 0 < ttft < whole
            assert ttft + tpot * (lora_cell.output_tokens - 1) <= whole * 1.01 + 1e-4

    return check


def test_generation_is_timed(assert_measured, lora_latency):
    if lora_latency.measurer.device.startswith("cuda"):
        pytest.skip("measured by test_generation_is_timed_on_the_gpu (-m gpu)")
    assert_measured()


@pytest.mark.gpu
def test_generation_is_timed_on_the_gpu(assert_measured, lora_latency):
    assert lora_latency.measurer.device.startswith("cuda"), "loaded elsewhere: see --device"
    assert_measured()
