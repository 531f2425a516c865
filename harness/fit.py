"""Whether the parts of a stack belong together: each adapter and the base, and adapters with
each other. Headers only, and the bytes of the few tensors that must be the same.

Knows nothing of where the folders were found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME, AdapterFiles, adapter_digest
from harness.checkpoint_claims import PLAIN_FAMILIES
from harness.checkpoint_files import CheckpointFiles
from harness.errors import InputError, enough, gathering, quoted
from harness.files.strict_json import read_json_object
from harness.files.tensor_files import same_bytes
from harness.stack import DOUBLED_MODE, Adapter, Base

__all__ = ["check_adapter_covers", "check_adapter_on_base", "check_adapters_together"]

_PROOF = "merge_proof.json"
_MOST_ABSENT = 1000  # modules are told of
_OTHER_BASE = "give the base that the adapter was trained on as --base-model"


def check_adapter_on_base(
    adapter: Adapter,
    files: AdapterFiles,
    checkpoint: CheckpointFiles,
    base: Base,
    faults: list[InputError],
) -> None:
    """Hold every pair and every copied base weight against the base's headers.

    Faults: a module that the base does not have; another shape; a module that the config targets
    and that has no weights; a copy of a base weight that differs; a pattern that takes for ever
    on the base's names; a base that holds the adapter already, or is not the merged one that the
    adapter was trained on.
    """
    before = len(faults)
    _check_shapes(adapter.name, files, checkpoint, base, faults)
    check_adapter_covers(adapter, files, checkpoint, base, faults, shapes_fit=len(faults) == before)


def check_adapter_covers(
    adapter: Adapter,
    files: AdapterFiles,
    checkpoint: CheckpointFiles,
    base: Base,
    faults: list[InputError],
    *,
    shapes_fit: bool = True,
) -> None:
    """`check_adapter_on_base` without the shapes, for who places the pairs by rules of its own."""
    before = len(faults)
    with gathering(faults):
        files.config.refuse_slow_patterns(_module_names(checkpoint))
    _check_base_copies(files, checkpoint, faults)
    if shapes_fit and len(faults) == before:
        _check_complete(files, checkpoint, faults)
    _check_merged(adapter, files, base, faults)


def _module_names(checkpoint: CheckpointFiles) -> list[str]:
    """Every module that the tensors' names tell of, parents included."""
    found: set[str] = set()
    for name in checkpoint.places:
        parts = name.split(".")[:-1]
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return sorted(found)


def _check_shapes(
    name: str,
    adapter: AdapterFiles,
    checkpoint: CheckpointFiles,
    base: Base,
    faults: list[InputError],
) -> None:
    path = adapter.folder / WEIGHTS_NAME
    strict = checkpoint.config.get("model_type") in PLAIN_FAMILIES
    absent: list[str] = []
    for module, pair in adapter.pairs.items():
        if enough(faults):
            break
        if adapter.targeted(module):
            continue  # fused experts: their layout is for who places them
        weight = checkpoint.weight_name(module)
        if weight is None:
            absent.append(module)  # or a name that transformers maps while loading
            continue
        expected = [pair.out_features, pair.in_features]
        if pair.embedding or adapter.config.fan_in_fan_out:
            expected.reverse()
        shape = list(checkpoint.entry(weight).shape)
        if shape != expected:
            faults.append(
                InputError(
                    f"module {quoted(module)}: the adapter {name!r} needs a base weight of "
                    f"{expected}, {base.source} has {shape}",
                    where=path,
                    remedy=_OTHER_BASE,
                )
            )
    if absent and len(absent) == len(adapter.pairs):
        faults.append(
            InputError(
                f"none of its modules is in the base {base.source} (the first is "
                f"{quoted(absent[0])})",
                where=path,
                remedy=_OTHER_BASE,
            )
        )
    elif strict:
        faults.extend(
            InputError(
                f"module {quoted(module)}: is not in the base {base.source}",
                where=path,
                remedy=_OTHER_BASE,
            )
            for module in absent[:_MOST_ABSENT]
        )


def _check_base_copies(
    adapter: AdapterFiles, checkpoint: CheckpointFiles, faults: list[InputError]
) -> None:
    """PEFT would write these over the base, for every mode: they must be the base's own bytes."""
    for name, entry in adapter.base_copies.items():
        if enough(faults):
            break
        place = checkpoint.weight_name(name.removesuffix(".weight"))
        if place is not None:
            ours = checkpoint.entry(place)
            if (entry.dtype, entry.shape) == (ours.dtype, ours.shape) and same_bytes(
                adapter.tensors, entry, checkpoint.places[place], ours
            ):
                continue
        faults.append(
            InputError(
                f"tensor {quoted(entry.name)}: would be written over the base's {quoted(name)}, "
                "and differs from it",
                where=adapter.tensors.path,
                remedy="save the adapter again with "
                "save_pretrained(…, save_embedding_layers=False)",
            )
        )


