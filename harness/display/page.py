"""Self-contained HTML pages: one frame, one look, foreign text always escaped.

A report's template extends `page.html.jinja` (light and dark, sortable tables, no network) and
fills its blocks. Knows nothing of what is reported.
"""

from __future__ import annotations

import base64
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.display.markdown import inline
from harness.display.terminal import shown

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["cell", "image_uri", "render"]

_FRAME = Path(__file__).parent / "templates"


def render(template: Path, **values: Any) -> str:
    """The text of *template*, which may extend or import what lies in `harness/display/templates`.

    Names that contain `.html` are escaped by jinja2; Markdown templates pass every foreign text
    through the filter `md`. The filter `show` is `cell`. An undefined name is an error.
    """
    return _environment(template.parent).get_template(template.name).render(values)


@functools.cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, _FRAME]),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": lambda value: inline(cell(value)), "show": cell}
    return environment


def cell(value: Any, digits: int = 4) -> str:
    """A value as text: *digits* significant digits, thousands grouped, a dash for nothing.

    A number with more digits before its point keeps them all, below a thousand million. Control
    and bidirectional characters are made visible.
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return shown(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–"
    text = "0" if value == 0 else f"{value:.{digits}g}"
    whole = 1 <= abs(value) < 1e9 and ("e" in text or "." not in text)
    return f"{value:,.0f}" if whole else text


def image_uri(svg: str) -> str:
    """An SVG as a `data:` address for an `<img>`, where no script in it would run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
