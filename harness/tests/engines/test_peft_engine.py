"""The reference engine: modes come and go without a trace, and what is active is read back."""

from dataclasses import replace

import pytest

from harness.completion import (
    Application,
    GenerationSettings,
    Message,
    Prompt,
    StopReason,
)
from harness.errors import InputError
from harness.stack import Mode

LIVE, MERGED = Application.LIVE, Application.MERGED
SHORT = GenerationSettings(max_new_tokens=12)
PROMPTS = [
    Prompt(id=f"p-{n}", text=text)
    for n, text in enumerate(["a", "The fox", "x" * 40, "Hello there", "9"])
]


@pytest.fixture(scope="module")
def ids(tiny_engine):
    return [tiny_engine.token_ids(prompt) for prompt in PROMPTS]


def family_engine(folder, family, **base):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(folder, family=family, **base)
    return load_engine(resolve_stack(adapters=stack.adapters), device="cpu")


@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("qwen3", {}),
        ("qwen3", {"tied": True}),
        ("qwen2", {"max_shard_size": "40KB"}),
        ("llama", {"tied": True}),
        ("qwen3_moe", {}),
    ],
)
def test_live_is_merged_is_the_reference_in_every_family(tmp_path, family, base):
    import torch

    from harness.reference import reference_weights

    with family_engine(tmp_path, family, **base) as engine:
        rows = [engine.token_ids(prompt) for prompt in PROMPTS]
        for mode in engine.stack.modes:
            live = engine.logits(rows, mode)
            with engine.mode(mode, MERGED) as model:
                modules = dict(model.base_model.model.named_modules())
                for name, expected in reference_weights(engine.checkpoint, engine.files, mode):
                    weight = modules[name].get_base_layer().weight
                    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
            for a, b in zip(live, engine.logits(rows, mode, application=MERGED), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        base_logits = engine.logits(rows, "base")[1]
        assert not torch.equal(base_logits, engine.logits(rows, "stacked")[1])


def test_tied_head_with_an_adapter_merges_without_touching_the_embedding(tmp_path):
    import torch

    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import AdapterSpec, tiny_stack

    stack = tiny_stack(
        tmp_path, tied=True, adapters={"a": AdapterSpec(targets=("q_proj", "lm_head"))}
    )
    with load_engine(resolve_stack(adapters=stack.adapters), device="cpu") as engine:
        rows = [engine.token_ids(prompt) for prompt in PROMPTS]
        live = engine.logits(rows, "a")
        merged = engine.logits(rows, "a", application=MERGED)
        for a, b in zip(live, merged, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        head, embedding = (
            engine.model.get_output_embeddings(),
            engine.model.get_input_embeddings(),
        )
        assert head.get_base_layer().weight is embedding.weight


def test_mode_leaves_every_bit_as_it_was(tiny_engine, ids):
    import torch

    parameters = dict(tiny_engine.model.named_parameters())
    before = {name: value.clone() for name, value in parameters.items()}
    first = {m.name: tiny_engine.logits(ids, m) for m in tiny_engine.stack.modes}
    for expression in ("style", "stacked", "style*-2", "instruct*0.5+style", "base"):
        for application in (LIVE, MERGED):
            tiny_engine.logits(ids, expression, application=application)
    with pytest.raises(ZeroDivisionError), tiny_engine.mode("style*3", MERGED):
        raise ZeroDivisionError
    after = dict(tiny_engine.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(value.requires_grad for value in after.values())
    for mode in tiny_engine.stack.modes:
        again = tiny_engine.logits(ids, mode)
        assert all(torch.equal(a, b) for a, b in zip(first[mode.name], again, strict=True))


def test_weight_scales_the_delta(tiny_engine, ids):
    import torch

    for application in (LIVE, MERGED):
        base = tiny_engine.logits(ids, "base", application=application)
        nothing = tiny_engine.logits(ids, "style*0", application=application)
        assert all(torch.equal(a, b) for a, b in zip(base, nothing, strict=True))
    live, merged = (tiny_engine.logits(ids, "style*0.5", application=a) for a in (LIVE, MERGED))
    for a, b in zip(live, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["inactive", "scaled", "disabled", "merged"])
def test_layer_that_is_not_as_the_mode_says_is_an_error(tiny_engine, fault):
    from harness.engines.application import check_active
    from harness.engines.loading import ActivationError, lora_layers

    layers = lora_layers(tiny_engine.model)
    scales = {name: dict(layer.scaling) for name, layer in layers.items()}
    mode = tiny_engine.stack.mode("stacked")
    name, layer = next((n, x) for n, x in layers.items() if len(x.lora_A) == 2)
    with tiny_engine.mode(mode):
        if fault == "inactive":
            layer.set_adapter(["style"], inference_mode=True)
        elif fault == "scaled":
            layer.scaling["style"] *= 2
        elif fault == "disabled":
            layer.enable_adapters(False)
        else:
            layer.merged_adapters.append("style")
        try:
            with pytest.raises(ActivationError, match=name.replace(".", r"\.")):
                check_active(layers, mode, scales)
        finally:
            layer.merged_adapters.clear()


def test_file_that_peft_loads_in_part_is_refused(adapter_copy, tiny):
    from harness.resolve import resolve_stack

    folder = adapter_copy(target_modules=["q_proj"])
    with pytest.raises(InputError, match="target_modules does not name"):
        resolve_stack(base_model=tiny.base, adapters={"a": folder})


def test_what_peft_loads_in_part_is_noticed_after_loading_too(adapter_copy, tiny, monkeypatch):
    from harness.adapter_config import AdapterConfig
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    monkeypatch.setattr(AdapterConfig, "targets", lambda *_: None)  # as if the files did not tell
    stack = resolve_stack(
        base_model=tiny.base, adapters={"a": adapter_copy(target_modules=["q_proj"])}
    )
    with pytest.raises(InputError, match="target_modules does not name"):
        load_engine(stack, device="cpu")


def test_batches_do_not_change_float32_results_or_their_order(tiny_engine):
    whole = tiny_engine.generate(PROMPTS, "stacked", replace(SHORT, batch_size=5))
    single = tiny_engine.generate(PROMPTS, "stacked", replace(SHORT, batch_size=1))
    assert [c.prompt.id for c in whole] == [p.id for p in PROMPTS]
    assert whole == single


def test_generation_is_the_argmax_of_the_forward_pass(tiny_engine):
    for completion in tiny_engine.generate(PROMPTS, "stacked", SHORT):
        row = completion.prompt_token_ids + completion.token_ids
        logits = tiny_engine.logits([row], "stacked")[0]
        start = len(completion.prompt_token_ids) - 1
        assert tuple(logits[start:-1].argmax(-1).tolist()) == completion.token_ids


def test_sampling_follows_its_seed(tiny_engine):
    sampled = replace(SHORT, do_sample=True, seed=3)
    first = tiny_engine.generate(PROMPTS, "base", sampled)
    assert first == tiny_engine.generate(PROMPTS, "base", sampled)
    assert [c.token_ids for c in first] != [
        c.token_ids for c in tiny_engine.generate(PROMPTS, "base", replace(sampled, seed=4))
    ]
    with pytest.raises(InputError, match="needs a seed"):
        tiny_engine.generate(PROMPTS, "base", replace(sampled, seed=None))


def test_eos_length_stop_string_and_context_are_told_apart(tiny_engine, monkeypatch):
    prompt = PROMPTS[1]
    (plain,) = tiny_engine.generate([prompt], "base", SHORT)
    assert plain.stop_reason is StopReason.LENGTH
    assert len(plain.token_ids) == 12

    middle = tiny_engine.tokenizer.decode([plain.token_ids[4]])
    (cut,) = tiny_engine.generate([prompt], "base", replace(SHORT, stop_strings=(middle,)))
    assert cut.stop_reason is StopReason.STOP_STRING
    assert len(cut.token_ids) <= 5
    assert middle in cut.text

    room = len(plain.prompt_token_ids) + 3
    monkeypatch.setattr(type(tiny_engine), "context_length", room)
    (full,) = tiny_engine.generate([prompt], "base", SHORT)
    assert (full.stop_reason, len(full.token_ids)) == (StopReason.CONTEXT, 3)
    monkeypatch.undo()

    monkeypatch.setattr(tiny_engine, "eos_token_ids", (plain.token_ids[2],))
    first = plain.token_ids.index(plain.token_ids[2])
    (ended, *_) = tiny_engine.generate([prompt, *PROMPTS[2:]], "base", SHORT)
    assert ended.stop_reason is StopReason.EOS
    assert ended.token_ids == plain.token_ids[: first + 1]


def test_chat_goes_through_the_template(tiny_engine):
    turns = (Message(role="user", content="Hi"),)
    ids = tiny_engine.token_ids(Prompt(id="c", messages=turns))
    text = tiny_engine.tokenizer.decode(ids)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = (*turns, Message(role="assistant", content="Well"))
    assert tiny_engine.tokenizer.decode(
        tiny_engine.token_ids(Prompt(id="c", messages=begun))
    ).endswith("assistant\nWell")


def test_prompt_that_cannot_be_used_is_named(tiny_engine, monkeypatch):
    with pytest.raises(InputError, match="prompt empty: has no tokens"):
        tiny_engine.token_ids(Prompt(id="empty", text=""))
    with pytest.raises(InputError, match="prompt long: has 600 tokens"):
        tiny_engine.token_ids(Prompt(id="long", text="x" * 600))
    monkeypatch.setattr(tiny_engine.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="chat template"):
        tiny_engine.token_ids(Prompt(id="c", messages=(Message(role="user", content="Hi"),)))


def test_template_of_an_adapter_serves_a_base_without_one(tmp_path):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(tmp_path)
    template = stack.base / "chat_template.jinja"
    template.rename(stack.adapters["instruct"] / "chat_template.jinja")
    with load_engine(resolve_stack(adapters=stack.adapters), device="cpu") as engine:
        assert engine.template_source == "instruct's"
        assert engine.token_ids(Prompt(id="c", messages=(Message(role="user", content="Hi"),)))


def test_checkpoints_own_sampling_settings_do_not_leak(tmp_path):
    import json

    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(tmp_path)
    file = stack.base / "generation_config.json"
    config = json.loads(file.read_text())
    with load_engine(resolve_stack(adapters=stack.adapters), device="cpu") as engine:
        before = engine.generate(PROMPTS, "stacked", SHORT)
    leaky = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 2.0, "max_length": 30}
    file.write_text(json.dumps(config | leaky))
    with load_engine(resolve_stack(adapters=stack.adapters), device="cpu") as engine:
        assert engine.generate(PROMPTS, "stacked", SHORT) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"device": "cuda:99"}, "cuda:99 was asked for"),
        ({"device": "gpu"}, "'gpu' is no device"),
        ({"device": "meta"}, "cannot hold a model"),
        ({"dtype": "float8"}, "unknown dtype"),
    ],
)
def test_device_and_dtype_that_cannot_be_had_are_named(tiny, options, complaint):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with pytest.raises(InputError, match=complaint):
        load_engine(resolve_stack(adapters=tiny.adapters), **options)


