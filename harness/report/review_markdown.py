"""The review as a pull request's comment, and as annotations at the snapshot files.

GitHub cuts comments at 65,536 characters, brings mentions, references, addresses and images in
them alive, and obeys `::` lines in a log. So the text stays under a limit, whole cases left out and
counted, and foreign text stands only where Markdown and GitHub leave it alone: inside code. Knows
nothing of GitHub's interface, nor who posts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from harness.display.markdown import code_block
from harness.display.terminal import shown
from harness.display.textdiff import word_diff_line
from harness.errors import InputError
from harness.pending import Case, Record, Records, read_case
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

__all__ = ["LIMIT", "MARKER", "annotation_lines", "as_markdown", "length"]

#: Characters of the whole comment, counted as UTF-16 units, of which GitHub allows 65,536.
LIMIT = 59_000
#: By which the comment is found again to be updated; invisible.
MARKER = "<!-- lora-stack review -->"
_GRID_SHARE = 12_000
_ANNOTATIONS = 10  # GitHub shows no more of one kind in a step
_FOOT = 600  # characters kept for the last lines


def as_markdown(records: Records, *, limit: int = LIMIT) -> str:
    """The comment: what is pending, the grid, each change folded; under *limit* characters."""
    head = f"{MARKER}\n### LoRA stack review: {summary(records)}\n\n{_grid(records)}\n"
    head += _broken(records)
    parts = [head]
    room = limit - length(head) - _FOOT
    left_out = 0
    for group in groups(records.cases):
        for part in _group(group):
            if length(part) > room:
                left_out += 1
                continue
            parts.append(part)
            room -= length(part)
    return "".join(parts) + _foot(records, left_out)


def length(text: str) -> int:
    """The length of *text* in UTF-16 units, the largest of the ways in which it is counted."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _foot(records: Records, left_out: int) -> str:
    lines = []
    if left_out:
        were = "change is" if left_out == 1 else "changes are"
        lines.append(f"{left_out} more {were} left out here; the review's page holds all.")
    if records.pending:
        lines.append(
            "To accept: `pytest suites`, then `lora-stack review`; or, for a change that is meant, "
            "`lora-stack review --accept '*'`."
        )
    return "".join(f"\n{line}\n" for line in lines)


def _grid(records: Records) -> str:
    """Prompts × modes with a verdict that is not held; as many rows as fit, the rest counted."""
    columns = modes(records)
    kinds = ", ".join(f"{SIGNS[name]} {count} {name}" for name, count in counts(records).items())
    found = [
        row for row in rows(records)
        if any(display(r) not in ("held", "skipped") for r in row.cells.values())
    ]  # fmt: skip
    held = len(rows(records)) - len(found)
    lines = [f"{kinds}\n"]
    if found:
        lines.append("| prompt | " + " | ".join(_cell(mode) for mode in columns) + " |")
        lines.append("|" + " --- |" * (len(columns) + 1))
    several = len({(row.folder, row.preset) for row in found}) > 1
    room = _GRID_SHARE
    for place, row in enumerate(found):
        title = f"{row.folder} · {row.preset} · {row.prompt}" if several else row.prompt
        cells = [_cell(title)]
        for mode in columns:
            record = row.cells.get(mode)
            name = display(record) if record else ""
            cells.append(f"{SIGNS.get(name, '')} {name}".strip())
        line = "| " + " | ".join(cells) + " |"
        room -= length(line)
        if room < 0:
            lines.append(f"\n{len(found) - place} more prompts are left out of the table.")
            break
        lines.append(line)
    if held:
        lines.append(f"\n{held} {'prompt' if held == 1 else 'prompts'} held in every mode.")
    return "\n".join(lines) + "\n"


def _broken(records: Records) -> str:
    lines = [
        f"- {_code(broken.path.relative_to(records.root).as_posix())}: {_code(broken.fault)}"
        for broken in records.broken[:20]
    ]
    if not lines:
        return ""
    more = len(records.broken) - len(lines)
    lines += [f"- and {more} more"] if more else []
    return "\nPending files that cannot be read:\n\n" + "\n".join(lines) + "\n"


