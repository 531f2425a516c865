"""Rounds are timed as the definitions say, whatever the clock; the device is read, never set."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.bench.cells import Lengths, Round, cells_of, fastest, percentile, summarise
from harness.completion import Application
from harness.errors import HarnessError, InputError
from harness.resolve import random_stack

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def cells(tiny_shape):
    stack = random_stack(f"random:{tiny_shape}")
    return cells_of(stack, Lengths(input_tokens=8, output_tokens=4, batch_sizes=(1, 2)))


def test_every_mode_and_application_has_a_cell_and_the_base_one(cells):
    kinds = {(cell.mode.name, cell.application_name) for cell in cells}
    applications = {"live", "flattened", "merged"}
    assert kinds == {("base", "none")} | {
        (mode, how) for mode in ("style", "instruct", "stacked") for how in applications
    }
    assert len({cell.key for cell in cells}) == len(cells) == 20
    assert {c.application_name for c in cells if c.unwrapped} == {"none", "merged"}


def test_tpot_is_the_mean_gap_and_itl_pools_all_gaps(cells):
    rounds = [Round(ttft_s=1.0, gaps_s=(0.1, 0.3), e2e_s=1.5),
              Round(ttft_s=2.0, gaps_s=(0.2, 0.2), e2e_s=2.5)]  # fmt: skip
    result = summarise(cells[0], rounds)
    assert result.rounds["tpot_s"] == pytest.approx((0.2, 0.2))
    assert result.itl_s["p50"] == pytest.approx(0.2)
    assert result.itl_s["p99"] == pytest.approx(0.297)
    assert result.output_tokens_per_s == pytest.approx(1 * 4 / 2.0)
    assert result.prefill_tokens_per_s == pytest.approx(1 * 8 / 1.5)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values, share):
    import numpy as np

    assert percentile(values, share) == pytest.approx(np.percentile(values, share), abs=1e-6)


class _Event:
    """A CUDA event whose time is when it was recorded, by a clock that each record moves on."""

    now = 0.0

    def record(self, stream):
        _Event.now += 0.010
        self.at = _Event.now

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_the_cuda_clock_reads_events_after_the_last_token(monkeypatch):
    import torch

    from harness.bench import clock as clocks

    waits = []
    monkeypatch.setattr(clocks, "cuda_event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    clock = clocks.clock_for("cuda:1")
    for _ in range(2):  # events are used again
        waits.clear()
        clock.start()
        for _ in range(4):
            clock.mark()
        assert waits == [torch.device("cuda:1")]  # none since the start
        found = clock.stop()
        assert waits == [torch.device("cuda:1")] * 2
        assert found.ttft_s == pytest.approx(0.010)
        assert found.gaps_s == pytest.approx((0.010, 0.010, 0.010))
        assert found.e2e_s > 0
    clock.start()
    clock.mark()
    with pytest.raises(HarnessError):
        clock.stop()


def test_generating_gives_the_same_tokens_with_and_without_the_hook(tiny_shape):
    import torch

    from harness.engines import load_for_timing
    from harness.engines.timed import Decoding, generate_marked, plain_generation, random_ids

    marks = []
    stack = random_stack(f"random:{tiny_shape}")
    with load_for_timing(stack, device="cpu", dtype="float32") as engine:
        ids = random_ids(512, 2, 8, "cpu")
        with engine.mode("stacked") as model, plain_generation(model), torch.inference_mode():
            bare = generate_marked(model, ids, 6, None)
            marked = generate_marked(model, ids, 6, lambda: marks.append(1))
            static = generate_marked(model, ids, 6, None, Decoding.STATIC)
    assert len(marks) == 6
    assert torch.equal(bare, marked)
    assert torch.equal(bare, static)


def test_an_end_of_sequence_does_not_end_a_measured_generation(tiny):
    """The embedded settings of a checkpoint must not leak in."""
    import torch

    from harness.engines import load_engine
    from harness.engines.timed import generate_marked, plain_generation
    from harness.resolve import resolve_stack

    with load_engine(resolve_stack(base_model=tiny.base), device="cpu") as engine:
        ids = torch.zeros((1, 4), dtype=torch.long)
        first = int(engine.model(input_ids=ids).logits[0, -1].argmax())
        engine.model.generation_config.eos_token_id = first
        with engine.mode("base") as model, plain_generation(model), torch.inference_mode():
            assert generate_marked(model, ids, 5, None).shape == (1, 9)
        assert engine.model.generation_config.eos_token_id == first


def test_a_cell_that_does_not_fit_is_refused(cells, tiny_shape, monkeypatch):
    import dataclasses

    from harness.bench.measuring import Measurer
    from harness.engines import load_for_timing

    stack = random_stack(f"random:{tiny_shape}")
    with load_for_timing(stack, device="cpu") as engine:
        measurer = Measurer(engine, ceilings=False)
        with pytest.raises(InputError, match="do not fit the context of 512"):
            measurer.check(dataclasses.replace(cells[0], input_tokens=512))
        merged = next(c for c in cells if c.application is Application.MERGED)
        assert measurer._merged_bytes(merged.mode) == 2 * measurer.arithmetic.linear_parameters
        live = next(c for c in cells if c.mode.name == "stacked" and c.batch_size == 1)
        parameters = sum(measurer.adapter_size(name)[0] for name in ("style", "instruct"))
        assert parameters == sum(
            pair.a.numel() + pair.b.numel()
            for factors in engine.files.values()
            for pair in factors.pairs.values()
        )
        _, decode = measurer.work(live)
        _, without = measurer.work(dataclasses.replace(live, application=Application.MERGED))
        assert decode.flops - without.flops == pytest.approx(2 * parameters)
        assert decode.bytes_read - without.bytes_read == 4 * parameters  # float32, as PEFT's


def test_throttle_reasons_are_named():
    from harness.bench.device import throttle_reasons

    assert throttle_reasons(0) == []
    assert throttle_reasons(0x1 | 0x2) == []
    assert throttle_reasons(0x4 | 0x40 | 0x1000) == ["power cap", "hardware thermal", "0x1000"]


def test_nvml_answers_are_read_and_refusals_left_out():
    from harness.bench.device import DeviceReader

    def refuse(*_):
        raise RuntimeError("not supported")

    reader = DeviceReader("cpu")
    assert reader.read() is None
    reader._handle, reader._nvml = object(), SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, which: {1: 1980, 2: 3201}[which],
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetPowerUsage=lambda handle: 412_500,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x4,
    )  # fmt: skip
    assert reader.read() == {
        "sm_mhz": 1980, "memory_mhz": 3201, "power_w": 412.5, "power_limit_w": 700.0,
        "throttle": ["power cap"],
    }  # fmt: skip


def test_nothing_of_the_device_is_ever_set():
    text = (BENCH / "device.py").read_text()
    calls = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    assert not [name for name in calls if re.match(r"nvml\w*(Set|Reset)", name)]
    assert "nvidia-smi" in text
    assert not re.search(r'"-(lgc|lmc|pl|pm|ac|r|rac|rgc)"', text)


def test_each_metric_of_a_round_is_the_fastest_of_its_repeats():
    made = [Round(ttft_s=1.0, gaps_s=(0.5, 0.5), e2e_s=2.1),
            Round(ttft_s=1.2, gaps_s=(0.2, 0.4), e2e_s=1.9)]  # fmt: skip
    assert fastest(made) == Round(ttft_s=1.0, gaps_s=(0.2, 0.4), e2e_s=1.9)


def test_the_old_name_of_a_reason_is_asked_where_the_driver_lacks_the_new():
    from harness.bench.device import DeviceReader

    def unknown(handle):
        raise RuntimeError("function not found")

    reader = DeviceReader("cpu")
    reader._handle, reader._nvml = (
        object(),
        SimpleNamespace(
            nvmlDeviceGetCurrentClocksEventReasons=unknown,
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40,
        ),
    )
    assert reader.read() == {"throttle": ["hardware thermal"]}


def test_without_nvml_the_tool_is_asked_once_a_reading_for_what_it_knows(monkeypatch):
    import subprocess

    from harness.bench import device

    asked = []

    def tool(command, **_):
        fields = command[3].removeprefix("--query-gpu=").split(",")
        asked.append(fields)
        if "clocks_event_reasons.active" in fields:  # an older tool: it knows the older name
            raise subprocess.CalledProcessError(2, command)
        answers = {"clocks.sm": "1980", "power.draw": "[N/A]",
                   "clocks_throttle_reasons.active": "0x0000000000000004"}  # fmt: skip
        return SimpleNamespace(stdout=", ".join(answers.get(name, "1") for name in fields) + "\n")

    monkeypatch.setattr(device.subprocess, "run", tool)
    reader = device.DeviceReader("cpu")
    reader._fields, reader.source = reader._known_fields(), "nvidia-smi"
    asked.clear()
    assert reader.read() == {
        "sm_mhz": 1980.0, "memory_mhz": 1.0, "temperature_c": 1.0, "power_limit_w": 1.0,
        "throttle": ["power cap"],
    }  # fmt: skip
    assert len(asked) == 1


def test_an_accelerator_without_events_is_waited_for_at_every_token(monkeypatch):
    from harness.bench import clock as clocks

    waits = []
    monkeypatch.setattr(clocks, "synchronise", waits.append)
    clock = clocks.clock_for("mps")
    clock.start()
    clock.mark()
    clock.mark()
    clock.stop()
    assert waits == ["mps"] * 4


def test_ceilings_are_of_numbers_as_weights_are_and_leave_no_trace(monkeypatch):
    """A device at its power limit multiplies constants faster than it does any model's weights."""
    import torch

    from harness.bench import ceilings

    seen = []
    given = torch.mm
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(ceilings._SIDE, "cpu", 64)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: seen.append((a.std(), b.std())) or given(a, b, out=out)
    )
    before = torch.get_rng_state()
    found = ceilings.measure_ceilings("cpu", "bfloat16")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.bandwidth > 0
    assert all(0.01 < float(spread) < 0.03 for pair in seen for spread in pair)


