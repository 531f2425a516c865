"""Changes that leave what the stack computes as it is: none may raise an alarm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.tests.certificate.faults import OUT, Q, _each, _weights

HARMLESS: dict[str, Callable[[Any], None]] = {}


def harmless(change: Callable[[Any], None]) -> Callable[[Any], None]:
    HARMLESS[change.__name__.replace("_", "-")] = change
    return change


@harmless
def ranks_permuted(s):
    import torch

    order = torch.tensor([2, 0, 3, 1])
    for name, adapter in ((Q, "style"), (OUT, "instruct")):
        a, b = _weights(s, name, adapter)
        a.copy_(a[order])
        b.copy_(b[:, order])


@harmless
def power_of_two_moved_from_a_to_b(s):
    for name in (Q, OUT):
        a, b = _weights(s, name, "style")
        a.mul_(4)
        b.div_(4)


@harmless
def power_of_two_moved_into_the_scale(s):
    for layer in _each(s, "style"):
        layer.lora_B["style"].weight.data.mul_(8)
        layer.scaling["style"] /= 8


@harmless
def order_of_adapters_swapped(s):
    s.model.base_model.set_adapter(["instruct", "style"])


@harmless
def merged_truly(s):
    s.model = s.model.merge_and_unload()


@harmless
def merged_in_place(s):
    s.model.merge_adapter()


@harmless
def merged_in_the_other_order(s):
    s.model = s.model.merge_and_unload(adapter_names=["instruct", "style"])


@harmless
def style_merged_and_instruct_live(s):
    from peft import PeftModel

    base = s.model.merge_and_unload(adapter_names=["style"])
    vars(base).pop("peft_config", None)
    path = str(s.stack.adapter("instruct").path)
    s.model = PeftModel.from_pretrained(base, path, adapter_name="instruct").eval()


@harmless
def merged_by_hand_under_disabled_adapters(s):
    from harness.engines.inspection import read_live

    for layer in read_live(s.model).lora_layers.values():
        delta = sum(layer.outer.get_delta_weight(name) for name in layer.adapters)
        layer.inner.weight.data += delta
    s.model.base_model.disable_adapter_layers()


@harmless
def flattened_by_cat(s):
    s.model.add_weighted_adapter(["style", "instruct"], [1.0, 1.0], "both", combination_type="cat")
    s.model.set_adapter("both")


@harmless
def adapters_under_other_names(s):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(s.stack.base.path)
    first, second = s.stack.adapters
    s.model = PeftModel.from_pretrained(base, str(first.path)).eval()
    s.model.load_adapter(str(second.path), "second")
    s.model.base_model.set_adapter(["default", "second"])


@harmless
def loaded_by_transformers_itself(s):
    from transformers import AutoModelForCausalLM

    s.model = AutoModelForCausalLM.from_pretrained(s.stack.base.path)
    for adapter in s.stack.adapters:
        s.model.load_adapter(str(adapter.path), adapter.name)
    s.model.set_adapter([adapter.name for adapter in s.stack.adapters])
    s.model.eval()


@harmless
def loaded_in_bfloat16(s):
    from harness.tests.certificate.subject import load_live

    s.model = load_live(s.stack, "bfloat16").model


@harmless
def merged_in_bfloat16(s):
    from harness.tests.certificate.subject import load_live

    s.model = load_live(s.stack, "bfloat16").model.merge_and_unload()


@harmless
def two_threads(s):
    import torch  # has one global value, which the test gives back

    torch.set_num_threads(2)


@harmless
def one_prompt_instead_of_three(s):
    s.prompts = s.prompts[:1]


@harmless
def many_prompts_of_different_lengths(s):
    s.prompts = tuple("word " * n for n in range(1, 8))


@harmless
def gradients_switched(s):
    s.model.requires_grad_(True)


@harmless
def training_mode_without_dropout(s):
    s.model.train()


@harmless
def hook_that_only_looks(s):
    s.layer("model.layers.0").register_forward_hook(lambda m, a, out: None)


@harmless
def compiled_by_torch(s):
    import torch

    s.model = torch.compile(s.model, backend="eager")


@harmless
def eager_attention(s):
    s.bare.set_attn_implementation("eager")


@harmless
def tokenizer_saved_and_loaded_again(s):
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        s.tokenizer.save_pretrained(folder)
        s.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")


@harmless
def batch_given_with_its_mask(s):
    s.generation |= s.encoded()


@harmless
def positions_given_as_generate_counts_them(s):
    s.generation |= s.encoded()
    positions = s.generation["attention_mask"].cumsum(dim=1) - 1
    s.generation["position_ids"] = positions.clamp(min=0)


@harmless
def one_adapter_s_rows_in_its_own_mode(s):
    s.mode = "style"
    s.model.set_adapter("style")
    s.generation |= {"adapter_names": ["style"] * 3}


@harmless
def hook_of_accelerate_s_own(s):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(s.layer("model.layers.0"), AlignDevicesHook(io_same_device=True))


@harmless
def declared_sampling_with_a_seed(s):
    from harness.completion import GenerationSettings

    s.generation = GenerationSettings(do_sample=True, temperature=0.7, seed=3)
