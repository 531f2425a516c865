"""Values that several tests ask for: a completion, the report of a run. No torch."""

from __future__ import annotations

from typing import Any

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason

__all__ = ["completion", "run_report"]


def completion(prompt: Prompt | None = None, **values: Any) -> Completion:
    """A completion of *prompt*; *values* replace single fields."""
    given: dict[str, Any] = {
        "prompt": prompt or Prompt(id="p-1", text="x"),
        "mode": "stacked",
        "application": Application.LIVE,
        "prompt_token_ids": (1, 2),
        "token_ids": (3, 4),
        "text": "said",
        "stop_reason": StopReason.EOS,
        "settings": GenerationSettings(),
    }
    return Completion(**(given | values))


def run_report(tiny: Any, *, prompt: str = "x", text: str = "said", **values: Any) -> Any:
    """The report of a run of a `TinyStack` on one prompt, every mode saying *text*."""
    from harness.preset import Preset
    from harness.report.run import RunReport, judge_run
    from harness.resolve import resolve_stack

    stack = resolve_stack(base_model=tiny.base, adapters=tiny.adapters)
    asked = Prompt(id="p-1", text=prompt)
    said = {mode.name: (completion(asked, mode=mode.name, text=text),) for mode in stack.modes}
    given: dict[str, Any] = {
        "stack": stack,
        "preset": Preset(
            name="mine", description="", prompts=(asked,), settings=GenerationSettings()
        ),
        "device": "cpu",
        "dtype": "float32",
        "application": "live",
        "completions": said,
        "verdicts": judge_run(stack, said),
        "seconds": {"load": 1.0},
    }
    return RunReport(**(given | values))
