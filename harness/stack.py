"""What is under test: adapters, the stack they form on a base, and its modes.

Values and the pure rules over them. Knows nothing of files, PEFT, torch or pytest;
`harness.resolve` turns options and folders into these values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.shape import Shape

__all__ = [
    "BASE_MODE",
    "DOUBLED_MODE",
    "MOST_OF_A_WEIGHT",
    "STACKED_MODE",
    "Adapter",
    "AdapterStack",
    "Base",
    "Mode",
    "check_adapter_name",
    "default_modes",
    "parse_modes",
    "weight_fault",
]

BASE_MODE = "base"
STACKED_MODE = "stacked"
#: How a mode asks for an adapter's double weight, for who named one adapter twice.
DOUBLED_MODE = "--modes {name}*2"
#: The most that an adapter's weight may be; those in use are below 10.
MOST_OF_A_WEIGHT = 1e4

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# What `torch.nn.ModuleDict` calls its own, of the names that `_NAME` lets through; written down
# because asking torch takes seconds. A test compares.
_MODULE_DICT_NAMES = frozenset(
    {
        "T_destination", "add_module", "apply", "bfloat16", "buffers", "call_super_init",
        "children", "clear", "compile", "cpu", "cuda", "double", "dump_patches", "eval",
        "extra_repr", "float", "forward", "get_buffer", "get_extra_state", "get_parameter",
        "get_submodule", "half", "ipu", "items", "keys", "load_state_dict", "modules", "mtia",
        "named_buffers", "named_children", "named_modules", "named_parameters", "parameters",
        "pop", "register_backward_hook", "register_buffer", "register_forward_hook",
        "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook", "register_module", "register_parameter",
        "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_",
        "set_extra_state", "set_submodule", "share_memory", "smart_apply", "state_dict", "to",
        "to_empty", "train", "training", "type", "update", "values", "xpu", "zero_grad",
    }
)  # fmt: skip
_RESERVED_NAMES = frozenset({BASE_MODE, STACKED_MODE, "all", "none", "default_mode"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One PEFT LoRA folder under a name of its own.

    Attributes:
        name: how modes, options and reports call it.
        path: the local folder that holds `adapter_config.json`.
        source: what the user gave: the path as written, or `org/name@revision`.
        revision: the resolved commit of a hub id, otherwise None.
        random_rank: the rank of an adapter that is random numbers and lies in no folder (*path*
            then names nothing); None for every other.
    """

    name: str
    path: Path
    source: str
    revision: str | None = None
    random_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base checkpoint and how it was chosen.

    Attributes:
        path: the local folder that holds `config.json`.
        source: what the user or the adapter config gave.
        chosen_by: which rule won, in words (`--base-model`, `adapter_config.json of style`, …).
        revision: the resolved commit of a hub id, otherwise None.
        shape: what to build when the base is random numbers (`random:…`); None for a checkpoint.
    """

    path: Path
    source: str
    chosen_by: str
    revision: str | None = None
    shape: Shape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Which adapters are active, and with what weight; `base` has none.

    The live weights of a mode are `W_base + Σ weight_i · s_i · B_i A_i`.
    """

    name: str
    weights: tuple[tuple[str, float], ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the active adapters, in the stack's order."""
        return tuple(name for name, _ in self.weights)

    @property
    def formula(self) -> str:
        """The stacking equation of this mode, e.g. `W = W_base + ΔW_style + 0.5·ΔW_instruct`."""
        terms = ["W_base"]
        for name, weight in self.weights:
            factor = "" if weight == 1 else f"{weight:g}·"
            terms.append(f"{factor}ΔW_{name}")
        return "W = " + " + ".join(terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStack:
    """A base, an ordered list of named adapters, and the modes to look at.

    Attributes:
        name: what reports call the stack.
        stops: the declared expectation a mode, as `harness.expectation.read_expectation` takes it:
            `"always"`, `"never"`, or a table such as `{"min_rate": float, "max_rate": float}`
            (shares of completions that end in EOS).
        preset: the preset that the stack's declaration names, if any.
        stopping_preset: the one whose prompts stopping is judged on; rates need many prompts.
        untrained: adapters that may change nothing, by declaration.
        parents: by adapter, those it was trained on top of, by declaration.
        lock: the lock file that the stack's files are held against, if there is one.
    """

    name: str
    base: Base
    adapters: tuple[Adapter, ...] = ()
    modes: tuple[Mode, ...] = ()
    stops: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    preset: str | None = None
    stopping_preset: str | None = None

    @property
    def random(self) -> bool:
        """Whether the base is a shape filled with random numbers: only its speed means anything."""
        return self.base.shape is not None

    untrained: tuple[str, ...] = ()
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lock: Path | None = None

    def adapter(self, name: str) -> Adapter:
        """Return the adapter called *name*; raises `InputError` if there is none."""
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        known = ", ".join(a.name for a in self.adapters) or "none"
        raise InputError(f"the stack has no adapter {name!r}", remedy=f"its adapters are: {known}")

    def mode(self, name: str) -> Mode:
        """Return the mode called *name*, or parse it as an expression such as `style*0.5`."""
        for mode in self.modes:
            if mode.name == name:
                return mode
        return parse_modes([name], [a.name for a in self.adapters])[0]


def check_adapter_name(name: str, *, where: str) -> None:
    """Refuse a name that a mode expression, PEFT or a snapshot's file name cannot hold.

    PEFT keeps adapters in `torch.nn.ModuleDict`s, where dots and the names of its own attributes
    are not allowed.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be an adapter's name",
            where=where,
            remedy="use a letter, then letters, digits, '-' and '_'",
        )
    if name in _RESERVED_NAMES:
        raise InputError(
            f"{name!r} is a mode's name and cannot be an adapter's",
            where=where,
            remedy="call the adapter something else",
        )
    if name in _MODULE_DICT_NAMES:
        raise InputError(
            f"PEFT cannot hold an adapter called {name!r}",
            where=where,
            remedy="call it something else",
        )


def default_modes(adapter_names: Sequence[str]) -> tuple[Mode, ...]:
    """The modes of a stack: base, each adapter alone, and all of them where there are several."""
    modes = [Mode(name=BASE_MODE)]
    modes += [Mode(name=name, weights=((name, 1.0),)) for name in adapter_names]
    if len(adapter_names) > 1:
        modes.append(Mode(name=STACKED_MODE, weights=tuple((n, 1.0) for n in adapter_names)))
    return tuple(modes)


def parse_modes(expressions: Iterable[str], adapter_names: Sequence[str]) -> tuple[Mode, ...]:
    """Read `--modes` entries.

    An entry is a standing mode (`base`, an adapter's name, `stacked`), a subset with optional
    weights (`style+instruct`, `style*0.5+instruct`), or a named subset
    (`half=style*0.5+instruct`).

    Raises:
        InputError: an unknown adapter, a weight that is not a finite number, a name given twice.
    """
    standing = {mode.name: mode for mode in default_modes(adapter_names)}
    modes: list[Mode] = []
    for expression in expressions:
        mode = _parse_mode(expression.strip(), standing, adapter_names)
        if any(mode.name == other.name for other in modes):
            raise InputError(
                f"the mode {mode.name!r} is named twice",
                where="--modes",
                remedy="name each mode once",
            )
        modes.append(mode)
    if not modes:
        raise InputError(
            "no mode is named", where="--modes", remedy=f"choose from: {', '.join(standing)}"
        )
    return tuple(modes)


def _parse_mode(expression: str, standing: Mapping[str, Mode], names: Sequence[str]) -> Mode:
    if expression in standing:
        return standing[expression]
    label, equals, formula = expression.partition("=")
    if not equals:
        label, formula = "", expression
    elif not _NAME.fullmatch(label.strip()) or label.strip() in standing:
        raise InputError(
            f"{label.strip()!r} cannot name a subset",
            where="--modes",
            remedy="use a letter, then letters, digits, '-' and '_', and no standing mode's name",
        )
    weights: dict[str, float] = {}
    for term in formula.split("+"):
        name, star, factor = (part.strip() for part in term.partition("*"))
        if name not in names:
            raise InputError(
                f"unknown mode or adapter {name!r} in {expression!r}",
                where="--modes",
                remedy=f"choose from: {', '.join(standing)}, or a sum such as "
                + "+".join(names or ["A"]),
            )
        if name in weights:
            raise InputError(
                f"adapter {name!r} is named twice in {expression!r}",
                where="--modes",
                remedy=f"give it a weight instead: {name}*2",
            )
        weights[name] = _weight(factor, expression) if star else 1.0
    ordered = tuple((name, weights[name]) for name in names if name in weights)
    return Mode(name=label.strip() or "".join(expression.split()), weights=ordered)


def _weight(text: str, expression: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if fault := weight_fault(weight, text):
        raise InputError(
            f"{expression!r}: {fault}", where="--modes", remedy="write a weight as style*0.5"
        )
    return weight


def weight_fault(weight: float, text: object = None) -> str | None:
    """What is wrong with an adapter's weight, as the user wrote it (*text*); None for a sound one.

    As with `lora_alpha`, a weight beyond `MOST_OF_A_WEIGHT` makes every logit noise, or infinite.
    """
    written = repr(weight if text is None else text)
    if not math.isfinite(weight):
        return f"{written} is not a finite number"
    if abs(weight) > MOST_OF_A_WEIGHT:
        return f"the weight {written} is beyond {MOST_OF_A_WEIGHT:g}"
    return None
