"""What completions were made with: names, shapes, versions, and digests of every content.

Reads the stack's files once an engine, the base's from memory where they have not changed
(`harness.files.digests`). Knows nothing of snapshots or verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.adapter_files import adapter_digest
from harness.checkpoint_files import CheckpointFiles
from harness.files.digests import combined_digest, file_digests, text_digest
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine

__all__ = ["architecture", "base_digest", "composition", "contents_of", "made_with", "versions"]

_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
_CONFIG_FILES = ("config.json", "generation_config.json")


@cache
def versions() -> dict[str, str]:
    """The versions of what computes; `absent` where it is not installed."""
    found = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def made_with(engine: PeftEngine, mode: Mode) -> dict[str, str]:
    """Names and shapes: of the base, the mode, adapters from a hub, and where it ran."""
    base = engine.stack.base
    return {
        "base": f"{base.source}@{base.revision}" if base.revision else base.path.name,
        "architecture": architecture(engine.checkpoint.config),
        "composition": composition(mode),
        **{
            f"hub_{a.name}": f"{a.source}@{a.revision}" for a in engine.stack.adapters if a.revision
        },
        "device": engine.device,
        "dtype": engine.dtype,
        **versions(),
    }


def contents_of(engine: PeftEngine) -> dict[str, str]:
    """SHA-256 (hex) of the base, each adapter, the tokenizer and the chat template.

    Raises:
        InputError: a file of the stack is gone.
    """
    folder = engine.stack.base.path
    return {
        "base": base_digest(engine.checkpoint),
        **{f"adapter_{a.name}": adapter_digest(a.path) for a in engine.stack.adapters},
        "tokenizer": _files_digest(folder, _TOKENIZER_FILES),
        "template": text_digest(str(engine.tokenizer.chat_template or "")),
    }


def base_digest(checkpoint: CheckpointFiles) -> str:
    """SHA-256 (hex) over the base's weights, config and generation config, by file name."""
    shards = [shard.path.name for shard in checkpoint.shards]
    return _files_digest(checkpoint.folder, (*shards, *_CONFIG_FILES))


def _files_digest(folder: Path, names: tuple[str, ...]) -> str:
    there = [folder / name for name in names if (folder / name).is_file()]
    return combined_digest({path.name: digest for path, digest in file_digests(there).items()})


def architecture(config: Mapping[str, Any]) -> str:
    """The base's shape in a line, e.g. `qwen3, 36 layers of 4096, vocabulary 151936`."""
    return (
        f"{config.get('model_type', 'unknown')}, {config.get('num_hidden_layers', '?')} layers "
        f"of {config.get('hidden_size', '?')}, vocabulary {config.get('vocab_size', '?')}"
    )


def composition(mode: Mode) -> str:
    """Which adapters, with what weights, e.g. `base + style + 0.5·instruct`."""
    terms = [name if weight == 1 else f"{weight:g}·{name}" for name, weight in mode.weights]
    return " + ".join(["base", *terms])
