"""Accepted completions: what is stored is read back, and whatever else lies there is said."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.completion import Application, Completion, GenerationSettings, Prompt, StopReason
from harness.errors import InputError
from harness.snapshot import (
    draft_tokens,
    read_snapshot,
    read_stored,
    snapshot_name,
    snapshot_of,
    stored_form,
    write_form,
)
from harness.snapshot_files import sidecar_of, write_pair

# TOML cannot hold lone surrogates, and no tokenizer decodes to them.
texts = st.text(st.characters(exclude_categories=("Cs",)))
ids = st.lists(st.integers(0, 200_000), max_size=8).map(tuple)


def completion(**changes):
    made = Completion(
        prompt=Prompt(id="fox", text="Where is the fox?"),
        mode="stacked",
        application=Application.LIVE,
        prompt_token_ids=(1, 2),
        token_ids=(3, 4, 5),
        text="In the wood.",
        stop_reason=StopReason.EOS,
        settings=GenerationSettings(max_new_tokens=8),
    )
    return replace(made, **changes)


@given(text=texts, tokens=ids, prompt=texts, reason=st.sampled_from(StopReason))
def test_stored_form_is_read_back_exactly(text, tokens, prompt, reason):
    snapshot = snapshot_of(
        completion(
            text=text, token_ids=tokens, stop_reason=reason, prompt=Prompt(id="fox", text=prompt)
        ),
        {"device": "cpu"},
    )
    assert read_snapshot(write_form(snapshot), where="x") == snapshot


@given(chosen=st.builds(GenerationSettings, seed=st.none() | st.integers(0, 9),
                          stop_strings=st.lists(st.text("ab", min_size=1)).map(tuple)))  # fmt: skip
def test_settings_are_stored_without_nulls(chosen):
    snapshot = snapshot_of(completion(settings=chosen), {})
    assert read_snapshot(write_form(snapshot), where="x").settings == snapshot.settings


@given(st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=6, unique=True))
def test_no_two_cases_share_a_file(cases):
    names = [snapshot_name(*case) for case in cases]
    assert len(set(names)) == len(names)
    assert not any(set('/\\?*:|"<>') & set(name) for name in names)


FORM = write_form(snapshot_of(completion(), {}))


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        ("", "has form None"),
        (FORM.replace("form = 2", "form = 1"), "has form 1"),
        (FORM.replace("prompt_text", "prompt_txt"), "'prompt_text' is missing"),
        (FORM.replace("3 4 5", "3 x 5"), "malformed"),
        (FORM.replace("3 4 5", "3 -4 5"), "negative"),
        (FORM.replace('"eos"', '"whim"'), "malformed"),
        (FORM.replace("[tokens]", "<<<<<<< HEAD\n[tokens]"), "line 10: a merge-conflict marker"),
        (FORM[:220], "not valid TOML"),
        (FORM.replace('prompt = "fox"', "prompt = 3"), "malformed: 3 is not a string"),
        (FORM.replace("[made_with]", "[made]"), "'made_with' is missing"),
    ],
    ids=lambda value: value if len(value) < 40 else "form",
)
def test_broken_form_is_unreadable_and_says_where(form, complaint):
    with pytest.raises(InputError, match=complaint):
        read_snapshot(form, where="x.toml")


def evidence(rows=3):
    import numpy as np

    from harness.evidence import Evidence

    ids = np.arange(3, 3 + rows)[:, None] + np.arange(5)
    logprobs = np.tile(np.log([0.5, 0.2, 0.1, 0.05, 0.01]), (rows, 1))
    return Evidence(logprobs=logprobs[:, 0].copy(), top_ids=ids, top_logprobs=logprobs)


def accepted_at(path, **changes):
    """Accept a completion at *path*; gives its snapshot."""
    snapshot = snapshot_of(completion(**{"evidence": evidence(), **changes}), {"dtype": "float32"})
    form = stored_form(snapshot)
    write_pair(path, str(form).encode(), form.evidence)
    return snapshot


def test_snapshot_and_evidence_are_read_back_together(tmp_path):
    snapshot = accepted_at(tmp_path / "case.toml")
    found = read_stored(tmp_path / "case.toml")
    assert found.fault is None
    assert found.snapshot == snapshot
    assert found.snapshot.evidence.logprobs == pytest.approx(snapshot.evidence.logprobs, abs=1e-3)
    assert read_stored(tmp_path / "absent.toml") is None


def test_completion_without_evidence_is_kept_without(tmp_path):
    accepted_at(tmp_path / "case.toml", evidence=None)
    found = read_stored(tmp_path / "case.toml")
    assert found.fault is None
    assert found.snapshot.evidence is None


def test_completion_that_looks_like_a_merge_conflict_is_no_conflict(tmp_path):
    text = "git says:\n<<<<<<< HEAD\none\n=======\ntwo\n>>>>>>> branch\n"
    accepted_at(tmp_path / "case.toml", text=text)
    assert read_stored(tmp_path / "case.toml").snapshot.text == text


def test_a_model_of_nan_has_nothing_to_accept():
    from dataclasses import replace as changed

    broken = evidence()
    broken.logprobs[0] = float("nan")
    snapshot = snapshot_of(completion(evidence=broken), {})
    with pytest.raises(InputError, match="not finite"):
        stored_form(snapshot)
    assert str(stored_form(changed(snapshot, evidence=None))) == write_form(snapshot)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b""), "has form None"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not valid TOML"),
        (lambda path: path.write_bytes(path.read_bytes()[:250]), "not valid TOML"),
        (lambda path: edit(path, b"In the wood.", b"In the barn."), "line 8: was edited"),
        (lambda path: edit(path, b'"3 4 5"', b'"3 9 5"'), "line 12: was edited"),
        (lambda path: edit(path, b"[tokens]", b"<<<<<<< HEAD\n[tokens]"), "line 10: a merge"),
        (lambda path: edit(path, b"\n", b"\r\n"), "line ends were converted"),
        (lambda path: edit(path, b'"3 4 5"', b'"' + b"9" * 5000 + b'"'), "malformed"),
        (lambda path: edit(path, b"[tokens]", b"x = " + b"[" * 5000), "not valid TOML"),
        (lambda path: sidecar_of(path).unlink(), "is missing beside its snapshot"),
        (lambda path: sidecar_of(path).write_bytes(b""), "is damaged"),
        (lambda path: sidecar_of(path).write_bytes(b"<<<<<<< HEAD"), "is damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be read: Too many"),
        (lambda path: other_sidecar(path), "the evidence is another text's"),
    ],
)
def test_damaged_snapshot_is_unreadable_and_says_where(tmp_path, damage, complaint):
    path = tmp_path / "case.toml"
    accepted_at(path)
    damage(path)
    found = read_stored(path)
    assert found.snapshot is None
    assert complaint in str(found.fault)
    assert "case." in str(found.fault)


def edit(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


def other_sidecar(path):
    accepted_at(path.with_name("other.toml"), token_ids=(9, 9, 9), text="Nowhere.")
    sidecar_of(path).write_bytes(sidecar_of(path.with_name("other.toml")).read_bytes())


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_damage_is_taken_for_a_snapshot(tmp_path_factory, data):
    """Bytes flipped, cut out, doubled and put in, in either file: what was accepted, or a fault."""
    path = tmp_path_factory.mktemp("damage") / "case.toml"
    snapshot = accepted_at(path)
    victim = data.draw(st.sampled_from([path, sidecar_of(path)]))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 40, len(content))))
        content[start:end] = data.draw(
            st.one_of(st.binary(max_size=8), st.just(bytes(content[start:end]) * 2),
                      st.sampled_from([b"\n<<<<<<< a\n", b"\r\n", b'"""', b"\x00", b"\xe2\x80"]))
        )  # fmt: skip
    victim.write_bytes(content)
    found = read_stored(path)
    assert (found.snapshot is None) != (found.fault is None)
    if found.fault is None:
        assert found.snapshot == snapshot
    draft_tokens(path)  # raises nothing


