"""`examine_stopping`: from a loaded stack, or from completions that exist already, to the report.

Where completions are given, nothing is generated but for a failing mode's experiments, and without
an engine nothing at all is asked of a model. Here it is said what is done, and in which order; how
is `harness.stopping.examination`'s. Knows nothing of the command line or of files' form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.completion import Application, Completion, GenerationSettings, Prompt
from harness.errors import InputError
from harness.snapshot_form import Snapshot
from harness.stack import AdapterStack, Mode
from harness.stopping.examination import Examination, Said
from harness.stopping.values import StoppingReport

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.stopping.training_data import DatasetFigures

__all__ = ["examine_stopping"]


def examine_stopping(
    source: Any,
    *,
    engine: PeftEngine | None = None,
    stack: AdapterStack | None = None,
    prompts: Sequence[Prompt] | None = None,
    settings: GenerationSettings | None = None,
    modes: Sequence[Mode | str] | None = None,
    stops: Mapping[str, Any] | None = None,
    application: Application = Application.LIVE,
    samples: int = 0,
    blame: bool = True,
    sweep: bool = False,
    merged: Path | str | None = None,
    dataset: Path | str | None = None,
    labels: str = "assistant",
    progress: Callable[[str, float], None] | None = None,
    said: dict[str, tuple[Said, ...]] | None = None,
) -> StoppingReport:
    """Say of each mode whether it stops, how sure that is, why not, and who is to blame.

    Args:
        source: a loaded engine, which generates for *prompts*; or completions or snapshots, in one
            sequence or by mode, which cost no generation.
        engine: beside completions: traces EOS along them and blames adapters by forward passes.
        stack: where there is no engine: whose files and `[stops]` count.
        stops: expectations by mode, instead of the stack's.
        samples: also sample each prompt this often (needs an engine).
        sweep: also try other weights of the first and last adapter (needs an engine).
        merged: a merged copy, whose files are held against the stack's.
        dataset: training data to check (`check_training_data`); *labels* as there.
        said: filled with what an engine generates, a mode as soon as it is through, for whoever
            is interrupted: examined as *source*, it needs no engine.

    Raises:
        InputError: an engine without prompts, a mode that is unknown, files that cannot be read.
    """
    case = Examination(
        engine=engine, stack=stack, application=application, stops=stops, progress=progress,
        said={} if said is None else said,
    )  # fmt: skip
    if hasattr(source, "generate"):
        case.engine, case.stack = source, source.stack
        if not prompts:
            raise InputError("an engine needs prompts", where="examine_stopping",
                             remedy="pass prompts=load_preset(…).prompts")  # fmt: skip
    else:
        _take(case, source, modes)
    case.stack = case.stack or (case.engine.stack if case.engine else None)
    # What can be refused is refused before anything is generated.
    if (samples or sweep) and (case.engine is None or not prompts):
        raise InputError("samples and a sweep generate", where="examine_stopping",
                         remedy="give an engine, and prompts")  # fmt: skip
    case.read_files(Path(merged) if merged is not None else None)
    training = None if dataset is None else _training_data(case, Path(dataset), labels)
    if case.engine is source:
        _generate(case, prompts or (), settings or GenerationSettings(), modes)
    for mode, found in case.said.items():
        case.figure(mode, found)
    case.judge()
    if case.engine is not None:
        case.trace()
        if blame:
            case.assign_blame()
    case.find_causes()
    if samples and prompts:
        case.sample(prompts, settings or GenerationSettings(), samples)
    swept = None
    if sweep and prompts:
        swept = case.try_weights(prompts, settings or GenerationSettings())
    report = replace(case.report(), sweep=swept)
    if training is not None:
        causes = (training.cause,) if training.cause is not None else ()
        report = replace(report, dataset=training, causes=(*report.causes, *causes))
    return report


def _generate(
    case: Examination,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    modes: Sequence[Mode | str] | None,
) -> None:
    assert case.engine is not None
    assert case.stack is not None
    chosen = [case.stack.mode(m) if isinstance(m, str) else m for m in modes or case.stack.modes]
    for mode in chosen:
        case.modes[mode.name] = mode
        case.said[mode.name] = case.engine.generate(
            prompts, mode, settings, application=case.application, progress=case.progress
        )
        case.generated += len(prompts)


def _take(case: Examination, source: Any, modes: Sequence[Mode | str] | None) -> None:
    if isinstance(source, Mapping):
        case.said = {str(mode): tuple(found) for mode, found in source.items()}
    else:
        by_mode: dict[str, list[Said]] = {}
        for one in _said(source):
            by_mode.setdefault(one.mode, []).append(one)
        case.said = {mode: tuple(found) for mode, found in by_mode.items()}
    if modes is not None:
        wanted = [m if isinstance(m, str) else m.name for m in modes]
        case.said = {mode: found for mode, found in case.said.items() if mode in wanted}


def _said(source: Any) -> Iterable[Said]:
    for one in source if isinstance(source, Iterable) else (source,):
        if not isinstance(one, Completion | Snapshot):
            raise InputError(
                f"{type(one).__name__} is neither an engine, a completion nor a snapshot",
                where="examine_stopping",
                remedy="pass load_engine(stack), or completions or snapshots",
            )
        yield one


def _training_data(case: Examination, dataset: Path, labels: str) -> DatasetFigures:
    from harness.engines.described import fresh_tokenizer
    from harness.stopping.training_data import check_training_data

    if case.stack is None:
        raise InputError(
            "training data needs a stack, whose tokenizer reads it", where="examine_stopping"
        )
    tokenizer = case.engine.tokenizer if case.engine else fresh_tokenizer(case.stack.base.path)
    return check_training_data(dataset, tokenizer, stops=case.stop_ids, labels=labels)
