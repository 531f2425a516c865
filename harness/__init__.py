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
    from harness.comparing import Comparison, judge_snapshot
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
    from harness.evidence import Evidence
    from harness.merge import MergeReport, StrategyOptions, flatten_adapters, merge_lora_adapters
    from harness.noise import NoiseFloor, measure_floor
    from harness.preset import Preset, load_preset, load_prompts
    from harness.replay import Replayed, replay_completions
    from harness.resolve import resolve_stack
    from harness.snapshot_form import Snapshot
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
    "Comparison": "harness.comparing",
    "Completion": "harness.completion",
    "Engine": "harness.completion",
    "Evidence": "harness.evidence",
    "GenerationSettings": "harness.completion",
    "HarnessError": "harness.errors",
    "InputError": "harness.errors",
    "LoRAAnalyzer": "harness.analysis",
    "MergeReport": "harness.merge",
    "Message": "harness.completion",
    "Mode": "harness.stack",
    "NoiseFloor": "harness.noise",
    "Outcome": "harness.verdict",
    "Preset": "harness.preset",
    "Prompt": "harness.completion",
    "Replayed": "harness.replay",
    "Snapshot": "harness.snapshot_form",
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
    "judge_snapshot": "harness.comparing",
    "load_engine": "harness.engines",
    "load_preset": "harness.preset",
    "load_prompts": "harness.preset",
    "measure_floor": "harness.noise",
    "merge_lora_adapters": "harness.merge",
    "replay_completions": "harness.replay",
    "resolve_stack": "harness.resolve",
}

__all__ = [
    "Adapter",
    "AdapterStack",
    "Application",
    "Base",
    "Certificate",
    "Comparison",
    "Completion",
    "Engine",
    "Evidence",
    "GenerationSettings",
    "HarnessError",
    "InputError",
    "LoRAAnalyzer",
    "MergeReport",
    "Message",
    "Mode",
    "NoiseFloor",
    "Outcome",
    "Preset",
    "Prompt",
    "Replayed",
    "Snapshot",
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
    "judge_snapshot",
    "load_engine",
    "load_preset",
    "load_prompts",
    "measure_floor",
    "merge_lora_adapters",
    "replay_completions",
    "resolve_stack",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
