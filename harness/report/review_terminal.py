"""The review on a terminal: the grid, a change at a time, and single keys to decide.

Decisions are collected and handed back; whoever asked applies them. Foreign text is shown, never
obeyed. Knows nothing of files.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.display.terminal import shown
from harness.display.textdiff import Change, word_diff
from harness.errors import InputError
from harness.pending import Case, Position, Record, Records, read_case
from harness.report.review import (
    SIGNS,
    Group,
    counts,
    display,
    fork,
    groups,
    modes,
    percent,
    rows,
    summary,
    unread,
)
from harness.verdict import Outcome

__all__ = ["Choices", "ask", "print_case", "print_grid", "print_review", "single_keys"]

_STYLES = {
    "held": "green",
    "accepted": "green",
    "skipped": "dim",
    "rejected": "dim",
    "tie": "cyan",
    "drift": "yellow",
    "undecided": "yellow",
    "missing": "blue",
    "incomparable": "magenta",
}
_KEYS = (
    "[a]ccept  [r]eject  [s]kip  accept [g]roup  [t]okens  [q]uit and apply  Ctrl-C changes nothing"
)
_ROWS_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a person chose."""

    accepted: tuple[Record, ...]
    rejected: tuple[Record, ...]


def _style(name: str) -> str:
    return _STYLES.get(name, "bold red")


def _line(out: Console, text: Text | str = "") -> None:
    """One line; a pipe or a log gets it whole, a terminal wraps it."""
    out.print(text, soft_wrap=not out.is_terminal)


def print_grid(out: Console, records: Records) -> None:
    """Prompt × mode; rows in which everything held are only counted where there are many."""
    columns = modes(records)
    found = rows(records)
    kept = [
        row for row in found
        if len(found) <= _ROWS_SHOWN or any(not r.outcome.passed for r in row.cells.values())
    ]  # fmt: skip
    several = len({(row.folder, row.preset) for row in found}) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("prompt", overflow="fold")
    for mode in columns:
        table.add_column(Text(shown(mode)), no_wrap=True)
    section: tuple[str, str] | None = None
    for row in kept:
        if several and section != (row.folder, row.preset):
            section = (row.folder, row.preset)
            table.add_section()
            table.add_row(Text(shown(f"{row.folder} · {row.preset}"), style="dim"))
        cells = []
        for mode in columns:
            record = row.cells.get(mode)
            name = display(record) if record else ""
            cells.append(Text(f"{SIGNS.get(name, '✗')} {name}" if name else "", _style(name)))
        table.add_row(Text(shown(row.prompt)), *cells)
    out.print(table)
    if len(kept) < len(found):
        _line(out, Text(f"{len(found) - len(kept)} prompts that held in every mode are not listed"))
    line = Text("verdicts: ")
    for place, (name, count) in enumerate(counts(records).items()):
        line.append(", " if place else "").append(f"{count} {name}", _style(name))
    _line(out, line)
    print_broken(out, records)


def print_broken(out: Console, records: Records) -> None:
    """Pending files that cannot be read, by name, and what to do."""
    for broken in records.broken:
        where = broken.path.relative_to(records.root).as_posix()
        _line(
            out,
            Text(
                f"! {shown(where)}: {shown(broken.fault)} → delete it and run the suites again",
                style="bold red",
            ),
        )


def print_review(out: Console, records: Records, *, tokens: bool = False) -> None:
    """The grid and every change, for a pipe or a log."""
    print_grid(out, records)
    for group in groups(records.cases):
        _line(out)
        _print_group(out, group)
        _line(out)
        _print_record(out, group.records[0], tokens=tokens)
        for record in group.records[1:]:
            line = f"  the same in {record.prompt} × {record.mode}: {record.name}"
            if record.outcome is Outcome.DRIFT and record.evidence:
                line += f" ({record.evidence[0]})"  # how far it moved is its own
            _line(out, Text(shown(line)))
    _line(out)
    _line(out, Text(summary(records), style="bold"))


def _print_group(out: Console, group: Group) -> None:
    if len(group.records) > 1:
        _line(
            out,
            Text.assemble(
                (f"{len(group.records)} cases, one change: ", "bold"), shown(group.change)
            ),
        )


def _print_record(out: Console, record: Record, *, tokens: bool) -> None:
    try:
        case = read_case(record)
    except InputError as error:
        _line(out, Text(f"! {shown(f'{record.name}: {unread(error)}')}", style="bold red"))
        return
    print_case(out, case, tokens=tokens)


def print_case(out: Console, case: Case, *, tokens: bool = False) -> None:
    """One change: verdict, words, stop reasons, and where it forks."""
    name = case.verdict.outcome.value
    _line(out,
        Text.assemble(
            (f"{SIGNS[name]} {name}", _style(name)), "  ",
            (shown(case.prompt), "bold"), " × ", (shown(case.mode), "bold"),
            (f"  {shown(case.snapshot.as_posix())}", "dim"),
        )
    )  # fmt: skip
    _line(out, Text(f"  prompt  {shown(' '.join(case.prompt_text.split()))}", style="dim"))
    if case.then is None:
        _line(out, Text.assemble("  now     ", (_indented(shown(case.now.text)), "green")))
    else:
        _line(out, Text("  text    ").append_text(_words(case.then.text, case.now.text)))
    stops = [case.then.stop_reason] if case.then else []
    stops += [case.now.stop_reason] if stops != [case.now.stop_reason] else []
    _line(out, Text(f"  stop    {shown(' → '.join(stops))}"))
    _print_fork(out, case)
    for line in case.verdict.evidence:
        _line(out, Text(f"  · {shown(line)}", style="dim"))
    if tokens:
        out.print(_token_table(case))


