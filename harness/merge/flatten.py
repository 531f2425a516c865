"""Several adapters as one ordinary LoRA adapter: the exact rank concatenation, or a truncation.

`A = [w₁s₁A₁; w₂s₂A₂; …]`, `B = [B₁|B₂|…]`, zero where an adapter lacks the module, r = alpha, so
that s = 1 and servers that take one LoRA a request serve the stack. Needs no base. Knows nothing
of checkpoints or of the command line.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.adapter_config import CONFIG_NAME, natural_order
from harness.adapter_files import WEIGHTS_NAME
from harness.errors import InputError
from harness.locating import locate_adapters
from harness.merge.factors import (
    Source,
    Term,
    adapter_names,
    check_weights,
    open_sources,
    terms_by_module,
)
from harness.merge.merging import adapter_records, base_id, check_settings, used_versions
from harness.merge.places import Watch, check_output, check_space
from harness.merge.proof import ProofError, TensorLedger, Verify
from harness.merge.report import MergeReport
from harness.merge.storage import DTYPE_NAMES, RAW, decode, encode
from harness.merge.strategies import thin_svd
from harness.staging import staged_folder
from harness.tensor_files import DTYPE_BYTES, read_tensor_file

__all__ = ["VLLM_RANKS", "flatten_adapters"]

Array = NDArray[Any]

#: What vLLM accepts as `max_lora_rank` (`vllm/config/lora.py`, 2025).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flat:
    """One module of the result: `a: (r, in)`, `b: (out, r)`, s = 1; float64 until stored."""

    module: str
    a: Array
    b: Array
    embedding: bool
    adapters: tuple[str, ...]


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
    found = locate_adapters(named)
    target = Path(output)
    check_output(target, [adapter.path for adapter in found], force=force)
    sources = open_sources(found, [factors[a.name] for a in found], what="flattened")
    order = {name: place for place, name in enumerate(named)}
    sources = tuple(sorted(sources, key=lambda source: order[source.name]))
    _check_alike(sources)
    watch = Watch(source.files.tensors.path for source in sources)
    terms = terms_by_module(sources)
    exact_ranks = {s.name: max(p.rank for p in s.files.pairs.values()) for s in sources}
    flats, errors = _flats(terms, exact_ranks, compress=compress, rank=rank)
    shared = flats[0].a.shape[0]
    check_space(target, sum(f.a.size + f.b.size for f in flats) * DTYPE_BYTES[stored])
    with staged_folder(target, replace=force) as staged:
        size = _write(staged / WEIGHTS_NAME, flats, stored)
        config = _config(sources, shared, [flat.module for flat in flats])
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = _prove(staged, flats, terms, stored, verify, truncated=rank is not None)
        watch.check()
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
            bytes_written=size,
            parameters_touched=sum(flat.a.size + flat.b.size for flat in flats),
            details={
                "rank": shared,
                "max_lora_rank": next((r for r in VLLM_RANKS if r >= shared), None),
                "sum of ranks": sum(exact_ranks.values()),
                "relative truncation error": _total_error(errors),
                "largest truncation error of a module": max(e[0] for e in errors.values()),
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


def _flats(
    terms: Mapping[str, Sequence[Term]],
    ranks: Mapping[str, int],
    *,
    compress: bool,
    rank: int | None,
) -> tuple[list[_Flat], dict[str, tuple[float, float, float]]]:
    """The modules at one shared rank; per module the truncation: relative, absolute, of ‖ΔW‖."""
    flats: list[_Flat] = []
    errors: dict[str, tuple[float, float, float]] = {}
    for module in sorted(terms, key=natural_order):
        blocks = {term.source.name: term for term in terms[module]}
        if rank is None and not compress:
            flats.append(_concatenated(module, blocks, ranks))
            errors[module] = (0.0, 0.0, 0.0)
            continue
        parts = [_own_factors(term) for term in blocks.values()]
        u, s, vt = thin_svd(
            np.concatenate([b for _, b in parts], axis=1),
            np.concatenate([a for a, _ in parts], axis=0),
        )
        kept = len(s) if rank is None else min(rank, len(s))
        lost, norm = float(np.linalg.norm(s[kept:])), float(np.linalg.norm(s))
        errors[module] = (lost / norm if norm else 0.0, lost, norm)
        root = np.sqrt(s[:kept])
        flats.append(
            _Flat(
                module=module,
                a=root[:, None] * vt[:kept],
                b=u[:, :kept] * root,
                embedding=_is_embedding(blocks),
                adapters=tuple(blocks),
            )
        )
    shared = max(flat.a.shape[0] for flat in flats)
    return [_padded(flat, shared) for flat in flats], errors


def _own_factors(term: Term) -> tuple[Array, Array]:
    """`w·s·A` and `B` in float64, in the adapter's own layout."""
    files, source = term.source.files, term.source
    pair = files.pairs[term.module]
    a = source.array(pair.a, np.float64) * (source.weight * term.scale)
    return a, source.array(pair.b, np.float64)


