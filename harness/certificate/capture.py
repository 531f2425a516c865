"""Running a live model once, and catching what goes into and comes out of every layer.

Nothing that is touched stays touched: hooks are removed, training flags and random states put
back. Only a few rows of each layer are kept, so that the memory does not grow with the prompts.
Knows nothing of files or judgements.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.completion import Prompt
from harness.engines.inspection import LiveLayer, LiveModel, bare_model
from harness.engines.padding import padded

__all__ = ["DEFAULT_PROMPTS", "Capture", "Probe", "capture", "forward", "probe_ids", "undisturbed"]

#: What a certificate probes with where no prompts are given.
DEFAULT_PROMPTS = (
    "The quick brown fox jumps over",
    "春江潮水连海平，海上明月共潮生。",
    "Question: How many moons has Mars?\nAnswer:",
    "def mean(values):\n    return sum(values) /",
    "Le vin se bonifie avec l'âge, mais",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "She closed the book, looked out of the window at the falling snow, and said:",
    "Dear Sir or Madam, I am writing to you because",
)
_ROWS = 8  # of each layer: they are multiplied with the whole weight in float64
_PROMPT_TOKENS = 48  # of each prompt; the algebra does not change with length
_RANDOM_TOKENS = 24
_PADDING = 2  # tokens of padding before the longest row


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Rows of one layer's call.

    Attributes:
        x: `(n, in)`, or `(n,)` token ids of an embedding.
        y: `(n, out)`, what the layer returned.
        base_y: what the wrapped layer inside returned, `(n, out)`; None where nothing is wrapped.
    """

    x: Tensor
    y: Tensor
    base_y: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What one forward pass gave: a probe a layer that was called, and the logits.

    Attributes:
        rows: the prompts' token ids; `starts[i]` is where row `i` begins behind its padding.
    """

    probes: Mapping[str, Probe]
    logits: Tensor
    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients; put training flags and random states back."""
    training = {module: module.training for module in model.modules()}
    cpu_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was
        torch.random.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def probe_ids(
    tokenizer: Any, prompts: Sequence[Prompt | str] | None, vocabulary: int
) -> list[list[int]]:
    """Token ids to probe with: the prompts', or seeded random ones without a tokenizer."""
    rows: list[list[int]] = []
    if tokenizer is not None:
        rows = [_ids(tokenizer, prompt)[:_PROMPT_TOKENS] for prompt in prompts or DEFAULT_PROMPTS]
    rows = [row for row in rows if row and max(row) < vocabulary]
    if not rows:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, vocabulary, (2, _RANDOM_TOKENS), generator=generator)
        rows = drawn.tolist()
    return rows[:8]


def _ids(tokenizer: Any, prompt: Prompt | str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt.text is not None:
        return list(tokenizer(prompt.text)["input_ids"])
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt.shown)["input_ids"])
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def batched(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of *rows*, padded on the left as for generation.

    The longest row is padded as well, so that every row says whether padding is looked at.
    """
    return padded(rows, 0, side="left", least=_PADDING)


def forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits, `(rows, width, vocabulary)`, without a cache.

    Positions count from the first visible token, as `generate` counts them, where the model's
    forward takes them (others derive them from the mask).
    """
    here = (p.device for p in model.parameters() if p.device.type != "meta")
    device = next(here, torch.device("cpu"))  # all of it is offloaded
    options: dict[str, Any] = {}
    if not bool(mask.all()) and "position_ids" in _parameters(bare_model(model)):
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
    output = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
    )
    logits: Tensor = output.logits
    return logits


def _parameters(model: Any) -> Collection[str]:
    return inspect.signature(type(model).forward).parameters


def capture(live: LiveModel, rows: Sequence[Sequence[int]]) -> Capture:
    """Run *rows* once (padded on the left) and keep a few rows of every layer's call."""
    ids, mask = batched(rows)
    chosen = _spread(mask.reshape(-1).nonzero().reshape(-1))
    probes: dict[str, dict[str, Tensor]] = {}
    handles = []

    def watch(layer: LiveLayer, which: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept = probes.setdefault(layer.name, {})
            if which in kept or not args or not isinstance(output, Tensor):
                return  # called before in this pass: a shared layer is probed once
            x, y = args[0], output
            flat_x = x.reshape(-1) if layer.kind == "embedding" else x.reshape(-1, x.shape[-1])
            flat_y = y.reshape(-1, y.shape[-1])
            n = flat_y.shape[0]
            # A layer that sees other rows than the prompt's tokens (experts) is probed evenly.
            places = chosen if n == mask.numel() else _spread(torch.arange(n))
            places = places.to(flat_y.device)
            kept[which] = flat_y[places].clone()
            if which == "y":
                kept["x"] = flat_x[places.to(flat_x.device)].clone()

        return hook

    try:
        for layer in live.layers.values():
            handles.append(layer.outer.register_forward_hook(watch(layer, "y")))
            if layer.wrapped:
                handles.append(layer.inner.register_forward_hook(watch(layer, "base_y")))
        logits = forward(live.root, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    return Capture(
        probes={
            name: Probe(x=kept["x"], y=kept["y"], base_y=kept.get("base_y"))
            for name, kept in probes.items()
            if "y" in kept
        },
        logits=logits,
        rows=tuple(tuple(row) for row in rows),
        starts=tuple(int(ids.shape[1] - len(row)) for row in rows),
    )


def _spread(places: Tensor) -> Tensor:
    if len(places) <= _ROWS:
        return places
    return places[torch.linspace(0, len(places) - 1, _ROWS).round().long()]
