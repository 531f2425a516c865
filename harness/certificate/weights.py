"""One live base weight against the file's: bit for bit, or with adapters merged into it.

One pass over the file's weight, a block of rows at a time: each block is compared with the live
weight and multiplied with a probe's inputs in float64, so that nothing is read twice and memory
stays small. Knows nothing of outputs or of other layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.certificate.claim import same_bits
from harness.certificate.diagnosis import diagnose, fit, respond
from harness.engines.inspection import LiveLayer
from harness.lora import LoraPair

__all__ = [
    "OFFLOADED",
    "Others",
    "Scan",
    "WeightFinding",
    "compare_tensor",
    "named_others",
    "scan_embedding",
    "scan_linear",
]

#: The cause of a weight that lies on no device here.
OFFLOADED = "it is offloaded and not here to be compared"
_BLOCK = 1 << 18  # elements of a weight in float64 at a time: 2 MiB, which stays in the cache
_DEVICE_BLOCK = 1 << 24  # on an accelerator: launches and transfers cost more than memory
_UNADAPTED_ROWS = 8192  # output rows multiplied where no adapter acts; every row is compared
_NORM_EVERY = 8  # blocks of rows, of which one is measured: the norm is a unit of rounding only
_DIRECTIONS = 8  # random inputs that a wrong weight is read through
Others = Callable[[str, LoraPair], Iterable[tuple[str, LoraPair]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFinding:
    """A live base weight against the file's.

    Attributes:
        equal: bit for bit, the file's tensor in the live dtype.
        units: where adapters belong in the weight: RMS error over (eps · RMS of the entries),
            the worst row or column; 0 where none belong.
        cause: what a wrong weight looks like; None for a right one.
    """

    name: str
    equal: bool
    units: float
    cause: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A weight's finding, the file's `Wx` in float64, and about the Frobenius norm of its W."""

    weight: WeightFinding
    reference: Tensor | None
    norm: float = 0.0


