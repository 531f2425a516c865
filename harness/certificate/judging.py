"""All checks about one live model, in order. Knows what to ask whom, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.certificate.capture import DEFAULT_PROMPTS, capture, probe_ids, undisturbed
from harness.certificate.claim import read_claim
from harness.certificate.end_to_end import check_end_to_end
from harness.certificate.factors import ADAPTERS, aliases
from harness.certificate.files_against_model import check_files
from harness.certificate.settings import check_settings
from harness.certificate.state import check_state, may_run
from harness.certificate.structure import check_hooks, check_structure
from harness.certificate.values import Certificate
from harness.completion import Prompt
from harness.engines.inspection import read_live
from harness.errors import InputError
from harness.stack import AdapterStack, Mode
from harness.verdict import Verdict

__all__ = ["judge_model"]


def judge_model(
    model: Any,
    stack: AdapterStack,
    *,
    mode: Mode | str,
    tokenizer: Any,
    prompts: Sequence[Prompt | str] | None,
    generation: Any,
    end_to_end: bool,
) -> Certificate:
    """See `harness.certify_stack`."""
    if not isinstance(stack, AdapterStack):
        raise InputError(f"{type(stack).__name__} is no stack", where="stack",
                         remedy="pass what resolve_stack returns")  # fmt: skip
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    strange = [p for p in prompts or () if not isinstance(p, Prompt | str)]
    if strange:
        raise InputError(f"{type(strange[0]).__name__} is no prompt", where="prompts",
                         remedy="pass texts or Prompts")  # fmt: skip
    claim = read_claim(stack, mode)
    live = read_live(model)
    bare: Any = live.bare
    vocabulary = int(bare.get_input_embeddings().weight.shape[0])
    rows = probe_ids(tokenizer, prompts, vocabulary)
    figures: dict[str, Any] = {"mode": claim.mode.name, "prompt_tokens": sum(map(len, rows))}
    with undisturbed(live.root):
        seen = capture(live, rows) if may_run(live) else None
        report = check_files(live, claim, seen)
        structure = check_structure(live, claim)
        hooks = check_hooks(live, rows, seen)
        whole: list[Verdict] = []
        away = any(tensor.device.type == "meta" for tensor in live.tensors.values())
        if end_to_end and seen is not None and not away:
            whole, more = check_end_to_end(live, claim, seen, report.sound)
            figures |= more
    factors = next(check for check in report.checks if check.name == ADAPTERS)
    state = check_state(live, claim, aliases(live, claim), applied_right=factors.passed)
    settings = check_settings(
        live,
        claim.checkpoint,
        [adapter.path for adapter in stack.adapters],
        mode=claim.mode,
        tokenizer=tokenizer,
        prompts=list(prompts or DEFAULT_PROMPTS),
        generation=generation,
    )
    return Certificate(
        subject=f"stack {stack.name}, mode {claim.mode.name} ({claim.mode.formula})",
        checks=(*state, *report.checks, *structure, hooks, *whole, *settings),
        figures=figures | dict(report.figures),
    )
