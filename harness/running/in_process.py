"""The modes one after the other in this process; a mode that runs out of memory is not the last."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from harness.running.collected import Collected, Loaded, Request

__all__ = ["run_here"]


def run_here(
    request: Request,
    collected: Collected,
    *,
    loaded: Loaded,
    progress: Callable[[str, float], None] | None = None,
) -> None:
    """Load once and run every mode of *request* into *collected*.

    A mode that runs out of memory, or meets a broken device, becomes a fault; after a broken device
    the rest cannot run and is said not to have.

    Raises:
        InputError: the stack cannot be loaded, or a prompt cannot be used.
    """
    from harness.engines import load_engine
    from harness.engines.faults import attempt
    from harness.report.terminal import loaded_lines

    preset = request.preset
    start = time.perf_counter()
    with load_engine(
        request.stack,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    ) as engine:
        collected.seconds["load"] = time.perf_counter() - start
        collected.device, collected.dtype = engine.device, engine.dtype
        if engine.template_source not in ("none", "the base's"):
            collected.notes.append(
                f"the chat template is {engine.template_source}: the base has none"
            )
        if not engine.eos_token_ids:
            collected.notes.append("the base's generation_config names no EOS: nothing can stop")
        for prompt in preset.prompts:
            engine.token_ids(prompt)  # a prompt that cannot be used is found before the first
        loaded(loaded_lines(engine, request.application, collected.seconds["load"]))
        broken_by = ""
        for mode in request.modes:
            if broken_by:
                collected.not_run(mode, f"the device has been broken since the mode {broken_by}")
                continue
            start = time.perf_counter()
            generate = functools.partial(
                engine.generate,
                preset.prompts,
                request.stack.mode(mode),
                preset.settings,
                application=request.application,
                progress=progress,
                finished=functools.partial(collected.add, mode),
            )
            fault = attempt(generate)
            if fault is None:
                collected.done(mode, time.perf_counter() - start)
                continue
            collected.failed(mode, fault.said, fault.remedy)
            broken_by = mode if fault.sticky else ""
