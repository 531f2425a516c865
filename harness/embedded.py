"""Where the embedded stack and presets lie: in the checkout, or inside an installed wheel.

Knows only the two places.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["embedded_folder", "embedded_stack_file"]


def embedded_folder() -> Path:
    """The `fixtures` folder that this copy of the harness came with."""
    package = Path(__file__).resolve().parent
    inside = package / "fixtures"  # the wheel's
    return inside if inside.is_dir() else package.parent / "fixtures"


def embedded_stack_file() -> Path:
    """The declaration of the embedded trained stack."""
    return embedded_folder() / "stages" / "stack.toml"
