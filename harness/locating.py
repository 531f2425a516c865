"""Where an adapter or a base lies: folders, hub ids with a revision, and the ladder of bases.

The base is chosen by a fixed ladder, and the winner says why it won: option >
`adapter_config.json` > `./Qwen3-8B-Base`. Knows nothing of what the folders hold, beyond the
adapters' configs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.adapter_config import CONFIG_NAME, nested_adapter_hint
from harness.adapter_files import AdapterFiles
from harness.errors import InputError
from harness.files.file_kinds import is_folder, is_there, whole_path
from harness.stack import DOUBLED_MODE, Adapter, Base, check_adapter_name

__all__ = ["DEFAULT_BASE", "choose_base", "locate_adapter", "locate_adapters", "locate_base"]

DEFAULT_BASE = "Qwen3-8B-Base"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def locate_adapters(
    adapters: Mapping[str, str | Path],
    *,
    folder: Path | None = None,
    doubled: str = DOUBLED_MODE,
) -> list[Adapter]:
    """Find named adapter folders; nothing in them is read.

    Args:
        doubled: how a double weight is asked for where the adapters were named.

    Raises:
        InputError: a name that cannot be used, a folder or hub id that cannot be had, two names
            for one folder.
    """
    here = folder or Path.cwd()
    found: list[Adapter] = []
    for adapter_name, source in adapters.items():
        check_adapter_name(adapter_name, where=f"adapter {adapter_name!r}")
        adapter = locate_adapter(adapter_name, str(source), here)
        for other in found:
            if other.path == adapter.path:
                raise InputError(
                    f"{other.name!r} and {adapter_name!r} are the same folder",
                    where=adapter.path,
                    remedy="give each adapter its own; for a double weight use "
                    + doubled.format(name=other.name),
                )
        found.append(adapter)
    return found


def locate_adapter(name: str, source: str, here: Path) -> Adapter:
    """The adapter folder that *source* names: a path (relative to *here*) or a hub id.

    Raises:
        InputError: no such folder or repository, or it holds no adapter config.
    """
    path = whole_path(source, here)
    if is_there(path):
        if not is_folder(path):
            raise InputError(
                "is no folder, and an adapter is one",
                where=source,
                remedy=f"give {Path(source).parent}",
            )
        if not is_there(path / CONFIG_NAME):
            raise InputError(
                f"holds no {CONFIG_NAME}",
                where=source,
                remedy=nested_adapter_hint(Path(source) if not here else path)
                or "give a folder written by PEFT's save_pretrained",
            )
        return Adapter(name=name, path=path, source=source)
    local, revision = _from_hub(source, what=f"adapter {name!r}", patterns=["adapter_*"])
    return Adapter(name=name, path=local, source=source, revision=revision)


def choose_base(
    option: str | Path | None,
    option_name: str,
    adapters: Sequence[Adapter],
    files: Mapping[str, AdapterFiles],
    here: Path,
) -> Base:
    """The ladder: option > adapter_config.json > ./Qwen3-8B-Base."""
    if option is not None:
        return locate_base(str(option), option_name, here)
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
        path = whole_path(claim, root)
        if is_folder(path):
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
        # A name out of a foreign file fetches nothing: only what the user names does.
        return locate_base(source, chosen_by, here, fetch=False)
    except InputError as error:
        raise InputError(
            f"base_model_name_or_path {claim!r}: {error.fault}",
            where=adapter.path / CONFIG_NAME,
            remedy=f"give the base as --base-model, or download it first with: hf download {claim}",
        ) from error


def locate_base(source: str, chosen_by: str, here: Path, *, fetch: bool = True) -> Base:
    """The base folder that *source* names: a path (relative to *here*) or a hub id.

    Args:
        fetch: a hub id that is not in the local cache may be downloaded.

    Raises:
        InputError: no such folder or repository.
    """
    path = whole_path(source, here)
    if is_there(path):
        return Base(path=path, source=source, chosen_by=chosen_by)
    local, revision = _from_hub(source, what=chosen_by, patterns=None, fetch=fetch)
    return Base(path=local, source=source, chosen_by=chosen_by, revision=revision)


def _from_hub(
    source: str, *, what: str, patterns: list[str] | None, fetch: bool = True
) -> tuple[Path, str]:
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
        if not cached_only and (constants.HF_HUB_OFFLINE or not fetch):
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
    reach = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "; the hub is out of reach"
    raise InputError(
        "no such folder, and no such repository in the local hub cache" + (reach if fetch else ""),
        where=source,
        remedy="check the spelling, or download it first with: hf download " + repo,
    )


def _nearest(source: str) -> str | None:
    """The existing sibling whose name is nearest to a mistyped path's last part."""
    path = Path(source)
    try:
        path = path.expanduser()
        names = [child.name for child in path.parent.iterdir() if is_folder(child)]
    except (OSError, ValueError, RuntimeError):  # no such place, user or right to read
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / close[0]) if close else None
