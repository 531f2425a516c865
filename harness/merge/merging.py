"""Several adapters into one checkpoint: checks, then a streamed write, then proof, then the name.

The order is what keeps it safe: nothing is written before every input and option is found sound,
and the output gets its name only after it was read back. Knows nothing of the command line.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint_files import INDEX_NAME, CheckpointFiles
from harness.errors import HarnessError, InputError
from harness.files.digests import file_digests
from harness.files.staging import staged_folder
from harness.files.strict_json import read_json_object
from harness.merge.factors import Source, adapter_names, check_weights
from harness.merge.inputs import Hashing, check_inputs, open_inputs
from harness.merge.places import check_space, copy_beside
from harness.merge.plan import MergePlan, changed_config, changed_index, make_plan
from harness.merge.proof import Verify, prove
from harness.merge.recipe import Recipe
from harness.merge.report import AdapterRecord, MergeReport
from harness.merge.storage import DTYPE_NAMES
from harness.merge.strategies import StrategyOptions, coefficients, find_strategy
from harness.merge.streaming import Flusher, Progress, default_workers, write_shards
from harness.merge.targets import check_saved_weights, place
from harness.stack import Adapter, Base

__all__ = ["RoundingLossError", "merge_lora_adapters"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VERIFY = ("none", "sampled", "full")


class RoundingLossError(HarnessError):
    """The storage dtype lost more of ΔW than was allowed; nothing was kept. Exit code 1."""

    def __init__(self, report: MergeReport, limit: float) -> None:
        self.report = report
        self.limit = limit
        super().__init__(
            f"rounding to {report.dtype} lost {report.rounding_loss:.3%} of ‖ΔW‖, "
            f"more than {limit:.3%}; nothing was written → choose --dtype float32, or serve the "
            "adapters unmerged (lora-stack flatten)"
        )


def merge_lora_adapters(
    base_model: str | Path,
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    *,
    merge_strategy: str = "sequential",
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    options: StrategyOptions | None = None,
    workers: int | None = None,
    verify: Verify = "sampled",
    max_rounding_loss: float | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write `W + merged ΔW` of one or more LoRA adapters as a checkpoint like the base's.

    The same inputs and options give the same bytes, with any number of workers and, for
    `sequential`, in any order of adapters. Sums are accumulated in float32 (float64 for weights
    stored as float32 or float64) and rounded once.

    Args:
        base_model: the base's folder or hub id.
        adapters: folders or hub ids, or a mapping from names to them.
        output: a new folder; it appears whole or not at all.
        merge_strategy: a name in `harness.merge.strategies.STRATEGIES`.
        weights: one finite number an adapter, in the order given.
        dtype: `bfloat16`, `float16` or `float32` for all floating tensors; None keeps each one's.
        options: density, rank, seed … of the strategies that have them.
        workers: threads; None for one a core and one more.
        verify: `sampled` reads back rows of each merged tensor and pieces of each other one;
            `full` every byte, with SHA-256 of the weights; `none` nothing.
        max_rounding_loss: the share of ‖ΔW‖ that the storage dtype may lose, e.g. 0.5.
        force: replace a non-empty output folder.
        trust_remote_code: merge folders that make loaders run code of theirs; it is copied along,
            and nothing of it runs here.
        progress: called with bytes done and bytes in all.

    Raises:
        InputError: anything wrong with options, inputs or the place; nothing was written.
        RoundingLossError: the loss is above *max_rounding_loss*; nothing was kept.
        ProofError: what was read back is not what it should be; nothing was kept.
    """
    begun = time.perf_counter()
    strategy = find_strategy(merge_strategy)
    options = options or StrategyOptions()
    stored = _stored_dtype(dtype)
    check_settings(verify, max_rounding_loss, workers)
    named = (
        {name: str(path) for name, path in adapters.items()}
        if isinstance(adapters, Mapping)
        else adapter_names(adapters)
    )
    if not named:
        raise InputError("no adapter is named", where="--adapters", remedy="name one or more")
    names = list(named)
    given = None if weights is None else check_weights(weights, names)
    factors = dict(zip(names, coefficients(strategy.name, given, len(names)), strict=True))
    target = Path(output)
    inputs = open_inputs(
        base_model, named, factors, target, force=force, trust_remote_code=trust_remote_code
    )
    checkpoint, sources = inputs.checkpoint, inputs.sources
    check_saved_weights(sources, strategy, factors)
    plan = make_plan(checkpoint, place(checkpoint, sources), dtype=stored)
    notes = check_inputs(inputs, trust_remote_code=trust_remote_code)
    sizes = ((checkpoint.folder / name).stat().st_size for name in inputs.beside)
    check_space(target, plan.size + sum(sizes))
    recipe = Recipe(strategy=strategy, coefficients=factors, options=options)
    threads = workers or default_workers()
    with (
        staged_folder(target, replace=force) as staged,
        Hashing(shard.path for shard in checkpoint.shards) as hashing,
        Flusher() as flusher,
    ):
        copy_beside(checkpoint.folder, staged, inputs.beside)
        notes += _write_texts(staged, checkpoint, plan, inputs.adapters)
        write_shards(staged, plan, recipe, workers=threads, flusher=flusher, progress=progress)
        tensors = (
            ()
            if verify == "none"
            else prove(staged, plan, recipe, names, verify=verify, workers=threads)
        )
        flusher.wait()
        sha256 = {"base": _by_name(hashing.result())}
        if verify == "full":
            sha256["output"] = _by_name(file_digests(staged / s.name for s in plan.shards))
        inputs.check_unchanged()
        report = MergeReport(
            kind="merge",
            output=str(target),
            strategy=strategy.name,
            source=strategy.source,
            base=str(base_model),
            adapters=adapter_records(inputs.adapters, sources, factors),
            options={name: getattr(options, name) for name in strategy.options},
            dtype=", ".join(sorted({t.dtype for t in (*plan.merged, *plan.replaced)})),
            verify=verify,
            tensors=tensors,
            bytes_written=plan.size,
            parameters_touched=sum(tensor.count for tensor in (*plan.merged, *plan.replaced)),
            sha256=sha256,
            details=_details(checkpoint, plan),
            notes=tuple(notes),
            versions=used_versions(),
            seconds=time.perf_counter() - begun,
        )
        loss = report.rounding_loss
        if max_rounding_loss is not None and loss is not None and loss > max_rounding_loss:
            raise RoundingLossError(report, max_rounding_loss)
        (staged / "merge_proof.json").write_text(report.as_text(), encoding="utf-8")
        (staged / "merge_report.md").write_text(report.as_markdown(timed=False), encoding="utf-8")
        card = report.as_card(base_id=base_id(inputs.base, sources), adapter=False)
        (staged / "README.md").write_text(card, encoding="utf-8")
    return report


