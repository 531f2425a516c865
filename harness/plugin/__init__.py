"""The plugin: options with ini twins, fixtures, header; whatever pytest finds by name is here.

Loaded by the `pytest11` entry point in every pytest run, so it imports nothing heavy, names every
fixture `lora_…`, and says nothing where no stack is asked for. Knows how to ask for things; what
they mean is known below. Parametrising, accepted completions, saving, latency, orphans and the
summary have modules of their own beside it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from harness.adapter_files import adapter_digest
from harness.completion import Completion, Prompt
from harness.display.terminal import shown
from harness.errors import InputError
from harness.interrupts import terminable
from harness.options import spellings
from harness.plugin.accepted import ACCEPTED, Accepted
from harness.plugin.completions import Completions
from harness.plugin.concluding import pytest_assertrepr_compare, pytest_runtest_makereport
from harness.plugin.latency import (
    lora_cell,
    lora_latency,
    lora_measured,
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
    skip_without_meaning,
)
from harness.plugin.orphans import ORPHANS, find_orphans, remember_collected
from harness.plugin.parametrising import (
    lora_declared_mode,
    lora_mode,
    lora_mode_pair,
    lora_prompt,
    pytest_generate_tests,
)
from harness.plugin.saving import UNSAVED, check_saving, save_whole
from harness.plugin.setting import (
    DEST,
    OPTIONS,
    SETTING,
    ini_name,
    read_setting,
    snapshots_folder,
)
from harness.plugin.summary import write_end, write_summary
from harness.preset import Preset
from harness.provenance import versions
from harness.resolve import StackOptions, stack_from_options
from harness.stack import AdapterStack, Mode
from harness.verdict import Verdict

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine

__all__ = [
    "Completions",
    "lora_cell",
    "lora_declared_mode",
    "lora_latency",
    "lora_measured",
    "lora_mode",
    "lora_mode_pair",
    "lora_prompt",
    "pytest_assertrepr_compare",
    "pytest_benchmark_compare_machine_info",
    "pytest_benchmark_update_json",
    "pytest_benchmark_update_machine_info",
    "pytest_generate_tests",
    "pytest_runtest_makereport",
]

_MARKERS = (
    "gpu: needs CUDA; skipped without it, an error with --require-gpu",
    "slow: takes more than a few seconds",
    "snapshot: compares completions with accepted ones",
    "stacking: proves that the stack is applied as claimed",
    "stopping: holds stop behaviour against what is declared",
    "latency: measures time",
)
_TRAINABLE_BYTES = 1 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-stack", "stacks of LoRA adapters")
    for option in OPTIONS:
        arguments: dict[str, Any] = {"dest": DEST + option.dest, "help": option.help}
        if option.is_flag:
            arguments |= {"action": "store_true", "default": None}
        else:
            arguments |= {"metavar": option.metavar, "type": option.type or str, "default": None}
            if option.repeated:
                arguments["action"] = "append"
        group.addoption(*spellings(option.flag), **arguments)
        kind = "linelist" if option.repeated else "bool" if option.is_flag else "string"
        parser.addini(ini_name(option), f"as {option.flag}: {option.help}", type=kind)  # type: ignore[arg-type]
    group.addoption(
        "--require-gpu",
        action="store_true",
        dest=DEST + "require_gpu",
        help="tests marked gpu fail without CUDA instead of being skipped",
    )
    group.addoption(
        "--snapshot-profile",
        metavar="NAME",
        dest=DEST + "profile",
        help="keep snapshots apart in snapshots/NAME/",
    )
    group.addoption(
        "--no-replay",
        action="store_true",
        dest=DEST + "no_replay",
        help="generate every completion anew, instead of replaying what is accepted",
    )
    group.addoption(
        "--lora-drift",
        choices=("fail", "warn"),
        dest=DEST + "drift",
        help="whether moved probabilities of an unchanged text fail (the default) or only warn",
    )
    parser.addini("lora_drift", "as --lora-drift: fail or warn", default="fail")
    parser.addini("lora_snapshots", "the folder of accepted completions", default="snapshots")


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    setting = read_setting(config)
    config.stash[SETTING] = setting
    if setting.asked_for and not config.option.help:
        # A stack that cannot be had is an error before any test is collected.
        try:
            _ = setting.stack, setting.preset, snapshots_folder(config)
            check_saving(config)
        except InputError as error:
            raise pytest.UsageError(shown(str(error))) from None
        if os.environ.get("CI") and config.getoption("update_snapshots", False):
            raise pytest.UsageError(
                "--snapshot-update: CI never accepts snapshots (CI is set in the environment) → "
                "accept them where a person reads them: lora-stack review"
            )


def pytest_report_header(config: pytest.Config) -> list[str] | None:
    setting = config.stash[SETTING]
    if not setting.asked_for:
        return None
    stack = setting.stack
    lines = [f"lora-stack: {stack.name}, base {stack.base.source} ({stack.base.chosen_by})"]
    if stack.random:
        lines.append("  RANDOM WEIGHTS: only times mean anything; every other test is skipped")
    lines += [
        f"  adapter {a.name}: {a.source}"
        + (f" sha256 {adapter_digest(a.path)[:12]}" if a.random_rank is None else "")
        for a in stack.adapters
    ]
    lines.append(
        f"  modes {', '.join(m.name for m in stack.modes)} × {len(setting.preset.prompts)} prompts "
        f"of {setting.preset.name}; device {setting.values['device'] or 'default'}, "
        f"dtype {setting.values['dtype'] or 'as stored'}"
    )
    lines.append("  " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    return [shown(line) for line in lines]


def pytest_runtest_setup(item: pytest.Item) -> None:
    skip_without_meaning(item)
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    reason = f"no CUDA device (torch {torch.__version__})"
    if item.config.getoption(DEST + "require_gpu"):
        pytest.fail(f"{reason}, and --require-gpu was given", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lora_stack(pytestconfig: pytest.Config) -> AdapterStack:
    """The stack under test."""
    return pytestconfig.stash[SETTING].stack


@pytest.fixture(scope="session")
def lora_preset(pytestconfig: pytest.Config) -> Preset:
    """The preset under test, with `--max-new-tokens` and `--batch-size` applied."""
    return pytestconfig.stash[SETTING].preset


@pytest.fixture(scope="session")
def lora_engine(pytestconfig: pytest.Config, lora_stack: AdapterStack) -> Iterator[PeftEngine]:
    """The loaded stack; one load a session (a worker, under xdist)."""
    from harness.engines import load_engine

    values = pytestconfig.stash[SETTING].values
    try:
        engine = load_engine(
            lora_stack,
            device=values["device"],
            dtype=values["dtype"],
            trust_remote_code=bool(values["trust_remote_code"]),
        )
    except InputError as error:
        pytest.fail(shown(str(error)), pytrace=False)
    except Exception as error:
        from harness.engines.faults import device_fault

        fault = device_fault(error)
        if fault is None:
            raise
        pytest.fail(shown(f"{fault.said} → {fault.remedy}"), pytrace=False)
    with engine:
        yield engine


@pytest.fixture(scope="session")
def lora_training_stack(lora_stack: AdapterStack) -> AdapterStack:
    """A stack of several adapters that a training step can be taken on here, in float32 on a CPU:
    the one under test if it is small enough, otherwise the embedded one."""
    from harness.checkpoint_files import read_checkpoint

    shards = read_checkpoint(lora_stack.base.path).shards
    if len(lora_stack.adapters) > 1 and sum(shard.size for shard in shards) < _TRAINABLE_BYTES:
        return lora_stack
    return stack_from_options(StackOptions())


@pytest.fixture(scope="session")
def _lora_accepted(
    pytestconfig: pytest.Config, lora_engine: PeftEngine, lora_preset: Preset
) -> Accepted:
    setting = pytestconfig.stash[SETTING]
    snapshots, folder = snapshots_folder(pytestconfig)
    accepted = Accepted(
        engine=lora_engine,
        preset=lora_preset,
        root=pytestconfig.rootpath,
        snapshots=snapshots,
        folder=folder,
        replaying=not pytestconfig.getoption(DEST + "no_replay"),
        # Who asks for an update wants what drifted to be written, too.
        drift_fails=setting.drift_fails or bool(pytestconfig.getoption("update_snapshots", False)),
    )
    pytestconfig.stash[ACCEPTED] = accepted
    return accepted


@pytest.fixture(scope="session")
def lora_completions(_lora_accepted: Accepted) -> Completions:
    """`lora_completions.of(mode)`: what the mode says to every prompt of the preset."""
    return _lora_accepted.completions


@pytest.fixture(scope="session")
def lora_stopping_completions(
    pytestconfig: pytest.Config, lora_engine: PeftEngine, lora_completions: Completions
) -> Completions:
    """`.of(mode)` over the preset that stopping is judged on; rates need many prompts."""
    setting = pytestconfig.stash[SETTING]
    if setting.stopping_preset == setting.preset:
        return lora_completions
    return Completions(lora_engine, setting.stopping_preset)


@pytest.fixture
def lora_completion(
    lora_completions: Completions, lora_mode: Mode, lora_prompt: Prompt
) -> Completion:
    """What this mode says to this prompt."""
    return next(c for c in lora_completions.of(lora_mode) if c.prompt.id == lora_prompt.id)


@pytest.fixture(scope="session")
def _lora_snapshot_extension(_lora_accepted: Accepted) -> type[Any]:
    from harness.snapshot import snapshot_extension

    accepted = _lora_accepted
    return snapshot_extension(accepted.folder, accepted.taken, accepted.judge)


@pytest.fixture
def lora_snapshot(
    snapshot: Any,
    _lora_snapshot_extension: type[Any],
    _lora_accepted: Accepted,
    lora_prompt: Prompt,
    lora_mode: Mode,
) -> Any:
    """The accepted completion of this mode and prompt: `assert completion == lora_snapshot`."""
    name = _lora_accepted.name(lora_prompt, lora_mode)
    return snapshot.use_extension(_lora_snapshot_extension)(name=name)


@pytest.fixture
def lora_judge(request: pytest.FixtureRequest) -> Callable[[Verdict], None]:
    """`lora_judge(verdict)` records a verdict for summary and JUnit, and fails unless it passed."""

    def judge(verdict: Verdict) -> None:
        request.node.user_properties.append(("lora_verdict", verdict.outcome.value))
        if not verdict.passed:
            lines = [f"{verdict.name}: {verdict.outcome}", *verdict.evidence]
            if verdict.remedy:
                lines.append(f"→ {verdict.remedy}")
            pytest.fail(shown("\n".join(lines)), pytrace=False)

    return judge


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.stash[SETTING].asked_for:
        return
    save_whole(session.config)
    if not hasattr(session.config, "workerinput"):
        # A scheduler's SIGTERM ends the session as Ctrl-C does: with a summary of what ran.
        ending = contextlib.ExitStack()
        ending.enter_context(terminable())
        session.config.add_cleanup(ending.close)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Before -k, -m and --deselect take tests away: what they leave out is still asked for.
    remember_collected(config, items)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.stash.get(UNSAVED, []) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if not config.stash[SETTING].asked_for or ORPHANS in config.stash:
        return
    orphans = find_orphans(config)
    if hasattr(config, "workeroutput"):
        config.workeroutput["lora_orphans"] = orphans
    else:
        config.stash[ORPHANS] = orphans


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Under xdist the workers collect, each of them everything."""
    found = getattr(node, "workeroutput", {}).get("lora_orphans")
    if found is not None:
        node.config.stash[ORPHANS] = found


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    write_summary(terminalreporter, config)
    unsaved: list[str] = config.stash.get(UNSAVED, [])
    write_end(
        terminalreporter,
        interrupted=exitstatus == pytest.ExitCode.INTERRUPTED,
        unsaved=unsaved,
    )
