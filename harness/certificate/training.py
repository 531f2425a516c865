"""Is a model, about to be trained on top of frozen adapters, set up so that it will come out right?

For a user's own training script. What goes wrong silently: `set_adapter("instruct")` takes style
out of the forward pass; activating both makes both trainable; `.train()` switches the frozen
adapter's dropout on; `save_pretrained` writes elsewhere, or more. The check makes one backward
pass and one optimiser step on random tokens, and puts everything back. Knows nothing of losses or
of data.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import read_adapter
from harness.certificate.claim import same_bits
from harness.certificate.values import Certificate, failed, held, listed
from harness.engines.inspection import LiveModel, read_live
from harness.errors import InputError
from harness.verdict import Outcome, Verdict

__all__ = ["judge_training"]

FORWARD = "both in the forward pass"
TRAINABLE = "what may learn"
NOISE = "frozen adapters' dropout"
GRADIENTS = "gradients"
STEP = "one step"
SAVED = "saved folder"
_TOKENS = 12
_LEARNING_RATE = 1e-3


def judge_training(
    model: Any,
    *,
    frozen: str | Sequence[str],
    trainable: str | Sequence[str],
    saved: str | Path | None,
) -> Certificate:
    """See `harness.check_training_stack`."""
    still = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    learning = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    live = read_live(model)
    unknown = [name for name in (*still, *learning) if name not in live.adapters]
    if unknown or not learning:
        raise InputError(
            f"the model has no adapter {unknown[0]!r}" if unknown else "nothing is to be trained",
            where="frozen and trainable",
            remedy=f"its adapters are: {', '.join(live.adapters) or 'none'}",
        )
    both = set(still) & set(learning)
    if both:
        raise InputError(
            f"{sorted(both)[0]!r} is both frozen and trainable", where="frozen and trainable"
        )
    owners = _owners(model, live.adapters)
    checks = [
        _forward(live, still, learning),
        _permitted(model, owners, learning),
        _dropout(live, still),
    ]
    with _put_back(model):
        made = _backward(model, live)
        checks.append(_gradients(model, owners, learning, made))
        checks.append(_step(model, owners, learning, made))
    checks.append(_saving(model, live, learning))
    if saved is not None:
        checks.append(_folder(live, learning, Path(saved), f"folder {Path(saved).name}"))
    return Certificate(
        subject=f"training {' and '.join(learning)} on frozen {' and '.join(still) or 'base'}",
        checks=tuple(checks),
    )


def _owners(model: nn.Module, adapters: Sequence[str]) -> dict[str, str]:
    """Whose each parameter is: an adapter's name, or `base`."""
    owners: dict[str, str] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        inside = any(part.startswith("lora_") or part == "modules_to_save" for part in parts)
        owner = next((part for part in parts if part in adapters), "base") if inside else "base"
        owners[name] = owner
    return owners


def _forward(live: LiveModel, still: Sequence[str], learning: Sequence[str]) -> Verdict:
    names = (*still, *learning)
    faults: list[str] = []
    empty: Counter[str] = Counter()
    for name, layer in live.lora_layers.items():
        here = [n for n in names if n in layer.adapters]
        applied = [part.name for part in layer.applied]
        if layer.merged:
            faults.append(f"{name}: {layer.merged[0]} is merged into the weight")
        elif layer.disabled and here:
            faults.append(f"{name}: its adapters are disabled")
        elif missing := [n for n in here if n not in applied]:
            faults.append(f"{name}: {' and '.join(missing)} is not in the forward pass")
        elif len(applied) > len(set(applied)):
            faults.append(f"{name}: an adapter is applied twice")
        elif strangers := [n for n in applied if n not in names]:
            faults.append(f"{name}: {strangers[0]} is in the forward pass too")
        for part in layer.adapters.values():
            if part.name in still and not bool(torch.isfinite(part.b).all()):
                faults.append(f"{name}: {part.name} holds NaN or infinity")
            elif part.name in names and part.scale == 0:
                faults.append(f"{name}: {part.name} has a scale of 0")
            elif part.name in still and not bool(part.b.any()):
                empty[part.name] += 1
    faults += [
        f"{name} adds nothing: every B is zero, as where an adapter's file names no module of this "
        "model, or none was loaded"
        for name, count in empty.items()
        if count == sum(name in layer.adapters for layer in live.lora_layers.values())
    ]
    if faults:
        return failed(
            FORWARD,
            f"{len(faults)} faults in {len(live.lora_layers)} layers",
            *listed(faults, "faults"),
            remedy=f"load the frozen adapters from their folders, then "
            f"model.base_model.set_adapter({list(names)!r}), then freeze them again; "
            "PeftModel.set_adapter takes one name and switches the others off",
        )
    notes = [f"in {count} of them {name} adds nothing (its B is zero)"
             for name, count in empty.items()]  # fmt: skip
    return held(FORWARD, f"{' and '.join(names)} act in {len(live.lora_layers)} layers", *notes)


