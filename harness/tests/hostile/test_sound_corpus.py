"""Sound but unusual folders: no false alarm, and logits as the float64 reference has them."""

import json
import os
import shutil

import pytest

from harness.cli import main
from harness.tests.hostile.folders import CONFIG, WEIGHTS, Folders, read_header, write_header

TOLERANCE = 1e-4


def spec(**values):
    """A row whose style adapter is made with these `AdapterSpec` values."""

    def build(root, tiny):
        import torch

        from harness.testing.tiny import AdapterSpec, tiny_adapter

        dtype = getattr(torch, values.pop("dtype", "float32"))
        shutil.rmtree(root / "style")
        tiny_adapter(root / "style", root / "base", AdapterSpec(dtype=dtype, **values), seed=11)

    return build


def base(family, **values):
    """A row on another base."""

    def build(root, tiny):
        from harness.testing.tiny import tiny_adapter, tiny_base

        for name in ("base", "style", "instruct"):
            shutil.rmtree(root / name)
        tiny_base(root / "base", family, **values)
        for seed, name in enumerate(("style", "instruct")):
            tiny_adapter(root / name, root / "base", seed=seed)

    return build


def folders(change):
    """A row that changes the tiny stack's files; `change(Folders-like)`."""

    def build(root, tiny):
        at = Folders.__new__(Folders)
        at.root = root
        at.base, at.style, at.instruct = root / "base", root / "style", root / "instruct"
        at.weights, at.model = at.style / WEIGHTS, at.base / "model.safetensors"
        return change(at)

    return build


def _extra_files(f):
    for name in ("README.md", "training_args.bin", "optimizer.pt", ".gitattributes", "trainer.log"):
        (f.style / name).write_bytes(b"\x80\x04 not read")
    (f.style / "adapter_model.bin").write_bytes(b"\x80\x04 not read")
    (f.base / "pytorch_model.bin").write_bytes(b"\x80\x04 not read")
    (f.base / "consolidated.safetensors").write_bytes(b"not read")
    (f.base / "original").mkdir()
    for name in ("checkpoint-10", "checkpoint-20"):
        shutil.copytree(f.instruct, f.style / name)


def _read_only(f):
    for folder in (f.base, f.style, f.instruct):
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)


def _moved(name):
    def change(f):
        (f.root / name).parent.mkdir(parents=True, exist_ok=True)
        f.style.rename(f.root / name)
        return ["--style-adapter", str(f.root / name), "--instruct-adapter", str(f.instruct)]

    return change


def _links_to_blobs(f):
    """As the hub's cache lays a repository out."""
    blobs = f.root / "blobs"
    blobs.mkdir()
    for folder in (f.base, f.style):
        for file in folder.iterdir():
            file.rename(blobs / f"{folder.name}-{file.name}")
            file.symlink_to(os.path.relpath(blobs / f"{folder.name}-{file.name}", folder))


def _padded_header(f):
    header, data = read_header(f.weights)
    header["__metadata__"] = {"format": "pt", "note": "ü 你好 \u202e"}
    text = json.dumps(header).encode()
    write_header(f.weights, text + b" " * (1001 - len(text) % 1000), data)


def _old_config(f):
    """What PEFT 0.5 wrote: none of the younger keys."""
    raw = json.loads((f.style / CONFIG).read_text())
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
            "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "target_modules",
            "task_type", "modules_to_save", "revision")  # fmt: skip
    (f.style / CONFIG).write_text(json.dumps({key: raw[key] for key in kept}))


def _config_text(change):
    def apply(f):
        (f.style / CONFIG).write_bytes(change((f.style / CONFIG).read_bytes()))

    return apply


def _declared(f):
    (f.root / "my stack.toml").write_text(
        'base = "base"\n[adapters]\nstyle = "style"\ninstruct = "instruct"\n'
        '[parents]\ninstruct = ["style"]\n'
    )
    return ["--stack", str(f.root / "my stack.toml")]


def _locked(f):
    arguments = _declared(f)
    assert main(["lock", *arguments]) == 0
    return arguments


def _adapters_template(f):
    template = f.base / "chat_template.jinja"
    shutil.copy(template, f.style / template.name)
    template.unlink()


