"""`lora-stack bench`: how fast is each mode, how near to the ceiling, did it get worse?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.display.terminal import console, errors, shown
from harness.errors import InputError
from harness.interrupts import exit_code
from harness.options import (
    BENCH_OPTIONS,
    add_option,
    add_options,
    add_stack_arguments,
    batch_sizes,
    random_ranks,
)
from harness.options import stack_options as stack_options_of

if TYPE_CHECKING:
    from harness.bench.cells import Cell
    from harness.bench.gate import Change, Thresholds
    from harness.bench.measuring import Measurer
    from harness.bench.results import Results
    from harness.stack import AdapterStack
    from harness.verdict import Verdict

SUMMARY = "measure every mode and application; hold the times against older ones"

_APPLICATIONS = ("live", "flattened", "merged")
_DECODINGS = ("dynamic", "static", "compiled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stack_arguments(parser)
    measured = parser.add_argument_group("what is measured")
    add_options(measured, BENCH_OPTIONS)
    add_option(measured, "--rounds", metavar="N", type=int, default=20, help="of every cell (20)")
    add_option(
        measured, "--repeats", metavar="N", type=int,
        help="generations a round, of which the fastest counts (CUDA 1, CPU 3)",
    )  # fmt: skip
    add_option(
        measured, "--applications", metavar="A,…", default=",".join(_APPLICATIONS),
        help="of: live, flattened, merged (all)",
    )  # fmt: skip
    add_option(
        measured, "--decoding", metavar="D,…", default="dynamic",
        help="of: dynamic, static, compiled (a fixed cache, CUDA graphs; CUDA alone)",
    )  # fmt: skip
    gate = parser.add_argument_group("the gate")
    add_option(
        gate, "--against", metavar="FILE|DIR",
        help="older results: a file, or a folder of nights",
    )  # fmt: skip
    add_option(
        gate, "--against-command", metavar="CMD",
        help="another commit's or environment's lora-stack; its rounds run in turn with ours",
    )  # fmt: skip
    add_option(
        gate, "--launches", metavar="N", type=int, default=10,
        help="of each side with --against-command; its rounds are spread over them (10)",
    )  # fmt: skip
    add_option(gate, "--results", metavar="FILE", help="judge and report these; measure nothing")
    add_option(
        gate, "--threshold", metavar="X", type=float, default=0.05,
        help="a smaller relative change never fails (0.05)",
    )  # fmt: skip
    add_option(parser, "--output", metavar="DIR", help="where the report goes (a new folder)")
    add_option(
        parser, "--json", action="store_true", help="one JSON object on standard output, no words"
    )
    add_option(parser, "--serve", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    from harness.files.staging import check_place
    from harness.report.latency import LatencyReport, as_json, write_latency
    from harness.report.latency_terminal import print_latency

    _check(arguments)
    if arguments.serve:
        return _serve(arguments)
    stack = _stack(arguments) if arguments.output and not arguments.results else None
    if arguments.output:
        check_place(Path(arguments.output), inputs=_inputs(stack) if stack else ())
    # Older results that cannot be read are found before anything is measured.
    history = _history(arguments.against)
    code = None
    if arguments.against_command:
        verdicts, changes, results, before, code = _in_turn(arguments)
        history = [before]
    else:
        if arguments.results:
            results = _given(arguments.results)
        else:
            results, code = _measured(arguments, stack or _stack(arguments))
        verdicts, changes = _judged(history, results, _thresholds(arguments))
    report = LatencyReport(
        results=results, verdicts=tuple(verdicts), changes=tuple(changes), history=tuple(history)
    )
    unwritten: InputError | None = None
    if arguments.output:
        try:
            write_latency(report, Path(arguments.output))
        except InputError as error:  # what was measured is shown all the same
            unwritten = error
    if arguments.json:
        json.dump(as_json(report), sys.stdout, ensure_ascii=False, indent=1)
        print()
    else:
        print_latency(console(), report, None if unwritten else arguments.output)
    if unwritten is not None:
        raise unwritten
    if code is not None:
        return code
    return 0 if report.outcome.passed else 1


def _inputs(stack: AdapterStack) -> list[Path]:
    """The folders that are measured; random weights have none."""
    found = [] if stack.random else [stack.base.path]
    return [*found, *(a.path for a in stack.adapters if a.random_rank is None)]


def _check(arguments: argparse.Namespace) -> None:
    for name in ("rounds", "repeats", "launches"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise InputError(f"{number} is below 1", where=f"--{name}", remedy="use 1 and more")
    if not 0 <= arguments.threshold < 10:
        raise InputError(f"{arguments.threshold} is no share", where="--threshold",
                         remedy="write 0.05 for 5 %")  # fmt: skip
    for name, known in (("applications", _APPLICATIONS), ("decoding", _DECODINGS)):
        for part in getattr(arguments, name).split(","):
            if part.strip() not in known:
                raise InputError(
                    f"{part.strip()!r} is none of {', '.join(known)}", where=f"--{name}",
                    remedy="separate several with commas",
                )  # fmt: skip
    if arguments.against_command and (arguments.against or arguments.results):
        raise InputError(
            "is a comparison of its own", where="--against-command",
            remedy="leave out --against and --results",
        )  # fmt: skip
    # Each visit enters a mode anew and would compile anew: minutes a round, and past dynamo's limit
    # of recompilations the steps run uncompiled under the same name.
    if (arguments.against_command or arguments.serve) and "compiled" in arguments.decoding:
        raise InputError(
            "cannot be measured in turn", where="--decoding compiled",
            remedy="hold it against stored results: --against FILE",
        )  # fmt: skip


def _thresholds(arguments: argparse.Namespace) -> Thresholds:
    from harness.bench.gate import Thresholds

    return Thresholds(relative=arguments.threshold)


def _history(path: str | None) -> list[Results]:
    from harness.bench.storing import read_history

    return read_history(Path(path)) if path else []


def _given(path: str) -> Results:
    from harness.bench.results import read_results

    return read_results(Path(path))


def _loaded(
    arguments: argparse.Namespace, stack: AdapterStack, *, ceilings: bool
) -> tuple[Measurer, list[Cell]]:
    """The stack, loaded, and the cells asked for."""
    from harness.bench.cells import Lengths, cells_of
    from harness.bench.clock import synchronise
    from harness.bench.measuring import Measurer, default_lengths
    from harness.completion import Application
    from harness.engines import load_for_timing

    if not stack.modes:
        raise InputError("has no modes", where=stack.name)
    start = time.perf_counter()
    engine = load_for_timing(
        stack,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    synchronise(engine.device)
    load_s = time.perf_counter() - start
    usual = default_lengths(engine.device)
    lengths = Lengths(
        input_tokens=arguments.input_tokens or usual.input_tokens,
        output_tokens=arguments.output_tokens or usual.output_tokens,
        batch_sizes=batch_sizes(arguments.batch_sizes) or usual.batch_sizes,
    )
    cells = cells_of(
        stack,
        lengths,
        applications=[Application(part.strip()) for part in arguments.applications.split(",")],
        decodings=[part.strip() for part in arguments.decoding.split(",")],
    )
    return Measurer(engine, load_s=load_s, ceilings=ceilings), list(cells)


def _stack(arguments: argparse.Namespace) -> AdapterStack:
    from harness.resolve import stack_from_options

    stack = stack_from_options(
        stack_options_of(arguments),
        random_base=True,
        random_ranks=random_ranks(arguments.random_rank),
    )
    if arguments.random_rank and all(a.random_rank is None for a in stack.adapters):
        raise InputError(
            "builds adapters for a random base, and this stack has its own", where="--random-rank",
            remedy="give --base-model random:… and no adapters, or leave it out",
        )  # fmt: skip
    return stack


def _measured(arguments: argparse.Namespace, stack: AdapterStack) -> tuple[Results, int | None]:
    """What was measured, and the exit code of an interrupt that came before the end."""
    from harness.bench.session import results_of
    from harness.bench.visiting import Visit, collected_so_far, interleaved

    out = errors() if arguments.json else console()
    if not stack_options_of(arguments).named:
        out.print("no stack was named: this is the embedded tiny trained one")
    if stack.random:
        out.print(f"{shown(stack.base.source)}: random weights; only its times mean anything")
    measurer, cells = _loaded(arguments, stack, ceilings=True)
    visits: dict[str, list[Visit]] = {}
    code, interrupted = None, ""
    with measurer.engine, _progress(f"{len(cells)} cells × {arguments.rounds}") as report:
        try:
            made, skipped = interleaved(
                measurer, cells, arguments.rounds, repeats=_repeats(arguments, measurer),
                progress=report, visits=visits,
            )  # fmt: skip
            measurer.close_ceilings()
        except KeyboardInterrupt as error:
            made, skipped = collected_so_far(measurer, cells, visits)
            if not made:
                raise
            notes = getattr(error, "__notes__", ["all rounds were measured, the end not reached"])
            code, interrupted = exit_code(error), "; ".join(notes)
        results = results_of(measurer, made, skipped, in_turn=True, interrupted=interrupted)
    return results, code


def _repeats(arguments: argparse.Namespace, measurer: Measurer) -> int:
    from harness.bench.measuring import default_repeats

    return arguments.repeats or default_repeats(measurer.device)


def _serve(arguments: argparse.Namespace) -> int:
    from harness.bench.pairing import answers_on, serve

    with answers_on() as answers:
        measurer, cells = _loaded(arguments, _stack(arguments), ceilings=True)
        with measurer.engine:
            serve(measurer, cells, sys.stdin, answers, repeats=_repeats(arguments, measurer))
    return 0


def _in_turn(
    arguments: argparse.Namespace,
) -> tuple[list[Verdict], list[Change], Results, Results, int | None]:
    """The other command's rounds in turn with ours; both started several times. After an interrupt
    the launches that are done, and the exit code."""
    from contextlib import ExitStack
    from dataclasses import replace

    from harness.bench.judging import judge_pair
    from harness.bench.pairing import Worker, in_turn
    from harness.bench.results import joined

    try:
        other = shlex.split(arguments.against_command)
    except ValueError as error:
        raise InputError(
            f"cannot be read as a command: {error}",
            where="--against-command",
            remedy="quote it as for a shell",
        ) from error
    if not other:
        raise InputError("is empty", where="--against-command", remedy="name a lora-stack")
    rest = _serving(sys.argv[1:])
    ours = [sys.executable, "-m", "harness.cli"]
    launches = min(arguments.launches, arguments.rounds)
    rounds = -(-arguments.rounds // launches)
    old: list[Results] = []
    new: list[Results] = []
    try:
        with _progress(f"{launches} launches × {rounds} rounds in turn") as report:
            for launch in range(launches):

                def part(share: float, launch: int = launch) -> None:
                    report((launch + share) / launches)

                with ExitStack() as running:
                    workers = [
                        running.enter_context(Worker([*command, *rest], name))
                        for command, name in ((other, "old"), (ours, "new"))
                    ]
                    before, now = in_turn(workers, rounds, progress=part, seed=launch)
                old.append(before)
                new.append(now)
    except KeyboardInterrupt as error:
        so_far = f"{len(new)} of {launches} launches of each side were measured"
        if not new:
            error.add_note(so_far)
            raise
        result = replace(joined(new), interrupted=so_far)
        return [_interrupted(result)], [], result, joined(old[: len(new)]), exit_code(error)
    verdicts, changes = judge_pair(old, new, _thresholds(arguments))
    return verdicts, changes, joined(new), joined(old), None


def _serving(argv: Sequence[str]) -> list[str]:
    """Our own words for a worker: what is measured, without the gate's and the report's."""
    from harness.options import with_dashes

    kept: list[str] = []
    words = iter(with_dashes(argv))
    for word in words:
        name, equals, _ = word.partition("=")
        if name in ("--against-command", "--launches", "--output", "--threshold"):
            if not equals:
                next(words, None)
        elif word != "--json":
            kept.append(word)
    return [*kept, "--serve"]


def _judged(
    history: list[Results], results: Results, thresholds: Thresholds
) -> tuple[list[Verdict], list[Change]]:
    from harness.bench.judging import judge_history
    from harness.verdict import Outcome, Verdict

    if results.interrupted:
        return [_interrupted(results)], []
    if history:
        return judge_history(history, results, thresholds)
    measured = Verdict(
        name="latency: compared",
        outcome=Outcome.SKIPPED,
        evidence=(f"{len(results.cells)} cells measured, compared with nothing: see --against",),
    )
    skipped = [
        Verdict(name=f"latency: {key}", outcome=Outcome.SKIPPED, evidence=(reason,))
        for key, reason in results.skipped.items()
    ]
    return [measured, *skipped], []


def _interrupted(results: Results) -> Verdict:
    """Part of a session is not compared: what it lacks would be missing from it for good."""
    from harness.verdict import Outcome, Verdict

    said = f"interrupted: {results.interrupted}; compared with nothing"
    return Verdict(name="latency: the session", outcome=Outcome.UNDECIDED, evidence=(said,))


class _progress:
    """A bar on standard error while the block runs; gives what reports the share done."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> Callable[[float], None]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
            console=errors(), transient=True,
        )  # fmt: skip
        self._bar.start()
        task = self._bar.add_task(self._words, total=1.0)
        return lambda share: self._bar.update(task, completed=share)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
