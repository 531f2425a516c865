"""What ends a turn, by a checkpoint's files: EOS ids, special tokens, chat template.

Follows transformers: generation stops at `generation_config.json`'s EOS ids, at `config.json`'s
only where that file is absent, and never at the tokenizer's. Reads JSON alone: no torch, no
transformers. Knows nothing of weights, engines or verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import InputError, quoted
from harness.files.strict_json import read_json_object

__all__ = [
    "PROBE_ANSWER",
    "PROBE_TURNS",
    "EndingFiles",
    "TokenizerFiles",
    "behind_answer",
    "declared_eos",
    "eos_ids",
    "read_ending",
]

PROBE_ANSWER = "lora"
#: A turn to put through a template, to see what it writes behind an answer.
PROBE_TURNS = (
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": PROBE_ANSWER},
)

_GENERATION = re.compile(r"(\{%-?\s*)(generation)(\s*-?%\})")
_END_GENERATION = re.compile(r"(\{%-?\s*)(endgeneration)(\s*-?%\})")


def eos_ids(value: Any, *, where: Path | str = "eos_token_id") -> tuple[int, ...]:
    """An `eos_token_id` of a config as a tuple: None, an id, or a list (or tensor) of ids.

    Raises:
        InputError: it is something else, e.g. a string or a list in a list.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    if plain is None:
        return ()
    found = tuple(plain) if isinstance(plain, list | tuple | set | frozenset) else (plain,)
    if any(type(number) is not int for number in found):
        raise InputError(
            f"eos_token_id: {quoted(value)} is no token id",
            where=where,
            remedy="write the id, or a list of ids",
        )
    return found