@pytest.mark.parametrize("name", ["half", "keys", "forward"])
def test_name_that_torch_takes_for_itself_is_refused(tiny, name):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with pytest.raises(InputError, match=f"PEFT cannot hold an adapter called '{name}'"):
        load_engine(resolve_stack(adapters={name: tiny.adapters["style"]}), device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_runs_and_merges(tiny, dtype):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    stack = resolve_stack(adapters=tiny.adapters)
    with load_engine(stack, device="cpu", dtype=dtype) as engine:
        assert engine.dtype == dtype
        for application in (LIVE, MERGED):
            assert engine.generate(PROMPTS, "stacked", SHORT, application=application)


def test_base_without_adapters_needs_no_peft_wrapper(tiny):
    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    with load_engine(resolve_stack(base_model=tiny.base), device="cpu") as engine:
        assert engine.generate(PROMPTS, Mode(name="base"), SHORT)


def test_model_code_is_not_run_unasked(tiny, tmp_path):
    import json
    import shutil

    from harness.engines import load_engine
    from harness.resolve import resolve_stack

    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_engine(resolve_stack(base_model=base), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", "1e-6", "rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float"),
        ("dtype", "float8", "module 'torch' has no attribute 'float8'"),
    ],
)
def test_a_fault_in_the_config_is_not_put_on_the_tokenizer(tmp_path, field, value, said):
    import json

    from harness.engines import load_engine
    from harness.resolve import resolve_stack
    from harness.testing.tiny import tiny_stack

    stack = tiny_stack(tmp_path)
    path = stack.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError) as caught:
        load_engine(resolve_stack(adapters=stack.adapters), device="cpu")
    assert caught.value.where == str(path)
    assert said in caught.value.fault
    assert caught.value.remedy == "copy the config that belongs to the weights"
