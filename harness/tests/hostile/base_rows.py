"""Bases that transformers would load with something missing, doubled, random or run."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from harness.tests.hostile.folders import CONFIG, INDEX, MODEL, Folders, write_header

_GATE = "model.layers.1.mlp.gate_proj.weight"
_NORM = "model.norm.weight"
_ONE, _TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _config(**changes: Any) -> Any:
    return lambda f: f.json("base/config.json", **changes)


def _generation(**changes: Any) -> Any:
    return lambda f: f.json("base/generation_config.json", **changes)


def _index(change: Any) -> Any:
    return lambda f: f.index(change)


def _tensors(change: Any) -> Any:
    return lambda f: f.tensors(change, f.model)


def _sharded(change: Any) -> Any:
    def build(f: Folders) -> None:
        f.shard()
        change(f)

    return build


def _swap_shards(f: Folders) -> None:
    (f.base / _ONE).rename(f.base / "x")
    (f.base / _TWO).rename(f.base / _ONE)
    (f.base / "x").rename(f.base / _TWO)


def _doubled(f: Folders) -> None:
    """The norm in both shards."""
    found: dict[str, Any] = {}
    for shard in (_ONE, _TWO):
        f.tensors(lambda t: found.update(t), f.base / shard)
    for shard in (_ONE, _TWO):
        f.tensors(lambda t: t.setdefault(_NORM, found[_NORM]), f.base / shard)


def _both(f: Folders) -> None:
    content = f.model.read_bytes()
    f.shard()
    f.model.write_bytes(content)


def _stray(f: Folders) -> None:
    write_header(f.base / "model-00003-of-00003.safetensors", {}, b"")


def _without_index(f: Folders) -> None:
    f.shard()
    (f.base / INDEX).unlink()


def _adapter_inside(f: Folders) -> None:
    for file in f.style.iterdir():
        shutil.copy(file, f.base)


def _pickle_base(f: Folders) -> None:
    f.model.rename(f.base / "pytorch_model.bin")


def _zero_gate(t: dict[str, Any]) -> None:
    dtype, shape, raw = t[_GATE]
    t[_GATE] = (dtype, shape, b"\0" * len(raw))


def _int_gate(t: dict[str, Any]) -> None:
    _, shape, raw = t[_GATE]
    t[_GATE] = ("I8", shape, raw[: len(raw) // 4])


def _reshape_gate(t: dict[str, Any]) -> None:
    dtype, (rows, columns), raw = t[_GATE]
    t[_GATE] = (dtype, [columns, rows], raw)


def _tokens(change: Any) -> Any:
    def build(f: Folders) -> None:
        path = f.base / "tokenizer.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return build


def _no_end(f: Folders) -> None:
    added = json.loads((f.base / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(t["id"]): {"content": t["content"]} for t in added[:-1]}
    f.json(
        "base/tokenizer_config.json", added_tokens_decoder=decoder, tokenizer_class="Qwen2Tokenizer"
    )


def _no_tokenizer(f: Folders) -> None:
    (f.base / "tokenizer.json").unlink()


def _template(text: str) -> Any:
    return lambda f: (f.base / "chat_template.jinja").write_text(text)


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROWS: list[tuple[str, str, str, Any]] = [
    ("no base at all", "base", "no such folder", lambda f: shutil.rmtree(f.base)),
    ("base a file", "base", "not a folder",
     lambda f: (shutil.rmtree(f.base), f.base.write_text("x"))),
    ("base empty", "config.json", "is missing",
     lambda f: (shutil.rmtree(f.base), f.base.mkdir())),
    ("base an adapter", CONFIG, "adapter's folder",
     lambda f: (shutil.rmtree(f.base), shutil.copytree(f.style, f.base))),
    ("base without weights", MODEL, "is missing", lambda f: f.model.unlink()),
    ("base a pickle", "pytorch_model.bin", "pickle", _pickle_base),
    ("base truncated", MODEL, "ends at byte",
     lambda f: f.model.write_bytes(f.model.read_bytes()[:-1000])),
    ("base of lfs pointers", MODEL, "git lfs pull",
     lambda f: f.bytes(f"base/{MODEL}", b"version https://git-lfs.github.com/spec/v1\n")),
    ("base a pipe", MODEL, "named pipe", lambda f: (f.model.unlink(), os.mkfifo(f.model))),
    ("base with trailing bytes", MODEL, "after the last",
     lambda f: f.model.write_bytes(f.model.read_bytes() + b"x")),
    ("a shard missing", _TWO, "is missing", _sharded(lambda f: (f.base / _TWO).unlink())),
    ("a shard truncated", _TWO, "ends at byte",
     _sharded(lambda f: (f.base / _TWO).write_bytes((f.base / _TWO).read_bytes()[:-9]))),
    ("a shard a pointer", _ONE, "git lfs pull",
     _sharded(lambda f: f.bytes(f"base/{_ONE}", b"version https://git-lfs.github.com/spec/v1\n"))),
    ("shards swapped", INDEX, "does not hold it", _sharded(_swap_shards)),
    ("a tensor in both shards", INDEX, _NORM, _sharded(_doubled)),
    ("a stray shard", "model-00003-of-00003.safetensors", "does not name", _sharded(_stray)),
    ("a stray shard beside a single file", "model-00003-of-00003.safetensors", "two checkpoints",
     _stray),
    ("two checkpoints", MODEL, "two checkpoints", _both),
    ("shards without an index", INDEX, "is missing", _without_index),
    ("index leaves a tensor out", INDEX, _NORM, _index(lambda m: m.pop(_NORM))),
    ("index names a ghost", INDEX, "ghost", _index(lambda m: m.update(ghost=_ONE))),
    ("index points outside", INDEX, "../x.safetensors",
     _index(lambda m: m.update({_NORM: "../x.safetensors"}))),
    ("index points at an absolute path", INDEX, "/etc/passwd",
     _index(lambda m: m.update({_NORM: "/etc/passwd"}))),
    ("index points at a pickle", INDEX, "a.bin", _index(lambda m: m.update({_NORM: "a.bin"}))),
    ("index points at a number", INDEX, _NORM, _index(lambda m: m.update({_NORM: 3}))),
    ("index points at numbers", INDEX, "no file's name",
     _index(lambda m: m.update({_NORM: 3, _GATE: 4}))),
    ("index of 50,000 shards", "x99.safetensors", "is missing",
     _index(lambda m: m.update({f"a{n}": f"x{n}.safetensors" for n in range(50_000)}))),
    ("1,500 stray shards", "model-00099-of-00002.safetensors", "does not name",
     _sharded(lambda f: [(f.base / f"model-{n:05}-of-00002.safetensors").touch()
                         for n in range(3, 1503)])),
    ("index points at a list", INDEX, _NORM, _index(lambda m: m.update({_NORM: [_ONE]}))),
    ("index empty", INDEX, "weight_map", _index(lambda m: m.clear())),
    ("index without a map", INDEX, "weight_map",
     _sharded(lambda f: f.bytes(f"base/{INDEX}", b"{}"))),
    ("index not JSON", INDEX, "line 1", _sharded(lambda f: f.bytes(f"base/{INDEX}", b"nope"))),
    ("index with a tensor twice", INDEX, "twice",
     _sharded(lambda f: f.bytes(f"base/{INDEX}", b'{"weight_map":{"a":"b","a":"c"}}'))),
    ("NaN in the base", MODEL, _GATE, lambda f: f.poke(_GATE, float("nan"), path=f.model)),
    ("Inf in the base", MODEL, _NORM, lambda f: f.poke(_NORM, float("inf"), path=f.model)),
    ("a matrix of zeros", MODEL, _GATE, _tensors(_zero_gate)),
    ("integers without a word", MODEL, _GATE, _tensors(_int_gate)),
    ("a matrix transposed", MODEL, _GATE, _tensors(_reshape_gate)),
    ("a tensor missing", "base", _GATE, _tensors(lambda t: t.pop(_GATE))),
    ("a norm missing", "base", "q_norm",
     _tensors(lambda t: t.pop("model.layers.0.self_attn.q_norm.weight"))),
    ("the head missing", "base", "lm_head.weight", _tensors(lambda t: t.pop("lm_head.weight"))),
    ("a layer missing", "config.json", "num_hidden_layers",
     _tensors(lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n])),
    ("one layer claimed", "config.json", "num_hidden_layers", _config(num_hidden_layers=1)),
    ("five layers claimed", "config.json", "num_hidden_layers", _config(num_hidden_layers=5)),
    ("layers a string", "config.json", "num_hidden_layers", _config(num_hidden_layers="2")),
    ("layers 10^9", "config.json", "1000000000 layers", _config(num_hidden_layers=10**9)),
    ("layers 10^30", "config.json", "num_hidden_layers", _config(num_hidden_layers=10**30)),
    ("layers missing", "config.json", "num_hidden_layers", _config(num_hidden_layers=...)),
    ("another width claimed", MODEL, "claims", _config(hidden_size=64)),
    ("another vocabulary claimed", MODEL, "model.embed_tokens.weight", _config(vocab_size=300)),
    ("more heads claimed", MODEL, "q_proj", _config(num_attention_heads=8)),
    ("more kv heads claimed", MODEL, "k_proj", _config(num_key_value_heads=4)),
    ("another head size claimed", MODEL, "q_proj", _config(head_dim=16)),
    ("another mlp claimed", MODEL, "gate_proj", _config(intermediate_size=128)),
    ("kinds of attention for other layers", "config.json", "layer_types",
     _config(layer_types=["full_attention"] * 7)),
    ("kinds of attention a string", "config.json", "layer_types", _config(layer_types="full")),
    ("a window that is not there", "config.json", "layer_types",
     _config(layer_types=["sliding_attention"] * 2, sliding_window=None)),
    ("a window that is switched off", "config.json", "layer_types",
     _config(layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=False)),
    ("an encoder claimed", "config.json", "is_encoder_decoder", _config(is_encoder_decoder=True)),
    ("biases claimed and missing", "base",
     "k_proj.bias': is missing; transformers would fill it with zeros",
     _config(attention_bias=True)),
    ("a bias without a place", MODEL, "o_proj.bias': has no place", _tensors(
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": t[_NORM]}))),
    ("a norm of another family", MODEL, "'model.layers.1.mlp.norm.weight': has no place", _tensors(
        lambda t: t.update({"model.layers.1.mlp.norm.weight": t[_NORM]}))),
    ("tied, and the head differs", "config.json", "tie_word_embeddings",
     _config(tie_word_embeddings=True)),
    ("tie a string", "config.json", "tie_word_embeddings", _config(tie_word_embeddings="false")),
    ("no model type", "config.json", "model_type", _config(model_type=...)),
    ("config not JSON", "config.json", "line 1", lambda f: f.bytes("base/config.json", b"{]")),
    ("config with NaN", "config.json", "NaN", _config(rope_theta=float("nan"))),
    ("remote code", "config.json", "auto_map", _config(auto_map={"AutoModel": "evil.M"})),
    ("a kernel from the hub", "config.json", "attn_implementation",
     _config(attn_implementation="evil/kernel")),
    ("a kernel from the hub, inside", "config.json", "_attn_implementation",
     _config(_attn_implementation={"": "evil/kernel"})),
    ("weights under another name", "config.json", "'other.safetensors'",
     lambda f: (shutil.copy(f.model, f.base / "other.safetensors"),
                f.json("base/config.json", transformers_weights="other.safetensors"))),
    ("weights of another folder", "config.json", "transformers_weights",
     _config(transformers_weights="../style/adapter_model.safetensors")),
    ("quantised, without a method", "config.json", "quantization_config",
     _config(quantization_config={"bits": 4})),
    ("quantised by a string", "config.json", "quantization_config",
     _config(quantization_config="4bit")),
    ("an adapter in the base's folder", CONFIG, "unasked", _adapter_inside),
    ("EOS beyond the vocabulary", "generation_config.json", "eos_token_id",
     _generation(eos_token_id=[151645])),
    ("EOS a string", "generation_config.json", "eos_token_id", _generation(eos_token_id="</s>")),
    ("EOS negative", "generation_config.json", "eos_token_id", _generation(eos_token_id=-1)),
    ("temperature a string", "generation_config.json", "temperature",
     _generation(temperature="0.7")),
    ("generation settings not JSON", "generation_config.json", "line 1",
     lambda f: f.bytes("base/generation_config.json", b"{eos:2}")),
    ("no tokenizer", "base", "no tokenizer", _no_tokenizer),
    ("tokenizer not JSON", "tokenizer.json", "line 1",
     lambda f: f.bytes("base/tokenizer.json", b"<html>")),
    ("added tokens a string", "tokenizer.json", "added_tokens",
     _tokens(lambda t: t.update(added_tokens="<x>"))),
    ("one id of two tokens", "tokenizer.json", "to 'a' and 'x'",
     _tokens(lambda t: t["model"]["vocab"].update(x=t["model"]["vocab"]["a"]))),
    ("tokenizer without a vocabulary", "tokenizer.json", "vocab",
     _tokens(lambda t: t["model"].pop("vocab"))),
    ("tokenizer of another model", "tokenizer.json", "99999",
     _tokens(lambda t: t["model"]["vocab"].update(x=99999))),
    ("an added token beyond", "tokenizer.json", "70000",
     _tokens(lambda t: t["added_tokens"][0].update(id=70000))),
    ("tokenizer ids of strings", "tokenizer.json", "no ids",
     _tokens(lambda t: t["model"]["vocab"].update(x="y"))),
    ("a padding token without a row", "tokenizer_config.json", "'[PAD]'",
     lambda f: f.json("base/tokenizer_config.json", pad_token="[PAD]")),
    ("extra tokens without rows", "tokenizer_config.json", "'<two>'",
     lambda f: f.json("base/tokenizer_config.json", extra_special_tokens={
         "a": "<one>", "b": {"content": "<two>"}})),
    ("decoded tokens that move the others", "tokenizer_config.json", "'<x>'",
     lambda f: f.json("base/tokenizer_config.json", added_tokens_decoder={
         "5": {"content": "<x>"}})),
    ("decoded tokens without their end", "tokenizer_config.json", "'<|im_end|>'", _no_end),
    ("added tokens that move the others", "added_tokens.json", "'<y>'",
     lambda f: f.json("base/added_tokens.json", **{"<y>": 3})),
    ("added tokens without rows", "added_tokens.json", "'<y>'",
     lambda f: f.json("base/added_tokens.json", **{"<y>": 259})),
    ("another tokenizer file", "tokenizer_config.json", "'tokenizer.5.0.0.json'",
     lambda f: f.json("base/tokenizer_config.json",
                      fast_tokenizer_files=["tokenizer.5.0.0.json"])),
    ("tokenizer code", "tokenizer_config.json", "auto_map",
     lambda f: f.json("base/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})),
    ("template that loops", "chat_template.jinja", "seconds", _template(_LOOP)),
    ("template that fills memory", "chat_template.jinja", "one word",
     _template("{{ 'a' * 40000000000 }}")),
    ("template that prints megabytes", "chat_template.jinja", "one word",
     _template("{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}")),
    ("template that does not parse", "chat_template.jinja", "line 2", _template("a\n{% if %}")),
    ("template that reaches for classes", "chat_template.jinja", "sandbox",
     _template("{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    ("template not UTF-8", "chat_template.jinja", "UTF-8",
     lambda f: f.bytes("base/chat_template.jinja", b"\xff\xfe\xff")),
    ("a template that hides the folder's", "additional_chat_templates/default.jinja", "instead",
     lambda f: ((f.base / "additional_chat_templates").mkdir(),
                f.bytes("base/additional_chat_templates/default.jinja", b"x"))),
    ("template a number", "tokenizer_config.json", "chat_template",
     lambda f: ((f.base / "chat_template.jinja").unlink(missing_ok=True),
                f.json("base/tokenizer_config.json", chat_template=3))),
]  # fmt: skip
