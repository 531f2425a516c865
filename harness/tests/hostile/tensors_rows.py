"""Adapters whose tensors are not those of a plain LoRA on this base."""

from __future__ import annotations

import struct
from typing import Any

from harness.tests.hostile.folders import A0, B0, Q0, WEIGHTS, Folders

_PREFIX = "base_model.model."


def _tensors(change: Any) -> Any:
    return lambda f: f.tensors(change)


def _add(name: str, shape: tuple[int, ...] = (4, 4)) -> Any:
    count = 1
    for size in shape:
        count *= size
    raw = struct.pack(f"<{count}f", *([0.01] * count))
    return _tensors(lambda t: t.update({name: ("F32", list(shape), raw)}))


def _rename(change: Any) -> Any:
    def apply(t: dict[str, Any]) -> None:
        items = list(t.items())
        t.clear()
        t.update({change(name): value for name, value in items})

    return _tensors(apply)


def _rename_one(old: str, new: str) -> Any:
    return _rename(lambda name: new if name == old else name)


def _zero(which: str) -> Any:
    def apply(t: dict[str, Any]) -> None:
        for name, (dtype, shape, raw) in t.items():
            if which in name:
                t[name] = (dtype, shape, b"\0" * len(raw))

    return _tensors(apply)


def _reshape(name: str, shape: list[int]) -> Any:
    return _tensors(lambda t: t.update({name: (t[name][0], shape, t[name][2])}))


def _rank(rows: int) -> Any:
    def apply(t: dict[str, Any]) -> None:
        dtype, (rank, width), raw = t[A0]
        t[A0] = (dtype, [rows, width], raw[: 4 * rows * width] if rows < rank else raw * 2)

    return _tensors(apply)


def _narrow(dtype: str, value: int) -> Any:
    """Element 5 of A0 as *dtype* (two bytes) with the bits *value*; the rest is 1."""

    def apply(t: dict[str, Any]) -> None:
        _, shape, _ = t[A0]
        one = 0x3F80 if dtype == "BF16" else 0x3C00
        raw = struct.pack(f"<{shape[0] * shape[1]}H", *[one] * (shape[0] * shape[1]))
        t[A0] = (dtype, shape, raw[:10] + struct.pack("<H", value) + raw[12:])

    return _tensors(apply)


def _double(t: dict[str, Any]) -> None:
    _, shape, raw = t[B0]
    wide = struct.unpack(f"<{len(raw) // 4}f", raw)
    t[B0] = ("F64", shape, struct.pack(f"<{len(wide)}d", *wide[:-1], float("nan")))


def _empty(f: Folders) -> None:
    f.tensors(lambda t: t.clear())


