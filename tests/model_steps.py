"""Random calls of a cache, each made on the model as well, and a comparison of all there is after every one.

A step takes what it needs from a `Draw`: hypothesis's in tests/test_model.py, which shrinks what fails, or a seeded
generator in tools/soak.py, which is a hundred times faster. Inputs are views of pools of values that lie on the device
from the start, in every dtype and of every stride, so that a step copies nothing there.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from model import Array, Attention, AttentionOptions, Model, attention, half_to_bfloat16, one_nan, to_half

from kvcache_ext import StreamingKVCacheFp16, merge_states, ops

POISON = 0x7EAB  # a NaN with a payload of its own, in every slot that holds nothing: nobody may write or see it
STRAY = 0x6EAD  # a number, in every slot of a source that holds nothing: copied, it would show where POISON should be
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding the answer to the query's dtype; FP32's own error is the design's, where one of many queries may have more.
ONE_OF_MANY = 2.5e-6
RELATIVE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
FAR = (-1, -(2**31), 2**31 - 1)  # indices that no sequence has; those of 64 bits as well:
VERY_FAR = (-(2**63), 2**62, 2**32)


class Draw(Protocol):
    def integer(self, least: int, most: int) -> int: ...
    def choice(self, options: Sequence[Any]) -> Any: ...
    def chance(self, percent: int) -> bool: ...


class SeededDraw:
    """From a seed alone: the same everywhere, always."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def integer(self, least: int, most: int) -> int:
        return least + int(self.random() * (most - least + 1))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.random() * len(options))]

    def chance(self, percent: int) -> bool:
        return self.random() * 100 < percent


class Pool:
    """Values that inputs are cut from: plain ones, or with all that FP16 finds hard among them.

    Not so hard for queries: tensor cores take one as pairs of FP16 numbers, scaled by its largest element, so that one
    2^28 times smaller loses bits and one 2^50 times smaller is lost. That shows where the largest meets a key element
    of 0, and is beyond the bound that attention is held to here.
    """

    SIZE = 1 << 20
    _made: ClassVar[dict[tuple[torch.device, torch.dtype, bool, bool], Pool]] = {}

    def __init__(self, device: torch.device, dtype: torch.dtype, wild: bool, query: bool) -> None:
        generator = np.random.default_rng(12345)
        values = generator.standard_normal(self.SIZE, dtype=np.float32)
        if wild:
            sizes = np.exp2(generator.uniform(-30, 20, self.SIZE)).astype(np.float32)  # subnormal to overflowing
            values = np.where(generator.random(self.SIZE) < 0.3, values * sizes, values)
            rare = np.array([np.nan, np.inf, -np.inf, 65519.9, 65520, -65520, 1e30, -0.0, 2**-25, 3e-8], np.float32)
            places = generator.random(self.SIZE) < 0.002
            values = np.where(places, rare[generator.integers(0, len(rare), self.SIZE)], values)
            if query:
                values = np.where(values == rare[6], np.float32(1e6), values)
        self.tensor = torch.from_numpy(values).to(dtype)
        exact = self.tensor.float().numpy()
        self.tensor = self.tensor.to(device)
        self.values = exact.astype(np.float64)
        self.bits = {saturate: to_half(exact, saturate)[0] for saturate in (False, True)}
        self.overflows = to_half(exact, False)[1]

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, wild: bool, query: bool = False) -> Pool:
        key = (device, dtype, wild, query and wild)
        if key not in cls._made:
            cls._made[key] = cls(*key)
        return cls._made[key]


class Input:
    """A tensor of some strides whose values are those of a stretch of a pool.

    `refill` gives one that has memory of its own (what a captured graph reads) other values.
    """

    def __init__(self, draw: Draw, pool: Pool, shape: tuple[int, ...], drop: int, owned: bool) -> None:
        """`drop`: how many of the dimensions before heads and head_dim are left out of the tensor, all of size 1."""
        self.pool, self.shape = pool, shape
        order = list(range(len(shape) - 1))
        padding, repeated = 0, -1
        if draw.chance(50):
            if draw.chance(50):
                order[-1], order[-2] = order[-2], order[-1]  # [B, H, T, D] seen as [B, T, H, D]
            padding = draw.choice((0, 0, 1, 3, 8, 24))
            if draw.chance(15):
                repeated = draw.integer(0, len(shape) - 2)
        strides = [1] * len(shape)
        size = shape[-1] + padding
        for dimension in reversed(order):
            strides[dimension] = 0 if dimension == repeated else size
            size *= 1 if dimension == repeated else max(shape[dimension], 1)
        self.strides, self.size = strides, size
        self.inner = draw.choice((0, 0, 0, 1, 4, 8))
        if size + self.inner > pool.SIZE:
            raise ValueError("a step wants more values than the pool has")
        self.offset = 0
        self.buffer = torch.empty_like(pool.tensor[: size + self.inner]) if owned else None
        self.refill(draw)
        source = pool.tensor if self.buffer is None else self.buffer
        start = self.inner if owned else self.offset + self.inner
        flat = drop == len(shape) - 2 and padding == 0 and repeated != len(shape) - 2 and draw.chance(50)
        if flat and (strides[-2] == shape[-1] or shape[-2] == 1):
            self.tensor = source.as_strided((shape[-2] * shape[-1],), (1,), start)
        else:
            first = len(shape) - 2 - drop
            sizes, steps = list(shape), list(strides)
            del sizes[first : first + drop], steps[first : first + drop]
            self.tensor = source.as_strided(sizes, steps, start)

    def refill(self, draw: Draw) -> None:
        self.offset = draw.integer(0, (self.pool.SIZE - self.size - self.inner) // 8) * 8
        if self.buffer is not None:
            self.buffer.copy_(self.pool.tensor[self.offset : self.offset + self.size + self.inner])

    def of(self, values: Array) -> Array:
        """The same stretch of something that the pool knows of its values."""
        width = values.itemsize
        return np.ndarray(
            self.shape, values.dtype, values, (self.offset + self.inner) * width, [s * width for s in self.strides]
        )

    def __str__(self) -> str:
        t = self.tensor
        return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} strides {list(t.stride())} at {self.offset}"


@dataclass
class Entries:
    """Which sequences a call is about: what to pass, and for each entry the sequence or None."""

    argument: Any
    of: list[int | None]

    def __str__(self) -> str:
        if isinstance(self.argument, torch.Tensor):
            return f"tensor({self.argument.tolist()}, {str(self.argument.dtype).removeprefix('torch.')})"
        return repr(self.argument)

    def known(self) -> Iterator[tuple[int, int]]:
        return ((i, b) for i, b in enumerate(self.of) if b is not None)


