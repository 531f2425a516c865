"""The ways in which a stack's folders are changed at random: one draw, one change on disk.

Each change takes the folder that holds `base`, `style` and `instruct`, and a hypothesis `draw`.
Some break what they touch, some only write it another way, and many make files that are sound each
and do not belong together. No torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from harness.tests.hostile.folders import CONFIG, INDEX, MODEL, WEIGHTS, read_header, write_header

JSONS = (
    f"style/{CONFIG}", f"instruct/{CONFIG}", "base/config.json", "base/generation_config.json",
    "base/tokenizer.json", "base/tokenizer_config.json",
)  # fmt: skip
TENSORS = (f"style/{WEIGHTS}", f"instruct/{WEIGHTS}", f"base/{MODEL}")
FILES = (*JSONS, *TENSORS, "base/chat_template.jinja")
VALUES = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 4.0, 0.5, 1e30, 10**12, "", "4", "false", "q_proj", [], {},
     [0], [1], ["q_proj"], ["down_proj", "q_proj"], {"q_proj": 2}, {"down_proj": 16}, "all-linear",
     r".*\.(q|v)_proj", "none", "gaussian", "../base", "../instruct", "<|im_end|>", "float16"]
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I32", "I8", "U8", "F8_E4M3", "BOOL", "X")
FACTORS = (-1.0, 0.0, 0.5, 1e-30, 3.0, 1e5, float("nan"), float("inf"))

Draw = Callable[[Any], Any]
Change = Callable[[Path, Draw], None]
Stored = dict[str, tuple[str, list[int], bytes]]


def one_of(draw: Draw, values: Any) -> Any:
    found = list(values)
    if not found:
        raise LookupError("nothing is left to choose from")
    return draw(st.sampled_from(found))


# Bytes ---------------------------------------------------------------------------------------
def flip(root: Path, draw: Draw) -> None:
    path = root / one_of(draw, FILES)
    raw = bytearray(path.read_bytes())
    bit = draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def truncate(root: Path, draw: Draw) -> None:
    path = root / one_of(draw, FILES)
    raw = path.read_bytes()
    path.write_bytes(raw[: draw(st.integers(0, len(raw) - 1))])


def extend(root: Path, draw: Draw) -> None:
    path = root / one_of(draw, FILES)
    path.write_bytes(path.read_bytes() + draw(st.binary(min_size=1, max_size=64)))


def overwrite(root: Path, draw: Draw) -> None:
    """A stretch of zeros, or of another file, as a failed copy leaves it."""
    path, other = root / one_of(draw, FILES), root / one_of(draw, FILES)
    raw = bytearray(path.read_bytes())
    start = draw(st.integers(0, len(raw) - 1))
    size = min(len(raw) - start, draw(st.integers(1, 4096)))
    source = bytes(size) if draw(st.booleans()) else other.read_bytes()[start : start + size]
    raw[start : start + len(source)] = source
    path.write_bytes(raw)


# Files and folders ---------------------------------------------------------------------------
def remove(root: Path, draw: Draw) -> None:
    (root / one_of(draw, FILES)).unlink()


def exchange(root: Path, draw: Draw) -> None:
    """Another file of the stack in its place."""
    path = root / one_of(draw, FILES)
    shutil.copy(root / one_of(draw, FILES), path.with_suffix(".x"))
    path.with_suffix(".x").replace(path)


def replace(root: Path, draw: Draw) -> None:
    """Something that is no file, a link, or a file of nothing, in its place."""
    path = root / one_of(draw, FILES)
    kind = one_of(draw, ("empty", "folder", "pipe", "nowhere", "itself", "device", "link"))
    path.rename(path.with_suffix(".moved"))
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        aims = {"nowhere": "gone", "itself": path.name, "device": "/dev/zero",
                "link": path.with_suffix(".moved").name}  # fmt: skip
        path.symlink_to(aims[kind])


def add(root: Path, draw: Draw) -> None:
    """One more file in a folder: of another checkpoint, of a training run, or of nobody."""
    folder = root / one_of(draw, ("base", "style", "instruct"))
    name = one_of(draw, (
        MODEL, INDEX, WEIGHTS, CONFIG, "adapter_model.bin", "pytorch_model.bin", "README.md",
        "model-00001-of-00002.safetensors", "consolidated.safetensors", "tokenizer.model",
        "added_tokens.json", "special_tokens_map.json", "chat_template.json", "merge_proof.json",
        "additional_chat_templates/default.jinja", "stack.lock.json", "training_args.bin",
    ))  # fmt: skip
    if not (folder / name).exists():
        (folder / name).parent.mkdir(exist_ok=True)
        content = one_of(draw, (b"", b"{}", b"x", b"\x80\x04N.", b'{"zzz": 5000}'))
        (folder / name).write_bytes(content)


def nest(root: Path, draw: Draw) -> None:
    """A folder's files one folder down, moved or copied."""
    folder = root / one_of(draw, ("base", "style", "instruct"))
    inner = folder / one_of(draw, ("checkpoint-90", folder.name, "original"))
    moved = draw(st.booleans())
    files = sorted(file for file in folder.iterdir() if file.is_file())
    inner.mkdir()
    for file in files:
        shutil.copy(file, inner)
        if moved:
            file.unlink()


