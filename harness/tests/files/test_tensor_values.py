"""One integer maximum a block tells what a float64 copy of every number tells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.files.tensor_files import read_tensor_file
from harness.files.tensor_values import value_ranges
from harness.tests.hostile.folders import write_header

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("values") / "x.safetensors"


@pytest.mark.parametrize("dtype", WIDTHS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_range_is_that_of_the_decoded_numbers(file, dtype, data):
    from harness.merge.storage import RAW, decode

    rows = data.draw(st.integers(1, 4))
    raw = data.draw(st.binary(min_size=3 * rows * WIDTHS[dtype], max_size=3 * rows * WIDTHS[dtype]))
    entry = {"dtype": dtype, "shape": [rows, 3], "data_offsets": [0, len(raw)]}
    write_header(file, {"x": entry}, raw)
    (found,) = value_ranges(read_tensor_file(file, what="x"))
    with np.errstate(all="ignore"):
        numbers = decode(np.frombuffer(raw, RAW[dtype]), dtype, np.float64).reshape(rows, 3)
    if np.isfinite(numbers).all():
        assert found.bad is None
        assert found.largest == np.abs(numbers).max()
        assert found.zero == (not numbers.any())
    else:
        assert found.bad == tuple(np.argwhere(~np.isfinite(numbers))[0])
        assert found.kind == ("NaN" if np.isnan(numbers[found.bad]) else "Inf")


def test_tensor_of_several_blocks_is_read_to_its_end(file, monkeypatch):
    monkeypatch.setattr("harness.files.tensor_values._BLOCK_BYTES", 64)
    numbers = np.arange(100, dtype=np.float32)
    numbers[97] = -1000
    entry = {"dtype": "F32", "shape": [10, 10], "data_offsets": [0, 400]}
    write_header(file, {"x": entry}, numbers.tobytes())
    assert [r.largest for r in value_ranges(read_tensor_file(file, what="x"))] == [1000]
    numbers[73] = np.nan
    write_header(file, {"x": entry}, numbers.tobytes())
    (found,) = value_ranges(read_tensor_file(file, what="x"))
    assert (found.bad, found.kind) == ((7, 3), "NaN")


def test_file_that_shrinks_while_it_is_read_is_an_error(file):
    numbers = np.ones(100, np.float32)
    write_header(
        file, {"x": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}, numbers.tobytes()
    )
    read = read_tensor_file(file, what="x")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OSError, match="shorter"):
        list(value_ranges(read))
