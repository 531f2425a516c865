"""Settings that change results silently: EOS, padding, masks, sampling, length, template, ids.

`generation` is what will be passed to `generate`. A `GenerationSettings` is a declaration, and
what it says is accepted; anything else is raw, and must decode greedily by the likeliest token.
What the call leaves out comes from the model's own generation config, which is judged with it.
Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.certificate.values import failed, held, listed
from harness.checkpoint_files import CheckpointFiles
from harness.completion import GenerationSettings, Prompt
from harness.ending import PROBE_TURNS, behind_answer, declared_eos, eos_ids
from harness.engines.inspection import LiveModel, fresh_tokenizer
from harness.errors import InputError
from harness.verdict import Outcome, Verdict

__all__ = ["CACHE", "DECODING", "EOS", "LENGTH", "PADDING", "TEMPLATE", "TOKENS", "check_settings"]

EOS = "EOS ids"
PADDING = "padding and mask"
DECODING = "decoding"
LENGTH = "length"
CACHE = "key-value cache"
TEMPLATE = "chat template"
TOKENS = "token ids"

# What leaves the choice of the likeliest token alone, by key of a generation config.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (), "suppress_tokens": (), "begin_suppress_tokens": (),
    "sequence_bias": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "min_length": (0,), "min_new_tokens": (0,), "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,), "num_beams": (1,), "num_beam_groups": (1,),
    "diversity_penalty": (0.0,), "penalty_alpha": (0.0,), "watermarking_config": (),
    "remove_invalid_values": (False,), "renormalize_logits": (False,), "dola_layers": (),
    "constraints": (), "force_words_ids": (), "logits_processor": ([],),
    "prefix_allowed_tokens_fn": (), "stopping_criteria": ([],), "num_return_sequences": (1,),
    "token_healing": (False,), "prompt_lookup_num_tokens": (),
}  # fmt: skip


def check_settings(
    live: LiveModel,
    checkpoint: CheckpointFiles,
    adapters: Sequence[Path],
    *,
    tokenizer: Any,
    prompts: Sequence[Prompt | str],
    generation: Any,
) -> list[Verdict]:
    """Every check of settings; those that lack a tokenizer or a `generation` are skipped."""
    given = _as_mapping(generation)
    config: Any = getattr(live.bare, "generation_config", None)
    own = {} if config is None else config.to_dict()
    declared = isinstance(generation, GenerationSettings)
    verdicts = [
        _eos(checkpoint, tokenizer, given, own, _vocabulary(live), prompts),
        _padding(tokenizer, prompts, given, own, _vocabulary(live)),
        _decoding(given, own, declared),
        _length(live, tokenizer, prompts, given, own, generation is not None),
        _cache(given),
    ]
    if tokenizer is None:
        return verdicts
    fresh = _fresh(checkpoint.folder)
    return [
        *verdicts,
        _template(tokenizer, fresh, adapters),
        _tokens(tokenizer, fresh, prompts, given, _vocabulary(live)),
    ]


def _as_mapping(generation: Any) -> dict[str, Any]:
    if generation is None:
        return {}
    if isinstance(generation, GenerationSettings):
        return {
            "max_new_tokens": generation.max_new_tokens,
            "do_sample": generation.do_sample,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "repetition_penalty": generation.repetition_penalty,
            "seed": generation.seed,
        }
    if isinstance(generation, Mapping):
        nested = generation.get("generation_config")
        rest = {k: v for k, v in generation.items() if k != "generation_config"}
        return {**_as_mapping(nested), **rest}
    if hasattr(generation, "to_dict"):
        return {k: v for k, v in generation.to_dict().items() if v is not None}
    raise InputError(
        f"{type(generation).__name__} is no generation settings",
        where="generation",
        remedy="pass a dict of generate's arguments, a GenerationConfig or GenerationSettings",
    )


def _effective(key: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    value = given.get(key)
    return own.get(key) if value is None else value


def _vocabulary(live: LiveModel) -> int:
    config: Any = getattr(live.bare, "config", None)
    return int(getattr(config, "vocab_size", 0) or 0)


def _fresh(folder: Path) -> Any:
    try:
        return fresh_tokenizer(folder)
    except InputError:
        return None


def _eos(
    checkpoint: CheckpointFiles,
    tokenizer: Any,
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    vocabulary: int,
    prompts: Sequence[Prompt | str],
) -> Verdict:
    effective = eos_ids(_effective("eos_token_id", given, own))
    declared, source = declared_eos(checkpoint.folder, checkpoint.config)
    config_eos = eos_ids(checkpoint.config.get("eos_token_id"))
    faults: list[str] = []
    if not effective:
        faults.append("generation has no EOS id: nothing can stop it but the length")
    outside = [n for n in effective if vocabulary and not 0 <= n < vocabulary]
    if outside:
        faults.append(f"EOS {outside[0]} is outside the vocabulary of {vocabulary}")
    if (
        declared
        and effective
        and set(effective) != set(declared)
        and given.get("eos_token_id") is None
    ):
        faults.append(f"the model stops at {list(effective)}, {source} says {list(declared)}")
    if effective and set(config_eos) - set(effective):
        faults.append(
            f"config.json's EOS {sorted(set(config_eos) - set(effective))} does not stop it"
        )
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and effective and end not in effective:
        faults.append(
            f"the tokenizer's EOS is {tokenizer.eos_token!r} ({end}), generation stops at "
            f"{list(effective)} only: a chat turn never ends"
        )
    turn = _end_of_turn(tokenizer, prompts)
    if turn is not None and effective and turn not in effective:
        faults.append(
            f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn)!r} "
            f"({turn}), generation stops at {list(effective)} only"
        )
    if tokenizer is not None and getattr(tokenizer, "all_special_ids", None):
        known = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        plain = [n for n in effective if n not in known and n not in outside]
        if plain:
            faults.append(f"EOS {plain[0]} is an ordinary token, {tokenizer.decode([plain[0]])!r}")
    if faults:
        return failed(
            EOS,
            *faults,
            remedy="set eos_token_id in generation_config.json to every id that ends a turn "
            f"(here: {sorted(set(declared) | set(eos_ids(end)))})",
        )
    return held(EOS, f"generation stops at {list(effective)}; config, {source} and tokenizer agree")


def _end_of_turn(tokenizer: Any, prompts: Sequence[Prompt | str]) -> int | None:
    """The special token that the template puts behind an assistant's words, if chat is used."""
    chats = any(isinstance(prompt, Prompt) and prompt.messages for prompt in prompts)
    if tokenizer is None or not chats or tokenizer.chat_template is None:
        return None
    turns = [dict(turn) for turn in PROBE_TURNS]
    behind = behind_answer(tokenizer.apply_chat_template(turns, tokenize=False))
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return (
        int(ids[0])
        if ids
        and ids[0]
        in set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        else None
    )


