"""The defect corpus: faults to plant in a sound subject, and the cause each must be given.

`FAULTS` maps a name to `(plant, check, words)`: after `plant(subject)` the certificate's *check*
must fail, and *words* must stand in its evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Q = "model.layers.0.self_attn.q_proj"  # square; both adapters
OUT = "model.layers.1.self_attn.o_proj"
UP = "model.layers.1.mlp.up_proj"  # style alone
ADAPTERS, OUTPUTS, WEIGHTS = "adapters in memory", "module outputs", "base weights"
ACTIVE, MERGED, EVALUATION = "active adapters", "merged flags", "evaluation mode"
ARCHITECTURE, BUFFERS, HOOKS = "architecture", "buffers", "hooks and patches"
LOGITS, EFFECT = "live, flattened and merged logits", "each adapter's effect"
EOS, PADDING, DECODING, LENGTH = "EOS ids", "padding and mask", "decoding", "length"
CACHE, TEMPLATE, TOKENS = "key-value cache", "chat template", "token ids"

Plant = Callable[[Any], None]
FAULTS: dict[str, tuple[Plant, str, str]] = {}


def fault(check: str, words: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        name = plant.__name__.replace("_", "-").strip("-")
        assert name not in FAULTS
        FAULTS[name] = (plant, check, words)
        return plant

    return register


def _weights(s, name, adapter):
    layer = s.layer(name)
    return layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data


def _each(s, adapter):
    from harness.engines.inspection import read_live

    return [
        layer.outer
        for layer in read_live(s.model).lora_layers.values()
        if adapter in layer.adapters
    ]


# --- factors in memory ------------------------------------------------------------------------


@fault(ADAPTERS, "the sign of adapter style is flipped")
def sign_of_b_flipped(s):
    _weights(s, UP, "style")[1].neg_()


@fault(ADAPTERS, "the sign of 1 entries of A is flipped")
def sign_of_one_element(s):
    a, _ = _weights(s, Q, "style")
    a[2, 5] = -a[2, 5]


@fault(ADAPTERS, "adapter instruct was rounded through bfloat16")
def rounded_through_bfloat16(s):
    for factor in _weights(s, OUT, "instruct"):
        factor.copy_(factor.bfloat16())


@fault(ADAPTERS, "adapter instruct was rounded through float16")
def rounded_through_float16(s):
    for factor in _weights(s, OUT, "instruct"):
        factor.copy_(factor.half())


@fault(ADAPTERS, "adapter style was rounded through float8")
def rounded_through_float8(s):
    import torch

    for factor in _weights(s, UP, "style"):
        factor.copy_(factor.to(torch.float8_e4m3fn).float())


@fault(ADAPTERS, "adapter style is missing here: instruct only")
def one_b_is_zero(s):
    _weights(s, Q, "style")[1].zero_()


@fault(ADAPTERS, "adapter style's delta is transposed")
def transposed_factors(s):
    a, b = (factor.clone() for factor in _weights(s, Q, "style"))
    live_a, live_b = _weights(s, Q, "style")
    live_a.copy_(b.T)
    live_b.copy_(a.T)


@fault(ADAPTERS, "is the one of model.layers.0.mlp.up_proj")
def factors_of_another_layer(s):
    for here, there in zip(
        _weights(s, UP, "style"), _weights(s, "model.layers.0.mlp.up_proj", "style"), strict=True
    ):
        here.copy_(there)


@fault(ADAPTERS, "adapter style is missing here: instruct only")
def instruct_in_the_slot_of_style(s):
    layer = s.layer(Q)
    for here, there in zip(_weights(s, Q, "style"), _weights(s, Q, "instruct"), strict=True):
        here.copy_(there)
    layer.scaling["style"] = 0.0


@fault(ADAPTERS, "A of instruct with B of style")
def a_of_the_other_adapter(s):
    _weights(s, Q, "style")[0].copy_(_weights(s, Q, "instruct")[0])


@fault(ADAPTERS, "A of style with B of instruct")
def b_of_the_other_adapter(s):
    _weights(s, Q, "style")[1].copy_(_weights(s, Q, "instruct")[1])


@fault(ADAPTERS, "another version")
def another_training_step(s):
    import torch

    generator = torch.Generator().manual_seed(1)
    for factor in _weights(s, UP, "style"):
        factor.add_(torch.randn(factor.shape, generator=generator) * 1e-3)


@fault(ADAPTERS, "another version of adapter style")
def another_adapter_altogether(s):
    import torch

    generator = torch.Generator().manual_seed(2)
    for factor in _weights(s, UP, "style"):
        factor.copy_(torch.randn(factor.shape, generator=generator) * float(factor.std()))


@fault(ADAPTERS, "1 of 128 entries of A differ")
def last_bit_of_one_element(s):
    import torch

    a, _ = _weights(s, Q, "style")
    a[1, 1] = torch.nextafter(a[1, 1], torch.tensor(10.0))


@fault(ADAPTERS, "holds NaN or infinity")
def nan_in_b(s):
    _weights(s, Q, "instruct")[1][0, 0] = float("nan")


@fault(ADAPTERS, "entries of B differ")
def one_output_row_of_b_zeroed(s):
    _weights(s, UP, "style")[1][3].zero_()


@fault(ADAPTERS, "entries of A differ")
def one_rank_lost(s):
    _weights(s, UP, "style")[0][3].zero_()


@fault(ADAPTERS, "is not loaded here")
def adapter_deleted_in_one_layer(s):
    s.layer(Q).delete_adapter("style")


# --- scale --------------------------------------------------------------------------------------


@fault(ADAPTERS, "the scale of adapter style is off by 1.05×")
def scale_off_by_5_percent_in_one_module(s):
    s.layer(UP).scaling["style"] *= 1.05


@fault(ADAPTERS, "the scale of adapter instruct is off by 3×")
def scale_tripled_everywhere(s):
    for layer in _each(s, "instruct"):
        layer.scaling["instruct"] *= 3


@fault(ADAPTERS, "off by 2×, which is √r")
def scale_of_rslora(s):
    for layer in _each(s, "style"):
        layer.scaling["style"] = 8 / 4**0.5


@fault(ADAPTERS, "PEFT's default alpha of 8")
def alpha_lost(s):
    for layer in _each(s, "instruct"):
        layer.scaling["instruct"] = 8 / 4


@fault(ADAPTERS, "alpha/r was left out")
def scale_left_out(s):
    for layer in _each(s, "instruct"):
        layer.scaling["instruct"] = 1.0


@fault(ADAPTERS, "the sign of adapter instruct is flipped")
def scale_negated(s):
    for layer in _each(s, "instruct"):
        layer.scaling["instruct"] *= -1


@fault(ADAPTERS, "missing here")
def scale_zero_in_one_layer(s):
    s.layer(OUT).scaling["style"] = 0.0


@fault(ADAPTERS, "the scale of adapter style is off by 1.25×")
def weight_of_the_mode_not_applied(s):
    s.mode = s.stack.mode("style*0.8+instruct")


# --- activation -----------------------------------------------------------------------------------


@fault(ACTIVE, "['style'] is active, not ['instruct', 'style']")
def only_the_first_adapter_active(s):
    s.model.set_adapter("style")


@fault(ACTIVE, "['instruct'] is active, not ['instruct', 'style']")
def only_the_last_adapter_active(s):
    s.model.set_adapter("instruct")


@fault(ADAPTERS, "no adapter is applied here")
def adapters_disabled(s):
    s.model.base_model.disable_adapter_layers()


@fault(ADAPTERS, "style is loaded here and not active")
def one_layer_inactive(s):
    s.layer(Q)._active_adapter = ["instruct"]


@fault(ACTIVE, "its adapters are disabled")
def one_layer_disabled(s):
    s.layer(UP)._disable_adapters = True


@fault(ACTIVE, "'style' is active twice")
def one_adapter_active_twice(s):
    s.model.base_model.set_adapter(["style", "style", "instruct"])


@fault(ACTIVE, "'nope' is listed as active and is not loaded")
def unknown_name_active(s):
    s.model.base_model.set_adapter(["style", "nope"])


@fault(ADAPTERS, "adapter instruct is applied here (1×) and should be off")
def stacked_where_style_is_claimed(s):
    s.mode = "style"


@fault(ADAPTERS, "something is added here that is none of the stack's adapters")
def a_third_adapter_active_in_the_base(s):
    import torch
    from peft import LoraConfig

    s.model.add_adapter("third", LoraConfig(r=2, target_modules=["k_proj"]))
    for layer in _each(s, "third"):
        torch.nn.init.normal_(layer.lora_B["third"].weight)
    s.model.base_model.set_adapter(["third"])
    s.mode = "base"


@fault(ADAPTERS, "more than s·B·A")
def one_adapter_is_dora(s):
    import torch
    from peft import LoraConfig

    s.model.delete_adapter("style")
    s.model.add_adapter("style", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    torch.nn.init.normal_(s.layer(Q).lora_B["style"].weight)
    s.model.base_model.set_adapter(["style", "instruct"])


@fault(ADAPTERS, "ModulesToSaveWrapper")
def a_whole_module_replaced(s):
    from peft import LoraConfig

    s.model.add_adapter(
        "third", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    s.model.base_model.set_adapter(["style", "instruct"])


@fault(ADAPTERS, "a PromptEmbedding of PEFT acts here")
def vectors_before_every_prompt(s):
    from peft import PromptTuningConfig, get_peft_model

    merged = s.model.merge_and_unload()
    vars(merged).pop("peft_config", None)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    s.model = get_peft_model(merged, config).eval()


@fault(EVALUATION, "dropout of 0.1 is on")
def dropout_left_on(s):
    import torch

    s.layer(Q).lora_dropout["style"] = torch.nn.Dropout(0.1)
    s.model.train()


@fault(EVALUATION, "attention dropout of 0.2 is on")
def attention_dropout_left_on(s):
    s.layer("model.layers.0.self_attn").attention_dropout = 0.2
    s.model.train()


@fault(ADAPTERS, "instruct is not loaded here")
def second_adapter_never_loaded(s):
    s.model.delete_adapter("instruct")
    s.model.base_model.set_adapter(["style"])


@fault(OUTPUTS, "adapter instruct is missing here: style only")
def second_adapter_deleted(s):
    s.model.delete_adapter("instruct")
    s.model.base_model.set_adapter(["style"])


# --- computation ----------------------------------------------------------------------------------


@fault(HOOKS, "without them the logits change")
def steering_hook(s):
    s.layer("model.layers.0").register_forward_hook(lambda m, a, out: out + 0.05)


@fault(OUTPUTS, f"{UP}:")
def hook_on_an_adapted_layer(s):
    s.layer(UP).register_forward_hook(lambda m, a, out: out * 1.001)


@fault(HOOKS, "hook or patch on the wrapper")
def hook_on_the_wrapper(s):
    def twice(module, args, output):
        output.logits = output.logits * 2
        return output

    s.model.register_forward_hook(twice)


@fault(HOOKS, "forward method is replaced")
def forward_patched(s):
    mlp = s.layer("model.layers.1.mlp")
    original = mlp.forward
    mlp.forward = lambda x: original(x) * 0.9


@fault(HOOKS, "accelerate hook")
def steering_by_accelerate(s):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Steering(ModelHook):
        def post_forward(self, module, output):
            return output + 0.05

    add_hook_to_module(s.layer("model.layers.0"), Steering())


@fault(ARCHITECTURE, "act_fn is 'GELU'")
def other_activation_function(s):
    import torch

    s.layer("model.layers.0.mlp").act_fn = torch.nn.GELU()


@fault(ARCHITECTURE, "variance_epsilon is 0.001")
def other_norm_epsilon(s):
    s.layer("model.norm").variance_epsilon = 1e-3


@fault(ARCHITECTURE, "scaling is 0.5")
def other_attention_scaling(s):
    s.layer("model.layers.1.self_attn").scaling = 0.5


@fault(ARCHITECTURE, "config.rope_parameters.rope_theta is 1000000.0")
def other_rope_theta_in_config(s):
    s.bare.config.rope_parameters["rope_theta"] = 1e6


@fault(BUFFERS, "rotary parameters changed")
def rotary_frequencies_scaled(s):
    s.layer("model.rotary_emb").inv_freq.mul_(0.5)


@fault(BUFFERS, "rounded through bfloat16")
def rotary_frequencies_in_bfloat16(s):
    rotary = s.layer("model.rotary_emb")
    rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())


@fault(BUFFERS, "rounded through bfloat16")
def whole_model_cast_after_loading(s):
    import torch

    s.model.to(torch.bfloat16)  # loading in bfloat16 keeps the frequencies in float32


@fault(ARCHITECTURE, "model.norm: is a Identity")
def norm_taken_out(s):
    import torch

    s.bare.model.norm = torch.nn.Identity()


@fault(ARCHITECTURE, "model.layers.1: Qwen3DecoderLayer is missing")
def last_layer_dropped(s):
    s.bare.model.layers = s.bare.model.layers[:1]


# --- the base -------------------------------------------------------------------------------------


@fault(WEIGHTS, "this is a wrong base")
def base_of_the_same_shape(s):
    import torch

    generator = torch.Generator().manual_seed(5)
    for name, parameter in s.bare.named_parameters():
        if "lora_" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.01)


@fault(WEIGHTS, "model.norm.weight: it is 1.01 times the file's")
def norm_changed_by_1_percent(s):
    s.layer("model.norm").weight.data.mul_(1.01)


@fault(WEIGHTS, "input_layernorm.weight: 1 of 32 entries differ")
def one_entry_of_a_norm(s):
    s.layer("model.layers.0.input_layernorm").weight.data[3] += 0.01


@fault(WEIGHTS, "32 entries are zero and are not in the file")
def embedding_row_zeroed(s):
    s.layer("model.embed_tokens").weight.data[65].zero_()


@fault(WEIGHTS, "the base's weight was rounded through bfloat16")
def base_rounded_through_bfloat16(s):
    weight = s.layer(UP).base_layer.weight.data
    weight.copy_(weight.bfloat16())


@fault(WEIGHTS, "1 of 1024 entries differ from the file's")
def one_entry_of_the_base(s):
    weight = s.layer(Q).base_layer.weight.data
    weight[0, 0] = -weight[0, 0]


@fault(WEIGHTS, "it is 1.001 times the file's")
def base_weight_scaled(s):
    s.layer(UP).base_layer.weight.data.mul_(1.001)


@fault(WEIGHTS, "lm_head.weight:")
def head_tied_though_the_files_are_not(s):
    s.bare.lm_head.weight = s.bare.model.embed_tokens.weight


@fault(WEIGHTS, "q_proj.bias: the files have no tensor of this name")
def bias_out_of_nowhere(s):
    import torch

    linear = s.layer(Q).base_layer
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 0.01))


@fault(WEIGHTS, "it holds NaN or infinity")
def nan_in_a_norm(s):
    s.layer("model.norm").weight.data[0] = float("nan")


@fault(ARCHITECTURE, "layer_idx is 1, config.json gives 0")
def two_layers_exchanged(s):
    layers = s.bare.model.layers
    layers[0], layers[1] = layers[1], layers[0]


@fault(WEIGHTS, "an adapter lies in the base's weight: adapter style is applied here (1×)")
def style_merged_and_live_at_once(s):
    layer = s.layer(UP)
    layer.base_layer.weight.data += layer.get_delta_weight("style")


# --- merging --------------------------------------------------------------------------------------


def _merge(s, **arguments):
    s.model = s.model.merge_and_unload(**arguments)


@fault(WEIGHTS, "adapter instruct is missing here: style only")
def merged_style_only(s):
    _merge(s, adapter_names=["style"])


@fault(WEIGHTS, "no adapter is applied here")
def unloaded_without_merging(s):
    s.model = s.model.unload()


@fault(WEIGHTS, "off by 2×")
def merged_twice(s):
    _merge(s, adapter_names=["style", "style", "instruct"])


@fault(WEIGHTS, "the merged weight was rounded through bfloat16")
def merged_in_bfloat16_and_cast_up(s):
    _merge(s)
    weight = s.layer(UP).weight.data
    weight.copy_(weight.bfloat16())


@fault(WEIGHTS, "cross terms")
def merged_by_linear(s):
    s.model.add_weighted_adapter(
        ["style", "instruct"], [1.0, 1.0], "both", combination_type="linear"
    )
    s.model.set_adapter("both")
    _merge(s, adapter_names=["both"])


@fault(WEIGHTS, "output rows differ")
def one_output_row_not_merged(s):
    before = s.layer(UP).base_layer.weight.data[3].clone()
    _merge(s)
    s.layer(UP).weight.data[3] = before


@fault(WEIGHTS, "adapter style's delta is transposed")
def merged_transposed(s):
    layer = s.layer(Q)
    delta = layer.get_delta_weight("style").detach()
    _merge(s)
    s.layer(Q).weight.data += delta.T - delta


@fault(WEIGHTS, "the sign of adapter style is flipped")
def subtracted_instead_of_added(s):
    delta = s.layer(UP).get_delta_weight("style").detach()
    _merge(s)
    s.layer(UP).weight.data -= 2 * delta


@fault(WEIGHTS, "no adapter is applied here")
def one_layer_not_merged(s):
    before = s.layer(UP).base_layer.weight.data.clone()
    _merge(s)
    s.layer(UP).weight.data.copy_(before)


@fault(WEIGHTS, "the scale of adapter style is off by 1.05×")
def one_module_merged_5_percent_too_strong(s):
    delta = s.layer(UP).get_delta_weight("style").detach()
    _merge(s)
    s.layer(UP).weight.data += 0.05 * delta


@fault(WEIGHTS, "it holds NaN or infinity")
def nan_merged_in(s):
    _weights(s, UP, "style")[1][0, 0] = float("inf")
    _merge(s, safe_merge=False)


@fault(WEIGHTS, "another version")
def merged_by_truncated_svd(s):
    s.model.add_weighted_adapter(
        ["style", "instruct"], [1.0, 1.0], "both", combination_type="svd", svd_rank=4
    )
    _merge(s, adapter_names=["both"])


@fault(MERGED, "instruct is not merged here")
def half_of_the_stack_merged_in_place(s):
    s.model.merge_adapter(["style"])


@fault(MERGED, "merged and disabled at once")
def merged_and_disabled(s):
    s.model.merge_adapter()
    s.model.base_model.disable_adapter_layers()


@fault(MERGED, "'instruct' is merged and is not in the mode")
def more_merged_than_claimed(s):
    s.model.merge_adapter()
    s.mode = "style"


@fault(ADAPTERS, "cross terms")
def linear_combination_live(s):
    s.model.add_weighted_adapter(
        ["style", "instruct"], [1.0, 1.0], "both", combination_type="linear"
    )
    s.model.set_adapter("both")


# --- generation settings --------------------------------------------------------------------------


@fault(EOS, "the model stops at [257]")
def eos_off_by_one(s):
    s.model.generation_config.eos_token_id = 257


@fault(EOS, "no EOS id")
def eos_lost(s):
    s.model.generation_config.eos_token_id = None


@fault(EOS, "a chat turn never ends")
def eos_without_the_end_of_turn(s):
    s.generation |= {"eos_token_id": 256}


@fault(EOS, "the call stops at [258] only, generation_config.json also at [256]")
def eos_of_the_tokenizer_alone(s):
    s.generation |= {"eos_token_id": s.tokenizer.eos_token_id}


@fault(EOS, "EOS -1 is outside the vocabulary")
def eos_minus_one(s):
    s.generation |= {"eos_token_id": -1}


@fault(EOS, "the chat template ends a turn with '<|im_end|>' (258)")
def eos_without_the_template_s_end_of_turn(s):
    from harness.completion import Message, Prompt

    s.tokenizer.eos_token = "<|endoftext|>"
    s.prompts = (Prompt(id="a", messages=(Message(role="user", content="Hello?"),)),)
    s.generation |= {"eos_token_id": 256}


@fault(EOS, "EOS 65 is an ordinary token")
def eos_is_a_letter(s):
    s.generation |= {"eos_token_id": [258, 256, 65]}


@fault(EOS, "outside the vocabulary")
def eos_outside_the_vocabulary(s):
    s.generation |= {"eos_token_id": [258, 256, 151645]}


@fault(PADDING, "pads on the right")
def padding_on_the_right(s):
    s.tokenizer.padding_side = "right"


@fault(PADDING, "returns no attention mask")
def tokenizer_without_mask(s):
    s.tokenizer.model_input_names = ["input_ids"]


@fault(PADDING, "no padding token")
def tokenizer_without_padding(s):
    s.tokenizer.pad_token = None


@fault(PADDING, "that the mask shows as text")
def mask_of_ones(s):
    s.generation |= s.encoded()
    s.generation["attention_mask"] = s.generation["attention_mask"] * 0 + 1


@fault(PADDING, "come without attention_mask")
def mask_left_out(s):
    s.generation |= s.encoded()
    del s.generation["attention_mask"]


@fault(PADDING, "hides 2 tokens of the prompt")
def mask_hides_the_prompt(s):
    s.prompts = s.prompts[:1]
    s.generation |= s.encoded()
    s.generation["attention_mask"][0, :2] = 0


@fault(PADDING, "row 0: position_ids do not count from its first visible token")
def positions_that_count_the_padding(s):
    import torch

    s.generation |= s.encoded()
    rows, width = s.generation["input_ids"].shape
    s.generation["position_ids"] = torch.arange(width).expand(rows, width)


@fault(PADDING, "padding id 999 is outside the vocabulary")
def padding_outside_the_vocabulary(s):
    s.generation |= {"pad_token_id": 999}


@fault(DECODING, "samples (do_sample) without a seed")
def sampling_in_the_call(s):
    s.generation |= {"do_sample": True}


@fault(DECODING, "the model's generation config samples")
def sampling_leaks_from_the_checkpoint(s):
    s.model.generation_config.do_sample = True
    s.generation = {"max_new_tokens": 16}


@fault(DECODING, "repetition_penalty = 1.1 in the model's generation config")
def penalty_leaks_from_the_checkpoint(s):
    s.model.generation_config.repetition_penalty = 1.1


@fault(DECODING, "no_repeat_ngram_size = 3 in the call")
def n_grams_forbidden(s):
    s.generation |= {"no_repeat_ngram_size": 3}


@fault(DECODING, "num_beams = 4")
def beams(s):
    s.generation |= {"num_beams": 4}


@fault(DECODING, "min_new_tokens = 8")
def minimum_length(s):
    s.generation |= {"min_new_tokens": 8}


@fault(DECODING, "suppress_tokens = [258]")
def eos_suppressed(s):
    s.model.generation_config.suppress_tokens = [258]


@fault(DECODING, "PEFT applies one adapter to each row")
def one_adapter_for_each_row(s):
    s.generation |= {"adapter_names": ["style", "instruct", "style"]}


@fault(DECODING, "inputs_embeds is passed")
def vectors_instead_of_tokens(s):
    s.generation |= {"inputs_embeds": s.layer("model.embed_tokens").weight[:4][None].detach()}


@fault(DECODING, "custom_generate is passed")
def decoding_loop_of_somebody(s):
    s.generation |= {"custom_generate": lambda model, **arguments: None}


@fault(LENGTH, "answers are cut off there")
def stop_strings_leak_from_the_checkpoint(s):
    s.model.generation_config.stop_strings = ["\n"]


@fault(LENGTH, "stops after 20 tokens")
def no_limit_given(s):
    s.generation = {"do_sample": False}


@fault(LENGTH, "counts the prompt")
def limit_counts_the_prompt(s):
    s.generation = {"max_length": 8}


@fault(LENGTH, "pass the context of 512")
def limit_beyond_the_context(s):
    s.generation |= {"max_new_tokens": 600}


@fault(CACHE, "belongs to the mode that filled it")
def cache_of_another_mode(s):
    import torch

    with s.model.disable_adapter():
        cache = s.model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    s.generation |= {"past_key_values": cache}


@fault(CACHE, "is quantised")
def cache_of_a_few_bits(s):
    s.model.generation_config.cache_implementation = "quantized"


@fault(TEMPLATE, "is not the one in the stack's files")
def template_replaced(s):
    s.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@fault(TEMPLATE, "the tokenizer has none")
def template_lost(s):
    s.tokenizer.chat_template = None


@fault(TOKENS, "they part at position")
def tokenizer_of_another_model(s):
    from tokenizers import normalizers

    s.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("e", "E")


@fault(TOKENS, "they part at position 0")
def beginning_token_added(s):
    from tokenizers import processors

    s.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )


@fault(TOKENS, "results would go to the wrong prompts")
def prompts_in_another_order(s):
    batch = s.encoded()
    s.generation |= {name: tensor.flip(0) for name, tensor in batch.items()}


@fault(TOKENS, "input_ids has 2 rows for 3 prompts")
def one_prompt_lost(s):
    batch = s.encoded()
    s.generation |= {name: tensor[:2] for name, tensor in batch.items()}


@fault(TOKENS, "row 1 of input_ids is not its prompt")
def prompt_truncated(s):
    batch = s.encoded()
    batch["attention_mask"][1, -3:] = 0
    s.generation |= batch