@dataclass
class Action:
    """One call, what to hold its answer against and do to the model; `refill` changes what a graph's replay reads."""

    text: Callable[[], str]
    call: Callable[[], Any]
    expect: Callable[[Any], None]
    refill: Callable[[Draw], None] = lambda draw: None


class Difference(AssertionError):
    """The cache and the model are not the same."""


def as_bits(tensor: torch.Tensor) -> Array:
    """Two-byte elements on the host."""
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def expect_bits(what: str, got: Array, want: Array) -> None:
    if np.array_equal(got, want):
        return
    if got.shape != want.shape:
        raise Difference(f"{what}: shape {got.shape}, not {want.shape}")
    differing = np.argwhere(one_nan(got) != one_nan(want))
    if len(differing):
        at = tuple(differing[0])
        raise Difference(
            f"{what}: {len(differing)} of {want.size} elements differ, the first at {list(map(int, at))}: "
            f"{got[at]:#06x}, not {want[at]:#06x}"
        )


def expect_equal(what: str, got: Any, want: Any) -> None:
    if got != want:
        raise Difference(f"{what}: {got}, not {want}")


SHAPES = ((1, 1), (1, 7), (2, 7), (1, 8), (2, 8), (2, 8), (3, 8), (2, 16), (1, 64), (2, 24), (1, 80), (2, 80), (1, 127),
          (1, 128), (4, 12), (1, 256))  # fmt: skip
RARE_SHAPES = ((71, 8), (71, 1), (8, 128), (1, 512), (32, 64), (1, 258), (3, 127))


