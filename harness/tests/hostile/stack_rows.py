"""Stacks whose folders are sound, and do not belong together. A row may give its own arguments."""

from __future__ import annotations

import json
import shutil
from typing import Any

from harness.tests.hostile.folders import CONFIG, WEIGHTS, Folders


def _pair(f: Folders, style: Any, instruct: Any) -> None:
    f.arguments[3], f.arguments[5] = str(style), str(instruct)


def _named(name: str) -> Any:
    return lambda f: f.arguments.__setitem__(slice(2, None), ["--adapter", f"{name}={f.style}"])


def _same_folder(f: Folders) -> None:
    _pair(f, f.style, f.style)


def _same_link(f: Folders) -> None:
    (f.root / "link").symlink_to(f.style)
    _pair(f, f.style, f.root / "link")


def _same_copy(f: Folders) -> None:
    shutil.copytree(f.style, f.root / "copy")
    _pair(f, f.style, f.root / "copy")


def _same_weights_other_alpha(f: Folders) -> None:
    _same_copy(f)
    f.json(f"copy/{CONFIG}", lora_alpha=4)


def _swapped(f: Folders) -> None:
    _pair(f, f.instruct, f.style)


def _swapped_below(f: Folders) -> None:
    for name in ("style", "instruct"):
        (f.root / f"stage_{name}").mkdir()
        (f.root / name).rename(f.root / f"stage_{name}" / "checkpoint-90")
    _pair(f, f.root / "stage_instruct/checkpoint-90", f.root / "stage_style/checkpoint-90")


def _other_shape(f: Folders) -> None:
    """A base with half the vocabulary and another width would be another model: here, its MLP."""
    config = json.loads((f.base / "config.json").read_text())
    f.tensors(
        lambda t: [
            t.update({n: (d, [s[0] * 2, s[1]], raw * 2)})
            for n, (d, s, raw) in list(t.items())
            if "gate_proj" in n or "up_proj" in n
        ] + [
            t.update({n: (d, [s[0], s[1] * 2], raw * 2)})
            for n, (d, s, raw) in list(t.items())
            if "down_proj" in n
        ],
        f.model,
    )  # fmt: skip
    f.json("base/config.json", intermediate_size=config["intermediate_size"] * 2)


def _merged_already(f: Folders) -> None:
    from harness.adapter_files import adapter_digest

    (f.base / "merge_proof.json").write_text(
        json.dumps({"kind": "merge", "adapters": [{"sha256": adapter_digest(f.style)}]})
    )


def _trained_on_merged(f: Folders) -> None:
    shutil.copytree(f.base, f.root / "merged")
    (f.root / "merged" / "merge_proof.json").write_text(json.dumps({"adapters": []}))
    f.json(f"instruct/{CONFIG}", base_model_name_or_path="../merged")


def _twice_by_name(f: Folders) -> None:
    f.arguments[2:] = ["--adapter", f"a={f.style}", "--adapter", f"a={f.instruct}"]


def _different_bases(f: Folders) -> None:
    shutil.copytree(f.base, f.root / "other")
    f.json(f"style/{CONFIG}", base_model_name_or_path="../base")
    f.json(f"instruct/{CONFIG}", base_model_name_or_path="../other")
    del f.arguments[:2]


def _no_base(f: Folders) -> None:
    for name in ("style", "instruct"):
        f.json(f"{name}/{CONFIG}", base_model_name_or_path="../gone")
    del f.arguments[:2]


def _both_broken(f: Folders) -> None:
    f.config(r=5)
    (f.instruct / WEIGHTS).unlink()
    f.json("base/config.json", num_hidden_layers=9)


def _locked(change: Any) -> Any:
    def build(f: Folders) -> None:
        from harness.cli import main

        lock = f.root / "stack.lock.json"
        assert main(["lock", *f.arguments, "--lock", str(lock)]) == 0
        change(f)
        f.arguments += ["--lock", str(lock)]

    return build


def _flip(name: str, at: int = -3) -> Any:
    def change(f: Folders) -> None:
        raw = bytearray((f.root / name).read_bytes())
        raw[at] ^= 1
        (f.root / name).write_bytes(raw)

    return change


