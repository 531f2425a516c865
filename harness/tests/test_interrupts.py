"""SIGTERM is an exception, and both signals can be put off without being lost."""

import select
import signal
import threading

import pytest

from harness.interrupts import Terminated, exit_code, postponed, terminable


@pytest.fixture(autouse=True)
def _heard():
    """A shell's background job inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_is_an_exception_within_the_block_and_as_before_after():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert exit_code(caught.value) == 143
    assert exit_code(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_somebody_elses_handler_and_another_thread_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]

    def elsewhere():
        with terminable():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard[1] == before


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_postponed_signal_is_told_at_once_and_raised_at_the_end(number, error):
    heard, done = signal.getsignal(signal.SIGINT), []

    def work():
        with terminable(), postponed() as waiting:
            assert select.select([waiting], [], [], 0)[0] == []
            signal.raise_signal(number)
            assert select.select([waiting], [], [], 0)[0] == [waiting]
            done.append("kept")

    with pytest.raises(error) as caught:
        work()
    assert type(caught.value) is error
    assert done == ["kept"]
    assert signal.getsignal(signal.SIGINT) is heard


def test_a_second_signal_does_not_wait():
    done = []

    def work():
        with postponed():
            signal.raise_signal(signal.SIGINT)
            done.append("kept")
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["kept"]


def test_a_signal_while_the_handlers_are_given_back_leaves_the_other_one_heard(monkeypatch):
    heard, real = [], signal.signal
    before = real(signal.SIGTERM, lambda *_: heard.append("terminated"))

    def interrupted(number, handler):
        real(number, handler)
        if handler is signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)

    def work():
        with monkeypatch.context() as patch, postponed():
            patch.setattr(signal, "signal", interrupted)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        signal.raise_signal(signal.SIGTERM)
    finally:
        real(signal.SIGTERM, before)
    assert heard == ["terminated"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("system", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_the_system_handles_is_left_to_it(number, system):
    before = signal.signal(number, system)
    try:
        with postponed():
            assert signal.getsignal(number) is system
    finally:
        signal.signal(number, before)


def test_another_thread_postpones_nothing_and_may_ask():
    heard = []

    def elsewhere():
        with postponed() as waiting:
            heard.append(select.select([waiting], [], [], 0)[0])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == [[]]