def mix(root: Path, draw: Draw) -> None:
    """One folder's files, or some of them, copied into another's."""
    names = ("base", "style", "instruct")
    source, target = root / one_of(draw, names), root / one_of(draw, names)
    for file in sorted(source.iterdir()):
        if source != target and file.is_file() and draw(st.booleans()):
            shutil.copy(file, target)


def swap_folders(root: Path, draw: Draw) -> None:
    one, two = draw(st.permutations(("base", "style", "instruct")))[:2]
    (root / one).rename(root / "x")
    (root / two).rename(root / one)
    (root / "x").rename(root / two)


# JSON ----------------------------------------------------------------------------------------
def _edited(root: Path, draw: Draw, edit: Callable[[Any], None]) -> None:
    """Change one object of a JSON file: the outer one, or one inside."""
    path = root / one_of(draw, JSONS)
    raw = json.loads(path.read_text())
    place = raw
    for _ in range(draw(st.integers(0, 3))):
        inside = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inside:
            break
        place = place[one_of(draw, sorted(inside)[:20])]
    edit(place)
    path.write_text(json.dumps(raw))


def drop_key(root: Path, draw: Draw) -> None:
    _edited(root, draw, lambda place: place.pop(one_of(draw, sorted(place)[:60])))


def retype_key(root: Path, draw: Draw) -> None:
    _edited(
        root, draw, lambda place: place.update({one_of(draw, sorted(place)[:60]): draw(VALUES)})
    )


def misspell_key(root: Path, draw: Draw) -> None:
    def edit(place: dict[str, Any]) -> None:
        key = one_of(draw, sorted(place)[:60])
        change = one_of(draw, (str.upper, str.title, lambda k: f"{k} ", lambda k: k[:-1]))
        place[change(key)] = place.pop(key)

    _edited(root, draw, edit)


def exchange_values(root: Path, draw: Draw) -> None:
    def edit(place: dict[str, Any]) -> None:
        one, two = one_of(draw, sorted(place)[:60]), one_of(draw, sorted(place)[:60])
        place[one], place[two] = place[two], place[one]

    _edited(root, draw, edit)


def repeat_key(root: Path, draw: Draw) -> None:
    path = root / one_of(draw, JSONS)
    text = path.read_text().rstrip()
    key = one_of(draw, sorted(json.loads(text)))
    path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw(VALUES))}}}")


def rewrite(root: Path, draw: Draw) -> None:
    """The same values, written another way; some of the ways are no JSON."""
    path = root / one_of(draw, JSONS)
    text = path.read_text()
    ways: Mapping[str, Callable[[], bytes]] = {
        "compact": lambda: json.dumps(json.loads(text), separators=(",", ":")).encode(),
        "indented": lambda: json.dumps(json.loads(text), indent="\t", sort_keys=True).encode(),
        "unescaped": lambda: json.dumps(json.loads(text), ensure_ascii=False).encode(),
        "crlf": lambda: text.replace("\n", "\r\n").encode(),
        "padded": lambda: b"\n\n \t" + text.encode() + b"\n" * 9,
        "bom": lambda: b"\xef\xbb\xbf" + text.encode(),
        "utf-16": lambda: text.encode("utf-16"),
        "commented": lambda: text.encode() + b"// end\n",
        "python": lambda: repr(json.loads(text)).encode(),
        "listed": lambda: b"[" + text.encode() + b"]",
        "twice": lambda: text.encode() * 2,
        "quoted": lambda: json.dumps(text).encode(),
    }
    path.write_bytes(ways[one_of(draw, ways)]())


