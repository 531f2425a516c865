"""The plugin, through pytester: options, fixtures, verdict table, snapshots, xdist."""

import shutil
import subprocess
import sys

import pytest

GENERATION = """
def test_completion_is_the_accepted_one(lora_completion, lora_snapshot):
    assert lora_completion == lora_snapshot
"""


@pytest.fixture
def stack_arguments(tiny):
    return [
        f"--style-adapter={tiny.adapters['style']}",
        f"--instruct_adapter={tiny.adapters['instruct']}",
        "--prompts=p.txt",
        "--max-new-tokens=4",
        "-p", "no:cacheprovider",
    ]  # fmt: skip


@pytest.fixture
def project(pytester):
    pytester.makefile(".txt", p="Hello\nHow are you?\n")
    return pytester


def test_modes_by_prompts_are_parametrised(project, stack_arguments):
    project.makepyfile(GENERATION)
    result = project.runpytest_inprocess("--collect-only", "-q", *stack_arguments)
    assert sum("test_completion_is" in line for line in result.outlines) == 8
    result.stdout.fnmatch_lines(["*[[]stacked-prompt-2]"])


def test_new_snapshot_fails_first_and_is_accepted_on_request(project, stack_arguments):
    project.makepyfile(GENERATION)
    first = project.runpytest_inprocess(*stack_arguments)
    first.assert_outcomes(failed=8)
    first.stdout.fnmatch_lines(["*missing*", "next: *--snapshot-update"])
    assert not (project.path / "snapshots").exists()
    project.runpytest_inprocess("--snapshot-update", *stack_arguments).assert_outcomes(passed=8)
    assert len(list((project.path / "snapshots").rglob("*.toml"))) == 8
    again = project.runpytest_inprocess(*stack_arguments)
    again.assert_outcomes(passed=8)
    again.stdout.fnmatch_lines(["*held*", "stacked * 2"])


def test_update_of_some_cases_keeps_the_others(project, stack_arguments):
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    for selection in (["-k", "stacked"], ["-k", "prompt-1 and base"]):
        project.runpytest_inprocess("--snapshot-update", *selection, *stack_arguments)
    assert len(list((project.path / "snapshots").rglob("*.toml"))) == 8


def accept_otherwise(file, **changes):
    """Accept another completion at *file*, as if the model had said it."""
    from dataclasses import replace

    from harness.snapshot import read_stored, stored_form
    from harness.snapshot_files import write_pair

    form = stored_form(replace(read_stored(file).snapshot, **changes))
    write_pair(file, str(form).encode(), form.evidence)


def test_changed_completion_shows_words_and_verdict(project, stack_arguments):
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    file = next((project.path / "snapshots").rglob("*prompt-1--stacked.toml"))
    accept_otherwise(file, token_ids=(1, 2, 3, 4), text="four")
    unreadable = next((project.path / "snapshots").rglob("*prompt-1--base.toml"))
    unreadable.write_text("<<<<<<< HEAD\n")
    result = project.runpytest_inprocess(*stack_arguments)
    result.assert_outcomes(failed=2, passed=6)
    result.stdout.fnmatch_lines(["*token 1 is the first that differs: *(1) accepted, *"])
    result.stdout.fnmatch_lines(["*line 1: a merge-conflict marker*"])
    result.stdout.fnmatch_lines(["*held*changed*unreadable*", "completions: 6 replayed, *"])
    result.stdout.fnmatch_lines(["noise floor: at most * nats *"])
    assert unreadable.read_text() == "<<<<<<< HEAD\n"


def test_what_was_compared_is_left_for_review_and_accepted_there(project, stack_arguments):
    from harness.pending import accept, read_records

    project.makepyfile(GENERATION)
    project.runpytest_inprocess(*stack_arguments)
    missing = read_records(project.path)
    assert {case.outcome for case in missing.cases} == {"missing"}
    assert len(missing.pending) == 8
    decided = accept(project.path, missing.pending)
    assert [one.refused for one in decided if one.refused] == []
    accepted = project.runpytest_inprocess(*stack_arguments)
    accepted.assert_outcomes(passed=8)
    assert {case.outcome for case in read_records(project.path).cases} == {"held"}


