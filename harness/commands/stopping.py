"""`lora-stack stopping`: does each mode stop, how sure is that, why not, and who is to blame."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.display.terminal import console, errors, shown
from harness.interrupts import exit_code
from harness.options import (
    APPLICATION_OPTION,
    PROMPT_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
)
from harness.options import stack_options as stack_options_of

if TYPE_CHECKING:
    from harness.completion import Application, Completion
    from harness.engines.peft import PeftEngine
    from harness.preset import Preset
    from harness.snapshot import Snapshot
    from harness.stack import AdapterStack
    from harness.stopping import StoppingReport

SUMMARY = "say whether each mode stops, how sure that is, why not, and who is to blame"

#: Columns that a terminal has no room for.
_LEFT_OUT = ("stop reasons", "median", "by up to", "cut off early", "EOS margin", "mean tokens")

_WIDEST = 24  # characters that a column keeps to itself, however narrow the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    add_options(parser.add_argument_group("the prompts"), PROMPT_OPTIONS)
    add_options(parser, (APPLICATION_OPTION,))
    add_option(
        parser,
        "--samples",
        metavar="K",
        type=int,
        default=0,
        help="also sample each prompt K times",
    )
    add_option(
        parser, "--temperature", metavar="T", type=float, default=1.0, help="of the samples (1)"
    )
    add_option(
        parser, "--sweep", action="store_true", help="also try other weights of the adapters"
    )
    add_option(parser, "--merged", metavar="DIR", help="a merged copy: does it end likewise?")
    add_option(parser, "--dataset", metavar="FILE", help="training data: is EOS in the loss?")
    add_option(
        parser, "--labels", metavar="WHAT", default="assistant",
        help="what is in the loss: assistant, words, all, collator, template",
    )  # fmt: skip
    add_option(
        parser, "--snapshots", metavar="DIR",
        help="replay the completions accepted in DIR: nothing that still holds is generated",
    )  # fmt: skip
    add_option(
        parser, "--files-only", action="store_true", help="the files alone: no model is loaded"
    )
    add_option(parser, "--output", metavar="DIR", help="write the report with its plots here")
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )


def run(arguments: argparse.Namespace) -> int:
    from harness.errors import InputError
    from harness.files.staging import check_place
    from harness.report.stopping import as_json
    from harness.resolve import stack_from_options

    if arguments.samples < 0 or arguments.temperature <= 0:
        raise InputError(
            "is too small", where="--samples or --temperature", remedy="give 1 or more"
        )
    if arguments.files_only and (arguments.samples or arguments.sweep or arguments.snapshots):
        raise InputError(
            "loads no model", where="--files-only",
            remedy="leave it out, or leave --samples, --sweep and --snapshots out",
        )  # fmt: skip
    options = stack_options_of(arguments)
    stack = stack_from_options(options)
    preset = _preset(arguments, stack)
    folder = Path(arguments.output) if arguments.output else None
    if folder is not None:
        check_place(folder, inputs=[stack.base.path, *(a.path for a in stack.adapters)])
    if not options.named:
        errors().print("no stack was named: this is the embedded tiny trained one")
    said: dict[str, tuple[Completion | Snapshot, ...]] = {}
    code = None
    try:
        report = _examine(arguments, stack, preset, said)
    except KeyboardInterrupt as error:
        if not said:
            error.add_note(f"0 of {len(stack.modes)} modes were generated")
            raise
        code = exit_code(error)
        report = _so_far(stack, said, application=arguments.application)
    unwritten: InputError | None = None
    if folder is not None:
        try:
            _write(report, folder)
        except InputError as error:  # what was found is shown all the same
            unwritten, folder = error, None
    if arguments.json:
        json.dump(as_json(report), sys.stdout, ensure_ascii=False, indent=1, allow_nan=False)
        print()
    else:
        _print(report, folder)
    if unwritten is not None:
        raise unwritten
    if code is not None:
        return code
    return 0 if report.passed else 1


def _preset(arguments: argparse.Namespace, stack: AdapterStack) -> Preset:
    """As everywhere, but the stack's preset for stopping comes before its own."""
    from harness.options import chosen_preset

    return chosen_preset(arguments, replace(stack, preset=stack.stopping_preset or stack.preset))


def _examine(
    arguments: argparse.Namespace,
    stack: AdapterStack,
    preset: Preset,
    said: dict[str, tuple[Completion | Snapshot, ...]],
) -> StoppingReport:
    """The report; *said* is filled on the way, a mode as soon as it is through."""
    from harness.completion import Application
    from harness.stopping import examine_stopping

    extra = {"merged": arguments.merged, "dataset": arguments.dataset, "labels": arguments.labels}
    if arguments.files_only:
        from harness.preflight import check_stack_files

        check_stack_files(stack, trust_remote_code=arguments.trust_remote_code)
        return examine_stopping((), stack=stack, **extra)
    from harness.engines import load_engine

    settings = replace(preset.settings, temperature=arguments.temperature)
    with load_engine(
        stack,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    ) as engine:
        common = {
            "prompts": preset.prompts,
            "settings": settings,
            "application": Application(arguments.application),
            "samples": arguments.samples,
            "sweep": arguments.sweep,
            **extra,
        }
        if arguments.snapshots:
            _replay(engine, Path(arguments.snapshots), preset, common["application"], said)
            return examine_stopping(said, engine=engine, **common)
        return examine_stopping(engine, modes=stack.modes, said=said, **common)