def _permitted(model: nn.Module, owners: Mapping[str, str], learning: Sequence[str]) -> Verdict:
    strangers: list[str] = []
    stuck: list[str] = []
    count = 0
    for name, parameter in model.named_parameters():
        wanted = owners[name] in learning
        count += wanted
        if parameter.requires_grad and not wanted:
            strangers.append(f"{name} ({owners[name]}) requires a gradient")
        elif wanted and not parameter.requires_grad:
            stuck.append(f"{name} is frozen and should learn")
    if strangers or stuck:
        others = sorted({owners[line.split(" ")[0]] for line in strangers})
        return failed(
            TRAINABLE,
            f"{len(strangers)} parameters of {', '.join(others) or 'others'} would be trained, "
            f"{len(stuck)} that should learn are frozen",
            *listed(strangers + stuck, "parameters"),
            remedy="model.requires_grad_(False), then model.set_requires_grad(name, True) for what "
            "learns; set_adapter, disable_adapter and enable_adapter_layers undo it: do it last",
        )
    return held(TRAINABLE, f"{count} parameters of {' and '.join(learning)}, and no other")


def _dropout(live: LiveModel, still: Sequence[str]) -> Verdict:
    faults = [
        f"{name}: dropout of {part.dropout:g} acts on {part.name}"
        for name, layer in live.lora_layers.items()
        for part in layer.adapters.values()
        if part.name in still and part.dropping
    ]
    if faults:
        return failed(
            NOISE,
            *listed(faults, "layers"),
            remedy="after model.train(), call .eval() on the frozen adapters' lora_dropout modules "
            "(harness.testing.training.prepare_stage_two does)",
        )
    return held(NOISE, "none acts: the frozen adapters behave as at inference")


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Gradients, trainable values and the random states, as they were."""
    gradients = {p: p.grad for p in model.parameters()}
    values = {
        p: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and "lora_" in name
    }
    cpu_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for parameter in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        torch.random.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _backward(model: Any, live: LiveModel) -> str | None:
    """One backward pass on random tokens; what went wrong, or None."""
    bare: Any = live.bare
    vocabulary = int(bare.get_input_embeddings().weight.shape[0])
    device = bare.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, _TOKENS), generator=generator).to(device)
    try:
        with torch.enable_grad():
            loss = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
            ).loss
            loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _gradients(
    model: nn.Module, owners: Mapping[str, str], learning: Sequence[str], problem: str | None
) -> Verdict:
    if problem is not None:
        return failed(
            GRADIENTS,
            f"the backward pass failed: {problem}",
            remedy="something must be trainable; with gradient checkpointing, call "
            "model.enable_input_require_grads()",
        )
    elsewhere: list[str] = []
    arrived: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.ne(0).any())
        if owners[name] in learning:
            # B starts at zero, so that A has no gradient at first: the pair counts.
            pair = name.split(".lora_")[0]
            arrived[pair] = arrived.get(pair, False) or moves
        elif moves:
            elsewhere.append(f"{name} ({owners[name]}) has a gradient")
    dry = [f"{pair}: no gradient arrives" for pair, found in arrived.items() if not found]
    if elsewhere or dry:
        return failed(
            GRADIENTS,
            f"{len(elsewhere)} parameters have a gradient and should not, {len(dry)} pairs have "
            "none",
            *listed(elsewhere + dry, "places"),
            remedy="activate every adapter, freeze all but what learns, and do it last",
        )
    return held(GRADIENTS, f"they reach all {len(arrived)} pairs of {' and '.join(learning)} alone")


def _fingerprint(tensor: Tensor) -> tuple[int, float]:
    """Cheap and good enough to see an optimiser's step: the version counter and a sum of bits."""
    version = tensor._version
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    flat = tensor.detach().contiguous().view(bits[tensor.dtype.itemsize])
    return version, float(flat.sum(dtype=torch.int64))


