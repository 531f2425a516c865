"""How fast merging is beside `cp`, PEFT and mergekit: interleaved runs of whole processes.

Writes a Qwen3-shaped bfloat16 checkpoint in shards with a tokenizer of Qwen3's size, and two
all-linear adapters (r = 16 and 64), then merges them in turn with each contender and prints
medians. The peers run in an interpreter of their own (`--peers`), so that they need not be
installed beside the harness. Run it with
`python -m harness.bench.merge_speed FOLDER --peers /path/to/venv/bin/python`, and
`python -m harness.bench.merge_speed FOLDER --memory 0.5 2 4` for the memory at several sizes.

Every run begins alike: the inputs are read once (so that they lie in the page cache), everything
written before is on disk, the machine rests for `--pause` seconds (while the kernel sorts and
gives back what the last process freed, it charges the next one for it), and with `--touch GB` that
much memory was taken and given back: a virtual machine whose host reclaims free memory otherwise
charges the next process for getting it back, some seconds for gigabytes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.files.staging import write_text

__all__ = ["Run", "main", "measure"]

_OURS = "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"

_PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, first, second, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, first, adapter_name="a")
model.load_adapter(second, "b")
model.base_model.set_adapter(["a", "b"])
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""

_MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, first, second, out, cache = sys.argv[1:]
config = {
    "merge_method": "task_arithmetic", "base_model": base, "dtype": "bfloat16",
    "parameters": {"normalize": False},
    "models": [{"model": f"{base}+{lora}", "parameters": {"weight": 1.0}}
               for lora in (first, second)],
}
options = MergeOptions(lora_merge_cache=cache, copy_tokenizer=False, out_shard_size=500_000_000)
run_merge(MergeConfiguration.model_validate(config), out, options=options)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process: seconds of wall clock and of CPU, and its largest memory in bytes.

    Attributes:
        flushed: wall clock until all that it wrote was on disk.
        resident: the kernel's own maximum; mapped file pages count.
        anonymous: the largest `RssAnon` seen, looked at every 10 ms.
    """

    wall: float
    flushed: float
    cpu: float
    resident: int
    anonymous: int


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run *command* to its end, with *environment* added to this process' own.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | dict(environment or {}),
    )  # fmt: skip
    peak = [0]
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    done.set()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {output[-2000:].decode(errors='replace')}")
    os.sync()
    return Run(
        wall=wall,
        flushed=time.perf_counter() - begun,
        cpu=usage.ru_utime + usage.ru_stime,
        resident=usage.ru_maxrss * 1024,
        anonymous=peak[0],
    )


