"""One mode's work: what befell the machine is told, what it held is free, a bug is raised."""

import gc
import weakref

import pytest


class Held:
    """In a circle with itself, as hooks and their modules are."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def attempt():
    from harness.engines.faults import attempt  # brings torch

    return attempt


@pytest.mark.parametrize("place", ["host", "device"])
def test_what_a_mode_held_is_free_when_its_fault_is_told(attempt, place):
    import torch

    kind = MemoryError if place == "host" else torch.OutOfMemoryError
    held = []

    def work():
        mine = Held()
        held.append(weakref.ref(mine))
        raise kind("8 GiB asked")

    gc.disable()  # so that only what is asked for frees the circle
    try:
        fault = attempt(work)
        assert held[0]() is None
    finally:
        gc.enable()
    assert fault.said == "out of memory: 8 GiB asked"
    assert not fault.sticky


def test_work_that_gets_to_its_end_has_no_fault(attempt):
    done = []
    assert attempt(lambda: done.append(1)) is None
    assert done == [1]


def test_a_bug_is_raised(attempt):
    def work():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        attempt(work)
