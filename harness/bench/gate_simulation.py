"""How often the gate is wrong: simulated nights with noise from real runs.

    python -m harness.bench.gate_simulation [--nights 1000] [--noise fixtures/latency/noise.json]

Pairs: a night is drawn from the recorded launches, in each of which two processes measured the
same thing in turn (`harness.bench.gate_noise`): ten launches without repeats, which of the two
is the new side by lot, and all cells together, so that what one process has against another, what
drifts, and what a neighbour's burst does to all cells at once stay in. Four recorded visits of
five generations are a round, as with `--repeats 20`. History: earlier nights and this one, each a
process of another launch, a recorded visit a round, as with `--repeats 5`. Then the new side is
made slower, by a share, in every cell or in one.

Prints the share of nights with a false alarm (with the 95 % upper bound of Clopper and Pearson)
and the share of slowed figures that were found. The bound is for nights with this noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.bench.cells import METRICS, CellResult
from harness.bench.comparing import compare_history, compare_pairs
from harness.bench.gate import judge_changes
from harness.verdict import Outcome

__all__ = ["LAUNCHES", "NOISE", "ROUNDS", "Rates", "read_noise", "simulate"]

ROUNDS, LAUNCHES = 20, 10  # as `lora-stack bench --against-command` takes them
_VISITS = 4  # of five generations: a round with `--repeats 20`
NOISE = Path(__file__).parents[2] / "fixtures" / "latency" / "noise.json"

Process = Mapping[str, Mapping[str, Sequence[float]]]
Noise = Sequence[Sequence[Process]]
Side = dict[str, CellResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Attributes:
    alarms: nights on which some figure that was not slowed failed.
    found, slowed: figures that were slowed, and those of them that failed.
    """

    nights: int
    alarms: int
    found: int
    slowed: int

    @property
    def alarm_bound(self) -> float:
        """95 % upper bound of the share of nights with a false alarm."""
        from scipy import stats

        if self.alarms == self.nights:
            return 1.0
        return float(stats.beta.ppf(0.95, self.alarms + 1, self.nights - self.alarms))


def read_noise(path: Path = NOISE) -> Noise:
    """The recorded launches of *path*, the two processes of each; seconds."""
    launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
    return [
        [
            {
                key: {metric: [us * 1e-6 for us in times[metric]] for metric in METRICS}
                for key, times in process.items()
            }
            for process in launch
        ]
        for launch in launches
    ]