def _words(then: str, now: str) -> Text:
    """The word diff: removed words struck out, added ones bold; marked where there is no colour."""
    line = Text()
    for piece in word_diff(then, now):
        if piece.change is Change.KEPT:
            line.append(_indented(shown(piece.text)))
        elif piece.change is Change.REMOVED:
            line.append(f"[-{_indented(shown(piece.text))}-]", "red strike")
        else:
            line.append(f"{{+{_indented(shown(piece.text))}+}}", "bold green")
    return line


def _indented(text: str) -> str:
    """Further lines below the first one's words."""
    return text.replace("\n", "\n" + " " * 10)


def _print_fork(out: Console, case: Case) -> None:
    found = fork(case)
    if found is None:
        return
    _line(
        out,
        Text.assemble(
            f"  fork    token {found.index + 1}: …{_flat(found.before)}",
            (f"[-{_flat(_piece(found.then))}-]", "red"),
            (f"{{+{_flat(_piece(found.now))}+}}", "green"),
            f"{_flat(found.after_now)}…",
        ),
    )
    if found.alternatives:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("          token")
        table.add_column("then", justify="right")
        table.add_column("now", justify="right")
        for piece, then, now in found.alternatives:
            table.add_row(Text(f"          {_quoted(piece)}"), percent(then), percent(now))
        out.print(table)
    nats = [
        f"{label} {value:.3g}"
        for label, value in (("then", found.margin_then), ("now", found.margin_now))
        if value is not None
    ]
    if nats:
        floor = "not measured" if case.noise_floor is None else f"{case.noise_floor:.2g}"
        _line(out, Text(f"  margin  {', '.join(nats)} nats; noise floor {floor}"))


def _piece(position: Position | None) -> str:
    return "the end" if position is None else position.piece


def _flat(text: str) -> str:
    return shown(text.replace("\n", "⏎").replace("\t", "⇥"))


def _quoted(piece: str) -> str:
    return f"‘{_flat(piece)}’"


def _token_table(case: Case) -> Table:
    """Token by token: then, now, their probabilities, and how far they moved."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("#", "then", "now", "p then", "p now", "Δ nats"):
        table.add_column(head, justify="left" if head in ("then", "now") else "right")
    then = case.then.positions if case.then else ()
    same = True
    for index, (old, new) in enumerate(zip_longest(then, case.now.positions)):
        same = same and old is not None and new is not None and old.token_id == new.token_id
        moved = ""
        if same and old and new and old.logprob is not None and new.logprob is not None:
            moved = f"{new.logprob - old.logprob:+.2g}"
        style = "" if same else "bold" if index == case.first else "yellow"
        table.add_row(
            str(index + 1),
            Text(_quoted(old.piece) if old else "", style),
            Text(_quoted(new.piece) if new else "", style),
            _probability(old),
            _probability(new),
            moved,
        )
    return table


def _probability(position: Position | None) -> str:
    if position is None or position.logprob is None:
        return "–"
    return percent(math.exp(min(position.logprob, 0.0)))


def ask(out: Console, records: Records, read_key: Callable[[], str]) -> Choices:
    """Go through the changes, a key each, and return what was chosen.

    Args:
        read_key: returns one character; raises KeyboardInterrupt for Ctrl-C; `""` at the end of
            the input, which counts as quitting.
    """
    accepted: list[Record] = []
    rejected: list[Record] = []
    decided: set[str] = set()
    total = len(records.pending)
    for group in groups(records.cases):
        for place, record in enumerate(group.records):
            if record.name in decided:
                continue
            _line(out)
            if place == 0:
                _print_group(out, group)
            _print_record(out, record, tokens=False)
            left = [r for r in group.records[place:] if r.name not in decided]
            key = _key(out, record, read_key, number=len(decided) + 1, total=total, left=len(left))
            decided.add(record.name)
            if key == "a":
                accepted.append(record)
            elif key == "r":
                rejected.append(record)
            elif key == "g":
                accepted += left
                decided |= {r.name for r in left}
            elif key == "q":
                return Choices(accepted=tuple(accepted), rejected=tuple(rejected))
    return Choices(accepted=tuple(accepted), rejected=tuple(rejected))


def _key(
    out: Console,
    record: Record,
    read_key: Callable[[], str],
    *,
    number: int,
    total: int,
    left: int,
) -> str:
    while True:
        _line(out, Text(f"\n{number} of {total}  {_KEYS}", style="bold"))
        key = read_key().lower()
        if key in ("", "\x04"):
            return "q"
        if key == "t":
            _print_record(out, record, tokens=True)
        elif key in ("a", "r", "s", "g", "q"):
            words = {
                "a": "accepted", "r": "rejected", "s": "skipped", "q": "quit",
                "g": f"accepted, {left} cases",
            }  # fmt: skip
            _line(out, Text(f"→ {words[key]}", style="dim"))
            return key


@contextlib.contextmanager
def single_keys() -> Iterator[Callable[[], str]]:
    """A reader of single keys from the terminal on standard input; Ctrl-C interrupts as ever."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)  # keys at once, unechoed; signals still arrive
        yield lambda: os.read(descriptor, 1).decode("ascii", "replace")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
