"""Static findings: what the files say about ending, without a model and without generating.

Reads JSON, safetensors headers, and the rows of the head; a checkpoint of 16 GB takes seconds.
Knows nothing of completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.adapter_files import AdapterFiles, read_adapter
from harness.checkpoint_files import CheckpointFiles, read_checkpoint
from harness.ending import EndingFiles, read_ending
from harness.stack import AdapterStack
from harness.stopping.causes import CauseKind, Finding
from harness.stopping.families import Family, family_of
from harness.stopping.rows import (
    adapter_findings,
    head_findings,
    lost_head_finding,
    merged_row_finding,
)
from harness.verdict import Outcome, Verdict

__all__ = ["examine_files", "merged_findings", "turn_starts"]

EOS = "EOS ids"
TURN = "end of turn"
OPENING = "beginning of an answer"
SETTINGS = "generation settings of the checkpoint"
AGREEMENT = "agreement of the files"
PADDING = "padding"
VOCABULARY = "vocabulary and head"
COPY = "merged copy"

#: Settings that move or fake an end, whatever the model says.
_BENDING = {
    "min_new_tokens": "EOS is forbidden until then",
    "min_length": "EOS is forbidden until then, the prompt included",
    "forced_eos_token_id": "an answer that is cut off ends with EOS all the same",
    "exponential_decay_length_penalty": "EOS is raised with the length",
    "stop_strings": "answers are cut off there",
}


def examine_files(stack: AdapterStack, *, merged: Path | None = None) -> tuple[Finding, ...]:
    """Every static check of a stack's folders, and of a merged copy where one is given.

    Raises:
        InputError: a folder or file that cannot be read.
    """
    checkpoint = read_checkpoint(stack.base.path)
    adapters = {adapter.name: read_adapter(adapter.path) for adapter in stack.adapters}
    templates = [adapter.path for adapter in reversed(stack.adapters)]
    ending = read_ending(stack.base.path, template_from=templates)
    family = family_of(ending, str(checkpoint.config.get("model_type", "")))
    findings = [
        *ending_findings(ending, family),
        vocabulary_finding(ending, checkpoint),
        *head_findings(ending, checkpoint),
        *adapter_findings(ending, checkpoint, adapters),
    ]
    if merged is not None:
        findings += merged_findings(ending, checkpoint, adapters, merged, templates)
    return tuple(findings)


def turn_starts(ending: EndingFiles) -> frozenset[int]:
    """Ids of tokens that begin a turn, by the family's table."""
    family = family_of(ending)
    known = ending.tokenizer.specials if ending.tokenizer else {}
    return frozenset({known[family.turn_start]} if family and family.turn_start in known else ())


def ending_findings(ending: EndingFiles, family: Family | None) -> list[Finding]:
    """EOS ids, end of turn, agreement and padding, from the JSON files alone."""
    wrong = _wrong_ids(ending, family)
    return [
        _eos_finding(ending, family, wrong),
        _turn_finding(ending, bool(wrong)),
        _opening_finding(ending),
        _settings_finding(ending),
        _agreement_finding(ending),
        _padding_finding(ending),
    ]


def _name(ending: EndingFiles, token_id: int) -> str:
    return ending.tokenizer.shown(token_id) if ending.tokenizer else str(token_id)


def _names(ending: EndingFiles, ids: Sequence[int]) -> str:
    return ", ".join(_name(ending, n) for n in ids) or "nothing"


def _wrong_ids(ending: EndingFiles, family: Family | None) -> list[tuple[int, str]]:
    """The ids that generation stops at and that end nothing, each with the reason."""
    found: list[tuple[int, str]] = []
    tokenizer = ending.tokenizer
    for token_id in ending.eos:
        if token_id < 0 or (ending.vocabulary and token_id >= ending.vocabulary):
            found.append((token_id, f"is outside the vocabulary of {ending.vocabulary}"))
        elif tokenizer is None or not tokenizer.names:
            continue
        elif token_id not in tokenizer.names:
            found.append((token_id, "is no token of the tokenizer"))
        elif token_id not in tokenizer.specials.values():
            found.append((token_id, "is an ordinary token"))
        elif family is not None and tokenizer.names[token_id] == family.turn_start:
            found.append((token_id, "begins a turn"))
    return found


