"""Compared cases in `.pending/`: nothing is lost, nothing foreign is written, all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from harness.pending import (
    FOLDER,
    Case,
    Run,
    accept,
    read_case,
    read_records,
    record_case,
    record_run,
    reject,
    snapshots_folder,
)
from harness.snapshot_files import evidence_of, read_pair
from harness.tests.review.factory import CONDITIONS, HOSTILE, a_grid, case, form, recorded
from harness.verdict import Outcome

foreign = st.one_of(
    st.sampled_from([text for text in HOSTILE if "\ud800" not in text]), st.text(max_size=60)
)


_NO_RECORDS = [b"[]", b"{}", b"\n", b"null\nnull\n", b"<<<<<<< HEAD\n", b"[" * 5000 + b"\n"]


def only(root: Path):
    (record,) = read_records(root).cases
    return record


def snapshot_text(root: Path, item: Case) -> bytes:
    return (root / item.snapshot).read_bytes()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(then=foreign, now=foreign, prompt_text=foreign, evidence=foreign)
def test_a_recorded_case_reads_back_equal_whatever_the_model_said(
    tmp_path: Path, then: str, now: str, prompt_text: str, evidence: str
):
    item = case(then=then, now=now, prompt_text=prompt_text, evidence=(evidence,))
    recorded(tmp_path, item)
    assert read_case(only(tmp_path)) == item
    assert all(byte < 0x7F for byte in only(tmp_path).path.read_bytes())


def test_half_a_surrogate_pair_is_written_out(tmp_path: Path):
    recorded(tmp_path, case(now="a \ud800 b \U0001f600", prompt_text="\udfff"))
    found = read_case(only(tmp_path))
    assert found.now.text == "a \\ud800 b \U0001f600"
    assert found.prompt_text == "\\udfff"


def test_every_prompt_and_mode_is_in_the_grid(tmp_path: Path):
    records = read_records(a_grid(tmp_path))
    assert len(records.cases) == 12
    assert [record.outcome for record in records.pending] == [
        Outcome.CHANGED, Outcome.CHANGED, Outcome.DRIFT, Outcome.MISSING,
    ]  # fmt: skip
    assert records.run is not None
    assert records.run.conditions == CONDITIONS


def test_a_held_case_keeps_its_text_and_none_of_its_tokens(tmp_path: Path):
    recorded(tmp_path, case(outcome=Outcome.HELD))
    found = read_case(only(tmp_path))
    assert found.now.text == case(outcome=Outcome.HELD).now.text
    assert found.now.positions == ()
    assert found.accepting == {}


def test_a_case_that_holds_again_is_no_longer_pending(tmp_path: Path):
    recorded(tmp_path, case())
    assert read_records(tmp_path).pending
    recorded(tmp_path, case(outcome=Outcome.HELD))
    assert not read_records(tmp_path).pending


def test_the_folder_is_ignored_by_git(tmp_path: Path):
    recorded(tmp_path, case())
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    status = subprocess.run(
        ["git", "-C", tmp_path, "status", "--short"], capture_output=True, text=True, check=True
    ).stdout
    assert status == ""


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "a//b", "../x", "a/../b", ".run", "a\nb", "x" * 300, "\ud800"]
)
def test_a_name_that_is_no_path_below_the_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="no name of a case"):
        record_case(tmp_path, dataclasses.replace(case(), name=name))
    assert not list(tmp_path.rglob("*.json"))


def test_the_same_change_in_two_modes_is_one_group_and_another_is_not(tmp_path: Path):
    recorded(
        tmp_path,
        case(mode="instruct"),
        case(mode="stacked"),
        case(mode="style", now="Black tea proffers a sumptuous savour upon the palate."),
    )
    groups = {record.mode: record.group for record in read_records(tmp_path).cases}
    assert groups["instruct"] == groups["stacked"] != groups["style"]


def _record_many(root: str, worker: int) -> None:
    for number in range(25):
        record_run(Path(root), Run(conditions=CONDITIONS))
        record_case(Path(root), case(prompt=f"own-{worker}-{number}"))
        record_case(Path(root), case(prompt="shared", now=f"said by {worker} {number}."))


def test_sessions_that_record_at_once_lose_and_mix_nothing(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_record_many, args=(str(tmp_path), n)) for n in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        records = read_records(tmp_path)
        assert records.broken == ()  # a reader never sees half a record
    assert [worker.exitcode for worker in workers] == [0] * 4
    records = read_records(tmp_path)
    assert len(records.cases) == 4 * 25 + 1
    assert all(read_case(record) for record in records.cases)
    assert not list(tmp_path.rglob(".staging-*"))


def test_a_file_that_comes_and_goes_while_it_is_read_is_no_broken_one(tmp_path: Path):
    recorded(tmp_path, case())
    places = [tmp_path / FOLDER / ".run.json", tmp_path / FOLDER / f"{case().name}.json"]
    staged = [(place, place.read_bytes()) for place in places]
    done = threading.Event()

    def come_and_go() -> None:
        beside = tmp_path / FOLDER / ".beside"
        while not done.is_set():
            for place, data in staged:
                place.unlink()
                beside.write_bytes(data)
                beside.rename(place)

    writer = threading.Thread(target=come_and_go)
    writer.start()
    try:
        found = [read_records(tmp_path) for _ in range(3000)]
    finally:
        done.set()
        writer.join()
    assert {records.broken for records in found} == {()}
    assert {len(records.cases) for records in found} | {0, 1} == {0, 1}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_named_and_the_others_are_still_shown(tmp_path: Path, data):
    recorded(tmp_path, case(), case(mode="style"))
    path = tmp_path / FOLDER / f"{case().name}.json"
    sound = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "text", "insert"]))
    place = data.draw(st.integers(0, len(sound) - 1))
    if kind == "cut":
        broken = sound[:place]
    elif kind == "flip":
        broken = sound[:place] + bytes([sound[place] ^ 1 << data.draw(st.integers(0, 7))])
        broken += sound[place + 1 :]
    elif kind == "insert":
        broken = sound[:place] + data.draw(st.binary(min_size=1, max_size=9)) + sound[place:]
    else:
        broken = data.draw(st.one_of(st.binary(max_size=50), st.sampled_from(_NO_RECORDS)))
    path.write_bytes(broken)
    records = read_records(tmp_path)
    other = [record for record in records.cases if record.mode == "style"]
    assert len(other) == 1
    if records.broken:
        assert [item.path for item in records.broken] == [path]
        assert records.broken[0].fault
    else:
        (record,) = (record for record in records.cases if record.mode != "style")
        with contextlib.suppress(InputError):  # and no other error
            read_case(record)


def test_what_is_no_file_is_named(tmp_path: Path):
    recorded(tmp_path, case())
    os.mkfifo(tmp_path / FOLDER / "pipe.json")
    (tmp_path / FOLDER / ".run.json").write_text("[]")
    records = read_records(tmp_path)
    assert [item.path.name for item in records.broken] == [".run.json", "pipe.json"]
    assert len(records.cases) == 1
    (tmp_path / FOLDER / ".run.json").unlink()
    os.mkfifo(tmp_path / FOLDER / ".run.json")  # a pipe would wait for ever
    records = read_records(tmp_path)
    assert [item.fault for item in records.broken] == ["cannot be read: is no regular file"] * 2


# ---- accepting


def test_accepting_writes_the_snapshot_and_its_evidence(tmp_path: Path):
    item = case(root=tmp_path)
    recorded(tmp_path, item)
    (decided,) = accept(tmp_path, [only(tmp_path)])
    assert decided.refused is None
    for path, data in item.accepting.items():
        assert (tmp_path / path).read_bytes() == data
    assert only(tmp_path).decision == "accepted"
    assert not read_records(tmp_path).pending
    assert not list(tmp_path.rglob(".staging-*"))


def test_rejecting_leaves_the_snapshot(tmp_path: Path):
    item = case(root=tmp_path)
    before = snapshot_text(tmp_path, item)
    recorded(tmp_path, item)
    (decided,) = reject(tmp_path, [only(tmp_path)])
    assert decided.refused is None
    assert snapshot_text(tmp_path, item) == before
    assert only(tmp_path).decision == "rejected"
    assert not read_records(tmp_path).pending


def refused(root: Path, item: Case, record=None) -> str:
    """Why *item* is not accepted; its files are as they were."""
    before = {path: (root / path).read_bytes() for path in item.accepting if (root / path).exists()}
    (decided,) = accept(root, [record or only(root)])
    for path in item.accepting:
        now = (root / path).read_bytes() if (root / path).exists() else None
        assert now == before.get(path)
    assert decided.refused is not None
    assert decided.files == ()
    return decided.refused


def test_a_snapshot_that_changed_since_the_comparison_is_not_overwritten(tmp_path: Path):
    item = case(root=tmp_path)
    recorded(tmp_path, item)
    (tmp_path / item.snapshot).write_bytes(form("what somebody else accepted"))
    assert "has changed since it was compared" in refused(tmp_path, item)
    assert read_records(tmp_path).pending


def test_a_snapshot_that_came_or_went_since_the_comparison_is_not_overwritten(tmp_path: Path):
    new = case(then=None, outcome=Outcome.MISSING)
    recorded(tmp_path, new)
    (tmp_path / new.snapshot).parent.mkdir(parents=True)
    (tmp_path / new.snapshot).write_bytes(form("came meanwhile"))
    assert "has changed" in refused(tmp_path, new)
    gone = case(root=tmp_path)
    recorded(tmp_path, gone)
    (tmp_path / gone.snapshot).unlink()
    assert "has changed" in refused(tmp_path, gone)


@pytest.mark.parametrize("key", ["base", "adapter_style"])
def test_what_another_stack_made_than_the_newest_run_is_refused(tmp_path: Path, key: str):
    item = case(root=tmp_path, conditions={**CONDITIONS, key: "another"})
    recorded(tmp_path, item)
    reason = refused(tmp_path, item)
    assert f"was made with {key} another" in reason
    assert "run the suites again" in reason


def test_without_a_recorded_run_nothing_is_accepted(tmp_path: Path):
    item = case(root=tmp_path)
    record_case(tmp_path, item)
    assert "no run is recorded" in refused(tmp_path, item)


@pytest.mark.parametrize(
    "then", [{**CONDITIONS, "base": "another"}, {"base": "b" * 16, "adapter_style": "5" * 16}]
)
def test_incomparable_by_base_or_adapters_is_refused(tmp_path: Path, then: dict[str, str]):
    item = case(root=tmp_path, outcome=Outcome.INCOMPARABLE, then_conditions=then)
    recorded(tmp_path, item)
    assert "pytest --snapshot-update" in refused(tmp_path, item)


def test_incomparable_by_prompt_or_settings_is_accepted(tmp_path: Path):
    item = case(
        root=tmp_path,
        outcome=Outcome.INCOMPARABLE,
        then_conditions={**CONDITIONS, "settings": "other", "prompt": "other"},
    )
    recorded(tmp_path, item)
    (decided,) = accept(tmp_path, [only(tmp_path)])
    assert decided.refused is None


def test_a_retrained_adapter_is_accepted_when_the_newest_run_has_it(tmp_path: Path):
    now = {**CONDITIONS, "adapter_style": "retrained"}
    item = case(root=tmp_path, conditions=now)
    recorded(tmp_path, item, conditions=now)
    (decided,) = accept(tmp_path, [only(tmp_path)])
    assert decided.refused is None


def test_a_case_recorded_anew_while_it_is_reviewed_is_not_decided(tmp_path: Path):
    item = case(root=tmp_path)
    recorded(tmp_path, item)
    shown = only(tmp_path)
    newer = case(root=tmp_path, now="What a run said meanwhile.")
    recorded(tmp_path, newer)
    assert "anew" in refused(tmp_path, newer, shown)
    (rejected,) = reject(tmp_path, [shown])
    assert "anew" in (rejected.refused or "")
    assert read_case(only(tmp_path)) == newer


def test_a_decided_case_is_not_decided_again(tmp_path: Path):
    item = case(root=tmp_path)
    recorded(tmp_path, item)
    reject(tmp_path, [only(tmp_path)])
    assert "rejected already" in refused(tmp_path, item)


@pytest.mark.parametrize(
    "path",
    ["/tmp/outside.toml", "../outside.toml", "snapshots/../pyproject.toml", "pyproject.toml",
     "snapshots/linked/x.toml", "snapshots", ".github/workflows/x.yml", "snapshots\\x", "."],
)  # fmt: skip
def test_a_hostile_pending_file_writes_nothing_outside_the_snapshots(tmp_path: Path, path: str):
    root = tmp_path / "root"
    (root / "snapshots").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "snapshots" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "pyproject.toml").write_text("[project]\n")
    hostile = dataclasses.replace(
        case(then=None, outcome=Outcome.MISSING),
        accepting={Path(path): b"owned"},
        accepted_sha256={
            Path(path): hashlib.sha256(b"[project]\n").hexdigest() if "pyproject" in path else ""
        },
    )
    recorded(root, hostile)
    before = {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and FOLDER not in p.parts
    }
    (decided,) = accept(root, [only(root)])
    assert decided.refused is not None
    assert "no file below snapshots/" in decided.refused
    after = {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and FOLDER not in p.parts
    }
    assert after == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pyproject.toml", '[tool.pytest.ini_options]\nlora_snapshots = "golden"\n'),
        ("pytest.ini", "[pytest]\nlora_snapshots = golden\n"),
        ("setup.cfg", "[tool:pytest]\nlora_snapshots = golden\n"),
        ("tox.ini", "[pytest]\nlora_snapshots = golden\n"),
    ],
)
def test_the_snapshots_folder_is_the_one_that_pytest_is_told(tmp_path: Path, name: str, text: str):
    assert snapshots_folder(tmp_path) == tmp_path / "snapshots"
    (tmp_path / name).write_text(text)
    assert snapshots_folder(tmp_path) == tmp_path / "golden"


def test_a_pending_file_that_writes_more_than_a_snapshot_is_refused(tmp_path: Path):
    item = case(root=tmp_path)
    more = {**item.accepting, Path("snapshots/another.toml"): b"more"}
    digests = {**item.accepted_sha256, Path("snapshots/another.toml"): ""}
    recorded(tmp_path, dataclasses.replace(item, accepting=more, accepted_sha256=digests))
    assert "other files than the snapshot" in refused(tmp_path, item)
    assert not (tmp_path / "snapshots/another.toml").exists()


def test_evidence_of_another_text_is_refused(tmp_path: Path):
    item = case(root=tmp_path)
    other = {**item.accepting, item.snapshot: form("not what the evidence is of")}
    recorded(tmp_path, dataclasses.replace(item, accepting=other))
    assert "another text's" in refused(tmp_path, item)


@pytest.mark.parametrize("writes", range(4))
def test_when_a_write_fails_the_old_snapshot_or_the_new_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    item = case(root=tmp_path)
    recorded(tmp_path, item)
    replace, done = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        if "snapshots" in Path(target).parts and len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing)
        (decided,) = accept(tmp_path, [only(tmp_path)])
    texts = {form(item.then.text), form(item.now.text)} if item.then else set()
    pair = read_pair(tmp_path / item.snapshot)
    assert pair.text in texts
    assert evidence_of(pair, where=item.snapshot) == b"evidence of " + pair.text
    if decided.refused is not None:
        assert "No space left" in decided.refused
        (decided,) = accept(tmp_path, [only(tmp_path)])
        assert decided.refused is None
    assert snapshot_text(tmp_path, item) == form(item.now.text)
    assert not list(tmp_path.rglob(".staging-*"))


_KILLED = """
import os, sys
from pathlib import Path
from harness.pending import accept, read_records
root, replace, done = Path(sys.argv[1]), Path.replace, []
def dying(self, target):
    if "snapshots" in target.parts:
        if len(done) == int(sys.argv[2]): os._exit(9)
        done.append(target)
    return replace(self, target)
Path.replace = dying
accept(root, read_records(root).pending)
"""


@pytest.mark.parametrize("writes", range(3))
@pytest.mark.parametrize("then", ["What was accepted.", None])
def test_a_killed_acceptance_leaves_the_old_snapshot_or_the_new_and_can_be_done_again(
    tmp_path: Path, writes: int, then: str | None
):
    outcome = Outcome.CHANGED if then else Outcome.MISSING
    item = case(then=then, outcome=outcome, root=tmp_path)
    recorded(tmp_path, item)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(writes)], check=False
    )
    if then is None and writes == 2:  # a new snapshot is two files: nothing was left to interrupt
        assert killed.returncode == 0
        return
    assert killed.returncode == 9
    pair = read_pair(tmp_path / item.snapshot)
    if pair.text is None:
        assert then is None
    else:
        assert evidence_of(pair, where=item.snapshot) == b"evidence of " + pair.text
    (decided,) = accept(tmp_path, [only(tmp_path)])
    assert decided.refused is None
    assert snapshot_text(tmp_path, item) == form(item.now.text)
    assert not read_records(tmp_path).pending