def _watch(process: int, peak: list[int], done: threading.Event) -> None:
    status = Path(f"/proc/{process}/status")
    while not done.wait(0.01):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A command, what it leaves behind, and what its environment has of its own."""

    command: Sequence[str]
    leaves: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _contenders(folder: Path, peers: str | None, verify: str) -> dict[str, Contender]:
    base, first, second = (str(folder / name) for name in ("base", "r16", "r64"))
    out, cache, fresh = folder / "out", folder / "cache", folder / "fresh"
    ours = [sys.executable, "-c", _OURS, "merge", "--base", base, "--adapters", first, second]
    ours += ["--output", str(out), "--verify", verify]
    known = {"XDG_CACHE_HOME": str(folder / "known")}
    found = {
        "harness": Contender(command=ours, leaves=(out,), environment=known),
        # The first time that it meets the base, it also reads all of it for its SHA-256 and for
        # what is no number, and checks the tokenizer.
        "harness, first time": Contender(
            command=ours, leaves=(out, fresh), environment={"XDG_CACHE_HOME": str(fresh)}
        ),
        "cp": Contender(command=["cp", "-r", base, str(out)], leaves=(out,)),
        "import torch": Contender(command=[sys.executable, "-c", "import torch"]),
    }
    if peers:
        peft = [peers, "-c", _PEFT, base, first, second, str(out)]
        found["PEFT"] = Contender(command=peft, leaves=(out,))
        mergekit = [peers, "-c", _MERGEKIT, base, first, second, str(out), str(cache)]
        found["mergekit"] = Contender(command=mergekit, leaves=(out, cache))
    return found


def _write_inputs(folder: Path, *, layers: int, vocabulary: int) -> None:
    if not (folder / "base").exists():
        # In a process of its own: the system counts what its parent held as a child's peak, too.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_write_all, folder, layers, vocabulary).result()


def _write_all(folder: Path, layers: int, vocabulary: int) -> None:
    from harness.testing.sized import (
        write_sized_adapter,
        write_sized_base,
        write_sized_tokenizer,
    )

    base = write_sized_base(folder / "base", layers=layers, vocabulary=vocabulary)
    write_sized_tokenizer(base, vocabulary=vocabulary)
    write_sized_adapter(folder / "r16", base, layers=layers, rank=16, seed=101)
    write_sized_adapter(folder / "r64", base, layers=layers, rank=64, seed=102)


def _settle(folder: Path, touch: float, pause: float) -> None:
    """The state that every run begins in."""
    for name in ("base", "r16", "r64"):
        for file in sorted((folder / name).iterdir()):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
    os.sync()  # nobody pays for what another one left to write
    if touch:
        code = f"import mmap\nm = mmap.mmap(-1, {int(touch * 2**30)})\n"
        code += "for i in range(0, len(m), 4096): m[i] = 1"
        subprocess.run([sys.executable, "-c", code], check=True)
    time.sleep(pause)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty or new folder with room for the runs")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with PEFT and mergekit")
    parser.add_argument("--layers", type=int, default=14, help="100 MB each, above 0.6 GB (14)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verify", default="sampled", choices=("none", "sampled", "full"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contenders")
    parser.add_argument("--touch", type=float, default=0, metavar="GB", help="see above (0)")
    parser.add_argument("--pause", type=float, default=5, metavar="S", help="see above (5)")
    parser.add_argument(
        "--memory",
        type=float,
        nargs="+",
        metavar="GB",
        help="only this: merge bases of these sizes",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    if arguments.memory:
        print(_memory(folder, arguments.memory, arguments.verify))
        return 0
    _write_inputs(folder, layers=arguments.layers, vocabulary=_VOCABULARY)
    contenders = _contenders(folder, arguments.peers, arguments.verify)
    if arguments.only:
        contenders = {name: contenders[name] for name in arguments.only}
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    if "harness" in contenders:  # from then on it remembers the base's SHA-256
        measure(contenders["harness"].command, contenders["harness"].environment)
        shutil.rmtree(folder / "out")
    for number in range(arguments.rounds):
        for name, contender in contenders.items():
            _settle(folder, arguments.touch, arguments.pause)
            runs[name].append(measure(contender.command, contender.environment))
            for place in contender.leaves:
                shutil.rmtree(place, ignore_errors=True)
            print(f"round {number + 1} {name}: {runs[name][-1]}", file=sys.stderr)
    print(_table(runs))
    if arguments.json:
        rows = {name: [asdict(run) for run in found] for name, found in runs.items()}
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")
    return 0


_VOCABULARY, _SMALL_VOCABULARY = 151936, 32000
_LAYER_BYTES, _ROW_BYTES = 100_671_488, 4096


def _memory(folder: Path, sizes: Sequence[float], verify: str) -> str:
    lines = ["| base GB | resident MiB | anonymous MiB | wall s |", "|---:|---:|---:|---:|"]
    for size in sizes:
        place = folder / f"{size:g}"
        layers = max(1, round((size * 1e9 - _SMALL_VOCABULARY * _ROW_BYTES) / _LAYER_BYTES))
        _write_inputs(place, layers=layers, vocabulary=_SMALL_VOCABULARY)
        real = sum(file.stat().st_size for file in (place / "base").iterdir())
        contender = _contenders(place, None, verify)["harness"]
        run = measure(contender.command, contender.environment)
        lines.append(
            f"| {real / 1e9:.2f} | {run.resident / 2**20:.0f} | {run.anonymous / 2**20:.0f} "
            f"| {run.wall:.1f} |"
        )
        shutil.rmtree(place)
    return "\n".join(lines)


def _table(runs: dict[str, list[Run]]) -> str:
    head = ["", "wall s", "wall s until on disk", "CPU s", "resident MiB", "anonymous MiB"]
    head += ["wall / harness", "on disk / harness", "CPU / harness"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]

    def middle(name: str, field: str) -> float:
        return float(statistics.median(getattr(run, field) for run in runs[name]))

    for name in runs:
        cells = [f"{middle(name, field):.2f}" for field in ("wall", "flushed", "cpu")]
        cells += [f"{middle(name, field) / 2**20:.0f}" for field in ("resident", "anonymous")]
        for field_name in ("wall", "flushed", "cpu") if "harness" in runs else ():
            # The median of the rounds' own ratios: what the machine did, it did to both.
            pairs = zip(runs[name], runs["harness"], strict=True)
            ratios = [getattr(one, field_name) / getattr(ours, field_name) for one, ours in pairs]
            cells.append(f"{statistics.median(ratios):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if {"harness", "cp", "import torch"} <= runs.keys():
        ours, cp, torch = (middle(name, "cpu") for name in ("harness", "cp", "import torch"))
        lines.append("")
        lines.append(
            f"CPU of the harness: {ours / cp:.1f} times cp's; less what importing torch would "
            f"take, {(ours - torch) / cp:.1f} times."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
