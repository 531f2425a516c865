"""From what a user gives to an `AdapterStack`: options, names, a declared stack.

`harness.locating` finds the folders and `harness.stack_file` reads the declaration; here the parts
are checked against each other before anything is loaded. Knows nothing of PEFT, torch or pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.adapter_files import AdapterFiles, read_adapter
from harness.checkpoint_claims import check_claims
from harness.checkpoint_files import read_checkpoint
from harness.embedded import embedded_stack_file
from harness.errors import InputError, combined, gathering
from harness.files.file_kinds import is_there, regular_file
from harness.fit import check_adapter_on_base, check_adapters_together
from harness.locating import choose_base, locate_adapters
from harness.shape import is_random, read_shape
from harness.stack import (
    Adapter,
    AdapterStack,
    Base,
    Mode,
    check_adapter_name,
    default_modes,
    parse_modes,
)
from harness.stack_file import as_declared, read_stack_file, text_of

__all__ = [
    "LOCK_NAME",
    "NO_LOCK",
    "RANDOM_RANKS",
    "StackOptions",
    "random_stack",
    "resolve_stack",
    "stack_from_options",
]

#: The lock file's name, beside the stack's declaration or in the working directory.
LOCK_NAME = "stack.lock.json"
#: What `--lock` takes instead of a file, for no lock at all.
NO_LOCK = "none"
_STYLE, _INSTRUCT = "style", "instruct"
#: Adapters of a random base, where none is given: the ranks of a usual two-stage training.
RANDOM_RANKS: Mapping[str, int] = {_STYLE: 16, _INSTRUCT: 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """The stack as options name it, nothing looked up yet. `adapters` are `NAME=PATH` entries."""

    base_model: str | None = None
    lora_model: str | None = None
    style_adapter: str | None = None
    instruct_adapter: str | None = None
    adapters: tuple[str, ...] = ()
    stack_file: str | None = None
    modes: tuple[str, ...] = ()
    lock_file: str | None = None
    trust_remote_code: bool = False

    @property
    def named(self) -> bool:
        """Whether any option names a stack; otherwise the embedded one is used."""
        return any(
            (self.base_model, self.lora_model, self.style_adapter, self.instruct_adapter,
             self.adapters, self.stack_file)
        )  # fmt: skip


def stack_from_options(
    options: StackOptions,
    *,
    folder: Path | None = None,
    random_base: bool = False,
    random_ranks: Mapping[str, int] | None = None,
    faults: list[InputError] | None = None,
) -> AdapterStack:
    """Resolve *options*; relative paths start from *folder* (the working directory).

    Args:
        faults: as `resolve_stack` takes them.
        random_base: allow `--base-model random:…`; who measures time allows it.
        random_ranks: as `random_stack` takes them.

    Raises:
        InputError: options that contradict each other, half a pair, or anything that
            `resolve_stack` raises.
    """
    here = folder or Path.cwd()
    adapters = _named_adapters(options)
    modes = _split(options.modes)
    if random_base and options.base_model and is_random(options.base_model):
        if options.stack_file:
            raise InputError(
                "a declared stack and a random base are both given",
                where="--stack",
                remedy="give --base-model random:… alone, or with adapters",
            )
        return random_stack(
            options.base_model, adapters=adapters, modes=modes, ranks=random_ranks, folder=here
        )
    if options.stack_file or not options.named:
        if adapters or options.base_model:
            raise InputError(
                "a declared stack and single folders are both given",
                where="--stack",
                remedy="give --stack, or --base-model and adapters",
            )
        file = Path(options.stack_file) if options.stack_file else embedded_stack_file()
        stack = _declared_stack(here / file, modes, options.trust_remote_code, faults)
        beside = (here / file).parent
    else:
        stack = resolve_stack(
            base_model=options.base_model,
            adapters=adapters,
            modes=modes or None,
            folder=here,
            trust_remote_code=options.trust_remote_code,
            faults=faults,
        )
        beside = here
    return replace(stack, lock=_lock(options.lock_file, beside, here))


def _lock(option: str | None, beside: Path, here: Path) -> Path | None:
    """The lock file: the one that is given, else the one beside the stack, if there is one."""
    if option == NO_LOCK:
        return None
    if option is not None:
        return regular_file(here / option, what="the lock file", remedy="run: lora-stack lock")
    standing = beside / LOCK_NAME
    return standing if is_there(standing) else None


def _split(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _named_adapters(options: StackOptions) -> dict[str, str]:
    pair = (options.style_adapter, options.instruct_adapter)
    if any(pair) and not all(pair):
        given, absent = "--style-adapter", "--instruct-adapter"
        if not options.style_adapter:
            given, absent = absent, given
        raise InputError(
            f"needs {absent} beside it",
            where=given,
            remedy=f"add {absent}, or give one adapter as --lora-model",
        )
    ways = {
        "--lora-model": options.lora_model,
        "--style-adapter/--instruct-adapter": all(pair),
        "--adapter": options.adapters,
    }
    chosen = [way for way, value in ways.items() if value]
    if len(chosen) > 1:
        raise InputError(
            "name the adapters in two ways",
            where=" and ".join(chosen),
            remedy="use one of them; --adapter NAME=PATH takes any number",
        )
    if options.lora_model:
        return {"lora": options.lora_model}
    if options.style_adapter and options.instruct_adapter:
        return {_STYLE: options.style_adapter, _INSTRUCT: options.instruct_adapter}
    adapters: dict[str, str] = {}
    for entry in options.adapters:
        name, equals, path = entry.partition("=")
        if not equals or not path:
            raise InputError(f"{entry!r} is not NAME=PATH", where="--adapter", remedy="write e.g. "
                             "--adapter style=adapters/style")  # fmt: skip
        if name in adapters:
            raise InputError(
                f"two adapters are called {name!r}",
                where="--adapter",
                remedy="give each a name of its own",
            )
        adapters[name] = path
    return adapters


def _declared_stack(
    file: Path, modes: Sequence[str], trust_remote_code: bool, faults: list[InputError] | None
) -> AdapterStack:
    """A stack from its TOML declaration; paths in it are relative to the file."""
    declared = read_stack_file(file)
    stack = resolve_stack(
        base_model=text_of(declared, "base", file),
        adapters=declared.get("adapters", {}),
        modes=modes or tuple(declared.get("modes", ())) or None,
        folder=file.parent,
        name=text_of(declared, "name", file) or file.stem,
        base_option=f"base in {file.name}",
        trust_remote_code=trust_remote_code,
        faults=faults,
    )
    return as_declared(stack, declared, file)


def random_stack(
    source: str,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    modes: Sequence[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    folder: Path | None = None,
) -> AdapterStack:
    """A stack whose base is a shape filled with random numbers; for measuring time alone.

    Args:
        source: `random:qwen3-8b` or `random:PATH` (see `harness.shape`).
        adapters: real folders to put on the shape; without any, random ones are built.
        ranks: rank by adapter name of the random adapters; `RANDOM_RANKS` if None.

    Raises:
        InputError: an unknown shape, adapters that cannot be had, a rank below 1.
    """
    here = folder or Path.cwd()
    shape, path = read_shape(source, where="--base-model", folder=here)
    base = Base(path=path, source=source, chosen_by="--base-model", shape=shape)
    if adapters:
        found = locate_adapters(adapters, folder=here)
    else:
        found = []
        for adapter_name, rank in (RANDOM_RANKS if ranks is None else ranks).items():
            check_adapter_name(adapter_name, where="--random-rank")
            if rank < 1:
                raise InputError(
                    f"{adapter_name}: {rank} is no rank", where="--random-rank", remedy="use 1 up"
                )
            label = f"random, rank {rank}"
            found.append(
                Adapter(name=adapter_name, path=Path(label), source=label, random_rank=rank)
            )
    names = [adapter.name for adapter in found]
    return AdapterStack(
        name="+".join([f"random {shape.name}", *names]),
        base=base,
        adapters=tuple(found),
        modes=parse_modes(modes, names) if modes else default_modes(names),
    )


def resolve_stack(
    *,
    base_model: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    modes: Sequence[str] | None = None,
    folder: Path | None = None,
    name: str | None = None,
    base_option: str = "--base-model",
    trust_remote_code: bool = False,
    faults: list[InputError] | None = None,
) -> AdapterStack:
    """Look up a base and named adapters, check their files, and decide the modes.

    Args:
        base_model: a folder or hub id (`org/name@revision`); None chooses by the ladder.
        adapters: folders or hub ids by name; the order is the stack's.
        modes: mode expressions (`harness.stack.parse_modes`); None for the default modes.
        folder: where relative paths start; the working directory if None.
        trust_remote_code: let through files by which loaders run code.
        faults: where every folder was found, faults in them are added here instead of raised.

    Raises:
        InputError: a folder or hub id that cannot be had, a broken folder, a name that cannot be
            used, an adapter that is not additive, adapters that name different bases, two names
            for one folder or one content, parts that do not fit. All faults at once.
    """
    here = folder or Path.cwd()
    if base_model is not None and is_random(str(base_model)):
        raise InputError(
            f"{base_model} is random numbers: only its speed means anything",
            where=base_option,
            remedy="measure it with lora-stack bench or pytest -m latency; give a checkpoint here",
        )
    found = locate_adapters(adapters or {}, folder=here)
    told: list[InputError] = []
    files: dict[str, AdapterFiles] = {}
    for adapter in found:
        with gathering(told):
            files[adapter.name] = read_adapter(adapter.path, trust_remote_code=trust_remote_code)
            told += _not_additive(files[adapter.name])
    check_adapters_together(found, files, told)
    if told and base_model is None:
        raise combined(told)  # whose base to look at is said by what is broken
    base: Base | None = None
    with gathering(told):
        base = choose_base(base_model, base_option, found, files, here)
        checkpoint = read_checkpoint(base.path)
        check_claims(checkpoint, told, trust_remote_code=trust_remote_code)
        for adapter in found:
            if adapter.name in files:
                check_adapter_on_base(adapter, files[adapter.name], checkpoint, base, told)
    if base is None or (told and faults is None):
        raise combined(told)
    if faults is not None:
        faults += told
    names = [adapter.name for adapter in found]
    chosen: tuple[Mode, ...] = default_modes(names) if modes is None else parse_modes(modes, names)
    return AdapterStack(
        name=name or "+".join([base.path.name, *names]),
        base=base,
        adapters=tuple(found),
        modes=chosen,
    )


def _not_additive(files: AdapterFiles) -> list[InputError]:
    return [
        InputError(
            f"cannot be stacked: {reason}",
            where=files.config.path,
            remedy="only plain LoRA and rsLoRA adapters are additive",
        )
        for reason in files.config.not_additive
    ]
