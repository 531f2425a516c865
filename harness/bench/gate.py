"""Did it get slower? Two tables of times in, verdicts out.

A figure fails only if everything says so: the bootstrap interval of the ratio excludes 1, a rank
test agrees, the change is beyond the noise floor that this machine showed between equal things,
which holds the rate of false alarms for the whole table (`harness.bench.noise_floor`), and it is
beyond a relative and an absolute threshold. Against stored nights, which know less of each other
than pairs do, the rank test is corrected over the table as well (Holm 1979). What cannot be
compared, is absent, or is too little to decide never passes. docs/latency.md has the definitions,
and what a simulation of whole nights says about the rates. Knows nothing of files or of measuring.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.bench.cells import percentile
from harness.verdict import Outcome

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FAMILY",
    "Change",
    "Samples",
    "Thresholds",
    "judge_changes",
    "log_ratio_interval",
]

_TRIM = 0.2  # of each end: a neighbour's burst is no change
_BLIND = math.log(2)  # a noise floor that hides a doubling tells nothing of what looks slower
#: The share of nights with a false alarm that is allowed, over the whole table.
FAMILY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a change must exceed to matter at all.

    Attributes:
        relative: of the old time.
        absolute_s: seconds by metric.
    """

    relative: float = 0.05
    absolute_s: Mapping[str, float] | None = None

    def seconds(self, metric: str) -> float:
        default = {"ttft_s": 1e-4, "tpot_s": 2e-5, "e2e_s": 2e-4}
        return (self.absolute_s or default)[metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The times of one figure on both sides.

    Attributes:
        old, new: seconds a round; of equal length and in pairs if *paired*.
        floor: how large a relative change (as a log ratio) equal things showed.
    """

    key: str
    metric: str
    old: tuple[float, ...]
    new: tuple[float, ...]
    paired: bool
    floor: float

    @property
    def name(self) -> str:
        return f"{self.key} {self.metric.removesuffix('_s')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure, compared.

    Attributes:
        ratio: new over old, of 20 % trimmed means of logarithms; *low* and *high* bound it at
            99 % (bootstrap, BCa), None where it was not asked for.
        p: of the rank test (Wilcoxon's on pairs, Mann and Whitney's otherwise), two-sided;
            *p_adjusted* over the table.
        outcome: `held`, `failed`, or `undecided` where so few rounds could never decide, or where
            what looks twice as slow, or worse, is hidden by the noise floor.
        better: the same conditions hold for a change in the other direction.
    """

    samples: Samples
    old_s: float
    new_s: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    p_adjusted: float
    outcome: Outcome
    better: bool
    why: tuple[str, ...]

    @property
    def p_judged(self) -> float:
        """The p-value that decides: corrected over the table where rounds are not pairs."""
        return _judged(self.samples, self.p, self.p_adjusted)

    def as_json(self) -> dict[str, Any]:
        return {
            "cell": self.samples.key,
            "metric": self.samples.metric,
            "paired": self.samples.paired,
            "old_s": self.old_s,
            "new_s": self.new_s,
            "ratio": self.ratio,
            "interval": [self.low, self.high],
            "p": self.p,
            "p_adjusted": self.p_adjusted,
            "noise_floor": math.expm1(self.samples.floor),
            "rounds": [len(self.samples.old), len(self.samples.new)],
            "verdict": self.outcome.value,
            "faster": self.better,
            "why": list(self.why),
        }


def log_ratio_interval(
    old: Sequence[float], new: Sequence[float], *, paired: bool, confidence: float = 0.99
) -> tuple[float, float, float]:
    """The ratio new/old and its bootstrap interval (`scipy.stats.bootstrap`, BCa, seeded).

    The statistic is the 20 % trimmed mean of the log ratios of pairs, or the difference of the
    trimmed means of the logarithms.
    """
    import numpy as np
    from scipy import stats

    first, second = np.log(np.asarray(old)), np.log(np.asarray(new))

    if paired:
        data: tuple[Any, ...] = (second - first,)
        statistic: Any = _centre
    else:
        data = (first, second)

        def statistic(one: Any, two: Any, axis: int = -1) -> Any:
            return _centre(two, axis) - _centre(one, axis)

    middle = float(statistic(*data))
    # Equal values, or too few to resample, have no spread that a resample could show.
    if min(len(part) for part in data) < 2 or all(float(np.ptp(part)) == 0 for part in data):
        return math.exp(middle), math.exp(middle), math.exp(middle)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # met below
        found = stats.bootstrap(
            data, statistic, vectorized=True, n_resamples=1999, confidence_level=confidence,
            method="BCa", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    if not (math.isfinite(low) and math.isfinite(high)):  # BCa of values that are almost all equal
        low = high = middle
    return math.exp(middle), math.exp(low), math.exp(high)


def _rank_tests(table: Sequence[Samples]) -> list[float]:
    """The p-value of each figure; figures of one size are tested in one call."""
    import numpy as np
    from scipy import stats

    found = [1.0] * len(table)
    sizes: dict[tuple[int, int, bool, bool], list[int]] = {}
    for place, samples in enumerate(table):
        # Scipy leaves the exact distribution for all rows of a call if one has ties: those apart.
        differences = np.abs(_logs(samples.new) - _logs(samples.old)) if samples.paired else []
        tied = len({0.0, *map(float, differences)}) <= len(differences)
        sizes.setdefault(
            (len(samples.old), len(samples.new), samples.paired, tied), []
        ).append(place)  # fmt: skip
    for (_, _, paired, tied), places in sizes.items():
        for some in [[place] for place in places] if tied else [places]:
            old = np.array([_logs(table[place].old) for place in some])
            new = np.array([_logs(table[place].new) for place in some])
            if paired:
                if not (new - old).any():
                    continue
                p = stats.wilcoxon(new - old, axis=1).pvalue
            else:
                p = stats.mannwhitneyu(old, new, alternative="two-sided", axis=1).pvalue
            for place, value in zip(some, p, strict=True):
                found[place] = float(value)
    return found


def _logs(values: Sequence[float]) -> np.ndarray[Any, Any]:
    import numpy as np

    logs: np.ndarray[Any, Any] = np.log(np.asarray(values))
    return logs


def _judged(samples: Samples, p: float, p_adjusted: float) -> float:
    """Which of the two p-values decides: pairs need no correction over the table."""
    return p if samples.paired else p_adjusted


def _least_p(samples: Samples) -> float:
    """The smallest p-value that so many rounds can give, however clear the change."""
    if samples.paired:
        return 2.0 ** (1 - len(samples.new))
    return 2 / math.comb(len(samples.new) + len(samples.old), len(samples.new))


def _holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values: the family-wise error stays at the level compared."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted = [1.0] * len(values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def judge_changes(
    table: Sequence[Samples], thresholds: Thresholds | None = None, *, intervals: bool = True
) -> list[Change]:
    """Judge every figure of a table together.

    Args:
        intervals: compute every interval; otherwise only where everything else says "slower",
            which decides the same.
    """
    thresholds = thresholds or Thresholds()
    tests = _rank_tests(table)
    adjusted = _holm(tests)
    found = []
    for samples, p, p_adjusted in zip(table, tests, adjusted, strict=True):
        old_s, new_s = percentile(samples.old, 50), percentile(samples.new, 50)
        middle = _middle(samples)
        large = (
            abs(middle) > samples.floor
            and abs(math.expm1(middle)) > thresholds.relative
            and abs(new_s - old_s) > thresholds.seconds(samples.metric)
        )
        sure = _judged(samples, p, p_adjusted) <= FAMILY
        low = high = None
        if intervals or (large and sure):
            _, low, high = log_ratio_interval(samples.old, samples.new, paired=samples.paired)
        apart = low is not None and high is not None and not low <= 1 <= high
        hopeless = _least_p(samples) * (1 if samples.paired else len(table)) > FAMILY
        outcome, why = _outcome(samples, middle, thresholds, large=large, sure=sure, apart=apart)
        slower = sure and middle > max(_BLIND, math.log1p(thresholds.relative))
        if slower and middle <= samples.floor:
            outcome = Outcome.UNDECIDED
            why = (
                f"{math.expm1(middle):.0%} slower by the rank test, on a machine whose noise floor "
                f"is {math.expm1(samples.floor):.0%}: measure again while it does nothing else",
            )
        if hopeless:
            outcome = Outcome.UNDECIDED
            why = (
                f"{len(samples.new)} rounds can decide nothing in a table of {len(table)} figures: "
                "take more rounds",
            )
        found.append(
            Change(
                samples=samples, old_s=old_s, new_s=new_s, ratio=math.exp(middle), low=low,
                high=high, p=p, p_adjusted=p_adjusted, outcome=outcome,
                better=not hopeless and large and sure and apart and middle < 0, why=why,
            )
        )  # fmt: skip
    return found


def _outcome(
    samples: Samples, middle: float, thresholds: Thresholds, *, large: bool, sure: bool, apart: bool
) -> tuple[Outcome, tuple[str, ...]]:
    if large and sure and apart and middle > 0:
        return Outcome.FAILED, ("slower, beyond noise and thresholds",)
    reasons = []
    if not sure:
        reasons.append("the rank test does not say so")
    if abs(middle) <= samples.floor:
        reasons.append(f"within the noise floor of {math.expm1(samples.floor):.1%}")
    if abs(math.expm1(middle)) <= thresholds.relative:
        reasons.append(f"below the threshold of {thresholds.relative:.0%}")
    if middle < 0:
        reasons.append("faster")
    return Outcome.HELD, tuple(reasons)


def _centre(values: Any, axis: int = -1) -> Any:
    """The 20 % trimmed mean along *axis* (`scipy.stats.trim_mean`, without its checks)."""
    import numpy as np

    ordered = np.sort(values, axis=axis)
    count = ordered.shape[axis]
    cut = int(_TRIM * count)
    return np.take(ordered, range(cut, count - cut), axis=axis).mean(axis=axis)


def _middle(samples: Samples) -> float:
    old, new = _logs(samples.old), _logs(samples.new)
    if samples.paired:
        return float(_centre(new - old))
    return float(_centre(new) - _centre(old))
