"""A prompt's messages through the chat template, with a bound on the time.

Templates are programs out of a foreign folder, and transformers renders them without limits. The
preflight has tried the template on a short conversation; this one is the user's. Knows nothing of
models.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from harness.completion import Prompt
from harness.errors import InputError

__all__ = ["templated_ids"]

_TEMPLATE_SECONDS = 10.0


def templated_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of *prompt*'s messages through the tokenizer's chat template.

    Raises:
        InputError: there is no template, it refuses the messages, or takes ten seconds.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "neither the base nor an adapter has a chat template",
            where=f"prompt {prompt.id}",
            remedy='put chat_template.jinja into the base\'s folder, or use format = "text"',
        )
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    goes_on = messages[-1]["role"] == "assistant"
    try:
        with _bounded(_TEMPLATE_SECONDS):
            ids: list[int] = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                return_dict=False,
            )
    except Exception as error:  # templates raise what they like
        raise InputError(
            f"the chat template refuses it: {error or type(error).__name__}",
            where=f"prompt {prompt.id}",
            remedy="mend the prompt's messages, or the template",
        ) from error
    return ids


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Interrupt Python code in the block after *seconds* of processor time.

    Again and again until it ends: an interrupt can fall where other code holds every exception
    back (a finaliser, jinja2's `except Exception`), and would be lost there.

    Only in the main thread, which alone gets signals; elsewhere nothing is bounded here, and the
    preflight's trial of the template has to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    over = False

    def interrupt(number: int, frame: object) -> None:
        if not over:
            raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 10)
    try:
        try:
            yield
        finally:
            over = True
    finally:  # also if it came just before `over`: the next one is far
        over = True
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
