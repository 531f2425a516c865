"""Which files of snapshots belong to nobody."""

from pathlib import Path

import pytest

from harness.plugin.orphans import _orphaned
from harness.snapshot_files import sidecar_bytes, sidecar_of


@pytest.fixture
def sidecar(tmp_path):
    """The evidence of a text that is not there (yet)."""
    path = tmp_path / "p--one--base.toml"
    sidecar_of(path).write_bytes(sidecar_bytes(b"text", b"evidence"))
    return sidecar_of(path)


def test_a_sidecar_alone_is_one_and_beside_what_cannot_be_read_it_is_not(sidecar):
    asked = {"p--one--base"}
    assert _orphaned(None, sidecar, asked)
    sidecar.with_suffix(".toml").mkdir()
    assert not _orphaned(None, sidecar, asked)


def test_a_sidecar_whose_snapshot_is_just_being_put_there_is_none(sidecar, monkeypatch):
    """Of a new snapshot another session puts the sidecar first, then the text."""
    real, text = Path.exists, sidecar.with_suffix(".toml")

    def exists(self, **named):
        found = real(self, **named)
        if self == text:
            text.write_bytes(b"text")
        return found

    monkeypatch.setattr(Path, "exists", exists)
    assert not _orphaned(None, sidecar, {"p--one--base"})
