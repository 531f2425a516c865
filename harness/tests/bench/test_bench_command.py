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


def test_an_interrupt_is_told_with_how_far_it_came(base, monkeypatch, capsys, tmp_path):
    from harness.bench import visiting

    given, rounds = visiting.visit_all, []

    def interrupted(*rest, **named):
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(rest)
        return given(*rest, **named)

    monkeypatch.setattr(visiting, "visit_all", interrupted)
    assert main([*base, "--rounds", "5", "--output", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().err
    assert said.endswith("error: interrupted; 8 of 20 rounds of cells were measured\n")
    assert not (tmp_path / "out").exists()