def _group(group: Group) -> Iterable[str]:
    """One part a change: the first case in full; the others of its group by name."""
    head, *others = group.records
    try:
        case = read_case(head)
    except InputError as error:
        yield f"\n- {_code(head.name)}: {_code(unread(error))}\n"
        return
    also = [f"{_plain(r.prompt)} × {_plain(r.mode)}" for r in others]
    title = f"{SIGNS[group.outcome.value]} {group.outcome.value}: "
    title += f"{_plain(case.prompt)} × {_plain(case.mode)}"
    if also:
        title += f", and {len(also)} more with the same change"
    lines = [f"\n<details><summary>{title}</summary>\n"]
    if also:
        listed = [_listed(record) for record in others[:50]]
        listed += [f"and {len(others) - 50} more"] if len(others) > 50 else []
        lines += ["The same change in:\n", code_block("\n".join(listed)), ""]
    lines += [*_case(case, head), "\n</details>\n"]
    yield "\n".join(lines)


def _listed(record: Record) -> str:
    drifted = record.outcome is Outcome.DRIFT and record.evidence
    amount = f": {_bounded(record.evidence[0])}" if drifted else ""
    return f"{record.prompt} × {record.mode}{amount}"


def _case(case: Case, record: Record) -> Iterable[str]:
    yield f"{_code(record.snapshot)}\n"
    yield "prompt\n"
    yield code_block(case.prompt_text)
    if case.then is None:
        yield "\nnow\n"
        yield code_block(case.now.text)
        yield from _evidence(case)
        return
    if case.then.text == case.now.text:
        yield "\nthe words, the same then and now\n"
    else:
        yield "\nthe words, `[-then-]{+now+}`\n"
    yield code_block(word_diff_line(case.then.text, case.now.text))
    if case.then.stop_reason != case.now.stop_reason:
        stops = f"{case.then.stop_reason} → {case.now.stop_reason}"
        yield f"\nstop reason: {_code(stops)}"
    yield from _fork(case)
    yield from _evidence(case)


def _evidence(case: Case) -> Iterable[str]:
    if case.verdict.evidence:
        yield "\nevidence\n"
        yield code_block("\n".join(case.verdict.evidence))


def _fork(case: Case) -> Iterable[str]:
    found = fork(case)
    if found is None:
        return
    then = found.then.piece if found.then else "the end"
    now = found.now.piece if found.now else "the end"
    yield f"\ntoken {found.index + 1} is the first that differs\n"
    words = [f"…{found.before}[-{then}-]{{+{now}+}}{found.after_now}…"]
    if found.alternatives:
        words += ["", f"{'then':>9} {'now':>9}"]
    words += [
        f"{percent(old):>9} {percent(new):>9}  {shown(piece)!r}"
        for piece, old, new in found.alternatives
    ]
    yield code_block("\n".join(words))
    margins = [
        f"{label} {value:.3g}"
        for label, value in (("then", found.margin_then), ("now", found.margin_now))
        if value is not None
    ]
    if margins:
        floor = "not measured" if case.noise_floor is None else f"{case.noise_floor:.2g}"
        yield f"\nmargin of the best token: {', '.join(margins)} nats; noise floor {floor}"


def _flat(text: str) -> str:
    return " ".join(shown(text).split())


def _code(text: str) -> str:
    """*text* on one line in a code span that it cannot end."""
    flat = _flat(text) or "–"
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"{fence}{flat}{fence}"


def _cell(text: str) -> str:
    """A code span for a table, where `|` would end the cell."""
    return _code(text).replace("|", "¦")


def _plain(text: str) -> str:
    """*text* inside an HTML block: escaped, on one line, and in `<code>`, which GitHub leaves."""
    return f"<code>{html.escape(_flat(text)) or '–'}</code>"


def annotation_lines(records: Records) -> list[str]:
    """`::error` lines that point at the snapshots, as GitHub Actions reads them in a log."""
    lines = []
    pending = [record for group in groups(records.cases) for record in group.records]
    for record in pending[: _ANNOTATIONS - 1]:
        then, now = record.stops
        stops = [f"stop: {then} → {now}"] if then and then != now else []
        message = "\n".join(map(_bounded, (record.change, *stops, *record.evidence[:8])))
        title = f"{record.outcome.value}: {record.prompt} × {record.mode}"
        lines.append(
            f"::error file={_property(record.snapshot)},title={_property(_bounded(title))}"
            f"::{_message(message)}"
        )
    more = len(records.pending) - len(lines)
    if more:
        lines.append(f"::error title=lora-stack review::{more} more pending")
    return lines


def _bounded(text: str, characters: int = 300) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def _message(text: str) -> str:
    safe = shown(text).replace("%", "%25")
    return safe.replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