def _check_complete(
    adapter: AdapterFiles, checkpoint: CheckpointFiles, faults: list[InputError]
) -> None:
    """Modules that the config targets and that have no weights: PEFT would draw them at random.

    Judged where the base's tensors are called as its modules are; elsewhere the engine compares
    after loading.
    """
    adapted = {checkpoint.weight_name(module) for module in adapter.pairs}
    if None in adapted:
        return
    for weight in checkpoint.places:
        module = weight.removesuffix(".weight")
        matrix = module != weight and len(checkpoint.entry(weight).shape) == 2
        if not matrix or ".experts." in module or weight in adapted:
            continue
        if adapter.config.targets(module):
            faults.append(
                InputError(
                    f"module {quoted(module)}: is named by target_modules and has no weights in "
                    "the file",
                    where=adapter.tensors.path,
                    remedy=f"mend target_modules in {CONFIG_NAME}, or save the adapter again",
                )
            )


def _check_merged(
    adapter: Adapter, files: AdapterFiles, base: Base, faults: list[InputError]
) -> None:
    """A base that was merged before says so in its proof, and names the adapters by digest."""
    proof = base.path / _PROOF
    if proof.is_file():
        with gathering(faults):
            raw = read_json_object(proof, what=_PROOF)
            records = raw.get("adapters")
            held = [r.get("sha256") for r in records or () if isinstance(r, dict)]
            if adapter_digest(adapter.path) in held:
                raise InputError(
                    f"adapters: {adapter.name!r} is merged into this base already; it would be "
                    "applied twice",
                    where=proof,
                    remedy="give the base that it was merged into, or leave the adapter out",
                )
    claim = files.config.base
    if claim is None:
        return
    claimed = adapter.path / claim
    try:
        trained_on_merged = (claimed / _PROOF).is_file() and not claimed.samefile(base.path)
    except OSError:
        return
    if trained_on_merged:
        faults.append(
            InputError(
                f"base_model_name_or_path: {quoted(claim)} is a merged base, and the stack's base "
                f"is {base.source}",
                where=adapter.path / CONFIG_NAME,
                remedy="give the merged base as --base-model, without the adapters in it",
            )
        )


def check_adapters_together(
    adapters: Sequence[Adapter],
    files: Mapping[str, AdapterFiles],
    faults: list[InputError],
    *,
    doubled: str = DOUBLED_MODE,
) -> None:
    """Two adapters with the same weights, and a pair that looks swapped by its folders' names.

    Args:
        doubled: how a double weight is asked for where the adapters were named.
    """
    read = [adapter for adapter in adapters if adapter.name in files]
    for number, second in enumerate(read):
        for first in read[:number]:
            if _same_weights(files[first.name], files[second.name]):
                faults.append(
                    InputError(
                        f"{first.name!r} and {second.name!r} hold the same weights, byte for byte",
                        where=second.path / WEIGHTS_NAME,
                        remedy="give each adapter its own; for a double weight use "
                        + doubled.format(name=first.name),
                    )
                )
            if _called(first, second.name) and _called(second, first.name):
                faults.append(
                    InputError(
                        f"the folders of {first.name!r} and {second.name!r} are called as each "
                        f"other ({first.path.name}, {second.path.name}): they look swapped",
                        where=second.path,
                        remedy="swap the two, or rename the folders",
                    )
                )


def _same_weights(first: AdapterFiles, second: AdapterFiles) -> bool:
    pairs = (first.pairs, second.pairs)
    if pairs[0].keys() != pairs[1].keys():
        return False
    for module, one in pairs[0].items():
        other = pairs[1][module]
        for a, b in ((one.a, other.a), (one.b, other.b)):
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return False
            if not same_bytes(first.tensors, a, second.tensors, b):
                return False
    return True


def _called(adapter: Adapter, name: str) -> bool:
    """Whether the folder is called *name* and not as its own adapter is.

    The last part of the path that says either decides: `stage2_instruct/checkpoint-90`.
    """
    for part in reversed(adapter.path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if adapter.name.lower() in words:
            return False
        if name.lower() in words:
            return True
    return False
