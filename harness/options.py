"""The options that name a stack and how to run it: one table for the command line and for pytest.

Every option is accepted with dashes and with underscores. Knows nothing of what the values mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from harness.resolve import StackOptions

if TYPE_CHECKING:
    from harness.preset import Preset
    from harness.stack import AdapterStack

__all__ = [
    "APPLICATION_OPTION",
    "BENCH_OPTIONS",
    "EMPTY",
    "FILES_TRUST_OPTION",
    "PROMPT_OPTIONS",
    "RUN_OPTIONS",
    "STACK_OPTIONS",
    "Option",
    "add_option",
    "add_options",
    "add_stack_arguments",
    "batch_sizes",
    "chosen_preset",
    "empty_option",
    "random_ranks",
    "spellings",
    "stack_options",
    "with_dashes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        repeated: may be given several times; the values are collected.
        flag: takes no value.
        attribute: where argparse puts the value; by default the flag's own name.
    """

    flag: str
    help: str
    metavar: str | None = None
    repeated: bool = False
    is_flag: bool = False
    type: type | None = None
    attribute: str | None = None
    choices: tuple[str, ...] | None = None
    default: str | None = None

    @property
    def dest(self) -> str:
        return self.attribute or self.flag.removeprefix("--").replace("-", "_")


STACK_OPTIONS: tuple[Option, ...] = (
    Option(flag="--base-model", metavar="PATH|ID[@REV]", help="the base model's folder or hub id"),
    Option(flag="--lora-model", metavar="PATH|ID[@REV]", help="a single adapter: base and adapter"),
    Option(flag="--style-adapter", metavar="PATH|ID[@REV]", help="the stage-1 adapter of a pair"),
    Option(flag="--instruct-adapter", metavar="PATH|ID[@REV]", help="the stage-2 adapter"),
    Option(
        flag="--adapter",
        attribute="adapters",
        metavar="NAME=PATH",
        repeated=True,
        help="an adapter under a name of its own; repeat for more, in the stack's order",
    ),
    Option(
        flag="--stack",
        attribute="stack_file",
        metavar="FILE",
        help="a stack declared in TOML: base, adapters, expected stopping",
    ),
    Option(
        flag="--lock",
        attribute="lock_file",
        metavar="FILE",
        help="hold the files against this lock (stack.lock.json beside the stack; none: no lock)",
    ),
    Option(
        flag="--modes",
        metavar="M,…",
        repeated=True,
        help="only these modes: base, an adapter's name, stacked, style*0.5+instruct, half=…",
    ),
)

PROMPT_OPTIONS: tuple[Option, ...] = (
    Option(flag="--preset", metavar="NAME", help="a named set of prompts"),
    Option(flag="--prompts", metavar="FILE", help="prompts of your own: .toml, .jsonl or .txt"),
    Option(flag="--max-new-tokens", metavar="N", type=int, help="tokens a completion may have"),
    Option(flag="--batch-size", metavar="N", type=int, help="prompts in one forward pass"),
)

#: For commands that read files alone.
FILES_TRUST_OPTION = Option(
    flag="--trust-remote-code",
    is_flag=True,
    help="accept folders that make loaders run code of theirs; none of it is run here",
)

RUN_OPTIONS: tuple[Option, ...] = (
    Option(flag="--device", metavar="D", help="cpu, cuda, cuda:N, or auto to spread the model"),
    Option(flag="--dtype", metavar="T", help="float32, bfloat16, float16; default: checkpoint's"),
    Option(
        flag="--trust-remote-code",
        is_flag=True,
        help="allow Python code in the base's folder to run",
    ),
)

BENCH_OPTIONS: tuple[Option, ...] = (
    Option(flag="--input-tokens", metavar="N", type=int, help="latency: tokens of each prompt"),
    Option(flag="--output-tokens", metavar="N", type=int, help="latency: new tokens, always all"),
    Option(flag="--batch-sizes", metavar="N,…", help="latency: rows generated at once"),
    Option(
        flag="--random-rank",
        metavar="NAME=R,…",
        help="ranks of the random adapters on --base-model random:… (style=16,instruct=64)",
    ),
)

