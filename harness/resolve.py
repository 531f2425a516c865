"""From what a user gives to an `AdapterStack`: options, folders, hub ids, `stack.toml`.

The base is chosen by a fixed ladder, and the winner says why it won: option >
`adapter_config.json` > `./Qwen3-8B-Base`. Every folder is checked before anything is loaded.
Knows nothing of PEFT, torch or pytest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
    nested_adapter_hint,
    read_adapter,
)
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.embedded import embedded_stack_file
from harness.errors import InputError
from harness.stack import (
    Adapter,
    AdapterStack,
    Base,
    Mode,
    check_adapter_name,
    default_modes,
    parse_modes,
)
from harness.strict_json import read_toml
from harness.tensor_files import same_bytes

__all__ = ["DEFAULT_BASE", "StackOptions", "resolve_stack", "stack_from_options"]

DEFAULT_BASE = "Qwen3-8B-Base"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_STACK_KEYS = frozenset({"name", "base", "preset", "adapters", "stops", "modes"})
_STYLE, _INSTRUCT = "style", "instruct"


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

    @property
    def named(self) -> bool:
        """Whether any option names a stack; otherwise the embedded one is used."""
        return any(
            (self.base_model, self.lora_model, self.style_adapter, self.instruct_adapter,
             self.adapters, self.stack_file)
        )  # fmt: skip


def stack_from_options(options: StackOptions, *, folder: Path | None = None) -> AdapterStack:
    """Resolve *options*; relative paths start from *folder* (the working directory).

    Raises:
        InputError: options that contradict each other, half a pair, or anything that
            `resolve_stack` raises.
    """
    here = folder or Path.cwd()
    adapters = _named_adapters(options)
    modes = _split(options.modes)
    if options.stack_file or not options.named:
        if adapters or options.base_model:
            raise InputError(
                "a declared stack and single folders are both given",
                where="--stack",
                remedy="give --stack, or --base-model and adapters",
            )
        file = Path(options.stack_file) if options.stack_file else embedded_stack_file()
        return _declared_stack(here / file, modes)
    return resolve_stack(
        base_model=options.base_model, adapters=adapters, modes=modes or None, folder=here
    )


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


def _declared_stack(file: Path, modes: Sequence[str]) -> AdapterStack:
    """A stack from its TOML declaration; paths in it are relative to the file."""
    declared = read_toml(
        file, what="the stack's declaration", remedy="see docs/stack-file.md for its form"
    )
    unknown = sorted(set(declared) - _STACK_KEYS)
    if unknown:
        raise InputError(
            f"unknown key {unknown[0]!r}",
            where=file,
            remedy=f"known: {', '.join(sorted(_STACK_KEYS))}",
        )
    adapters = declared.get("adapters", {})
    if not isinstance(adapters, dict) or not all(isinstance(v, str) for v in adapters.values()):
        raise InputError(
            "[adapters] is not a table of paths", where=file, remedy='write e.g. style = "folder"'
        )
    stack = resolve_stack(
        base_model=_text(declared, "base", file),
        adapters=adapters,
        modes=modes or tuple(declared.get("modes", ())) or None,
        folder=file.parent,
        name=_text(declared, "name", file) or file.stem,
        base_option=f"base in {file.name}",
    )
    stops = _stops(declared.get("stops", {}), stack, file)
    return replace(stack, stops=stops, preset=_text(declared, "preset", file))


def _text(declared: Mapping[str, Any], key: str, file: Path) -> str | None:
    value = declared.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key}: {value!r} is not a string", where=file, remedy="put it in quotes")
    return value


def _stops(declared: Any, stack: AdapterStack, file: Path) -> dict[str, Any]:
    forms = 'write "always", "never" or {min_rate = 0.9, max_rate = 1.0}'
    if not isinstance(declared, dict):
        raise InputError("[stops] is not a table", where=file, remedy=forms)
    known = {m.name for m in default_modes([a.name for a in stack.adapters])}
    known |= {m.name for m in stack.modes}
    for mode, expected in declared.items():
        if mode not in known:
            raise InputError(
                f"[stops] names {mode!r}, which is no mode",
                where=file,
                remedy=f"choose from: {', '.join(sorted(known))}",
            )
        if isinstance(expected, dict):
            sound = set(expected) <= {"min_rate", "max_rate"} and all(
                isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1
                for v in expected.values()
            )
        else:
            sound = expected in ("always", "never")
        if not sound or not expected:
            raise InputError(f"[stops] {mode} = {expected!r}", where=file, remedy=forms)
    return dict(declared)


def resolve_stack(
    *,
    base_model: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    modes: Sequence[str] | None = None,
    folder: Path | None = None,
    name: str | None = None,
    base_option: str = "--base-model",
) -> AdapterStack:
    """Look up a base and named adapters, check their files, and decide the modes.

    Args:
        base_model: a folder or hub id (`org/name@revision`); None chooses by the ladder.
        adapters: folders or hub ids by name; the order is the stack's.
        modes: mode expressions (`harness.stack.parse_modes`); None for the default modes.
        folder: where relative paths start; the working directory if None.

    Raises:
        InputError: a folder or hub id that cannot be had, a broken folder, a name that cannot be
            used, an adapter that is not additive, adapters that name different bases, two names
            for one folder.
    """
    here = folder or Path.cwd()
    found: list[Adapter] = []
    files: dict[str, AdapterFiles] = {}
    for adapter_name, source in (adapters or {}).items():
        check_adapter_name(adapter_name, where=f"adapter {adapter_name!r}")
        adapter = _locate_adapter(adapter_name, str(source), here)
        for other in found:
            if other.path == adapter.path:
                raise InputError(
                    f"{other.name!r} and {adapter_name!r} are the same folder",
                    where=adapter.path,
                    remedy="give each adapter its own; for a double weight use "
                    f"--modes {other.name}*2",
                )
        found.append(adapter)
        files[adapter_name] = read_adapter(adapter.path)
        if files[adapter_name].config.not_additive:
            raise InputError(
                f"cannot be stacked: {files[adapter_name].config.not_additive[0]}",
                where=adapter.path / CONFIG_NAME,
                remedy="only plain LoRA and rsLoRA adapters are additive",
            )
    base = _locate_base(base_model, base_option, found, files, here)
    checkpoint = read_checkpoint(base.path)
    for adapter_name, adapter_files in files.items():
        _check_shapes(adapter_name, adapter_files, checkpoint.places, base)
        _check_base_copies(adapter_files, checkpoint)
    names = [adapter.name for adapter in found]
    chosen: tuple[Mode, ...] = default_modes(names) if modes is None else parse_modes(modes, names)
    return AdapterStack(
        name=name or "+".join([base.path.name, *names]),
        base=base,
        adapters=tuple(found),
        modes=chosen,
    )


def _check_shapes(name: str, adapter: AdapterFiles, places: Mapping[str, Any], base: Base) -> None:
    """Hold each pair against the base's weight, where the base has one of that name."""
    matched = 0
    for module, pair in adapter.pairs.items():
        shard = places.get(f"{module}.weight")
        if shard is None:
            continue  # a tied head, or a name that transformers maps while loading
        matched += 1
        expected = [pair.out_features, pair.in_features]
        if pair.embedding or adapter.config.fan_in_fan_out:
            expected.reverse()
        shape = list(shard.entries[f"{module}.weight"].shape)
        if shape != expected:
            raise InputError(
                f"module {module!r}: the adapter {name!r} needs a base weight of {expected}, "
                f"{base.source} has {shape}",
                where=adapter.folder / WEIGHTS_NAME,
                remedy="give the base that the adapter was trained on as --base-model",
            )
    if not matched:
        module = next(iter(adapter.pairs))
        raise InputError(
            f"none of its modules is in the base {base.source} (the first is {module!r})",
            where=adapter.folder / WEIGHTS_NAME,
            remedy="give the base that the adapter was trained on as --base-model",
        )