def test_drift_fails_or_warns_as_asked(project, stack_arguments):
    import numpy as np

    from harness.evidence import Evidence
    from harness.snapshot import read_stored

    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    file = next((project.path / "snapshots").rglob("*prompt-1--stacked.toml"))
    evidence = read_stored(file).snapshot.evidence
    moved = Evidence(
        logprobs=evidence.logprobs - 0.05,
        top_ids=evidence.top_ids,
        top_logprobs=evidence.top_logprobs - 0.05 * np.ones(5),
    )
    accept_otherwise(file, evidence=moved)
    before = file.read_bytes()
    failed = project.runpytest_inprocess(*stack_arguments)
    failed.assert_outcomes(failed=1, passed=7)
    failed.stdout.fnmatch_lines(["*drift: *prompt-1--stacked*", "*moved by 0.05 nats*"])
    warned = project.runpytest_inprocess("--lora-drift=warn", *stack_arguments)
    warned.assert_outcomes(passed=8)
    warned.stdout.fnmatch_lines(["*held*drift*", "drift: *prompt-1--stacked: *moved by 0.05 nats*"])
    assert file.read_bytes() == before
    project.makeini("[pytest]\nlora_drift = perhaps")
    wrong = project.runpytest_subprocess(*stack_arguments)
    wrong.stderr.fnmatch_lines(["*'perhaps' is neither fail nor warn*"])


def test_a_folder_that_cannot_be_written_leaves_the_verdict(project, stack_arguments):
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    shutil.rmtree(project.path / ".pending")
    (project.path / ".pending").write_text("in the way")
    result = project.runpytest_inprocess(*stack_arguments)
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(["not left for review: *"])


@pytest.mark.parametrize("suffix", [".toml", ".evidence"])
def test_a_pipe_in_the_place_of_a_snapshot_is_a_verdict_and_no_wait(
    project, stack_arguments, suffix
):
    import os

    project.makepyfile(GENERATION)
    chosen = ["-k", "base and prompt-1", *stack_arguments]
    project.runpytest_inprocess("--snapshot-update", *chosen).assert_outcomes(passed=1)
    (file,) = (project.path / "snapshots").rglob(f"*{suffix}")
    file.unlink()
    os.mkfifo(file)
    result = project.runpytest_inprocess(*chosen)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*unreadable: *", "*is no regular file*"])


def test_a_snapshot_that_cannot_be_written_is_a_line(project, stack_arguments):
    project.makepyfile(GENERATION)
    (project.path / "snapshots").write_text("in the way")
    result = project.runpytest_inprocess("--snapshot-update", *stack_arguments, "--modes=base")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["E * completion == snapshot", "E *snapshots*: cannot be *"])
    assert "Traceback" not in result.stdout.str()
    assert (project.path / "snapshots").read_text() == "in the way"


def test_generating_anew_on_request_says_the_same(project, stack_arguments):
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    result = project.runpytest_inprocess("--no-replay", *stack_arguments)
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(["completions: 8 generated (no replay was asked for)"])


def test_ci_accepts_nothing(project, stack_arguments, monkeypatch):
    project.makepyfile(GENERATION)
    monkeypatch.setenv("CI", "true")
    refused = project.runpytest_subprocess("--snapshot-update", *stack_arguments)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*CI never accepts snapshots*"])
    assert not (project.path / "snapshots").exists()


@pytest.mark.slow
def test_snapshots_that_no_test_asks_for_are_named_and_kept(project, stack_arguments):
    from harness.snapshot import snapshot_name

    project.makepyfile(test_one=GENERATION, test_two=GENERATION)
    for module in ("test_one", "test_two"):
        folder = project.mkdir("snapshots") if module == "test_one" else project.path / "snapshots"
        (folder / module).mkdir()
        for prompt in ("prompt-1", "prompt-2"):
            for mode in ("base", "style", "instruct", "stacked"):
                for suffix in ("toml", "evidence"):
                    name = snapshot_name("p", prompt, mode)
                    (folder / module / f"{name}.{suffix}").touch()
    nothing = ["-k", "nothing"]  # no test runs: what was collected counts
    for selection in (["--modes=base"], ["-n1"], ["test_one.py"], ["test_one.py::test_x"]):
        quiet = project.runpytest_subprocess(*selection, *nothing, *stack_arguments)
        quiet.stdout.no_fnmatch_line("*no test asks for*")
    (project.path / "test_two.py").unlink()
    (project.path / "p.txt").write_text("Hello\n")
    for workers in ([], ["-n1"]):
        result = project.runpytest_subprocess(*workers, *nothing, *stack_arguments)
        result.stdout.fnmatch_lines(
            ["24 files of snapshots that no test asks for:", "  snapshots/test_one/p--prompt-2--*"]
        )
    (project.path / "test_one.py").unlink()  # now no test asks for any
    result = project.runpytest_subprocess(*stack_arguments)
    result.stdout.fnmatch_lines(["32 files of snapshots that no test asks for:"])
    assert len(list((project.path / "snapshots").rglob("*.toml"))) == 16


