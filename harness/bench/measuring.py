"""Measuring cells on one loaded stack: entering a mode, warming up, timing rounds.

`Measurer.entered` gives one cell to whoever counts the rounds (pytest-benchmark); `interleaved`
visits all cells in turn, round by round, so that what drifts (clocks, heat, neighbours) falls on
all of them alike. Knows nothing of judging, files or reports.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.bench.ceilings import Ceilings, better, measure_ceilings
from harness.bench.cells import Cell, CellResult, Lengths, Round, Work, fastest, summarise
from harness.bench.clock import clock_for, synchronise
from harness.bench.device import DeviceReader, peak_bytes, reset_peak
from harness.bench.roofline import ModelArithmetic, arithmetic_of
from harness.completion import Application
from harness.engines.application import without_wrappers
from harness.engines.timed import Decoding, generate_marked, plain_generation, random_ids
from harness.errors import InputError
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.engines.random_weights import RandomEngine

__all__ = [
    "CellMeasurer",
    "Measurer",
    "Visit",
    "collected",
    "default_lengths",
    "default_repeats",
    "groups_of",
    "interleaved",
    "measurable",
    "visit_all",
    "visit_group",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One round of one cell, and what was seen around it; *gaps_s* of all its generations."""

    round: Round
    gaps_s: tuple[float, ...]
    switch_s: float
    peak_bytes: int
    state: Mapping[str, Any] | None


def groups_of(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The cells by what is entered for them, a mode in one application, in words."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(f"{cell.mode.name} {cell.application_name}", []).append(cell)
    return groups


class GroupVisit:
    """The cells of one group, entered and warm; each generation is asked for alone."""

    def __init__(
        self, measurer: Measurer, model: Any, cells: Sequence[Cell], switch_s: float
    ) -> None:
        self._measurer, self._switch_s = measurer, switch_s
        self._measured = {
            cell.key: CellMeasurer(model, cell, measurer.device, measurer.vocabulary)
            for cell in cells
        }
        self._peaks = dict.fromkeys(self._measured, 0)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._measured)

    def warm_up(self, *, whole: bool) -> None:
        """One generation of each cell that does not count."""
        for one in self._measured.values():
            one.warm_up(whole=whole)

    def once(self, key: str) -> None:
        """One generation of one cell."""
        reset_peak(self._measurer.device)
        self._measured[key]()
        self._peaks[key] = max(self._peaks[key], peak_bytes(self._measurer.device))

    def seen(self) -> dict[str, Visit]:
        """What the generations since entering came to: a round of each cell, its metrics the
        fastest of its generations. Neighbours on a shared machine only ever make slower."""
        state = self._measurer.reader.read()
        return {
            key: Visit(
                round=fastest(one.rounds),
                gaps_s=tuple(gap for round in one.rounds for gap in round.gaps_s),
                switch_s=self._switch_s,
                peak_bytes=self._peaks[key],
                state=state,
            )
            for key, one in self._measured.items()
            if one.rounds
        }


@contextlib.contextmanager
def entered_group(measurer: Measurer, cells: Sequence[Cell]) -> Iterator[GroupVisit]:
    """The cells of one group (`groups_of`), entered. A short generation of each takes up what the
    change left cold, and does not count."""
    with measurer.applied(cells[0].mode, cells[0].application) as (model, seconds):
        visit = GroupVisit(measurer, model, cells, seconds)
        visit.warm_up(whole=False)
        yield visit


def visit_group(
    measurer: Measurer, cells: Sequence[Cell], *, repeats: int = 1, warming: bool = False
) -> dict[str, Visit]:
    """One round of every cell of one group, *repeats* generations each; nothing counts while
    *warming*, which generates at whole length."""
    with entered_group(measurer, cells) as visit:
        if warming:
            visit.warm_up(whole=True)
            return {}
        for _ in range(repeats):
            for key in visit.keys:
                visit.once(key)
        return visit.seen()


def visit_all(
    measurer: Measurer,
    cells: Sequence[Cell],
    *,
    seed: int,
    repeats: int = 1,
    warming: bool = False,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Visit]:
    """One round of every cell, in an order drawn from *seed*, group by group (`visit_group`)."""
    groups = list(groups_of(cells).values())
    random.Random(seed).shuffle(groups)
    visits: dict[str, Visit] = {}
    for place, group in enumerate(groups):
        visits |= visit_group(measurer, group, repeats=repeats, warming=warming)
        if progress is not None:
            progress((place + 1) / len(groups))
    return visits


def interleaved(
    measurer: Measurer,
    cells: Sequence[Cell],
    rounds: int,
    *,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[CellResult], dict[str, str]]:
    """*rounds* rounds over all *cells*, in another order each round, after one that warms up.

    Compiled cells are measured one after the other instead: entering a mode anew would compile
    anew.

    Returns:
        The results in the order of *cells*, and for those that cannot be measured here the reason
        by key.
    """
    possible, skipped = measurable(measurer, cells)
    compiled = [cell for cell in possible if cell.decoding == Decoding.COMPILED]
    visits: dict[str, list[Visit]] = {cell.key: [] for cell in possible}
    in_turn = [cell for cell in possible if cell not in compiled]
    for number in range(rounds + 1):

        def report(part: float, number: int = number) -> None:
            if progress is not None:
                progress((number + part) / (rounds + 1))

        found = visit_all(
            measurer, in_turn, seed=seed + number, repeats=repeats, warming=number == 0,
            progress=report,
        )  # fmt: skip
        for key, visit in found.items():
            visits[key].append(visit)
    for cell in compiled:
        visits[cell.key] = _compiled(measurer, cell, rounds)
    return [collected(measurer, cell, visits[cell.key]) for cell in possible], skipped


def measurable(measurer: Measurer, cells: Sequence[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """The cells that can be measured here, and the reasons of the others by key.

    Raises:
        InputError: there is none.
    """
    possible: list[Cell] = []
    skipped: dict[str, str] = {}
    for cell in cells:
        try:
            measurer.check(cell)
        except InputError as error:
            skipped[cell.key] = str(error)
        else:
            possible.append(cell)
    if not possible:
        raise InputError(
            f"no cell can be measured here: {next(iter(skipped.values()), 'none was asked for')}",
            where=measurer.engine.stack.name,
        )
    return possible, skipped


def collected(measurer: Measurer, cell: Cell, visits: Sequence[Visit]) -> CellResult:
    """The result of *cell* from its visits."""
    return measurer.result(
        cell,
        [visit.round for visit in visits],
        gaps_s=[gap for visit in visits for gap in visit.gaps_s],
        switch_s=tuple(dict.fromkeys(visit.switch_s for visit in visits)),
        peak_bytes=max((visit.peak_bytes for visit in visits), default=None),
        device_states=tuple(dict(visit.state) for visit in visits if visit.state is not None),
    )


def _compiled(measurer: Measurer, cell: Cell, rounds: int) -> list[Visit]:
    torch.compiler.reset()
    reset_peak(measurer.device)
    with measurer.applied(cell.mode, cell.application) as (model, seconds):
        one = CellMeasurer(model, cell, measurer.device, measurer.vocabulary)
        for _ in range(3):  # compile, capture the graph, replay it
            one.warm_up(whole=True)
        visits = []
        for _ in range(rounds):
            round = one()
            visits.append(
                Visit(
                    round=round, gaps_s=round.gaps_s, switch_s=seconds,
                    peak_bytes=peak_bytes(measurer.device), state=measurer.reader.read(),
                )
            )  # fmt: skip
    return visits
