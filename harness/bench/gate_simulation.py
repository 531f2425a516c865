"""How often the gate is wrong: simulated nights with noise from real runs.

    python -m harness.bench.gate_simulation [--nights 1000] [--noise fixtures/latency/noise.json]

A night is a table of 90 figures (30 cells × 3 metrics) over 20 rounds. Both sides are drawn from
recorded processes that measured the same thing: four launches a side, at random without repeats,
five consecutive rounds of each, the same rounds on both sides and in all cells, so that what one
process has against another, what drifts, and what a neighbour's burst does to all cells at once
stay in. Then the new side is made slower, by a share, in every cell or in one. The same is done
with a stored history: seven earlier nights and this one, a process each.

Prints the share of nights with a false alarm (with the 95 % upper bound of Clopper and Pearson)
and the share of slowed figures that were found.
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
from harness.bench.gate import compare_history, compare_pairs, judge_changes
from harness.verdict import Outcome

__all__ = ["Rates", "read_noise", "simulate"]

_BLOCK = 5
_COPIES = 3  # of each recorded cell, as three batch sizes
NOISE = Path(__file__).parents[2] / "fixtures" / "latency" / "noise.json"


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

        return float(stats.beta.ppf(0.95, self.alarms + 1, self.nights - self.alarms))


Noise = Sequence[Mapping[str, Mapping[str, Sequence[float]]]]
Side = dict[str, CellResult]


def read_noise(path: Path = NOISE) -> Noise:
    """The recorded processes of *path* (`harness.bench.gate_noise`)."""
    processes: Noise = json.loads(path.read_text(encoding="utf-8"))["processes"]
    return processes


def simulate(
    noise: Noise,
    *,
    shift: float,
    nights: int,
    rounds: int = 20,
    everywhere: bool = True,
    history: int = 0,
    seed: int = 0,
) -> Rates:
    """Judge *nights* simulated nights.

    Args:
        shift: 0.1 makes the new side a tenth slower.
        everywhere: in every cell; otherwise in the first alone.
        history: earlier nights to hold the new one against; 0 for pairs.
    """
    random = np.random.default_rng(seed)
    alarms = found = slowed = 0
    for _ in range(nights):
        keys = [f"{key} {copy}" for copy in range(_COPIES) for key in noise[0]]
        targets = set(keys if everywhere else keys[:1]) if shift else set()

        def slowed_down(side: Side, targets: set[str] = targets) -> Side:
            return {k: _slower(c, 1 + shift) if k in targets else c for k, c in side.items()}

        if history:
            *nights_before, tonight = _nights(noise, random, rounds, history + 1)
            table = compare_history(nights_before, slowed_down(tonight))
        else:
            old, new = _launches(noise, random, rounds)
            table = compare_pairs(old, [slowed_down(launch) for launch in new])
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
    noise: Noise, random: np.random.Generator, rounds: int
) -> tuple[list[Side], list[Side]]:
    """Both sides, a launch a recorded process; rounds pair up within a launch."""
    count = rounds // _BLOCK
    chosen = random.choice(len(noise), size=2 * count, replace=2 * count > len(noise))
    old: list[Side] = [{} for _ in range(count)]
    new: list[Side] = [{} for _ in range(count)]
    for copy in range(_COPIES):
        for launch in range(count):
            places = _block(random, noise)
            for sides, process in ((old, chosen[2 * launch]), (new, chosen[2 * launch + 1])):
                sides[launch] |= _drawn(noise[int(process)], places, copy)
    return old, new


def _nights(noise: Noise, random: np.random.Generator, rounds: int, count: int) -> list[Side]:
    """*count* nights, a recorded process each; nights share no rounds."""
    chosen = random.choice(len(noise), size=count, replace=count > len(noise))
    nights: list[Side] = [{} for _ in chosen]
    for copy in range(_COPIES):
        for night, process in zip(nights, chosen, strict=True):
            places = [p for _ in range(rounds // _BLOCK) for p in _block(random, noise)]
            night |= _drawn(noise[int(process)], places, copy)
    return nights


def _block(random: np.random.Generator, noise: Noise) -> list[int]:
    recorded = len(next(iter(noise[0].values()))["e2e_s"])
    start = int(random.integers(0, recorded - _BLOCK + 1))
    return list(range(start, start + _BLOCK))


def _drawn(
    process: Mapping[str, Mapping[str, Sequence[float]]], places: Sequence[int], copy: int
) -> Side:
    return {
        f"{key} {copy}": _cell(
            f"{key} {copy}",
            {metric: tuple(metrics[metric][place] for place in places) for metric in METRICS},
        )
        for key, metrics in process.items()
    }


def _cell(key: str, rounds: Mapping[str, tuple[float, ...]]) -> CellResult:
    return CellResult(
        key=key, mode="", application="", decoding="dynamic", batch_size=1, input_tokens=1,
        output_tokens=2, rounds=rounds, itl_s={},
    )  # fmt: skip


def _slower(cell: CellResult, factor: float) -> CellResult:
    rounds = {metric: tuple(v * factor for v in values) for metric, values in cell.rounds.items()}
    return _cell(cell.key, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--noise", type=Path, default=NOISE)
    arguments = parser.parse_args()
    noise = read_noise(arguments.noise)
    print(f"{len(noise)} recorded processes × {len(noise[0])} cells; 90 figures, 20 rounds a night")
    print(_spread(noise))
    head = f"{'slower by':>10} {'where':>9} {'nights':>7} {'false alarms':>24} {'found':>8}"
    for history in (0, 7):
        print("pairs in turn" if not history else f"against {history} stored nights")
        print(head)
        for shift in (0.0, 0.03, 0.05, 0.10):
            for everywhere in (True, False):
                if shift == 0 and not everywhere:
                    continue
                count = arguments.nights if shift == 0 else max(1, arguments.nights // 5)
                rates = simulate(
                    noise, shift=shift, nights=count, everywhere=everywhere, history=history,
                    seed=history,
                )  # fmt: skip
                _print(rates, shift, everywhere=everywhere)


def _print(rates: Rates, shift: float, *, everywhere: bool) -> None:
    where = "all cells" if everywhere else "one cell"
    alarms = f"{rates.alarms / rates.nights:.2%} (≤ {rates.alarm_bound:.2%})"
    share = f"{rates.found / rates.slowed:.1%}" if rates.slowed else "–"
    print(f"{shift:>10.0%} {where:>9} {rates.nights:>7} {alarms:>24} {share:>8}", flush=True)


def _spread(noise: Noise) -> str:
    """The recorded noise in words: from round to round, and from process to process."""
    within: dict[str, list[float]] = {metric: [] for metric in METRICS}
    between: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for key in noise[0]:
        for metric in METRICS:
            logs: list[Any] = [np.log(process[key][metric]) for process in noise]
            pairs = [after - logs[0] for after in logs[1:]]
            within[metric] += [float(np.subtract(*np.percentile(p, [75, 25]))) / 1.349
                               for p in pairs]  # fmt: skip
            between[metric].append(float(np.std([np.median(values) for values in logs], ddof=1)))
    return "\n".join(
        f"  {metric}: pairs of rounds differ by {np.median(within[metric]):.1%} "
        f"(robust standard deviation), processes' medians by {np.median(between[metric]):.1%}"
        for metric in METRICS
    )


if __name__ == "__main__":
    main()