def test_names_of_any_length_fit_into_a_file_system(tmp_path):
    names = {snapshot_name("p" * n, "q" * n, "r" * n) for n in (60, 64, 65, 300, 301)}
    assert len(names) == 5
    for name in names:
        (tmp_path / f"{name}.evidence").touch()


def test_evidence_that_was_stored_damaged_is_said(tmp_path):
    """The sidecar is whole and the text's own, and what it holds is no evidence."""
    path = tmp_path / "case.toml"
    write_pair(path, str(accepted_form()).encode(), b"no evidence")
    found = read_stored(path)
    assert found.snapshot is None
    assert "case.toml: its evidence is damaged" in str(found.fault)


def accepted_form(**changes):
    return stored_form(snapshot_of(completion(**{"evidence": evidence(), **changes}), {}))


@pytest.fixture
def extension(tmp_path):
    """syrupy's store on a folder; the judge tells what it was given."""
    from harness.snapshot import snapshot_extension

    def judge(path, accepted, fresh):
        return () if accepted == fresh else (f"{path.name}: {accepted} is not {fresh.text}",)

    return snapshot_extension(tmp_path, lambda made: snapshot_of(made, {}), judge)


def test_only_completions_are_snapshots(extension):
    with pytest.raises(TypeError, match="holds a Completion, not str"):
        extension().serialize("In the wood.")


def test_what_is_stored_matches_and_what_differs_is_told_by_the_judge(extension, tmp_path):
    store, path = extension(), str(tmp_path / "case.toml")
    fresh = store.serialize(completion(evidence=evidence()))
    assert store.read_snapshot_data_from_location(snapshot_location=path) is None
    assert list(store.diff_lines(serialized_data=fresh, snapshot_data="")) == [
        "missing: nothing is accepted yet; now:", "In the wood.",
    ]  # fmt: skip
    extension.write_snapshot(snapshot_location=path, snapshots=[(fresh, path, 0)])
    held = store.read_snapshot_data_from_location(snapshot_location=path)
    assert store.matches(serialized_data=fresh, snapshot_data=held)
    other = store.serialize(completion(text="In the barn."))
    assert not store.matches(serialized_data=other, snapshot_data=held)
    (line,) = store.diff_lines(serialized_data=other, snapshot_data=held)
    assert line.startswith("case.toml: ")
    assert line.endswith("is not In the barn.")


def test_a_completion_of_nan_is_not_written(extension, tmp_path):
    broken = evidence()
    broken.logprobs[0] = float("nan")
    form = extension().serialize(completion(evidence=broken))
    with pytest.raises(InputError, match="not finite"):
        extension.write_snapshot(
            snapshot_location=str(tmp_path / "x.toml"), snapshots=[(form, "", 0)]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_case_is_called_by_its_name_or_by_its_test(extension, tmp_path):
    from types import SimpleNamespace

    place = SimpleNamespace(basename="test_it", snapshot_name="test_it[stacked]")
    assert extension.get_file_basename(test_location=place, index="preset--fox--base") == (
        "preset--fox--base"
    )
    unnamed = [extension.get_file_basename(test_location=place, index=n) for n in (0, 1)]
    assert len(set(unnamed)) == 2, "two snapshots of one test lie apart"
    assert extension.dirname(test_location=place) == str(tmp_path / "test_it")