def _padding(
    tokenizer: Any,
    prompts: Sequence[Prompt | str],
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    vocabulary: int,
) -> Verdict:
    faults: list[str] = []
    pad = _effective("pad_token_id", given, own)
    if pad is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
    if pad is not None and vocabulary and not 0 <= int(pad) < vocabulary:
        faults.append(f"the padding id {pad} is outside the vocabulary of {vocabulary}")
    if tokenizer is not None:
        side = getattr(tokenizer, "padding_side", "left")
        if side != "left":
            faults.append(f"the tokenizer pads on the {side}: generation goes on from the padding")
        if tokenizer.pad_token_id is None:
            faults.append("the tokenizer has no padding token: prompts cannot be batched")
        elif "attention_mask" not in tokenizer.model_input_names:
            faults.append("the tokenizer returns no attention mask: padding would be read as text")
        if getattr(tokenizer, "truncation_side", "left") != "left" and _truncates(tokenizer):
            faults.append("the tokenizer truncates long prompts on the right: the question is lost")
    mask, ids = _rows(given.get("attention_mask")), _rows(given.get("input_ids"))
    if mask is not None and ids is not None:
        faults += list(_mask_faults(ids, mask, pad))
    elif ids is not None and len(ids) > 1 and any(row and pad in (row[0], row[-1]) for row in ids):
        faults.append("padded input_ids come without attention_mask: padding is read as text")
    if faults:
        return failed(
            PADDING,
            *faults,
            remedy="tokenizer.padding_side = 'left', a padding token, and pass attention_mask",
        )
    known = "" if tokenizer is None else f"; padding id {tokenizer.pad_token_id}, on the left"
    return held(PADDING, f"{len(prompts)} prompts{known}")