def test_profile_keeps_snapshots_apart(project, stack_arguments):
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", "--snapshot-profile=gpu", *stack_arguments)
    assert len(list((project.path / "snapshots" / "gpu").rglob("*.toml"))) == 8


def test_ini_twins_name_the_stack_and_the_command_line_wins(project, tiny):
    project.makepyfile("def test_names(lora_stack): print([a.name for a in lora_stack.adapters])")
    project.makeini(
        f"[pytest]\nlora_adapter = one={tiny.adapters['style']}\n"
        f"    two={tiny.adapters['instruct']}\nlora_modes = base,two\n"
    )
    from_ini = project.runpytest_inprocess("-s")
    from_ini.stdout.fnmatch_lines(["lora-stack: *", "  modes base, two × *", "*['one', 'two']*"])
    given = project.runpytest_inprocess(
        "-s", f"--lora-model={tiny.adapters['style']}", "--modes=base"
    )
    given.stdout.fnmatch_lines(["*['lora']*"])


def test_header_names_base_adapters_and_versions(project, stack_arguments):
    project.makepyfile("def test_nothing(): pass")
    result = project.runpytest_inprocess(*stack_arguments)
    result.stdout.fnmatch_lines(
        ["lora-stack: *base*adapter_config.json of style*", "  adapter style: *sha256 *",
         "  modes base, style, instruct, stacked × 2 prompts*", "  torch *, transformers *, peft *"]
    )  # fmt: skip


def test_project_without_a_stack_hears_nothing(pytester):
    pytester.makepyfile("def test_nothing(mode=1): pass")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*lora-stack:*")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--style-adapter=x"], "*--style-adapter: needs --instruct-adapter*"),
        (["--lora-model=./nowhere"], "*./nowhere: no such folder*"),
        (["--preset=elegant_stile"], "*did you mean elegant_style*"),
        (["--max-new-tokens=0"], "*not 1 or more*"),
        (["--modes=base", "--snapshot-profile=../mine"], "*'../mine' is no plain name*"),
        (["--modes=base", "-o", "lora_snapshots=../mine"], "*'../mine' is outside of *"),
    ],
)
def test_bad_options_are_a_usage_error(pytester, arguments, complaint):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([complaint])
    assert "Traceback" not in result.stderr.str()


def test_absent_device_that_was_asked_for_is_an_error_not_a_skip(project, stack_arguments):
    project.makepyfile("def test_engine(lora_engine): pass")
    result = project.runpytest_inprocess("--device=cuda:99", *stack_arguments)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*cuda:99 was asked for*"])


def test_gpu_tests_skip_with_the_reason_or_fail_on_request(pytester, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_gpu(): pass")
    skipped = pytester.runpytest_inprocess("-rs", "-m", "gpu")
    skipped.assert_outcomes(skipped=1)
    skipped.stdout.fnmatch_lines(["*no CUDA device*"])
    pytester.runpytest_inprocess("-m", "gpu", "--require-gpu").assert_outcomes(errors=1)


def test_verdict_is_recorded_and_fails_with_its_remedy(project, stack_arguments):
    project.makepyfile(
        """
        from harness import Outcome, Verdict
        def test_judged(lora_mode, lora_judge):
            outcome = Outcome.FAILED if lora_mode.name == "style" else Outcome.HELD
            lora_judge(Verdict(name="v", outcome=outcome, evidence=("e",), remedy="mend it"))
        """
    )
    result = project.runpytest_inprocess("--junitxml=junit.xml", *stack_arguments)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*v: failed*", "*mend it*", "*held*failed*"])
    junit = (project.path / "junit.xml").read_text()
    assert '<property name="lora_mode" value="style" />' in junit
    assert '<property name="lora_verdict" value="failed" />' in junit


@pytest.mark.slow
def test_workers_load_once_each_and_the_table_is_whole(project, stack_arguments):
    project.makeconftest(
        """
        import os, pathlib, harness.engines
        real = harness.engines.load_engine
        def counted(*a, **k):
            with open(pathlib.Path(__file__).parent / "loads", "a") as f: f.write("x")
            return real(*a, **k)
        harness.engines.load_engine = counted
        """
    )
    project.makepyfile(GENERATION)
    project.runpytest_inprocess("--snapshot-update", *stack_arguments)
    (project.path / "loads").unlink()
    result = project.runpytest_subprocess("-n", "2", *stack_arguments)
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(["*modes × verdicts*", "stacked * 2"])
    assert 1 <= len((project.path / "loads").read_text()) <= 2


def test_collecting_imports_no_torch(request):
    root = request.config.rootpath
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider'])\n"
        "assert code == 0, code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