@pytest.fixture
def small(tiny_shape):
    """A loaded shape, and its cells at batch 1 and 2."""
    from harness.bench.measuring import Measurer
    from harness.engines import load_for_timing

    stack = random_stack(f"random:{tiny_shape}")
    with load_for_timing(stack, device="cpu") as engine:
        lengths = Lengths(input_tokens=4, output_tokens=2, batch_sizes=(1, 2))
        kept = [c for c in cells_of(stack, lengths) if c.mode.name in ("base", "stacked")]
        yield Measurer(engine, ceilings=False), kept


def _too_large(one, *, whole):
    import torch

    if one.cell.batch_size == 2 and one.cell.application_name == "merged":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return 0.001


def test_what_does_not_fit_is_left_out_with_the_reason_and_the_rest_is_measured(small, monkeypatch):
    from harness.bench import visiting

    measurer, cells = small
    monkeypatch.setattr(visiting.CellMeasurer, "warm_up", _too_large)
    made, skipped = visiting.interleaved(measurer, cells, 1)
    assert set(skipped) == {"stacked-merged-b2-i4-o2"}
    assert "out of memory" in skipped["stacked-merged-b2-i4-o2"]
    assert "--batch-sizes" in skipped["stacked-merged-b2-i4-o2"]
    assert {cell.key for cell in made} == {cell.key for cell in cells} - set(skipped)


