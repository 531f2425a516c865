"""Does every mode still say what was accepted? Compared token for token."""

import pytest

pytestmark = pytest.mark.snapshot


def test_completion_is_the_accepted_one(lora_completion, lora_snapshot):
    assert lora_completion == lora_snapshot
