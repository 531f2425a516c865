"""What each mode says in this session: made once, when first asked for, and kept.

A device that fails or runs out of memory fails the tests of what it could not say. Knows nothing of
where accepted completions lie, nor of what is said of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from harness.completion import Application, Completion
from harness.display.terminal import shown
from harness.preset import Preset
from harness.stack import Mode

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.replay import Replayed
    from harness.snapshot_form import Snapshot

__all__ = ["Completions"]


class Completions:
    """What each mode says to the preset's prompts: replayed from accepted snapshots in one forward
    pass where there are any, generated in one batch where not; when first asked for."""

    def __init__(
        self,
        engine: PeftEngine,
        preset: Preset,
        drafts: Callable[[Mode], Sequence[Sequence[int] | None]] | None = None,
    ) -> None:
        self._engine, self._preset = engine, preset
        self._drafts = drafts
        self._found: dict[tuple[Mode, Application], tuple[Replayed, ...]] = {}
        self._lost: dict[tuple[Mode, Application], str] = {}
        self._broken = ""

    def of(self, mode: Mode, application: Application = Application.LIVE) -> tuple[Completion, ...]:
        """The completions of *mode*, in the order of the preset's prompts, with evidence."""
        return tuple(found.completion for found in self.replayed(mode, application))

    def replayed(
        self, mode: Mode, application: Application = Application.LIVE
    ) -> tuple[Replayed, ...]:
        """The same, with how each was come by.

        A mode that runs out of memory fails its tests, each at once, and the other modes go on;
        after a broken device (a sticky CUDA error) every mode that was not generated yet fails.
        """
        key = (mode, application)
        if key not in self._found:
            if lost := self._lost.get(key, self._broken):
                pytest.fail(lost, pytrace=False)
            self._complete(mode, application)
        return self._found[key]

    def _complete(self, mode: Mode, application: Application) -> None:
        from harness.engines.faults import attempt
        from harness.replay import replay_completions

        def replay() -> None:
            self._found[mode, application] = replay_completions(
                self._engine,
                self._preset.prompts,
                mode,
                self._preset.settings,
                drafts=None if self._drafts is None else self._drafts(mode),
                application=application,
            )

        fault = attempt(replay)
        if fault is None:
            return
        lost = shown(f"{mode.name}: {fault.said}\n→ {fault.remedy}")
        self._lost[mode, application] = lost
        if fault.sticky:
            self._broken = f"the device has been broken since {lost}"
        pytest.fail(lost, pytrace=False)

    def known(self, completion: Snapshot) -> Replayed | None:
        """How the completion that *completion* is a snapshot of was come by, if it is one of
        these."""
        for (mode, application), found in self._found.items():
            if mode.name == completion.mode and application == completion.application:
                for replayed in found:
                    if replayed.completion.prompt.id == completion.prompt:
                        return replayed
        return None
