"""The noise floor holds what equal things differ by, whatever the change that is looked for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.bench.noise_floor import noise_floor


def noise(seed, *, cells=30, launches=5, shared=0.01, own=0.01):
    random = np.random.default_rng(seed)
    return shared * random.standard_normal(launches) + own * random.standard_normal(
        (cells, launches)
    )


@pytest.mark.parametrize(("shared", "own"), [(0.01, 0.0), (0.0, 0.01), (0.01, 0.01)])
def test_equal_things_stay_below_it(shared, own):
    """2,000 tables whose launches shift all cells, each alone, or both: at a level of 5 %, at
    most 6.5 % (three standard errors) of them have a cell beyond it."""
    beyond = 0
    for seed in range(2000):
        table = noise(seed, shared=shared, own=own)
        beyond += table.mean(axis=1).max() > noise_floor(table, factor=1 / 5, level=0.05)
    assert beyond <= 0.065 * 2000


def test_one_more_night_stays_below_it():
    beyond = 0
    for seed in range(2000):
        *nights, tonight = noise(seed, launches=8).T
        table = np.array(nights).T
        floor = noise_floor(table, factor=1 + 1 / 7, level=0.05)
        beyond += (tonight - table.mean(axis=1)).max() > floor
    assert beyond <= 0.065 * 2000


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(-1, 1), min_size=30, max_size=30))
def test_a_lasting_change_is_no_noise(seed, changes):
    table = noise(seed)
    changed = table + np.array(changes)[:, None]
    assert noise_floor(changed, factor=0.2, level=0.01) == pytest.approx(
        noise_floor(table, factor=0.2, level=0.01)
    )


def test_one_launch_or_no_cell_has_no_floor_to_speak_of():
    assert noise_floor(noise(0, launches=1), factor=1, level=0.01) == math.inf
    assert noise_floor(noise(0)[:0], factor=1, level=0.01) == math.inf
    assert 0 < noise_floor(noise(0)[:1], factor=1, level=0.01) < math.inf