def _eos_finding(
    ending: EndingFiles, family: Family | None, wrong: list[tuple[int, str]]
) -> Finding:
    known = f"; family by its tokens: {family.name}" if family else ""
    if not ending.eos:
        verdict = _failed(
            EOS,
            f"{ending.source} names no EOS id: nothing can stop but the length",
            remedy="set eos_token_id in generation_config.json",
        )
    elif wrong:
        lines = []
        ends = sorted(ending.turn_ids - {n for n, _ in wrong})
        for token_id, why in wrong:
            near = [n for n in ends if abs(n - token_id) == 1]
            line = f"{ending.source} stops at {_name(ending, token_id)}, which {why}"
            if near:
                line += f": off by one from {_name(ending, near[0])}"
            lines.append(line)
        verdict = _failed(
            EOS, *lines, remedy=f"set eos_token_id to {ends} in generation_config.json"
        )
    else:
        verdict = _held(EOS, f"{ending.source} stops at {_names(ending, ending.eos)}{known}")
        verdict = _with_ids(verdict, ending, family)
    return Finding(kind=CauseKind.EOS_ID, verdict=verdict)


def _with_ids(verdict: Verdict, ending: EndingFiles, family: Family | None) -> Verdict:
    """Mention published ids that this tokenizer does not have; a resized vocabulary may differ."""
    if family is None:
        return verdict
    known = ending.tokenizer.specials if ending.tokenizer else {}
    other = [
        f"{token!r} is {known[token]} here, {number} in the published {family.name}"
        for token, number in family.ids.items()
        if token in known and known[token] != number
    ]
    return _held(verdict.name, *verdict.evidence, *other[:1])


def _turn_finding(ending: EndingFiles, wrong: bool) -> Finding:
    if ending.tokenizer is None or ending.tokenizer.template is None:
        verdict = _skipped(TURN, "there is no chat template to end a turn")
    elif ending.broken:
        verdict = _failed(
            TURN,
            f"the chat template does not parse: {ending.trouble}",
            remedy="copy the template that belongs to the tokenizer",
        )
    elif ending.trouble:
        verdict = _skipped(TURN, f"the chat template refuses a plain turn: {ending.trouble}")
    elif ending.turn_end is None:
        verdict = Verdict(
            name=TURN,
            outcome=Outcome.FAILED,
            evidence=("the chat template puts no special token behind an answer",),
            remedy="let the template end every assistant turn with the EOS token, in training and "
            "after",
        )
    else:
        token, token_id = ending.turn_end
        shown = f"the chat template ends a turn with {token!r} ({token_id})"
        if token_id in ending.eos:
            verdict = _held(TURN, f"{shown}, and generation stops at it")
        else:
            ids = sorted({*ending.eos, token_id}) if not wrong else [token_id]
            verdict = _failed(
                TURN,
                f"{shown}; {ending.source} stops at {_names(ending, ending.eos)} only, so a "
                "finished turn runs on",
                remedy=f"set eos_token_id to {ids} in generation_config.json",
            )
    return Finding(kind=CauseKind.EOS_LIST, verdict=verdict)


def _opening_finding(ending: EndingFiles) -> Finding:
    if ending.tokenizer is None or ending.tokenizer.template is None or ending.trouble:
        verdict = _skipped(OPENING, "there is no chat template to try")
    elif ending.unopened is not None:
        verdict = _failed(
            OPENING,
            f"in a conversation {ending.unopened!r} stands before an answer, and the prompt for "
            "generation ends without it: the template does nothing with add_generation_prompt",
            remedy="end the template with {% if add_generation_prompt %} and what opens an answer",
        )
    else:
        verdict = _held(OPENING, "a prompt for generation ends where an answer begins")
    return Finding(kind=CauseKind.OPENING, verdict=verdict)


