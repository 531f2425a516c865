"""One session of measuring as values: what was measured, on what, at which commit.

Knows how to describe; nothing of judging or of the terminal.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.bench.cells import CellResult
from harness.bench.device import fingerprint, software
from harness.bench.measuring import Measurer
from harness.bench.results import Results
from harness.stack import AdapterStack

__all__ = ["commit_here", "describe_stack", "results_of"]

#: Of `config.json`: what the work depends on. Names, token ids and versions do not belong to it.
_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "sliding_window", "use_sliding_window",
)  # fmt: skip


def results_of(
    measurer: Measurer,
    cells: Iterable[CellResult],
    skipped: Mapping[str, str] | None = None,
    *,
    in_turn: bool = False,
    commit: Mapping[str, Any] | None = None,
    interrupted: str = "",
) -> Results:
    """Everything that this session measured, with what it was measured on."""
    ceilings = measurer.ceilings
    return Results(
        cells={cell.key: cell for cell in cells},
        skipped=dict(skipped or {}),
        fingerprint=fingerprint(measurer.device),
        conditions=_conditions(measurer),
        software=software(measurer.device),
        ceilings=ceilings.as_json() if ceilings is not None else {},
        stack=describe_stack(measurer.engine.stack),
        load_s=measurer.load_s,
        in_turn=in_turn,
        commit=commit_here() if commit is None else commit,
        moment=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        interrupted=interrupted,
    )


def _conditions(measurer: Measurer) -> dict[str, Any]:
    """What was measured, in sizes: two bases of one shape take the same time."""
    config = measurer.engine.model.config.to_dict()
    sizes = {name: config[name] for name in _SIZES if config.get(name) is not None}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]
    adapters = {a.name: measurer.adapter_size(a.name)[0] for a in measurer.engine.stack.adapters}
    return {"model": digest, "adapter_parameters": adapters, "dtype": measurer.dtype}


def describe_stack(stack: AdapterStack) -> dict[str, Any]:
    """The stack in words, marked where its base is random numbers."""
    return {
        "name": stack.name,
        "random": stack.random,
        "base": stack.base.source,
        "adapters": {adapter.name: adapter.source for adapter in stack.adapters},
        "modes": {mode.name: mode.formula for mode in stack.modes},
    }


def commit_here() -> dict[str, Any]:
    """The commit of what runs, as pytest-benchmark records it; empty outside git.

    That is the checkout that this code lies in, where git tracks it (two checkouts that are
    compared share a working directory), else the working directory's.
    """

    def git(*words: str) -> str:
        # `status` would take the index' lock to refresh it, and a commit made meanwhile would fail.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        folder = Path(__file__).parent
        try:
            git("ls-files", "--error-unmatch", Path(__file__).name)
        except subprocess.CalledProcessError:
            folder = Path.cwd()
        return {
            "id": git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI", "HEAD"),
            "branch": os.environ.get("GITHUB_REF_NAME") or git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"id": os.environ["GITHUB_SHA"]} if os.environ.get("GITHUB_SHA") else {}
