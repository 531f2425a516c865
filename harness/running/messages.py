"""What a child tells its parent: one JSON object a line.

Only values; knows nothing of processes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from harness.completion import Application, Completion, StopReason
from harness.preset import Preset

__all__ = ["as_completion", "as_line", "as_message", "completion_message"]


def as_line(message: dict[str, Any]) -> bytes:
    """ASCII only, so that any character comes through."""
    return json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n"


def as_message(line: bytes) -> dict[str, Any]:
    """The message of one line."""
    message = json.loads(line)
    assert isinstance(message, dict)
    return message


def completion_message(completion: Completion) -> dict[str, Any]:
    """A completion without what the parent knows: the prompt's text and the settings."""
    return {
        "prompt": completion.prompt.id,
        "mode": completion.mode,
        "application": completion.application.value,
        "prompt_token_ids": list(completion.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "stop_reason": completion.stop_reason.value,
    }


def as_completion(message: dict[str, Any], preset: Preset) -> Completion:
    """The completion of a `completion_message` to a prompt of *preset*."""
    return Completion(
        prompt=next(prompt for prompt in preset.prompts if prompt.id == message["prompt"]),
        mode=message["mode"],
        application=Application(message["application"]),
        prompt_token_ids=tuple(message["prompt_token_ids"]),
        token_ids=tuple(message["token_ids"]),
        text=message["text"],
        stop_reason=StopReason(message["stop_reason"]),
        settings=replace(preset.settings, batch_size=0),
    )
