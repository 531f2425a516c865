"""What is written is read again, by us and by pytest-benchmark; what is broken is refused."""

import json
import os
import subprocess
import sys

import pytest

from harness.bench.results import as_benchmark_json, read_results
from harness.bench.storing import read_history
from harness.errors import InputError


@pytest.fixture
def written(results_of, tmp_path):
    file = tmp_path / "0001_old.json"
    file.write_text(json.dumps(as_benchmark_json(results_of())))
    return file


def test_results_come_back_as_they_were(written, results_of):
    found, expected = read_results(written), results_of()
    assert found.cells == expected.cells
    assert (found.fingerprint, found.conditions) == (expected.fingerprint, expected.conditions)


def test_pytest_benchmark_compares_our_files(written, tmp_path):
    (tmp_path / "0002_new.json").write_bytes(written.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{tmp_path}", "compare",
         str(written), str(tmp_path / "0002_new.json")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latency[stacked-live-b1-i16-o4]") == 2, done.stdout


def test_a_history_is_a_folder_oldest_first(written, results_of, tmp_path):
    night = results_of(moment="2025-12-31T00:00:00+00:00")
    (tmp_path / "later-named.json").write_text(json.dumps(as_benchmark_json(night)))
    assert [n.moment[:4] for n in read_history(tmp_path)] == ["2025", "2026"]
    with pytest.raises(InputError, match="holds no results"):
        read_history(_empty(tmp_path))


def test_the_commit_is_read_while_somebody_else_holds_the_index(tmp_path, monkeypatch):
    from harness.bench import session

    # Nothing of a hook that runs the tests, of CI, or of whose machine this is.
    for name in [n for n in os.environ if n.startswith(("GIT_", "GITHUB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True)

    here = tmp_path / "session.py"
    here.write_text("x")
    git("init", "-q", "-b", "main")
    git("add", here.name)
    git("commit", "-q", "-m", "one")
    os.utime(here, (1, 1))  # what makes `git status` write the index anew
    index = tmp_path / ".git" / "index"
    before = index.stat().st_mtime_ns, index.read_bytes()
    monkeypatch.setattr(session, "__file__", str(here))
    found = session.commit_here()
    assert (found["branch"], found["dirty"], len(found["id"])) == ("main", False, 40)
    assert (index.stat().st_mtime_ns, index.read_bytes()) == before, "and no lock was taken"


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def _break(document, how):
    cell = document["benchmarks"][0]["extra_info"]["lora"]
    if how == "no benchmarks":
        document["benchmarks"] = []
    elif how == "foreign":
        del document["lora_stack"]
    elif how == "negative time":
        cell["rounds"]["ttft_s"] = [-1.0]
    elif how == "text for a time":
        cell["rounds"]["ttft_s"] = ["fast"]
    elif how == "no rounds field":
        del cell["rounds"]
    elif how == "twice":
        document["benchmarks"].append(document["benchmarks"][0])
    elif how == "another format":
        document["lora_stack"]["format"] = 99
    elif how == "no fingerprint":
        document["lora_stack"]["fingerprint"] = None


@pytest.mark.parametrize(
    "how",
    ["no benchmarks", "foreign", "negative time", "text for a time", "no rounds field", "twice",
     "another format", "no fingerprint"],
)  # fmt: skip
def test_a_broken_file_is_refused(how, written):
    document = json.loads(written.read_text())
    _break(document, how)
    written.write_text(json.dumps(document))
    with pytest.raises(InputError):
        read_results(written)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(data, tmp_path):
    (tmp_path / "old.json").write_bytes(data)
    with pytest.raises(InputError):
        read_results(tmp_path / "old.json")
