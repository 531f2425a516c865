"""The gate fails what got slower, and nothing else; and it never passes by silence."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.bench.cells import METRICS
from harness.bench.comparing import compare_pairs
from harness.bench.gate import judge_changes, log_ratio_interval
from harness.bench.judging import judge_history, judge_pair, unlike
from harness.verdict import Outcome, overall

NOISE = [1.0, 1.01, 0.99, 1.02, 0.985, 1.005, 0.995, 1.015, 0.99, 1.0] * 2


def outcomes(verdicts):
    return {verdict.name: verdict.outcome for verdict in verdicts}


def test_a_slower_cell_fails_and_names_the_commits(results_of, cell_of):
    nights = [
        results_of(moment=f"2026-01-0{n}", commit={"id": f"{n}" * 40}, verdict="held")
        for n in range(1, 6)
    ]
    slow = cell_of("stacked-live-b1-i16-o4", scale=1.2)
    new = results_of(cell_of("base-b1-i16-o4"), slow, cell_of("stacked-merged-b1-i16-o4"),
                     commit={"id": "b" * 40})  # fmt: skip
    verdicts, changes = judge_history(nights, new)
    failed = [verdict for verdict in verdicts if verdict.outcome is Outcome.FAILED]
    assert {v.name for v in failed} == {
        f"latency: stacked-live-b1-i16-o4 {metric}" for metric in ("ttft", "tpot", "e2e")
    }
    assert "went bad in 555555555555..bbbbbbbbbbbb" in failed[0].evidence
    assert all(change.ratio == pytest.approx(1.2, rel=0.01) for change in changes
               if change.outcome is Outcome.FAILED)  # fmt: skip


def test_a_regression_that_stays_keeps_failing_and_its_first_night(results_of, cell_of):
    slow = cell_of("base-b1-i16-o4", scale=1.3)
    fast = cell_of("base-b1-i16-o4")
    nights = [results_of(fast, moment=f"2026-01-0{n}", commit={"id": f"{n}" * 40}, verdict="held")
              for n in range(1, 6)]  # fmt: skip
    failed = ("base-b1-i16-o4 ttft", "base-b1-i16-o4 tpot", "base-b1-i16-o4 e2e")
    nights += [results_of(slow, moment=f"2026-01-0{n}", commit={"id": f"{n}" * 40},
                          verdict="failed", failed=failed) for n in (6, 7, 8)]  # fmt: skip
    verdicts, _ = judge_history(nights, results_of(slow, commit={"id": "9" * 40}))
    assert overall(verdicts) is Outcome.FAILED
    assert "went bad in 555555555555..666666666666" in verdicts[0].evidence


def test_equal_results_hold(results_of):
    verdicts, _ = judge_history([results_of()], results_of())
    assert overall(verdicts) is Outcome.HELD
    assert len(verdicts) == 9


def test_an_absent_renamed_or_empty_cell_fails(results_of, cell_of):
    old = results_of()
    absent = results_of(cell_of("base-b1-i16-o4"), cell_of("stacked-live-b1-i16-o4"))
    verdicts, _ = judge_history([old], absent)
    assert outcomes(verdicts)["latency: stacked-merged-b1-i16-o4"] is Outcome.MISSING
    renamed = results_of(*absent.cells.values(), cell_of("all-merged-b1-i16-o4"))
    verdicts, _ = judge_history([old], renamed)
    assert "renamed?" in verdicts[0].evidence[1]
    empty = cell_of("stacked-merged-b1-i16-o4")
    empty = dataclasses.replace(empty, rounds=dict.fromkeys(METRICS, ()))
    verdicts, _ = judge_history([old], results_of(*absent.cells.values(), empty))
    assert not overall(verdicts).passed
    skipped = dataclasses.replace(absent, skipped={"stacked-merged-b1-i16-o4": "no memory"})
    verdicts, _ = judge_history([old], skipped)
    assert verdicts[0].evidence == ("no memory",)


def test_an_unlike_machine_or_model_is_incomparable(results_of):
    new = results_of()
    for change in (
        {"fingerprint": {"kind": "cpu", "cpu": "another", "cores": 2}},
        {"conditions": {"model": "other", "adapter_parameters": {}, "dtype": "float32"}},
    ):
        old = results_of(**change)
        assert unlike(old, new)
        for verdicts, changes in (judge_history([old], new), judge_pair([old], [new])):
            assert overall(verdicts) is Outcome.INCOMPARABLE
            assert not changes
    assert not unlike(results_of(software={"torch": "1"}), new)


def test_too_few_rounds_are_undecided_and_never_pass(results_of, cell_of):
    few = results_of(cell_of("base-b1-i16-o4", rounds=[0.1, 0.2]), in_turn=True)
    verdicts, _ = judge_pair([few], [few])
    assert overall(verdicts) is Outcome.UNDECIDED
    assert not overall(verdicts).passed


def test_a_faster_cell_holds_and_is_told(results_of, cell_of):
    old = results_of(cell_of("base-b1-i16-o4", rounds=[0.1 * n for n in NOISE]))
    new = results_of(cell_of("base-b1-i16-o4", rounds=[0.07 * n for n in NOISE]))
    verdicts, changes = judge_pair([old], [new])
    assert overall(verdicts) is Outcome.HELD
    assert all(change.better for change in changes)


def test_what_launches_show_against_each_other_is_the_floor(results_of, cell_of):
    """Where A/B says now +26 % and now −8 %, it cannot blame B for 7 %."""

    def one(scale):
        return results_of(cell_of("base-b1-i16-o4", rounds=[0.1 * scale * n for n in NOISE]))

    quiet, _ = judge_pair([one(1), one(1.005)] * 2, [one(1.1), one(1.105)] * 2)
    noisy, _ = judge_pair([one(1), one(1.2)] * 2, [one(1.26), one(1.1)] * 2)
    drifting, _ = judge_pair([one(1), one(1.2)] * 2, [one(1.1), one(1.32)] * 2)
    assert overall(quiet) is Outcome.FAILED
    assert overall(noisy) is Outcome.HELD
    assert any("noise floor" in line for line in noisy[0].evidence)
    # What changes between launches and for both sides alike is no noise of the comparison.
    assert overall(drifting) is Outcome.FAILED


def test_a_doubling_that_the_noise_floor_hides_is_undecided(results_of, cell_of):
    def night(scale, moment):
        cell = cell_of("base-b1-i16-o4", rounds=[0.1 * scale * n for n in NOISE])
        return results_of(cell, moment=moment, verdict="held")

    wild = [night(scale, f"2026-01-0{n}") for n, scale in enumerate((1, 3, 0.6, 4, 1, 2.5), 1)]
    verdicts, changes = judge_history(wild, night(15, "2026-01-09"))
    assert {change.outcome for change in changes} == {Outcome.UNDECIDED}
    assert any("on a machine whose noise floor is" in line for line in verdicts[0].evidence)
    # What does not look slower is no reason to measure again.
    assert overall(judge_history(wild, night(1.5, "2026-01-09"))[0]) is Outcome.HELD


def test_few_launches_or_nights_do_not_know_what_processes_differ_by(results_of, cell_of):
    def one(scale):
        return results_of(cell_of("base-b1-i16-o4", rounds=[0.1 * scale * n for n in NOISE]))

    for launches in (1, 2, 3):
        assert overall(judge_pair([one(1)] * launches, [one(1.09)] * launches)[0]) is Outcome.HELD
        verdicts, _ = judge_pair([one(1)] * launches, [one(1.15)] * launches)
        assert overall(verdicts) is Outcome.FAILED
    assert overall(judge_history([one(1)] * 3, one(1.09))[0]) is Outcome.HELD
    assert overall(judge_history([one(1)] * 3, one(1.15))[0]) is Outcome.FAILED
    assert overall(judge_history([one(1)] * 4, one(1.09))[0]) is Outcome.FAILED


def test_a_change_below_the_absolute_threshold_holds(results_of, cell_of):
    """A microsecond more is nothing, be it a half."""
    old = results_of(cell_of("base-b1-i16-o4", rounds=[2e-6 * n for n in NOISE]))
    new = results_of(cell_of("base-b1-i16-o4", rounds=[3e-6 * n for n in NOISE]))
    assert overall(judge_pair([old], [new])[0]) is Outcome.HELD


def test_leaving_intervals_out_decides_the_same(results_of, cell_of):
    old = results_of(cell_of("base-b1-i16-o4", rounds=[0.1 * n for n in NOISE]))
    for scale in (1.0, 1.04, 1.08, 1.2):
        cell = cell_of("base-b1-i16-o4", rounds=[0.1 * scale * n for n in reversed(NOISE)])
        table = compare_pairs([old.cells], [{cell.key: cell}])
        whole = [change.outcome for change in judge_changes(table)]
        assert whole == [change.outcome for change in judge_changes(table, intervals=False)]


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(1e-4, 10), min_size=6, max_size=20),
    factor=st.floats(0.5, 2),
    paired=st.booleans(),
)
def test_the_interval_holds_the_ratio_and_turns_with_the_sides(values, factor, paired):
    scaled = [value * factor for value in values]
    ratio, low, high = log_ratio_interval(values, scaled, paired=paired)
    assert ratio == pytest.approx(factor)
    assert low <= ratio * (1 + 1e-9)
    assert high >= ratio * (1 - 1e-9)
    assert log_ratio_interval(scaled, values, paired=paired)[0] == pytest.approx(1 / factor)