def _check_base_copies(adapter: AdapterFiles, checkpoint: CheckpointFiles) -> None:
    """PEFT would write these over the base, for every mode: they must be the base's own bytes."""
    for name, entry in adapter.base_copies.items():
        place = checkpoint.weight_name(name.removesuffix(".weight"))
        if place is not None:
            ours = checkpoint.entry(place)
            if (entry.dtype, entry.shape) == (ours.dtype, ours.shape) and same_bytes(
                adapter.tensors, entry, checkpoint.places[place], ours
            ):
                continue
        raise InputError(
            f"tensor {entry.name!r} would be written over the base's {name}, and differs from it",
            where=adapter.tensors.path,
            remedy="save the adapter again with save_pretrained(…, save_embedding_layers=False)",
        )


def _locate_adapter(name: str, source: str, here: Path) -> Adapter:
    path = (here / Path(source).expanduser()).resolve()
    if path.exists():
        if path.is_file():
            raise InputError(
                "is a file, not an adapter folder",
                where=source,
                remedy=f"give {Path(source).parent}",
            )
        if not (path / CONFIG_NAME).exists():
            raise InputError(
                f"holds no {CONFIG_NAME}",
                where=source,
                remedy=nested_adapter_hint(Path(source) if not here else path)
                or "give a folder written by PEFT's save_pretrained",
            )
        return Adapter(name=name, path=path, source=source)
    local, revision = _from_hub(source, what=f"adapter {name!r}", patterns=["adapter_*"])
    return Adapter(name=name, path=local, source=source, revision=revision)