# The header of a weights file ----------------------------------------------------------------
def _header(root: Path, draw: Draw, edit: Callable[[Any], Any]) -> None:
    """Change a header; the data stays where it is."""
    path = root / one_of(draw, TENSORS)
    header, data = read_header(path)
    changed = edit(header)
    write_header(path, header if changed is None else changed, data)


def _names(header: Mapping[str, Any]) -> list[str]:
    return sorted(set(header) - {"__metadata__"})


def lose_entry(root: Path, draw: Draw) -> None:
    _header(root, draw, lambda h: h.pop(one_of(draw, sorted(h))) and None)


def repeat_entry(root: Path, draw: Draw) -> None:
    def edit(header: Any) -> bytes:
        key = one_of(draw, sorted(header))
        text = json.dumps(header)
        return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(header[key])}}}".encode()

    _header(root, draw, edit)


def relabel(root: Path, draw: Draw) -> None:
    """Another dtype or shape claimed for the same bytes."""

    def edit(header: Any) -> None:
        entry = header[one_of(draw, _names(header))]
        shape = entry["shape"]
        if draw(st.booleans()):
            entry["dtype"] = one_of(draw, DTYPES)
        else:
            entry["shape"] = one_of(draw, (
                shape[::-1], [*shape, 1], [math.prod(shape)], [1, *shape], [0], [],
            ))  # fmt: skip

    _header(root, draw, edit)


def share_bytes(root: Path, draw: Draw) -> None:
    """One tensor's range given to another too, or the two ranges exchanged."""

    def edit(header: Any) -> None:
        one, two = header[one_of(draw, _names(header))], header[one_of(draw, _names(header))]
        first, second = one["data_offsets"], two["data_offsets"]
        one["data_offsets"] = second
        if draw(st.booleans()):
            two["data_offsets"] = first

    _header(root, draw, edit)


def swap_names(root: Path, draw: Draw) -> None:
    def edit(header: Any) -> None:
        one, two = one_of(draw, _names(header)), one_of(draw, _names(header))
        header[one], header[two] = header[two], header[one]

    _header(root, draw, edit)


def metadata(root: Path, draw: Draw) -> None:
    values = ({}, {"format": "np"}, {"format": "tf"}, {"a": 1}, None, {"x": "\u202e\x1b[2J"})
    _header(root, draw, lambda h: h.update(__metadata__=one_of(draw, values)))


# Tensors, in a file that stays sound ---------------------------------------------------------
def _stored(path: Path) -> Stored:
    header, data = read_header(path)
    return {
        name: (header[name]["dtype"], header[name]["shape"],
               data[slice(*header[name]["data_offsets"])])
        for name in sorted(_names(header), key=lambda n: header[n]["data_offsets"])
    }  # fmt: skip


def _write(path: Path, stored: Stored) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, raw) in stored.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(raw)]}
        start += len(raw)
    write_header(path, entries, b"".join(raw for _, _, raw in stored.values()))


def _tensors(root: Path, draw: Draw, edit: Callable[[Stored, str], None]) -> None:
    """Change one tensor of a file, named in the call, and write the file anew."""
    path = root / one_of(draw, TENSORS)
    stored = _stored(path)
    edit(stored, one_of(draw, sorted(stored)))
    _write(path, stored)


def drop_tensor(root: Path, draw: Draw) -> None:
    _tensors(root, draw, lambda stored, name: stored.pop(name) and None)


def drop_module(root: Path, draw: Draw) -> None:
    """Both factors of a module, or every tensor of a layer."""

    def edit(stored: Stored, name: str) -> None:
        stem = name.rpartition(".lora_")[0] or name.rpartition(".")[0]
        for other in [n for n in stored if n.startswith(stem)]:
            del stored[other]

    _tensors(root, draw, edit)


