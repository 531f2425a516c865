"""What a model thought of each produced token, as values and as few bytes.

`Evidence` holds, a token: its log-probability and the five most probable tokens with theirs.
Stored, log-probabilities are rounded (`TOP_STEP`, `GAP_STEP`) and every column is Rice-coded
(Rice and Plaunt, 1971, doi:10.1109/TCOM.1971.1090789) with the parameter that suits it best, so
that 128 tokens take about as many bytes as two and a half times their text. `Shifts` is how far
two evidences of the same tokens lie apart. numpy only; knows nothing of models, files or verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GAP_STEP",
    "RIVAL",
    "TOP",
    "TOP_STEP",
    "Evidence",
    "Shifts",
    "decode_evidence",
    "encode_evidence",
    "shifts",
    "stored",
]

#: How many of the most probable tokens are kept.
TOP = 5
#: Nats. Stored log-probabilities of produced tokens, and of the most probable ones, are multiples.
TOP_STEP = 1 / 1024
#: Nats. Stored distances of the other tokens to the most probable one are multiples.
GAP_STEP = 1 / 64
#: Nats. A token within this distance of the produced one could come first after small movements.
RIVAL = 2.0

_FARTHEST = 1 << 14  # steps: 256 nats; what lies farther is stored as this far
_DEEPEST = 1 << 18  # steps of TOP_STEP: 256 nats
_MAX_TOKENS = 1 << 20

Bits = NDArray[np.uint8]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """Log-probabilities of *n* produced tokens, of the model's own distribution (no penalty, no
    temperature), in nats.

    Attributes:
        logprobs: `(n,)`, of the produced tokens.
        top_ids: `(n, k)`, the k ≤ 5 most probable tokens, the one that greedy decoding takes first.
        top_logprobs: `(n, k)`, theirs.
    """

    logprobs: Floats
    top_ids: Integers
    top_logprobs: Floats

    def __len__(self) -> int:
        return len(self.logprobs)

    @property
    def margins(self) -> Floats:
        """`(n,)`: log-probability of the best over that of the second best."""
        if self.top_logprobs.shape[1] < 2:
            return np.full(len(self), np.inf)
        margins: Floats = self.top_logprobs[:, 0] - self.top_logprobs[:, 1]
        return margins

    @property
    def finite(self) -> bool:
        """Whether every figure is a number; a model of NaN gives none."""
        return bool(np.isfinite(self.logprobs).all() and np.isfinite(self.top_logprobs).all())

    def logprob_of(self, place: int, token: int) -> float | None:
        """The log-probability of *token* at *place*; None when it is not among the top."""
        found = np.flatnonzero(self.top_ids[place] == token)
        return float(self.top_logprobs[place, found[0]]) if len(found) else None

    def first(self, count: int) -> Evidence:
        """The evidence of the first *count* tokens."""
        return Evidence(
            logprobs=self.logprobs[:count],
            top_ids=self.top_ids[:count],
            top_logprobs=self.top_logprobs[:count],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shifts:
    """How far log-probabilities moved between two evidences of the same tokens, in nats.

    Attributes:
        chosen: `(n,)`, of the produced tokens.
        gaps: `(m,)`, of the other top tokens' distances to the produced one, i.e. of differences
            of logits; for one that left the top, the least that it must have moved.
        gap_places: `(m,)`, at which token each was.
        gap_sizes: `(m,)`, how far from the produced token each was before.
    """

    chosen: Floats
    gaps: Floats
    gap_places: Integers
    gap_sizes: Floats

    @property
    def chosen_rms(self) -> float:
        return _rms(self.chosen)

    @property
    def gap_rms(self) -> float:
        return _rms(self.gaps)

    @property
    def worst(self) -> float:
        """The largest movement of all."""
        both = np.concatenate([np.abs(self.chosen), np.abs(self.gaps)])
        return float(both.max()) if len(both) else 0.0

    @property
    def close(self) -> float:
        """The largest movement against the produced token of one that was a rival of it."""
        rivals = np.abs(self.gaps[np.abs(self.gap_sizes) < RIVAL])
        return float(rivals.max()) if len(rivals) else 0.0

    @property
    def worst_place(self) -> int:
        """At which token the largest movement was."""
        places = np.concatenate([np.arange(len(self.chosen)), self.gap_places])
        both = np.concatenate([np.abs(self.chosen), np.abs(self.gaps)])
        return int(places[int(np.argmax(both))]) if len(both) else 0


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0


def shifts(then: Evidence, now: Evidence, token_ids: Sequence[int]) -> Shifts:
    """The movements over the leading tokens *token_ids*, which both are evidence of."""
    ids = np.asarray(token_ids, dtype=np.int64)
    then, now = then.first(len(ids)), now.first(len(ids))
    same = then.top_ids[:, :, None] == now.top_ids[:, None, :]  # (n, k then, k now)
    before = then.top_logprobs - then.logprobs[:, None]
    matched = np.take_along_axis(now.top_logprobs, same.argmax(axis=2), axis=1)
    after = matched - now.logprobs[:, None]
    # One that left the top is now below the last of it.
    lowest = now.top_logprobs[:, -1:] - now.logprobs[:, None]
    moved = np.where(same.any(axis=2), after - before, np.minimum(lowest - before, 0.0))
    rows, columns = np.nonzero(then.top_ids != ids[:, None])  # its distance to itself says nothing
    return Shifts(
        chosen=now.logprobs - then.logprobs,
        gaps=moved[rows, columns],
        gap_places=rows,
        gap_sizes=before[rows, columns],
    )


def stored(evidence: Evidence, token_ids: Sequence[int]) -> Evidence:
    """*evidence* as it is read back after it was stored."""
    return decode_evidence(encode_evidence(evidence, token_ids), token_ids)


def encode_evidence(evidence: Evidence, token_ids: Sequence[int]) -> bytes:
    """The stored bytes; the produced tokens themselves are not in them.

    Raises:
        ValueError: figures that are no numbers, or not one row a token.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    count, top = len(evidence), evidence.top_ids.shape[1]
    if count != len(ids) or not evidence.finite:
        raise ValueError("not one finite row of evidence a token")
    first = _steps(-evidence.top_logprobs[:, :1], TOP_STEP, _DEEPEST)
    distances = evidence.top_logprobs[:, :1] - evidence.top_logprobs[:, 1:]
    ladder = _steps(np.maximum.accumulate(distances, axis=1), GAP_STEP, _FARTHEST)
    rungs = np.diff(ladder, axis=1, prepend=0)
    is_token = evidence.top_ids == ids[:, None]
    rank = np.where(is_token.any(axis=1), is_token.argmax(axis=1), top)
    odd = np.flatnonzero(rank != 0)
    deep = _steps(-evidence.logprobs[odd], TOP_STEP, _DEEPEST)
    others = evidence.top_ids[np.arange(top) != np.minimum(rank, top)[:, None]]
    writer = _Writer()
    writer.numbers(count, top, len(odd))
    for place, r, depth in zip(np.diff(odd, prepend=0), rank[odd], deep, strict=True):
        writer.numbers(int(place), int(r), int(depth))
    writer.column(first[:, 0])
    for column in range(top - 1):
        writer.column(rungs[:, column])
    widths = _bit_lengths(others)
    usual = int(np.median(widths)) if len(widths) else 0
    writer.numbers(usual)
    writer.column(_zigzag(widths - usual))
    writer.mantissas(others, widths)
    return writer.bytes()


