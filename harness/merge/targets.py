"""Which stored tensors of the base an adapter's factors and saved modules belong to.

A pair belongs to a module's weight; a `target_parameters` pair to fused experts, which the file
holds one by one (Qwen3-MoE) or stacked (gpt-oss); a `modules_to_save` tensor takes the place of a
base tensor. Names follow PEFT 0.21 and transformers 5. Knows nothing of arithmetic or outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.adapter_files import KEY_PREFIX, unwrapped
from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError, quoted
from harness.files.tensor_files import TensorEntry, TensorFile, same_bytes
from harness.merge.factors import Source, Term
from harness.merge.strategies import Kind, Strategy

__all__ = [
    "EXPERT_PARTS",
    "MERGEABLE",
    "Placement",
    "SavedTensor",
    "check_saved_weights",
    "place",
    "stores_experts_transposed",
]

#: What makes an adapter more than `W + s·B·A` (keys of its config) and can be merged all the same.
MERGEABLE = frozenset({"modules_to_save", "target_parameters"})

_HEAD = "lm_head"
#: How the rows of a fused parameter are stored where a file holds its experts one by one.
EXPERT_PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
# Families whose fused experts are `(experts, in, out)`: transformers' `is_transposed`.
_FLIPPED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor that an adapter holds whole, to take the place of the base's."""

    source: Source
    entry: TensorEntry

    @property
    def file(self) -> TensorFile:
        return self.source.files.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What happens to which tensor of the base.

    Attributes:
        terms: what is added, by stored name; a stacked tensor's terms each name their expert.
        saved: what takes a tensor's place. A tied head is called `lm_head.weight` in both.
    """

    terms: Mapping[str, tuple[Term, ...]]
    saved: Mapping[str, SavedTensor] = field(default_factory=dict)


def place(checkpoint: CheckpointFiles, sources: Sequence[Source]) -> Placement:
    """Find every tensor that *sources* change, in the sources' order.

    Raises:
        InputError: a module that the base does not hold, or of another shape; two adapters that
            save different tensors for one place, or one saves what another adapts; a saved tensor
            that the config does not name.
    """
    terms: dict[str, list[Term]] = {}
    saved: dict[str, SavedTensor] = {}
    for source in sources:
        for name, term in _terms(checkpoint, source):
            terms.setdefault(name, []).append(term)
        for name, found in _saved(checkpoint, source):
            other = saved.setdefault(name, found)
            if other is not found and not same_bytes(
                other.file, other.entry, found.file, found.entry
            ):
                raise InputError(
                    f"{name!r} is saved whole by both {other.source.name} and {source.name}, and "
                    "differs: only one can take the base's place",
                    where=found.file.path,
                    remedy="merge one of the two, or train the second on top of the first",
                )
    for name in saved.keys() & terms.keys():
        raise InputError(
            f"{name!r} is saved whole by {saved[name].source.name} and adapted by "
            f"{terms[name][0].source.name}: which comes first is not told",
            where=saved[name].file.path,
            remedy="merge the adapter that saves it, then the other into the result",
        )
    return Placement(terms={n: tuple(found) for n, found in terms.items()}, saved=saved)


def check_saved_weights(
    sources: Sequence[Source], strategy: Strategy, factors: Mapping[str, float]
) -> None:
    """Refuse factors and strategies under which a module saved whole has no meaning.

    Raises:
        InputError: an adapter with `modules_to_save` enters with another factor than 1, or through
            a strategy that is no sum.
    """
    for source in sources:
        if not source.files.config.raw.get("modules_to_save"):
            continue
        if strategy.kind is not Kind.SUM or factors[source.name] != 1:
            how = (
                f"with the factor {factors[source.name]:g}"
                if strategy.kind is Kind.SUM
                else f"by {strategy.name}"
            )
            raise InputError(
                f"modules_to_save: {source.name} replaces whole modules, which cannot be done "
                f"{how}",
                where=source.files.config.path,
                remedy="use --merge-strategy sequential, or weighted with the weight 1 for it",
            )


def _terms(checkpoint: CheckpointFiles, source: Source) -> list[tuple[str, Term]]:
    files = source.files
    found: list[tuple[str, Term]] = []
    for module in files.pairs:
        inner, parameter = unwrapped(module), files.parameter(module)
        if parameter is None and (named := files.targeted(module)):
            held = sum(unwrapped(other) == inner for other in files.pairs)
            raise InputError(
                f"{inner!r} holds {held} adapted parameters, target_parameters names "
                f"{len(named)} ({', '.join(named)})",
                where=files.tensors.path,
                remedy="save the adapter again",
            )
        if parameter is None:
            term = Term(source=source, module=module)
            found.append((_weight_of(checkpoint, term), term))
        elif parameter == f"{inner}.weight":
            term = Term(source=source, module=module, parameter=parameter)
            found.append((_weight_of(checkpoint, term, inner), term))
        else:
            found += _experts(checkpoint, source, module, inner, parameter)
    return found


def _weight_of(checkpoint: CheckpointFiles, term: Term, module: str | None = None) -> str:
    module = module or term.module
    name = checkpoint.weight_name(module)
    if name is None:
        raise InputError(
            f"module {quoted(module)}: is not in the base {checkpoint.folder}",
            where=term.source.files.tensors.path,
            remedy="give the base that the adapter was trained on",
        )
    _check_shape(checkpoint, name, term, term.shape)
    return f"{_HEAD}.weight" if module == _HEAD and checkpoint.tied else name


def _check_shape(
    checkpoint: CheckpointFiles, name: str, term: Term, wanted: tuple[int, ...]
) -> None:
    shape = checkpoint.entry(name).shape
    if shape != wanted:
        raise InputError(
            f"{term.module!r} needs a base weight of {list(wanted)}, "
            f"{checkpoint.folder} has {list(shape)}",
            where=term.source.files.tensors.path,
            remedy="give the base that the adapter was trained on",
        )


def stores_experts_transposed(checkpoint: CheckpointFiles) -> bool:
    """Whether stacked experts are `(experts, in, out)` in *checkpoint*."""
    return checkpoint.config.get("model_type") in _FLIPPED


def _experts(
    checkpoint: CheckpointFiles, source: Source, module: str, inner: str, full: str
) -> list[tuple[str, Term]]:
    """One term an expert; two where gate and up are stored apart."""
    experts = source.files.pairs[module].experts
    stacked = checkpoint.stored_name(full)
    flipped = stores_experts_transposed(checkpoint)
    found: list[tuple[str, Term]] = []
    if stacked is not None:
        for expert in range(experts):
            term = Term(
                source=source, module=module, parameter=full, expert=expert, flipped=flipped
            )
            _check_shape(checkpoint, stacked, term, (experts, *term.shape))
            found.append((stacked, term))
        return found
    for expert in range(experts):
        start = 0
        for half in EXPERT_PARTS[full.rpartition(".")[2]]:
            name = checkpoint.stored_name(f"{inner}.{expert}.{half}.weight")
            if name is None:
                raise InputError(
                    f"holds neither {full!r} nor '{inner}.{expert}.{half}.weight', which "
                    f"{source.name} adapts",
                    where=checkpoint.folder,
                    remedy="give the base that the adapter was trained on; other names of experts "
                    "than transformers' own cannot be merged",
                )
            end = start + checkpoint.entry(name).shape[0]
            term = Term(
                source=source, module=module, parameter=full, expert=expert, part=(start, end)
            )
            _check_shape(checkpoint, name, term, term.shape)
            found.append((name, term))
            start = end
        if start != source.files.pairs[module].out_features:
            raise InputError(
                f"{module!r} adapts {source.files.pairs[module].out_features} rows an expert, the "
                f"base has {start}",
                where=source.files.tensors.path,
                remedy="give the base that the adapter was trained on",
            )
    return found


def _saved(checkpoint: CheckpointFiles, source: Source) -> list[tuple[str, SavedTensor]]:
    """The tensors that *source* holds whole, by the base's name."""
    files = source.files
    factors = {entry.name for pair in files.pairs.values() for entry in (pair.a, pair.b)}
    copies = {entry.name for entry in files.base_copies.values()}
    targets = list(files.config.raw.get("modules_to_save") or ())
    missing = set(targets)
    found: list[tuple[str, SavedTensor]] = []
    for key, entry in files.tensors.entries.items():
        if key in factors or key in copies:
            continue
        name = key.removeprefix(KEY_PREFIX)
        parts = name.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts))]
        # PEFT saves every module whose name ends with a target.
        mine = {target for target in targets if any(m.endswith(target) for m in above)}
        if name == key or not mine:
            raise InputError(
                f"tensor {key!r} is neither a LoRA factor nor of a module that modules_to_save "
                "names; PEFT would ignore it or write it over the base",
                where=files.tensors.path,
                remedy="save the adapter again",
            )
        missing -= mine
        stored = checkpoint.stored_name(name)
        if checkpoint.tied and name == f"{_HEAD}.weight":
            stored = checkpoint.embedding_name
        if stored is None or checkpoint.entry(stored).shape != entry.shape:
            has = "no such tensor" if stored is None else f"{list(checkpoint.entry(stored).shape)}"
            raise InputError(
                f"saves {name!r} of {list(entry.shape)}, {checkpoint.folder} has {has}",
                where=files.tensors.path,
                remedy="give the base that the adapter was trained on; resized vocabularies need "
                "a base with the same size",
            )
        tied_head = checkpoint.tied and name == f"{_HEAD}.weight"
        found.append((name if tied_head else stored, SavedTensor(source=source, entry=entry)))
    if missing:
        raise InputError(
            f"modules_to_save names {sorted(missing)[0]!r}, of which it holds no tensor",
            where=files.tensors.path,
            remedy="save the adapter again",
        )
    return found
