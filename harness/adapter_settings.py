"""What a LoRA's settings say of each module: its rank, its scale, and whether PEFT adapts it.

Names are matched with patterns as PEFT 0.21 does (`get_pattern_key`, `check_target_module_exists`).
Knows nothing of how the file is read and checked (`harness.adapter_config`), nor of weights, stacks
or live models.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import InputError, quoted
from harness.files.patterns import pattern_fault

__all__ = ["AdapterConfig"]

_MOST_MATCHES = 10**7  # of patterns with modules' names: some seconds
_MOST_PATTERNS = 10_000  # of one key

_N = TypeVar("_N", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, types checked.

    Attributes:
        base: `base_model_name_or_path` as written, or None.
        patterns: `(rank_pattern, alpha_pattern)`, keys matched as PEFT does.
        not_additive: why this adapter is not `W + s·B·A`; empty for a plain LoRA.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    base: str | None
    base_revision: str | None
    not_additive: tuple[str, ...]
    raw: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """The rank that the config claims for *module* (`rank_pattern`, else `r`).

        Raises:
            InputError: *module* holds several `target_parameters` whose patterns differ: which
                of them a factor belongs to is not in the files.
        """
        return self._setting("rank_pattern", self.rank_pattern, self.rank, module)

    def alpha_of(self, module: str) -> float:
        """The alpha of *module* (`alpha_pattern`, else `lora_alpha`); raises as `rank_of`."""
        return self._setting("alpha_pattern", self.alpha_pattern, self.alpha, module)

    def _setting(self, key: str, patterns: Mapping[str, _N], default: _N, module: str) -> _N:
        found = set()
        for name in self._adapted_names(module):
            pattern = _pattern_key(patterns, name)
            found.add(default if pattern is None else patterns[pattern])
        if len(found) > 1:
            raise InputError(
                f"{key} differs between the parameters of {module!r}, and the file does not say "
                "which factor is whose",
                where=self.path,
                remedy=f"give the parameters of one module the same {key}",
            )
        return found.pop()

    def _adapted_names(self, module: str) -> list[str]:
        """What PEFT matches patterns with: *module*, or its parameters if those are adapted."""
        given = self.raw.get("target_parameters")
        targets = [t for t in given if isinstance(t, str)] if isinstance(given, list) else []
        bare = module.replace(".base_layer", "")
        names = [f"{bare}.{target.rpartition('.')[2]}" for target in targets]
        known = [
            name for name, target in zip(names, targets, strict=True)
            if name == target or name.endswith(f".{target}")
        ]  # fmt: skip
        return known or [module]

    def scale_of(self, module: str) -> float:
        """`s` of *module*: `alpha/r`, or `alpha/√r` for rsLoRA."""
        from harness.lora import lora_scale

        return lora_scale(
            alpha=self.alpha_of(module), rank=self.rank_of(module), rslora=self.rslora
        )

    def targets(self, module: str) -> bool | None:
        """Whether PEFT would adapt *module*, by `check_target_module_exists` of its tuners.

        None where the config's words do not decide (`all-linear`, fused parameters). Call
        `refuse_slow_patterns` with the names first.
        """
        excluded = self.raw.get("exclude_modules")
        if excluded and _names_module(excluded, module):
            return False
        if self.target_modules is None or self.raw.get("target_parameters"):
            return None
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return None
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _names_module(self.target_modules, module) and self._layer_is_meant(module)

    def _layer_is_meant(self, module: str) -> bool:
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.raw.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            dot = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            match = re.match(rf"{dot}{pattern}\.(?P<layer>\d+)\.", module)
            if match is not None:
                return int(match["layer"]) in (layers if isinstance(layers, list) else [layers])
        return False

    def refuse_slow_patterns(self, modules: Sequence[str]) -> None:
        """Try every pattern of the config on the names it will meet, within a bound.

        Raises:
            InputError: a pattern does not compile, or takes for ever on one of *modules*.
        """
        for key, patterns in self._patterns().items():
            many = len(patterns) * len(modules) > _MOST_MATCHES
            if many or len(patterns) > _MOST_PATTERNS:
                raise InputError(
                    f"{key}: holds {len(patterns)} patterns for {len(modules)} modules, more than "
                    "can be tried",
                    where=self.path,
                    remedy="name what the modules have in common",
                )
            found = pattern_fault([wrapped for wrapped, _ in patterns], modules)
            if found is not None:
                written = next(plain for wrapped, plain in patterns if wrapped == found[0])
                raise InputError(
                    f"{key}: {quoted(written)}: {found[1]}",
                    where=self.path,
                    remedy="name the modules in a list, or write a pattern without nested repeats",
                )

    def _patterns(self) -> dict[str, list[tuple[str, str]]]:
        """By key: each pattern as PEFT builds it, and as it is written."""
        found: dict[str, list[tuple[str, str]]] = {}
        for key in ("target_modules", "exclude_modules"):
            value = self.raw.get(key)
            if isinstance(value, str):
                found[key] = [(value, value)]
        for key in ("rank_pattern", "alpha_pattern"):
            found[key] = [(rf"(.*\.)?({name})$", name) for name in self.raw.get(key) or {}]
        layers = self.raw.get("layers_pattern") or []
        found["layers_pattern"] = [
            (rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\..*", name)
            for name in ([layers] if isinstance(layers, str) else layers)
        ]
        return found


def _names_module(names: Sequence[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first key that names *module*, matched as `peft.utils.other.get_pattern_key` does."""
    return next((key for key in patterns if _ending(key).match(module)), None)


@functools.lru_cache(maxsize=1 << 14)
def _ending(key: str) -> re.Pattern[str]:
    """Compiled once: `re` itself remembers 512, and a config can name every expert."""
    return re.compile(rf"(.*\.)?({key})$")
