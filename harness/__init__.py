"""An evaluation and regression harness for stacks of LoRA adapters.

The flat names below are the public interface. They are imported when first used, so that
`import harness` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.analysis import (
        LoRAAnalyzer,
        UnifiedAnalyzer,
        analyze_lora_weights,
        compare_lora_adapters,
    )
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
    from harness.merge import MergeReport, StrategyOptions, flatten_adapters, merge_lora_adapters
    from harness.preset import Preset, load_preset, load_prompts
    from harness.resolve import resolve_stack
    from harness.stack import Adapter, AdapterStack, Base, Mode
    from harness.stopping import StoppingReport, check_training_data, examine_stopping
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
    "LoRAAnalyzer": "harness.analysis",
    "MergeReport": "harness.merge",
    "Message": "harness.completion",
    "Mode": "harness.stack",
    "Outcome": "harness.verdict",
    "Preset": "harness.preset",
    "Prompt": "harness.completion",
    "StopReason": "harness.completion",
    "StoppingReport": "harness.stopping",
    "StrategyOptions": "harness.merge",
    "UnifiedAnalyzer": "harness.analysis",
    "Verdict": "harness.verdict",
    "analyze_lora_weights": "harness.analysis",
    "certify_stack": "harness.certificate",
    "check_training_data": "harness.stopping",
    "check_training_stack": "harness.certificate",
    "compare_lora_adapters": "harness.analysis",
    "examine_stopping": "harness.stopping",
    "flatten_adapters": "harness.merge",
    "load_engine": "harness.engines",
    "load_preset": "harness.preset",
    "load_prompts": "harness.preset",
    "merge_lora_adapters": "harness.merge",
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
    "LoRAAnalyzer",
    "MergeReport",
    "Message",
    "Mode",
    "Outcome",
    "Preset",
    "Prompt",
    "StopReason",
    "StoppingReport",
    "StrategyOptions",
    "UnifiedAnalyzer",
    "Verdict",
    "analyze_lora_weights",
    "certify_stack",
    "check_training_data",
    "check_training_stack",
    "compare_lora_adapters",
    "examine_stopping",
    "flatten_adapters",
    "load_engine",
    "load_preset",
    "load_prompts",
    "merge_lora_adapters",
    "resolve_stack",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