def _quiet_module(f):
    """One module of fourteen was never trained."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    f.tensors(lambda t: t.update({name: (*t[name][:2], b"\0" * len(t[name][2]))}))


ROWS = {
    "rslora": spec(rank=8, alpha=16, rslora=True),
    "rank 1, alpha 3.5": spec(rank=1, alpha=3.5),
    "rank pattern": spec(rank=4, options={"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}}),
    "alpha pattern": spec(options={"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}}),
    "rslora with patterns": spec(rslora=True, options={"rank_pattern": {"down_proj": 9},
                                                       "alpha_pattern": {"down_proj": 2}}),
    "targets by a pattern": spec(targets=r".*\.layers\.(0|1)\.self_attn\.(k|v)_proj"),
    "targets by a long pattern": spec(
        targets=r"(?:.*?(?:model|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|up_proj)).*?"),
    "all linear": spec(targets="all-linear"),
    "all linear but one": spec(targets="all-linear", options={"exclude_modules": ["down_proj"]}),
    "one layer": spec(targets=("q_proj",), options={"layers_to_transform": [1]}),
    "one layer by a pattern": spec(targets=("q_proj",), options={"layers_to_transform": 1,
                                                                 "layers_pattern": "layers"}),
    "a head": spec(targets=("q_proj", "lm_head")),
    "dropout": spec(options={"lora_dropout": 0.3}),
    "orthogonal start": spec(options={"init_lora_weights": "orthogonal"}),
    "bf16 adapter": spec(dtype="bfloat16"),
    "fp16 adapter": spec(dtype="float16"),
    "dotted folder": folders(_moved("style.v1.2.final")),
    "folder with spaces and quotes": folders(_moved("my 'style' [v2] $HOME")),
    "folder in another script": folders(_moved("Stil-größe/风格 🎨")),
    "long folder": folders(_moved("s" * 200)),
    "read-only": folders(_read_only),
    "extra files": folders(_extra_files),
    "links to blobs": folders(_links_to_blobs),
    "padded header with metadata": folders(_padded_header),
    "config of an old PEFT": folders(_old_config),
    "config with CRLF and escapes": folders(
        _config_text(lambda b: b.replace(b"\n", b"\r\n").replace(b'"q_proj"', b'"\\u0071_proj"'))),
    "alpha a float": folders(lambda f: f.config(lora_alpha=8.0)),
    "automatic mapping": folders(lambda f: f.config(auto_mapping={
        "base_model_class": "Qwen3ForCausalLM", "parent_library": "transformers.models.qwen3"})),
    "one quiet module": folders(_quiet_module),
    "template of the adapter": folders(_adapters_template),
    "sharded base": folders(lambda f: f.shard()),
    "declared": folders(_declared),
    "declared and locked": folders(_locked),
    "tied base": base("qwen3", tied=True),
    "llama": base("llama"),
    "qwen2 with biases": base("qwen2"),
    "mixture of experts": base("qwen3_moe"),
    "sharded tied base": base("qwen3", tied=True, max_shard_size="40KB"),
}  # fmt: skip


@pytest.mark.parametrize("build", ROWS.values(), ids=ROWS)
def test_sound_folder_is_accepted_and_its_logits_are_the_references(
    build, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "case"
    root.mkdir()
    shutil.copytree(tiny.base, root / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, root / name)
    arguments = build(root, tiny) or [
        "--style-adapter", str(root / "style"), "--instruct-adapter", str(root / "instruct"),
    ]  # fmt: skip
    if arguments[0] != "--stack":
        arguments = ["--base-model", str(root / "base"), *arguments]
    capsys.readouterr()
    assert main(["check-files", *arguments]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""
    error, size = largest_difference(arguments)
    assert error < TOLERANCE
    assert size > 0.01, "the logits say something"
    for folder in (root, *root.glob("*")):
        if folder.is_dir():
            folder.chmod(0o755)


def largest_difference(arguments):
    """Of the stacked logits, live, from a float64 model whose weights are the reference's; and
    the largest logit."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.cli import _parser
    from harness.engines import load_engine
    from harness.options import stack_options
    from harness.reference import reference_weights
    from harness.resolve import stack_from_options

    stack = stack_from_options(stack_options(_parser().parse_args(["check-files", *arguments])))
    ids = [[1, 5, 9, 200, 33, 77, 4]]
    with load_engine(stack, device="cpu", dtype="float32") as engine:
        (live,) = engine.logits(ids, "stacked")
        weights = dict(reference_weights(engine.checkpoint, engine.files, stack.mode("stacked")))
        checkpoint = engine.checkpoint
    # torch multiplies grouped experts in float32 at most; there the weights are rounded once.
    experts = checkpoint.config["model_type"].endswith("moe")
    dtype = torch.float32 if experts else torch.float64
    model = AutoModelForCausalLM.from_pretrained(stack.base.path, dtype=dtype)
    for name, parameter in model.named_parameters():
        if not experts:  # whose tensors are stored one by one
            stored = checkpoint.tensor(checkpoint.stored_name(name))
            assert torch.equal(parameter, stored.to(dtype)), f"{name} is not the file's"
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        modules[name].weight = torch.nn.Parameter(weight.to(dtype))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids)).logits[0].float()
    return (live - expected).abs().max().item(), expected.abs().max().item()


def test_there_are_15_rows():
    assert len(ROWS) >= 15
