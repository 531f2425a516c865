"""`lora-stack bench` measures, writes, compares, and says what it cannot do."""

import json
import shlex
import sys

import pytest

from harness.cli import main


@pytest.fixture(scope="module")
def base(tiny_shape):
    what = ["--modes", "base,stacked", "--batch-sizes", "1", "--input-tokens", "4"]
    return ["bench", "--base-model", f"random:{tiny_shape}", "--device", "cpu", *what,
            "--output-tokens", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "first"
    assert main([*base, "--rounds", "6", "--output", str(folder)]) == 0
    return folder


def test_every_output_is_marked_random(measured, capsys, base):
    report = json.loads((measured / "report.json").read_text())
    assert report["lora_stack"]["stack"]["random"] is True
    assert "RANDOM WEIGHTS" in report["markers"][0]
    assert "RANDOM WEIGHTS" in (measured / "report.md").read_text()
    assert "RANDOM WEIGHTS" in (measured / "report.html").read_text()
    assert main([*base, "--results", str(measured / "report.json")]) == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out


def test_the_figures_are_all_there(measured):
    report = json.loads((measured / "report.json").read_text())
    assert report["verdict"] == "skipped"  # nothing was compared
    assert (measured / "report.md").read_text().startswith("# Latency of")
    assert "measured" in (measured / "report.md").read_text().splitlines()[0]
    cells = {row["cell"] for row in report["figures"]}
    assert cells == {
        "base, batch 1", "stacked live, batch 1", "stacked flattened, batch 1",
        "stacked merged, batch 1",
    }  # fmt: skip
    for row in report["figures"]:
        assert all(row[name] > 0 for name in row if name.endswith(("_ms", "_s", "_share")))
        assert row["peak_gib"] > 0
    assert {(r["application"], r["against"]) for r in report["overhead"]} == {
        ("live", "base"), ("flattened", "base"), ("merged", "base"), ("live", "merged"),
        ("flattened", "merged"),
    }  # fmt: skip
    benchmark = report["benchmarks"][0]
    assert len(benchmark["stats"]["data"]) == 6
    assert report["machine_info"]["versions"]["torch"]


def test_the_same_results_hold_against_themselves(measured, base, capsys):
    file = str(measured / "report.json")
    code = main([*base, "--results", file, "--against", str(measured), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["verdict"]) == (1, "undecided")  # six rounds can decide nothing
    assert len(report["changes"]) == 12


def test_a_table_that_lacks_a_cell_fails(measured, base, tmp_path, capsys):
    document = json.loads((measured / "report.json").read_text())
    document["benchmarks"] = document["benchmarks"][1:]
    (tmp_path / "new.json").write_text(json.dumps(document))
    code = main([*base, "--results", str(tmp_path / "new.json"), "--against", str(measured),
                 "--json"])  # fmt: skip
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert code == 1
    assert [c["name"] for c in checks if c["verdict"] == "missing"] == ["latency: base-b1-i4-o2"]


def test_another_machine_is_incomparable(measured, base, tmp_path, capsys):
    document = json.loads((measured / "report.json").read_text())
    document["lora_stack"]["fingerprint"]["cpu"] = "another"
    (tmp_path / "old.json").write_text(json.dumps(document))
    code = main([*base, "--results", str(measured / "report.json"), "--against",
                 str(tmp_path / "old.json")])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 1
    assert "incomparable" in out
    assert "cpu was 'another'" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "missing.json"], "missing.json"),
        (["--rounds", "0"], "--rounds"),
        (["--applications", "live,quick"], "'quick' is none of"),
        (["--batch-sizes", "1,x"], "--batch-sizes"),
        (["--random-rank", "style=two"], "--random-rank"),
        (["--input-tokens", "600"], "do not fit the context of 512"),
        (["--against-command", "nowhere-to-be-found"], "cannot be started"),
        (["--against-command", "'"], "cannot be read as a command: No closing quotation"),
        (["--against-command", "x", "--against", "y"], "--against-command"),
        (["--against-command", "x", "--decoding", "static,compiled"], "--decoding compiled"),
    ],
)
def test_bad_input_is_told_and_exits_with_2(words, message, base, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = main([*base, *words])
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_broken_old_file_exits_with_2_before_anything_is_measured(base, tmp_path, capsys):
    (tmp_path / "old.json").write_text("{")
    assert main([*base, "--against", str(tmp_path / "old.json")]) == 2
    assert "old.json" in capsys.readouterr().err


def test_compiled_decoding_without_cuda_is_skipped_with_the_reason(base, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("here it is measured")
    code = main([*base, "--rounds", "1", "--applications", "live", "--json", "--decoding",
                 "dynamic,static,compiled"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {row["decoding"] for row in report["figures"]} == {"dynamic", "static"}
    assert {row["against"] for row in report["decoding"]} == {"dynamic"}
    nothing, *reasons = [c["evidence"][0] for c in report["checks"] if c["verdict"] == "skipped"]
    assert "compared with nothing" in nothing
    assert len(reasons) == 2
    assert "compiles decode steps on CUDA" in reasons[0]


@pytest.mark.slow
def test_two_environments_run_in_turn(base, tmp_path, capsys, monkeypatch):
    """Here both are this one, so the floor is what two processes of the same code show."""
    words = [*base, "--rounds", "12", "--launches", "2", "--applications", "live", "--json",
             "--against-command", shlex.join([sys.executable, "-m", "harness.cli"])]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["lora-stack", *words])
    main(words)
    report = json.loads(capsys.readouterr().out)
    assert all(change["paired"] and change["rounds"] == [12, 12] for change in report["changes"])
    assert len(report["changes"]) == 6


@pytest.mark.slow
def test_a_side_that_ends_is_an_input_error(base, capsys, monkeypatch):
    words = [*base, "--against-command", shlex.join([sys.executable, "-c", "pass"])]
    monkeypatch.setattr(sys, "argv", ["lora-stack", *words])
    assert main(words) == 2
    assert "the old side: gave no answer" in capsys.readouterr().err


def test_an_interrupt_leaves_what_was_measured_undecided(
    base, monkeypatch, capsys, tmp_path, measured
):
    from harness.bench import visiting

    given, rounds = visiting.visit_all, []

    def interrupted(*rest, **named):
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(rest)
        return given(*rest, **named)

    monkeypatch.setattr(visiting, "visit_all", interrupted)
    older = tmp_path / "older"
    older.mkdir()
    (older / "report.json").write_bytes((measured / "report.json").read_bytes())
    words = [*base, "--against", str(older), "--output", str(tmp_path / "out")]
    assert main([*words, "--rounds", "5"]) == 130
    so_far = "8 of 20 rounds of cells were measured"
    assert f"interrupted: {so_far}" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "undecided"
    assert report["checks"][0]["evidence"] == [f"interrupted: {so_far}; compared with nothing"]
    assert {row["rounds"] for row in report["figures"]} == {2}
    assert so_far in (tmp_path / "out" / "report.md").read_text()

    # Part of a session is nobody's reference.
    assert main([*base, "--results", str(tmp_path / "out" / "report.json")]) == 2
    assert f"of a session that was interrupted: {so_far}" in capsys.readouterr().err


def test_what_was_measured_is_shown_where_the_report_cannot_be_written(
    base, monkeypatch, capsys, tmp_path, measured
):
    import harness.report.latency
    from harness.errors import InputError

    def write(report, folder):
        raise InputError("cannot be written: No space left on device", where=folder)

    monkeypatch.setattr(harness.report.latency, "write_latency", write)
    words = [*base, "--results", str(measured / "report.json"), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "base, batch 1" in said.out
    assert "report: " not in said.out
    assert said.err.endswith("out: cannot be written: No space left on device\n")


def test_ranks_of_random_adapters_are_not_ignored_beside_real_ones(capsys):
    assert main(["bench", "--random-rank", "style=4"]) == 2
    assert "--random-rank: builds adapters for a random base" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["warm_up", "visit_all"])
def test_an_interrupt_before_a_round_is_over_writes_nothing(
    base, monkeypatch, capsys, tmp_path, part
):
    from harness.bench import visiting

    def interrupted(*rest, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(visiting, part, interrupted)
    assert main([*base, "--rounds", "5", "--output", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().err
    assert said.endswith("error: interrupted; 0 of 20 rounds of cells were measured\n")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_between_two_commands_ends_both_at_once_and_keeps_whole_launches(
    base, monkeypatch, capsys, tmp_path, measured
):
    from harness.bench import pairing

    # A side that answers as a worker does, and heeds neither the end of its input nor a signal.
    side = tmp_path / "side.py"
    side.write_text(
        "import json, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(json.dumps({'ready': ['all'], 'visits': 1}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if line.strip() == 'end':\n"
        f"        print(json.dumps(json.load(open({str(measured / 'report.json')!r}))))\n"
        "        sys.exit()\n"
        "    print(json.dumps({'done': 'all'}), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = shlex.join([sys.executable, str(side)])
    words = [*base, "--against-command", command, "--rounds", "4", "--launches", "4"]
    words += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lora-stack", *words])
    started, waited, real_worker, real_turn = [], [], pairing.Worker, pairing.in_turn
    real_wait = pairing.subprocess.Popen.wait

    def worker(_, name):
        started.append(real_worker(shlex.split(command), name))
        return started[-1]

    def in_turn(workers, *rest, **named):
        if len(started) < 6:
            return real_turn(workers, *rest, **named)
        for one in workers:
            one.ready()
        waited.clear()
        raise KeyboardInterrupt

    monkeypatch.setattr(pairing, "Worker", worker)
    monkeypatch.setattr(pairing, "in_turn", in_turn)

    def wait(self, timeout=None):
        waited.append(timeout)
        return real_wait(self, timeout)

    monkeypatch.setattr(pairing.subprocess.Popen, "wait", wait)
    assert main(words) == 130
    assert len(started) == 6
    assert all(one._process.returncode is not None for one in started)
    assert waited == [2, None, 2, None], "asked to end, waited for a little, then killed"
    assert "interrupted: 2 of 4 launches of each side were measured" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "undecided"
    assert report["lora_stack"]["interrupted"].startswith("2 of 4 launches")