def _is_embedding(blocks: Mapping[str, Term]) -> bool:
    return any(term.source.files.pairs[term.module].embedding for term in blocks.values())


def _concatenated(module: str, blocks: Mapping[str, Term], ranks: Mapping[str, int]) -> _Flat:
    some = next(iter(blocks.values()))
    pair = some.source.files.pairs[module]
    total = sum(ranks.values())
    a, b = np.zeros((total, pair.in_features)), np.zeros((pair.out_features, total))
    start = 0
    for name, width in ranks.items():
        if name in blocks:
            own_a, own_b = _own_factors(blocks[name])
            a[start : start + own_a.shape[0]] = own_a
            b[:, start : start + own_a.shape[0]] = own_b
        start += width
    return _Flat(module=module, a=a, b=b, embedding=_is_embedding(blocks), adapters=tuple(blocks))


def _padded(flat: _Flat, rank: int) -> _Flat:
    more = rank - flat.a.shape[0]
    if not more:
        return flat
    return _Flat(
        module=flat.module,
        a=np.pad(flat.a, ((0, more), (0, 0))),
        b=np.pad(flat.b, ((0, 0), (0, more))),
        embedding=flat.embedding,
        adapters=flat.adapters,
    )


def _total_error(errors: Mapping[str, tuple[float, float, float]]) -> float:
    lost = sum(error**2 for _, error, _ in errors.values())
    norm = sum(size**2 for _, _, size in errors.values())
    return float((lost / norm) ** 0.5) if norm else 0.0


def _keys(flat: _Flat) -> tuple[str, str]:
    stem = f"{_PREFIX}{flat.module}"
    if flat.embedding:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _write(path: Path, flats: Sequence[_Flat], dtype: str) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    arrays = []
    for flat in flats:
        for key, array in zip(_keys(flat), (flat.a, flat.b), strict=True):
            end = position + array.size * DTYPE_BYTES[dtype]
            header[key] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "data_offsets": [position, end],
            }
            position = end
            arrays.append((key, array))
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for key, array in arrays:
            raw = encode(array, dtype)
            if not np.isfinite(decode(raw, dtype, np.float64)).all():
                raise InputError(
                    f"{key!r}: a number does not fit into {dtype}",
                    where="--dtype",
                    remedy="choose float32",
                )
            file.write(np.ascontiguousarray(raw).data)
    return 8 + len(head) + position


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


def _prove(
    folder: Path,
    flats: Sequence[_Flat],
    terms: Mapping[str, Sequence[Term]],
    dtype: str,
    verify: Verify,
    *,
    truncated: bool,
) -> tuple[TensorLedger, ...]:
    """Hold the stored factors' products against `Σ wᵢ·sᵢ·BᵢAᵢ` in float64."""
    if verify == "none":
        return ()
    file = read_tensor_file(folder / WEIGHTS_NAME, what=WEIGHTS_NAME)
    data = np.fromfile(file.path, np.uint8)
    # Each factor is rounded once; a product of two roundings, a rank of terms.
    precision = 4 * {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    rows = []
    for flat in flats:
        stored = []
        for key in _keys(flat):
            entry = file.entries[key]
            raw = data[entry.start : entry.end].view(RAW[dtype]).reshape(entry.shape)
            stored.append(decode(raw, dtype, np.float64))
        a, b = stored
        some = slice(None) if verify == "full" else slice(0, 32)
        got = b[some] @ a
        parts = [_own_factors(term) for term in terms[flat.module]]
        wanted = np.sum([own_b[some] @ own_a for own_a, own_b in parts], axis=0)
        error = got - wanted
        if not truncated:
            bound = sum(
                np.linalg.norm(own_b[some], axis=1)[:, None] * np.linalg.norm(own_a, axis=0)
                for own_a, own_b in parts
            )
            # Factors of an SVD are bounded by the whole sum, not entry by entry.
            room = precision * (bound + np.abs(b[some]) @ np.abs(a) + np.max(bound, initial=0.0))
            if not (np.abs(error) <= room + np.finfo(np.float64).tiny).all():
                raise ProofError(
                    f"{flat.module}: the flattened adapter's delta is off by "
                    f"{float(np.max(np.abs(error))):.3g}"
                )
        scale = b.shape[0] / got.shape[0]
        nearest = decode(encode(wanted, dtype), dtype, np.float64)
        shown = decode(encode(got, dtype), dtype, np.float64)
        delta = float(np.linalg.norm(wanted)) * scale**0.5
        rows.append(
            TensorLedger(
                name=flat.module,
                dtype=dtype,
                shape=(b.shape[0], a.shape[1]),
                adapters=flat.adapters,
                checked=got.size,
                exact=int(np.count_nonzero(shown == nearest)),
                max_error=float(np.max(np.abs(error), initial=0.0)),
                weight_norm=0.0,
                delta_norm=delta,
                lost_norm=float(np.linalg.norm(error)) * scale**0.5,
                one_by_one_norm=None,
                unmoved=0,
            )
        )
    return tuple(rows)
