"""Several adapters as one ordinary LoRA adapter: the exact rank concatenation, or a truncation.

`A = [w₁s₁A₁; w₂s₂A₂; …]`, `B = [B₁|B₂|…]`, zero where an adapter lacks the module, r = alpha, so
that s = 1 and servers that take one LoRA a request serve the stack. Needs no base. Knows nothing
of checkpoints or of the command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME
from harness.errors import InputError
from harness.files.staging import staged_folder
from harness.locating import locate_adapters
from harness.merge.factors import (
    DOUBLED_WEIGHT,
    Source,
    adapter_names,
    check_weights,
    open_sources,
    terms_by_module,
)
from harness.merge.flat_factors import (
    Loss,
    flat_modules,
    prove_factors,
    stored_bytes,
    write_factors,
)
from harness.merge.inputs import adapter_inputs
from harness.merge.merging import adapter_records, base_id, check_settings, used_versions
from harness.merge.places import Watch, check_output, check_space
from harness.merge.proof import Verify
from harness.merge.report import MergeReport
from harness.merge.storage import DTYPE_NAMES

__all__ = ["VLLM_RANKS", "flatten_adapters"]

#: What vLLM accepts as `max_lora_rank` (`vllm/config/lora.py`, 2025).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def flatten_adapters(
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    compress: bool = False,
    rank: int | None = None,
    dtype: str = "float32",
    verify: Verify = "sampled",
    force: bool = False,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Write one LoRA adapter whose delta is `Σ wᵢ·ΔWᵢ`.

    Args:
        adapters: folders or hub ids, or a mapping from names to them.
        output: a new folder; it appears whole or not at all.
        weights: one finite number an adapter, in the order given; 1 each if None.
        compress: bring the rank down to the largest numerical rank of any module, exactly but for
            float64's rounding, by QR and SVD.
        rank: truncate to this rank; the best approximation a module, the error is reported.
        dtype: what the factors are stored as.
        verify: `sampled` or `full` reads every factor back and compares products on some or all
            rows with float64; `none` does not.
        force: replace a non-empty output folder.
        trust_remote_code: accept configs by which loaders run code; none of it runs here.

    Raises:
        InputError: anything wrong with options, inputs or the place; nothing was written.
        ProofError: what was read back is not what it should be; nothing was kept.
    """
    begun = time.perf_counter()
    check_settings(verify, None, None)
    if rank is not None and rank < 1:
        raise InputError(f"{rank} is not a rank", where="--rank", remedy="write 1 or more")
    stored = DTYPE_NAMES.get(dtype.removeprefix("torch."))
    if stored is None:
        raise InputError(f"{dtype!r} is no dtype to store", where="--dtype", remedy="e.g. float32")
    named = (
        {name: str(path) for name, path in adapters.items()}
        if isinstance(adapters, Mapping)
        else adapter_names(adapters)
    )
    if not named:
        raise InputError("no adapter is named", where="--adapters", remedy="name one or more")
    factors = dict(zip(named, check_weights(weights, list(named)), strict=True))
    found = locate_adapters(named, doubled=DOUBLED_WEIGHT)
    target = Path(output)
    check_output(target, [adapter.path for adapter in found], force=force)
    watch = Watch()
    inputs = adapter_inputs(found)
    watch.look(inputs)
    sources = open_sources(
        found,
        [factors[a.name] for a in found],
        what="flattened",
        trust_remote_code=trust_remote_code,
    )
    order = {name: place for place, name in enumerate(named)}
    sources = tuple(sorted(sources, key=lambda source: order[source.name]))
    _check_alike(sources)
    terms = terms_by_module(sources)
    ranks = {s.name: max(p.rank for p in s.files.pairs.values()) for s in sources}
    modules = flat_modules(terms)
    most = sum(ranks.values())
    truncates = rank is not None or compress
    # What waits to be padded needs its place as well.
    check_space(target, stored_bytes(modules, most, stored) * (2 if truncates else 1))
    with staged_folder(target, replace=force) as staged:
        weights_file = staged / WEIGHTS_NAME
        shared, losses = write_factors(
            weights_file, modules, ranks, stored, compress=compress, rank=rank
        )
        config = _config(sources, shared, [module.module for module in modules])
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = prove_factors(weights_file, modules, stored, verify, truncated=rank is not None)
        watch.check(inputs)
        report = MergeReport(
            kind="flatten",
            output=str(target),
            strategy="concatenation" if rank is None and not compress else "svd",
            source="A = [wᵢsᵢAᵢ], B = [Bᵢ]: exact; compression by two QR and a small SVD",
            base=config["base_model_name_or_path"],
            adapters=adapter_records(found, sources, factors),
            options={"compress": compress, "truncated_to": rank},
            dtype=stored,
            verify=verify,
            tensors=tensors,
            bytes_written=weights_file.stat().st_size,
            parameters_touched=sum(sum(module.sizes) for module in modules) * shared,
            details={
                "rank": shared,
                "max_lora_rank": next((r for r in VLLM_RANKS if r >= shared), None),
                "sum of ranks": most,
                "relative truncation error": _total_error(losses),
                "largest truncation error of a module": max(e.share for e in losses.values()),
            },
            notes=_notes(shared),
            versions=used_versions(),
            seconds=time.perf_counter() - begun,
        )
        (staged / "merge_proof.json").write_text(report.as_text(), encoding="utf-8")
        card = report.as_card(base_id=base_id(None, sources), adapter=True)
        (staged / "README.md").write_text(card, encoding="utf-8")
    return report


