"""The fuzzer's seeds and finds, replayed: what it once found stays mended."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.tests.fuzz.readers import TARGETS, check_header, check_json

_CORPUS = Path(__file__).parent / "fuzz" / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_every_known_input_is_refused_or_read_as_the_reference_reads_it(target, tmp_path):
    accepted = [
        TARGETS[target](file.read_bytes(), tmp_path)
        for file in sorted((_CORPUS / target).iterdir())
    ]
    assert any(accepted), "a replay in which everything is refused tests one half only"
    assert not all(accepted)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_sound_file_with_a_few_bytes_changed_is_refused_or_right(data, scratch):
    target = data.draw(st.sampled_from(sorted(TARGETS)))
    seeds = [file.read_bytes() for file in sorted((_CORPUS / target).iterdir())]
    content = bytearray(data.draw(st.sampled_from([seed for seed in seeds if seed])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    TARGETS[target](bytes(content), scratch)


@settings(max_examples=100, deadline=None)
@given(
    value=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=10,
        ),
    )
)  # fmt: skip
def test_sound_json_is_accepted(value, scratch):
    import json

    assert check_json(json.dumps(value, ensure_ascii=False).encode(), scratch)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5))
def test_what_the_formats_own_implementation_writes_is_accepted(shapes, scratch):
    import numpy as np
    from safetensors.numpy import save

    tensors = {f"t{n}": np.ones(shape, np.float16) for n, shape in enumerate(shapes)}
    assert check_header(b"\0" + save(tensors, {"format": "pt"}), scratch)
