"""How fast merging is beside `cp`, PEFT and mergekit: interleaved runs of whole processes.

Writes a Qwen3-shaped bfloat16 checkpoint in shards and two all-linear adapters (r = 16 and 64),
then merges them in turn with each contender and prints medians. The peers run in an interpreter
of their own (`--peers`), so that they need not be installed beside the harness. Run it with
`python -m harness.bench.merge_speed FOLDER --peers /path/to/venv/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.staging import write_text

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
        resident: the kernel's own maximum; mapped file pages count.
        anonymous: the largest `RssAnon` seen, looked at every 10 ms.
    """

    wall: float
    cpu: float
    resident: int
    anonymous: int


def measure(command: Sequence[str]) -> Run:
    """Run *command* to its end.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
    return Run(
        wall=wall,
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


def _contenders(
    folder: Path, peers: str | None, verify: str
) -> dict[str, tuple[list[str], Sequence[Path]]]:
    """The commands by name, and what each leaves behind."""
    base, first, second = (str(folder / name) for name in ("base", "r16", "r64"))
    out, cache = folder / "out", folder / "cache"
    ours = [sys.executable, "-c", _OURS, "merge", "--base", base, "--adapters", first, second]
    found: dict[str, tuple[list[str], Sequence[Path]]] = {
        "harness": ([*ours, "--output", str(out), "--verify", verify], (out,)),
        "cp": (["cp", "-r", base, str(out)], (out,)),
        "import torch": ([sys.executable, "-c", "import torch"], ()),
    }
    if peers:
        found["PEFT"] = ([peers, "-c", _PEFT, base, first, second, str(out)], (out,))
        mergekit = [peers, "-c", _MERGEKIT, base, first, second, str(out), str(cache)]
        found["mergekit"] = (mergekit, (out, cache))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty or new folder with room for the runs")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with PEFT and mergekit")
    parser.add_argument("--layers", type=int, default=14, help="100 MB each, above 0.6 GB (14)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verify", default="sampled", choices=("none", "sampled", "full"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contenders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    arguments = parser.parse_args(argv)
    from harness.testing.sized import write_sized_adapter, write_sized_base

    folder: Path = arguments.folder
    layers: int = arguments.layers
    if not (folder / "base").exists():
        base = write_sized_base(folder / "base", layers=layers)
        write_sized_adapter(folder / "r16", base, layers=layers, rank=16, seed=101)
        write_sized_adapter(folder / "r64", base, layers=layers, rank=64, seed=102)
    contenders = _contenders(folder, arguments.peers, arguments.verify)
    if arguments.only:
        contenders = {name: contenders[name] for name in arguments.only}
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name, (command, left) in contenders.items():
            os.sync()  # nobody pays for what another one left to write
            runs[name].append(measure(command))
            for place in left:
                shutil.rmtree(place, ignore_errors=True)
            print(f"round {number + 1} {name}: {runs[name][-1]}", file=sys.stderr)
    print(_table(runs))
    if arguments.json:
        rows = {name: [asdict(run) for run in found] for name, found in runs.items()}
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")
    return 0


def _table(runs: dict[str, list[Run]]) -> str:
    lines = ["| | wall s | CPU s | resident MiB | anonymous MiB | wall / harness |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]

    def middle(name: str, field: str) -> float:
        return float(statistics.median(getattr(run, field) for run in runs[name]))

    for name in runs:
        ratio = (
            f"{middle(name, 'wall') / middle('harness', 'wall'):.1f}" if "harness" in runs else ""
        )
        lines.append(
            f"| {name} | {middle(name, 'wall'):.2f} | {middle(name, 'cpu'):.2f} "
            f"| {middle(name, 'resident') / 2**20:.0f} | {middle(name, 'anonymous') / 2**20:.0f} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