def _locate_base(
    option: str | Path | None,
    option_name: str,
    adapters: Sequence[Adapter],
    files: Mapping[str, AdapterFiles],
    here: Path,
) -> Base:
    """The ladder: option > adapter_config.json > ./Qwen3-8B-Base."""
    if option is not None:
        return _base(str(option), option_name, here)
    fallback = here / DEFAULT_BASE
    claims = [(a, files[a.name].config) for a in adapters if files[a.name].config.base]
    if not claims:
        if fallback.is_dir():
            why = "no option and no adapter names a base"
            return Base(
                path=fallback.resolve(), source=f"./{DEFAULT_BASE}", chosen_by=f"default: {why}"
            )
        raise InputError(
            "no base is named, and ./Qwen3-8B-Base does not exist",
            where="--base-model",
            remedy="give --base-model PATH",
        )
    located: list[tuple[Adapter, Base]] = []
    for adapter, config in claims:
        assert config.base is not None
        located.append((adapter, _claimed_base(adapter, config.base, config.base_revision, here)))
    first_adapter, first = located[0]
    for adapter, other in located[1:]:
        if other.path != first.path:
            raise InputError(
                f"the adapters name different bases: {first_adapter.name} was trained on "
                f"{first.source}, {adapter.name} on {other.source}",
                where=adapter.path / CONFIG_NAME,
                remedy="give the right one as --base-model",
            )
    return first


def _claimed_base(adapter: Adapter, claim: str, revision: str | None, here: Path) -> Base:
    chosen_by = f"{CONFIG_NAME} of {adapter.name}"
    # A relative claim means a place beside the adapter, wherever the folders were copied to.
    for root in (adapter.path, here):
        path = (root / Path(claim).expanduser()).resolve()
        if path.is_dir():
            return Base(path=path, source=claim, chosen_by=chosen_by)
    fallback = here / DEFAULT_BASE
    if Path(claim).name == DEFAULT_BASE and fallback.is_dir():
        return Base(
            path=fallback.resolve(),
            source=f"./{DEFAULT_BASE}",
            chosen_by=f"{chosen_by} names {claim}, which is this folder's name",
        )
    if not _HUB_ID.fullmatch(claim) or claim.startswith("."):
        raise InputError(
            f"base_model_name_or_path {claim!r} is not here",
            where=adapter.path / CONFIG_NAME,
            remedy="give the base as --base-model",
        )
    source = f"{claim}@{revision}" if revision else claim
    try:
        return _base(source, chosen_by, here)
    except InputError as error:
        raise InputError(
            f"base_model_name_or_path {claim!r}: {error.fault}",
            where=adapter.path / CONFIG_NAME,
            remedy="give the base as --base-model",
        ) from error


def _base(source: str, chosen_by: str, here: Path) -> Base:
    path = (here / Path(source).expanduser()).resolve()
    if path.exists():
        return Base(path=path, source=source, chosen_by=chosen_by)
    local, revision = _from_hub(source, what=chosen_by, patterns=None)
    return Base(path=local, source=source, chosen_by=chosen_by, revision=revision)


def _from_hub(source: str, *, what: str, patterns: list[str] | None) -> tuple[Path, str]:
    """A local snapshot of a hub id, and its commit; the cache is asked before the network."""
    if not _HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
        near = _nearest(source)
        raise InputError(
            "no such folder",
            where=source,
            remedy=f"did you mean {near}?"
            if near
            else f"give {what} as an existing folder or a hub id (org/name@revision)",
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    ignore = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.py"]
    for cached_only in (True, False):
        if not cached_only and constants.HF_HUB_OFFLINE:
            break
        try:
            local = snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                local_files_only=cached_only,
            )
            return Path(local), Path(local).name
        except LocalEntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"cannot be had from the hub: {first_line}",
                where=source,
                remedy="check the id and revision, log in with: hf auth login, or give a folder",
            ) from error
    raise InputError(
        "no such folder, and no such repository in the local hub cache"
        + (" (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "; the hub is out of reach"),
        where=source,
        remedy="check the spelling, or download it first with: hf download " + repo,
    )


def _nearest(source: str) -> str | None:
    """The existing sibling whose name is nearest to a mistyped path's last part."""
    import difflib

    path = Path(source).expanduser()
    if not path.parent.is_dir():
        return None
    names = [child.name for child in path.parent.iterdir() if child.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / close[0]) if close else None
