"""The folders that are broken; and no folder, broken, sound or mutated, makes anything ask for the
network."""

import shutil
import socket

import pytest

from harness.tests.hostile.folders import Folders


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def sound_folders(tiny, tmp_path_factory):
    """The tiny stack's folders side by side, without a claim about the base."""
    root = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny.base, root / "base")
    for name, folder in tiny.adapters.items():
        shutil.copytree(folder, root / name)
        Folders.json(_At(root), f"{name}/adapter_config.json", base_model_name_or_path="../base")
    return root


class _At:
    def __init__(self, root):
        self.root = root


@pytest.fixture
def folders(sound_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    # A child's limits on processor time: what hangs, hangs for less.
    monkeypatch.setattr("harness.files.patterns._CPU_SECONDS", 1)
    monkeypatch.setattr("harness.template_probe._CPU_SECONDS", 1)
    return Folders(tmp_path / "case", sound_folders)
