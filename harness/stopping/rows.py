"""The rows of head and embedding that EOS ids have: tied, dead, overwritten, adapted.

A row of the head is what decides an id's logit. Reads tensors in blocks of rows; knows nothing of
tokenizers beyond ids, nor of models in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.adapter_files import AdapterFiles
from harness.checkpoint_files import CheckpointFiles
from harness.ending import EndingFiles
from harness.files.tensor_files import same_bytes
from harness.stopping.causes import CauseKind, Finding
from harness.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import torch

__all__ = [
    "adapter_findings",
    "head_findings",
    "head_name",
    "lost_head_finding",
    "merged_row_finding",
]

ROWS = "EOS rows of the head"
RELOAD = "head at reload"
TOUCHED = "adapters and the EOS rows"

_BLOCK = 4096


def head_name(checkpoint: CheckpointFiles) -> str | None:
    """The tensor that the head uses after loading: the embedding's where they are tied."""
    head, embedding = _named(checkpoint, "lm_head"), _embedding(checkpoint)
    return embedding or head if checkpoint.tied else head or embedding


def _embedding(checkpoint: CheckpointFiles) -> str | None:
    return _named(checkpoint, "embed_tokens") or checkpoint.embedding_name


def _named(checkpoint: CheckpointFiles, part: str) -> str | None:
    for name in checkpoint.places:
        if name == f"{part}.weight" or name.endswith(f".{part}.weight"):
            return name
    return None


def head_findings(ending: EndingFiles, checkpoint: CheckpointFiles) -> list[Finding]:
    """Whether the EOS rows live, and whether loading keeps the head."""
    return [_reload_finding(ending, checkpoint), _norm_finding(ending, checkpoint)]


def _reload_finding(ending: EndingFiles, checkpoint: CheckpointFiles) -> Finding:
    head, embedding = _named(checkpoint, "lm_head"), _embedding(checkpoint)
    if not checkpoint.tied:
        if head is None:
            verdict = Verdict(
                name=RELOAD,
                outcome=Outcome.FAILED,
                evidence=("there is no lm_head, and config.json ties none: it would be random",),
                remedy="set tie_word_embeddings to true, or save the head",
            )
        else:
            verdict = Verdict(
                name=RELOAD, outcome=Outcome.HELD, evidence=("the head has weights of its own",)
            )
    elif head is None or embedding is None:
        verdict = Verdict(
            name=RELOAD, outcome=Outcome.HELD, evidence=("the head is the embedding, as tied",)
        )
    elif same_bytes(
        checkpoint.places[head],
        checkpoint.entry(head),
        checkpoint.places[embedding],
        checkpoint.entry(embedding),
    ):
        verdict = Verdict(
            name=RELOAD,
            outcome=Outcome.HELD,
            evidence=("the head lies beside the embedding that it is tied to, and is equal",),
        )
    else:
        verdict = Verdict(
            name=RELOAD,
            outcome=Outcome.FAILED,
            evidence=(
                "lm_head.weight is in the files and differs from the embedding, and "
                "tie_word_embeddings is true: loaders that go by the config put the embedding over "
                "the head (transformers 5.23 keeps both, with a warning)",
                *_moved(checkpoint, head, embedding, ending.eos),
            ),
            remedy="set tie_word_embeddings to false in config.json, or save the model with the "
            "head that it was trained with",
        )
    return Finding(kind=CauseKind.HEAD, verdict=verdict)


def _moved(
    checkpoint: CheckpointFiles, head: str, embedding: str, ids: tuple[int, ...]
) -> Iterator[str]:
    first, second = checkpoint.tensor(head), checkpoint.tensor(embedding)
    if first.shape != second.shape:
        yield f"their shapes are {list(first.shape)} and {list(second.shape)}"
        return
    for token_id in ids:
        if token_id < first.shape[0]:
            a, b = first[token_id].double(), second[token_id].double()
            change = float((a - b).norm() / max(float(a.norm()), 1e-30))
            yield f"the EOS row {token_id} moves by {change:.1%} of its norm"


