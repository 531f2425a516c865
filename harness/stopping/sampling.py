"""Stop rates when decoding samples: several seeded samples of each prompt.

Each batch of each round has a seed of its own: an engine seeds once a batch, and batches of one
seed would draw alike. Knows nothing of verdicts; `clustered_interval` is what they are judged on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.completion import Application, GenerationSettings, Prompt
from harness.stopping.intervals import Interval, clustered_interval

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.stack import Mode

__all__ = ["SampledFigures", "sample_stops"]

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledFigures:
    """How often samples of each prompt stop.

    Attributes:
        counts: stopped samples a prompt, of *samples* each.
        empty: those of them that stopped before they said anything.
        interval: `clustered_interval`'s.
        alike: intra-class correlation of a prompt's samples (analysis of variance): 0 where
            samples are as different as prompts, 1 where a prompt's all do the same; None where
            all samples of all prompts do the same.
    """

    mode: str
    samples: int
    temperature: float
    seed: int
    counts: tuple[int, ...]
    empty: tuple[int, ...]
    interval: Interval
    alike: float | None

    @property
    def rate(self) -> float:
        return sum(self.counts) / (len(self.counts) * self.samples)


def sample_stops(
    engine: PeftEngine,
    prompts: Sequence[Prompt],
    mode: Mode,
    settings: GenerationSettings,
    *,
    samples: int,
    application: Application = Application.LIVE,
) -> SampledFigures:
    """Sample every prompt *samples* times at the settings' temperature (1 unless set)."""
    seed = settings.seed or 0
    counts, empty = [0] * len(prompts), [0] * len(prompts)
    for turn in range(samples):
        for number, start in enumerate(range(0, len(prompts), _BATCH)):
            one = replace(
                settings,
                do_sample=True,
                # Distinct over turns and batches, and the same in every run.
                seed=seed + turn * (len(prompts) // _BATCH + 1) + number,
                batch_size=_BATCH,
            )
            chunk = prompts[start : start + _BATCH]
            for place, done in enumerate(
                engine.generate(chunk, mode, one, application=application), start
            ):
                counts[place] += done.stopped
                empty[place] += done.stopped and not done.text.strip()
    return SampledFigures(
        mode=mode.name,
        samples=samples,
        temperature=settings.temperature,
        seed=seed,
        counts=tuple(counts),
        empty=tuple(empty),
        interval=clustered_interval(counts, samples),
        alike=_alike(counts, samples),
    )


def _alike(counts: Sequence[int], samples: int) -> float | None:
    prompts = len(counts)
    if samples < 2 or prompts < 2:
        return None
    rate = sum(counts) / (prompts * samples)
    between = samples * sum((c / samples - rate) ** 2 for c in counts) / (prompts - 1)
    within = sum(c * (1 - c / samples) for c in counts) / (prompts * (samples - 1))
    if between + (samples - 1) * within == 0:
        return None
    return (between - within) / (between + (samples - 1) * within)