class Run:
    """A cache and its model, and the steps that can be taken with them."""

    def __init__(self, draw: Draw, device: torch.device, *, small: bool = False) -> None:
        """`small`: nothing that takes long where every call is slow."""
        self.device, self.small = device, small
        heads, head_dim = draw.choice(RARE_SHAPES if draw.chance(4) and not small else SHAPES)
        layers, batch = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 2, 3, 5))
        slots = draw.integer(1, 24)
        if draw.chance(3) and heads * head_dim <= 64 and not small:
            layers, batch, slots = 1, draw.integer(1, 2), draw.integer(200, 700)
        sinks = draw.choice((0, 0, 1, 2, 4, slots - 1))
        overflow = draw.choice(("saturate", "inf"))
        self.wild = draw.chance(35)
        self.model = Model(layers, batch, slots, heads, head_dim, min(sinks, slots - 1), overflow == "saturate")
        self.log: list[str] = []
        self.taken: Counter[str] = Counter()
        self.graphs: list[tuple[list[Action], list[Any], Any]] = []
        self.other: tuple[StreamingKVCacheFp16, list[Array]] | None = None
        self.source: tuple[StreamingKVCacheFp16, Model] | None = None  # what sequences are copied from
        arguments = {"batch_size": batch, "sink_positions": self.model.sinks, "overflow": overflow, "device": device}
        self.adopt(StreamingKVCacheFp16(layers, slots, heads, head_dim, **arguments))
        self.log.append(repr(self.cache))

    # The cache under test

    def adopt(self, cache: StreamingKVCacheFp16) -> None:
        """From here on this one; all that it does not hold is poisoned."""
        m = self.model
        self.cache = cache
        self.graphs = []
        self.held = np.zeros((m.layers, m.batch, m.slots), bool)
        self.want = [np.full((m.layers, m.batch, m.slots, m.heads, m.head_dim), POISON, np.uint16) for _ in range(2)]
        self.on_host = cache.k_cache.is_cpu
        self.poison(np.ones_like(self.held))
        for layer in m.at:
            for s in layer:
                s.changed = True

    def storage(self) -> list[Array]:
        tensors = (self.cache.k_cache, self.cache.v_cache)
        return [(t if self.on_host else t.cpu()).view(torch.int16).numpy().view(np.uint16) for t in tensors]

    def slots_of(self, positions: list[int]) -> list[int]:
        """The layout that the design promises to whoever reads `k_cache`."""
        sinks, ring = self.model.sinks, self.model.slots - self.model.sinks
        return [p if p < sinks else sinks + (p - sinks) % ring for p in positions]

    def poison(self, where: Array) -> None:
        """The slots that hold nothing of these, `[L, B, N]` bool."""
        where = where.copy()
        for layer, sequences in enumerate(self.model.at):
            for b, s in enumerate(sequences):
                where[layer, b, self.slots_of(s.positions)] = False
        if not where.any():
            return
        for tensor in (self.cache.k_cache, self.cache.v_cache):
            if self.on_host:
                tensor.view(torch.int16).numpy().view(np.uint16)[where] = POISON
            else:
                tensor.view(torch.int16)[torch.from_numpy(where).to(self.device)] = POISON

    # Comparing

    def compare(self, lengths: bool = True) -> None:
        """Storage with the slots that nothing lies in, state, counters, and all that is held as it is read back.

        `lengths`: those of the host as well; asking for them makes the host's copy exact, so it is not done always.
        """
        m, cache = self.model, self.cache
        freed = None
        for layer, sequences in enumerate(m.at):
            for b, s in enumerate(sequences):
                if not s.changed:
                    continue
                slots = self.slots_of(s.positions)
                now = np.zeros(m.slots, bool)
                now[slots] = True
                gone = self.held[layer, b]
                gone[self.slots_of(s.written)] = True
                gone &= ~now
                s.changed, s.written = False, []
                if gone.any():
                    freed = np.zeros_like(self.held) if freed is None else freed
                    freed[layer, b] = gone
                self.held[layer, b] = now
                for want, rows in zip(self.want, (s.keys, s.values), strict=True):
                    want[layer, b] = POISON
                    if slots:
                        want[layer, b, slots] = rows
        if freed is not None:
            self.poison(freed)
        for name, got, want in zip(("k_cache", "v_cache"), self.storage(), self.want, strict=True):
            expect_bits(name, got, want)
        state = cache.tensors.state.cpu().tolist()
        expect_equal("positions seen", state[0], [[s.next for s in layer] for layer in m.at])
        expect_equal("oldest in the ring", state[1], [[s.oldest_in_ring(m.sinks) for s in layer] for layer in m.at])
        expect_equal("the scratch row", any(map(any, state[2])), False)
        expect_equal("overflow_counts", cache.overflow_counts().tolist(), m.overflow_counts)
        for layer in range(m.layers):
            n = m.longest(layer) + 1
            indices = torch.arange(n, device=self.device)
            self.expect_rows("held", cache.gather(layer, indices, dtype=torch.float16), layer, list(range(n)))
        held = [[len(s.positions) for s in layer] for layer in m.at]
        expect_equal("device_lengths", cache.device_lengths().tolist(), held)
        if lengths:
            expect_equal("len", len(cache), m.shortest())
            expect_equal("lengths", cache.lengths(), [m.shortest_of(b) for b in range(m.batch)])
            expect_equal("is_empty", cache.is_empty(), m.shortest() == 0)
            expect_equal("position", cache.position, m.position())

    def expect_rows(
        self,
        what: str,
        got: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        indices: list[int] | list[list[int]],
        dtype: torch.dtype = torch.float16,
        entries: Sequence[int | None] | None = None,
        model: Model | None = None,
    ) -> None:
        """`got`: rows at these indices (one list for all entries, or one each), zeros where nothing is held."""
        m = self.model if model is None else model
        entries = range(m.batch) if entries is None else entries
        each = bool(indices) and isinstance(indices[0], list)
        n = got[0].shape[-3] if not len(entries) else len(indices[0]) if each else len(indices)  # type: ignore[arg-type]
        wanted = np.zeros((2, len(entries), n, m.heads, m.head_dim), np.uint16)
        for i, b in enumerate(entries):
            if b is None:
                continue
            s = m.at[layer][b]
            chosen: Any = indices[i] if each else indices
            there = [(j, index) for j, index in enumerate(chosen) if 0 <= index < len(s.positions)]
            if there:
                places = [j for j, _ in there]
                wanted[0, i, places] = [s.keys[index] for _, index in there]
                wanted[1, i, places] = [s.values[index] for _, index in there]
        for name, tensor, want in zip(("keys", "values"), got, wanted, strict=True):
            expect_equal(f"{what}: dtype of {name}", tensor.dtype, dtype)
            if len(entries) == 1 and tensor.dim() == 3:
                want = want[0]
            if dtype == torch.float32:
                single = tensor.cpu().contiguous().numpy()
                with np.errstate(invalid="ignore"):
                    exact = want.view(np.float16).astype(np.float32)
                if not np.array_equal(single.view(np.uint32), exact.view(np.uint32)):
                    same = (single.view(np.uint32) == exact.view(np.uint32)) | (np.isnan(single) & np.isnan(exact))
                    expect_equal(f"{what}: {name} that differ", np.argwhere(~same).tolist()[:3], [])
            elif dtype == torch.bfloat16:
                bits, want = as_bits(tensor), half_to_bfloat16(want)
                bits = np.where((bits & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), bits)
                expect_equal(f"{what}: {name} that differ", np.argwhere(bits != want).tolist()[:3], [])
            else:
                expect_bits(f"{what}: {name}", as_bits(tensor), want)

    # Parts of calls

    def rows(self, draw: Draw) -> int:
        """How many positions to append: mostly one or few, at times more than the ring has room for."""
        n = self.model.slots
        most = 24 if self.model.heads * self.model.head_dim > 512 or self.small else 2 * n + 1
        return min(draw.choice((1, 1, 1, 1, 2, 3, 5, 0, n - 1, n, n + 1, n + 3, 2 * n + 1)), most)

    def layer(self, draw: Draw) -> int:
        return draw.integer(0, self.model.layers - 1)

    def integers(self, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def far(self, draw: Draw, dtype: torch.dtype) -> int:
        return draw.choice((self.model.batch, *FAR, *(VERY_FAR if dtype == torch.int64 else ())))

    def permutation(self, draw: Draw) -> list[int]:
        order = list(range(self.model.batch))
        for i in range(len(order) - 1, 0, -1):
            j = draw.integer(0, i)
            order[i], order[j] = order[j], order[i]
        return order

    def entries(self, draw: Draw, percent: int = 35, tensors_only: bool = False) -> Entries:
        if not draw.chance(percent):
            return Entries(None, list(range(self.model.batch)))
        chosen: list[int | None] = [*self.permutation(draw)[: draw.integer(0 if draw.chance(10) else 1, 5)]]
        if draw.chance(50) and not tensors_only:
            return Entries(draw.choice((list, tuple))(chosen), chosen)
        dtype = draw.choice((torch.int64, torch.int32))
        numbers = []
        for i, b in enumerate(chosen):
            if draw.chance(12):
                chosen[i] = None
                b = self.far(draw, dtype)
            numbers.append(b)
        return Entries(self.integers(numbers, dtype), chosen)  # type: ignore[arg-type]

    def input(
        self,
        draw: Draw,
        dtype: torch.dtype,
        lead: tuple[int, ...],
        batch: int,
        rows: int,
        heads: int,
        owned: bool,
        query: bool = False,
    ) -> Input:
        """Of shape `[*lead, batch, rows, heads, head_dim]`, or of a short form."""
        shape = (*lead, batch, rows, heads, self.model.head_dim)
        pool = Pool.of(self.device, dtype, self.wild, query)
        drop = 0
        if batch == 1 and draw.chance(50):
            drop = 1
            if rows == 1 and draw.chance(50):
                drop = 2
        if drop == 1:  # B alone: T stays, so it is the one before it that goes
            given = Input(draw, pool, shape, 0, owned)
            given.tensor = given.tensor.squeeze(len(lead))
            return given
        return Input(draw, pool, shape, drop, owned)

    def new_rows(
        self, draw: Draw, lead: tuple[int, ...], entries: Entries, rows: int, owned: bool
    ) -> tuple[Input, Input, torch.Tensor | None, list[int]]:
        """key, value, new_lengths and how many rows of each entry that comes to (changed in place by a refill)."""
        m, batch = self.model, len(entries.of)
        dtype = draw.choice(DTYPES)
        key, value = (self.input(draw, dtype, lead, batch, rows, m.heads, owned) for _ in range(2))
        counts = [rows] * batch
        lengths = None
        if draw.chance(25):
            lengths = self.integers([0] * batch, draw.choice((torch.int64, torch.int32)))
            self.new_counts(draw, lengths, counts, rows)
        return key, value, lengths, counts

    def new_counts(self, draw: Draw, lengths: torch.Tensor, counts: list[int], rows: int) -> None:
        numbers = [draw.integer(-2, rows + 2) for _ in counts]
        lengths.copy_(torch.tensor(numbers))
        counts[:] = [min(max(n, 0), rows) for n in numbers]

    def refill_of(
        self, inputs: tuple[Input, ...], lengths: torch.Tensor | None, counts: list[int], rows: int
    ) -> Callable[[Draw], None]:
        """What gives an append new numbers between two replays."""

        def refill(draw: Draw) -> None:
            for given in inputs:
                given.refill(draw)
            if lengths is not None:
                self.new_counts(draw, lengths, counts, rows)

        return refill

    def store(
        self,
        layer: int,
        key: Input,
        value: Input,
        counts: list[int],
        entries: Entries,
        of_layer: int | None = None,
        model: Model | None = None,
    ) -> None:
        """Appends to the model, or to another one."""
        m = self.model if model is None else model
        parts = []
        for given in (key, value):
            bits, overflows = given.of(given.pool.bits[m.saturate]), given.of(given.pool.overflows)
            parts += [bits, overflows] if of_layer is None else [bits[of_layer], overflows[of_layer]]
        keys, key_overflows, values, value_overflows = parts
        for i, b in entries.known():
            begin = keys.shape[1] - counts[i]
            lost = 0
            if self.wild:
                lost = int(key_overflows[i, begin:].sum() + value_overflows[i, begin:].sum())
            m.append(layer, b, keys[i, begin:].copy(), values[i, begin:].copy(), lost)

    # Steps: each makes an action

    def append(self, draw: Draw, static: bool = False) -> Action:
        layer, entries, rows = self.layer(draw), self.entries(draw, 30, static), self.rows(draw)
        key, value, lengths, counts = self.new_rows(draw, (), entries, rows, static)
        dispatched = draw.chance(15) and not isinstance(entries.argument, (list, tuple))
        cache = self.cache

        def call() -> None:
            if dispatched:
                ops.append(
                    *cache.tensors[:4], layer, key.tensor, value.tensor,
                    lengths, sink_positions=cache.sink_positions, saturate=cache.overflow == "saturate",
                    sequences=entries.argument,
                )  # fmt: skip
            else:
                cache.append(layer, key.tensor, value.tensor, new_lengths=lengths, sequences=entries.argument)

        refill = self.refill_of((key, value), lengths, counts, rows)
        return Action(
            lambda: (
                f"{'ops.' if dispatched else ''}append({layer}, {key}, {value}, counts={counts} "
                f"({'all' if lengths is None else lengths.dtype}), sequences={entries})"
            ),
            call,
            lambda _: self.store(layer, key, value, counts, entries),
            refill,
        )

    def append_all(self, draw: Draw, static: bool = False) -> Action:
        entries, rows = self.entries(draw, 30, static), self.rows(draw)
        m = self.model
        if m.layers * len(entries.of) * rows * m.heads * (m.head_dim + 24) > Pool.SIZE // 2:
            rows = 1
        key, value, lengths, counts = self.new_rows(draw, (m.layers,), entries, rows, static)
        dispatched = draw.chance(15) and not isinstance(entries.argument, (list, tuple))
        cache = self.cache

        def call() -> None:
            if dispatched:
                ops.append_all(
                    *cache.tensors[:4], key.tensor, value.tensor,
                    lengths, sink_positions=cache.sink_positions, saturate=cache.overflow == "saturate",
                    sequences=entries.argument,
                )  # fmt: skip
            else:
                cache.append_all(key.tensor, value.tensor, new_lengths=lengths, sequences=entries.argument)

        def expect(_: None) -> None:
            for layer in range(m.layers):
                self.store(layer, key, value, counts, entries, layer)

        refill = self.refill_of((key, value), lengths, counts, rows)
        return Action(
            lambda: (
                f"{'ops.' if dispatched else ''}append_all({key}, {value}, counts={counts} "
                f"({'all' if lengths is None else lengths.dtype}), sequences={entries})"
            ),
            call,
            expect,
            refill,
        )

    def gather(self, draw: Draw, static: bool = False) -> Action:
        layer, entries = self.layer(draw), self.entries(draw, 30, static)
        batch, n = len(entries.of), draw.integer(0, 12)
        each = draw.chance(40)
        dtype = draw.choice(DTYPES)
        indices: list[Any] = []
        tensor = torch.zeros((batch if each else 1, n, 2), dtype=torch.int64, device=self.device)
        if draw.chance(30):
            tensor = tensor[:, :, 0]  # strided
        else:
            tensor = torch.zeros((batch if each else 1, n), dtype=torch.int64, device=self.device)

        def refill(draw: Draw) -> None:
            most = self.model.longest(layer) + 2
            lists = [
                [draw.choice(VERY_FAR) if draw.chance(3) else draw.integer(-2, most) for _ in range(n)]
                for _ in range(batch if each else 1)
            ]
            tensor.copy_(torch.tensor(lists, dtype=torch.int64).view(tensor.shape))
            indices[:] = lists if each else lists[0]

        refill(draw)
        argument = tensor if each else tensor[0]
        out: Any = None
        if draw.chance(30):
            m = self.model
            out = tuple(
                torch.full((batch, m.heads, n, m.head_dim + 1), 7.0, dtype=dtype, device=self.device)
                .transpose(1, 2)[..., : m.head_dim]
                for _ in range(2)
            )  # fmt: skip
        cache = self.cache

        def call() -> Any:
            return cache.gather(layer, argument, dtype=dtype, out=out, sequences=entries.argument)

        def expect(got: Any) -> None:
            if out is not None and not all(a is b for a, b in zip(got, out, strict=True)):
                raise Difference("gather: does not return the tensors of out")
            self.expect_rows("gather", got, layer, indices, dtype, entries.of)

        return Action(
            lambda: f"gather({layer}, {indices}, dtype={dtype}, out={out is not None}, sequences={entries})",
            call,
            expect,
            refill,
        )

    def read_range(self, draw: Draw) -> Action:
        layer, how = self.layer(draw), draw.choice(("f32", "f32", "raw", "raw", "valid"))
        longest = self.model.longest(layer)
        start = 0 if how == "valid" else draw.integer(0, longest)
        end = longest if how == "valid" else draw.integer(start, longest)
        out: Any = None
        if draw.chance(30) and how != "raw":
            m = self.model
            shape = (end - start, m.heads, m.head_dim)
            shape = shape if m.batch == 1 and draw.chance(50) else (m.batch, *shape)  # type: ignore[assignment]
            out = tuple(torch.full(shape, 7.0, device=self.device) for _ in range(2))
        cache = self.cache

        def call() -> Any:
            if how == "raw":
                return cache.get_range_raw(layer, start, end)
            if how == "valid":
                return cache.get_valid_f32(layer, out=out)
            return cache.get_range_f32(layer, start, end, out=out)

        dtype = torch.float16 if how == "raw" else torch.float32
        return Action(
            lambda: f"range {how}({layer}, {start}, {end}, out={out is not None})",
            call,
            lambda got: self.expect_rows(how, got, layer, list(range(start, end)), dtype),
        )

    # Attention

    def attention_options(self, draw: Draw) -> tuple[AttentionOptions, dict[str, Any]]:
        arguments: dict[str, Any] = {}
        if draw.chance(30):
            arguments["scale"] = draw.choice((0.05, 0.5, 1.0, 0, -0.3))
        if draw.chance(30):
            arguments["window"] = draw.choice((1, 2, 3, 5, 10, 10**6, 2**62))
        if draw.chance(20):
            arguments["softcap"] = draw.choice((0.5, 2.0, 30))
        scale = arguments.get("scale", self.model.head_dim**-0.5)
        return AttentionOptions(scale, arguments.get("window"), arguments.get("softcap")), arguments

    def query_rows(self, draw: Draw) -> int:
        if draw.chance(6):
            m = self.model
            most = Pool.SIZE // (m.batch * m.heads * (m.head_dim + 24) * 8)  # of 8 queries to a head, and their gaps
            many = (16, 17, 20, 33) if self.small else (16, 17, 17, 20, 20, 33, 33, 64, 70, 129, 200)
            fitting = [rows for rows in many if rows <= most]
            if fitting:
                return draw.choice(fitting)
        return draw.choice((1, 1, 1, 1, 2, 3, 5, 0))

    def answer_tensor(self, draw: Draw, query: torch.Tensor) -> torch.Tensor | None:
        if not draw.chance(25):
            return None
        if query.dim() >= 3 and draw.chance(50):
            return torch.full_like(query.transpose(-3, -2), 7.0, memory_format=torch.contiguous_format).transpose(
                -3, -2
            )
        return torch.full_like(query, 7.0, memory_format=torch.contiguous_format)

    def expect_answer(
        self, what: str, got: Any, given: Input, wanted: list[Attention], lse_wanted: bool, fp16: bool = False
    ) -> None:
        out, lse = got if lse_wanted else (got, None)
        dtype = given.tensor.dtype
        expect_equal(f"{what}: dtype", out.dtype, dtype)
        expect_equal(f"{what}: shape", out.shape, given.tensor.shape)
        if not wanted or given.tensor.numel() == 0:
            return
        answers = out.cpu().double().numpy().reshape(given.shape)
        lses = None if lse is None else lse.cpu().double().numpy().reshape(given.shape[:-1])
        for i, want in enumerate(wanted):
            nothing = ~want.seen
            if nothing.any() and answers[i][nothing].any():
                raise Difference(f"{what}: entry {i} is not zero where nothing is seen")
            with np.errstate(invalid="ignore", over="ignore"):
                error = np.linalg.norm(answers[i] - want.out, axis=-1)
                relative: Any = RELATIVE[dtype]
                if fp16:  # scores and weights
                    relative = 4e-3 + 2.0**-10 * want.magnitude
                elif given.shape[-3] > 16:
                    relative = max(relative, ONE_OF_MANY)
                # The design's bound is relative to the answer. Of values from 1e-9 to 65,504 large ones may cancel each
                # other out, and what is left is not known that well: there it is relative to what was added up.
                size = want.terms if self.wild else np.linalg.norm(want.out, axis=-1)
                bound = (relative + 2.0**-22 * want.magnitude) * size
            bound += SMALLEST[dtype] * math.sqrt(given.shape[-1])
            usual = want.finite & np.isfinite(want.magnitude)  # neither keys and values nor the query are inf or NaN
            # Scores of 1e6 are known to some tenths in FP32, of 1e10 to thousands: any of them may be the largest then.
            checked = usual & ~nothing & (2.0**-22 * want.magnitude < 0.05)
            unsure = usual & ~nothing & ~checked
            if not np.isfinite(answers[i][unsure]).all():
                raise Difference(f"{what}: entry {i} is not finite where all that is seen is")
            wrong = checked & ~(error <= bound)
            if wrong.any():
                t, head = np.argwhere(wrong)[0]
                raise Difference(
                    f"{what}: entry {i}, query {t}, head {head}: error {error[t, head]:.3e} of {bound[t, head]:.3e}"
                )
            lost = want.nan_seen & ~np.isnan(answers[i]).all(-1)
            if lost.any():
                raise Difference(
                    f"{what}: entry {i}: a NaN in a key does not reach the answer at {np.argwhere(lost)[0]}"
                )
            if lses is not None:
                if (nothing != (lses[i] == -np.inf))[usual].any():
                    raise Difference(f"{what}: entry {i}: an LSE of -inf is elsewhere")
                with np.errstate(invalid="ignore"):
                    scores_off = 2.0**-10 if fp16 else 2.0**-22
                    allowed = 4e-6 * np.maximum(1, np.abs(want.lse)) + scores_off * want.magnitude
                    if (checked & ~(np.abs(lses[i] - want.lse) <= allowed)).any():
                        raise Difference(f"{what}: entry {i}: LSE {lses[i].tolist()}, not {want.lse.tolist()}")

    def attend(self, draw: Draw, static: bool = False) -> Action:
        m = self.model
        layer, entries, rows = self.layer(draw), self.entries(draw, 30, static), self.query_rows(draw)
        options, arguments = self.attention_options(draw)
        dtype = draw.choice((torch.float32, *DTYPES))
        group = draw.choice((1, 1, 2, 3, 8)) if m.heads < 8 else 1
        query = self.input(draw, dtype, (), len(entries.of), rows, m.heads * group, static, query=True)
        out = self.answer_tensor(draw, query.tensor)
        lse = draw.chance(50)
        half = draw.chance(30) and not self.wild
        if half:
            arguments["precision"] = "fp16"
        cache = self.cache

        def call() -> Any:
            return cache.attend(
                layer, query.tensor, return_lse=lse, out=out, sequences=entries.argument, **arguments
            )  # fmt: skip

        def expect(got: Any) -> None:
            if out is not None and (got[0] if lse else got) is not out:
                raise Difference("attend: does not return out")
            queries = query.of(query.pool.values)
            wanted = [
                Attention.of_nothing(rows, m.heads * group, m.head_dim) if b is None
                else m.attend(layer, b, queries[i], options)
                for i, b in enumerate(entries.of)
            ]  # fmt: skip
            self.expect_answer("attend", got, query, wanted, lse, half)

        return Action(
            lambda: f"attend({layer}, {query}, {arguments}, lse={lse}, out={out is not None}, sequences={entries})",
            call,
            expect,
            query.refill,
        )

    def append_attend(self, draw: Draw, static: bool = False) -> Action:
        m = self.model
        layer, entries, rows = self.layer(draw), self.entries(draw, 30, static), self.query_rows(draw)
        key, value, lengths, counts = self.new_rows(draw, (), entries, rows, static)
        options, arguments = self.attention_options(draw)
        group = draw.choice((1, 1, 2, 3, 8)) if m.heads < 8 else 1
        dtype = key.tensor.dtype if draw.chance(60) else draw.choice(DTYPES)
        query = self.input(draw, dtype, (), len(entries.of), rows, m.heads * group, static, query=True)
        if rows > 1 and query.tensor.dim() < 3:
            query.tensor = query.tensor.view(query.shape)
        out = self.answer_tensor(draw, query.tensor)
        lse = draw.chance(50)
        half = draw.chance(30) and not self.wild
        if half:
            arguments["precision"] = "fp16"
        cache = self.cache

        def call() -> Any:
            return cache.append_attend(
                layer, query.tensor, key.tensor, value.tensor, new_lengths=lengths, return_lse=lse, out=out,
                sequences=entries.argument, **arguments,
            )  # fmt: skip

        def expect(got: Any) -> None:
            if out is not None and (got[0] if lse else got) is not out:
                raise Difference("append_attend: does not return out")
            queries = query.of(query.pool.values)
            keys, values = (x.of(x.pool.bits[m.saturate]) for x in (key, value))
            wanted = []
            for i, b in enumerate(entries.of):
                want = Attention.of_nothing(rows, m.heads * group, m.head_dim)
                wanted.append(want)
                if b is None:
                    continue
                s = m.at[layer][b].copy()
                for t in range(rows - counts[i], rows):
                    s.append(keys[i, t].copy(), values[i, t].copy(), m.slots, m.sinks)
                    one = attention([s], queries[i, t : t + 1], np.array([s.next - 1]), m.sinks, options)
                    for name in ("out", "lse", "seen", "magnitude", "terms", "finite", "nan_seen"):
                        getattr(want, name)[t] = getattr(one, name)[0]
            self.expect_answer("append_attend", got, query, wanted, lse, half)
            self.store(layer, key, value, counts, entries)

        refill = self.refill_of((query, key, value), lengths, counts, rows)
        return Action(
            lambda: (
                f"append_attend({layer}, {query}, {key}, {value}, counts={counts} "
                f"({'all' if lengths is None else lengths.dtype}), {arguments}, lse={lse}, out={out is not None}, "
                f"sequences={entries})"
            ),
            call,
            expect,
            refill,
        )

    def merge(self, draw: Draw) -> Action:
        """Attention over two layers, merged, is attention over all that both hold."""
        m, first, second = self.model, self.layer(draw), self.layer(draw)
        given = self.input(draw, torch.float32, (), m.batch, 1, m.heads, False, query=True)
        given.tensor = given.tensor.view(given.shape)
        options = AttentionOptions(m.head_dim**-0.5)
        cache = self.cache

        def call() -> Any:
            parts = [cache.attend(layer, given.tensor, return_lse=True) for layer in (first, second)]
            return merge_states([p[0] for p in parts], [p[1] for p in parts])

        def expect(got: Any) -> None:
            queries = given.of(given.pool.values)
            wanted = []
            for b in range(m.batch):
                parts = [m.at[layer][b] for layer in (first, second)]
                wanted.append(attention(parts, queries[b], np.array([max(s.next for s in parts)]), m.sinks, options))
            for want in wanted:
                want.magnitude += 8  # merging rounds too
            self.expect_answer("merge_states", got, given, wanted, True)

        return Action(lambda: f"merge_states of layers {first} and {second}, {given}", call, expect)

    # Lengths and sequences

    def truncate(self, draw: Draw, static: bool = False) -> Action:
        return self.shorten("truncate", draw, static)

    def drop_newest(self, draw: Draw, static: bool = False) -> Action:
        return self.shorten("drop_newest", draw, static)

    def shorten(self, name: str, draw: Draw, static: bool) -> Action:
        m, cache, entries = self.model, self.cache, self.entries(draw, 40, static)
        chosen = [b for _, b in entries.known()]
        on_device = isinstance(entries.argument, torch.Tensor)
        how = "tensor" if static else draw.choice(("int", "int", "list", "tensor", "op"))
        if how == "op" and (entries.argument is not None and not on_device):
            how = "int"
        if how == "list" and on_device:
            how = "tensor"
        if how in ("int", "op"):
            most = min((m.shortest_of(b) for b in chosen), default=0)
            most = most + 3 if on_device or how == "op" else most
            n: Any = draw.integer(0, most)
            numbers = [n] * len(entries.of)
        elif how == "list":
            numbers = [draw.integer(0, m.shortest_of(b)) for b in chosen]
            n = numbers
        else:
            numbers = [draw.integer(-1, m.slots + 1) for _ in entries.of]
            n = self.integers(numbers, draw.choice((torch.int64, torch.int32)))

        def call() -> None:
            if how == "op":
                ops.truncate(
                    cache.k_cache, cache.tensors.state, n,
                    sequences=entries.argument, sink_positions=cache.sink_positions,
                    newest=name == "drop_newest",
                )  # fmt: skip
            else:
                getattr(cache, name)(n, sequences=entries.argument)

        def expect(_: None) -> None:
            for i, b in entries.known():
                getattr(m, name)(b, numbers[i])

        return Action(lambda: f"{name} {how} ({numbers}, sequences={entries})", call, expect)

    def reset(self, draw: Draw, static: bool = False) -> Action:
        entries, cache = self.entries(draw, 90, static), self.cache
        return Action(
            lambda: f"reset({entries})",
            lambda: cache.reset(entries.argument),
            lambda _: self.model.reset([b for _, b in entries.known()]),
        )

    def clear(self, draw: Draw, static: bool = False) -> Action:
        cache = self.cache
        return Action(lambda: "clear()", cache.clear, lambda _: self.model.clear())

    def reorder(self, draw: Draw, static: bool = False) -> Action:
        m, cache = self.model, self.cache
        numbers = [draw.integer(0, m.batch - 1) for _ in range(m.batch)]
        argument: Any = numbers
        if static or draw.chance(50):
            dtype = draw.choice((torch.int64, torch.int32))
            numbers = [self.far(draw, dtype) if draw.chance(10) else b for b in numbers]
            argument = self.integers(numbers, dtype)
        pairs = [(source, b) for b, source in enumerate(numbers) if 0 <= source < m.batch]
        return Action(
            lambda: f"reorder({numbers}, {type(argument).__name__})",
            lambda: cache.reorder(argument),
            lambda _: m.copy_sequences(pairs),
        )

    def copy_sequence(self, draw: Draw, static: bool = False) -> Action:
        m, cache = self.model, self.cache
        to = self.permutation(draw)[: draw.integer(1, m.batch)]
        of = [draw.integer(0, m.batch - 1) for _ in to]
        arguments: list[Any] = [of, to]
        for i, numbers in enumerate(arguments):
            if static or draw.chance(50):
                dtype = draw.choice((torch.int64, torch.int32))
                numbers[:] = [self.far(draw, dtype) if draw.chance(8) else b for b in numbers]
                tensor = self.integers(numbers, dtype)
                arguments[i] = tensor[0] if len(numbers) == 1 and draw.chance(50) else tensor
            elif len(numbers) == 1 and draw.chance(60):
                arguments[i] = numbers[0]
        pairs = [p for p in zip(of, to, strict=True) if 0 <= p[0] < m.batch and 0 <= p[1] < m.batch]
        return Action(
            lambda: f"copy_sequence({of}, {to}, {[type(a).__name__ for a in arguments]})",
            lambda: cache.copy_sequence(*arguments),
            lambda _: m.copy_sequences(pairs),
        )

    def made_source(self, draw: Draw) -> tuple[StreamingKVCacheFp16, Model]:
        """A cache of other sequences and slots than this one has, made when it is first asked for."""
        if self.source is None:
            m = self.model
            slots, batch = draw.choice((m.slots, draw.integer(m.sinks + 1, m.sinks + 24))), draw.integer(1, 4)
            cache = StreamingKVCacheFp16(
                m.layers, slots, m.heads, m.head_dim, batch_size=batch, sink_positions=m.sinks,
                overflow=self.cache.overflow, device=self.device,
            )  # fmt: skip
            for tensor in (cache.k_cache, cache.v_cache):
                tensor.view(torch.int16).fill_(STRAY)
            self.source = cache, Model(m.layers, batch, slots, m.heads, m.head_dim, m.sinks, m.saturate)
        return self.source

    def copy_from(self, draw: Draw, static: bool = False) -> Action:
        """The source is appended to, in one of its layers, and some of its sequences are copied."""
        m, cache = self.model, self.cache
        source, of = self.made_source(draw)
        layer, everyone = self.layer(draw), Entries(None, list(range(of.batch)))
        rows = min(draw.choice((0, 1, 3, of.slots, of.slots + 3)), 24)
        key, value, lengths, counts = self.new_rows(draw, (), everyone, rows, static)
        to = self.permutation(draw)[: draw.integer(1, m.batch)]
        src = [draw.integer(0, of.batch - 1) for _ in to]
        arguments: list[Any] = [src, to]
        for i, numbers in enumerate(arguments):
            if static or draw.chance(50):
                dtype = draw.choice((torch.int64, torch.int32))
                numbers[:] = [draw.choice((-1, 9, *FAR)) if draw.chance(8) else b for b in numbers]
                tensor = self.integers(numbers, dtype)
                arguments[i] = tensor[0] if len(numbers) == 1 and draw.chance(50) else tensor
            elif len(numbers) == 1 and draw.chance(60):
                arguments[i] = numbers[0]
        pairs = [p for p in zip(src, to, strict=True) if 0 <= p[0] < of.batch and 0 <= p[1] < m.batch]
        look = draw.chance(50)  # which makes the host's lengths of the source exact

        def call() -> None:
            source.append(layer, key.tensor, value.tensor, new_lengths=lengths)
            cache.copy_sequence(*arguments, source=source)

        def expect(_: None) -> None:
            self.store(layer, key, value, counts, everyone, model=of)
            m.copy_from(of, pairs)
            if static:  # later calls of the same graph may have changed the source
                return
            state = source.tensors.state.cpu().tolist()
            expect_equal("positions seen by the source", state[0], [[s.next for s in layer] for layer in of.at])
            expect_equal("overflow_counts of the source", source.overflow_counts().tolist(), of.overflow_counts)
            n = of.longest(layer) + 1
            got = source.gather(layer, torch.arange(n, device=self.device), dtype=torch.float16)
            self.expect_rows("held by the source", got, layer, list(range(n)), model=of)
            if look:
                expect_equal("lengths of the source", source.lengths(), [of.shortest_of(b) for b in range(of.batch)])

        return Action(
            lambda: (
                f"append {rows} to layer {layer} of {source}, copy_sequence({src}, {to}, "
                f"{[type(a).__name__ for a in arguments]}, source)"
            ),
            call,
            expect,
            self.refill_of((key, value), lengths, counts, rows),
        )

    # Caches from caches

    def duplicate(self, draw: Draw) -> Action:
        """On with a copy; the old one must be what it was when the next copy is made."""
        how = draw.choice(("copy", "deepcopy", "pickle"))

        def call() -> StreamingKVCacheFp16:
            if how == "pickle":
                return pickle.loads(pickle.dumps(self.cache))  # type: ignore[no-any-return]
            return copy.copy(self.cache) if how == "copy" else copy.deepcopy(self.cache)

        def expect(other: StreamingKVCacheFp16) -> None:
            if self.other is not None:
                cache, before = self.other
                for name, x, y in zip(("keys", "values", "state"), self.contents(cache), before, strict=True):
                    expect_bits(f"{name} of a cache that was copied", x, y)
            self.other = (self.cache, [x.copy() for x in self.contents(self.cache)])
            self.adopt(other)

        return Action(lambda: how, call, expect)

    @staticmethod
    def contents(cache: StreamingKVCacheFp16) -> list[Array]:
        return [as_bits(t) for t in cache.tensors[:3]]

    def save_and_load(self, draw: Draw) -> Action:
        """A loaded cache holds the same; in one with fewer slots, the sinks and the newest."""
        m = self.model
        slots = draw.choice((m.slots, m.slots, draw.integer(m.sinks + 1, m.slots), m.slots + draw.integer(1, 9)))
        as_it_is = draw.chance(30)
        slots = m.slots if as_it_is else slots

        def call() -> StreamingKVCacheFp16:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.safetensors"
                self.cache.save(path)  # type: ignore[attr-defined]
                size: dict[str, Any] = {} if as_it_is else {"max_positions": slots}
                return StreamingKVCacheFp16.load(path, device=self.device, **size)  # type: ignore[attr-defined, no-any-return]

        def expect(loaded: StreamingKVCacheFp16) -> None:
            self.model = m.with_slots(slots)
            expect_equal("max_positions of a loaded cache", loaded.max_positions, slots)
            self.adopt(loaded)

        return Action(lambda: f"save, load(max_positions={'as it is' if as_it_is else slots})", call, expect)

    def load_sequences(self, draw: Draw) -> Action:
        """Some sequences to a file, and from there into as many: what copy_sequence does."""
        m, cache = self.model, self.cache
        of = self.permutation(draw)[: draw.integer(1, m.batch)]
        to = self.permutation(draw)[: len(of)]

        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.safetensors"
                cache.save(path, sequences=of)  # type: ignore[attr-defined]
                cache.load_sequences(path, to)  # type: ignore[attr-defined]

        pairs = list(zip(of, to, strict=True))
        return Action(lambda: f"save({of}), load_sequences({to})", call, lambda _: m.copy_sequences(pairs))

    # Calls that must fail and change nothing

    def wrong_call(self, draw: Draw) -> Action:
        m, c = self.model, self.cache
        good = torch.zeros(m.batch, 1, m.heads, m.head_dim, device=self.device)
        calls: list[tuple[str, Callable[[], object], type[Exception]]] = [
            ("append: layer", lambda: c.append(m.layers, good, good), IndexError),
            ("append: key's heads", lambda: c.append(0, good.repeat(1, 1, 2, 1), good), ValueError),
            ("append: value's dtype", lambda: c.append(0, good, good.half()), TypeError),
            ("append: sequences", lambda: c.append(0, good, good, sequences=[0] * (m.batch + 1)), ValueError),
            ("append_all: layers", lambda: c.append_all(good[None].repeat(m.layers + 1, 1, 1, 1, 1), good), ValueError),
            ("truncate: too long", lambda: c.truncate(m.shortest() + 1), IndexError),
            ("drop_newest: too many", lambda: c.drop_newest(m.shortest() + 1), IndexError),
            ("copy_sequence: source", lambda: c.copy_sequence(0, 0, source=c.k_cache), TypeError),  # type: ignore[arg-type]
            ("get_range_f32: end", lambda: c.get_range_f32(0, 0, m.longest(0) + 1), IndexError),
            ("gather: indices", lambda: c.gather(0, good), TypeError),
            ("reorder: out of range", lambda: c.reorder([m.batch] * m.batch), IndexError),
            ("attend: query", lambda: c.attend(0, good.double()), (TypeError, ValueError)),  # type: ignore[list-item]
            ("append: the cache itself", lambda: c.append(0, c.k_cache[0, :, :1], good.half()), ValueError),
        ]
        name, wrong, error = draw.choice(calls)

        def call() -> None:
            try:
                wrong()
            except error:
                return
            raise Difference(f"{name}: no error")

        return Action(lambda: f"wrong call, {name}", call, lambda _: None)

    # Graphs. Where there is no GPU they are lists of calls, so that this file is tested everywhere.

    def capture(self, draw: Draw) -> Action:
        kinds = [self.append, self.append, self.append_all, self.gather, self.reorder, self.copy_sequence,
                 self.copy_from, self.truncate, self.drop_newest, self.reset]  # fmt: skip
        if self.attends:
            kinds += [self.append_attend, self.append_attend, self.append_attend, self.attend]
        actions = [draw.choice(kinds)(draw, static=True) for _ in range(draw.integer(1, 5))]

        def call() -> tuple[list[Any], Any]:
            if self.on_host:
                return [], None
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                results = [action.call() for action in actions]
            torch.cuda.current_stream().wait_stream(side)
            return results, graph

        def expect(got: tuple[list[Any], Any]) -> None:
            self.graphs = [*self.graphs[-2:], (actions, *got)]

        return Action(lambda: f"capture of {[a.text() for a in actions]}", call, expect)

    def replay(self, draw: Draw) -> Action:
        """All of a graph's calls, their inputs new; only the last answer of each buffer is there to be looked at."""
        number = draw.integer(0, len(self.graphs) - 1)
        actions, results, graph = self.graphs[number]
        for action in actions:
            action.refill(draw)

        def call() -> list[Any]:
            if graph is None:
                return [action.call() for action in actions]
            graph.replay()
            return results

        def expect(got: list[Any]) -> None:
            for action, result in zip(actions, got, strict=True):
                action.expect(result)

        return Action(lambda: f"replay {number} of {[a.text() for a in actions]}", call, expect)

    # Choosing

    @property
    def attends(self) -> bool:
        return self.model.head_dim % 8 == 0 and self.model.head_dim <= 512

    def possible(self, name: str) -> bool:
        if name in ("attend", "append_attend", "merge"):
            return self.attends
        if name == "replay":
            return bool(self.graphs)
        return name not in ("save_and_load", "load_sequences") or hasattr(StreamingKVCacheFp16, "save")

    def take(self, name: str, draw: Draw) -> None:
        """One step: the call, on the cache and on the model, and all there is compared."""
        action: Action = getattr(self, name)(draw)
        self.log.append(action.text())
        with torch.no_grad():
            action.expect(action.call())
            self.compare(lengths=draw.chance(50))
        self.taken[name] += 1

    def step(self, draw: Draw) -> None:
        name = draw.choice(CHOICES)
        self.take(name if self.possible(name) else "append", draw)


# How often each is taken, of 100 or so.
STEPS = {
    "append": 24, "append_all": 8, "append_attend": 14, "attend": 8, "gather": 8, "read_range": 8, "truncate": 6,
    "drop_newest": 4, "reset": 3, "clear": 1, "reorder": 4, "copy_sequence": 4, "copy_from": 4, "merge": 1,
    "duplicate": 2, "save_and_load": 1, "load_sequences": 1, "wrong_call": 4, "capture": 2, "replay": 6,
}  # fmt: skip
CHOICES = [name for name, often in STEPS.items() for _ in range(often)]


class Failure(Exception):
    """A run of seeded steps that failed: which, and all that was done until then."""

    def __init__(self, numbers: list[int], log: list[str], error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.numbers, self.log = numbers, log


def seeded_run(seed: str, numbers: Sequence[int], device: torch.device, *, small: bool = False) -> Counter[str]:
    """These steps of a run that a seed names, counted by kind. Each has a seed of its own: some can be left out.

    Raises:
        Failure: the cache and the model differ, or a call raised.
    """
    run = Run(SeededDraw(seed), device, small=small)
    done = []
    for number in numbers:
        done.append(number)
        try:
            run.step(SeededDraw(f"{seed} step {number}"))
        except Exception as error:
            raise Failure(done, run.log, error) from error
    return run.taken


def shrunk(seed: str, failure: Failure, device: torch.device, *, small: bool = False) -> Failure:
    """As few of its steps as still fail, in whatever way."""
    length = max(len(failure.numbers) // 2, 1)
    while length:
        begin = 0
        while begin < len(failure.numbers):
            fewer = failure.numbers[:begin] + failure.numbers[begin + length :]
            try:
                seeded_run(seed, fewer, device, small=small)
            except Failure as smaller:
                failure = smaller
            else:
                begin += length
        length //= 2
    return failure
