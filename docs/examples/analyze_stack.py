"""Analyse both adapters of the embedded trained stack, compare them, and write one report.

    python docs/examples/analyze_stack.py [FOLDER]

Prints what stands out; the report goes to a new folder under FOLDER (`runs` by default).
"""

import sys
from pathlib import Path

from harness.analysis import UnifiedAnalyzer, findings_of
from harness.embedded import embedded_folder

stages = embedded_folder() / "stages"
adapters = {
    "style": stages / "stage1_style_injection" / "checkpoint-120",
    "instruct": stages / "stage2_instruct_new_adapter",
}

analyzer = UnifiedAnalyzer(sys.argv[1] if len(sys.argv) > 1 else "runs")

style = analyzer.analyze_lora_weights(adapters["style"], name="style", base_model=stages / "base")
largest = max(style.modules, key=lambda module: module.relative_norm)
print(f"style changes {largest.module} most: ‖ΔW‖/‖W‖ = {largest.relative_norm:.3f}")

comparison = analyzer.compare_lora_adapters(adapters, weights=[0.7, 0.3])
(pair,) = comparison.pairs
print(f"cosine {pair.total.cosine:+.4f} (by chance ±{pair.total.cosine_by_chance:.4f})")
for strategy in comparison.strategies[:3]:
    print(f"{strategy.strategy}: {strategy.distance:.1%} from the plain sum")
for finding in findings_of(comparison):
    print(f"{finding.level}: {finding.text}")

report = analyzer.generate_report()
print(f"report: {Path(report) / 'report.html'}")
