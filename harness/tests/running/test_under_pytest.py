"""Under pytest: interrupted, terminated, a crashed worker, nothing to run."""

import os
import sys

import pytest

ASKED = ("--preset=elegant_style", "-p", "no:cacheprovider")  # a stack is asked for


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return pytester


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_says_how_many_of_how_many_ran(project, name):
    project.makepyfile(
        f"""
        import os, pytest, signal

        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)

        @pytest.mark.parametrize("number", range(120))
        def test_one(number):
            if number == 37:
                os.kill(os.getpid(), signal.{name})

        def test_deselected():
            pass
        """
    )
    result = project.runpytest_subprocess(*ASKED, "-k", "test_one")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*interrupted: 37 of 120 tests ran*"])
    assert "Traceback" not in result.stderr.str()


def test_interrupted_under_xdist_counts_what_the_workers_collected(project):
    pytest.importorskip("xdist")
    # The session that gathers the workers' reports is interrupted when it has had 37 of them.
    project.makeconftest(
        """
        import pytest

        done = []

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logreport(report):
            import os
            if report.when == "call" and "PYTEST_XDIST_WORKER" not in os.environ:
                done.append(report.nodeid)
                if len(done) == 37:
                    raise KeyboardInterrupt
        """
    )
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(120))
        def test_one(number):
            pass

        def test_deselected():
            pass
        """
    )
    result = project.runpytest_subprocess(*ASKED, "-n2", "-k", "test_one")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*interrupted: 37 of 120 tests ran*"])


def test_interrupted_while_collecting_says_that_no_test_was_known_yet(project):
    project.makepyfile("raise KeyboardInterrupt")
    result = project.runpytest_subprocess(*ASKED)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["interrupted before the tests were collected"])


def test_a_crashed_worker_is_a_failure_with_a_name(project):
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import os, pytest

        @pytest.mark.parametrize("number", range(4))
        def test_one(number):
            if number == 2:
                os.kill(os.getpid(), 9)
        """
    )
    result = project.runpytest_subprocess(*ASKED, "-n2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["failed: *::test_one[[]2[]]: its worker crashed"])


@pytest.mark.parametrize("selection", [("-k", "nothing"), ("-m", "gpu")])
def test_no_test_is_no_success(project, selection):
    project.makepyfile("def test_one(lora_mode): pass")
    result = project.runpytest_subprocess(*ASKED, *selection)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.jsonl"])
def test_no_prompt_is_no_success(project, name):
    (project.path / name).write_text("")
    project.makepyfile("def test_one(lora_prompt): pass")
    result = project.runpytest_subprocess(f"--prompts={name}", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{name}: holds no prompt*"])


def test_a_mode_without_memory_fails_its_tests_and_the_others_run(project):
    project.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def lora_completions(lora_preset):
            import harness.replay
            from harness.plugin import Completions
            from harness.tests.values import completion

            calls = []

            def complete(engine, prompts, mode, settings, **named):
                calls.append(mode.name)
                assert calls.count(mode.name) == 1, "tried again for each prompt"
                if mode.name == "style":
                    raise MemoryError
                if mode.name == "instruct":
                    raise RuntimeError("CUDA error: an illegal memory access")
                return tuple(
                    harness.replay.Replayed(
                        completion=completion(prompt, mode=mode.name), kept=0, generated=0
                    )
                    for prompt in prompts
                )

            harness.replay.replay_completions = complete
            return Completions(None, lora_preset)

        def test_says(lora_completion):
            assert lora_completion.text == "said"
        """
    )
    result = project.runpytest_subprocess(*ASKED, "--modes=base,style,instruct,stacked")
    result.assert_outcomes(passed=8, errors=24)
    result.stdout.fnmatch_lines(["*style: out of memory*"])
    result.stdout.fnmatch_lines(["*the device has been broken since instruct: the device failed*"])
