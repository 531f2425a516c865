"""`lora-stack verify`: the certificate of every mode, from one load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from harness.display.terminal import console, errors, shown
from harness.interrupts import exit_code
from harness.options import (
    APPLICATION_OPTION,
    PROMPT_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
    chosen_preset,
)
from harness.options import stack_options as stack_options_of

if TYPE_CHECKING:
    from harness.certificate import Certificate
    from harness.preset import Preset
    from harness.stack import AdapterStack, Mode
    from harness.verdict import Outcome

SUMMARY = "prove that the stack is applied as claimed: the certificate, mode by mode"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_options(parser.add_argument_group("the prompts to probe with"), PROMPT_OPTIONS)
    add_options(parser, (APPLICATION_OPTION,))
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.checkpoint_files import read_checkpoint
    from harness.preflight import check_stack_files
    from harness.resolve import stack_from_options
    from harness.verdict import Outcome, overall

    options = stack_options_of(arguments)
    stack = stack_from_options(options)
    # Before torch is imported: what is broken is said in a second.
    check_stack_files(stack, trust_remote_code=options.trust_remote_code)
    if not stack.random:
        read_checkpoint(stack.base.path).refuse_quantised()
    preset = chosen_preset(arguments, stack)
    if not options.named:
        errors().print("no stack was named: this is the embedded tiny trained one")
    certificates: dict[str, Certificate] = {}
    code = None
    try:
        _certify(arguments, stack, preset, certificates)
    except KeyboardInterrupt as error:
        code = exit_code(error)
        done = f"interrupted: {len(certificates)} of {len(stack.modes)} modes were certified"
        certificates["the rest"] = _one_check("the rest", Outcome.UNDECIDED, done)
    verdicts = [_named(mode, c) for mode, c in certificates.items()]
    outcome = overall(verdicts)
    if arguments.json:
        document = {
            "verdict": outcome.value,
            "stack": stack.name,
            "checks": [
                check.as_json() | {"name": f"{mode}: {check.name}"}
                for mode, certificate in certificates.items()
                for check in certificate.checks
            ],
            "modes": {mode: dict(c.figures) for mode, c in certificates.items()},
        }
        json.dump(document, sys.stdout, ensure_ascii=True, indent=2)
        print()
    else:
        _print(stack, certificates, outcome.value)
    if code is not None:
        return code
    return 0 if outcome.passed else 1


def _named(mode: str, certificate: Certificate) -> Any:
    from harness.verdict import Verdict

    return Verdict(name=mode, outcome=certificate.verdict)


def _one_check(
    subject: str, outcome: Outcome, said: str, remedy: str | None = None, *, name: str = "run"
) -> Certificate:
    from harness.certificate import Certificate
    from harness.verdict import Verdict

    check = Verdict(name=name, outcome=outcome, evidence=(said,), remedy=remedy)
    return Certificate(subject=subject, checks=(check,))


def _certify(
    arguments: argparse.Namespace,
    stack: AdapterStack,
    preset: Preset,
    certificates: dict[str, Certificate],
) -> None:
    """Fill *certificates*; a mode that runs out of memory is not the last."""
    from harness.certificate import certify_stack
    from harness.completion import Application
    from harness.engines import load_engine
    from harness.engines.faults import attempt
    from harness.engines.loading import ActivationError
    from harness.verdict import Outcome

    application = Application(arguments.application)
    widest = max(stack.modes, key=lambda mode: len(mode.adapters)).name if stack.modes else None
    broken_by = ""
    try:
        with load_engine(
            stack,
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        ) as engine:
            if engine.tokenizer.chat_template is not None:  # else their words are probed with
                for prompt in preset.prompts:
                    engine.token_ids(prompt)  # one that is refused is found before the first mode
            for mode in stack.modes:
                if broken_by:
                    said = f"not run: the device has been broken since the mode {broken_by}"
                    certificates[mode.name] = _one_check(mode.name, Outcome.UNDECIDED, said)
                    continue
                errors().print(f"certifying {mode.name} …")

                def certify(mode: Mode = mode) -> None:
                    with engine.mode(mode, application) as model:
                        certificates[mode.name] = certify_stack(
                            model,
                            stack,
                            mode=mode,
                            tokenizer=engine.tokenizer,
                            prompts=preset.prompts,
                            generation=preset.settings,
                            end_to_end=mode.name == widest,
                        )

                fault = attempt(certify)
                if fault is not None:
                    certificates[mode.name] = _one_check(
                        mode.name, Outcome.FAILED, fault.said, fault.remedy
                    )
                    broken_by = mode.name if fault.sticky else ""
    except ActivationError as error:
        # The engine itself found the live model to be other than the files.
        certificates["loading"] = _one_check(
            "the load",
            Outcome.FAILED,
            str(error),
            "check the adapter's folder against the base that it was trained on",
            name="loading",
        )


def _print(stack: AdapterStack, certificates: dict[str, Certificate], outcome: str) -> None:
    from rich.text import Text

    from harness.report.terminal import outcome_style
    from harness.verdict import Outcome

    out = console()
    for certificate in certificates.values():
        out.print()
        out.print(Text(shown(certificate.subject), style="bold"))
        width = max(len(check.name) for check in certificate.checks)
        for check in certificate.checks:
            mark = "–" if check.outcome is Outcome.SKIPPED else "✓" if check.passed else "✗"
            style = outcome_style(check.outcome)
            first, *rest = check.evidence or ("",)
            line = Text.assemble((f"{mark} {check.name:<{width}}", style), "  ", shown(first))
            out.print(line, soft_wrap=True)
            for more in rest:
                out.print(Text(f"  {'':<{width}}  {shown(more)}"), soft_wrap=True)
            if check.remedy and not check.passed:
                out.print(Text(f"  {'':<{width}}  → {shown(check.remedy)}"), soft_wrap=True)
    out.print()
    out.print(Text.assemble("verdict: ", (outcome, outcome_style(Outcome(outcome)))))
