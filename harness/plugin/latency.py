"""Latency under pytest: cells as parameters, pytest-benchmark as the keeper of results.

Everything here is asked for by a test marked `latency`; nothing heavy is imported before. Knows
nothing of what the figures mean.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from harness.bench.cells import Cell, CellResult, Lengths, cells_of
from harness.display.terminal import shown
from harness.errors import InputError
from harness.options import batch_sizes
from harness.plugin.setting import SETTING, Setting

if TYPE_CHECKING:
    from harness.bench.measuring import Measurer

__all__ = ["LatencySession", "chosen_cells", "skip_without_meaning"]

#: What a latency session has for all its rounds, loading and warming up left out.
_SECONDS = {"cuda": 330.0, "cpu": 40.0}
_ROUNDS = {"cuda": (3, 20), "cpu": (2, 5)}
LATENCY = pytest.StashKey["LatencySession"]()


def chosen_cells(setting: Setting) -> tuple[Cell, ...]:
    """The cells of this session. The lengths depend on where it runs, which the device option
    tells; without one, whether a GPU test could run at all."""
    usual = _usual(setting)
    return cells_of(
        setting.stack,
        Lengths(
            input_tokens=_number(setting, "input_tokens") or usual.input_tokens,
            output_tokens=_number(setting, "output_tokens") or usual.output_tokens,
            batch_sizes=batch_sizes(setting.values["batch_sizes"]) or usual.batch_sizes,
        ),
    )


def _number(setting: Setting, name: str) -> int | None:
    value = setting.values[name]
    if value is None:
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise pytest.UsageError(f"--{name.replace('_', '-')}: {value!r} is not 1 or more")
    return int(value)


def _usual(setting: Setting) -> Lengths:
    device = setting.values["device"] or ("cuda" if _nvidia_driver() else "cpu")
    if str(device).startswith(("cuda", "auto")):
        return Lengths(input_tokens=512, output_tokens=32, batch_sizes=(1, 8, 32))
    return Lengths(input_tokens=16, output_tokens=4, batch_sizes=(1, 2))


def _nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver; torch is not imported to collect tests."""
    if "torch" in sys.modules:
        return bool(sys.modules["torch"].cuda.is_available())
    places = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
    return any(Path(place).exists() for place in places) or bool(shutil.which("nvidia-smi"))


def skip_without_meaning(item: pytest.Item) -> None:
    """On a base of random numbers, skip what asks for more than time."""
    setting = item.config.stash[SETTING]
    if item.get_closest_marker("latency") is not None or not setting.asked_for:
        return
    names = getattr(item, "fixturenames", ())
    if any(name.startswith("lora_") for name in names) and setting.stack.random:
        pytest.skip(
            f"{setting.stack.base.source} is random numbers: what it says means nothing, "
            "only how long it takes (-m latency)"
        )


class LatencySession:
    """The loaded stack, ready to be measured cell by cell.

    Attributes:
        results: what was measured so far, by key.
        skipped: why a cell could not be measured, by key.
        described: hardware, conditions and ceilings as plain values, once all is measured.
    """

    def __init__(self, measurer: Measurer, cells: int) -> None:
        self.measurer = measurer
        self.results: dict[str, CellResult] = {}
        self.skipped: dict[str, str] = {}
        self.described: dict[str, Any] = {}
        kind = measurer.device.split(":")[0]
        self._left_s, self._cells = _SECONDS.get(kind, _SECONDS["cpu"]), cells
        self._least, self._most = _ROUNDS.get(kind, _ROUNDS["cpu"])

    @contextlib.contextmanager
    def entered(self, cell: Cell) -> Iterator[SimpleNamespace]:
        """*cell*, warm: `.once` measures a round, `.rounds` is how many the time left allows, and
        `.done()` gives the result. What cannot be measured here is skipped with the reason."""
        from harness.bench.measuring import refusal
        from harness.engines.faults import give_memory_back

        start = time.perf_counter()
        reason = None
        try:
            with self._entered(cell, start) as entered:
                yield entered
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
        self._cells -= 1
        self._left_s -= time.perf_counter() - start
        if reason is not None:
            give_memory_back()
            self.skipped[cell.key] = reason
            pytest.skip(shown(reason))

    @contextlib.contextmanager
    def _entered(self, cell: Cell, start: float) -> Iterator[SimpleNamespace]:
        from harness.bench.device import peak_bytes, reset_peak

        states = [self.measurer.reader.read()]
        with self.measurer.entered(cell) as (one, switch_s):
            reset_peak(self.measurer.device)
            share = max(0.0, self._left_s) / max(1, self._cells)
            seconds = one.warm_up(whole=True)
            if seconds < share / 4:
                seconds = one.warm_up(whole=True)
            left = share - (time.perf_counter() - start)
            rounds = max(self._least, min(self._most, int(left / max(seconds, 1e-6))))

            def done() -> CellResult:
                states.append(self.measurer.reader.read())
                result = self.measurer.result(
                    cell,
                    one.rounds,
                    switch_s=(switch_s,),
                    peak_bytes=peak_bytes(self.measurer.device),
                    device_states=tuple(dict(s) for s in states if s is not None),
                )
                self.results[cell.key] = result
                return result

            yield SimpleNamespace(once=one, rounds=rounds, done=done)