def rename_tensor(root: Path, draw: Draw) -> None:
    changes: Mapping[str, Callable[[str], str]] = {
        "prefix gone": lambda n: n.removeprefix("base_model.model."),
        "prefix twice": lambda n: f"base_model.model.{n}",
        "half a prefix": lambda n: n.removeprefix("base_model."),
        "another layer": lambda n: n.replace("layers.0.", "layers.1."),
        "a layer beyond": lambda n: n.replace("layers.1.", "layers.7."),
        "the other factor": lambda n: n.replace("lora_A", "lora_C").replace("lora_B", "lora_A"),
        "a base weight": lambda n: n.replace(".lora_A.weight", ".weight"),
        "a base copy": lambda n: n.replace(".lora_B.weight", ".base_layer.weight"),
        "adapter's name": lambda n: n.replace(".weight", ".default.weight"),
        "a bias": lambda n: n.replace(".weight", ".bias"),
        "an embedding": lambda n: n.replace("lora_A.weight", "lora_embedding_A"),
        "magnitude": lambda n: n.replace("lora_A.weight", "lora_magnitude_vector"),
        "capitals": str.upper,
    }
    change = changes[one_of(draw, changes)]
    everywhere = draw(st.booleans())

    def edit(stored: Stored, name: str) -> None:
        items = list(stored.items())
        stored.clear()
        for key, value in items:
            stored.setdefault(change(key) if everywhere or key == name else key, value)

    _tensors(root, draw, edit)


def double_tensor(root: Path, draw: Draw) -> None:
    """A copy under one more name: a base weight's, or another module's."""

    def edit(stored: Stored, name: str) -> None:
        other = one_of(draw, (
            "lm_head.weight", "base_model.model.lm_head.weight",
            "base_model.model.model.norm.weight", "base_model.model.lm_head.base_layer.weight",
            "base_model.model.lm_head.lora_A.weight", "model.layers.2.mlp.up_proj.weight",
            f"{name}_copy",
        ))  # fmt: skip
        stored.setdefault(other, stored[name])

    _tensors(root, draw, edit)


def swap_contents(root: Path, draw: Draw) -> None:
    """Two tensors of one shape exchanged: of one file, or one taken from another file."""
    other = _stored(root / one_of(draw, TENSORS))

    def edit(stored: Stored, name: str) -> None:
        if draw(st.booleans()) and other.get(name, ("", [], b""))[1] == stored[name][1]:
            stored[name] = other[name]
            return
        alike = [n for n in sorted(stored) if stored[n][1] == stored[name][1]]
        second = one_of(draw, alike)
        stored[name], stored[second] = stored[second], stored[name]

    _tensors(root, draw, edit)


def transpose(root: Path, draw: Draw) -> None:
    """The numbers really transposed, not relabelled."""

    def edit(stored: Stored, name: str) -> None:
        dtype, shape, raw = stored[name]
        if len(shape) == 2:
            rows, columns = shape
            width = len(raw) // (rows * columns)
            cells = [raw[i : i + width] for i in range(0, len(raw), width)]
            turned = [cells[r * columns + c] for c in range(columns) for r in range(rows)]
            stored[name] = (dtype, [columns, rows], b"".join(turned))

    _tensors(root, draw, edit)


def _numbers(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def cast(root: Path, draw: Draw) -> None:
    """One tensor, or all, in another floating dtype: sound, and the values those of that dtype."""
    dtype = one_of(draw, ("F64", "F16", "BF16"))
    everywhere = draw(st.booleans())

    def edit(stored: Stored, name: str) -> None:
        for key, (old, shape, raw) in list(stored.items()):
            if old != "F32" or not (everywhere or key == name):
                continue
            if dtype == "BF16":  # cut off, not rounded: a bfloat16 all the same
                new = b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))
            else:
                new = struct.pack(
                    f"<{len(raw) // 4}{'d' if dtype == 'F64' else 'e'}", *_numbers(raw)
                )
            stored[key] = (dtype, shape, new)

    _tensors(root, draw, edit)


