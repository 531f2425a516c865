"""Compared cases made by hand: what a run of the suites would have recorded."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from harness.pending import Alternative, Case, Position, Run, Side, record_case, record_run
from harness.snapshot_files import sidecar_bytes
from harness.verdict import Outcome, Verdict

STACK = {"base": "b" * 16, "adapter_style": "5" * 16, "adapter_instruct": "1" * 16}
CONDITIONS = {**STACK, "device": "cpu", "dtype": "float32", "torch": "2.13.0"}

#: What a model can say to break out of whatever shows it.
HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \r\x08\x7f\x9b2J",
    "\u202eabc\u202c \u2066x\u2069 \u200f",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "</details></summary></td></table></style></script>-->",
    "```\n~~~~\n````html\n<b>x</b>\n",
    "@octocat @org/team #1 GH-2 a" + "b" * 7 + " 0123456789abcdef0123456789abcdef01234567",
    "![x](https://evil.example/beacon.png) [y](javascript:alert(1)) <https://evil.example>",
    "https://evil.example/?q=1 www.evil.example mail@evil.example",
    "\n::error file=a,title=b::c\n##[error]x\n::set-output name=a::b",
    "| a | b |\n| --- | --- |\n# head\n- item\n> quote\n***\n    code",
    "\ud800 lone \udfff surrogates \x00 nul \ufffe",
    "&lt;b&gt; &#60;script&#62; {{ 7*7 }} {% raw %} ${7*7}",
    "[ref]: https://evil.example\n[^1]: note\n:tada: $$x$$ \\(x\\)",
    "",
    " \t\n\n ",
)


def positions(text: str, *, step: float = 0.0, rival: str = "") -> tuple[Position, ...]:
    """A token a word and the EOS; log-probabilities move by *step* nats.

    Args:
        rival: the text whose words are the second best ones.
    """
    found = []
    rivals = _pieces(rival)
    for index, piece in enumerate(_pieces(text)):
        best = -0.05 - 0.16 * (index * 5 % 7) - step
        second = rivals[index] if index < len(rivals) and rivals[index] != piece else " some"
        pieces = [piece, second, " more", "\n", "<b>"]
        alternatives = [
            Alternative(token_id=_token(each), piece=each, logprob=best - 0.9 * n - 0.1 * n * n)
            for n, each in enumerate(dict.fromkeys(pieces))
        ]
        found.append(
            Position(
                token_id=_token(piece),
                piece=piece,
                logprob=best,
                alternatives=tuple(alternatives),
            )
        )
    return tuple(found)


def _pieces(text: str) -> list[str]:
    return [*re.findall(r"\s*\S+|\s+", text), "<|im_end|>"]


def _token(piece: str) -> int:
    return int(hashlib.sha256(piece.encode("utf-8", "surrogatepass")).hexdigest()[:4], 16)


def side(
    text: str,
    *,
    stop_reason: str = "eos",
    step: float = 0.0,
    rival: str = "",
    conditions: dict[str, str] | None = None,
) -> Side:
    return Side(
        text=text,
        stop_reason=stop_reason,
        positions=positions(text, step=step, rival=rival),
        conditions=CONDITIONS if conditions is None else conditions,
    )


def case(
    prompt: str = "black-tea-taste",
    mode: str = "stacked",
    outcome: Outcome = Outcome.CHANGED,
    then: str | None = "Black tea unfolds a sumptuous savour upon the tongue.",
    now: str = "Black tea offers a sumptuous savour upon the palate.",
    *,
    root: Path | None = None,
    stop_reason: str = "eos",
    conditions: dict[str, str] | None = None,
    then_conditions: dict[str, str] | None = None,
    prompt_text: str = "How does black tea taste?",
    evidence: tuple[str, ...] = (),
) -> Case:
    """A case; with *root*, its accepted snapshot is written there too."""
    name = f"test_generation/elegant--{prompt}--{mode}"
    snapshot, evidence_file = Path(f"snapshots/{name}.toml"), Path(f"snapshots/{name}.evidence")
    if outcome in (Outcome.HELD, Outcome.DRIFT):
        now = then or now
    old = None if then is None else side(then, rival=now, conditions=then_conditions)
    new = side(
        now,
        stop_reason=stop_reason,
        step=0.3 if outcome is Outcome.DRIFT else 0.0,
        rival=then or "",
        conditions=conditions,
    )
    accepted = {} if then is None else {snapshot: form(then), evidence_file: sidecar(then)}
    if root is not None:
        for path, data in accepted.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
    nothing = outcome in (Outcome.HELD, Outcome.SKIPPED)
    accepting = {} if nothing else {snapshot: form(now), evidence_file: sidecar(now)}
    first = None
    if old is not None and outcome in (Outcome.CHANGED, Outcome.TIE):
        first = next(
            (
                index
                for index, (a, b) in enumerate(zip(old.positions, new.positions, strict=False))
                if a.token_id != b.token_id
            ),
            min(len(old.positions), len(new.positions)) - 1,
        )
    return Case(
        name=name,
        snapshot=snapshot,
        preset="elegant",
        prompt=prompt,
        prompt_text=prompt_text,
        mode=mode,
        verdict=Verdict(
            name=name,
            outcome=outcome,
            evidence=evidence or (f"made by hand: {outcome}",),
            remedy=None if outcome.passed else "lora-stack review",
        ),
        first=first,
        noise_floor=2e-5,
        then=old,
        now=new,
        accepting=accepting,
        accepted_sha256={
            path: hashlib.sha256(accepted[path]).hexdigest() if path in accepted else ""
            for path in accepting
        },
    )


def form(text: str) -> bytes:
    return f"text = {text!r}\n".encode("utf-8", "surrogatepass")


def sidecar(text: str) -> bytes:
    return sidecar_bytes(form(text), b"evidence of " + form(text))


def recorded(root: Path, *cases: Case, conditions: dict[str, str] | None = None) -> Path:
    """Record a run and its cases below *root*."""
    record_run(root, Run(conditions=CONDITIONS if conditions is None else conditions))
    for item in cases:
        record_case(root, item)
    return root


def a_grid(root: Path) -> Path:
    """Three prompts in four modes, with most verdicts; snapshots written."""
    cases = []
    for prompt in ("black-tea-taste", "fox-home", "lotus-place-zh"):
        for mode in ("base", "style", "instruct", "stacked"):
            outcome = {
                ("black-tea-taste", "stacked"): Outcome.CHANGED,
                ("black-tea-taste", "instruct"): Outcome.CHANGED,
                ("fox-home", "style"): Outcome.DRIFT,
                ("fox-home", "stacked"): Outcome.TIE,
                ("lotus-place-zh", "instruct"): Outcome.MISSING,
            }.get((prompt, mode), Outcome.HELD)
            cases.append(
                case(prompt, mode, outcome, root=root)
                if outcome is not Outcome.MISSING
                else case(prompt, mode, outcome, then=None, root=root)
            )
    return recorded(root, *cases)
