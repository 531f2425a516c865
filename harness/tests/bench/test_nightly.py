"""The suite under pytest writes what the gate reads; the nightly's scripts do what they say."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from harness.bench.gate_simulation import read_noise, simulate
from harness.bench.results import read_results

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_suite_measures_a_random_shape_and_its_file_is_read(pytester, tiny_shape):
    """The same test code that `-m gpu --base-model random:qwen3-8b` runs."""
    done = pytester.runpytest_subprocess(
        str(ROOT / "suites"), "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-q",
        "--base-model", f"random:{tiny_shape}", "--device", "cpu", "--batch-sizes", "1",
        "--modes", "base,stacked", "--input-tokens", "4", "--output-tokens", "2",
        f"--benchmark-json={pytester.path / 'new.json'}",
    )  # fmt: skip
    outcomes = done.parseoutcomes()
    assert outcomes["passed"] == 4
    assert set(outcomes) <= {"passed", "skipped", "warnings", "warning"}
    done.stdout.fnmatch_lines(["*is random numbers: what it says means nothing*"])
    found = read_results(pytester.path / "new.json")
    assert set(found.cells) == {
        "base-b1-i4-o2", "stacked-live-b1-i4-o2", "stacked-flattened-b1-i4-o2",
        "stacked-merged-b1-i4-o2",
    }  # fmt: skip
    assert found.random
    assert found.ceilings["copy_bytes_per_s"] > 0
    machine = json.loads((pytester.path / "new.json").read_text())["machine_info"]
    assert machine["versions"]["torch"]


@pytest.mark.slow
def test_a_stored_session_of_this_machine_is_not_taken_for_anothers(pytester, tiny_shape):
    # pytest-benchmark compares the processor's momentary frequency, too.
    steady = "import pytest_benchmark.plugin\npytest_benchmark.plugin.get_cpu_info = dict\n"
    pytester.makepyfile(steady=steady)
    words = [
        str(ROOT / "suites"), "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-q",
        f"--base-model=random:{tiny_shape}", "--device=cpu", "--batch-sizes=1", "--modes=base",
        "--input-tokens=4", "--output-tokens=2", "-m", "latency and not gpu",
        f"--benchmark-storage={pytester.path / 'stored'}", "-p", "steady",
    ]  # fmt: skip
    pytester.runpytest_subprocess(*words, "--benchmark-save=first").assert_outcomes(passed=1)
    (saved,) = pytester.path.glob("stored/*/*.json")
    again = pytester.runpytest_subprocess(*words, "--benchmark-compare")
    again.assert_outcomes(passed=1)
    assert "machine_info is different" not in again.stdout.str() + again.stderr.str()
    again.stdout.fnmatch_lines(["*base-b1-i4-o2*first*"])
    document = json.loads(saved.read_text())
    document["machine_info"]["versions"]["torch"] = "another"
    saved.write_text(json.dumps(document))
    other = pytester.runpytest_subprocess(*words, "--benchmark-compare")
    assert "machine_info is different" in other.stdout.str() + other.stderr.str()


@pytest.fixture
def github(tmp_path):
    """A `gh` that writes down what it is asked; `.open` is the number of an open issue."""
    log, answer = tmp_path / "log", tmp_path / "answer"
    answer.write_text("")
    script = tmp_path / "bin" / "gh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$2" in list) cat {answer};; esac\n')
    script.chmod(0o755)
    report = tmp_path / "report.md"
    report.write_text("# slower\n")

    def run(code, number=""):
        answer.write_text(number)
        log.write_text("")
        subprocess.run(
            [ROOT / ".ci" / "latency-issue", code, report, "https://run"], check=True,
            env=os.environ | {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        return [line.split() for line in log.read_text().splitlines()]

    return run


def test_a_regression_opens_one_issue_and_then_updates_it(github):
    opened = [words[:2] for words in github("1")]
    assert opened == [["issue", "list"], ["label", "create"], ["issue", "create"]]
    again = [words[:3] for words in github("1", "7")]
    assert again[1:] == [["issue", "edit", "7"], ["issue", "comment", "7"]]
    assert [words[:3] for words in github("0", "7")][1:] == [["issue", "comment", "7"]]
    assert [words[:2] for words in github("0")] == [["issue", "list"]]


def test_the_last_good_commit_is_that_of_the_newest_night_that_held(tmp_path):
    for name, verdict in (("1", "held"), ("2", "held"), ("3", "failed")):
        night = {"verdict": verdict, "commit_info": {"id": name * 4}}
        (tmp_path / f"{name}.json").write_text(json.dumps(night))
    done = subprocess.run(
        [ROOT / ".ci" / "last-good-commit", tmp_path], check=True, capture_output=True, text=True
    )
    assert done.stdout == "2222\n"


@pytest.fixture(scope="module")
def noise():
    """Launches of two equal processes each, recorded by `harness.bench.gate_noise`."""
    return read_noise()


@pytest.mark.parametrize("history", [0, 2, 7])
def test_equal_nights_raise_no_alarm(noise, history):
    assert simulate(noise, shift=0.0, nights=40, history=history).alarms == 0


@pytest.mark.slow
@pytest.mark.parametrize("history", [0, 7])
def test_at_most_one_night_in_a_hundred_raises_a_false_alarm(noise, history):
    """Over the whole table of 90 figures, at 95 % confidence for nights with this noise."""
    assert simulate(noise, shift=0.0, nights=400, history=history).alarm_bound <= 0.01


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_tenth_more_is_found_in_twenty_rounds(noise, everywhere):
    nights = 10 if everywhere else 100
    rates = simulate(noise, shift=0.1, nights=nights, everywhere=everywhere)
    assert rates.found >= 0.95 * rates.slowed
    assert rates.slowed == (900 if everywhere else 300)
    assert rates.alarms == 0


def test_a_change_below_the_threshold_is_not_blamed(noise):
    """3 % is below the 5 % that matter: all but a few of 900 figures hold."""
    assert simulate(noise, shift=0.03, nights=10).found <= 9