def _settings_finding(ending: EndingFiles) -> Finding:
    """What `generation_config.json` does to EOS besides naming it.

    Every other `generate` obeys it; the engine here passes all settings itself and does not.
    """
    said, ends = ending.generation, ending.turn_ids
    lines: list[str] = []
    banned = [n for n in _listed(said.get("suppress_tokens")) if n in ends]
    banned += [w[0] for w in _listed(said.get("bad_words_ids")) if w in ([n] for n in ends)]
    if banned:
        lines.append(f"{_names(ending, banned)} is forbidden (suppress_tokens or bad_words_ids)")
    biased = [
        e[0]
        for e in _listed(said.get("sequence_bias"))
        if _listed(e) and e[0] in ([n] for n in ends)
    ]
    if biased:
        lines.append(f"{_names(ending, [w[0] for w in biased])} has a bias (sequence_bias)")
    for key, what in _BENDING.items():
        if said.get(key):
            lines.append(f"{key} = {said[key]!r}: {what}")
    if lines:
        verdict = _failed(
            SETTINGS,
            *(f"generation_config.json: {line}" for line in lines),
            remedy="take these keys out of generation_config.json: they act in every generate call "
            "that does not name them",
        )
    else:
        verdict = _held(SETTINGS, "generation_config.json neither forbids nor forces an end")
    return Finding(kind=CauseKind.SETTINGS, verdict=verdict)


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _agreement_finding(ending: EndingFiles) -> Finding:
    lines: list[str] = []
    tokenizer = ending.tokenizer
    if tokenizer is not None and tokenizer.eos_id is not None and ending.eos:
        if tokenizer.eos_id not in ending.eos:
            lines.append(
                f"the tokenizer's EOS is {_name(ending, tokenizer.eos_id)}, {ending.source} stops "
                f"at {_names(ending, ending.eos)}: training on the tokenizer's EOS teaches an end "
                "that stops nothing"
            )
    elif tokenizer is not None and tokenizer.eos_token is not None and ending.eos:
        lines.append(f"the tokenizer's EOS {tokenizer.eos_token!r} is none of its tokens")
    rest = [n for n in ending.config_eos if n not in ending.eos]
    if rest and ending.eos:
        lines.append(
            f"config.json's EOS is {_names(ending, rest)}, {ending.source} stops at "
            f"{_names(ending, ending.eos)}: servers that read one of them stop elsewhere"
        )
    if lines:
        verdict = _failed(
            AGREEMENT,
            *lines,
            remedy="name every id that ends a turn in generation_config.json, the end of a turn "
            "as the tokenizer's eos_token, and one of them in config.json",
        )
    else:
        verdict = _held(
            AGREEMENT, "config.json, generation_config.json and tokenizer agree on what ends"
        )
    return Finding(kind=CauseKind.TOKENIZER_EOS, verdict=verdict)


def _padding_finding(ending: EndingFiles) -> Finding:
    tokenizer = ending.tokenizer
    pad = tokenizer.pad_id if tokenizer is not None else ending.pad
    turn = ending.turn_end[1] if ending.turn_end else None
    ends = turn if turn is not None else (tokenizer.eos_id if tokenizer else None)
    if pad is None:
        verdict = _held(
            PADDING,
            "there is no padding token; taking the EOS for one in training masks its label",
        )
    elif pad == ends:
        verdict = _failed(
            PADDING,
            f"padding is {_name(ending, pad)}, which ends a turn: collators that mask padding mask "
            "the EOS label, and EOS is never learned",
            remedy="give the tokenizer a padding token of its own "
            "(https://github.com/huggingface/transformers/issues/23530)",
        )
    else:
        also = " (an EOS of generation, not the end of a turn)" if pad in ending.eos else ""
        verdict = _held(PADDING, f"padding is {_name(ending, pad)}{also}")
    return Finding(kind=CauseKind.PAD_IS_EOS, verdict=verdict)


