"""Does the merged checkpoint, and the flattened adapter, say what the live stack says?"""

import pytest

pytestmark = pytest.mark.stacking


@pytest.fixture(scope="module")
def fullest_mode(lora_stack):
    """The mode with the most adapters: what a release would merge."""
    mode = max(lora_stack.modes, key=lambda mode: len(mode.weights))
    if not mode.weights:
        pytest.skip("the stack has no adapter to merge")
    return mode


@pytest.fixture(scope="module")
def chosen_adapters(lora_stack, fullest_mode):
    return {name: lora_stack.adapter(name).path for name in fullest_mode.adapters}


@pytest.fixture(scope="module")
def merged(lora_stack, fullest_mode, chosen_adapters, tmp_path_factory):
    """The merged checkpoint's folder and its report."""
    from harness import merge_lora_adapters

    folder = tmp_path_factory.mktemp("merging") / "merged"
    weights = [weight for _, weight in fullest_mode.weights]
    report = merge_lora_adapters(
        lora_stack.base.path, chosen_adapters, folder, merge_strategy="weighted", weights=weights,
        verify="full",
    )  # fmt: skip
    return folder, report


@pytest.fixture(scope="module")
def flattened(fullest_mode, chosen_adapters, tmp_path_factory):
    """The flattened adapter's folder and its report."""
    from harness import flatten_adapters

    folder = tmp_path_factory.mktemp("merging") / "flattened"
    weights = [weight for _, weight in fullest_mode.weights]
    report = flatten_adapters(chosen_adapters, folder, weights=weights, verify="full")
    return folder, report


@pytest.fixture(scope="module")
def assert_same_tokens(lora_engine, lora_preset, lora_completions, fullest_mode):
    """Compare with the live completions, token for token; float32 alone has no rounding ties."""
    if lora_engine.dtype != "float32":
        pytest.skip(f"{lora_engine.dtype} rounds: near-ties fall either way; use --dtype float32")

    def check(stack, mode):
        from harness import load_engine

        with load_engine(stack, device=lora_engine.device, dtype=lora_engine.dtype) as engine:
            found = engine.generate(lora_preset.prompts, mode, lora_preset.settings)
        for live, other in zip(lora_completions.of(fullest_mode), found, strict=True):
            assert other.token_ids == live.token_ids, live.prompt.id

    return check


def test_every_merged_entry_is_the_rounded_float64_sum(merged):
    _, report = merged
    assert report.exact_share >= 0.999, "\n".join(report.summary())


def test_the_flattened_delta_is_the_stacks(flattened):
    _, report = flattened
    assert report.rounding_loss < 1e-6, "\n".join(report.summary())


def test_the_merged_checkpoint_generates_what_the_live_stack_generates(merged, assert_same_tokens):
    from harness import resolve_stack

    assert_same_tokens(resolve_stack(base_model=merged[0]), "base")


def test_the_flattened_adapter_generates_what_the_live_stack_generates(
    lora_stack, flattened, assert_same_tokens
):
    from harness import resolve_stack

    stack = resolve_stack(base_model=lora_stack.base.path, adapters={"flattened": flattened[0]})
    assert_same_tokens(stack, "flattened")
