"""An evaluation and regression harness for stacks of LoRA adapters.

The flat names below are the public interface. They are imported when first used, so that
`import harness` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.certificate import Certificate, certify_stack, check_training_stack
    from harness.completion import (
        Application,
        Completion,
        Engine,
        GenerationSettings,
        Message,
        Prompt,
        StopReason,
    )
    from harness.engines import load_engine
    from harness.errors import HarnessError, InputError
    from harness.preset import Preset, load_preset, load_prompts
    from harness.resolve import resolve_stack
    from harness.stack import Adapter, AdapterStack, Base, Mode
    from harness.verdict import Outcome, Verdict

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "harness.stack",
    "AdapterStack": "harness.stack",
    "Application": "harness.completion",
    "Base": "harness.stack",
    "Certificate": "harness.certificate",
    "Completion": "harness.completion",
    "Engine": "harness.completion",
    "GenerationSettings": "harness.completion",
    "HarnessError": "harness.errors",
    "InputError": "harness.errors",
    "Message": "harness.completion",
    "Mode": "harness.stack",
    "Outcome": "harness.verdict",
    "Preset": "harness.preset",
    "Prompt": "harness.completion",
    "StopReason": "harness.completion",
    "Verdict": "harness.verdict",
    "certify_stack": "harness.certificate",
    "check_training_stack": "harness.certificate",
    "load_engine": "harness.engines",
    "load_preset": "harness.preset",
    "load_prompts": "harness.preset",
    "resolve_stack": "harness.resolve",
}

__all__ = [
    "Adapter",
    "AdapterStack",
    "Application",
    "Base",
    "Certificate",
    "Completion",
    "Engine",
    "GenerationSettings",
    "HarnessError",
    "InputError",
    "Message",
    "Mode",
    "Outcome",
    "Preset",
    "Prompt",
    "StopReason",
    "Verdict",
    "certify_stack",
    "check_training_stack",
    "load_engine",
    "load_preset",
    "load_prompts",
    "resolve_stack",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