def _lock_text(text: str) -> Any:
    return _locked(lambda f: (f.root / "stack.lock.json").write_text(text))


ROWS: list[tuple[str, str, str, Any]] = [
    ("one folder twice", "style", "same folder", _same_folder),
    ("one folder through a link", "style", "same folder", _same_link),
    ("one adapter copied", WEIGHTS, "same weights", _same_copy),
    ("one adapter copied, other alpha", WEIGHTS, "same weights", _same_weights_other_alpha),
    ("style and instruct swapped", "style", "swapped", _swapped),
    ("swapped, in checkpoints", "checkpoint-90", "swapped", _swapped_below),
    ("two under one name", "--adapter", "'a'", _twice_by_name),
    ("a name with a dot", "adapter", "'a.b'", _named("a.b")),
    ("a name of a mode", "adapter", "'stacked'", _named("stacked")),
    ("a name of ModuleDict's", "adapter", "'keys'", _named("keys")),
    ("a name of Module's", "adapter", "'half'", _named("half")),
    ("a name with a slash", "adapter", "'a/b'", _named("a/b")),
    ("a base of another shape", WEIGHTS, "down_proj", _other_shape),
    ("a base with the adapter in it", "merge_proof.json", "applied twice", _merged_already),
    ("an adapter of a merged base", CONFIG, "merged base", _trained_on_merged),
    ("adapters of different bases", CONFIG, "different bases", _different_bases),
    ("no base anywhere", CONFIG, "../gone", _no_base),
    ("everything broken: style", CONFIG.replace("config.json", "model"), "config says 5",
     _both_broken),
    ("everything broken: instruct", f"instruct/{WEIGHTS}", "is missing", _both_broken),
    ("everything broken: base", "base/config.json", "num_hidden_layers", _both_broken),
    ("locked, base weights changed", "base/model.safetensors", "has changed",
     _locked(_flip("base/model.safetensors"))),
    ("locked, adapter weights changed", f"style/{WEIGHTS}", "has changed",
     _locked(_flip(f"style/{WEIGHTS}"))),
    ("locked, alpha changed", f"style/{CONFIG}", "has changed",
     _locked(lambda f: f.config(lora_alpha=9))),
    ("locked, tokenizer changed", "base/tokenizer.json", "has changed",
     _locked(lambda f: f.text("base/tokenizer.json", lambda t: t + " "))),
    ("locked, template changed", "base/chat_template.jinja", "has changed",
     _locked(lambda f: f.text("base/chat_template.jinja", lambda t: t + " "))),
    ("locked, generation changed", "generation_config.json", "has changed",
     _locked(lambda f: f.json("base/generation_config.json", eos_token_id=[1]))),
    ("locked, a template came", "style/chat_template.jinja", "is new",
     _locked(lambda f: f.bytes("style/chat_template.jinja", b"x"))),
    ("locked, a file went", "generation_config.json", "is gone",
     _locked(lambda f: (f.base / "generation_config.json").unlink())),
    ("locked, other order", "stack.lock.json", "adapters",
     _locked(lambda f: f.arguments.__setitem__(
         slice(2, None), ["--adapter", f"x={f.style}", "--adapter", f"y={f.instruct}"]))),
    ("lock not JSON", "stack.lock.json", "line 1", _lock_text("x")),
    ("lock of another form", "stack.lock.json", "form", _lock_text('{"form": 99}')),
    ("lock without adapters", "stack.lock.json", "adapters", _lock_text('{"form": 1}')),
    ("lock with adapters a list", "stack.lock.json", "adapters",
     _lock_text('{"form": 1, "adapters": ["style", "instruct"]}')),
    ("lock with parts of numbers", "stack.lock.json", "adapters",
     _lock_text('{"form": 1, "adapters": {"style": 1, "instruct": 2}}')),
    ("lock with base of numbers", "stack.lock.json", "base",
     _lock_text('{"form": 1, "base": {"files": 3}, "adapters": {"style": {}, "instruct": {}}}')),
    ("lock absent", "gone.lock.json", "is missing",
     lambda f: f.arguments.extend(["--lock", str(f.root / "gone.lock.json")])),
]  # fmt: skip