def declared_eos(folder: Path, config: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """The EOS ids that generation stops at by the files, and the name of the file that says so."""
    path = folder / "generation_config.json"
    if path.is_file():
        found = read_json_object(path, what="generation_config.json").get("eos_token_id")
        return eos_ids(found, where=path), "generation_config.json"
    return eos_ids(config.get("eos_token_id"), where=folder / "config.json"), "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer as its files say, without building it.

    Attributes:
        size: one more than the highest id, added tokens included; 0 if the vocabulary is in no
            file that is read here (`tokenizer.json`).
        specials: id by string of the added tokens.
        names: string by id of the whole vocabulary, where it is known.
        template: the chat template's source.
    """

    size: int
    eos_token: str | None
    pad_token: str | None
    specials: Mapping[str, int]
    names: Mapping[int, str]
    template: str | None

    def id_of(self, token: str | None) -> int | None:
        """The id of an added token; None if there is none of that string."""
        return None if token is None else self.specials.get(token)

    @property
    def eos_id(self) -> int | None:
        return self.id_of(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return self.id_of(self.pad_token)

    def shown(self, token_id: int) -> str:
        """`'<|im_end|>' (151645)`, or the bare id where its string is not known."""
        name = self.names.get(token_id)
        return str(token_id) if name is None else f"{name!r} ({token_id})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndingFiles:
    """What a checkpoint's folder says about ending.

    Attributes:
        eos: the ids that generation stops at; `source` is the file that says so.
        config_eos: `config.json`'s own.
        pad: the padding id of the generation config, else of the config.
        vocabulary: rows of the embedding by `config.json`; 0 if it does not say.
        turn_end: the added token that the template puts behind an answer, as `(string, id)`.
        trouble: why the template could not be tried, or None; `broken` where it does not parse.
        unopened: what stands before an answer in a conversation, if the prompt for generation
            ends without it: the template does nothing with `add_generation_prompt`.
        generation: `generation_config.json`; empty where there is none.
    """

    folder: Path
    eos: tuple[int, ...]
    source: str
    config_eos: tuple[int, ...]
    pad: int | None
    vocabulary: int
    tokenizer: TokenizerFiles | None
    turn_end: tuple[str, int] | None
    trouble: str | None = None
    broken: bool = False
    unopened: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turn_ids(self) -> frozenset[int]:
        """Every id that the files give the meaning of an end: stops, tokenizer's, template's."""
        found = set(self.eos)
        if self.tokenizer is not None and self.tokenizer.eos_id is not None:
            found.add(self.tokenizer.eos_id)
        if self.turn_end is not None:
            found.add(self.turn_end[1])
        return frozenset(found)


def read_ending(folder: Path, *, template_from: Iterable[Path] = ()) -> EndingFiles:
    """Read what *folder* says; a base without a template takes the first of *template_from*'s.

    Raises:
        InputError: a file that is there and is no strict JSON.
    """
    config = read_json_object(folder / "config.json", what="config.json")
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json_object(
            folder / "generation_config.json", what="generation_config.json"
        )
    eos, source = declared_eos(folder, config)
    pad = generation.get("pad_token_id")
    text = config.get("text_config")
    vocabulary = config.get("vocab_size") or (
        text.get("vocab_size") if isinstance(text, dict) else 0
    )
    tokenizer = _tokenizer(folder, tuple(template_from))
    tried = _tried(tokenizer)
    return EndingFiles(
        folder=folder,
        eos=eos,
        source=source,
        config_eos=eos_ids(config.get("eos_token_id"), where=folder / "config.json"),
        pad=pad if isinstance(pad, int) else config.get("pad_token_id"),
        vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
        tokenizer=tokenizer,
        turn_end=tried.turn_end,
        trouble=tried.trouble,
        broken=tried.broken,
        unopened=tried.unopened,
        generation=generation,
    )


def _tokenizer(folder: Path, others: tuple[Path, ...]) -> TokenizerFiles | None:
    config_file, whole_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_file.is_file() and not whole_file.is_file():
        return None
    config = _optional(config_file)
    map_file = _optional(folder / "special_tokens_map.json")
    specials: dict[str, int] = {}
    names: dict[int, str] = {}
    whole = _optional(whole_file)
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        names |= {n: token for token, n in vocabulary.items() if isinstance(n, int)}
    elif isinstance(vocabulary, list):
        names |= {n: str(entry[0]) for n, entry in enumerate(vocabulary) if entry}
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and str(number).isdigit():
            specials[str(entry.get("content"))] = int(number)
    for entry in whole.get("added_tokens") or ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            specials[str(entry.get("content"))] = entry["id"]
    names |= {number: token for token, number in specials.items()}
    eos = _token(config.get("eos_token", map_file.get("eos_token")))
    pad = _token(config.get("pad_token", map_file.get("pad_token")))
    for token in (eos, pad):
        # An EOS such as `</s>` may lie in the plain vocabulary.
        if token is not None and token not in specials and isinstance(vocabulary, dict):
            number = vocabulary.get(token)
            if isinstance(number, int):
                specials[token] = number
    return TokenizerFiles(
        size=max(names) + 1 if names and vocabulary else 0,
        eos_token=eos,
        pad_token=pad,
        specials=specials,
        names=names,
        template=_template(folder, config, others),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, what=path.name) if path.is_file() else {}


def _token(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(folder: Path, config: Mapping[str, Any], others: tuple[Path, ...]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    inside = config.get("chat_template")
    if isinstance(inside, list):
        named = {e.get("name"): e.get("template") for e in inside if isinstance(e, dict)}
        inside = named.get("default")
    if isinstance(inside, str):
        return inside
    for other in others:
        if (other / "chat_template.jinja").is_file():
            return (other / "chat_template.jinja").read_text(encoding="utf-8")
    return None


def behind_answer(text: str) -> str:
    """What a rendered `PROBE_TURNS` has behind the answer."""
    return text[text.rfind(PROBE_ANSWER) + len(PROBE_ANSWER) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What rendering short conversations shows of a template; fields as `EndingFiles`'s."""

    turn_end: tuple[str, int] | None = None
    trouble: str | None = None
    broken: bool = False
    unopened: str | None = None


def _tried(tokenizer: TokenizerFiles | None) -> _Tried:
    """Render the template as transformers does: what is behind an answer, and before it?"""
    if tokenizer is None or tokenizer.template is None:
        return _Tried()
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "1 January 2026"}
    # transformers' own tag marks what a trainer learns from, and writes nothing.
    source = _GENERATION.sub(r"\1if true\3", _END_GENERATION.sub(r"\1endif\3", tokenizer.template))

    def rendered(turns: Sequence[Mapping[str, str]], *, opened: bool) -> str:
        return template.render(
            messages=[dict(turn) for turn in turns],
            add_generation_prompt=opened,
            bos_token="",
            eos_token=tokenizer.eos_token or "",
            pad_token=tokenizer.pad_token or "",
            tools=None,
        )

    try:
        template = environment.from_string(source)
        text = rendered(PROBE_TURNS, opened=False)
        question = [rendered(PROBE_TURNS[:1], opened=opened) for opened in (False, True)]
    except Exception as error:  # templates raise what they like
        broken = isinstance(error, TemplateSyntaxError)
        return _Tried(trouble=f"{type(error).__name__}: {error}", broken=broken)
    behind = behind_answer(text).lstrip()
    found = [token for token in tokenizer.specials if token and behind.startswith(token)]
    token = max(found, key=len, default=None)
    return _Tried(
        turn_end=None if token is None else (token, tokenizer.specials[token]),
        unopened=_unopened(question, text[: text.rfind(PROBE_ANSWER)], tokenizer),
    )


def _unopened(question: Sequence[str], before: str, tokenizer: TokenizerFiles) -> str | None:
    """What a conversation has between question and answer, where asking for it changes nothing.

    A template whose question's own end opens the answer (`[/INST]`) has nothing there.
    """
    plain, opened = question
    if plain != opened or not before.startswith(opened):
        return None
    header = before[len(opened) :]
    return header if any(token and token in header for token in tokenizer.specials) else None
