"""Measuring cells on one loaded stack: entering a mode, warming up, timing rounds.

`Measurer.entered` gives one cell to whoever counts the rounds; `harness.bench.visiting` goes round
all of them. Knows nothing of judging, files or reports.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from harness.bench.ceilings import Ceilings, better, measure_ceilings
from harness.bench.cells import Cell, CellResult, Lengths, Round, Work, summarise
from harness.bench.clock import clock_for, synchronise
from harness.bench.device import DeviceReader
from harness.bench.roofline import ModelArithmetic, arithmetic_of
from harness.completion import Application
from harness.engines.application import without_wrappers
from harness.engines.faults import device_fault
from harness.engines.timed import Decoding, generate_marked, plain_generation, random_ids
from harness.errors import InputError
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.engines.random_weights import RandomEngine

__all__ = [
    "CellMeasurer",
    "Measurer",
    "default_lengths",
    "default_repeats",
    "refusal",
]

_ROOM = 1.1  # of the merged weights: what the copies' temporaries take


def default_repeats(device: str) -> int:
    """One on CUDA, which is ours alone; three on a CPU, which never is."""
    return 1 if torch.device(device).type == "cuda" else 3


def default_lengths(device: str) -> Lengths:
    """On CUDA a prompt of 512 and 32 new tokens; on a CPU a smoke."""
    if torch.device(device).type == "cuda":
        return Lengths(input_tokens=512, output_tokens=32, batch_sizes=(1, 8, 32))
    return Lengths(input_tokens=16, output_tokens=4, batch_sizes=(1, 2))


def refusal(error: Exception) -> str | None:
    """Why *error* means that a cell cannot be measured here, and the others can: a mode that cannot
    be entered, memory that does not suffice, a step that does not compile. None for any other."""
    if isinstance(error, InputError):
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the decode step does not compile: {str(error).strip().splitlines()[0]}"
    fault = device_fault(error)
    if fault is None or fault.sticky:
        return None
    return f"{fault.said} → take smaller --batch-sizes or --input-tokens, or --dtype bfloat16"


class CellMeasurer:
    """One cell, entered: call it for a round. It keeps every round it made."""

    def __init__(self, model: Any, cell: Cell, device: str, vocabulary: int) -> None:
        self._model, self.cell = model, cell
        self._clock = clock_for(device)
        self._ids = random_ids(vocabulary, cell.batch_size, cell.input_tokens, device)
        self._decoding = Decoding(cell.decoding)
        self.rounds: list[Round] = []

    def _generate(self, new_tokens: int) -> Round:
        with torch.inference_mode():
            self._clock.start()
            generate_marked(self._model, self._ids, new_tokens, self._clock.mark, self._decoding)
            return self._clock.stop()

    def warm_up(self, *, whole: bool) -> float:
        """One generation that does not count, whole or of two tokens; returns its seconds.

        A static cache has the size of the whole: a shorter one would be compiled anew.
        """
        whole = whole or self._decoding is not Decoding.DYNAMIC
        return self._generate(self.cell.output_tokens if whole else 2).e2e_s

    def __call__(self) -> Round:
        made = self._generate(self.cell.output_tokens)
        self.rounds.append(made)
        return made


class Measurer:
    """A loaded stack, ready to be measured.

    Attributes:
        ceilings: what the device could do at the start (`close_ceilings` measures once more).
        load_s: seconds that loading took; for a shape without weights, building it.
        arithmetic: the model's least work; None for an architecture whose work is not stated.
    """

    def __init__(
        self,
        engine: PeftEngine | RandomEngine,
        *,
        load_s: float | None = None,
        ceilings: bool = True,
    ) -> None:
        self.engine, self.load_s = engine, load_s
        self.device, self.dtype = engine.device, engine.dtype
        config = engine.model.config
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.reader = DeviceReader(self.device)
        self.ceilings: Ceilings | None = (
            measure_ceilings(self.device, self.dtype) if ceilings else None
        )
        itemsize = getattr(torch, self.dtype).itemsize
        self.arithmetic: ModelArithmetic | None = arithmetic_of(config.to_dict(), itemsize=itemsize)

    def close_ceilings(self) -> None:
        """Measure the ceilings again and keep the higher."""
        if self.ceilings is not None:
            self.ceilings = better(self.ceilings, measure_ceilings(self.device, self.dtype))

    def adapter_size(self, name: str) -> tuple[int, int]:
        """Parameters and bytes of adapter *name* as it lies in memory."""
        found = [
            parameter
            for path, parameter in self.engine.model.named_parameters()
            if ".lora_" in path and f".{name}." in path
        ]
        return sum(p.numel() for p in found), sum(p.numel() * p.itemsize for p in found)

    def work(self, cell: Cell) -> tuple[Work | None, Work | None]:
        """The least work of a prefill and of a mean decode step in *cell*."""
        if self.arithmetic is None:
            return None, None
        parameters = size = 0
        if cell.application is not Application.MERGED:
            sizes = [self.adapter_size(name) for name in cell.mode.adapters]
            parameters, size = sum(s[0] for s in sizes), sum(s[1] for s in sizes)
        # The first new token comes from the prefill; step k then sees input + k positions.
        context = cell.input_tokens + cell.output_tokens / 2
        adapters: dict[str, Any] = {"adapter_bytes": size, "adapter_parameters": parameters}
        return (
            self.arithmetic.prefill(rows=cell.batch_size, length=cell.input_tokens, **adapters),
            self.arithmetic.decode_step(rows=cell.batch_size, context=context, **adapters),
        )

    def check(self, cell: Cell) -> None:
        """Refuse a cell that cannot be measured here.

        Raises:
            InputError: it does not fit the context or the free memory, or needs CUDA.
        """
        needed = cell.input_tokens + cell.output_tokens
        if needed > self.context:
            raise InputError(
                f"{needed} tokens do not fit the context of {self.context}",
                where="--input-tokens, --output-tokens",
                remedy="take fewer",
            )
        on_cuda = torch.device(self.device).type == "cuda"
        if cell.decoding == Decoding.COMPILED and not on_cuda:
            raise InputError(
                f"transformers compiles decode steps on CUDA, and this is {self.device}",
                where="--decoding compiled",
                remedy="use --decoding static or dynamic",
            )
        if on_cuda and cell.application is Application.MERGED and cell.mode.weights:
            copies = self._merged_bytes(cell.mode)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(
                self.device
            )
            free = torch.cuda.mem_get_info(torch.device(self.device))[0] + cached
            if copies * _ROOM > free:
                raise InputError(
                    f"merged weights need {copies / 1e9:.1f} GB beside the originals, "
                    f"{free / 1e9:.1f} GB are free on {self.device}",
                    where=cell.key,
                    remedy="merge on disk with lora-stack merge and measure that as a base",
                )

    def _merged_bytes(self, mode: Mode) -> int:
        modules = dict(self.engine.model.base_model.model.named_modules())
        adapted = {name for adapter in mode.adapters for name in self.engine.files[adapter].pairs}
        weights = [modules[name].get_base_layer().weight for name in adapted]
        return sum(weight.numel() * weight.itemsize for weight in weights)

    @contextlib.contextmanager
    def applied(self, mode: Mode, application: Application) -> Iterator[tuple[Any, float]]:
        """The model in *mode*, and the seconds from rest until it was ready."""
        wrapped = bool(self.engine.stack.adapters)
        bare = wrapped and (not mode.weights or application is Application.MERGED)
        with contextlib.ExitStack() as entered:
            synchronise(self.device)
            start = time.perf_counter()
            model = entered.enter_context(self.engine.mode(mode, application))
            if bare:
                model = entered.enter_context(without_wrappers(self.engine.model))
            synchronise(self.device)
            seconds = time.perf_counter() - start
            entered.enter_context(plain_generation(model))
            yield model, seconds

    @contextlib.contextmanager
    def entered(self, cell: Cell) -> Iterator[tuple[CellMeasurer, float]]:
        """*cell*, ready for rounds, and the seconds that entering took; `result` turns what was
        measured into values.

        Raises:
            InputError: it cannot be measured here (`check`).
        """
        self.check(cell)
        with self.applied(cell.mode, cell.application) as (model, seconds):
            yield CellMeasurer(model, cell, self.device, self.vocabulary), seconds

    def result(self, cell: Cell, rounds: Sequence[Round], **more: Any) -> CellResult:
        """The rounds of *cell* with the work that they had to do."""
        prefill, decode = self.work(cell)
        return summarise(cell, rounds, prefill=prefill, decode=decode, **more)
