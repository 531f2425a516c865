"""How often the gate is wrong: simulated nights with noise from real runs.

    python -m harness.bench.gate_simulation [--nights 1000] [--noise fixtures/latency/noise.json]

Pairs: a night is drawn from the recorded launches, in each of which two processes measured the
same thing in turn (`harness.bench.gate_noise`): several launches without repeats, which of the two
is the new side by lot, some consecutive rounds of each, the same in all cells, so that what one
process has against another, what drifts, and what a neighbour's burst does to all cells at once
stay in. History: earlier nights and this one, each a process of another launch, all its rounds.
Then the new side is made slower, by a share, in every cell or in one.

Prints the share of nights with a false alarm (with the 95 % upper bound of Clopper and Pearson)
and the share of slowed figures that were found. The bound is for nights with this noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.bench.cells import METRICS, CellResult
from harness.bench.comparing import compare_history, compare_pairs
from harness.bench.gate import judge_changes
from harness.verdict import Outcome

__all__ = ["LAUNCHES", "NOISE", "ROUNDS", "Rates", "read_noise", "simulate"]

ROUNDS, LAUNCHES = 20, 5  # as `lora-stack bench --against-command` takes them
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
    """The recorded launches of *path*, the two processes of each."""
    launches: Noise = json.loads(path.read_text(encoding="utf-8"))["launches"]
    return launches


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
    for night in range(nights):
        targets = set(keys if everywhere else [keys[night % len(keys)]]) if shift else set()
        if history:
            *nights_before, tonight = _nights(noise, random, history + 1)
            table = compare_history(nights_before, _slowed(tonight, targets, 1 + shift))
        else:
            old, new = _launches(noise, random, rounds, launches)
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


def _launches(
    noise: Noise, random: np.random.Generator, rounds: int, launches: int
) -> tuple[list[Side], list[Side]]:
    """Both sides, a launch a recorded one; rounds pair up within a launch."""
    old: list[Side] = []
    new: list[Side] = []
    each = rounds // launches
    for launch in random.choice(len(noise), size=launches, replace=False):
        processes = noise[int(launch)]
        first = int(random.integers(2))
        start = int(random.integers(_recorded(processes[0]) - each + 1))
        old.append(_side(processes[first], slice(start, start + each)))
        new.append(_side(processes[1 - first], slice(start, start + each)))
    return old, new


def _nights(noise: Noise, random: np.random.Generator, count: int) -> list[Side]:
    """*count* nights, each a process of another launch, with all its rounds."""
    return [
        _side(noise[int(launch)][int(random.integers(2))], slice(None))
        for launch in random.choice(len(noise), size=count, replace=False)
    ]


def _recorded(process: Process) -> int:
    return len(next(iter(process.values()))[METRICS[0]])


def _side(process: Process, rounds: slice) -> Side:
    return {
        key: _cell(key, {metric: tuple(times[metric][rounds]) for metric in METRICS})
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
    cells, recorded = len(noise[0][0]), _recorded(noise[0][0])
    print(f"{len(noise)} recorded launches × 2 processes × {cells} cells × {recorded} rounds")
    print(_spread(noise))
    head = f"{'slower by':>10} {'where':>9} {'nights':>7} {'false alarms':>24} {'found':>8}"
    for history in (0, 2, 7):
        print(
            f"against {history} stored nights of {recorded} rounds"
            if history
            else f"pairs in turn, {ROUNDS} rounds over {LAUNCHES} launches"
        )
        print(head)
        for shift in (0.0, 0.03, 0.05, 0.10):
            for everywhere in (True, False):
                if shift == 0 and not everywhere:
                    continue
                rates = simulate(
                    noise, shift=shift, nights=arguments.nights, everywhere=everywhere,
                    history=history, seed=history,
                )  # fmt: skip
                _print(rates, shift, everywhere=everywhere)


def _print(rates: Rates, shift: float, *, everywhere: bool) -> None:
    where = "all cells" if everywhere else "one cell"
    judged = everywhere and shift > 0  # then no figure is left that could raise a false alarm
    alarms = "–" if judged else f"{rates.alarms / rates.nights:.2%} (≤ {rates.alarm_bound:.2%})"
    share = f"{rates.found / rates.slowed:.1%}" if rates.slowed else "–"
    print(f"{shift:>10.0%} {where:>9} {rates.nights:>7} {alarms:>24} {share:>8}", flush=True)


def _spread(noise: Noise) -> str:
    """The recorded noise in words: from pair to pair, and from launch to launch."""
    lines = []
    for metric in METRICS:
        logs = np.log([[[times[metric] for times in process.values()] for process in launch]
                       for launch in noise])  # fmt: skip  # launch, process, cell, round
        pairs = logs[:, 1] - logs[:, 0]
        low, high = np.percentile(pairs - pairs.mean(axis=2, keepdims=True), [25, 75])
        launches = pairs.mean(axis=2)
        lines.append(
            f"  {metric}: pairs within a launch differ by {(high - low) / 1.349:.1%} (robust "
            f"standard deviation), launches' ratios by {launches.std():.1%}, all cells at once by "
            f"{launches.mean(axis=1).std():.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
