"""Did it get slower? Two tables of times in, verdicts out.

A figure fails only if everything says so: the bootstrap interval of the ratio excludes 1, a rank
test does so after correction over the whole table (Holm 1979), the change is beyond the noise
floor that this machine showed between equal things (A against A), and it is beyond a relative and
an absolute threshold. What cannot be compared, is absent, or is too little to decide never passes.
docs/latency.md has the definitions, and what a simulation of whole nights says about the rates.
Knows nothing of files or of measuring.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.bench.cells import METRICS, CellResult, percentile
from harness.verdict import Outcome

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Change",
    "Samples",
    "Thresholds",
    "compare_history",
    "compare_pairs",
    "judge_changes",
    "log_ratio_interval",
]

_TRIM = 0.2  # of each end: a neighbour's burst is no change
_FEW_NIGHTS = 4  # below, the spread from night to night is not known
_FIRST_NIGHTS = 0.10  # and a change must be at least this
_FAMILY = 0.01  # false alarms a night, over the whole table


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
        default = {"ttft_s": 5e-4, "tpot_s": 5e-5, "e2e_s": 1e-3}
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
        outcome: `held`, `failed`, or `undecided` where so few rounds could never decide.
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

    def centre(values: Any, axis: int = -1) -> Any:
        return stats.trim_mean(values, _TRIM, axis=axis)

    if paired:
        data: tuple[Any, ...] = (second - first,)
        statistic: Any = centre
    else:
        data = (first, second)

        def statistic(one: Any, two: Any, axis: int = -1) -> Any:
            return centre(two, axis) - centre(one, axis)

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


def _rank_test(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any], *, paired: bool) -> float:
    from scipy import stats

    if paired:
        differences = new - old
        if not differences.any():
            return 1.0
        return float(stats.wilcoxon(differences).pvalue)
    return float(stats.mannwhitneyu(old, new, alternative="two-sided").pvalue)


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
    import numpy as np

    thresholds = thresholds or Thresholds()
    logs = [(np.log(np.asarray(s.old)), np.log(np.asarray(s.new))) for s in table]
    tests = [
        _rank_test(old, new, paired=samples.paired)
        for samples, (old, new) in zip(table, logs, strict=True)
    ]
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
        sure = p_adjusted <= _FAMILY
        low = high = None
        if intervals or (large and sure):
            _, low, high = log_ratio_interval(samples.old, samples.new, paired=samples.paired)
        apart = low is not None and high is not None and not low <= 1 <= high
        hopeless = len(table) * _least_p(samples) > _FAMILY
        outcome, why = _outcome(samples, middle, thresholds, large=large, sure=sure, apart=apart)
        if hopeless:
            outcome = Outcome.UNDECIDED
            why = (
                f"{len(samples.new)} rounds can decide nothing over a table of {len(table)} "
                "figures: take more rounds",
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
        reasons.append("the rank test, corrected over the table, does not say so")
    if abs(middle) <= samples.floor:
        reasons.append(f"within the noise floor of {math.expm1(samples.floor):.1%}")
    if abs(math.expm1(middle)) <= thresholds.relative:
        reasons.append(f"below the threshold of {thresholds.relative:.0%}")
    if middle < 0:
        reasons.append("faster")
    return Outcome.HELD, tuple(reasons)


def _middle(samples: Samples) -> float:
    import numpy as np
    from scipy import stats

    old, new = np.log(np.asarray(samples.old)), np.log(np.asarray(samples.new))
    if samples.paired:
        return float(stats.trim_mean(new - old, _TRIM))
    return float(stats.trim_mean(new, _TRIM) - stats.trim_mean(old, _TRIM))


def compare_pairs(
    old: Sequence[Mapping[str, CellResult]], new: Sequence[Mapping[str, CellResult]]
) -> list[Samples]:
    """Rounds that ran in turn, as pairs; cells that both sides have.

    Args:
        old, new: by launch: each side was started several times, and its rounds spread over them.
            What launches of one side show against each other is the noise floor (A against A).
            With one launch it is what rounds of one side show against the next.
    """
    keys = [key for key in old[0] if key in new[0]]
    floors = {metric: _pair_floor(old, new, keys, metric) for metric in METRICS}
    table = []
    for key in keys:
        for metric in METRICS:
            pairs: list[tuple[float, float]] = []
            for before, after in zip(old, new, strict=True):
                first, second = before[key].rounds[metric], after[key].rounds[metric]
                pairs += zip(first, second, strict=False)
            if pairs:
                table.append(
                    Samples(
                        key=key, metric=metric, old=tuple(pair[0] for pair in pairs),
                        new=tuple(pair[1] for pair in pairs), paired=True, floor=floors[metric],
                    )
                )  # fmt: skip
    return table


def _pair_floor(
    old: Sequence[Mapping[str, CellResult]],
    new: Sequence[Mapping[str, CellResult]],
    keys: Sequence[str],
    metric: str,
) -> float:
    """How far equal things may lie apart in this metric, as a log ratio.

    The spread of one side's launches about their mean, pooled over cells and sides, as the
    standard error of a difference of two such means, times Student's quantile at the family's
    level: one cell's own A/A is a single draw, the table's are many.
    """
    import numpy as np
    from scipy import stats

    squares, freedom = 0.0, 0
    for key in keys:
        for side in (old, new):
            rounds = [launch[key].rounds[metric] for launch in side if launch[key].rounds[metric]]
            if len(rounds) == 1:
                # Half as many pairs, of rounds further apart in time, as in the comparison.
                parts = [np.log(rounds[0][half::2]) for half in (0, 1)]
            else:
                parts = [np.log(values) for values in rounds]
            centres = [float(stats.trim_mean(part, _TRIM)) for part in parts if len(part)]
            if len(centres) < 2:
                continue
            middle = statistics.fmean(centres)
            squares += sum((centre - middle) ** 2 for centre in centres)
            freedom += len(centres) - 1
    if not freedom:
        return math.inf
    launches = max(2, len(old))
    level = _FAMILY / (2 * len(METRICS) * max(1, len(keys)))
    quantile = float(stats.t.ppf(1 - level, freedom))
    return quantile * math.sqrt(squares / freedom) * math.sqrt(2 / launches)


def compare_history(
    nights: Sequence[Mapping[str, CellResult]], new: Mapping[str, CellResult]
) -> list[Samples]:
    """Tonight against earlier *nights* (oldest first) of the same hardware.

    The old side is the rounds of all nights. The floor is Student's prediction interval of one
    more night, from the spread of the nights' medians, pooled over the cells of a metric. With
    fewer than four nights that spread is not known, and a change must be at least 10 %.
    """
    from scipy import stats

    figures = len(METRICS) * max(1, len(new))
    table: list[Samples] = []
    for metric in METRICS:
        medians = {
            key: [night[key].median(metric) for night in nights if _has(night, key, metric)]
            for key in new
        }
        residuals = [
            math.log(value) - statistics.fmean(math.log(v) for v in values)
            for values in medians.values()
            if len(values) >= _FEW_NIGHTS
            for value in values
        ]
        rows = [values for values in medians.values() if len(values) >= _FEW_NIGHTS]
        freedom = sum(len(values) - 1 for values in rows)
        spread = math.sqrt(sum(r * r for r in residuals) / freedom) if freedom else 0.0
        for key, values in medians.items():
            if not values or not new[key].rounds[metric]:
                continue
            within = _within_floor(new[key].rounds[metric])
            if len(values) >= _FEW_NIGHTS:
                count = len(values)
                quantile = stats.t.ppf(1 - _FAMILY / (2 * figures), count - 1)
                floor = max(within, float(quantile * spread * math.sqrt(1 + 1 / count)))
            else:
                floor = max(within, math.log1p(_FIRST_NIGHTS))
            last = [night[key] for night in nights if _has(night, key, metric)]
            old = [value for cell in last for value in cell.rounds[metric]]
            table.append(
                Samples(
                    key=key, metric=metric, old=tuple(old), new=new[key].rounds[metric],
                    paired=False, floor=floor,
                )
            )  # fmt: skip
    return table


def _has(night: Mapping[str, CellResult], key: str, metric: str) -> bool:
    return key in night and bool(night[key].rounds.get(metric))


def _within_floor(rounds: Sequence[float]) -> float:
    """Twice the standard error of this session's own rounds, as a log ratio."""
    if len(rounds) < 2:
        return math.inf
    logs = [math.log(value) for value in rounds]
    return 2 * statistics.stdev(logs) / math.sqrt(len(logs))