def _so_far(
    stack: AdapterStack, said: dict[str, tuple[Completion | Snapshot, ...]], *, application: str
) -> StoppingReport:
    """The report after an interrupt: of the modes that are through, without asking a model."""
    from harness.completion import Application
    from harness.stopping import examine_stopping
    from harness.verdict import Outcome, Verdict

    report = examine_stopping(said, stack=stack, application=Application(application))
    told = f"interrupted: {len(said)} of {len(stack.modes)} modes were generated"
    if len(said) == len(stack.modes):
        told += "; their examination did not get to its end"
    undecided = Verdict(name="stopping: run", outcome=Outcome.UNDECIDED, evidence=(told,))
    return replace(report, verdicts=(undecided, *report.verdicts))


def _replay(
    engine: PeftEngine,
    folder: Path,
    preset: Preset,
    application: Application,
    said: dict[str, tuple[Completion | Snapshot, ...]],
) -> None:
    """What each mode says to the preset's prompts, replayed from what was accepted in *folder* (or
    in a test module's part of it); generated only where the stack says something else by now."""
    from harness.errors import InputError
    from harness.replay import replay_completions
    from harness.snapshot import draft_tokens, snapshot_name

    for mode in engine.stack.modes:
        names = [f"{snapshot_name(preset.name, p.id, mode.name)}.toml" for p in preset.prompts]
        paths = [
            next((q for q in (folder / n, *sorted(folder.glob(f"*/{n}"))) if q.is_file()), None)
            for n in names
        ]
        if not any(paths):
            raise InputError(
                f"holds no accepted completion of the preset {preset.name} in mode {mode.name}",
                where=folder,
                remedy="accept some with pytest --snapshot-update, or name another --preset",
            )
        found = replay_completions(
            engine, preset.prompts, mode, preset.settings,
            drafts=[draft_tokens(path) if path else None for path in paths],
            application=application,
        )  # fmt: skip
        fresh = sum(str(one) != "replayed" for one in found)
        if fresh:
            errors().print(f"{mode.name}: {fresh} of {len(found)} had to be generated")
        said[mode.name] = tuple(one.completion for one in found)


def _write(report: StoppingReport, folder: Path) -> None:
    from harness.report.stopping import write_stopping

    plots = []
    try:
        from harness.stopping.plots import stopping_plots

        plots = stopping_plots(report)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        errors().print("no plots: pip install 'lora-stack-harness[plots]' brings matplotlib")
    write_stopping(report, folder, plots=plots)


def _print(report: StoppingReport, folder: Path | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from harness.display.page import cell
    from harness.report.stopping import tables
    from harness.report.terminal import outcome_style

    out = console()
    for table in tables(report):
        # The blame is said in a sentence below, the completions are in the report.
        if table["title"] in ("Blame", "Completions"):
            continue
        kept = [n for n, name in enumerate(table["head"]) if name not in _LEFT_OUT]
        title = Text(table["title"], style="bold")
        grid = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title,
            title_justify="left",
        )  # fmt: skip
        cells = [[cell(row[place], 3) for place in kept] for row in table["rows"]]
        for number, place in enumerate(kept):
            head = shown(table["head"][place])
            words = [*head.split(), *(row[number] for row in cells)]
            width = min(_WIDEST, max(map(len, words), default=0))
            grid.add_column(head, overflow="fold", min_width=width)
        for row in cells:
            grid.add_row(*map(Text, row))
        if cells:
            out.print(grid)
    for check in report.checks:
        style = outcome_style(check.outcome)
        mark = "✓" if check.passed else "✗"
        first, *rest = check.evidence or ("",)
        out.print(
            Text.assemble(
                (f"{mark} {check.name}: {check.outcome.value}", style), "  ", shown(first)
            ),
            soft_wrap=True,
        )
        if not check.passed:
            for line in rest:
                out.print(Text(f"    {shown(line)}"), soft_wrap=True)
            if check.remedy:
                out.print(Text(f"  → {shown(check.remedy)}"), soft_wrap=True)
    for cause in report.causes:
        where = f" in {cause.mode}" if cause.mode else ""
        out.print(Text(f"cause{where}: {cause.kind}: {shown(cause.text)}", style="bold red"),
                  soft_wrap=True)  # fmt: skip
        out.print(Text(f"  → {shown(cause.remedy)}"), soft_wrap=True)
    for mode, blame in report.blame.items():
        out.print(Text(f"{mode}: {shown(blame.sentence)}"), soft_wrap=True)
    for note in report.notes:
        out.print(Text(f"note: {shown(note)}", style="yellow"))
    out.print(Text.assemble("verdict: ", (report.verdict.value, outcome_style(report.verdict))))
    if folder is not None:
        out.print(Text(f"report:  {folder / 'report.html'}"))
