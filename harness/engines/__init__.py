"""Who generates for a stack. `load_engine` gives the reference: PEFT, in this process.

Importing this package costs nothing; torch, transformers and PEFT come with the first engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.stack import AdapterStack

if TYPE_CHECKING:
    from harness.engines.peft import PeftEngine
    from harness.engines.random_weights import RandomEngine

__all__ = ["load_engine", "load_for_timing"]


def load_engine(
    stack: AdapterStack,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> PeftEngine:
    """Load *stack*: its base once, every adapter once. Use it as a context manager.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, …, or `auto` to spread the model over what there is; by
            default CUDA where there is one (spread when the model does not fit), otherwise the CPU.
        dtype: `float32`, `bfloat16` or `float16`; by default the checkpoint's own.
        trust_remote_code: allow Python code in the base's folder to run.

    Raises:
        InputError: a device that is absent, an unknown dtype, a base or tokenizer that
            transformers cannot load, adapters that do not fit.
        ActivationError: what was loaded is not what the files hold.
    """
    from harness.engines.peft import PeftEngine

    return PeftEngine(stack, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def load_for_timing(
    stack: AdapterStack,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> PeftEngine | RandomEngine:
    """Load *stack*, which may be a shape without weights; arguments and errors as `load_engine`."""
    if not stack.random:
        return load_engine(stack, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from harness.engines.random_weights import RandomEngine

    return RandomEngine(stack, device=device, dtype=dtype)
