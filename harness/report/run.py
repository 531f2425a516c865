"""The report of `lora-stack run`: every mode's completions side by side, and the verdicts.

`RunReport` is the value; the functions turn it into JSON and Markdown. Knows nothing of engines or
of the terminal.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.adapter_files import adapter_digest
from harness.completion import Completion, Prompt
from harness.display.markdown import code_block, inline, table
from harness.display.textdiff import word_diff_line
from harness.files.staging import staged_folder
from harness.preset import Preset
from harness.stack import AdapterStack
from harness.stopping.judging import judge_stopping
from harness.verdict import Outcome, Verdict, judge_effect, overall

__all__ = [
    "RunReport",
    "as_json",
    "as_markdown",
    "completions_of",
    "judge_run",
    "mode_rows",
    "stack_as_json",
    "tool_versions",
    "write_run",
]

_TOOLS = ("lora-stack-harness", "torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run: what was run, on what, what came out, and what is judged.

    Attributes:
        completions: by mode, in the order of the preset's prompts; those that did not come to be
            (an interrupt, a mode that failed) are left out.
        seconds: wall time by what was done (`load`, and each mode).
        planned: how many completions a whole run has; None for as many as there are.
        complete: False when the run was interrupted.
    """

    stack: AdapterStack
    preset: Preset
    device: str
    dtype: str
    application: str
    completions: Mapping[str, tuple[Completion, ...]]
    verdicts: tuple[Verdict, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    planned: int | None = None
    complete: bool = True

    @property
    def ran(self) -> str:
        """`37 of 120 ran`."""
        ran = sum(len(found) for found in self.completions.values())
        return f"{ran} of {ran if self.planned is None else self.planned} ran"

    @property
    def outcome(self) -> Outcome:
        """The worst verdict; `undecided` when the run did not get to its end."""
        if not self.complete:
            return Outcome.UNDECIDED
        made = [verdict for verdict in self.verdicts if verdict.outcome is not Outcome.SKIPPED]
        return overall(made or self.verdicts)


def judge_run(
    stack: AdapterStack, completions: Mapping[str, Sequence[Completion]]
) -> tuple[Verdict, ...]:
    """What a run can tell by its outputs: declared stopping, and that adapters have an effect.

    A run can refute a declaration by one completion. Where its prompts are too few to prove a
    rate, that is skipped and said, not held: `lora-stack stopping` judges it.
    """
    verdicts = [
        judge_stopping(mode, stack.stops[mode], found, too_few=Outcome.SKIPPED)
        for mode, found in completions.items()
        if mode in stack.stops
    ]
    modes = list(completions)
    for mode in modes[1:]:
        if stack.mode(mode).weights:
            first = modes[0]
            verdicts.append(
                judge_effect(f"effect: {first} ≠ {mode}", completions[first], completions[mode])
            )
    return tuple(verdicts)


def completions_of(report: RunReport, prompt: Prompt) -> tuple[Completion, ...]:
    """What each mode said to *prompt*, in the order of the modes; not all of them need have."""
    return tuple(
        completion
        for found in report.completions.values()
        for completion in found
        if completion.prompt.id == prompt.id
    )


def mode_rows(report: RunReport) -> list[dict[str, Any]]:
    """The summary's rows: a mode's stop reasons, token counts and seconds."""
    rows = []
    for mode, found in report.completions.items():
        tokens = [len(completion.token_ids) for completion in found]
        reasons: dict[str, int] = {}
        for completion in found:
            reasons[completion.stop_reason.value] = reasons.get(completion.stop_reason.value, 0) + 1
        rows.append(
            {
                "mode": mode,
                "formula": report.stack.mode(mode).formula,
                "completions": len(found),
                "stopped": sum(completion.stopped for completion in found),
                "stop_reasons": reasons,
                "mean_tokens": sum(tokens) / len(tokens) if tokens else 0.0,
                "seconds": report.seconds.get(mode, 0.0),
            }
        )
    return rows


def tool_versions() -> dict[str, str]:
    """Versions of Python and of what results depend on."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def stack_as_json(stack: AdapterStack) -> dict[str, Any]:
    """The stack for a report: base and why it was chosen, adapters with their SHA-256."""
    return {
        "name": stack.name,
        "base": {
            "path": str(stack.base.path),
            "source": stack.base.source,
            "chosen_by": stack.base.chosen_by,
            "revision": stack.base.revision,
        },
        "adapters": [
            {
                "name": adapter.name,
                "path": str(adapter.path),
                "source": adapter.source,
                "revision": adapter.revision,
                "sha256": adapter_digest(adapter.path),
            }
            for adapter in stack.adapters
        ],
        "modes": {mode.name: mode.formula for mode in stack.modes},
    }


def as_json(report: RunReport) -> dict[str, Any]:
    """The whole report as plain values, with the top-level `verdict` and `checks`."""
    return {
        "verdict": report.outcome.value,
        "checks": [verdict.as_json() for verdict in report.verdicts],
        "complete": report.complete,
        "ran": report.ran,
        "stack": stack_as_json(report.stack),
        "preset": {
            "name": report.preset.name,
            "prompts": len(report.preset.prompts),
            "settings": asdict(report.preset.settings),
        },
        "device": report.device,
        "dtype": report.dtype,
        "application": report.application,
        "versions": tool_versions(),
        "notes": list(report.notes),
        "summary": mode_rows(report),
        "seconds": dict(report.seconds),
        "completions": [
            {
                "prompt": completion.prompt.id,
                "prompt_text": completion.prompt.shown,
                "mode": mode,
                "text": completion.text,
                "stop_reason": completion.stop_reason.value,
                "tokens": len(completion.token_ids),
                "token_ids": list(completion.token_ids),
                "prompt_token_ids": list(completion.prompt_token_ids),
            }
            for mode, found in report.completions.items()
            for completion in found
        ],
    }


def as_markdown(report: RunReport) -> str:
    """The report for people: verdicts, summary, then each prompt with every mode's words."""
    stack = report.stack
    lines = [
        f"# Run of {inline(stack.name)}: {report.outcome.value}",
        "",
        f"- base: {inline(stack.base.source)} (chosen by {inline(stack.base.chosen_by)})",
    ]
    lines += [f"- adapter {inline(a.name)}: {inline(a.source)}" for a in stack.adapters]
    lines += [
        f"- preset {inline(report.preset.name)}: {len(report.preset.prompts)} prompts, "
        f"at most {report.preset.settings.max_new_tokens} new tokens",
        f"- {report.device}, {report.dtype}, {report.application}",
        f"- {report.ran}" + ("" if report.complete else ": the run was interrupted"),
        *(f"- {inline(note)}" for note in report.notes),
        "",
        "## Verdicts",
        "",
        table(
            ["check", "verdict", "evidence", "remedy"],
            [[v.name, v.outcome.value, "; ".join(v.evidence), v.remedy or ""]
             for v in report.verdicts],
        ),
        "",
        "## Modes",
        "",
        table(
            ["mode", "weights", "stopped", "mean tokens", "seconds"],
            [[r["mode"], r["formula"], f"{r['stopped']} of {r['completions']}",
              f"{r['mean_tokens']:.1f}", f"{r['seconds']:.2f}"] for r in mode_rows(report)],
        ),
    ]  # fmt: skip
    for prompt in report.preset.prompts:
        lines += ["", f"## {prompt.id}", "", code_block(prompt.shown)]
        before: Completion | None = None
        for completion in completions_of(report, prompt):
            lines += [
                "",
                f"**{inline(completion.mode)}** · {completion.stop_reason.value} · "
                f"{len(completion.token_ids)} tokens",
                "",
                code_block(completion.text),
            ]
            if before is not None:
                difference = word_diff_line(before.text, completion.text)
                lines += ["", f"<details><summary>difference from {inline(before.mode)}</summary>",
                          "", code_block(difference), "", "</details>"]  # fmt: skip
            before = completion
    return "\n".join(lines) + "\n"


def write_run(report: RunReport, folder: Path) -> Path:
    """Write `report.json` and `report.md` as a new *folder*, whole or not at all."""
    with staged_folder(folder) as staged:
        (staged / "report.json").write_text(
            json.dumps(as_json(report), ensure_ascii=False, indent=2) + "\n",
            encoding="utf-8",
            errors="backslashreplace",  # a lone surrogate: \ud800 is JSON's own escape for it
        )
        (staged / "report.md").write_text(as_markdown(report), encoding="utf-8")
    return folder