ROWS: list[tuple[str, str, str, Any]] = [
    ("NaN in A", WEIGHTS, A0, lambda f: f.poke(A0, float("nan"))),
    ("NaN in B", WEIGHTS, B0, lambda f: f.poke(B0, float("nan"))),
    ("Inf in B", WEIGHTS, B0, lambda f: f.poke(B0, float("inf"))),
    ("-Inf in A", WEIGHTS, A0, lambda f: f.poke(A0, float("-inf"))),
    ("1e30 in B", WEIGHTS, B0, lambda f: f.poke(B0, 1e30)),
    ("-20000 in A", WEIGHTS, A0, lambda f: f.poke(A0, -20_000.0)),
    ("NaN in bf16", WEIGHTS, A0, _narrow("BF16", 0xFFC1)),
    ("Inf in bf16", WEIGHTS, A0, _narrow("BF16", 0x7F80)),
    ("NaN in fp16", WEIGHTS, A0, _narrow("F16", 0x7E00)),
    ("Inf in fp16", WEIGHTS, A0, _narrow("F16", 0xFC00)),
    ("NaN in fp64", WEIGHTS, B0, _tensors(_double)),
    ("every B zero", WEIGHTS, B0[-14:], _zero("lora_B")),
    ("every A zero", WEIGHTS, "lora_A", _zero("lora_A")),
    ("everything zero", WEIGHTS, "all zeros", _zero("lora")),
    ("no tensor at all", WEIGHTS, "no LoRA factors", _empty),
    ("A without B", WEIGHTS, Q0, _tensors(lambda t: t.pop(B0))),
    ("B without A", WEIGHTS, Q0, _tensors(lambda t: t.pop(A0))),
    ("a module left out", WEIGHTS, Q0, _tensors(lambda t: (t.pop(A0), t.pop(B0)))),
    ("prefix missing everywhere", WEIGHTS, "lacks the prefix",
     _rename(lambda n: n.removeprefix(_PREFIX))),
    ("prefix missing once", WEIGHTS, Q0, _rename_one(A0, A0.removeprefix(_PREFIX))),
    ("half a prefix", WEIGHTS, A0[11:], _rename_one(A0, A0[11:])),
    ("prefix twice", WEIGHTS, "prefix twice", _rename_one(A0, _PREFIX + A0)),
    ("adapter name in the keys", WEIGHTS, "lora_A.default.weight",
     _rename(lambda n: n.replace(".weight", ".default.weight"))),
    ("kohya keys", WEIGHTS, "lora_down", _rename(lambda n: n.replace("lora_A", "lora_down"))),
    ("diffusers keys", WEIGHTS, "another library",
     _rename(lambda n: n.removeprefix(_PREFIX).replace(".lora_A", ".lora.down"))),
    ("unknown factor", WEIGHTS, "lora_C", _add(f"{_PREFIX}{Q0}.lora_C.weight")),
    ("a key of nonsense", WEIGHTS, "nonsense", _add("nonsense")),
    ("a key with an escape", WEIGHTS, r"\x1b[31m", _add("\x1b[31mred")),
    ("a key with a line break", WEIGHTS, r"'x\n:", _add("x\n::error file=a::b")),
    ("a key with right-to-left", WEIGHTS, r"\u202e", _add("\u202egnp.exe")),
    ("a key of a megabyte", WEIGHTS, "characters)", _add("k" * 1_000_000)),
    ("lm_head overwritten", WEIGHTS, "lm_head.weight", _add(f"{_PREFIX}lm_head.weight", (259, 32))),
    ("norm overwritten", WEIGHTS, "model.norm.weight", _add(f"{_PREFIX}model.norm.weight", (32,))),
    ("base weight without a prefix", WEIGHTS, f"{Q0}.weight", _add(f"{Q0}.weight", (32, 32))),
    ("base copy that differs", WEIGHTS, "lm_head.base_layer.weight",
     _add(f"{_PREFIX}lm_head.base_layer.weight", (259, 32))),
    ("base copy of nothing", WEIGHTS, "ghost.base_layer.weight",
     _add(f"{_PREFIX}ghost.base_layer.weight")),
    ("a bias", WEIGHTS, "q_proj.bias", _add(f"{_PREFIX}{Q0}.bias", (32,))),
    ("a lora bias", WEIGHTS, "lora_B.bias", _add(f"{_PREFIX}{Q0}.lora_B.bias", (32,))),
    ("a DoRA magnitude", WEIGHTS, "lora_magnitude_vector",
     _add(f"{_PREFIX}{Q0}.lora_magnitude_vector", (32,))),
    ("a saved module", WEIGHTS, "modules_to_save",
     _add(f"{_PREFIX}lm_head.modules_to_save.weight", (259, 32))),
    ("rank of A smaller", WEIGHTS, Q0, _rank(2)),
    ("rank of A larger", WEIGHTS, Q0, _rank(8)),
    ("a layer called 0²0", WEIGHTS, "'model.layers.0²0.",
     _rename(lambda n: n.replace("layers.1.", "layers.0²0."))),
    ("a layer of 400 digits", WEIGHTS, "model.layers.9999",
     _rename(lambda n: n.replace("layers.1.", f"layers.{'9' * 400}."))),
    ("A transposed", WEIGHTS, Q0, _reshape(A0, [32, 4])),
    ("A of one dimension", WEIGHTS, A0, _reshape(A0, [128])),
    ("A of three dimensions", WEIGHTS, A0, _reshape(A0, [4, 8, 4])),
    ("A without elements", WEIGHTS, A0,
     _tensors(lambda t: t.update({A0: ("F32", [4, 0], b"")}))),
    ("A for a wider base", WEIGHTS, Q0,
     _tensors(lambda t: t.update({A0: ("F32", [4, 64], t[A0][2] * 2)}))),
    ("B for a wider base", WEIGHTS, Q0,
     _tensors(lambda t: t.update({B0: ("F32", [64, 4], t[B0][2] * 2)}))),
    ("layers that the base lacks", WEIGHTS, "model.layers.7",
     _rename(lambda n: n.replace("layers.1.", "layers.7."))),
    ("another model's modules", WEIGHTS, "transformer.h.0",
     _rename(lambda n: n.replace("model.layers.", "transformer.h."))),
    ("a factor in int8", WEIGHTS, A0, lambda f: f.retype(A0, "I8", 1)),
    ("a factor in uint8", WEIGHTS, A0, lambda f: f.retype(A0, "U8", 1)),
    ("a factor in fp8", WEIGHTS, A0, lambda f: f.retype(A0, "F8_E4M3", 1)),
    ("a factor in e5m2", WEIGHTS, A0, lambda f: f.retype(A0, "F8_E5M2", 1)),
    ("a factor in int64", WEIGHTS, A0, lambda f: f.retype(A0, "I64", 8)),
    ("a factor of booleans", WEIGHTS, A0, lambda f: f.retype(A0, "BOOL", 1)),
    ("embedding factors of a linear layer", WEIGHTS, Q0,
     _rename(lambda n: n.replace(f"{Q0}.lora_A.weight", f"{Q0}.lora_embedding_A"))),
    ("factors of a linear layer and of an embedding", WEIGHTS, Q0,
     _tensors(lambda t: t.update({
         f"{_PREFIX}{Q0}.lora_embedding_A": t[A0], f"{_PREFIX}{Q0}.lora_embedding_B": t[B0]}))),
    ("targets narrowed", WEIGHTS, "model.layers.0.mlp",
     lambda f: f.config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    ("targets widened", WEIGHTS, "model.embed_tokens",
     lambda f: f.config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                        "up_proj", "down_proj", "embed_tokens"])),
    ("targets excluded", WEIGHTS, Q0, lambda f: f.config(exclude_modules=["q_proj"])),
    ("layers excluded", WEIGHTS, "model.layers.1", lambda f: f.config(layers_to_transform=[0])),
    ("rank pattern that is not in the file", WEIGHTS, Q0,
     lambda f: f.config(rank_pattern={"q_proj": 2})),
    ("r of the config doubled", WEIGHTS, "the config says 8", lambda f: f.config(r=8)),
    ("transposed by the config", WEIGHTS, "model.layers.0",
     lambda f: f.config(fan_in_fan_out=True)),
]  # fmt: skip