def _truncates(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(backend, "truncation", None) is not None


def _rows(value: Any) -> list[list[int]] | None:
    if value is None:
        return None
    rows: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return [list(row) for row in rows] if rows and isinstance(rows[0], list) else [rows]


def _mask_faults(ids: list[list[int]], mask: list[list[int]], pad: int | None) -> Iterator[str]:
    for place, (row, seen) in enumerate(zip(ids, mask, strict=False)):
        if len(row) != len(seen):
            yield f"row {place}: {len(row)} ids and a mask of {len(seen)}"
        elif not any(seen):
            yield f"row {place}: the mask hides every token"
        elif seen != sorted(seen):
            yield f"row {place}: the mask hides tokens behind the first visible one"
        elif pad is not None and row[0] == pad and all(seen) and len(set(row)) > 1:
            yield f"row {place}: begins with padding that the mask shows as text"
        elif pad is not None and any(t != pad for t, s in zip(row, seen, strict=True) if not s):
            hidden = sum(1 for s in seen if not s)
            yield f"row {place}: the mask hides {hidden} tokens of the prompt"


def _decoding(given: Mapping[str, Any], own: Mapping[str, Any], declared: bool) -> Verdict:
    faults: list[str] = []
    sampling = bool(_effective("do_sample", given, own))
    source = "the call" if given.get("do_sample") else "the model's generation config"
    if sampling and given.get("seed") is None:
        faults.append(f"{source} samples (do_sample) without a seed: every run differs")
    elif sampling and not declared and not given.get("do_sample"):
        faults.append("the model's generation config samples (do_sample), the call does not say so")
    for key, neutral in _NEUTRAL.items():
        value = _effective(key, given, own)
        if value is None or value in neutral or value == [] or (declared and key in given):
            continue
        where = "the call" if given.get(key) is not None else "the model's generation config"
        faults.append(f"{key} = {value!r} in {where}: not the likeliest token any more")
    if faults:
        return failed(
            DECODING,
            *listed(faults, "settings"),
            remedy="pass do_sample=False and leave penalties out, or declare them in "
            "GenerationSettings; a checkpoint's generation_config.json leaks into every call",
        )
    return held(DECODING, "sampling with a seed, as declared" if sampling else "greedy, unaltered")


def _length(
    live: LiveModel,
    tokenizer: Any,
    prompts: Sequence[Prompt | str],
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    asked: bool,
) -> Verdict:
    if not asked:
        return Verdict(name=LENGTH, outcome=Outcome.SKIPPED, evidence=("generation was not given",))
    new, total = _effective("max_new_tokens", given, own), _effective("max_length", given, own)
    longest = max((len(_prompt_ids(tokenizer, p)) for p in prompts), default=0) if tokenizer else 0
    context = int(getattr(getattr(live.bare, "config", None), "max_position_embeddings", 0) or 0)
    faults: list[str] = []
    if new is None and total is None:
        faults.append("neither max_new_tokens nor max_length: transformers stops after 20 tokens")
    if new is not None and new < 1:
        faults.append(f"max_new_tokens = {new}: nothing is generated")
    if new is None and total is not None and longest and total <= longest:
        faults.append(f"max_length = {total} counts the prompt, the longest has {longest} tokens")
    if new is not None and context and longest + new > context:
        faults.append(
            f"a prompt of {longest} tokens and max_new_tokens = {new} pass the context of {context}"
        )
    limit = _effective("max_time", given, own)
    if limit is not None:
        faults.append(f"max_time = {limit}: the length depends on the machine's speed")
    if faults:
        return failed(LENGTH, *faults, remedy="pass max_new_tokens that leaves room for an answer")
    return held(LENGTH, f"max_new_tokens {new}, longest prompt {longest}, context {context}")


def _cache(given: Mapping[str, Any]) -> Verdict:
    cache = given.get("past_key_values")
    length = getattr(cache, "get_seq_length", lambda: 1)() if cache is not None else 0
    if length:
        return failed(
            CACHE,
            f"a cache that holds {length} tokens is passed: it belongs to the mode that filled it",
            remedy="leave past_key_values out, or fill a new cache after each switch of mode",
        )
    return held(CACHE, "no filled cache is carried over from another mode")


def _template(tokenizer: Any, fresh: Any, adapters: Sequence[Path]) -> Verdict:
    now = getattr(tokenizer, "chat_template", None)
    base = getattr(fresh, "chat_template", None)
    beside = {
        folder.name: (folder / "chat_template.jinja").read_text(encoding="utf-8")
        for folder in adapters
        if (folder / "chat_template.jinja").is_file()
    }
    notes = [
        f"the adapter folder {name} holds another template than the base's"
        for name, text in beside.items()
        if base is not None and text.strip() != str(base).strip()
    ]
    if base is None and not beside:
        if now is None:
            return held(TEMPLATE, "there is none, in the files or in the tokenizer")
        return Verdict(
            name=TEMPLATE,
            outcome=Outcome.UNDECIDED,
            evidence=("the tokenizer has a chat template that none of the stack's folders holds",),
            remedy="save chat_template.jinja beside the adapter that was trained with it",
        )
    wanted = [base] if base is not None else []
    wanted += list(beside.values())
    if now is None:
        return failed(TEMPLATE, "the tokenizer has none, the stack's files do",
                      remedy="load the tokenizer from the stack's base folder")  # fmt: skip
    if not any(str(now).strip() == str(text).strip() for text in wanted):
        return failed(
            TEMPLATE,
            "the tokenizer's chat template is not the one in the stack's files",
            remedy="load the tokenizer from the stack's base folder, and do not replace "
            "chat_template",
        )
    return held(TEMPLATE, "the tokenizer's is the one in the stack's files", *notes)


def _prompt_ids(tokenizer: Any, prompt: Prompt | str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt.text is not None or tokenizer.chat_template is None:
        return list(
            tokenizer(prompt.text if prompt.text is not None else prompt.shown)["input_ids"]
        )
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def _tokens(
    tokenizer: Any,
    fresh: Any,
    prompts: Sequence[Prompt | str],
    given: Mapping[str, Any],
    vocabulary: int,
) -> Verdict:
    if fresh is None:
        return Verdict(
            name=TOKENS,
            outcome=Outcome.UNDECIDED,
            evidence=("the base's folder holds no tokenizer to compare with",),
            remedy="copy the tokenizer's files beside the base's weights",
        )
    faults: list[str] = []
    if fresh.chat_template is None:
        fresh.chat_template = tokenizer.chat_template
    for number, prompt in enumerate(prompts):
        name = f"prompt {prompt.id if isinstance(prompt, Prompt) else number}"
        now, then = _prompt_ids(tokenizer, prompt), _prompt_ids(fresh, prompt)
        if now != then:
            place = next(
                (i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b),
                min(len(now), len(then)),
            )
            faults.append(
                f"{name}: {len(now)} ids, the base's tokenizer gives {len(then)}; "
                f"they part at position {place}"
            )
        outside = [n for n in now if vocabulary and n >= vocabulary]
        if outside:
            faults.append(f"{name}: id {outside[0]} is outside the vocabulary of {vocabulary}")
    faults += list(_given_ids(tokenizer, fresh, prompts, given))
    if faults:
        return failed(
            TOKENS,
            *listed(faults, "prompts"),
            remedy="load the tokenizer from the stack's base folder; pass prompts in their order, "
            "through the chat template once",
        )
    return held(TOKENS, f"{len(prompts)} prompts have the ids that the base's own tokenizer gives")


def _given_ids(
    tokenizer: Any, fresh: Any, prompts: Sequence[Prompt | str], given: Mapping[str, Any]
) -> Iterator[str]:
    """The rows that will be generated from, against the prompts in their order."""
    ids, mask = _rows(given.get("input_ids")), _rows(given.get("attention_mask"))
    if ids is None or not prompts:
        return
    wanted = [_prompt_ids(fresh, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id
    seen: list[list[int]] = []
    for number, row in enumerate(ids):
        if mask is not None and number < len(mask) and len(mask[number]) == len(row):
            seen.append([t for t, keep in zip(row, mask[number], strict=True) if keep])
        else:
            start = next((i for i, t in enumerate(row) if t != pad), 0)
            seen.append(row[start:])
    if seen == wanted:
        return
    if len(seen) != len(wanted):
        yield f"input_ids has {len(seen)} rows for {len(wanted)} prompts"
    elif sorted(seen) == sorted(wanted):
        yield "input_ids holds the prompts in another order: results would go to the wrong prompts"
    else:
        place = next(i for i, (a, b) in enumerate(zip(seen, wanted, strict=True)) if a != b)
        yield f"row {place} of input_ids is not its prompt: {len(seen[place])} ids, not " + str(
            len(wanted[place])
        )