def test_what_does_not_fit_any_more_in_a_later_round_is_left_out_and_the_rest_is_measured(
    small, monkeypatch
):
    import torch

    from harness.bench import visiting

    measurer, cells = small
    given, rounds = visiting.visit_group, []

    def taken(measurer, group, *, repeats):
        if group[0].application_name == "merged":
            rounds.append(group)
            if len(rounds) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return given(measurer, group, repeats=repeats)

    monkeypatch.setattr(visiting, "visit_group", taken)
    made, skipped = visiting.interleaved(measurer, cells, 3)
    assert set(skipped) == {f"stacked-merged-b{n}-i4-o2" for n in (1, 2)}
    assert all(reason.startswith("after the warm-up: out of memory") for reason in skipped.values())
    assert len(rounds) == 2  # it is not tried again
    assert {cell.key for cell in made} == {cell.key for cell in cells} - set(skipped)
    assert {len(cell.rounds["ttft_s"]) for cell in made} == {3}


def test_a_mode_that_cannot_be_entered_leaves_the_others(small, monkeypatch):
    from harness.bench import visiting

    measurer, cells = small
    given = measurer.engine.mode

    def refusing(mode, application):
        if application is Application.FLATTENED:
            raise InputError("is not flattened in memory", where="application flattened")
        return given(mode, application)

    monkeypatch.setattr(measurer.engine, "mode", refusing)
    made, skipped = visiting.interleaved(measurer, cells, 1)
    assert set(skipped) == {f"stacked-flattened-b{n}-i4-o2" for n in (1, 2)}
    assert len(made) == len(cells) - 2
    flattened = [cell for cell in cells if cell.application_name == "flattened"]
    with pytest.raises(InputError, match="not flattened in memory"):
        visiting.interleaved(measurer, flattened, 1)