def simulate(
    noise: Noise,
    *,
    shift: float,
    nights: int,
    rounds: int = ROUNDS,
    launches: int = LAUNCHES,
    everywhere: bool = True,
    history: int = 0,
    seed: int = 0,
) -> Rates:
    """Judge *nights* simulated nights.

    Args:
        shift: 0.1 makes the new side a tenth slower.
        rounds, launches: of each side, of pairs.
        everywhere: in every cell; otherwise in one, another each night.
        history: earlier nights to hold the new one against; 0 for pairs.
    """
    random = np.random.default_rng(seed)
    alarms = found = slowed = 0
    keys = list(noise[0][0])
    recorded = _recorded(noise)
    each, visits = (recorded, 1) if history else (rounds // launches, _VISITS)
    sides = [[_side(process, each, visits) for process in launch] for launch in noise]
    for night in range(nights):
        targets = set(keys if everywhere else [keys[night % len(keys)]]) if shift else set()
        count = history + 1 if history else launches
        drawn = [
            sides[int(launch)][:: 1 if random.integers(2) else -1]
            for launch in random.choice(len(sides), size=count, replace=False)
        ]
        if history:
            *nights_before, tonight = (launch[0] for launch in drawn)
            table = compare_history(nights_before, _slowed(tonight, targets, 1 + shift))
        else:
            old, new = zip(*drawn, strict=True)
            table = compare_pairs(old, [_slowed(side, targets, 1 + shift) for side in new])
        failed = {
            (change.samples.key, change.samples.metric)
            for change in judge_changes(table, intervals=False)
            if change.outcome is Outcome.FAILED
        }
        alarms += any(key not in targets for key, _ in failed)
        found += sum(key in targets for key, _ in failed)
        slowed += len(targets) * len(METRICS)
    return Rates(nights=nights, alarms=alarms, found=found, slowed=slowed)


def _recorded(noise: Noise) -> int:
    return len(next(iter(noise[0][0].values()))[METRICS[0]])


def _side(process: Process, rounds: int, visits: int) -> Side:
    """The first *rounds* rounds of a process, each the fastest of so many recorded visits."""
    places = [slice(place, place + visits) for place in range(0, rounds * visits, visits)]
    return {
        key: _cell(key, {m: tuple(min(times[m][place]) for place in places) for m in METRICS})
        for key, times in process.items()
    }


def _cell(key: str, rounds: Mapping[str, tuple[float, ...]]) -> CellResult:
    return CellResult(
        key=key, mode="", application="", decoding="dynamic", batch_size=1, input_tokens=1,
        output_tokens=2, rounds=rounds, itl_s={},
    )  # fmt: skip


def _slowed(side: Side, targets: set[str], factor: float) -> Side:
    return {
        key: _cell(key, {m: tuple(v * factor for v in values) for m, values in cell.rounds.items()})
        if key in targets
        else cell
        for key, cell in side.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--noise", type=Path, default=NOISE)
    arguments = parser.parse_args()
    noise = read_noise(arguments.noise)
    cells, recorded = len(noise[0][0]), _recorded(noise)
    print(f"{len(noise)} recorded launches × 2 processes × {cells} cells × {recorded} visits")
    print(_spread(noise))
    head = f"{'slower by':>10} {'where':>9} {'nights':>7} {'false alarms':>24} {'found':>8}"
    for history in (0, 2, 7):
        print(
            f"against {history} stored nights of {recorded} rounds"
            if history
            else f"pairs in turn, {ROUNDS} rounds of {_VISITS} visits over {LAUNCHES} launches"
        )
        print(head)
        for shift in (0.0, 0.03, 0.05, 0.10, *((0.50, 1.00) if history else ())):
            for everywhere in (True, False):
                if shift == 0 and not everywhere:
                    continue
                # A night with all cells slowed has 90 figures to find, one with one cell three.
                part = 1 if shift == 0 else 20 if everywhere else 2
                rates = simulate(
                    noise, shift=shift, nights=max(1, arguments.nights // part),
                    everywhere=everywhere, history=history, seed=history,
                )  # fmt: skip
                _print(rates, shift, everywhere=everywhere)


def _print(rates: Rates, shift: float, *, everywhere: bool) -> None:
    where = "all cells" if everywhere else "one cell"
    judged = everywhere and shift > 0  # then no figure is left that could raise a false alarm
    alarms = "–" if judged else f"{rates.alarms / rates.nights:.2%} (≤ {rates.alarm_bound:.2%})"
    share = f"{rates.found / rates.slowed:.1%}" if rates.slowed else "–"
    print(f"{shift:>10.0%} {where:>9} {rates.nights:>7} {alarms:>24} {share:>8}", flush=True)


def _robust(pairs: np.ndarray[Any, Any]) -> float:
    """How far the last axis lies about its mean, from the quartiles."""
    count = pairs.shape[2]
    left = (pairs - pairs.mean(axis=2, keepdims=True)) * (count / (count - 1)) ** 0.5
    low, high = np.percentile(left, [25, 75])
    return float(high - low) / 1.349


def _spread(noise: Noise) -> str:
    """The recorded noise in words: from pair to pair, and from launch to launch."""
    lines = []
    for metric in METRICS:
        logs = np.log([[[times[metric] for times in process.values()] for process in launch]
                       for launch in noise])  # fmt: skip  # launch, process, cell, round
        pairs = logs[:, 1] - logs[:, 0]
        of_rounds = logs.reshape(*logs.shape[:3], -1, _VISITS).min(axis=4)
        rounds = of_rounds[:, 1] - of_rounds[:, 0]
        launches = rounds.mean(axis=2)
        lines.append(
            f"  {metric}: in a launch pairs of single visits differ by {_robust(pairs):.1%} "
            f"(robust standard deviation),\n    of rounds by {_robust(rounds):.1%}; "
            f"launches' ratios by {launches.std():.1%}, "
            f"of all cells at once by {launches.mean(axis=1).std():.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
