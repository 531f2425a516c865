"""Does every mode stop, or not, as the stack's TOML declares, and do the files agree on it?"""

import pytest

pytestmark = pytest.mark.stopping


@pytest.fixture(scope="module")
def report(lora_stack, lora_engine, lora_stopping_completions):
    """The stopping clinic's report on the modes that declare something."""
    from harness import examine_stopping

    declared = [mode for mode in lora_stack.modes if mode.name in lora_stack.stops]
    said = {mode.name: lora_stopping_completions.of(mode) for mode in declared}
    return examine_stopping(said, engine=lora_engine)


def test_mode_stops_as_declared(lora_declared_mode, report, lora_judge):
    lora_judge(report.judged(lora_declared_mode.name))


def test_files_agree_on_what_ends_a_turn(report, lora_judge):
    for finding in report.findings:
        lora_judge(finding.verdict)


def test_nothing_follows_an_eos(lora_mode, lora_completions, lora_engine):
    for completion in lora_completions.of(lora_mode):
        assert not set(completion.token_ids[:-1]) & set(lora_engine.eos_token_ids)
