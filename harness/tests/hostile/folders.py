"""A tiny sound stack on disk, and the ways in which its files are broken. No torch."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Folders:
    """A copy of the tiny stack: `base`, `style`, `instruct` below `root`."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root = root
        for name in ("base", "style", "instruct"):
            shutil.copytree(source / name, root / name)
        self.base, self.style, self.instruct = (root / n for n in ("base", "style", "instruct"))
        self.weights = self.style / WEIGHTS
        self.model = self.base / MODEL
        self.arguments = [
            "--base-model", str(self.base), "--style-adapter", str(self.style),
            "--instruct-adapter", str(self.instruct),
        ]  # fmt: skip

    # JSON ------------------------------------------------------------------------------------
    def json(self, name: str, **changes: Any) -> None:
        """Change values of a JSON file; `...` removes a key."""
        path = self.root / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        raw |= changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    def config(self, **changes: Any) -> None:
        self.json(f"style/{CONFIG}", **changes)

    def text(self, name: str, change: Callable[[str], str]) -> None:
        path = self.root / name
        path.write_text(change(path.read_text()))

    def bytes(self, name: str, content: bytes) -> None:
        (self.root / name).write_bytes(content)

    # safetensors -----------------------------------------------------------------------------
    def header(self, change: Callable[[dict[str, Any]], Any], path: Path | None = None) -> None:
        """Change the header in place (or by what *change* returns); the data stays."""
        path = path or self.weights
        header, data = read_header(path)
        changed = change(header)
        write_header(path, changed if isinstance(changed, dict | list | bytes) else header, data)

    def tensors(
        self, change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any],
        path: Path | None = None,
    ) -> None:  # fmt: skip
        """Change `{name: (dtype, shape, bytes)}` and write a sound file of what is left."""
        path = path or self.weights
        header, data = read_header(path)
        metadata = header.pop("__metadata__", None)
        found = {
            name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for name, e in header.items()
        }
        change(found)
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        start = 0
        for name, (dtype, shape, raw) in found.items():
            entries[name] = {
                "dtype": dtype, "shape": shape, "data_offsets": [start, start + len(raw)],
            }  # fmt: skip
            start += len(raw)
        write_header(path, entries, b"".join(raw for _, _, raw in found.values()))

    def poke(self, tensor: str, value: float, *, path: Path | None = None, at: int = 5) -> None:
        """Write a float32 *value* over element *at* of *tensor*."""

        def change(found: dict[str, tuple[str, list[int], bytes]]) -> None:
            dtype, shape, raw = found[tensor]
            assert dtype == "F32"
            found[tensor] = (
                dtype, shape, raw[: 4 * at] + struct.pack("<f", value) + raw[4 * at + 4 :],
            )  # fmt: skip

        self.tensors(change, path)

    def retype(self, tensor: str, dtype: str, width: int) -> None:
        """The same tensor with *dtype*, zeros of the right number of bytes."""

        def change(found: dict[str, tuple[str, list[int], bytes]]) -> None:
            _, shape, _ = found[tensor]
            count = 1
            for size in shape:
                count *= size
            found[tensor] = (dtype, shape, b"\1" * (count * width))

        self.tensors(change)

    def shard(self) -> None:
        """Split the base into two shards with an index."""
        header, data = read_header(self.model)
        header.pop("__metadata__", None)
        names = sorted(header)
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        weight_map = {}
        for number, half in enumerate(halves, 1):
            file = f"model-0000{number}-of-00002.safetensors"
            entries, parts, start = {}, [], 0
            for name in half:
                raw = data[slice(*header[name]["data_offsets"])]
                entries[name] = header[name] | {"data_offsets": [start, start + len(raw)]}
                start += len(raw)
                parts.append(raw)
                weight_map[name] = file
            write_header(self.base / file, entries, b"".join(parts))
        self.model.unlink()
        (self.base / INDEX).write_text(
            json.dumps({"metadata": {"total_size": len(data)}, "weight_map": weight_map})
        )

    def index(self, change: Callable[[dict[str, str]], Any]) -> None:
        """Shard the base, then change its weight map."""
        self.shard()
        raw = json.loads((self.base / INDEX).read_text())
        change(raw["weight_map"])
        (self.base / INDEX).write_text(json.dumps(raw))
