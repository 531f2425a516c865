"""What a merge or a flattening did: the value, and its JSON, Markdown and model card.

What is written beside the weights holds no time and no machine, so that two runs write the same
bytes; the time is in the value. Knows nothing of how anything was computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.merge.proof import TensorLedger

__all__ = ["AdapterRecord", "MergeReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """One adapter that went in; `sha256` is over its config and weights."""

    name: str
    source: str
    weight: float
    rank: int
    modules: int
    parameters: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was done, and what it cost.

    Attributes:
        kind: `merge` (a checkpoint) or `flatten` (one adapter).
        base: the base's folder or id as given; for a flattening what the adapters name, or None.
        tensors: a row for each merged tensor (or flattened module) that was read back.
        verify: how much was read back.
        sha256: of the base's and the output's weight files; empty unless everything was verified.
        details: more figures by name (rank, max_lora_rank, …).
        notes: what a reader should know.
        seconds: wall time; not written beside the weights.
    """

    kind: str
    output: str
    strategy: str
    source: str
    base: str | None
    adapters: tuple[AdapterRecord, ...]
    options: Mapping[str, Any]
    dtype: str
    verify: str
    tensors: tuple[TensorLedger, ...]
    bytes_written: int
    parameters_touched: int
    sha256: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rounding_loss(self) -> float | None:
        """‖(W' − W) − ΔW‖ / ‖ΔW‖ over all checked tensors; None if nothing was checked."""
        return self._ratio(sum(row.lost_norm**2 for row in self.tensors))

    @property
    def one_by_one_loss(self) -> float | None:
        """The same loss, had every adapter been added and rounded in turn."""
        if all(row.one_by_one_norm is None for row in self.tensors):
            return None
        norms = (
            row.lost_norm if row.one_by_one_norm is None else row.one_by_one_norm
            for row in self.tensors
        )
        return self._ratio(sum(norm**2 for norm in norms))

    @property
    def exact_share(self) -> float | None:
        """The share of checked entries that equal the rounded float64 result."""
        checked = sum(row.checked for row in self.tensors)
        return sum(row.exact for row in self.tensors) / checked if checked else None

    @property
    def unmoved_share(self) -> float | None:
        """The share of checked entries that kept their number although their delta is not zero."""
        checked = sum(row.checked for row in self.tensors)
        return sum(row.unmoved for row in self.tensors) / checked if checked else None

    def _ratio(self, lost: float) -> float | None:
        if not self.tensors:
            return None
        delta = sum(row.delta_norm**2 for row in self.tensors)
        return float((lost / delta) ** 0.5) if delta else 0.0

    def as_json(self, *, timed: bool = True) -> dict[str, Any]:
        """Everything, as JSON values; without the output's place and the time if not *timed*."""
        value: dict[str, Any] = {
            "kind": self.kind,
            "strategy": {"name": self.strategy, "source": self.source, **self.options},
            "base": self.base,
            "adapters": [
                {
                    "name": a.name, "source": a.source, "weight": a.weight, "rank": a.rank,
                    "modules": a.modules, "parameters": a.parameters, "sha256": a.sha256,
                }
                for a in self.adapters
            ],
            "dtype": self.dtype,
            "parameters_touched": self.parameters_touched,
            "bytes_written": self.bytes_written,
            "verify": self.verify,
            "rounding": {
                "loss": self.rounding_loss,
                "survived": None if self.rounding_loss is None else max(0, 1 - self.rounding_loss),
                "one_by_one_loss": self.one_by_one_loss,
                "unmoved_share": self.unmoved_share,
                "exact_share": self.exact_share,
            },
            "tensors": [
                {
                    "name": row.name, "dtype": row.dtype, "shape": list(row.shape),
                    "adapters": list(row.adapters), "checked": row.checked, "exact": row.exact,
                    "max_error": row.max_error, "weight_norm": row.weight_norm,
                    "delta_norm": row.delta_norm, "rounding_loss": row.rounding_loss,
                    "survived": row.survived, "lost_norm": row.lost_norm,
                    "one_by_one_norm": row.one_by_one_norm, "unmoved": row.unmoved,
                }
                for row in self.tensors
            ],
            "sha256": {place: dict(files) for place, files in self.sha256.items()},
            "details": dict(self.details),
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }  # fmt: skip
        if timed:
            value |= {"output": self.output, "seconds": self.seconds}
        return value

    def as_text(self) -> str:
        """`as_json` without time, as the file beside the weights."""
        return json.dumps(self.as_json(timed=False), indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self, *, timed: bool = True) -> str:
        """The report for people."""
        lines = [f"# {'Merge' if self.kind == 'merge' else 'Flatten'} report", ""]
        lines += [f"- strategy: **{self.strategy}** ({self.source})"]
        lines += [f"- {name}: {value}" for name, value in self.options.items()]
        lines += [f"- base: `{self.base}`"] if self.base else []
        lines += [
            f"- stored as {self.dtype}, {self.bytes_written:,} bytes; "
            f"{self.parameters_touched:,} parameters touched"
        ]
        lines += [f"- {name}: {value}" for name, value in self.details.items()]
        if timed:
            lines += [f"- {self.seconds:.1f} s"]
        lines += ["", "| adapter | weight | rank | modules | parameters | sha256 |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        lines += [
            f"| {_cell(a.name)} (`{_cell(a.source)}`) | {a.weight:g} | {a.rank} | {a.modules} "
            f"| {a.parameters:,} | `{a.sha256[:12]}` |"
            for a in self.adapters
        ]
        lines += ["", "## What was checked", "", *self.summary()]
        lines += ["", *(f"> {note}" for note in self.notes)] if self.notes else []
        if self.tensors:
            merge = self.kind == "merge"
            what = "Tensors whose delta lost most to rounding" if merge else "Modules most off"
            lines += ["", f"## {what}", ""]
            lines += ["| tensor | ‖W‖ | ‖ΔW‖ | survived | unmoved | exact | max error |"]
            lines += ["|---|---:|---:|---:|---:|---:|---:|"]
            worst = sorted(self.tensors, key=lambda row: (-row.rounding_loss, row.name))
            lines += [
                f"| {_cell(row.name)} | {row.weight_norm:.4g} | {row.delta_norm:.4g} "
                f"| {row.survived:.2%} | {row.unmoved / max(row.checked, 1):.2%} "
                f"| {row.exact / max(row.checked, 1):.3%} | {row.max_error:.3g} |"
                for row in worst[:20]
            ]
            if len(worst) > 20:
                lines += ["", f"…and {len(worst) - 20} more in the JSON beside this file."]
        return "\n".join(lines) + "\n"

    def summary(self) -> tuple[str, ...]:
        """The figures in words, a line each."""
        loss, exact, unmoved = self.rounding_loss, self.exact_share, self.unmoved_share
        if loss is None or exact is None or unmoved is None:
            return ("Nothing was read back (verify: none).",)
        checked = sum(row.checked for row in self.tensors)
        if self.kind == "flatten":
            how = f"of rank {self.details['rank']}, stored as {self.dtype}"
            if self.options["truncated_to"] is not None:
                how += f", truncated from {self.details['sum of ranks']}"
            return (
                f"- {checked:,} entries of ΔW in {len(self.tensors)} modules were held against "
                f"float64 ({self.verify})",
                f"- the one adapter ({how}) is off by {loss:.2g} of ‖ΔW‖",
            )
        lines = [
            f"- {checked:,} entries of {len(self.tensors)} tensors were read back "
            f"({self.verify}); {exact:.4%} equal the rounded float64 result",
            f"- rounding to {self.dtype} lost {loss:.3%} of ‖ΔW‖; "
            f"{unmoved:.2%} of the entries did not move",
        ]
        if (turn := self.one_by_one_loss) is not None:
            lines.append(f"- adding and rounding one adapter after the other: {turn:.3%} lost")
        return tuple(lines)

    def as_card(self, *, base_id: str | None, adapter: bool) -> str:
        """A model card with the front matter that the hub and PEFT expect."""
        front = ["---"]
        if base_id:
            front += [f"base_model: {base_id}"]
            front += [] if adapter else ["base_model_relation: merge"]
        front += [f"library_name: {'peft' if adapter else 'transformers'}"]
        front += ["pipeline_tag: text-generation", "tags:", "- lora"]
        front += [f"- base_model:adapter:{base_id}"] if adapter and base_id else []
        front += ["- transformers"] if adapter else ["- merge"]
        front += ["---", ""]
        names = ", ".join(a.name for a in self.adapters)
        if adapter:
            title = f"# {names} as one LoRA adapter"
        else:
            title = f"# {self.base or 'the base'} with {names} merged in"
        return "\n".join(front) + title + "\n\n" + self.as_markdown(timed=False).partition("\n")[2]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
