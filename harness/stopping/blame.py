"""Who raises EOS and who lowers it: the change of its log-odds at the natural end, by adapter.

At the place where an answer should end, one forward pass in each live mode: with every adapter,
without each, with each alone, with none; and with one adapter switched off layer by layer. An
adapter's effect is its leave-one-out difference; what is left over is the adapters' interplay.
Differences are of log-odds in nats, so that they add up where probabilities saturate. Every
scale is put back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from harness.completion import Completion
from harness.engines.loading import lora_layers
from harness.engines.padding import padded
from harness.snapshot_form import Snapshot
from harness.stack import Mode
from harness.stopping.evidence import eos_log_odds, in_batches
from harness.stopping.figures import Ending

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine

__all__ = ["AdapterEffect", "Blame", "blame_adapters", "main_layers", "natural_end_rows", "without"]

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")
_MOST_ENDS = 16
_NOTHING = 0.05  # nats that are shown as none


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEffect:
    """What one adapter does to EOS at the natural end, in nats of log-odds; means over the ends.

    Attributes:
        effect: the mode less the mode without it; `error` is its standard error over the ends.
        alone: it alone less the base.
        logit: change of the best EOS id's bare logit, which other tokens' changes may cancel.
        largest: the largest change of any token's logit; 0 means that it does nothing at all.
        layers: the share of the effect that each layer has; they add up to it.
    """

    adapter: str
    weight: float
    effect: float
    error: float
    alone: float
    logit: float
    largest: float
    layers: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """The adapters' effects on EOS in one mode.

    Attributes:
        ends: natural ends that were looked at, of the completions of *ends_of*: the mode's own,
            or, where its words are broken, those of the mode without one adapter.
        base: mean log-odds of EOS there with no adapter, `full` with all of the mode's.
        interplay: `full − base` less the sum of the effects.
    """

    mode: str
    ends: int
    ends_of: str
    base: float
    full: float
    interplay: float
    adapters: tuple[AdapterEffect, ...]

    @property
    def sentence(self) -> str:
        """E.g. `instruct raises EOS by 7.2 nats (mostly in layers 2–3), style lowers it by 1.1`."""
        parts = []
        ordered = sorted(self.adapters, key=lambda effect: -abs(effect.effect))
        for place, one in enumerate(ordered):
            what = "EOS" if place == 0 else "it"
            if one.largest == 0:
                parts.append(f"{one.adapter} does nothing to {what}")
                continue
            if abs(one.effect) < _NOTHING:
                parts.append(f"{one.adapter} leaves {what} alone")
                continue
            verb = "raises" if one.effect >= 0 else "lowers"
            text = f"{one.adapter} {verb} {what} by {abs(one.effect):.1f}"
            text += " nats" if place == 0 else ""
            layers = main_layers(one)
            if layers is not None:
                first, last = layers
                span = f"layer {first}" if first == last else f"layers {first}–{last}"
                text += f" (mostly in {span})"
            parts.append(text)
        return ", ".join(parts) or "no adapter acts"


def main_layers(effect: AdapterEffect) -> tuple[int, int] | None:
    """The shortest run of layers with at least 60 % of what layers do in the effect's direction;
    None where no layer does, or that takes more than two thirds of them."""
    sign = 1 if effect.effect >= 0 else -1
    shares = {layer: max(0.0, sign * value) for layer, value in effect.layers.items()}
    total = sum(shares.values())
    if total <= 0 or len(shares) < 2:
        return None
    order = sorted(shares)
    best: tuple[int, int] | None = None
    for start in range(len(order)):
        found = 0.0
        for stop in range(start, len(order)):
            found += shares[order[stop]]
            if found >= 0.6 * total:
                if best is None or stop - start < best[1] - best[0]:
                    best = (start, stop)
                break
    if best is None or (best[1] - best[0] + 1) * 3 > len(order) * 2:
        return None
    return order[best[0]], order[best[1]]


def without(mode: Mode, adapter: str) -> Mode:
    """*mode* without *adapter*."""
    weights = tuple((name, weight) for name, weight in mode.weights if name != adapter)
    return Mode(name=f"{mode.name} without {adapter}", weights=weights)


def natural_end_rows(
    completions: Sequence[Completion | Snapshot], endings: Sequence[Ending]
) -> list[list[int]]:
    """Token ids up to each natural end, prompt included; at most 16, evenly over the prompts."""
    rows = [
        [*completion.prompt_token_ids, *completion.token_ids[: ending.natural_end]]
        for completion, ending in zip(completions, endings, strict=True)
        if ending.natural_end is not None
    ]
    if len(rows) <= _MOST_ENDS:
        return rows
    return [rows[place * len(rows) // _MOST_ENDS] for place in range(_MOST_ENDS)]


def blame_adapters(
    engine: PeftEngine,
    mode: Mode,
    rows: Sequence[Sequence[int]],
    ids: Collection[int],
    *,
    layers: bool = True,
    ends_of: str | None = None,
) -> Blame | None:
    """The effects of *mode*'s adapters at the ends of *rows*; None without rows, adapters or EOS.

    Args:
        rows: token ids up to natural ends (`natural_end_rows`).
        ids: what ends a turn.
        layers: also share the effects out over the layers: two forward passes a layer and adapter.
    """
    vocabulary = int(engine.model.config.vocab_size)
    ends = sorted(n for n in ids if 0 <= n < vocabulary)
    if not rows or not mode.weights or not ends:
        return None

    def passes(chosen: Mode) -> torch.Tensor:
        with engine.mode(chosen) as model:
            return _last_logits(engine, model, rows)

    full = passes(mode)
    base = passes(Mode(name="base"))
    odds, base_odds = eos_log_odds(full, ends), eos_log_odds(base, ends)
    by_layer = _by_layer(engine, mode, rows, ends) if layers else {}
    effects = []
    for name, weight in mode.weights:
        left = passes(without(mode, name)) if len(mode.weights) > 1 else base
        alone = (
            passes(Mode(name=name, weights=((name, weight),))) if len(mode.weights) > 1 else full
        )
        change = odds - eos_log_odds(left, ends)
        effects.append(
            AdapterEffect(
                adapter=name,
                weight=weight,
                effect=float(change.mean()),
                error=float(change.std() / len(rows) ** 0.5) if len(rows) > 1 else 0.0,
                alone=float((eos_log_odds(alone, ends) - base_odds).mean()),
                logit=float((full[:, ends].amax(-1) - left[:, ends].amax(-1)).mean()),
                largest=float((full - left).abs().max()),
                layers=by_layer.get(name, {}),
            )
        )
    total = float((odds - base_odds).mean())
    return Blame(
        mode=mode.name,
        ends=len(rows),
        ends_of=ends_of or mode.name,
        base=float(base_odds.mean()),
        full=float(odds.mean()),
        interplay=total - sum(effect.effect for effect in effects),
        adapters=tuple(effects),
    )


def _last_logits(engine: PeftEngine, model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits behind the last token of each row, float32 on the CPU: `(rows, vocabulary)`."""
    found: dict[int, torch.Tensor] = {}
    # Only one position a row is asked for, so the batches may be large.
    for batch in in_batches(rows, vocabulary=4096):
        ids, mask = padded([rows[place] for place in batch], engine.pad_token_id, side="left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode(), engine.threads():
            output = model(
                input_ids=ids.to(engine.device),
                attention_mask=mask.to(engine.device),
                position_ids=positions.to(engine.device),
                use_cache=False,
                logits_to_keep=1,
            )
        for number, place in enumerate(batch):
            found[place] = output.logits[number, -1].float().cpu()
    return torch.stack([found[place] for place in range(len(rows))])


def _by_layer(
    engine: PeftEngine,
    mode: Mode,
    rows: Sequence[Sequence[int]],
    ends: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Each adapter's effect shared out over the layers.

    Its layers are switched off one after the other, from the first to the last and from the last
    to the first; a layer's share is the mean of its two steps. So the shares add up to the effect,
    which the changes of single layers, each made good by the others, do not.
    """
    found: dict[str, dict[int, float]] = {}
    with engine.mode(mode) as model:
        groups = _layer_groups(lora_layers(model))
        whole = float(eos_log_odds(_last_logits(engine, model, rows), ends).mean())
        for name in mode.adapters:
            parts = {n: [m for m in modules if name in m.scaling] for n, modules in groups.items()}
            numbers = [number for number, modules in parts.items() if modules]
            before = {n: [m.scaling[name] for m in parts[n]] for n in numbers}
            shares = dict.fromkeys(numbers, 0.0)
            for order in (numbers, numbers[::-1]):
                last = whole
                try:
                    for number in order:
                        for module in parts[number]:
                            module.scaling[name] = 0.0
                        here = float(eos_log_odds(_last_logits(engine, model, rows), ends).mean())
                        shares[number] += (last - here) / 2
                        last = here
                finally:
                    for number in numbers:
                        for module, scale in zip(parts[number], before[number], strict=True):
                            module.scaling[name] = scale
            found[name] = shares
    return found


def _layer_groups(layers: Mapping[str, Any]) -> dict[int, list[Any]]:
    groups: dict[int, list[Any]] = {}
    for name, module in layers.items():
        match = _LAYER.search(name)
        if match is not None:
            groups.setdefault(int(match[1]), []).append(module)
    return dict(sorted(groups.items()))
