"""The arithmetic of the ceilings is right: against published counts and against live models."""

import pytest

from harness.bench.roofline import arithmetic_of, balance_tokens
from harness.errors import InputError
from harness.shape import NAMED_SHAPES, read_shape

# Parameters as the model cards' checkpoints hold them.
COUNTS = {
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_a_named_shape_has_the_published_number_of_parameters(name):
    assert arithmetic_of(NAMED_SHAPES[name], itemsize=2).parameters == COUNTS[name]


def test_a_decode_step_of_qwen3_8b_reads_15_gigabytes_and_147456_bytes_a_position():
    numbers = arithmetic_of(NAMED_SHAPES["qwen3-8b"], itemsize=2)
    assert numbers.step_weight_bytes == 15_136_811_008
    assert numbers.kv_bytes_per_token == 147_456
    step = numbers.decode_step(rows=4, context=1000)
    assert step.bytes_read == 15_136_811_008 + 4 * 1000 * 147_456


def test_the_roofline_is_the_slower_of_memory_and_arithmetic():
    numbers = arithmetic_of(NAMED_SHAPES["qwen3-8b"], itemsize=2)
    h200 = {"bandwidth": 4.3e12, "rate": 790e12}
    assert numbers.decode_step(rows=1, context=0).floor_s(**h200) == pytest.approx(
        3.52e-3, rel=1e-3
    )
    assert numbers.prefill(rows=1, length=512).floor_s(**h200) == pytest.approx(9.1e-3, rel=1e-2)
    assert balance_tokens(itemsize=2, **h200) == pytest.approx(183.7, abs=0.1)


def test_live_adapters_are_read_and_computed_and_merged_ones_are_not():
    numbers = arithmetic_of(NAMED_SHAPES["qwen3-8b"], itemsize=2)
    plain = numbers.decode_step(rows=2, context=10)
    live = numbers.decode_step(rows=2, context=10, adapter_bytes=436e6, adapter_parameters=218e6)
    assert live.bytes_read - plain.bytes_read == 436e6
    assert live.flops - plain.flops == 2 * 2 * 218e6


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_the_live_model(kind, tied):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, vocab_size=100, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    live = sum(parameter.numel() for parameter in model.parameters())
    assert arithmetic_of(config.to_dict(), itemsize=2).parameters == live


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "qwen3_moe"}, {"model_type": "qwen3", "hidden_size": 4}]
)
def test_an_architecture_that_is_not_known_has_no_ceiling(config):
    assert arithmetic_of(config, itemsize=2) is None


def test_a_mistyped_shape_names_the_nearest_and_a_config_file_is_a_shape(tmp_path):
    with pytest.raises(InputError, match="did you mean random:qwen3-8b"):
        read_shape("random:qwen3-8", where="--base-model", folder=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for source in ("random:config.json", f"random:{tmp_path}"):
        shape, path = read_shape(source, where="--base-model", folder=tmp_path)
        assert shape.config == {"model_type": "llama"}
        assert path == tmp_path / "config.json"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model_type"):
        read_shape("random:config.json", where="--base-model", folder=tmp_path)
