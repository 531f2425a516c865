"""Every planted fault is caught with its cause named; no harmless change raises an alarm."""

import pytest

from harness.tests.certificate.faults import FAULTS
from harness.tests.certificate.harmless import HARMLESS


def test_corpus_is_as_large_as_claimed():
    assert len(FAULTS) >= 50
    assert len(HARMLESS) >= 10


def test_sound_subject_is_certified(subject):
    certificate = subject.certify()
    assert certificate.verdict == "held", certificate.explain()


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_planted_fault_is_caught_with_its_cause(name, subject):
    plant, check, words = FAULTS[name]
    plant(subject)
    certificate = subject.certify(end_to_end=False)
    assert certificate.verdict == "failed"
    found = certificate.check(check)
    assert found.outcome == "failed", certificate.explain()
    assert words in "\n".join(found.evidence), certificate.explain()
    assert found.remedy


@pytest.fixture
def _threads_given_back():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_given_back")
@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_change_raises_no_alarm(name, subject):
    HARMLESS[name](subject)
    certificate = subject.certify()
    assert certificate.passed, certificate.explain()
