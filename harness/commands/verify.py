"""`lora-stack verify`: the certificate of every mode, from one load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from harness.options import (
    APPLICATION_OPTION,
    PROMPT_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
    chosen_preset,
)
from harness.options import stack_options as stack_options_of
from harness.terminal import console, errors, shown

if TYPE_CHECKING:
    from harness.certificate import Certificate
    from harness.preset import Preset
    from harness.stack import AdapterStack

SUMMARY = "prove that the stack is applied as claimed: the certificate, mode by mode"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_options(parser.add_argument_group("the prompts to probe with"), PROMPT_OPTIONS)
    add_options(parser, (APPLICATION_OPTION,))
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.preflight import check_stack_files
    from harness.resolve import stack_from_options
    from harness.verdict import overall

    options = stack_options_of(arguments)
    stack = stack_from_options(options)
    # Before torch is imported: what is broken is said in a second.
    check_stack_files(stack, trust_remote_code=options.trust_remote_code)
    preset = chosen_preset(arguments, stack)
    if not options.named:
        errors().print("no stack was named: this is the embedded tiny trained one")
    certificates = _certify(arguments, stack, preset)
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
    return 0 if outcome.passed else 1


def _named(mode: str, certificate: Certificate) -> Any:
    from harness.verdict import Verdict

    return Verdict(name=mode, outcome=certificate.verdict)


def _certify(
    arguments: argparse.Namespace, stack: AdapterStack, preset: Preset
) -> dict[str, Certificate]:
    from harness.certificate import Certificate, certify_stack
    from harness.completion import Application
    from harness.engines import load_engine
    from harness.engines.loading import ActivationError
    from harness.verdict import Outcome, Verdict

    application = Application(arguments.application)
    certificates: dict[str, Certificate] = {}
    widest = max(stack.modes, key=lambda mode: len(mode.adapters)).name if stack.modes else None
    try:
        with load_engine(
            stack,
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        ) as engine:
            for mode in stack.modes:
                errors().print(f"certifying {mode.name} …")
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
    except ActivationError as error:
        # The engine itself found the live model to be other than the files.
        check = Verdict(
            name="loading",
            outcome=Outcome.FAILED,
            evidence=(str(error),),
            remedy="check the adapter's folder against the base that it was trained on",
        )
        certificates["loading"] = Certificate(subject="the load", checks=(check,))
    return certificates


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
