"""Adapter configurations that json.loads, PEFT or a reader would take for something else."""

from __future__ import annotations

import json
import os
from typing import Any

from harness.tests.hostile.folders import CONFIG, Folders


def _set(**changes: Any) -> Any:
    return lambda f: f.config(**changes)


def _raw(change: Any) -> Any:
    def build(f: Folders) -> None:
        path = f.style / CONFIG
        path.write_bytes(change(path.read_bytes()))

    return build


def _after(text: str) -> Any:
    """The object with *text* as its last member."""
    return _raw(lambda b: b.rstrip()[:-1] + b"," + text.encode() + b"}")


def _replace_by(make: Any) -> Any:
    def build(f: Folders) -> None:
        (f.style / CONFIG).unlink()
        make(f.style / CONFIG)

    return build


_EVIL = r"(([a-z._0-9])+)+X"
ROWS: list[tuple[str, str, str, Any]] = [
    ("config absent", "style", CONFIG, lambda f: (f.style / CONFIG).unlink()),
    ("config empty", CONFIG, "line 1, column 1", _raw(lambda b: b"")),
    ("config truncated", CONFIG, "line ", _raw(lambda b: b[: len(b) // 2])),
    ("config with a bom", CONFIG, "byte-order mark", _raw(lambda b: b"\xef\xbb\xbf" + b)),
    ("config in utf-16", CONFIG, "byte-order mark", _raw(lambda b: b.decode().encode("utf-16"))),
    ("config in utf-16 without a bom", CONFIG, "line 1",
     _raw(lambda b: b.decode().encode("utf-16-le"))),
    ("config in latin-1", CONFIG, "not UTF-8", _raw(lambda b: b.replace(b"LORA", b"L\xd6RA"))),
    ("config with NUL bytes", CONFIG, "line 1", _raw(lambda b: b"\0" * 100)),
    ("config with a comment", CONFIG, "line 1, column 2", _raw(lambda b: b"{// x\n" + b[1:])),
    ("config with a trailing comma", CONFIG, "line ", _raw(lambda b: b.rstrip()[:-1] + b",}")),
    ("config in single quotes", CONFIG, "line 1", _raw(lambda b: b.replace(b'"', b"'"))),
    ("config is a list", CONFIG, "a list, not an object", _raw(lambda b: b"[" + b + b"]")),
    ("config is a string", CONFIG, "a str, not an object", _raw(lambda b: b'"LORA"')),
    ("config is null", CONFIG, "not an object", _raw(lambda b: b"null")),
    ("two objects", CONFIG, "Extra data", _raw(lambda b: b + b)),
    ("alpha twice", CONFIG, "'lora_alpha' twice", _after('"lora_alpha": 800')),
    ("r twice, escaped", CONFIG, "'r' twice", _after(r'"\u0072": 4')),
    ("a nested key twice", CONFIG, "'q' twice", _after('"x": {"q": 1, "q": 2}')),
    ("alpha NaN", CONFIG, "NaN", _set(lora_alpha=float("nan"))),
    ("alpha Infinity", CONFIG, "Infinity", _set(lora_alpha=float("inf"))),
    ("alpha 1e999", CONFIG, "1e999",
     _raw(lambda b: b.replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999'))),
    ("alpha of 400 digits", CONFIG, "lora_alpha", _set(lora_alpha=10**400)),
    ("alpha of 5000 digits", CONFIG, "digits", _after('"x": ' + "9" * 5000)),
    ("alpha negative", CONFIG, "lora_alpha", _set(lora_alpha=-8)),
    ("alpha zero", CONFIG, "lora_alpha", _set(lora_alpha=0)),
    ("alpha a string", CONFIG, "lora_alpha", _set(lora_alpha="8")),
    ("alpha a boolean", CONFIG, "lora_alpha", _set(lora_alpha=True)),
    ("alpha null", CONFIG, "lora_alpha", _set(lora_alpha=None)),
    ("alpha missing", CONFIG, "lora_alpha", _set(lora_alpha=...)),
    ("alpha absurd", CONFIG, "lora_alpha", _set(lora_alpha=1e9)),
    ("a hundred levels deep", CONFIG, "levels deep", _after('"x": ' + "[" * 100 + "]" * 100)),
    ("a million levels deep", CONFIG, "levels deep", _raw(lambda b: b'{"x":' * 150_000)),
    ("two megabytes", CONFIG, "at most", _after('"x": "' + "a" * 2_000_000 + '"')),
    ("half a surrogate pair", CONFIG, "surrogate", _after(r'"x": "\ud800"')),
    ("r zero", CONFIG, "r: 0", _set(r=0)),
    ("r negative", CONFIG, "r: -4", _set(r=-4)),
    ("r 10^9", CONFIG, "r: 1000000000", _set(r=10**9)),
    ("r a float", CONFIG, "r: 4.0", _set(r=4.0)),
    ("r a string", CONFIG, "r: '4'", _set(r="4")),
    ("r a boolean", CONFIG, "r: True", _set(r=True)),
    ("rslora a string", CONFIG, "use_rslora", _set(use_rslora="false")),
    ("rslora a number", CONFIG, "use_rslora", _set(use_rslora=1)),
    ("parameters true", CONFIG, "target_parameters", _set(target_parameters=True)),
    ("parameters by number", CONFIG, "target_parameters", _set(target_parameters=[1])),
    ("dora a string", CONFIG, "use_dora", _set(use_dora="false")),
    ("fan_in_fan_out a string", CONFIG, "fan_in_fan_out", _set(fan_in_fan_out="no")),
    ("dropout a string", CONFIG, "lora_dropout", _set(lora_dropout="0.1")),
    ("dropout 2", CONFIG, "lora_dropout", _set(lora_dropout=2)),
    ("start a number", CONFIG, "init_lora_weights", _set(init_lora_weights=3)),
    ("bias unknown", CONFIG, "bias", _set(bias="some")),
    ("bias all", CONFIG, "bias", _set(bias="all")),
    ("targets missing", CONFIG, "target_modules", _set(target_modules=...)),
    ("targets empty", CONFIG, "target_modules", _set(target_modules=[])),
    ("targets a number", CONFIG, "target_modules", _set(target_modules=3)),
    ("targets of numbers", CONFIG, "target_modules", _set(target_modules=["q_proj", 1])),
    ("targets named twice", CONFIG, "target_modules", _set(target_modules=["q_proj", "q_proj"])),
    ("targets a broken pattern", CONFIG, "target_modules", _set(target_modules="(q_proj")),
    ("targets an endless pattern", CONFIG, "target_modules", _set(target_modules=_EVIL)),
    ("exclusion an endless pattern", CONFIG, "exclude_modules", _set(exclude_modules=_EVIL)),
    ("rank pattern endless", CONFIG, "rank_pattern", _set(rank_pattern={_EVIL: 4})),
    ("alpha pattern endless", CONFIG, "alpha_pattern",
     _set(alpha_pattern={"([a-z._0-9]+)*Z": 4})),
    ("layers pattern endless", CONFIG, "layers_pattern",
     _set(layers_pattern=[_EVIL], layers_to_transform=[0])),
    ("20,000 patterns", CONFIG, "20000 patterns",
     _raw(lambda b: b.replace(b'"rank_pattern": {}', b'"rank_pattern": ' + json.dumps(
         {f"a{n}": 4 for n in range(20_000)}, separators=(",", ":")).encode()))),
    ("30,000 unknown keys", CONFIG, "a99: is not known",
     _after(",".join(f'"a{n}":1' for n in range(30_000)))),
    ("a pattern of 20,000 characters", CONFIG, "rank_pattern",
     _set(rank_pattern={"a" * 20_000: 4})),
    ("a pattern of huge counts", CONFIG, "rank_pattern",
     _set(rank_pattern={"a{99999999999999}": 4})),
    ("a pattern of deep groups", CONFIG, "rank_pattern", _set(rank_pattern={"(" * 4000: 4})),
    ("rank pattern null", CONFIG, "rank_pattern: null", _set(rank_pattern=None)),
    ("rank pattern a list", CONFIG, "rank_pattern", _set(rank_pattern=["q_proj"])),
    ("rank pattern of strings", CONFIG, "rank_pattern", _set(rank_pattern={"q_proj": "4"})),
    ("alpha pattern of null", CONFIG, "alpha_pattern", _set(alpha_pattern={"q_proj": None})),
    ("a layers pattern alone", CONFIG, "layers_pattern", _set(layers_pattern="layers")),
    ("layers beside a pattern", CONFIG, "layers_to_transform",
     _set(target_modules=r".*\.(q|v)_proj", layers_to_transform=[0])),
    ("arrow, an empty table", CONFIG, "arrow_config", _set(arrow_config={})),
    ("montecarlo, an empty table", CONFIG, "monteclora_config", _set(monteclora_config={})),
    ("layers of strings", CONFIG, "layers_to_transform", _set(layers_to_transform=["0"])),
    ("peft_type missing", CONFIG, "peft_type", _set(peft_type=...)),
    ("peft_type another", CONFIG, "peft_type: 'IA3'", _set(peft_type="IA3")),
    ("peft_type unknown", CONFIG, "no type that PEFT knows", _set(peft_type="LORAX")),
    ("peft_type a list", CONFIG, "peft_type", _set(peft_type=["LORA"])),
    ("dora", CONFIG, "use_dora", _set(use_dora=True)),
    ("lora_bias", CONFIG, "lora_bias", _set(lora_bias=True)),
    ("pissa", CONFIG, "pissa", _set(init_lora_weights="pissa")),
    ("modules to save", CONFIG, "modules_to_save", _set(modules_to_save=["lm_head"])),
    ("trainable tokens", CONFIG, "trainable_token_indices", _set(trainable_token_indices=[0])),
    ("layer replication", CONFIG, "layer_replication", _set(layer_replication=[[0, 2]])),
    ("an unknown key", CONFIG, "frobnicate", _set(frobnicate=1)),
    ("an unknown key with an escape", CONFIG, r"\x1b[2J", _set(**{"\x1b[2J": 1})),
    ("auto_map", CONFIG, "auto_map", _set(auto_map={"AutoModel": "evil.Model"})),
    ("custom_modules", CONFIG, "custom_modules", _set(custom_modules={"Linear": "evil.Linear"})),
    ("megatron_core", CONFIG, "megatron_core", _set(megatron_core="evil")),
    ("megatron_config", CONFIG, "megatron_config", _set(megatron_config={"a": 1})),
    ("auto_mapping", CONFIG, "auto_mapping",
     _set(auto_mapping={"base_model_class": "M", "parent_library": "evil"})),
    ("runtime_config a list", CONFIG, "runtime_config", _set(runtime_config=[1])),
    ("base a URL", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="https://example.invalid/base")),
    ("base a file URL", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="file:///etc")),
    ("base a device", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="/dev/zero")),
    ("base in /proc", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="/proc/self/cwd")),
    ("base a traversal", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="adapter/../../../etc")),
    ("base climbing to the root", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="../" * 40 + "etc")),
    ("base a number", CONFIG, "base_model_name_or_path", _set(base_model_name_or_path=3)),
    ("base with a NUL", CONFIG, "base_model_name_or_path", _set(base_model_name_or_path="a\0b")),
    ("base of 10,000 characters", CONFIG, "base_model_name_or_path",
     _set(base_model_name_or_path="a" * 10_000)),
    ("config a folder", CONFIG, "a folder", _replace_by(lambda p: p.mkdir())),
    ("config a pipe", CONFIG, "named pipe", _replace_by(os.mkfifo)),
    ("config a link to nowhere", CONFIG, "points nowhere",
     _replace_by(lambda p: p.symlink_to("x"))),
    ("config a link to itself", CONFIG, "points nowhere",
     _replace_by(lambda p: p.symlink_to(CONFIG))),
    ("config /dev/zero", CONFIG, "a device", _replace_by(lambda p: p.symlink_to("/dev/zero"))),
    ("config a model's", CONFIG, "a model's config",
     _raw(lambda b: json.dumps({"architectures": ["Qwen3ForCausalLM"]}).encode())),
]  # fmt: skip