def vocabulary_finding(ending: EndingFiles, checkpoint: CheckpointFiles) -> Finding:
    """Rows of embedding and head against `config.json` and the tokenizer."""
    lines: list[str] = []
    notes: list[str] = []
    size = ending.tokenizer.size if ending.tokenizer else 0
    for part in ("embed_tokens", "lm_head"):
        name = checkpoint.weight_name(_part(checkpoint, part))
        if name is None:
            continue
        rows = checkpoint.entry(name).shape[0]
        if ending.vocabulary and rows != ending.vocabulary:
            lines.append(f"{name} has {rows} rows, config.json says {ending.vocabulary}")
        if size > rows:
            lines.append(f"the tokenizer has {size} tokens, {name} has {rows} rows")
        elif size:
            notes.append(f"{name} has {rows} rows for {size} tokens")
    if lines:
        verdict = _failed(
            VOCABULARY,
            *lines,
            remedy="use the tokenizer that belongs to these weights, or resize the embeddings",
        )
    else:
        verdict = _held(VOCABULARY, "; ".join(dict.fromkeys(notes)) or f"{ending.vocabulary} rows")
    return Finding(kind=CauseKind.VOCABULARY, verdict=verdict)


def _part(checkpoint: CheckpointFiles, part: str) -> str:
    """The module's dotted name in this checkpoint, e.g. `model.embed_tokens`."""
    for name in checkpoint.places:
        if name.endswith(f"{part}.weight"):
            return name.removesuffix(".weight")
    return part


def merged_findings(
    ending: EndingFiles,
    checkpoint: CheckpointFiles,
    adapters: dict[str, AdapterFiles],
    merged: Path,
    templates: Sequence[Path] = (),
) -> list[Finding]:
    """A merged copy against the stack that it was merged from: does it end alike?"""
    copy, weights = read_ending(merged, template_from=templates), read_checkpoint(merged)
    lines: list[str] = []
    for what, before, after in (
        ("generation stops at", sorted(ending.eos), sorted(copy.eos)),
        ("config.json's EOS is", sorted(ending.config_eos), sorted(copy.config_eos)),
        ("the padding id is", ending.pad, copy.pad),
        ("the tokenizer's EOS is", _tokens(ending, "eos"), _tokens(copy, "eos")),
        ("the tokenizer's padding is", _tokens(ending, "pad"), _tokens(copy, "pad")),
        ("the template ends a turn with", ending.turn_end, copy.turn_end),
        ("tied embeddings:", checkpoint.tied, weights.tied),
    ):
        if before != after:
            lines.append(f"{what} {after} in the merged copy, {before} in the base")
    if _template(ending) != _template(copy) and ending.turn_end == copy.turn_end:
        lines.append("the chat template is another than the base's")
    rows = merged_row_finding(ending, checkpoint, adapters, weights)
    if rows is not None:
        lines.append(rows)
    if lines:
        verdict = _failed(
            COPY,
            *lines,
            remedy="copy generation_config.json and the tokenizer's files from the base beside "
            "the merged weights, or merge anew with lora-stack merge",
        )
    else:
        verdict = _held(COPY, "EOS ids, padding, template and EOS rows are the base's")
    overwritten = [
        Finding(kind=f.kind, verdict=_renamed(f.verdict, f"{COPY}: {f.verdict.name}"))
        for f in (*head_findings(copy, weights), _opening_finding(copy), _settings_finding(copy))
    ]
    lost = lost_head_finding(ending, checkpoint, weights)
    if lost is not None:
        overwritten.insert(0, lost)
    return [Finding(kind=CauseKind.MERGED, verdict=verdict), *overwritten]


def _tokens(ending: EndingFiles, which: str) -> str | None:
    if ending.tokenizer is None:
        return None
    return ending.tokenizer.eos_token if which == "eos" else ending.tokenizer.pad_token


def _template(ending: EndingFiles) -> str:
    return ((ending.tokenizer.template if ending.tokenizer else None) or "").strip()


def _renamed(verdict: Verdict, name: str) -> Verdict:
    return Verdict(
        name=name, outcome=verdict.outcome, evidence=verdict.evidence, remedy=verdict.remedy
    )


def _held(name: str, *evidence: str) -> Verdict:
    return Verdict(name=name, outcome=Outcome.HELD, evidence=evidence)


def _skipped(name: str, reason: str) -> Verdict:
    return Verdict(name=name, outcome=Outcome.SKIPPED, evidence=(reason,))


def _failed(name: str, *evidence: str, remedy: str) -> Verdict:
    return Verdict(name=name, outcome=Outcome.FAILED, evidence=evidence, remedy=remedy)