def decode_evidence(data: bytes, token_ids: Sequence[int]) -> Evidence:
    """Read what `encode_evidence` wrote for these tokens.

    Raises:
        ValueError: the bytes are no evidence of as many tokens.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    reader = _Reader(data)
    count, top, odd_count = reader.number(), reader.number(), reader.number()
    if count != len(ids) or not 1 <= top <= TOP or odd_count > count:
        raise ValueError(f"evidence of {count} tokens for {len(ids)}")
    rank = np.zeros(count, dtype=np.int64)
    deep = np.zeros(count, dtype=np.int64)
    place = 0
    for _ in range(odd_count):
        place += reader.number()
        if place >= count:
            raise ValueError("a token beyond the last")
        rank[place], deep[place] = min(reader.number(), top), reader.number()
    plan = [reader.plan(count) for _ in range(top)]
    usual = reader.number()
    others_count = int(np.where(rank < top, top - 1, top).sum())
    width_plan = reader.plan(others_count)
    reader.begin_bits()
    columns = [reader.column(p) for p in plan]
    widths = _unzigzag(reader.column(width_plan)) + usual
    others = reader.mantissas(widths)
    top_ids = np.empty((count, top), dtype=np.int64)
    is_token = np.arange(top) == rank[:, None]
    top_ids[is_token] = ids[rank < top]
    top_ids[~is_token] = others
    top_logprobs = np.empty((count, top))
    top_logprobs[:, 0] = columns[0] * -TOP_STEP
    for column in range(1, top):
        ladder = np.sum(columns[1 : column + 1], axis=0)
        top_logprobs[:, column] = top_logprobs[:, 0] - ladder * GAP_STEP
    logprobs = np.where(rank == 0, top_logprobs[:, 0], deep * -TOP_STEP)
    return Evidence(logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


def _steps(values: Floats, step: float, most: int) -> Integers:
    return np.clip(np.rint(values / step), 0, most).astype(np.int64)


def _bit_lengths(values: Integers) -> Integers:
    return np.where(values > 0, np.frexp(values.astype(np.float64))[1], 0).astype(np.int64)


def _zigzag(values: Integers) -> Integers:
    return np.where(values < 0, -2 * values - 1, 2 * values)


def _unzigzag(values: Integers) -> Integers:
    return np.where(values % 2 == 1, -(values + 1) // 2, values // 2)


def _to_bits(values: Integers, widths: Integers | int) -> Bits:
    """The low *widths* bits of each value, most significant first, one after the other."""
    wide = np.broadcast_to(np.asarray(widths), values.shape)
    most = int(wide.max()) if len(values) else 0
    places = np.arange(most - 1, -1, -1)
    bits = (values[:, None] >> places) & 1
    return bits[places < wide[:, None]].astype(np.uint8)


class _Writer:
    def __init__(self) -> None:
        self._head = bytearray()
        self._bits: list[Bits] = []

    def numbers(self, *values: int) -> None:
        for value in values:
            while value >= 0x80:
                self._head.append(value & 0x7F | 0x80)
                value >>= 7
            self._head.append(value)

    def column(self, values: Integers) -> None:
        """Rice code: remainders of a fixed width, then the quotients in unary."""

        def size(low: int) -> int:
            return len(values) * (low + 1) + int((values >> low).sum())

        low = min(range(20), key=size)
        quotients = values >> low
        unary = np.zeros(len(values) + int(quotients.sum()), dtype=np.uint8)
        unary[np.cumsum(quotients + 1) - 1] = 1
        self.numbers(low, len(unary) - len(values))
        self._bits += [_to_bits(values & ((1 << low) - 1), low), unary]

    def mantissas(self, values: Integers, widths: Integers) -> None:
        """All bits but the leading one, which the width tells."""
        self._bits.append(_to_bits(values, np.maximum(widths - 1, 0)))

    def bytes(self) -> bytes:
        return bytes(self._head) + np.packbits(np.concatenate(self._bits)).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    count: int
    low: int
    extra: int


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0
        self._bits: Bits = np.zeros(0, dtype=np.uint8)

    def number(self) -> int:
        value = shift = 0
        while True:
            if self._place >= len(self._data) or shift > 35:
                raise ValueError("the evidence ends too early")
            byte = self._data[self._place]
            self._place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def plan(self, count: int) -> _Plan:
        low, extra = self.number(), self.number()
        if low >= 20 or count > _MAX_TOKENS * TOP or extra > len(self._data) * 8:
            raise ValueError("a column that cannot be")
        return _Plan(count=count, low=low, extra=extra)

    def begin_bits(self) -> None:
        raw = np.frombuffer(self._data, dtype=np.uint8, offset=self._place)
        self._bits, self._place = np.unpackbits(raw), 0

    def _take(self, count: int) -> Bits:
        taken = self._bits[self._place : self._place + count]
        if len(taken) < count:
            raise ValueError("the evidence ends too early")
        self._place += count
        return taken

    def column(self, plan: _Plan) -> Integers:
        low = self._take(plan.count * plan.low).reshape(plan.count, plan.low).astype(np.int64)
        remainders = low @ (1 << np.arange(plan.low - 1, -1, -1, dtype=np.int64))
        ends = np.flatnonzero(self._take(plan.count + plan.extra))
        if len(ends) != plan.count:
            raise ValueError("a column of another length")
        quotients = np.diff(ends, prepend=-1) - 1
        values: Integers = (quotients << plan.low) + remainders
        return values

    def mantissas(self, widths: Integers) -> Integers:
        if len(widths) and (widths.min() < 0 or widths.max() > 40):
            raise ValueError("a token id that cannot be")
        tails = np.maximum(widths - 1, 0)
        most = int(tails.max()) if len(tails) else 0
        places = np.arange(most - 1, -1, -1)
        grid = np.zeros((len(tails), most), dtype=np.int64)
        grid[places < tails[:, None]] = self._take(int(tails.sum()))
        lead = np.where(widths > 0, np.left_shift(1, tails), 0)
        values: Integers = lead + grid @ (1 << places.astype(np.int64))
        return values
