"""What can change a model's results without a weight having changed: hooks, replaced methods, and
modelling code that comes from elsewhere.

Knows nothing of adapters or verdicts: it names what it finds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["global_hooks", "patched_code", "patches"]

# What modelling code calls by name, and fast replacements put another function in place of.
_FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv", "rotate_half")
_WRAPPERS = ("torch", "transformers", "accelerate", "peft")  # packages that wrap methods


def patches(module: nn.Module) -> Iterator[str]:
    """Hooks and replaced methods that can change what the module returns."""
    yield from _foreign(module._forward_hooks, "forward hook")
    yield from _foreign(module._forward_pre_hooks, "forward pre-hook")
    placed = getattr(module, "_hf_hook", None)
    if placed is not None:  # accelerate's own move tensors between devices
        for hook in getattr(placed, "hooks", (placed,)):
            if not type(hook).__module__.startswith("accelerate."):
                yield f"accelerate hook {type(hook).__qualname__} from {type(hook).__module__}"
    elif "forward" in vars(module):
        yield "its forward method is replaced"


def global_hooks() -> Iterator[str]:
    places = nn.modules.module
    yield from _foreign(places._global_forward_hooks, "forward hook")
    yield from _foreign(places._global_forward_pre_hooks, "forward pre-hook")


def _foreign(hooks: Mapping[int, Any], kind: str) -> Iterator[str]:
    for hook in hooks.values():
        origin = str(getattr(hook, "__module__", None) or type(hook).__module__)
        if not origin.startswith("harness.engines."):
            yield f"{kind} {getattr(hook, '__qualname__', type(hook).__name__)} from {origin}"


def patched_code(bare: nn.Module) -> Iterator[str]:
    """Forward methods of the model's classes, and the functions that they call by name, whose code
    comes from elsewhere: libraries that replace them for all models of the process."""
    classes = {type(module) for module in bare.modules()}
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        owner = next(c for c in cls.__mro__ if "forward" in vars(c))
        if origin := _elsewhere(vars(owner)["forward"], owner.__module__):
            yield f"{owner.__qualname__}.forward is {origin}"
    for module in sorted({cls.__module__ for cls in classes}):
        for name in _FUNCTIONS:
            function = getattr(sys.modules.get(module), name, None)
            if origin := _elsewhere(function, module):
                yield f"{name} of {module} is {origin}"
    chosen = getattr(getattr(bare, "config", None), "_attn_implementation", None)
    attention = sys.modules.get("transformers.modeling_utils")
    functions = getattr(attention, "ALL_ATTENTION_FUNCTIONS", None)
    function = functions[chosen] if functions is not None and chosen in functions else None
    if origin := _elsewhere(function, "transformers"):
        yield f"the attention function {chosen} is {origin}"


def _elsewhere(function: Any, module: str) -> str | None:
    """Where a function's code comes from, if that is neither *module*'s package nor what wraps it
    there; decorators that keep a function's name are looked behind."""
    own = [sys.modules.get(name) for name in (module, module.partition(".")[0], *_WRAPPERS)]
    files = [file for m in own if (file := getattr(m, "__file__", None))]
    folders = [Path(file).parent for file in files]
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and not code.co_filename.startswith("<"):
            place = Path(code.co_filename)
            if not any(place.is_relative_to(folder) for folder in folders):
                return f"{code.co_qualname} from {place}"
        function = getattr(function, "__wrapped__", None)
    return None
