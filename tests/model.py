"""What a cache should hold, in plain NumPy: for each layer and sequence a list of positions with their FP16 rows.

Nothing of this is shared with the package or with `kvcache_ext.reference`: no slots, no `first`, no ring. A sequence is
two lists; one position at a time is put at their end, and when there are too many the oldest that is no sink goes. What
is stored is kept as the bits of FP16, in which every NaN is the same one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NAN = 0x7E00  # the NaN that stands for all of them
LARGEST = 0x7BFF  # 65504
TOO_LARGE = 65520.0  # the smallest magnitude that rounds to more than 65504


def one_nan(bits: Array) -> Array:
    """FP16 bits with every NaN the same: its payload is nobody's promise."""
    return np.where((bits & 0x7FFF) > 0x7C00, np.uint16(NAN), bits)


def to_half(x: Array, saturate: bool) -> tuple[Array, Array]:
    """FP32 as FP16 bits, and which of its values are finite and beyond FP16."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = one_nan(x.astype(np.float16).view(np.uint16))
    overflows = np.isfinite(x) & (np.abs(x) >= TOO_LARGE)
    if saturate:
        bits = np.where(overflows, np.where(x < 0, np.uint16(LARGEST | 0x8000), np.uint16(LARGEST)), bits)
    return bits, overflows


def half_to_bfloat16(bits: Array) -> Array:
    """FP16 bits as BF16 bits, rounded to nearest even. (NaN stays some NaN.)"""
    with np.errstate(invalid="ignore"):
        single = bits.view(np.float16).astype(np.float32)
    wide = single.view(np.uint32).astype(np.uint64)
    rounded = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


@dataclass
class Sequence:
    """One sequence of one layer. `keys[i]` and `values[i]`, FP16 bits `[H, D]`, belong to `positions[i]`."""

    positions: list[int] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    next: int = 0  # the number of the next position
    # For whoever compares, since it was last looked at:
    changed: bool = True
    written: list[int] = field(default_factory=list)  # positions, also those that have gone again

    def append(self, key: Array, value: Array, slots: int, sinks: int) -> None:
        self.positions.append(self.next)
        self.written.append(self.next)
        self.keys.append(key)
        self.values.append(value)
        self.next += 1
        self.changed = True
        self.shrink(slots, sinks)

    def shrink(self, slots: int, sinks: int) -> None:
        """The oldest that is not a sink goes, until there are no more than `slots`."""
        while len(self.positions) > slots:
            for each in (self.positions, self.keys, self.values):
                del each[sinks]

    def truncate(self, length: int) -> None:
        if length >= len(self.positions):
            return
        self.next = self.positions[length]  # the oldest that goes
        for name in ("positions", "keys", "values"):
            setattr(self, name, getattr(self, name)[:length])
        self.changed = True

    def reset(self) -> None:
        self.positions, self.keys, self.values, self.next, self.changed = [], [], [], 0, True

    def copy(self) -> Sequence:
        return Sequence(
            list(self.positions), list(self.keys), list(self.values), self.next, written=list(self.positions)
        )

    def oldest_in_ring(self, sinks: int) -> int:
        """The oldest position held that is not a sink, or the one that will be."""
        return next((p for p in self.positions if p >= sinks), max(self.next, sinks))


class Model:
    """Every layer and sequence of a cache, and the counters."""

    def __init__(self, layers: int, batch: int, slots: int, heads: int, head_dim: int, sinks: int, saturate: bool):
        self.layers, self.batch, self.slots, self.heads, self.head_dim = layers, batch, slots, heads, head_dim
        self.sinks, self.saturate = sinks, saturate
        self.at = [[Sequence() for _ in range(batch)] for _ in range(layers)]
        self.overflow_counts = [0] * layers

    def append(self, layer: int, sequence: int, keys: Array, values: Array, overflows: int) -> None:
        """`keys`, `values`: FP16 bits `[T, H, D]`; `overflows`: how many of them FP16 could not hold."""
        for key, value in zip(keys, values, strict=True):
            self.at[layer][sequence].append(key, value, self.slots, self.sinks)
        self.overflow_counts[layer] += overflows

    def truncate(self, sequence: int, length: int) -> None:
        for layer in self.at:
            layer[sequence].truncate(max(length, 0))

    def drop_newest(self, sequence: int, count: int) -> None:
        for layer in self.at:
            s = layer[sequence]
            s.truncate(max(len(s.positions) - max(count, 0), 0))

    def reset(self, sequences: Iterable[int]) -> None:
        for layer in self.at:
            for b in sequences:
                layer[b].reset()

    def clear(self) -> None:
        self.reset(range(self.batch))
        self.overflow_counts = [0] * self.layers

    def copy_sequences(self, pairs: list[tuple[int, int]]) -> None:
        """(source, destination): all are read before any is written."""
        for layer in self.at:
            before = list(layer)
            for source, destination in pairs:
                if source != destination:
                    written = before[destination].written
                    layer[destination] = before[source].copy()
                    layer[destination].written += written

    def copy_from(self, other: Model, pairs: list[tuple[int, int]]) -> None:
        """(source, destination): of another cache's sequences, what has room here, the sinks and the newest."""
        for layer, of_other in zip(self.at, other.at, strict=True):
            for source, destination in pairs:
                new = of_other[source].copy()
                new.shrink(self.slots, self.sinks)
                new.written = [*new.positions, *layer[destination].written]
                layer[destination] = new

    def with_slots(self, slots: int) -> Model:
        """What is left of it in a cache of another size: the sinks and the newest."""
        other = copy.copy(self)
        other.slots = slots
        other.overflow_counts = list(self.overflow_counts)
        other.at = [[s.copy() for s in layer] for layer in self.at]
        for layer in other.at:
            for s in layer:
                s.shrink(slots, self.sinks)
        return other

    def held(self, layer: int, sequence: int) -> int:
        return len(self.at[layer][sequence].positions)

    def shortest(self) -> int:
        return min(len(s.positions) for layer in self.at for s in layer)

    def shortest_of(self, sequence: int) -> int:
        return min(len(layer[sequence].positions) for layer in self.at)

    def longest(self, layer: int) -> int:
        return max(len(s.positions) for s in self.at[layer])

    def position(self) -> int:
        return max(s.next for layer in self.at for s in layer)

    def attend(self, layer: int, sequence: int, query: Array, options: AttentionOptions) -> Attention:
        """`query`: FP64 `[T, Hq, D]`, the last of them at the newest position."""
        s = self.at[layer][sequence]
        own = np.arange(s.next - len(query), s.next)
        return attention([s], query, own, self.sinks, options)

    def append_attend(
        self, layer: int, sequence: int, query: Array, keys: Array, values: Array, options: AttentionOptions
    ) -> Attention:
        """The answers of each new position appended and attended to in turn; the model stays as it is.

        `keys`, `values`: FP16 bits `[n, H, D]`, of the last `n` of the queries `[T, Hq, D]`. The others see nothing.
        """
        s = self.at[layer][sequence].copy()
        own = np.arange(s.next - len(query) + len(keys), s.next + len(keys))
        own[: len(query) - len(keys)] = -1
        for key, value in zip(keys, values, strict=True):
            s.append(key, value, len(s.positions) + 1, self.sinks)
        return attention([s], query, own, self.sinks, options, ring=self.slots - self.sinks)


