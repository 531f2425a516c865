"""Killed, interrupted, out of room: the output is absent, the old one or the whole new one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import InputError, merge_lora_adapters
from harness.tests.merge.test_merging import digests
from harness.tests.merge.test_outputs import refuse_direct_writing

# One process imports, then forks a child for each kill: a merge is milliseconds, an import is not.
# The moments are drawn up to a horizon that grows while children are caught at work and shrinks
# when they finish first, so that both happen on a machine of any speed.
_DRIVER = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
from harness.merge.merging import merge_lora_adapters
base, style, instruct, root, rounds = sys.argv[1:6]
root = Path(root)

def merge(out, adapters):
    merge_lora_adapters(base, adapters, out, force=True, workers=2)

def state(folder):
    if not folder.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

names = {}
for name, adapters in (("old", [style]), ("new", [style, instruct])):
    merge(root / name, adapters)
    names[state(root / name)] = name
horizon = 0.05
out = root / "out"
seen = {"absent": 0, "old": 0, "new": 0, "other": 0}
chance = random.Random(0)
for number in range(int(rounds)):
    shutil.rmtree(out, ignore_errors=True)
    if number % 2:
        shutil.copytree(root / "old", out)
    before = "old" if number % 2 else "absent"
    child = os.fork()
    if child == 0:
        try:
            merge(out, [style, instruct])
        finally:
            os._exit(0)
    time.sleep(chance.random() * horizon)
    os.kill(child, signal.SIGKILL)
    finished = os.WIFEXITED(os.waitpid(child, 0)[1])
    horizon *= 0.9 if finished else 1.05
    found = state(out)
    found = "absent" if found == "absent" else names.get(found, "other")
    if found not in (before, "new"):
        found = "other"
    seen[found] += 1
time.sleep(1.1)
merge(out, [style])
left = [p.name for p in root.iterdir() if p.name.startswith(".staging")]
print(json.dumps({"seen": seen, "left": left}))
"""


def _kill(tiny, tmp_path: Path, rounds: int) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(tiny.base), *map(str, tiny.adapters.values()),
         str(tmp_path), str(rounds)],
        capture_output=True, text=True, check=False, timeout=1800,
        # A forked child cannot use the parent's OpenMP threads: it would wait for them for ever.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["left"] == [], "the next merge sweeps what killed ones left"
    seen: dict[str, int] = found["seen"]
    return seen


def test_killed_at_random_moments_the_output_is_whole_or_as_before(tiny, tmp_path):
    seen = _kill(tiny, tmp_path, 30)
    assert seen["other"] == 0
    assert seen["absent"] + seen["old"] > 0