@pytest.fixture(scope="session")
def lora_latency(pytestconfig: pytest.Config) -> Iterator[LatencySession]:
    """The stack under test, loaded for measuring: weights may be random (`random:…`)."""
    from harness.bench.clock import synchronise
    from harness.bench.measuring import Measurer
    from harness.engines import load_for_timing

    setting = pytestconfig.stash[SETTING]
    start = time.perf_counter()
    try:
        engine = load_for_timing(
            setting.stack,
            device=setting.values["device"],
            dtype=setting.values["dtype"],
            trust_remote_code=bool(setting.values["trust_remote_code"]),
        )
    except InputError as error:
        pytest.fail(shown(str(error)), pytrace=False)
    with engine:
        synchronise(engine.device)
        measurer = Measurer(engine, load_s=time.perf_counter() - start)
        cells = chosen_cells(setting)
        session = LatencySession(measurer, len(cells))
        pytestconfig.stash[LATENCY] = session
        yield session
        if cells and len(session.skipped) == len(cells):
            pytest.fail("no cell could be measured here", pytrace=False)
        measurer.close_ceilings()
        session.described = _described(session)  # the model is gone when the file is written


def _described(session: LatencySession) -> dict[str, Any]:
    from harness.bench.results import session_as_json
    from harness.bench.session import results_of

    results = results_of(session.measurer, session.results.values(), session.skipped)
    return session_as_json(results)


@pytest.fixture(scope="session")
def lora_cell(request: pytest.FixtureRequest) -> Cell:
    """Parametrised: each mode × application × batch size."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def lora_measured(
    request: pytest.FixtureRequest, lora_latency: LatencySession, lora_cell: Cell
) -> Callable[[Any], CellResult]:
    """`lora_measured(benchmark)` measures this cell as pytest-benchmark's rounds, puts the figures
    into `extra_info`, and returns the `CellResult`."""
    from harness.bench.results import cell_as_json

    def measure(benchmark: Any) -> CellResult:
        with lora_latency.entered(lora_cell) as entered:
            benchmark.group = f"latency b{lora_cell.batch_size}"
            benchmark.pedantic(entered.once, rounds=entered.rounds, iterations=1, warmup_rounds=0)
            result: CellResult = entered.done()
        benchmark.extra_info["lora"] = cell_as_json(result)
        base = lora_latency.measurer.engine.stack.base.source
        benchmark.extra_info["random_weights"] = base if base.startswith("random:") else False
        return result

    return measure


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """The GPU, its driver and the versions, where this session measured latency."""
    session = config.stash.get(LATENCY, None)
    described = session.described if session is not None else {}
    if not described:
        return
    machine_info |= _machine(described["fingerprint"], described["software"])


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """What is compared with is read before anything is measured: without a word of ours on this
    side, the machine that a stored session describes would always seem to be another."""
    if "versions" not in compared_benchmark["machine_info"] or "versions" in machine_info:
        return
    import torch

    from harness.bench.device import fingerprint, software

    asked = config.stash[SETTING].values["device"]
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    device = "cuda" if device == "auto" else str(device)
    with contextlib.suppress(RuntimeError, AssertionError):  # no such device: loading says so
        machine_info |= _machine(fingerprint(device), software(device))


def _machine(fingerprint: Mapping[str, Any], software: Mapping[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark is told of the machine."""
    return {
        "gpu": fingerprint.get("device"),
        "driver": software.get("driver"),
        "cuda": software.get("cuda"),
        "versions": dict(software),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """What the gate needs beside the benchmarks: hardware, conditions, ceilings."""
    session = config.stash.get(LATENCY, None)
    if session is not None and session.described:
        output_json["lora_stack"] = session.described