@dataclass(frozen=True)
class AttentionOptions:
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass
class Attention:
    """What FP64 attention comes to, for T queries of Hq heads."""

    out: Array  # [T, Hq, D]
    lse: Array  # [T, Hq]
    seen: Array  # [T, Hq]: whether there is anything to attend to; if not, zeros, and -inf
    magnitude: Array  # [T, Hq]: the largest scale * sum |q_i k_i| of what is seen
    terms: (
        Array  # [T, Hq]: the norm of what is added up, sum of weight * |v|; the answer's own unless values cancel out
    )
    finite: Array  # [T, Hq]: whether all that is seen is finite
    nan_seen: Array  # [T, Hq]: whether a key that is seen has a NaN in it

    @staticmethod
    def of_nothing(rows: int, query_heads: int, head_dim: int) -> Attention:
        heads = (rows, query_heads)
        return Attention(
            np.zeros((*heads, head_dim)), np.full(heads, -np.inf), np.zeros(heads, bool), np.zeros(heads),
            np.zeros(heads), np.ones(heads, bool), np.zeros(heads, bool),
        )  # fmt: skip


def attention(
    sequences: list[Sequence],
    query: Array,
    own: Array,
    sinks: int,
    options: AttentionOptions,
    ring: int | None = None,
) -> Attention:
    """`query` `[T, Hq, D]` at positions `own` `[T]`, over what all `sequences` together hold, in FP64.

    `ring`: each query sees the last so many positions up to its own, and the sinks.
    """
    rows, query_heads, head_dim = query.shape
    result = Attention.of_nothing(rows, query_heads, head_dim)
    positions = np.array([p for s in sequences for p in s.positions])
    if len(positions) == 0 or rows == 0:
        return result
    keys = np.stack([k for s in sequences for k in s.keys]).view(np.float16)  # [n, H, D]
    values = np.stack([v for s in sequences for v in s.values]).view(np.float16)
    group = query_heads // keys.shape[1]
    sees: Array = np.asarray(positions[None] <= own[:, None])
    for most in (options.window, ring):
        if most is not None:
            sees &= (positions < sinks)[None] | (positions[None] > own[:, None] - most)
    sees = sees[:, None].repeat(query_heads, 1)  # [T, Hq, n]

    def by_head(x: Array) -> Array:
        return x.astype(np.float64).transpose(1, 0, 2).repeat(group, 0)  # [Hq, n, D]

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        k, v = by_head(keys), by_head(values)
        q = query.transpose(1, 0, 2)  # [Hq, T, D]
        scores = (options.scale * (q @ k.transpose(0, 2, 1))).transpose(1, 0, 2)
        sizes = (abs(options.scale) * (np.abs(q) @ np.abs(k).transpose(0, 2, 1))).transpose(1, 0, 2)
        good: Array = np.asarray(np.isfinite(k).all(-1) & np.isfinite(v).all(-1))[None]  # [1, Hq, n]
        if options.softcap is not None:
            scores = options.softcap * np.tanh(scores / options.softcap)
        scores = np.where(sees, scores, -np.inf)
        largest = scores.max(-1)
        weights = np.exp(scores - np.where(largest == -np.inf, 0.0, largest)[..., None])
        total = weights.sum(-1)
        finite_v = np.where(np.isfinite(v), v, 0.0)
        summed, terms = ((weights.transpose(1, 0, 2) @ x).transpose(1, 0, 2) for x in (finite_v, np.abs(finite_v)))
        result.seen = np.asarray(sees.any(-1))
        result.out = np.where(result.seen[..., None], summed / total[..., None], 0.0)
        result.terms = np.where(result.seen, np.linalg.norm(terms, axis=-1) / total, 0.0)
        result.lse = np.where(result.seen, largest + np.log(total), -np.inf)
        result.magnitude = np.where(sees, sizes, 0.0).max(-1)
        result.finite = np.asarray((good | ~sees).all(-1))
        result.nan_seen = np.asarray((np.asarray(np.isnan(k).any(-1))[None] & sees).any(-1))
    return result
