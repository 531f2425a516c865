"""Every verdict on snapshots, from real runs of pytest; through the plugin, to what is reviewed."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from harness.tests.test_plugin import GENERATION, accept_otherwise


@pytest.fixture
def project(pytester):
    pytester.makefile(".txt", p="Hello\nHow are you?\n")
    pytester.makepyfile(test_it=GENERATION)
    return pytester


def arguments(stack):
    return [
        f"--base-model={stack.base}",
        *(f"--adapter={name}={path}" for name, path in stack.adapters.items()),
        "--prompts=p.txt", "--max-new-tokens=4", "-p", "no:cacheprovider",
    ]  # fmt: skip


def verdicts(project):
    """Verdict and evidence of every case, as a review reads them."""
    from harness.pending import read_records

    return {
        record.name.split("--", 1)[1]: (record.outcome.value, "\n".join(record.evidence))
        for record in read_records(project.path).cases
    }


def contents(project):
    folder = project.path / "snapshots"
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot_file(project, case):
    return project.path / "snapshots" / "test_it" / f"p--{case}.toml"


def twin_in_the_head(base, token, other):
    """Give *other* the row of *token*: whatever the model reads, the two are equally probable."""
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][other] = weights["lm_head.weight"][token]
    save_file(weights, file, metadata={"format": "pt"})


def say_the_twin(file, other):
    """Accept what a machine says on which *other*, the twin of the last token, came first."""
    from harness.snapshot import read_stored

    snapshot = read_stored(file).snapshot
    evidence = snapshot.evidence
    top_ids = evidence.top_ids.copy()
    assert top_ids[-1, 1] == other
    top_ids[-1, :2] = top_ids[-1, 1::-1]
    accept_otherwise(
        file,
        token_ids=(*snapshot.token_ids[:-1], other),
        text=snapshot.text[:-1] + "?",
        evidence=replace(evidence, top_ids=top_ids),
    )


def test_each_verdict_comes_of_what_it_stands_for(project, tiny, tmp_path):
    from harness.evidence import Evidence
    from harness.pending import read_case, read_records
    from harness.snapshot import read_stored
    from harness.snapshot_files import sidecar_of

    stack = replace(tiny, base=tmp_path / "base")
    shutil.copytree(tiny.base, stack.base)
    project.runpytest_inprocess("--snapshot-update", *arguments(stack)).assert_outcomes(passed=8)
    tied = snapshot_file(project, "prompt-1--stacked")
    token, other = read_stored(tied).snapshot.token_ids[-1], 255
    assert token < other  # of equal ones `generate` takes the first
    twin_in_the_head(stack.base, token, other)
    project.runpytest_inprocess("--snapshot-update", *arguments(stack)).assert_outcomes(passed=8)

    say_the_twin(tied, other)
    accept_otherwise(snapshot_file(project, "prompt-1--style"), token_ids=(1, 2, 3, 4), text="four")
    drifted = snapshot_file(project, "prompt-1--instruct")
    seen = read_stored(drifted).snapshot.evidence
    less = {"logprobs": seen.logprobs - 0.05, "top_logprobs": seen.top_logprobs - np.full(5, 0.05)}
    accept_otherwise(drifted, evidence=Evidence(top_ids=seen.top_ids, **less))
    accept_otherwise(snapshot_file(project, "prompt-2--base"), settings={"max_new_tokens": 5})
    gone = snapshot_file(project, "prompt-2--style")
    gone.unlink()
    sidecar_of(gone).unlink()
    edited = snapshot_file(project, "prompt-2--instruct")
    edited.write_bytes(edited.read_bytes().replace(b"prompt-2", b"prompt-3"))
    sidecar_of(snapshot_file(project, "prompt-2--stacked")).unlink()

    before = contents(project)
    result = project.runpytest_inprocess(*arguments(stack))
    result.assert_outcomes(passed=2, failed=6)
    assert contents(project) == before  # nobody asked for another
    found = verdicts(project)
    assert {case: outcome for case, (outcome, _) in found.items()} == {
        "prompt-1--base": "held",
        "prompt-1--stacked": "tie",
        "prompt-1--style": "changed",
        "prompt-1--instruct": "drift",
        "prompt-2--base": "incomparable",
        "prompt-2--style": "missing",
        "prompt-2--instruct": "unreadable",
        "prompt-2--stacked": "unreadable",
    }
    told = {case: evidence for case, (_, evidence) in found.items()}
    assert "token 4 is the first that differs" in told["prompt-1--stacked"]
    assert "a tie is within" in told["prompt-1--stacked"]
    assert "(1) accepted" in told["prompt-1--style"]
    # How probable the accepted token is now is known, though it is none of the first five.
    now = next(line for line in told["prompt-1--style"].split("\n") if line.startswith("now: "))
    assert re.match(r"now: '.' \d+\.\d\d%, '", now)
    assert "not among" not in now
    changed = next(r for r in read_records(project.path).cases if "prompt-1--style" in r.name)
    assert 1 in {other.token_id for other in read_case(changed).now.positions[0].alternatives}
    assert "log-probabilities moved by 0.05 nats" in told["prompt-1--instruct"]
    assert "the setting max_new_tokens was 5, is 4" in told["prompt-2--base"]
    assert told["prompt-2--style"].startswith("nothing is accepted yet")
    # Where, from the root folder: the lines are shown in pull requests.
    place = "snapshots/test_it/p--prompt-2--"
    assert told["prompt-2--instruct"].startswith(f"{place}instruct.toml: line 4: was edited")
    assert told["prompt-2--stacked"] == f"{place}stacked.evidence: is missing beside its snapshot"
    assert str(project.path) not in "".join(told.values())
    result.stdout.fnmatch_lines(["noise floor: at most * nats *"])


@pytest.mark.parametrize("accepted", [True, False])
def test_what_somebody_accepts_while_a_session_judges_is_not_overwritten_by_a_review(
    project, tiny, monkeypatch, accepted
):
    from harness.pending import accept, read_records
    from harness.plugin.accepted import Accepted
    from harness.snapshot import read_stored
    from harness.snapshot_files import sidecar_of

    chosen = ["-k", "prompt-1 and base", *arguments(tiny)]
    project.runpytest_inprocess("--snapshot-update", *chosen).assert_outcomes(passed=1)
    file = snapshot_file(project, "prompt-1--base")
    accept_otherwise(file, token_ids=(1, 2, 3, 4), text="four")
    theirs = contents(project)
    if accepted:
        accept_otherwise(file, token_ids=(5, 6, 7, 8), text="eight")
    else:
        file.unlink()
        sidecar_of(file).unlink()
    real = Accepted.compare

    def meanwhile(self, *compared):
        for path, data in theirs.items():
            path.write_bytes(data)
        return real(self, *compared)

    monkeypatch.setattr(Accepted, "compare", meanwhile)
    project.runpytest_inprocess(*chosen).assert_outcomes(failed=1)
    (decided,) = accept(project.path, read_records(project.path).pending)
    assert "has changed since it was compared" in decided.refused
    assert read_stored(file).snapshot.text == "four"


@pytest.mark.slow
def test_snapshots_made_in_float32_serve_a_run_in_bfloat16(project, tiny):
    project.runpytest_inprocess("--snapshot-update", *arguments(tiny)).assert_outcomes(passed=8)
    result = project.runpytest_inprocess("--dtype=bfloat16", *arguments(tiny))
    result.assert_outcomes(passed=8)
    assert {outcome for outcome, _ in verdicts(project).values()} <= {"held", "tie"}
    result.stdout.fnmatch_lines(["noise floor: at most * in bfloat16 on cpu*"])