APPLICATION_OPTION = Option(
    flag="--application",
    choices=("live", "merged"),
    default="live",
    help="how a mode is applied: PEFT's forward pass, or added into the weights",
)


def spellings(flag: str) -> tuple[str, ...]:
    """`--base-model` and `--base_model`."""
    return tuple(dict.fromkeys((flag, "--" + flag.removeprefix("--").replace("-", "_"))))


def add_option(parser: Any, flag: str, **arguments: Any) -> None:
    """`parser.add_argument` (or a group's) for a dashed *flag*.

    The command line reads `--base_model` as `--base-model` before argparse sees it
    (`with_dashes`), so `--help` lists each option once.
    """
    parser.add_argument(flag, **arguments)


def with_dashes(argv: Sequence[str]) -> list[str]:
    """*argv* with underscores in option names written as dashes; values stay as they are."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return words


#: What is wrong with an option whose value is empty. Taken for no option at all, it would silently
#: mean another stack: `--lora-model "$STYLE"`, where nobody has set STYLE.
EMPTY = "is empty, as of a variable that is not set → give it a value, or leave it out"


def empty_option(words: Sequence[str]) -> str | None:
    """The first option among *words* whose value is empty, or `an argument`; None if there is
    none."""
    option = "an argument"
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if equals and not value:
                return option
        elif not word:
            return option
    return None


def add_options(parser: Any, options: tuple[Option, ...]) -> None:
    """Add every option of a table to an argparse parser or group."""
    for option in options:
        arguments: dict[str, Any] = {"dest": option.dest, "help": option.help}
        if option.is_flag:
            arguments["action"] = "store_true"
        else:
            arguments |= {"metavar": option.metavar, "type": option.type or str}
            arguments |= {"choices": option.choices, "default": option.default}
            if option.repeated:
                arguments |= {"action": "append", "default": []}
        add_option(parser, option.flag, **arguments)


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the stack, and those that say where and how it runs."""
    add_options(parser.add_argument_group("the stack"), STACK_OPTIONS)
    add_options(parser.add_argument_group("where it runs"), RUN_OPTIONS)


def stack_options(namespace: Any) -> StackOptions:
    """The `StackOptions` in an argparse namespace (or anything with the attributes)."""
    values: dict[str, Any] = {}
    for field in fields(StackOptions):
        value = getattr(namespace, field.name, None)
        if isinstance(field.default, tuple):
            value = tuple(value or ())
        elif isinstance(field.default, bool):
            value = bool(value)
        values[field.name] = value
    return StackOptions(**values)


def random_ranks(text: str | None) -> dict[str, int] | None:
    """`style=16,instruct=64` as a mapping; one bare number is every usual adapter's rank.

    Raises:
        InputError: an entry that is not NAME=R.
    """
    from harness.errors import InputError
    from harness.resolve import RANDOM_RANKS

    if text is None:
        return None
    found: dict[str, int] = {}
    for entry in str(text).split(","):
        name, equals, rank = entry.strip().rpartition("=")
        if not rank.isdecimal() or (equals and not name) or name in found:
            raise InputError(
                f"{text!r} is not NAME=R,…", where="--random-rank", remedy="write e.g. style=16"
            )
        found |= {name: int(rank)} if equals else dict.fromkeys(RANDOM_RANKS, int(rank))
    return found


def batch_sizes(text: str | None) -> tuple[int, ...] | None:
    """`1,8,32` as numbers; raises `InputError` for anything else."""
    from harness.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{text!r} is not N,…", where="--batch-sizes", remedy="write e.g. 1,8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def chosen_preset(namespace: Any, stack: AdapterStack) -> Preset:
    """The preset that the prompt options in an argparse namespace ask for."""
    from harness.preset import choose_preset

    return choose_preset(
        namespace.preset,
        namespace.prompts,
        standing=stack.preset,
        max_new_tokens=namespace.max_new_tokens,
        batch_size=namespace.batch_size,
    )
