"""The weight sweep: how stopping, length and style depend on two adapters' weights.

Style retention is measured with the adapters themselves: how much likelier, a token, the mode's own
words are under the first adapter alone than under the base, on a scale on which the base's words
are 0 and those of the first adapter alone are 1. Knows nothing of verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from harness.completion import Completion, GenerationSettings, Prompt
from harness.stack import Mode
from harness.stopping.evidence import in_batches
from harness.stopping.figures import Decode, endings_of, mode_figures
from harness.stopping.intervals import Interval, rate_interval

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine

__all__ = ["DEFAULT_WEIGHTS", "Cell", "Sweep", "sweep_weights"]

DEFAULT_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pair of weights.

    Attributes:
        retention: of the first adapter's style; None where the scale has no length.
        meets: the observed stop rate reaches the target. Few prompts prove little: `interval`.
    """

    first: float
    second: float
    stopped: int
    total: int
    interval: Interval
    mean_tokens: float
    loops: int
    retention: float | None
    meets: bool

    @property
    def rate(self) -> float:
        return self.stopped / self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Cells by rows of the first adapter's weight, each row by the second's."""

    first: str
    second: str
    target: float
    prompts: int
    cells: tuple[Cell, ...]

    @property
    def first_weights(self) -> tuple[float, ...]:
        return tuple(sorted({cell.first for cell in self.cells}))

    @property
    def second_weights(self) -> tuple[float, ...]:
        return tuple(sorted({cell.second for cell in self.cells}))

    def at(self, first: float, second: float) -> Cell:
        """The cell of two weights; raises `KeyError` if it was not tried."""
        for cell in self.cells:
            if (cell.first, cell.second) == (first, second):
                return cell
        raise KeyError((first, second))


def sweep_weights(
    engine: PeftEngine,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    adapters: tuple[str, str],
    target: float,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    second_weights: Sequence[float] | None = None,
    turn_ids: Collection[int] = (),
    decode: Decode | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Sweep:
    """Generate with every pair of weights, and measure.

    Args:
        adapters: whose weights; the first one's style is what is retained.
        target: the stop rate that the region must reach.
    """
    first, second = adapters
    settings = replace(settings, do_sample=False)
    columns = tuple(second_weights or weights)
    ends = engine.generate(prompts, Mode(name="base"), settings)
    own = engine.generate(prompts, Mode(name=first, weights=((first, 1.0),)), settings)
    zero, one = _preference(engine, ends, first), _preference(engine, own, first)
    cells = []
    for number, row in enumerate(weights):
        for column in columns:
            pair = tuple((n, w) for n, w in ((first, row), (second, column)) if w)
            mode = Mode(name=f"{first}*{row:g}+{second}*{column:g}", weights=_ordered(engine, pair))
            found = engine.generate(prompts, mode, settings)
            endings = endings_of(
                found, stops=engine.eos_token_ids, turn_ids=turn_ids, decode=decode
            )
            figures = mode_figures(mode.name, endings, settings.max_new_tokens)
            here = _preference(engine, found, first)
            scale = None if zero is None or one is None or abs(one - zero) < 1e-6 else one - zero
            cells.append(
                Cell(
                    first=row,
                    second=column,
                    stopped=figures.stopped,
                    total=figures.total,
                    interval=rate_interval(figures.stopped, figures.total),
                    mean_tokens=figures.mean_tokens or 0.0,
                    loops=figures.loops,
                    retention=None
                    if scale is None or here is None or zero is None
                    else (here - zero) / scale,
                    meets=figures.stopped >= target * figures.total and not figures.loops,
                )
            )
        if progress is not None:
            progress("sweep", (number + 1) / len(weights))
    return Sweep(
        first=first, second=second, target=target, prompts=len(prompts), cells=tuple(cells)
    )


def _ordered(
    engine: PeftEngine, pair: tuple[tuple[str, float], ...]
) -> tuple[tuple[str, float], ...]:
    order = [adapter.name for adapter in engine.stack.adapters]
    return tuple(sorted(pair, key=lambda entry: order.index(entry[0])))


def _preference(engine: PeftEngine, completions: Sequence[Completion], name: str) -> float | None:
    """Mean nats a token by which *name* alone finds the words likelier than the base does.

    The EOS is left out: how a completion ends is not its style.
    """
    spoken = [c for c in completions if len(_words(c))]
    if not spoken:
        return None
    alone = _likelihood(engine, spoken, Mode(name=name, weights=((name, 1.0),)))
    base = _likelihood(engine, spoken, Mode(name="base"))
    return (alone - base) / sum(len(_words(c)) for c in spoken)


def _words(completion: Completion) -> tuple[int, ...]:
    return completion.token_ids[:-1] if completion.stopped else completion.token_ids


def _likelihood(engine: PeftEngine, completions: Sequence[Completion], mode: Mode) -> float:
    """Sum of the log-probabilities of the completions' words, in nats."""
    rows = [[*c.prompt_token_ids, *_words(c)] for c in completions]
    total = 0.0
    for batch in in_batches(rows, int(engine.model.config.vocab_size)):
        logits = engine.logits([rows[place] for place in batch], mode)
        for place, row in zip(batch, logits, strict=True):
            start = len(completions[place].prompt_token_ids)
            chosen = torch.tensor(rows[place][start:])
            scores = torch.log_softmax(row[start - 1 : -1], dim=-1)
            total += float(scores.gather(1, chosen[:, None]).sum())
    return total
