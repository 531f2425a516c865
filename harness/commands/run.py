"""`lora-stack run`: every mode over every prompt in one load, shown side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.options import (
    APPLICATION_OPTION,
    PROMPT_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
    chosen_preset,
)
from harness.options import stack_options as stack_options_of
from harness.terminal import console, errors

if TYPE_CHECKING:
    from harness.completion import Completion
    from harness.preset import Preset
    from harness.report.run import RunReport
    from harness.stack import AdapterStack

SUMMARY = "generate with every mode, show them side by side, judge stopping and effect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_options(parser.add_argument_group("the prompts"), PROMPT_OPTIONS)
    add_options(parser, (APPLICATION_OPTION,))
    add_option(parser, "--output", metavar="DIR", help="where the report goes (runs/<time>-<id>)")
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.preflight import check_stack_files
    from harness.report.run import as_json, write_run
    from harness.report.terminal import print_banner, print_report
    from harness.resolve import stack_from_options
    from harness.staging import check_place, new_run_folder

    options = stack_options_of(arguments)
    stack = stack_from_options(options)
    # Before torch is imported: what is broken is said in a second.
    check_stack_files(stack, trust_remote_code=options.trust_remote_code)
    preset = chosen_preset(arguments, stack)
    folder = Path(arguments.output) if arguments.output else new_run_folder(Path("runs"))
    check_place(folder)
    out = errors() if arguments.json else console()
    print_banner(out, stack, preset, embedded=not options.named)
    report = _generate(arguments, stack, preset, out)
    if report.completions:
        write_run(report, folder)
    if arguments.json:
        json.dump(as_json(report), sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        print_report(out, report, folder)
    if not report.complete:
        return 130
    return 0 if report.outcome.passed else 1


def _generate(
    arguments: argparse.Namespace, stack: AdapterStack, preset: Preset, out: object
) -> RunReport:
    from harness.completion import Application
    from harness.engines import load_engine
    from harness.report.run import RunReport, judge_run
    from harness.report.terminal import print_loaded, progress_bar

    application = Application(arguments.application)
    completions: dict[str, tuple[Completion, ...]] = {}
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    complete, device, dtype = True, "", ""
    notes: list[str] = []
    try:
        with load_engine(
            stack,
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        ) as engine:
            seconds["load"] = time.perf_counter() - start
            device, dtype = engine.device, engine.dtype
            if engine.template_source not in ("none", "the base's"):
                notes.append(f"the chat template is {engine.template_source}: the base has none")
            if not engine.eos_token_ids:
                notes.append("the base's generation_config names no EOS: nothing can stop")
            for prompt in preset.prompts:
                engine.token_ids(prompt)  # a prompt that cannot be used is found before the first
            print_loaded(out, engine, application, seconds["load"])
            with progress_bar(errors(), [mode.name for mode in stack.modes]) as progress:
                for mode in stack.modes:
                    start = time.perf_counter()
                    completions[mode.name] = engine.generate(
                        preset.prompts,
                        mode,
                        preset.settings,
                        application=application,
                        progress=progress,
                    )
                    seconds[mode.name] = time.perf_counter() - start
    except KeyboardInterrupt:
        complete = False
        ran = sum(len(found) for found in completions.values())
        total = len(stack.modes) * len(preset.prompts)
        notes.append(f"interrupted: {ran} of {total} completions ran")
    return RunReport(
        stack=stack,
        preset=preset,
        device=device,
        dtype=dtype,
        application=application.value,
        completions=completions,
        verdicts=judge_run(stack, completions),
        seconds=seconds,
        notes=tuple(notes),
        complete=complete,
    )
