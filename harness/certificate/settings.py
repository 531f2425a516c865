"""Settings that change results silently: EOS, sampling, penalties, length, cache.

`generation` is what will be passed to `generate`. A `GenerationSettings` is a declaration, and
what it says is accepted; anything else is raw, and must decode greedily by the likeliest token.
What the call leaves out comes from the model's own generation config, which is judged with it.
What the tokenizer does is judged in `tokens`. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.certificate.tokens import (
    PADDING,
    TEMPLATE,
    TOKENS,
    check_padding,
    check_template,
    check_tokens,
    effective,
    fresh_of,
    prompt_ids,
)
from harness.certificate.values import failed, held, listed
from harness.checkpoint_files import CheckpointFiles
from harness.completion import GenerationSettings, Prompt
from harness.ending import PROBE_TURNS, behind_answer, declared_eos, eos_ids
from harness.engines.inspection import LiveModel
from harness.errors import InputError
from harness.files.strict_json import read_json_object
from harness.stack import Mode
from harness.verdict import Outcome, Verdict

__all__ = ["CACHE", "DECODING", "EOS", "LENGTH", "PADDING", "TEMPLATE", "TOKENS", "check_settings"]

EOS = "EOS ids"
DECODING = "decoding"
LENGTH = "length"
CACHE = "key-value cache"

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
# What a call can hold that makes `generate` run something else than the model on the prompts.
_ELSE: Mapping[str, str] = {
    "inputs_embeds": "the model reads vectors and not the prompts' tokens",
    "custom_generate": "another decoding loop than transformers' is run",
}


def check_settings(
    live: LiveModel,
    checkpoint: CheckpointFiles,
    adapters: Sequence[Path],
    *,
    mode: Mode,
    tokenizer: Any,
    prompts: Sequence[Prompt | str],
    generation: Any,
) -> list[Verdict]:
    """Every check of settings; those that lack a tokenizer or a `generation` are skipped."""
    given = _as_mapping(generation)
    config: Any = getattr(live.bare, "generation_config", None)
    own = {} if config is None else config.to_dict()
    stored = _stored(checkpoint.folder)
    declared = isinstance(generation, GenerationSettings)
    verdicts = [
        _eos(checkpoint, tokenizer, given, own, _vocabulary(live), prompts),
        check_padding(tokenizer, prompts, given, own, _vocabulary(live)),
        _decoding(given, own, stored, declared, mode),
        _length(live, tokenizer, prompts, given, stored | _said(own), generation is not None),
        _cache(given, stored | _said(own)),
    ]
    if tokenizer is None:
        reason = ("no tokenizer was given",)
        left_out = [Verdict(name=name, outcome=Outcome.SKIPPED, evidence=reason)
                    for name in (TEMPLATE, TOKENS)]  # fmt: skip
        return [*verdicts, *left_out]
    fresh = fresh_of(checkpoint.folder)
    return [
        *verdicts,
        check_template(tokenizer, fresh, adapters),
        check_tokens(tokenizer, fresh, prompts, given, _vocabulary(live)),
    ]


def _stored(folder: Path) -> dict[str, Any]:
    """`generation_config.json`, which acts wherever the checkpoint is loaded, if not here."""
    path = folder / "generation_config.json"
    return read_json_object(path, what=path.name) if path.is_file() else {}


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


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


def _vocabulary(live: LiveModel) -> int:
    config: Any = getattr(live.bare, "config", None)
    return int(getattr(config, "vocab_size", 0) or 0)


def _eos(
    checkpoint: CheckpointFiles,
    tokenizer: Any,
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    vocabulary: int,
    prompts: Sequence[Prompt | str],
) -> Verdict:
    stops = eos_ids(effective("eos_token_id", given, own))
    declared, source = declared_eos(checkpoint.folder, checkpoint.config)
    config_eos = eos_ids(checkpoint.config.get("eos_token_id"))
    faults: list[str] = []
    if not stops:
        faults.append("generation has no EOS id: nothing can stop it but the length")
    outside = [n for n in stops if vocabulary and not 0 <= n < vocabulary]
    if outside:
        faults.append(f"EOS {outside[0]} is outside the vocabulary of {vocabulary}")
    if declared and stops and set(stops) != set(declared) and given.get("eos_token_id") is None:
        faults.append(f"the model stops at {list(stops)}, {source} says {list(declared)}")
    lost = sorted(set(declared) - set(stops)) if given.get("eos_token_id") is not None else []
    if lost and stops:
        faults.append(f"the call stops at {list(stops)} only, {source} also at {lost}")
    if stops and set(config_eos) - set(stops):
        faults.append(f"config.json's EOS {sorted(set(config_eos) - set(stops))} does not stop it")
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and stops and end not in stops:
        faults.append(
            f"the tokenizer's EOS is {tokenizer.eos_token!r} ({end}), generation stops at "
            f"{list(stops)} only: a chat turn never ends"
        )
    turn = _end_of_turn(tokenizer, prompts)
    if turn is not None and stops and turn not in stops:
        faults.append(
            f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn)!r} "
            f"({turn}), generation stops at {list(stops)} only"
        )
    if tokenizer is not None and getattr(tokenizer, "all_special_ids", None):
        known = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        plain = [n for n in stops if n not in known and n not in outside]
        if plain:
            faults.append(f"EOS {plain[0]} is an ordinary token, {tokenizer.decode([plain[0]])!r}")
    if faults:
        return failed(
            EOS,
            *faults,
            remedy="set eos_token_id in generation_config.json to every id that ends a turn "
            f"(here: {sorted(set(declared) | set(eos_ids(end)))})",
        )
    agreeing = f"config and {source}" if end is None else f"config, {source} and tokenizer"
    return held(EOS, f"generation stops at {list(stops)}; {agreeing} agree")


def _end_of_turn(tokenizer: Any, prompts: Sequence[Prompt | str]) -> int | None:
    """The special token that the template puts behind an assistant's words, if chat is used."""
    chats = any(isinstance(prompt, Prompt) and prompt.messages for prompt in prompts)
    if tokenizer is None or not chats or tokenizer.chat_template is None:
        return None
    turns = [dict(turn) for turn in PROBE_TURNS]
    try:
        behind = behind_answer(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates raise what they like: this one takes no such conversation
        return None
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return (
        int(ids[0])
        if ids
        and ids[0]
        in set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        else None
    )


def _decoding(
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    stored: Mapping[str, Any],
    declared: bool,
    mode: Mode,
) -> Verdict:
    faults = [f"{key} is passed: {why}" for key, why in _ELSE.items() if given.get(key) is not None]
    names = {str(name) for name in given.get("adapter_names") or ()}
    alone = mode.adapters[0] if len(mode.adapters) == 1 else None
    if names - {alone if mode.adapters else "__base__"}:
        faults.append(
            f"adapter_names = {sorted(names)} is passed: PEFT applies one adapter to each row, "
            f"whatever is active; the mode is {mode.formula}"
        )
    sampling = bool(effective("do_sample", given, own))
    source = "the call" if given.get("do_sample") else "the model's generation config"
    if sampling and given.get("seed") is None:
        faults.append(f"{source} samples (do_sample) without a seed: every run differs")
    elif sampling and not declared and not given.get("do_sample"):
        faults.append("the model's generation config samples (do_sample), the call does not say so")
    for key, neutral in _NEUTRAL.items():
        value, where = effective(key, given, own), "the model's generation config"
        if given.get(key) is not None:
            where = "the call"
        elif value is None:
            value, where = stored.get(key), "generation_config.json"
        if value is None or value in neutral or value == [] or (declared and key in given):
            continue
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
    new, total = effective("max_new_tokens", given, own), effective("max_length", given, own)
    longest = max((len(prompt_ids(tokenizer, p)) for p in prompts), default=0) if tokenizer else 0
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
    ends = own.get("stop_strings")
    if ends and given.get("stop_strings") is None:
        faults.append(
            f"stop_strings = {ends!r} in the model's generation config: answers are cut off there"
        )
    limit = effective("max_time", given, own)
    if limit is not None:
        faults.append(f"max_time = {limit}: the length depends on the machine's speed")
    if faults:
        return failed(LENGTH, *faults, remedy="pass max_new_tokens that leaves room for an answer")
    return held(LENGTH, f"max_new_tokens {new}, longest prompt {longest}, context {context}")


def _cache(given: Mapping[str, Any], own: Mapping[str, Any]) -> Verdict:
    cache = given.get("past_key_values")
    kind = effective("cache_implementation", given, own)
    if kind == "quantized" or "quant" in type(cache).__name__.lower():
        return failed(
            CACHE,
            "the key-value cache is quantised: what was read is rounded to a few bits",
            remedy="leave cache_implementation out",
        )
    length = getattr(cache, "get_seq_length", lambda: 1)() if cache is not None else 0
    if length:
        return failed(
            CACHE,
            f"a cache that holds {length} tokens is passed: it belongs to the mode that filled it",
            remedy="leave past_key_values out, or fill a new cache after each switch of mode",
        )
    return held(CACHE, "no filled cache is carried over from another mode")
