"""The tiny stacks: what a seed gives is always the same, and adapters have an effect."""

import pytest

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe")


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_families_listed_here_are_all_there_are():
    from harness.testing.tiny import FAMILIES as known

    assert known == FAMILIES


def test_same_seed_gives_the_same_weights(tmp_path):
    from harness.testing.tiny import tiny_stack

    first, again, other = (
        contents(tiny_stack(tmp_path / name, seed=seed).base.parent)
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    weights = [name for name in first if name.endswith("safetensors")]
    assert len(weights) == 3
    assert all(first[name] == again[name] != other[name] for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_is_built_with_grouped_query_attention(family, tied):
    from harness.testing.tiny import tiny_model

    model = tiny_model(family, tied=tied)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_unknown_family_is_named():
    from harness.testing.tiny import tiny_model

    with pytest.raises(ValueError, match="unknown family 'gpt5'"):
        tiny_model("gpt5")