def _norm_finding(ending: EndingFiles, checkpoint: CheckpointFiles) -> Finding:
    name = head_name(checkpoint)
    if name is None:
        verdict = Verdict(name=ROWS, outcome=Outcome.SKIPPED, evidence=("no head is in the files",))
        return Finding(kind=CauseKind.EOS_ROW, verdict=verdict)
    norms = _row_norms(checkpoint, name)
    middle = sorted(norms)[len(norms) // 2]
    lines, dead = [], False
    for token_id in ending.eos:
        if not 0 <= token_id < len(norms):
            continue
        norm = norms[token_id]
        below = sum(other < norm for other in norms) / len(norms)
        lines.append(
            f"row {token_id}: norm {norm:.3g}, above {below:.0%} of the vocabulary's "
            f"(median {middle:.3g})"
        )
        dead = dead or not math.isfinite(norm) or norm == 0.0
    where = "tied to the embedding" if checkpoint.tied else "of its own"
    verdict = Verdict(
        name=ROWS,
        outcome=Outcome.FAILED if dead else Outcome.HELD,
        evidence=(f"the head is {where}: {name}", *lines),
        remedy="copy the base's weights again: this row cannot give EOS a logit" if dead else None,
    )
    return Finding(kind=CauseKind.EOS_ROW, verdict=verdict)


def _row_norms(checkpoint: CheckpointFiles, name: str) -> list[float]:
    """The Euclidean norm of every row, in float32 blocks."""
    tensor: torch.Tensor = checkpoint.tensor(name)
    norms: list[float] = []
    for start in range(0, tensor.shape[0], _BLOCK):
        norms += tensor[start : start + _BLOCK].float().norm(dim=1).tolist()
    return norms


def adapter_findings(
    ending: EndingFiles, checkpoint: CheckpointFiles, adapters: Mapping[str, AdapterFiles]
) -> list[Finding]:
    """Which adapters touch the rows: LoRA on head or embedding, saved modules, single tokens."""
    lines, faults = [], []
    for name, adapter in adapters.items():
        modules = [m for m in adapter.pairs if m.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens")]
        raw = adapter.config.raw
        saved = [m for m in raw.get("modules_to_save") or () if m in ("lm_head", "embed_tokens")]
        tokens = raw.get("trainable_token_indices")
        if modules:
            lines.append(f"{name} adapts {', '.join(modules)}: every row moves, EOS too")
            if checkpoint.tied:
                faults.append(
                    f"{name} adapts {modules[0]}, which is tied: merging with PEFT changes head "
                    "and embedding at once"
                )
        if saved:
            lines.append(f"{name} replaces {', '.join(saved)} as a whole (modules_to_save)")
        if tokens:
            lines.append(f"{name} trains single rows (trainable_token_indices): {tokens}")
        lines += [
            f"{name} carries a copy of {copy}, written over the base at load"
            for copy in adapter.base_copies
            if copy.rsplit(".", 2)[-2] in ("lm_head", "embed_tokens")
        ]
    verdict = Verdict(
        name=TOUCHED,
        outcome=Outcome.HELD,
        evidence=(
            *(lines or ["no adapter touches head or embedding: EOS is learned in the layers"]),
            *faults,
        ),
    )
    return [Finding(kind=CauseKind.EOS_ROW, verdict=verdict)]


def lost_head_finding(
    ending: EndingFiles, checkpoint: CheckpointFiles, merged: CheckpointFiles
) -> Finding | None:
    """A base with a head of its own whose merged copy ties it: reloading makes it the embedding."""
    before, after = head_name(checkpoint), head_name(merged)
    if checkpoint.tied or not merged.tied or before is None or after is None:
        return None
    first, second = checkpoint.tensor(before), merged.tensor(after)
    lines = [
        "the base has a head of its own, the merged copy ties it to the embedding: reloading puts "
        "the embedding over the head"
    ]
    if first.shape == second.shape:
        for token_id in ending.eos:
            if 0 <= token_id < first.shape[0]:
                a, b = first[token_id].double(), second[token_id].double()
                change = float((a - b).norm() / max(float(a.norm()), 1e-30))
                lines.append(f"the EOS row {token_id} moves by {change:.1%} of its norm")
    verdict = Verdict(
        name=f"merged copy: {RELOAD}",
        outcome=Outcome.FAILED,
        evidence=tuple(lines),
        remedy="set tie_word_embeddings to false in the merged copy's config.json, and save its "
        "lm_head",
    )
    return Finding(kind=CauseKind.HEAD, verdict=verdict)


def merged_row_finding(
    ending: EndingFiles,
    checkpoint: CheckpointFiles,
    adapters: Mapping[str, AdapterFiles],
    merged: CheckpointFiles,
) -> str | None:
    """A line if a merged copy's EOS rows are not the base's, though no adapter touches them."""
    touched = {m.rsplit(".", 1)[-1] for adapter in adapters.values() for m in adapter.pairs}
    before, after = head_name(checkpoint), head_name(merged)
    if {"lm_head", "embed_tokens"} & touched or before is None or after is None:
        return None
    first, second = checkpoint.tensor(before), merged.tensor(after)
    if first.shape != second.shape:
        return f"the head has {list(second.shape)}, the base's {list(first.shape)}"
    for token_id in ending.eos:
        if 0 <= token_id < first.shape[0]:
            a, b = first[token_id].to(second.dtype), second[token_id]
            if not bool((a == b).all()):
                return f"the EOS row {token_id} of the head is not the base's"
    return None