def scale(root: Path, draw: Draw) -> None:
    """Every number, or one, times a factor."""
    factor, alone = one_of(draw, FACTORS), draw(st.booleans())

    def edit(stored: Stored, name: str) -> None:
        dtype, shape, raw = stored[name]
        if dtype == "F32" and raw:
            numbers = _numbers(raw)
            at = draw(st.integers(0, len(numbers) - 1))
            numbers = [x * factor if i == at or not alone else x for i, x in enumerate(numbers)]
            stored[name] = (dtype, shape, struct.pack(f"<{len(numbers)}f", *numbers))

    _tensors(root, draw, edit)


def cut_rank(root: Path, draw: Draw) -> None:
    """An adapter of a smaller rank, in one module or all, with or without a word in the config."""
    folder = root / one_of(draw, ("style", "instruct"))
    stored = _stored(folder / WEIGHTS)
    rank = draw(st.integers(1, 3))
    chosen = one_of(draw, (*sorted({n.rpartition(".lora_")[0] for n in stored}), ""))
    for name, (dtype, (rows, columns), raw) in list(stored.items()):
        if not name.startswith(chosen):
            continue
        width = len(raw) // (rows * columns)
        if ".lora_A." in name:
            stored[name] = (dtype, [rank, columns], raw[: rank * columns * width])
        else:
            lines = [raw[r * columns * width :][: rank * width] for r in range(rows)]
            stored[name] = (dtype, [rows, rank], b"".join(lines))
    _write(folder / WEIGHTS, stored)
    if draw(st.booleans()):
        raw = json.loads((folder / CONFIG).read_text())
        if chosen:
            raw["rank_pattern"] = {chosen.removeprefix("base_model.model."): rank}
        else:
            raw["r"] = rank
        (folder / CONFIG).write_text(json.dumps(raw))


# The base's shards ---------------------------------------------------------------------------
def shard(root: Path, draw: Draw) -> None:
    """The base in two shards: whole, or with the shards, the index or both at odds."""
    base = root / "base"
    stored = _stored(base / MODEL)
    names = sorted(stored)
    cut = draw(st.integers(1, len(names) - 1))
    files = {f"model-0000{n}-of-00002.safetensors": part
             for n, part in enumerate((names[:cut], names[cut:]), 1)}  # fmt: skip
    weight_map: dict[str, Any] = {name: file for file, part in files.items() for name in part}
    for file, part in files.items():
        _write(base / file, {name: stored[name] for name in part})
    first, second = (base / file for file in files)
    name = one_of(draw, names)
    fault = one_of(draw, (
        "none", "swapped", "one gone", "one twice", "tensor in both", "left out", "ghost",
        "other shard", "outside", "single beside", "stray", "no index", "pickle", "total_size",
    ))  # fmt: skip
    if fault == "swapped":
        first.rename(base / "x")
        second.rename(first)
        (base / "x").rename(second)
    elif fault == "one gone":
        first.unlink()
    elif fault == "one twice":
        shutil.copy(first, second)
    elif fault == "tensor in both":
        _write(first, {name: stored[name]} | {n: stored[n] for n in files[first.name]})
        _write(second, {n: stored[n] for n in files[second.name]} | {name: stored[name]})
    elif fault == "left out":
        del weight_map[name]
    elif fault == "ghost":
        weight_map[f"{name}.ghost"] = weight_map[name]
    elif fault == "other shard":
        weight_map[name] = one_of(draw, sorted(files))
    elif fault == "outside":
        weight_map[name] = one_of(draw, (f"../style/{WEIGHTS}", "/dev/zero", "", 3, f"./{first}"))
    elif fault == "stray":
        shutil.copy(first, base / "model-00003-of-00003.safetensors")
    elif fault == "pickle":
        first.rename(base / "pytorch_model.bin")
    if fault != "single beside":
        (base / MODEL).unlink()
    if fault != "no index":
        size = 1 if fault == "total_size" else sum(len(raw) for _, _, raw in stored.values())
        (base / INDEX).write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
        )


CHANGES: Mapping[str, Change] = {
    change.__name__: change
    for change in (
        flip, truncate, extend, overwrite, remove, exchange, replace, add, nest, mix, swap_folders,
        drop_key, retype_key, misspell_key, exchange_values, repeat_key, rewrite, lose_entry,
        repeat_entry, relabel, share_bytes, swap_names, metadata, drop_tensor, drop_module,
        rename_tensor, double_tensor, swap_contents, transpose, cast, scale, cut_rank, shard,
    )
}  # fmt: skip