@pytest.mark.slow
def test_200_kills_leave_the_output_absent_old_or_whole(tiny, tmp_path):
    seen = _kill(tiny, tmp_path, 200)
    assert seen["other"] == 0
    assert sum(seen.values()) == 200
    assert min(seen["absent"], seen["old"], seen["new"]) > 0


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "posix_fallocate"])
def test_a_disk_that_fills_up_leaves_nothing_and_the_old_output(tiny, tmp_path, monkeypatch, call):
    old = tmp_path / "out"
    merge_lora_adapters(tiny.base, [tiny.adapters["style"]], old)
    before = digests(old)
    if call == "copy_file_range":
        refuse_direct_writing(monkeypatch)
    real, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(1)
        if len(calls) > (0 if call == "posix_fallocate" else 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match="No space left"):
        merge_lora_adapters(tiny.base, tiny.adapters, old, force=True)
    monkeypatch.undo()
    assert digests(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_limit_of_the_system_on_file_sizes_leaves_nothing(tiny, tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from harness.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "merge", "--base", str(tiny.base), "--adapters",
         *map(str, tiny.adapters.values()), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
        # A forked child cannot use the parent's OpenMP threads: it would wait for them for ever.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_is_said_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="are needed, 1,000 are free"):
        merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_workers_and_leaves_nothing(tiny, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_changes_while_it_is_merged_is_noticed(tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)

    def touch(done: int, total: int) -> None:
        os.utime(base / "model.safetensors", ns=(1, 1))

    with pytest.raises(InputError, match="changed while it was being merged"):
        merge_lora_adapters(base, tiny.adapters, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed_once_read(monkeypatch):
    """`changed_once_read(module, name, file)`: *file* changes as soon as `module.name` returns."""

    def plant(module, name, file):
        real = getattr(module, name)

        def reading(*arguments, **named):
            found = real(*arguments, **named)
            os.utime(file, ns=(1, 1))
            return found

        monkeypatch.setattr(module, name, reading)

    return plant


def test_an_interrupted_merge_does_not_wait_for_the_bases_digest(tiny, tmp_path, monkeypatch):
    from harness.merge import inputs

    stopped = []

    def reads_for_long(paths, *, stop):
        stopped.append(stop.wait(60))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "file_digests", reads_for_long)
    with pytest.raises(KeyboardInterrupt):
        merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "out", progress=interrupt)
    assert stopped == [True]
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_cut_short_while_it_is_merged_is_said(
    tiny, adapter_copy, tmp_path, monkeypatch
):
    """Read through the map, it would end the process by a signal."""
    from harness.merge import inputs

    style, real = adapter_copy("style"), inputs.open_sources

    def cut(*arguments, **named):
        found = real(*arguments, **named)
        os.truncate(style / "adapter_model.safetensors", 4096)
        return found

    monkeypatch.setattr(inputs, "open_sources", cut)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: changed while it was"):
        merge_lora_adapters(tiny.base, [style], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["read_adapter", "read_checkpoint", "open_sources"])
def test_an_input_that_changes_once_it_was_read_is_noticed(
    tiny, adapter_copy, tmp_path, changed_once_read, reader
):
    from harness.merge import inputs

    base, style = tmp_path / "base", adapter_copy("style")
    shutil.copytree(tiny.base, base)
    folder, name = (base, "model") if reader == "read_checkpoint" else (style, "adapter_model")
    changed_once_read(inputs, reader, folder / f"{name}.safetensors")
    with pytest.raises(InputError, match=rf"{name}.* changed while it was being merged"):
        merge_lora_adapters(base, [style], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_once_it_was_read_is_not_flattened(
    adapter_copy, tmp_path, changed_once_read
):
    from harness.merge import flatten

    style = adapter_copy("style")
    changed_once_read(flatten, "open_sources", style / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model.* changed while it was being merged"):
        flatten.flatten_adapters([style], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_goes_between_two_looks_is_no_error_of_the_output(tmp_path, monkeypatch):
    from harness.merge.places import Watch

    file, real = tmp_path / "weights", Path.stat
    file.write_text("x")

    def stat(path, **named):
        found = real(path, **named)
        path.unlink()
        return found

    watch = Watch()
    watch.look([file])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        watch.check([file])  # there at the only look
    with pytest.raises(InputError, match="changed while it was being merged"):
        watch.check([file])


def test_past_the_cache_copied_by_the_kernel_or_read_and_written_the_bytes_are_the_same(
    tiny, tmp_path, monkeypatch
):
    merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "direct")
    refuse_direct_writing(monkeypatch)
    merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "kernel")

    def other_disk(*arguments):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", other_disk)
    merge_lora_adapters(tiny.base, tiny.adapters, tmp_path / "plain")
    assert digests(tmp_path / "direct") == digests(tmp_path / "kernel")
    assert digests(tmp_path / "direct") == digests(tmp_path / "plain")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    import tracemalloc

    from harness import flatten_adapters
    from harness.testing.sized import write_sized_adapter, write_sized_base

    peaks: dict[str, list[int]] = {"merge": [], "flatten": [], "compress": []}
    write = {
        "merge": lambda base, adapters, out: merge_lora_adapters(base, adapters, out, workers=1),
        "flatten": lambda _, adapters, out: flatten_adapters(adapters, out),
        "compress": lambda _, adapters, out: flatten_adapters(adapters, out, compress=True),
    }
    for layers in (1, 3):
        base = write_sized_base(tmp_path / f"base{layers}", layers=layers, vocabulary=64)
        adapters = [
            write_sized_adapter(tmp_path / f"{layers}-{n}", base, layers=layers, rank=8, seed=n)
            for n in range(2)
        ]
        for name, run in write.items():
            tracemalloc.start()
            run(base, adapters, tmp_path / "out" / name)
            peaks[name].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        shutil.rmtree(tmp_path / "out")
    for name, found in peaks.items():
        assert found[1] < found[0] * 1.1 + 1e6, f"{name}: {found}"
        assert found[1] < 64 << 20, f"{name}: {found}"
