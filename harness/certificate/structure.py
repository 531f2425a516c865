"""What is no weight and still decides the logits: buffers, the architecture, hooks and patches.

The architecture is held against what `config.json` builds without weights; rotary frequencies
are recomputed; a foreign hook is judged by what the logits are without it. Knows nothing of
adapters.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.certificate.capture import Capture, batched, forward
from harness.certificate.claim import Claim, same_bits
from harness.certificate.values import failed, held, listed
from harness.certificate.weights import compare_tensor
from harness.engines.described import scalars, skeleton
from harness.engines.inspection import LiveModel
from harness.errors import InputError
from harness.verdict import Outcome, Verdict

__all__ = ["ARCHITECTURE", "BUFFERS", "HOOKS", "check_hooks", "check_structure"]

ARCHITECTURE = "architecture"
BUFFERS = "buffers"
HOOKS = "hooks and patches"
# Keys of a config that say where it came from or how to run, not what is computed.
_IDLE_KEYS = frozenset(
    {"_name_or_path", "architectures", "attn_implementation", "dtype", "experts_implementation",
     "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states",
     "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
     "_attn_implementation", "_experts_implementation", "chunk_size_feed_forward", "bos_token_id",
     "eos_token_id", "pad_token_id", "tokenizer_class", "is_encoder_decoder",
     "_attn_implementation_autoset", "output_router_logits", "router_aux_loss_coef",
     "attention_dropout", "max_position_embeddings", "auto_map"}
)  # fmt: skip
_IDLE_SCALARS = frozenset({"is_gradient_checkpointing", "config_class", "weight_format",
                           "max_seq_len_cached", "padding_idx"})  # fmt: skip


def check_structure(live: LiveModel, claim: Claim) -> list[Verdict]:
    """The architecture and the buffers."""
    bare: Any = live.bare
    try:
        wanted = skeleton(claim.checkpoint.folder, like=bare)
    except InputError as error:
        undecided = Verdict(
            name=ARCHITECTURE,
            outcome=Outcome.UNDECIDED,
            evidence=(str(error),),
            remedy="check config.json against the model class that was loaded",
        )
        return [undecided, _buffers(live, claim, None)]
    return [_architecture(live, wanted), _buffers(live, claim, wanted)]


def _architecture(live: LiveModel, wanted: nn.Module) -> Verdict:
    bare: Any = live.bare
    model: Any = wanted
    faults = list(_config_faults(bare.config.to_dict(), model.config.to_dict(), ""))
    planned = dict(wanted.named_modules(remove_duplicate=False))
    layers = set(live.layers)
    for name, module in planned.items():
        if name in layers:
            found: nn.Module = live.layers[name].inner
        elif name in live.modules:
            found = live.modules[name]
        else:
            faults.append(f"{name or 'the model'}: {type(module).__name__} is missing")
            continue
        if type(found) is not type(module):
            faults.append(
                f"{name}: is a {type(found).__name__}, config.json builds {type(module).__name__}"
            )
            continue
        have, want = scalars(found), scalars(module)
        faults += [
            f"{name}: {key} is {have.get(key)!r}, config.json gives {want[key]!r}"
            for key in want
            if key not in _IDLE_SCALARS and have.get(key) != want[key]
        ]
    faults += [
        f"{name}: {type(module).__name__} is not in config.json's model"
        for name, module in live.modules.items()
        if name not in planned
    ]
    if faults:
        return failed(
            ARCHITECTURE,
            *listed(faults, "differences"),
            remedy="load the model from the stack's base folder without changing its config",
        )
    return held(ARCHITECTURE, f"{len(planned)} modules are those of config.json, plain values too")


def _config_faults(have: dict[str, Any], want: dict[str, Any], where: str) -> Iterator[str]:
    for key in want:
        if key in _IDLE_KEYS:
            continue
        a, b = have.get(key), want[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _config_faults(a, b, f"{where}{key}.")
        elif a != b:
            yield f"config.{where}{key} is {a!r}, config.json says {b!r}"


def _buffers(live: LiveModel, claim: Claim, wanted: nn.Module | None) -> Verdict:
    faults: list[str] = []
    unjudged: list[str] = []
    for name, buffer in live.buffers.items():
        parts = claim.parts(name)
        if parts:
            cause = compare_tensor(name, buffer, parts[0].stored).cause
            if cause:
                faults.append(f"{name}: {cause}")
            continue
        expected = _rebuilt(wanted, name)
        if expected is None:
            unjudged.append(name)
        elif buffer.shape != expected.shape or not _near(buffer, expected):
            faults.append(f"{name}: {_buffer_cause(buffer, expected)}")
    if faults:
        return failed(
            BUFFERS,
            *listed(faults, "buffers"),
            remedy="load the base again; do not change rope parameters after loading",
        )
    lines = [f"{len(live.buffers) - len(unjudged)} buffers are what config.json and the files give"]
    if unjudged:
        lines.append(f"not judged, neither in the files nor rotary: {', '.join(unjudged[:3])}")
    return held(BUFFERS, *lines)


def _near(first: Tensor, second: Tensor) -> bool:
    if same_bits(first.cpu(), second):
        return True
    # Frequencies are powers: another order of the same arithmetic may change the last bit. They
    # are compared as numbers, not in the live dtype: `model.to(bfloat16)` rounds them, too.
    return torch.allclose(first.cpu().double(), second.double(), rtol=1e-6, atol=0)


def _buffer_cause(buffer: Tensor, expected: Tensor) -> str:
    if buffer.shape != expected.shape:
        return f"its shape is {list(buffer.shape)}, config.json gives {list(expected.shape)}"
    ratio = float(buffer.double().sum() / expected.double().sum())
    if torch.equal(buffer.double().cpu(), expected.bfloat16().double()):
        return "it was rounded through bfloat16"
    return f"differs from what config.json gives (sum {ratio:.4g} times): rotary parameters changed"


def _rebuilt(wanted: nn.Module | None, name: str) -> Tensor | None:
    """A buffer as `from_pretrained` makes it, from config.json; None where nothing says what it is.

    Buffers that are in no file are computed by `_init_weights`, which is given an empty one here.
    """
    if wanted is None:
        return None
    model: Any = wanted
    owner, _, leaf = name.rpartition(".")
    module = dict(wanted.named_modules()).get(owner)
    planned = getattr(module, "_buffers", {}).get(leaf)
    if module is None or planned is None:
        return None
    made: list[Tensor] = []
    for filled in (0, 1):  # what is left as it was filled is not computed there
        module._buffers[leaf] = torch.full_like(planned, filled, device="cpu")
        try:
            with torch.no_grad(), torch.device("cpu"):
                model._init_weights(module)
        except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
            return None
        finally:
            found, module._buffers[leaf] = module._buffers[leaf], planned
        made.append(found)
    return made[0] if same_bits(*made) else None


def check_hooks(live: LiveModel, rows: Sequence[Sequence[int]], seen: Capture | None) -> Verdict:
    """Foreign hooks and replaced forward methods, by what the logits are without them."""
    lines = [f"{name or 'the model'}: {', '.join(kinds)}" for name, kinds in live.hooked.items()]
    lines += [f"{type(m).__name__}: a hook or patch on the wrapper" for m in live.hooked_wrappers]
    lines += [f"every module: {kind}" for kind in live.hooked_everywhere]
    if not lines and not live.patched:
        return held(HOOKS, "no module has a foreign hook or a replaced forward method")
    if seen is None:
        return Verdict(
            name=HOOKS, outcome=Outcome.UNDECIDED, evidence=listed([*lines, *live.patched], "more")
        )
    if lines:
        with _without(live):
            bare = forward(live.root, *batched(rows))
        size = float(bare.float().std())
        change = float((bare.float() - seen.logits.float()).square().mean().sqrt())
        eps = torch.finfo(bare.dtype).eps
        if not change <= 4 * eps * size:
            return failed(
                HOOKS,
                *listed(lines, "modules"),
                f"without them the logits change by {change / size:.3g} of their spread",
                remedy="remove the hook or patch (activation steering, a debugging hook) before "
                "certifying",
            )
        lines = [*listed(lines, "modules"), "without them the logits are the same"]
    if live.patched:
        return Verdict(
            name=HOOKS,
            outcome=Outcome.UNDECIDED,
            evidence=(*listed(list(live.patched), "patches"), *lines,
                      "what the model's own code computes is not known in this process"),
            remedy="certify in a process that does not replace the model's code, or before it does",
        )  # fmt: skip
    return held(HOOKS, *lines)


@contextlib.contextmanager
def _without(live: LiveModel) -> Iterator[None]:
    """Take foreign hooks and patches away for a block, and put them back."""
    modules = dict(live.bare.named_modules(remove_duplicate=False))
    kept: list[tuple[Any, str, Any]] = []
    try:
        for attribute in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            kept.append((nn.modules.module, attribute, getattr(nn.modules.module, attribute)))
            setattr(nn.modules.module, attribute, OrderedDict())
        for module in (*(modules[name] for name in live.hooked), *live.hooked_wrappers):
            for attribute in ("_forward_hooks", "_forward_pre_hooks"):
                hooks = getattr(module, attribute)
                kept.append((module, attribute, hooks))
                own = [
                    (key, hook)
                    for key, hook in hooks.items()
                    if str(getattr(hook, "__module__", "")).startswith("harness.engines.")
                ]
                setattr(module, attribute, OrderedDict(own))
            if "forward" in vars(module):
                kept.append((module, "forward", vars(module)["forward"]))
                del module.forward
        yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)
