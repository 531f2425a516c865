"""How far log-probabilities move between runs that ought to be equal: the noise floor, measured.

A few completions are scored as replay scores them, and again alone, padded on the left and token
by token with a cache, with the adapters flattened into one, and in a higher precision. What moves
between these is rounding; it is measured on the model, device and dtype at hand, and remembered
with the digest of both. `tolerances` says how far a comparison may go from it. torch comes with the
first measurement. Knows nothing of snapshots' files or verdicts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.completion import Application, Completion
from harness.errors import InputError
from harness.evidence import GAP_STEP, TOP_STEP, Shifts, shifts
from harness.files.digests import cache_folder, combined_digest
from harness.files.staging import write_text
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.engines.scoring import ScoreRow
    from harness.evidence import Evidence

__all__ = ["NoiseFloor", "Tolerances", "measure_floor", "noise_floor", "tolerances"]

_METHOD = 2  # of measuring; remembered floors of another are measured again
_CASES = 4
_TOKENS = 24
#: How many times the largest movement measured between equal runs is still taken for rounding.
SAFETY = 3.0
#: Decimal places aside, the coarser of two dtypes decides: its unit roundoff is the larger.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_HIGHER = {"float32": "float64", "bfloat16": "float32", "float16": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """What rounding moves, in nats.

    Attributes:
        dtype: of the run, or of the snapshot where that is coarser.
        chosen: the largest root mean square, over a completion, of the produced tokens' movements.
        gaps: the same of the other top tokens' distances to the produced one.
        worst: the largest single movement.
        close: the largest movement of a produced token against a rival (`harness.evidence.RIVAL`).
        tokens: how many tokens were scored, each in several ways.
        ways: what was compared.
    """

    dtype: str
    device: str
    chosen: float
    gaps: float
    worst: float
    close: float
    tokens: int
    ways: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.chosen:.2g} nats (rms; at worst {self.worst:.2g}) in {self.dtype} on "
            f"{self.device}, measured over {self.tokens} tokens: {', '.join(self.ways)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """How far two evidences may lie apart and still be of equal runs, in nats.

    Attributes:
        chosen: root mean square of the produced tokens' movements.
        gaps: root mean square of the others' distances.
        worst: a single movement.
        tie: the margin between two tokens of which either can come first.
    """

    chosen: float
    gaps: float
    worst: float
    tie: float


def tolerances(floor: NoiseFloor, *, tokens: int, gaps: int) -> Tolerances:
    """What *floor* allows over so many tokens and other top tokens, stored evidence's rounding
    (`TOP_STEP`, `GAP_STEP`) included."""
    return Tolerances(
        chosen=math.hypot(SAFETY * floor.chosen, _rounding(TOP_STEP, tokens)),
        gaps=math.hypot(SAFETY * floor.gaps, _rounding(GAP_STEP + TOP_STEP, gaps)),
        worst=SAFETY * floor.worst + GAP_STEP / 2 + TOP_STEP,
        tie=SAFETY * floor.close,
    )


def _rounding(step: float, count: int) -> float:
    """Root mean square of *count* errors, uniform in ±step/2, five standard deviations up.

    The square of one has the mean 1/12 and the variance 1/180; none exceeds 1/4.
    """
    return step * math.sqrt(min(1 / 4, 1 / 12 + 5 * math.sqrt(1 / 180 / max(count, 1))))


def noise_floor(
    engine: PeftEngine,
    mode: Mode,
    completions: Sequence[Completion],
    *,
    contents: dict[str, str],
    recorded_dtype: str | None = None,
) -> NoiseFloor:
    """The floor for comparing this run with what was recorded in *recorded_dtype*.

    Remembered by the contents of what it was measured on, so that a second run costs nothing; what
    a run of fewer tokens measured is too low for a larger one, and is measured again.

    Args:
        completions: of *mode*; a few of them are scored.
        contents: digests of the base and the adapters.
        recorded_dtype: where coarser than the engine's, passes in it are measured.
    """
    import torch

    dtype = coarser(engine.dtype, recorded_dtype)
    hardware = (
        torch.cuda.get_device_name(engine.device)
        if engine.device.startswith("cuda")
        # Sums are cut as the widest instructions want them; a home folder can serve many machines.
        else f"{engine.device} {torch.backends.cpu.get_cpu_capability()}"
    )
    key = combined_digest(
        {
            "method": str(_METHOD),
            "mode": mode.formula,
            "dtypes": f"{engine.dtype} {dtype}",
            "hardware": hardware,
            "torch": torch.__version__,
            "application": str(completions[0].application) if completions else "",
            **{k: v for k, v in contents.items() if k == "base" or k.startswith("adapter_")},
        }
    )
    memory = cache_folder("noise") / f"{key[:40]}.json"
    remembered = _recall(memory)
    wanted = sum(len(c.token_ids[:_TOKENS]) for c in _spread(completions))
    if remembered is not None and remembered.tokens >= wanted:
        return remembered
    floor = measure_floor(engine, mode, completions, dtype=dtype)
    if floor.tokens:
        with contextlib.suppress(InputError):  # no place for a cache: measured again next time
            write_text(memory, json.dumps(asdict(floor)))
    return floor


def coarser(first: str, second: str | None) -> str:
    """The dtype with the larger unit roundoff; one that is not known counts as fine."""
    return max(first, second or first, key=lambda dtype: _ROUNDOFF.get(dtype, 0.0))


def _recall(memory: Any) -> NoiseFloor | None:
    try:
        held = json.loads(memory.read_text(encoding="utf-8"))
        floor = NoiseFloor(**{**held, "ways": tuple(held["ways"])})
        figures = (floor.chosen, floor.gaps, floor.worst, floor.close)
        sound = all(isinstance(f, float) and math.isfinite(f) and f >= 0 for f in figures)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return floor if sound and floor.tokens else None


def measure_floor(
    engine: PeftEngine, mode: Mode, completions: Sequence[Completion], *, dtype: str | None = None
) -> NoiseFloor:
    """Score a few of *completions* in every way and take the largest movements.

    Args:
        dtype: where coarser than the engine's, what a pass in it moves is measured.
    """
    from harness.engines.scoring import ScoreRow, score

    dtype = dtype or engine.dtype
    chosen = _spread(completions)
    rows = [
        ScoreRow(prompt=c.prompt_token_ids, produced=c.token_ids[:_TOKENS]) for c in chosen
    ]  # fmt: skip
    application = chosen[0].application if chosen else Application.LIVE
    found: list[Shifts] = []
    ways: list[str] = []
    if rows:
        reference = score(engine, rows, mode, application=application)
        for way, measure in _ways(engine, rows, mode, application, dtype).items():
            # A model that lacks one way (a precision without kernels, no cache, an adapted
            # embedding that is not flattened in memory) is measured by the others.
            with contextlib.suppress(RuntimeError, TypeError, ValueError, InputError):
                found += _shifts(reference, measure(), rows)
                ways.append(way)
    return NoiseFloor(
        dtype=dtype,
        device=engine.device,
        chosen=max((s.chosen_rms for s in found), default=0.0),
        gaps=max((s.gap_rms for s in found), default=0.0),
        worst=max((s.worst for s in found), default=0.0),
        close=max((s.close for s in found), default=0.0),
        tokens=sum(len(row.produced) for row in rows),
        ways=tuple(ways),
    )


def _spread(completions: Sequence[Completion]) -> list[Completion]:
    """A few of *completions*, spread over the lengths, so that a batch of them has padding."""
    ordered = sorted((c for c in completions if c.token_ids), key=lambda c: len(c.prompt_token_ids))
    step = max(1, len(ordered) // _CASES)
    return ordered[::step][:_CASES]


def _ways(
    engine: PeftEngine, rows: Sequence[ScoreRow], mode: Mode, application: Application, dtype: str
) -> dict[str, Callable[[], list[Evidence]]]:
    from harness.engines.scoring import in_precision, score, score_stepwise

    def precisely(other: str) -> list[Evidence]:
        with in_precision(engine, other):
            return score(engine, rows, mode, application=application)

    ways: dict[str, Callable[[], list[Evidence]]] = {
        "one by one": lambda: score(engine, rows, mode, application=application, batch_size=1),
        "with a cache, padded left": lambda: score_stepwise(
            engine, rows, mode, application=application
        ),
    }
    if application is Application.LIVE and len(mode.weights) > 1:
        ways["flattened"] = lambda: score(engine, rows, mode, application=Application.FLATTENED)
    for other in (_HIGHER.get(engine.dtype), dtype):
        if other is not None and other != engine.dtype:
            ways[other] = functools.partial(precisely, other)
    return ways


def _shifts(
    reference: Sequence[Evidence], other: Sequence[Evidence], rows: Sequence[ScoreRow]
) -> list[Shifts]:
    return [
        shifts(one, two, row.produced) for one, two, row in zip(reference, other, rows, strict=True)
    ]