def scan_linear(
    layer: LiveLayer,
    stored: Tensor,
    merged: Mapping[str, float],
    pairs: Mapping[str, LoraPair],
    device: torch.device,
    others: Others,
    x: Tensor | None,
) -> Scan:
    """A linear weight, block by block: the comparison, and `Wx` of the file's in float64."""
    flipped = layer.kind == "conv1d"
    live = layer.weight.T if flipped else layer.weight
    file = stored.T if flipped else stored
    out, width = live.shape
    wide = None if x is None else x.to(torch.float64)
    shown = out if pairs else min(out, _UNADAPTED_ROWS)
    reference = None if wide is None else wide.new_empty((wide.shape[0], shown))
    directions: Tensor | None = None  # drawn where something differs
    seen = torch.zeros((_DIRECTIONS, out), dtype=torch.float64, device=device)
    equal, differing, rounded_bf16, scaled = True, 0, True, [0.0, 0.0]
    coarse_bf16 = live.dtype != torch.bfloat16
    columns = torch.zeros((2, width), dtype=torch.float64, device=device)
    rows = torch.zeros((2, out), dtype=torch.float64, device=device)
    step = max(1, (_BLOCK if device.type == "cpu" else _DEVICE_BLOCK) // width)
    room = torch.empty((min(step, out), width), dtype=torch.float64, device=device)
    finite, square, measured = True, 0.0, 0
    for start in range(0, out, step):
        here = slice(start, min(start + step, out))
        cast = file[here].to(device).to(live.dtype)
        alike = same_bits(cast, live[here].to(device))
        equal = equal and alike
        wanted = wide is not None and reference is not None and start < shown
        if alike and not merged and not wanted:
            continue
        block = room[: cast.shape[0]]
        block.copy_(cast)
        if wide is not None and reference is not None and wanted:
            reference[:, here] = (wide @ block.T)[:, : shown - start]
            if start // step % _NORM_EVERY == 0:
                square += float(torch.linalg.vector_norm(block)) ** 2
                measured += block.shape[0]
        if alike and not merged:
            continue
        if directions is None:
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn((_DIRECTIONS, width), generator=generator, dtype=torch.float64)
            directions = directions.to(device)
        now = live[here].to(device, torch.float64)
        finite = finite and bool(torch.isfinite(now).all())
        excess = now - block
        seen[:, here] = directions @ excess.T
        differing += int((excess != 0).sum())
        coarse_bf16 = coarse_bf16 and torch.equal(now, now.bfloat16().double())
        rounded_bf16 = rounded_bf16 and torch.equal(now, block.bfloat16().double())
        scaled[0] += float((now * block).sum())
        scaled[1] += float(block.square().sum())
        wrong, size = excess, now.square()
        for name, factor in merged.items():
            a, b = pairs[name].a.to(device, torch.float64), pairs[name].b.to(device, torch.float64)
            delta = (b[here] @ a) * (pairs[name].scale * factor)
            wrong = wrong - delta
            size = size + delta.square()
        for totals, dim, where in ((columns, 0, slice(None)), (rows, 1, here)):
            totals[0, where] += wrong.square().sum(dim=dim)
            totals[1, where] += size.sum(dim=dim)
    name = f"{layer.name}.weight"

    def scan(*, equal: bool, units: float, cause: str | None) -> Scan:
        weight = WeightFinding(name=name, equal=equal, units=units, cause=cause)
        norm = math.sqrt(square * out / max(1, measured))
        return Scan(weight=weight, reference=reference, norm=norm)

    if directions is None or (equal and not any(merged.values())):
        return scan(equal=True, units=0.0, cause=None)
    if not finite:
        return scan(equal=False, units=math.inf, cause="it holds NaN or infinity")
    eps = torch.finfo(live.dtype).eps
    units = max(
        float((totals[0] / totals[1].clamp(min=1e-300)).max().sqrt()) / eps
        for totals in (columns, rows)
    )
    noise_w = 0.3 * eps * float((rows[1].sum() / (out * width)).sqrt())
    noise = noise_w * math.sqrt(width)  # of an entry of `seen`
    claimed = {n: merged.get(n, 0.0) for n in pairs}
    cause: str | None = None
    coefficients_wrong = False
    if merged:
        found = fit(seen, {n: respond(p, directions) for n, p in pairs.items()}, noise)
        coefficients_wrong = any(
            abs(c - claimed[n]) > (0.01 if eps < 1e-5 else 0.1) + 10 * found.errors[n]
            for n, c in found.coefficients.items()
        )
    if merged and units <= 1.5 and not coefficients_wrong:
        return scan(equal=False, units=units, cause=None)
    ratio = scaled[0] / scaled[1] if scaled[1] else 0.0
    if merged and coarse_bf16:
        cause = "the merged weight was rounded through bfloat16"
    elif not merged and rounded_bf16:
        cause = "the base's weight was rounded through bfloat16"
    elif not merged and _proportional(rows[0], scaled, ratio):
        cause = f"it is {ratio:.4g} times the file's"
    else:
        found_cause = diagnose(
            seen, directions, claimed, pairs, noise=noise if merged else 0.0,
            others=list(named_others(layer.name, pairs, others)),
        ).cause  # fmt: skip
        if merged:
            cause = found_cause
        elif "applied here" in found_cause:
            cause = f"an adapter lies in the base's weight: {found_cause}"
        else:
            cause = (
                f"{differing} of {out * width} entries differ from the file's: "
                "another base, or a changed weight"
            )
    return scan(equal=False, units=units, cause=cause)


def _proportional(errors: Tensor, scaled: list[float], ratio: float) -> bool:
    """Whether the live weight is a multiple of the file's: nothing is left beside it."""
    along = (ratio - 1) ** 2 * scaled[1]
    return ratio != 1 and abs(float(errors.sum()) - along) <= 1e-3 * along


def named_others(
    name: str, pairs: Mapping[str, LoraPair], others: Others
) -> Iterable[tuple[str, LoraPair]]:
    for adapter in pairs:
        yield from others(adapter, pairs[adapter])


def scan_embedding(
    layer: LiveLayer,
    stored: Tensor,
    merged: Mapping[str, float],
    pairs: Mapping[str, LoraPair],
    device: torch.device,
    others: Others,
    x: Tensor | None,
) -> Scan:
    """An embedding: a table of rows; its adapters' deltas are transposed."""
    live = layer.weight
    equal = compare_tensor(f"{layer.name}.weight", live, stored)
    reference = None
    if x is not None:
        reference = stored[x.cpu()].to(live.dtype).to(device, torch.float64)
    if not merged:
        return Scan(weight=equal, reference=reference)
    table = torch.arange(live.shape[0])
    worst, cause = 0.0, None
    eps = torch.finfo(live.dtype).eps
    for start in range(0, len(table), step := max(1, _BLOCK // live.shape[1])):
        here = table[start : start + step]
        excess = live[here].cpu().double() - stored[here].to(live.dtype).double()
        wanted = sum(
            (merged[n] * respond(pairs[n], here) for n in merged), torch.zeros_like(excess)
        )
        size = live[here].cpu().double().square().sum(dim=0) + wanted.square().sum(dim=0)
        wrong = (excess - wanted).square().sum(dim=0)
        units = float((wrong / size.clamp(min=1e-300)).max().sqrt()) / eps
        if units > worst:
            worst = units
            if units > 1.5:
                claimed = {n: merged.get(n, 0.0) for n in pairs}
                cause = diagnose(excess, here, claimed, pairs, noise=eps).cause
    name = f"{layer.name}.weight"
    weight = WeightFinding(name=name, equal=False, units=worst, cause=cause)
    return Scan(weight=weight, reference=reference)


def compare_tensor(name: str, live: Tensor, stored: Tensor) -> WeightFinding:
    """A tensor that nobody may have touched: the file's bits in the live dtype, or a cause."""

    def finding(cause: str | None) -> WeightFinding:
        return WeightFinding(name=name, equal=cause is None, units=0.0, cause=cause)

    if live.device.type == "meta":
        return finding(OFFLOADED)
    if live.shape != stored.shape:
        return finding(f"its shape is {list(live.shape)}, the file's {list(stored.shape)}")
    wide = stored.reshape(-1, stored.shape[-1]) if stored.ndim > 1 else stored.reshape(1, -1)
    flat = live.reshape(wide.shape)
    step = max(1, _BLOCK // max(1, wide.shape[1]))
    for start in range(0, wide.shape[0], step):
        here = slice(start, start + step)
        cast = wide[here].to(live.dtype)
        now = flat[here].cpu()
        if same_bits(cast, now):
            continue
        a, b = now.double(), cast.double()
        if not bool(torch.isfinite(a).all()):
            return finding("it holds NaN or infinity")
        different = a != b
        count = int(different.sum())
        if torch.equal(a, b.bfloat16().double()):
            return finding("it was rounded through bfloat16")
        ratio = float((a * b).sum() / b.square().sum()) if bool(b.any()) else 0.0
        if ratio != 1 and float((a - ratio * b).norm()) < 1e-3 * float((a - b).norm()):
            return finding(f"it is {ratio:.4g} times the file's")
        zeros = int((different & (a == 0)).sum())
        if zeros == count and count:
            return finding(f"{count} entries are zero and are not in the file")
        if bool((a[different] == -b[different]).all()) and count:
            return finding(f"the sign of {count} entries is flipped")
        return finding(f"{count} of {live.numel()} entries differ from the file's")
    return finding(None)