def _check_alike(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.files.config.fan_in_fan_out != first.files.config.fan_in_fan_out:
            raise InputError(
                f"fan_in_fan_out differs between {first.name} and {other.name}: they were trained "
                "on different kinds of layers",
                where=other.files.config.path,
            )
        mine, theirs = first.files.config.base, other.files.config.base
        if mine and theirs and Path(mine).name != Path(theirs).name:
            raise InputError(
                f"{first.name} was trained on {mine}, {other.name} on {theirs}",
                where=other.files.config.path,
                remedy="adapters of different bases cannot be one adapter",
            )
        for module, pair in other.files.pairs.items():
            same = first.files.pairs.get(module)
            if same and (same.in_features, same.out_features, same.embedding) != (
                pair.in_features,
                pair.out_features,
                pair.embedding,
            ):
                raise InputError(
                    f"module {module!r} is {same.out_features}×{same.in_features} for "
                    f"{first.name}, {pair.out_features}×{pair.in_features} for {other.name}",
                    where=other.files.tensors.path,
                    remedy="adapters of different bases cannot be one adapter",
                )


def _total_error(losses: Mapping[str, Loss]) -> float:
    lost = sum(loss.lost**2 for loss in losses.values())
    norm = sum(loss.norm**2 for loss in losses.values())
    return float((lost / norm) ** 0.5) if norm else 0.0


def _config(sources: Sequence[Source], rank: int, modules: Sequence[str]) -> dict[str, Any]:
    raws = [source.files.config.raw for source in sources]
    tasks = {raw.get("task_type") for raw in raws}
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": next(
            (raw["base_model_name_or_path"] for raw in raws if raw.get("base_model_name_or_path")),
            None,
        ),
        "bias": "none",
        "fan_in_fan_out": sources[0].files.config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": _targets(raws, modules),
        "task_type": tasks.pop() if len(tasks) == 1 else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(raws: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> list[str]:
    """Short names where every adapter covers all layers (servers like those), else full ones."""
    plain = all(
        isinstance(raw.get("target_modules"), list)
        and not raw.get("layers_to_transform")
        and not raw.get("exclude_modules")
        for raw in raws
    )
    if plain:
        named = sorted({name for raw in raws for name in raw["target_modules"]})
        if all(any(m == n or m.endswith(f".{n}") for n in named) for m in modules):
            return named
    return list(modules)


def _notes(rank: int) -> tuple[str, ...]:
    hint = next((r for r in VLLM_RANKS if r >= rank), None)
    if hint is None:
        return (
            f"Rank {rank} is above what vLLM takes ({VLLM_RANKS[-1]}): use --compress or --rank.",
        )
    return (
        f"Serve with vLLM: --enable-lora --max-lora-rank {hint}; SGLang: --max-lora-rank {rank}.",
    )
