"""How many single-bit flips in an adapter are found: by the lock, by the preflight, by loading.

    python -m harness.bench.bit_flips [--flips 300] [--seed 0] [--load]

Each flip is one bit of `adapter_model.safetensors` or `adapter_config.json` of a copy of the
embedded stack's style adapter, drawn evenly over the bits of both. With `--load` what the
preflight lets through is also loaded into the engine, which compares memory with the files.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

from harness.adapter_config import CONFIG_NAME
from harness.adapter_files import WEIGHTS_NAME
from harness.errors import HarnessError, InputError
from harness.preflight import check_stack_files
from harness.resolve import StackOptions, resolve_stack, stack_from_options
from harness.stack import AdapterStack
from harness.stack_lock import lock_faults, make_lock, write_lock

__all__ = ["measure"]


def measure(flips: int, seed: int, *, load: bool = False) -> dict[str, int]:
    """Flip one bit at a time; returns how many of *flips* each check found, by its name."""
    embedded = stack_from_options(StackOptions())
    found = dict.fromkeys(["lock", "preflight", "in the header", "in the config", "loading"], 0)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for adapter in embedded.adapters:
            shutil.copytree(adapter.path, root / adapter.name)
        stack = _resolved(embedded, root)
        lock = root / "stack.lock.json"
        write_lock(lock, make_lock(stack))
        files = [root / "style" / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
        sizes = [file.stat().st_size for file in files]
        for _ in range(flips):
            bit = chance.randrange(8 * sum(sizes))
            number = 0 if bit < 8 * sizes[0] else 1
            bit -= 8 * sizes[0] * number
            sound = files[number].read_bytes()
            broken = bytearray(sound)
            broken[bit // 8] ^= 1 << bit % 8
            files[number].write_bytes(broken)
            place = _place(number, bit // 8, sound)
            try:
                found["lock"] += _locked(lock, stack)
                caught = _preflight(embedded, root)
                found["preflight"] += caught
                if caught and place != "data":
                    found[f"in the {place}"] += 1
                if load:
                    found["loading"] += caught or _loading(embedded, root)
            finally:
                files[number].write_bytes(sound)
    return found


def _resolved(embedded: AdapterStack, root: Path) -> AdapterStack:
    return resolve_stack(
        base_model=embedded.base.path, adapters={a.name: root / a.name for a in embedded.adapters}
    )


def _place(number: int, byte: int, sound: bytes) -> str:
    if number == 0:
        return "config"
    return "header" if byte < 8 + int.from_bytes(sound[:8], "little") else "data"


def _locked(lock: Path, stack: AdapterStack) -> bool:
    try:
        return bool(lock_faults(lock, stack))
    except InputError:
        return True


def _preflight(embedded: AdapterStack, root: Path) -> bool:
    try:
        check_stack_files(_resolved(embedded, root))
    except InputError:
        return True
    return False


def _loading(embedded: AdapterStack, root: Path) -> bool:
    from harness.engines import load_engine

    try:
        with load_engine(_resolved(embedded, root), device="cpu"):
            return False
    except HarnessError:
        return True


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", action="store_true", help="also load what is let through (slow)")
    arguments = parser.parse_args()
    found = measure(arguments.flips, arguments.seed, load=arguments.load)
    for name, count in found.items():
        if name != "loading" or arguments.load:
            print(f"{name:14} {count:4} of {arguments.flips}  {count / arguments.flips:.1%}")


if __name__ == "__main__":
    main()
