"""What a run has produced so far, and what it was asked for.

Knows nothing of engines or processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.completion import Application, Completion
from harness.options import chosen_preset, stack_options
from harness.preset import Preset
from harness.resolve import stack_from_options
from harness.stack import AdapterStack
from harness.verdict import Outcome, Verdict

__all__ = ["Collected", "Loaded", "Request"]

#: Called with lines about what was loaded.
Loaded = Callable[[list[str]], None]
_ISOLATE = "run again with --isolate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run.

    Attributes:
        modes: the names of the modes, in the order of the run.
    """

    stack: AdapterStack
    preset: Preset
    application: Application
    modes: tuple[str, ...]
    device: str | None
    dtype: str | None
    trust_remote_code: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Request:
        """The request in the options of `lora-stack run`."""
        stack = stack_from_options(stack_options(arguments))
        return cls(
            stack=stack,
            preset=chosen_preset(arguments, stack),
            application=Application(arguments.application),
            modes=tuple(mode.name for mode in stack.modes),
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=bool(arguments.trust_remote_code),
        )

    @property
    def planned(self) -> int:
        """How many completions a whole run has."""
        return len(self.modes) * len(self.preset.prompts)


@dataclass(kw_only=True)
class Collected:
    """What has come so far; filled while the run goes on.

    Attributes:
        said: completions by mode and prompt.
        faults: a verdict for each mode that did not get to its end.
        seconds: by what was done: `load`, and each whole mode.
    """

    said: dict[str, dict[str, Completion]] = field(default_factory=dict)
    faults: dict[str, Verdict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, mode: str, completion: Completion) -> None:
        self.said.setdefault(mode, {})[completion.prompt.id] = completion

    def done(self, mode: str, seconds: float) -> None:
        """The mode got to its end."""
        self.seconds[mode] = seconds

    def failed(self, mode: str, said: str, remedy: str | None = None) -> None:
        """The mode ran into something."""
        self.faults[mode] = Verdict(
            name=f"run: {mode}", outcome=Outcome.FAILED, evidence=(said,), remedy=remedy
        )

    def not_run(self, mode: str, why: str, remedy: str | None = _ISOLATE) -> None:
        """The mode never began."""
        self.faults[mode] = Verdict(
            name=f"run: {mode}", outcome=Outcome.UNDECIDED, evidence=(f"not run: {why}",),
            remedy=remedy,
        )  # fmt: skip

    @property
    def ran(self) -> int:
        """How many completions there are."""
        return sum(len(found) for found in self.said.values())

    def of(self, request: Request, *, whole: bool = False) -> dict[str, tuple[Completion, ...]]:
        """The completions by mode, in the order of the prompts; *whole*: of modes that have one
        for every prompt, and no fault."""
        found = {}
        for mode in request.modes:
            said = self.said.get(mode, {})
            row = tuple(said[p.id] for p in request.preset.prompts if p.id in said)
            full = len(row) == len(request.preset.prompts) and mode not in self.faults
            if row and (full or not whole):
                found[mode] = row
        return found
