"""Rounds over many cells of one loaded stack: in turn, so that what drifts falls on all alike.

A visit is a round of the cells that share a mode and an application, which is entered once for
them. `interleaved` visits all cells, round by round; two processes that measure in turn
(`harness.bench.pairing`) ask for each visit. Knows nothing of judging, files or reports.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from harness.bench.cells import Cell, CellResult, Round, fastest
from harness.bench.device import peak_bytes, reset_peak
from harness.bench.measuring import CellMeasurer, Measurer, refusal
from harness.engines.faults import give_memory_back
from harness.engines.timed import Decoding
from harness.errors import InputError

__all__ = [
    "Visit",
    "at_least_one",
    "collected",
    "collected_so_far",
    "groups_of",
    "interleaved",
    "measurable",
    "visit_group",
    "warm_up",
]


_Made = TypeVar("_Made")


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


def warm_up(measurer: Measurer, cells: Sequence[Cell]) -> dict[str, str]:
    """Enter one group (`groups_of`) and generate once in each cell; nothing counts.

    Returns:
        Why a cell cannot be measured here (`refusal`), by key: it is to be left out.
    """
    refused: dict[str, str] = {}
    reason: str | None = None
    try:
        with measurer.applied(cells[0].mode, cells[0].application) as (model, _):
            for cell in cells:
                made = _or_reason(partial(_warm, measurer, model, cell))
                if isinstance(made, str):
                    refused[cell.key] = made
                    give_memory_back()
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
    if reason is not None:  # the mode cannot be entered: none of its cells can be measured
        give_memory_back()
        refused = {cell.key: reason for cell in cells}
    return refused


def _warm(measurer: Measurer, model: Any, cell: Cell) -> float:
    one = CellMeasurer(model, cell, measurer.device, measurer.vocabulary)
    return one.warm_up(whole=True)


def _or_reason(work: Callable[[], _Made]) -> _Made | str:
    """What *work* gives, or why it cannot be measured here (`refusal`)."""
    # The error's traceback holds what did not fit: no more than its words leaves this function.
    try:
        return work()
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        return reason


def visit_group(measurer: Measurer, cells: Sequence[Cell], *, repeats: int = 1) -> dict[str, Visit]:
    """One round of every cell of one group (`groups_of`), which is warm (`warm_up`).

    A short generation after entering takes up what the change left cold, and does not count. Of
    *repeats* generations the fastest is the round, by each metric: neighbours on a shared machine
    only ever make slower.
    """
    visits: dict[str, Visit] = {}
    with measurer.applied(cells[0].mode, cells[0].application) as (model, seconds):
        for cell in cells:
            one = CellMeasurer(model, cell, measurer.device, measurer.vocabulary)
            reset_peak(measurer.device)
            one.warm_up(whole=False)
            made = [one() for _ in range(repeats)]
            visits[cell.key] = Visit(
                round=fastest(made),
                gaps_s=tuple(gap for round in made for gap in round.gaps_s),
                switch_s=seconds,
                peak_bytes=peak_bytes(measurer.device),
                state=measurer.reader.read(),
            )
    return visits


def visit_all(
    measurer: Measurer,
    cells: Sequence[Cell],
    *,
    seed: int,
    repeats: int = 1,
    progress: Callable[[float], None] | None = None,
) -> tuple[dict[str, Visit], dict[str, str]]:
    """One round of every cell, in an order drawn from *seed*, group by group (`visit_group`).

    Returns:
        The visits, and why a cell, warm as it was, could not be measured (`refusal`): somebody else
        may have taken the memory. Both by key.
    """
    groups = list(groups_of(cells).values())
    random.Random(seed).shuffle(groups)
    visits: dict[str, Visit] = {}
    refused: dict[str, str] = {}
    for place, group in enumerate(groups):
        made = _or_reason(partial(visit_group, measurer, group, repeats=repeats))
        if isinstance(made, str):
            give_memory_back()
            refused |= {cell.key: f"after the warm-up: {made}" for cell in group}
        else:
            visits |= made
        if progress is not None:
            progress((place + 1) / len(groups))
    return visits, refused


def interleaved(
    measurer: Measurer,
    cells: Sequence[Cell],
    rounds: int,
    *,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    visits: dict[str, list[Visit]] | None = None,
) -> tuple[list[CellResult], dict[str, str]]:
    """*rounds* rounds over all *cells*, in another order each round, after one that warms up.

    Compiled cells are measured one after the other instead: entering a mode anew would compile
    anew.

    Args:
        visits: filled round by round, by key, for whoever is interrupted (`collected_so_far`).

    Returns:
        The results in the order of *cells*, and for those that cannot be measured here the reason
        by key.
    """
    possible, skipped = measurable(measurer, cells)
    visits = {} if visits is None else visits
    compiled = [cell for cell in possible if cell.decoding == Decoding.COMPILED]
    visits |= {cell.key: [] for cell in possible}
    in_turn = [cell for cell in possible if cell not in compiled]
    try:
        groups = list(groups_of(in_turn).values())
        for place, group in enumerate(groups):
            skipped |= warm_up(measurer, group)
            if progress is not None:
                progress((place + 1) / len(groups) / (rounds + 1))
        in_turn = [cell for cell in in_turn if cell.key not in skipped]
        possible = [cell for cell in possible if cell.key not in skipped]
        for number in range(1, rounds + 1):

            def report(part: float, number: int = number) -> None:
                if progress is not None:
                    progress((number + part) / (rounds + 1))

            found, refused = visit_all(
                measurer, in_turn, seed=seed + number, repeats=repeats, progress=report
            )
            for key, visit in found.items():
                visits[key].append(visit)
            for key in refused:
                visits[key].clear()
            skipped |= refused
            in_turn = [cell for cell in in_turn if cell.key not in skipped]
        for cell in compiled:
            # A machine without a compiler is not to lose what was measured before.
            made = _or_reason(partial(_compiled, measurer, cell, rounds))
            if isinstance(made, str):
                skipped[cell.key] = made
                give_memory_back()
            else:
                visits[cell.key] = made
    except KeyboardInterrupt as error:
        done = sum(map(len, visits.values()))
        error.add_note(f"{done} of {rounds * len(possible)} rounds of cells were measured")
        raise
    possible = [cell for cell in possible if cell.key not in skipped]
    at_least_one(measurer, possible, skipped)
    return [collected(measurer, cell, visits[cell.key]) for cell in possible], skipped


def collected_so_far(
    measurer: Measurer, cells: Sequence[Cell], visits: Mapping[str, Sequence[Visit]]
) -> tuple[list[CellResult], dict[str, str]]:
    """What `interleaved` had measured when it was interrupted, and the cells that it had not."""
    made = [cell for cell in cells if visits.get(cell.key)]
    left = {cell.key: "interrupted before a round was over" for cell in cells if cell not in made}
    return [collected(measurer, cell, visits[cell.key]) for cell in made], left


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
    at_least_one(measurer, possible, skipped)
    return possible, skipped


def at_least_one(measurer: Measurer, possible: Sequence[Cell], skipped: Mapping[str, str]) -> None:
    """Raises `InputError` with the first reason where no cell is left to measure."""
    if not possible:
        raise InputError(
            f"no cell can be measured here: {next(iter(skipped.values()), 'none was asked for')}",
            where=measurer.engine.stack.name,
        )


def collected(
    measurer: Measurer, cell: Cell, visits: Sequence[Visit], *, a_round: int = 1
) -> CellResult:
    """The result of *cell* from its visits, of which *a_round* make a round: the fastest counts."""
    made = [visit.round for visit in visits]
    return measurer.result(
        cell,
        [fastest(made[place : place + a_round]) for place in range(0, len(made), a_round)],
        gaps_s=[gap for visit in visits for gap in visit.gaps_s],
        switch_s=tuple(dict.fromkeys(visit.switch_s for visit in visits)),
        peak_bytes=max((visit.peak_bytes for visit in visits), default=None),
        device_states=tuple(dict(visit.state) for visit in visits if visit.state is not None),
    )


def _compiled(measurer: Measurer, cell: Cell, rounds: int) -> list[Visit]:
    """The rounds of a cell that is compiled anew."""
    torch.compiler.reset()
    with measurer.applied(cell.mode, cell.application) as (model, seconds):
        reset_peak(measurer.device)
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