def test_a_step_that_does_not_compile_loses_no_round_of_the_others(small, monkeypatch):
    import dataclasses

    import torch

    from harness.bench import visiting

    measurer, cells = small
    compiled = dataclasses.replace(cells[0], decoding="compiled")
    monkeypatch.setattr(measurer, "check", lambda cell: None)  # as on CUDA
    given = visiting.CellMeasurer.warm_up

    def without_a_compiler(one, *, whole):
        if one.cell.decoding == "compiled":
            raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C compiler"), None)
        return given(one, whole=whole)

    monkeypatch.setattr(visiting.CellMeasurer, "warm_up", without_a_compiler)
    made, skipped = visiting.interleaved(measurer, [*cells[:1], compiled], 2)
    assert [cell.key for cell in made] == [cells[0].key]
    assert "does not compile" in skipped[compiled.key]


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_a_cell_adapters_and_all(small, monkeypatch):
    """On a CPU, traced and not turned into kernels: those need CUDA. No step leaves the graph, and
    no round compiles anew."""
    import dataclasses

    import torch
    from transformers import CompileConfig, GenerationConfig

    from harness.bench import visiting
    from harness.engines import timed

    everywhere = CompileConfig(backend="aot_eager", mode=None)
    everywhere._compile_all_devices = True  # as transformers' own tests do

    def configured(**settings):
        config = GenerationConfig(**settings)
        if not config.disable_compile:
            config.compile_config = everywhere
        return config

    monkeypatch.setattr(timed, "GenerationConfig", configured)
    measurer, cells = small
    monkeypatch.setattr(measurer, "check", lambda cell: None)  # as on CUDA
    compiled = [dataclasses.replace(c, decoding="compiled", output_tokens=5) for c in cells]
    torch._dynamo.utils.counters.clear()
    made, skipped = visiting.interleaved(measurer, compiled, 2)
    counted = torch._dynamo.utils.counters
    assert skipped == {}
    assert {cell.key for cell in made} == {cell.key for cell in compiled}
    assert counted["stats"]["unique_graphs"] == len(compiled)
    assert not counted["graph_break"]


def test_under_pytest_a_cell_that_does_not_fit_is_skipped_and_counted(small, monkeypatch):
    from harness.bench import measuring
    from harness.plugin.latency import LatencySession

    measurer, cells = small
    monkeypatch.setattr(measuring.CellMeasurer, "warm_up", _too_large)
    session = LatencySession(measurer, len(cells))
    large = next(c for c in cells if c.batch_size == 2 and c.application_name == "merged")
    with pytest.raises(pytest.skip.Exception, match="out of memory"), session.entered(large):
        pytest.fail("it was entered")
    assert "out of memory" in session.skipped[large.key]
    with session.entered(cells[0]) as entered:
        entered.once()
        assert entered.done().key == cells[0].key
    with pytest.raises(ZeroDivisionError), session.entered(cells[0]):  # a bug stays one
        raise ZeroDivisionError


class _Told:
    """A side that writes down what it is asked, and answers as a worker with *groups* does."""

    def __init__(self, name, groups, log):
        self.name, self._groups, self._log = name, groups, log

    def ready(self):
        return self._groups, 2

    def ask(self, line):
        self._log.append((self.name, line))
        return {}


def test_a_pair_is_visited_one_after_the_other_and_who_goes_first_alternates(monkeypatch):
    from harness.bench import pairing

    monkeypatch.setattr("harness.bench.pairing.results_in", lambda answer, path: None)
    log = []
    old = _Told("old", ["base none", "stacked live"], log)
    new = _Told("new", ["base none", "stacked live", "stacked merged"], log)
    pairing.in_turn([old, new], 2)
    assert log[-2:] == [("old", "end"), ("new", "end")]
    for name in ("base none", "stacked live"):
        places = [place for place, (_, line) in enumerate(log) if line == name]
        assert len(places) == 2 * 4  # two rounds of two visits
        assert all(b - a == 1 for a, b in zip(places[::2], places[1::2], strict=True))
        firsts = [log[place][0] for place in places[::2]]
        assert sorted(firsts[:2]) == ["new", "old"]
        assert firsts[:2] == firsts[2:]
    assert log.count(("new", "stacked merged")) == 4