def _step(
    model: nn.Module, owners: Mapping[str, str], learning: Sequence[str], problem: str | None
) -> Verdict:
    moving = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if problem is not None or not moving or any("lora_" not in n for n, _ in moving):
        return Verdict(
            name=STEP,
            outcome=Outcome.UNDECIDED,
            evidence=("not made: it would train the wrong parameters, see above",),
            remedy="mend what the other checks name",
        )
    before = {n: _fingerprint(p) for n, p in model.named_parameters()}
    torch.optim.AdamW([p for _, p in moving], lr=_LEARNING_RATE, weight_decay=0.01).step()
    moved = {n for n, p in model.named_parameters() if _fingerprint(p) != before[n]}
    wrong = sorted(n for n in moved if owners[n] not in learning)
    if wrong:
        return failed(
            STEP,
            f"{len(wrong)} parameters outside {' and '.join(learning)} moved",
            *listed([f"{n} ({owners[n]}) moved" for n in wrong], "parameters"),
            remedy="freeze them, and give the optimiser only what learns",
        )
    if not moved:
        return failed(STEP, "nothing moved", remedy="check that something is trainable")
    return held(STEP, f"{len(moved)} parameters of {' and '.join(learning)} moved, and no other")


def _saving(model: Any, live: LiveModel, learning: Sequence[str]) -> Verdict:
    """What `save_pretrained(selected_adapters=…)` writes, in a folder of its own."""
    if not hasattr(model, "peft_config") or not hasattr(model, "base_model"):
        return Verdict(
            name=SAVED, outcome=Outcome.SKIPPED, evidence=("the model is not wrapped by PEFT",)
        )
    with tempfile.TemporaryDirectory(prefix="lora-stack-") as scratch:
        model.save_pretrained(scratch, selected_adapters=list(learning))
        for name in learning:
            written = Path(scratch) if name == "default" else Path(scratch, name)
            verdict = _folder(live, (name,), written, SAVED)
            if not verdict.passed:
                return verdict
        return verdict


def _folder(live: LiveModel, learning: Sequence[str], folder: Path, check: str) -> Verdict:
    name = learning[0]
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
        return failed(
            check,
            f"holds no {CONFIG_NAME}" + (f"; it holds {', '.join(inside[:4])}" if inside else ""),
            remedy=f"save_pretrained(folder, selected_adapters=[{name!r}]) writes folder/{name}",
        )
    try:
        files = read_adapter(folder)
    except InputError as error:
        return failed(check, str(error), remedy="save the adapter again")
    here = {n: layer.adapters[name] for n, layer in live.layers.items() if name in layer.adapters}
    faults = [f"{m}: is not in the file" for m in here if m not in files.pairs]
    faults += [f"{m}: is not {name}'s" for m in files.pairs if m not in here]
    for module, part in here.items():
        if module not in files.pairs:
            continue
        pair = files.pair(module)
        for factor, now, stored in (("A", part.a, pair.a), ("B", part.b, pair.b)):
            if not same_bits(now.cpu(), stored.to(now.dtype)):
                faults.append(f"{module}: {factor} in the file is not the one in memory")
        if abs(pair.scale - part.scale) > 1e-9 * abs(part.scale):
            faults.append(f"{module}: the file's scale is {pair.scale:g}, memory's {part.scale:g}")
    if faults:
        return failed(
            check,
            f"{folder.name} is not {name} as it stands in memory",
            *listed(faults, "modules"),
            remedy=f"save_pretrained(folder, selected_adapters=[{name!r}]) after the last step",
        )
    return held(check, f"{len(files.pairs)} pairs of {name}, as in memory, and nothing else")