def _stored_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    name = DTYPE_NAMES.get(dtype.removeprefix("torch."))
    if name is None:
        raise InputError(
            f"{dtype!r} is no dtype to store",
            where="--dtype",
            remedy="choose bfloat16, float16, float32 or float64",
        )
    return name


def check_settings(verify: str, limit: float | None, workers: int | None) -> None:
    """Refuse a bad `--verify`, `--max-rounding-loss` or `--workers`."""
    if verify not in _VERIFY:
        raise InputError(
            f"{verify!r} is not known", where="--verify", remedy=f"choose from {', '.join(_VERIFY)}"
        )
    if limit is not None and not limit >= 0:
        raise InputError(f"{limit} is no share", where="--max-rounding-loss", remedy="e.g. 0.5")
    if limit is not None and verify == "none":
        raise InputError(
            "needs the output to be read back",
            where="--max-rounding-loss",
            remedy="use --verify sampled or full",
        )
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers", where="--workers", remedy="1 or more")


def _by_name(digests: Mapping[Path, str]) -> dict[str, str]:
    return {path.name: digest for path, digest in digests.items()}


def _write_texts(
    staged: Path, checkpoint: CheckpointFiles, plan: MergePlan, adapters: Sequence[Adapter]
) -> list[str]:
    """The index, and what has to be said anew in `config.json`; returns notes."""
    notes = []
    index = changed_index(checkpoint, plan)
    if index is not None:
        (staged / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    elif checkpoint.index is not None:
        copy_beside(checkpoint.folder, staged, [Path(INDEX_NAME)])
    config = changed_config(checkpoint, plan)
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (staged / "config.json").write_text(text, encoding="utf-8")
    if plan.untied:
        notes.append(
            "The base ties its head to the embedding and an adapter changes one of them: the "
            "output stores both (tie_word_embeddings = false)."
        )
    notes += [f"{t.name} is {t.saved_by}'s own, in place of the base's." for t in plan.replaced]
    if plan.dequantised:
        notes.append(
            f"The base is 8-bit floats with scales; the output is {plan.dtype}, without them."
        )
    # The engine takes the template of the last adapter that has one where the base has none.
    if not _has_template(checkpoint.folder):
        for adapter in reversed(adapters):
            if (adapter.path / "chat_template.jinja").is_file():
                copy_beside(adapter.path, staged, [Path("chat_template.jinja")])
                notes.append(f"The chat template is {adapter.name}'s; the base has none.")
                break
    return notes


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file, what=file.name) if file.is_file() else {}
    return settings.get("chat_template") is not None


def adapter_records(
    adapters: Sequence[Adapter], sources: Sequence[Source], factors: Mapping[str, float]
) -> tuple[AdapterRecord, ...]:
    """What went in, in the order given."""
    by_name = {source.name: source for source in sources}
    return tuple(
        AdapterRecord(
            name=adapter.name,
            source=adapter.source,
            weight=factors[adapter.name],
            rank=max(pair.rank for pair in by_name[adapter.name].files.pairs.values()),
            modules=len(by_name[adapter.name].files.pairs),
            parameters=by_name[adapter.name].files.parameters,
            sha256=by_name[adapter.name].digest,
        )
        for adapter in adapters
    )


def _details(checkpoint: CheckpointFiles, plan: MergePlan) -> dict[str, Any]:
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    return {
        "shards": len(plan.shards),
        "tensors": len(plan.stored_names),
        "tensors merged": len({tensor.stored_name for tensor in plan.merged}),
        "tensors replaced": len(plan.replaced),
        "tensors copied": sum(t.copied and not t.saved_by for t in tensors),
        "parameters": sum(tensor.count for tensor in tensors),
        "base bytes": sum(shard.size for shard in checkpoint.shards),
    }


def used_versions() -> dict[str, str]:
    """What computed the result."""
    import numpy

    import harness

    return {
        "lora-stack-harness": harness.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def base_id(base: Base | None, sources: Sequence[Source]) -> str | None:
    """The base's hub id for a model card, where the adapters or the options name one."""
    claims = [base.source] if base is not None else []
    claims += [source.files.config.base or "" for source in sources]
    for claim in claims:
        if _HUB_ID.fullmatch(claim) and not Path(claim).exists():
            return claim
    return None
