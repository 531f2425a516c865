"""What pytest-benchmark saves is whole, or told; driven through pytest itself."""

import json
import os
import resource
import sys

import pytest

pytest.importorskip("pytest_benchmark")
ASKED = ("--preset=elegant_style", "-p", "no:cacheprovider")  # a stack is asked for


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pytester.makepyfile(
        """
        def test_one(benchmark):
            benchmark.extra_info["much"] = "x" * 200_000
            benchmark.pedantic(int, rounds=2)
        """
    )
    return pytester


def test_both_ways_of_saving_write_what_pytest_benchmark_writes(project):
    place = project.path / "new" / "b.json"
    result = project.runpytest_inprocess(*ASKED, f"--benchmark-json={place}", "--benchmark-save=x")
    assert result.ret == 0
    (saved,) = project.path.glob(".benchmarks/*/0001_x.json")
    for file in (place, saved):
        (benchmark,) = json.loads(file.read_text())["benchmarks"]
        assert benchmark["name"] == "test_one"
    assert "0001_x.json" in result.stdout.str() + result.stderr.str()
    assert project.runpytest_inprocess(*ASKED, "--benchmark-save=x").ret == 0
    assert len(list(project.path.glob(".benchmarks/*/0002_x.json"))) == 1
    assert not list(project.path.rglob(".staging*"))


def test_a_place_that_cannot_be_written_is_refused_before_any_test(project):
    (project.path / "file").write_text("")
    for place, fault in [("file/b.json", "file is no folder"), (".", "is a folder")]:
        result = project.runpytest_inprocess(*ASKED, f"--benchmark-json={place}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"*{place}: *{fault}* → *"])
        assert "test_one" not in result.stdout.str()


def test_a_full_disk_is_told_and_the_old_file_stays(project):
    place = project.path / "b.json"
    place.write_text("old")
    # A limit on the size of files stands for the full disk: the write fails half way.
    project.makeconftest(
        """
        import pytest, resource, signal

        @pytest.hookimpl(trylast=True)
        def pytest_benchmark_update_json(output_json):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        """
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = project.runpytest_subprocess(*ASKED, "--benchmark-json=b.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*not saved*", "error: *b.json: cannot be written: File too large*"]
    )
    assert "INTERNALERROR" not in result.stdout.str()
    assert place.read_text() == "old"
    assert not list(project.path.rglob(".staging*"))


def test_without_pytest_benchmark_nothing_is_missed(project):
    project.makepyfile("def test_one(): pass")
    result = project.runpytest_inprocess(*ASKED, "-p", "no:benchmark")
    result.assert_outcomes(passed=1)
