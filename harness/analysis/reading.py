"""An adapter folder opened for analysis: any LoRA that PEFT saves, broken parts set aside if asked.

Stacking takes only adapters that are `W + s·B·A`; analysis also reads those that are more than
that (DoRA, replaced modules, expert parameters) and says in `notes` what the figures leave out.
Knows nothing of figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.adapter_files import AdapterFiles, read_adapter
from harness.errors import InputError
from harness.locating import locate_adapter
from harness.lora import LoraPair

__all__ = ["AnalysedAdapter", "AnalysedPair", "open_adapter", "open_adapters"]

_MAGNITUDE_KEYS = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_GENERIC_NAMES = frozenset({"adapter", "lora", "final", "output"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysedPair:
    """One module's factors and where they came from.

    Attributes:
        pair: its `module` is the parameter's name for a fused one, with `#e` for expert `e`.
        magnitude: DoRA's magnitude vector, `(out,)`, if there is one.
        parameter: the fused parameter of which this is one expert, by its full name, if so.
        expert: which of its experts.
    """

    pair: LoraPair
    path: Path
    name_a: str
    name_b: str
    magnitude: torch.Tensor | None = None
    parameter: str | None = None
    expert: int = 0


@dataclass(frozen=True, kw_only=True)
class AnalysedAdapter:
    """An adapter under a name of its own.

    Attributes:
        notes: what the figures of `s·B·A` do not show of this adapter.
        faults: broken parts that were left out; empty unless asked for.
    """

    name: str
    source: str
    path: Path
    files: AdapterFiles
    notes: tuple[str, ...]
    faults: tuple[InputError, ...] = ()

    def pairs(self) -> Iterator[AnalysedPair]:
        """Every pair in the natural order; the experts of a fused parameter one by one."""
        for module in self.files.pairs:
            yield from self._pairs_of(module)

    def pair_map(self) -> dict[str, AnalysedPair]:
        """The pairs by name; the tensors stay views of the mapped file."""
        return {analysed.pair.module: analysed for analysed in self.pairs()}

    def _pairs_of(self, module: str) -> Iterator[AnalysedPair]:
        entry = self.files.pairs[module]
        whole = self.files.pair(module)
        magnitude = None
        prefix = entry.a.name.removesuffix(".weight").rpartition(".")[0]
        for key in _MAGNITUDE_KEYS:
            if f"{prefix}.{key}" in self.files.tensors.entries:
                magnitude = self.files.tensors.tensor(f"{prefix}.{key}").flatten()
        experts = entry.experts
        parameter = self.files.parameter(module)
        # By the parameter, not by PEFT's wrappers: adapters of other parameters wrap otherwise.
        name = module if parameter is None else parameter.removesuffix(".weight")
        for expert in range(experts):
            # PEFT lays expert parameters out as (experts·r, in) and (out, r·experts).
            pair = dataclasses.replace(whole, module=name) if experts == 1 else LoraPair(
                module=f"{name}#{expert}",
                a=whole.a.reshape(experts, -1, entry.in_features)[expert],
                b=whole.b.reshape(entry.out_features, -1, experts)[:, :, expert],
                scale=whole.scale,
                transposed=whole.transposed,
            )  # fmt: skip
            yield AnalysedPair(
                pair=pair,
                path=self.files.tensors.path,
                name_a=entry.a.name,
                name_b=entry.b.name,
                magnitude=magnitude,
                parameter=parameter if experts > 1 else None,
                expert=expert,
            )


def open_adapter(
    source: str | Path,
    *,
    name: str | None = None,
    keep_going: bool = False,
    trust_remote_code: bool = False,
) -> AnalysedAdapter:
    """Open an adapter folder, or a hub id, for analysis; headers only.

    Args:
        name: how figures and plots call it; by default the folder's own name.
        keep_going: leave broken tensors and halves of pairs out, listed in `faults`.
        trust_remote_code: accept a config by which loaders run code; none of it runs here.

    Raises:
        InputError: the folder cannot be had, or is broken (where *keep_going* cannot help).
    """
    found = locate_adapter("adapter", str(source), Path.cwd())
    faults: list[InputError] = []
    files = read_adapter(
        found.path,
        faults=faults if keep_going else None,
        trust_remote_code=trust_remote_code,
    )
    notes = list(files.config.not_additive)
    if files.config.rslora:
        notes.append("rsLoRA: the scale is alpha/√r")
    if any(".base_layer" in module and not files.parameter(module) for module in files.pairs):
        notes.append(
            "several parameters of one module are adapted under names that do not tell which is "
            "which; PEFT calls the inner ones …base_layer"
        )
    return AnalysedAdapter(
        name=name or _folder_name(found.path if Path(source).exists() else Path(str(source))),
        source=found.source if found.revision is None else f"{found.source} ({found.revision})",
        path=found.path,
        files=files,
        notes=tuple(notes),
        faults=tuple(faults),
    )


def open_adapters(
    sources: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    keep_going: bool = False,
    trust_remote_code: bool = False,
) -> list[AnalysedAdapter]:
    """Open several adapters under different names; equal folder names get their parent's too.

    Raises:
        InputError: as `open_adapter`; fewer or more *names* than *sources*; a name given twice.
    """
    if names is not None and (len(names) != len(sources) or len(set(names)) != len(names)):
        raise InputError(
            f"{len(sources)} adapters, {len(set(names))} different names",
            where="--names",
            remedy="give one name an adapter, each different",
        )
    opened = [
        open_adapter(
            source,
            name=names[i] if names else None,
            keep_going=keep_going,
            trust_remote_code=trust_remote_code,
        )
        for i, source in enumerate(sources)
    ]
    if names:
        return opened
    taken: dict[str, int] = {}
    result = []
    for adapter in opened:
        name = adapter.name
        if sum(other.name == name for other in opened) > 1:
            longer = f"{adapter.path.parent.name}/{name}"
            taken[longer] = taken.get(longer, 0) + 1
            name = longer if taken[longer] == 1 else f"{longer} ({taken[longer]})"
        result.append(
            AnalysedAdapter(
                name=name, source=adapter.source, path=adapter.path, files=adapter.files,
                notes=adapter.notes, faults=adapter.faults,
            )
        )  # fmt: skip
    return result


def _folder_name(path: Path) -> str:
    """The folder's name; a checkpoint's or a generic one's parent is put before it."""
    path = path.absolute() if path.exists() else path
    if path.name.startswith("checkpoint-") or path.name in _GENERIC_NAMES:
        return f"{path.parent.name}/{path.name}"
    return path.name
