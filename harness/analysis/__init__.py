"""What is in an adapter: figures, comparison, plots and reports.

Importing this package costs nothing; torch comes with the first call, matplotlib with the first
plot.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.analysis.analyzers import (
        LoRAAnalyzer,
        UnifiedAnalyzer,
        analyze_lora_weights,
        compare_lora_adapters,
        merge_lora_adapters,
    )
    from harness.analysis.comparison import ComparisonFigures
    from harness.analysis.figures import AdapterFigures
    from harness.analysis.findings import Finding
    from harness.analysis.writing import findings_of, write_report

_HOMES = {
    "AdapterFigures": "harness.analysis.figures",
    "ComparisonFigures": "harness.analysis.comparison",
    "Finding": "harness.analysis.findings",
    "LoRAAnalyzer": "harness.analysis.analyzers",
    "UnifiedAnalyzer": "harness.analysis.analyzers",
    "analyze_lora_weights": "harness.analysis.analyzers",
    "compare_lora_adapters": "harness.analysis.analyzers",
    "findings_of": "harness.analysis.writing",
    "merge_lora_adapters": "harness.analysis.analyzers",
    "write_report": "harness.analysis.writing",
}

__all__ = [
    "AdapterFigures",
    "ComparisonFigures",
    "Finding",
    "LoRAAnalyzer",
    "UnifiedAnalyzer",
    "analyze_lora_weights",
    "compare_lora_adapters",
    "findings_of",
    "merge_lora_adapters",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
