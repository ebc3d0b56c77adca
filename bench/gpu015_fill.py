"""The first half of gpu015.py: the cache's shape, the data that it is filled with, and the fills themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Captured,
    Stopwatch,
    on_gpu,
    one_thread,
    progress,
    synchronize,
)
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16

LAYERS, POSITIONS, HEADS, HEAD_DIM = 32, 65_536, 32, 128  # a 7B model
CHUNK = 2_048  # positions of a prefill chunk
SEGMENT = 1_024  # positions between two looks at the progress bar
POOL_ROWS = 16_384
TORCH_SAMPLE = 4_096  # positions that plain torch appends one by one
# What keeps a rehearsal on a CPU under two minutes, on a busy machine too.
CPU_STEP_SECONDS = 20.0  # for each fill one by one; what is left of it then is filled in chunks, outside the time
CPU_OTHER_SECONDS = 50.0  # for all the rest; it bounds the layers:
CPU_BYTES_A_LAYER = 150e9  # that all the rest moves for a layer of the 7B shape, with room for page faults
CPU_VERIFY_EVERY = 8  # a rehearsal compares one block of SEGMENT positions in so many
GB = 10**9


@dataclass(frozen=True)
class Shape:
    layers: int
    positions: int
    heads: int
    head_dim: int
    dtype: torch.dtype  # of the keys and values that come in

    @property
    def row(self) -> int:
        return self.heads * self.head_dim

    def cache_bytes(self) -> int:
        return self.layers * self.positions * self.row * 2 * 2

    def fp32_bytes(self) -> int:
        return self.layers * self.positions * self.row * 2 * 4

    def append_bytes(self) -> int:
        """Read and written when one position is appended to every layer."""
        return self.layers * self.row * 2 * (self.dtype.itemsize + 2)

    def out_positions(self, device: torch.device) -> int:
        """Positions of the buffer that layers are read back into."""
        return min(65_536 if on_gpu(device) else 16_384, self.positions)

    def extra_bytes(self, device: torch.device) -> int:
        """What a run holds beside the cache, rounded up."""
        pool = POOL_ROWS * self.row * (2 * 4 + self.dtype.itemsize + 2)
        chunk = 2 * self.layers * min(CHUNK, self.positions) * self.row * self.dtype.itemsize
        out = 2 * self.out_positions(device) * self.row * 4
        table = self.positions * 2 * self.layers * 8
        return pool + chunk + out + 2 * table + GB

    def config(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "positions": self.positions,
            "kv_heads": self.heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class Feed:
    """New keys and values for every position of every layer, which can be drawn again to verify what was stored.

    table: int64 [positions, 2 * layers], rows of the pool: the keys of all layers, then the values of all layers.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(15)
        pool = torch.randn(POOL_ROWS, shape.heads, shape.head_dim, device=device, generator=generator)
        # Magnitudes from FP16's subnormals up to thousands.
        powers = torch.randint(-20, 11, (POOL_ROWS, 1, 1), device=device, generator=generator)
        self.pool = torch.ldexp(pool, powers).to(shape.dtype)
        self.stored_pool = self.pool.half()
        self.table = torch.empty((shape.positions, 2 * shape.layers), dtype=torch.int64, device=device)
        self.step = self.pool.new_empty((2 * shape.layers, shape.heads, shape.head_dim))
        self.all_keys, self.all_values = self.step[: shape.layers], self.step[shape.layers :]
        self.keys, self.values = self.all_keys.unbind(), self.all_values.unbind()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # for graphs, which know no host's number
        self._rows = self.table.new_empty((1, 2 * shape.layers))
        self._chunk: Tensor | None = None

    def renew(self, seed: int) -> None:
        """New data for every position."""
        generator = torch.Generator(self.table.device).manual_seed(seed)
        self.table.random_(0, POOL_ROWS, generator=generator)
        self.position.zero_()

    def draw(self, position: int) -> None:
        """A position's keys and values into `keys` and `values`."""
        torch.index_select(self.pool, 0, self.table[position], out=self.step)

    def draw_next(self) -> None:
        """The same, where the position is a number on the device, which is moved on."""
        torch.index_select(self.table, 0, self.position, out=self._rows)
        torch.index_select(self.pool, 0, self._rows.view(-1), out=self.step)
        self.position.add_(1)

    def draw_chunk(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, end - start, heads, head_dim] of a range of positions, in one buffer."""
        shape = self.shape
        rows = self.table[start:end].t().reshape(-1)
        size = (rows.numel(), shape.heads, shape.head_dim)
        if self._chunk is None or self._chunk.shape != size:
            self._chunk = None
            self._chunk = self.pool.new_empty(size)
        torch.index_select(self.pool, 0, rows, out=self._chunk)
        keys, values = self._chunk.view(2, shape.layers, end - start, shape.heads, shape.head_dim).unbind()
        return keys, values

    def drop_chunk(self) -> None:
        self._chunk = None

    def stored(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What the cache is to hold of a range of positions: torch's `.half()` of the data."""
        rows = self.table[start:end]
        return (
            self.stored_pool.index_select(0, rows[:, layer]),
            self.stored_pool.index_select(0, rows[:, self.shape.layers + layer]),
        )


class Mismatch(Exception):
    """The cache does not hold what it should."""


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise Mismatch(otherwise)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    whole = torch.int16 if got.dtype == torch.float16 else torch.int32
    return got.dtype == wanted.dtype and torch.equal(got.view(whole), wanted.view(whole))


@dataclass
class Fill:
    """A way to fill the cache, and what it came to in positions a second."""

    name: str
    figure: str
    rate: float
    ceiling: float
    peers: dict[str, float] = field(default_factory=dict)


class Run:
    """One cache of one size: fills, verifications, read-back, and plain torch on the same storage."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.verify_every = 1 if on_gpu(device) else CPU_VERIFY_EVERY  # block of positions
        self.feed = Feed(shape, device)
        self.verified = 0
        self.one_by_one = shape.positions  # positions that the shortest fill one by one did
        self.seed = 0
        synchronize(device)
        before = torch.cuda.memory_allocated(device) if on_gpu(device) else 0
        self.cache = StreamingKVCacheFp16(shape.layers, shape.positions, shape.heads, shape.head_dim, device=device)
        self.allocated = torch.cuda.memory_allocated(device) - before if on_gpu(device) else 0
        # So that slots left unwritten show, and that a CPU's memory is there before the clock runs.
        self.cache.k_cache.fill_(float("nan"))
        self.cache.v_cache.fill_(float("nan"))
        self.k_storage = self.cache.k_cache[:, 0].unbind()  # [positions, heads, head_dim] of each layer
        self.v_storage = self.cache.v_cache[:, 0].unbind()

    # Fills

    def _start_fill(self) -> None:
        self.seed += 1
        self.cache.clear()
        self.feed.renew(self.seed)

    def fill_stepwise(self, what: str, step: Callable[[int], object], positions: int | None = None) -> float:
        """Runs `step` for every position; positions a second, drawing their data included.

        Where the time of a rehearsal runs out, the cache's other positions come in chunks, outside the time.
        """
        total = positions or self.shape.positions
        watch = Stopwatch(self.device)
        with progress(what, total) as advance, one_thread(self.device):
            for start in range(0, total, SEGMENT):
                end = min(start + SEGMENT, total)
                with watch.running():
                    for position in range(start, end):
                        step(position)
                advance(end - start)
                if not on_gpu(self.device) and watch.seconds() > CPU_STEP_SECONDS and end < total:
                    if total == self.shape.positions:
                        self.one_by_one = min(self.one_by_one, end)
                        self._append_chunks(end, Stopwatch(self.device), advance)
                    return end / watch.seconds()
        return total / watch.seconds()

    def _append_chunks(self, first: int, watch: Stopwatch, advance: Callable[[int], None]) -> None:
        """Appends all positions from `first` on in chunks; drawing their data is not in the time."""
        for start in range(first, self.shape.positions, CHUNK):
            end = min(start + CHUNK, self.shape.positions)
            keys, values = self.feed.draw_chunk(start, end)
            with watch.running():
                for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                    self.cache.append(layer, key, value)
            advance(end - start)
        self.feed.drop_chunk()

    def fill_by_append(self) -> float:
        self._start_fill()
        return self._verified(self.fill_stepwise("one by one: append, layer by layer", self.append_step))

    def append_step(self, position: int) -> None:
        feed, append = self.feed, self.cache.append
        feed.draw(position)
        for layer, (key, value) in enumerate(zip(feed.keys, feed.values, strict=True)):
            append(layer, key, value)

    def fill_by_append_all(self) -> float:
        self._start_fill()
        cache, feed = self.cache, self.feed

        def step(position: int) -> None:
            feed.draw(position)
            cache.append_all(feed.all_keys, feed.all_values)

        return self._verified(self.fill_stepwise("one by one: append_all", step))

    def fill_by_graph(self, append_all: bool) -> float:
        """A step captured in a CUDA graph and replayed for every position."""
        cache, feed, layers = self.cache, self.feed, range(self.shape.layers)

        def step() -> None:
            feed.draw_next()
            if append_all:
                cache.append_all(feed.all_keys, feed.all_values)
            else:
                for layer in layers:
                    cache.append(layer, feed.keys[layer], feed.values[layer])

        self._start_fill()
        graph = Captured(step)
        self._start_fill()  # the warm-up has appended a position
        what = "append_all" if append_all else "append, layer by layer"
        return self._verified(self.fill_stepwise(f"one by one: {what}, CUDA graph", lambda _: graph.replay()))

    def fill_in_chunks(self) -> float:
        self._start_fill()
        watch = Stopwatch(self.device)
        with progress(f"in chunks of {CHUNK:,}", self.shape.positions) as advance:
            self._append_chunks(0, watch, advance)
        return self._verified(self.shape.positions / watch.seconds())

    # Verification

    def _verified(self, rate: float) -> float:
        self.verify()
        return rate

    def verify(self) -> None:
        """Compares what the cache stores with `.half()` of the data drawn again. Raises Mismatch."""
        cache, shape = self.cache, self.shape
        expect(
            len(cache) == cache.position == shape.positions,
            f"the cache holds {len(cache)} positions and has seen {cache.position}, not {shape.positions}",
        )
        blocks = list(range(0, shape.positions, SEGMENT))
        chosen = [start for i, start in enumerate(blocks) if i % self.verify_every == 0 or start == blocks[-1]]
        with progress("  verifying bit for bit", shape.layers * len(chosen)) as advance:
            for layer in range(shape.layers):
                for start in chosen:
                    end = min(start + SEGMENT, shape.positions)
                    for name, got, wanted in zip(
                        ("keys", "values"),
                        cache.get_range_raw(layer, start, end),
                        self.feed.stored(layer, start, end),
                        strict=True,
                    ):
                        expect(same_bits(got, wanted), f"{name} of layer {layer}, positions {start} to {end}, differ")
                    self.verified += end - start
                    advance(1)
        expect(int(cache.overflow_counts().sum()) == 0, "values were counted as overflows, and there were none")

    # Reading

    def _read_layers(
        self, what: str, read: Callable[[int, int, int, tuple[Tensor, Tensor]], object], layers: int | None = None
    ) -> float:
        """Runs `read` over the layers, part by part into one buffer; layer-positions a second."""
        shape = self.shape
        layers = layers or shape.layers
        size = shape.out_positions(self.device)
        buffer = torch.empty((2, size, shape.heads, shape.head_dim), device=self.device)
        buffer.fill_(float("nan"))  # also makes a CPU's memory be there before the clock runs
        watch = Stopwatch(self.device)
        with progress(what, layers) as advance:
            for layer in range(layers):
                for start in range(0, shape.positions, size):
                    end = min(start + size, shape.positions)
                    with watch.running():
                        read(layer, start, end, (buffer[0, : end - start], buffer[1, : end - start]))
                advance(1)
        return layers * shape.positions / watch.seconds()

    def read_back(self) -> float:
        """Every layer to FP32; then once more to verify, and not timed, a sample of it."""
        cache, feed = self.cache, self.feed

        def read(layer: int, start: int, end: int, out: tuple[Tensor, Tensor]) -> None:
            cache.get_range_f32(layer, start, end, out=out)

        def read_and_verify(layer: int, start: int, end: int, out: tuple[Tensor, Tensor]) -> None:
            cache.get_range_f32(layer, start, end, out=out)
            size = min(SEGMENT // 4, end - start)
            for first in (start, (start + end - size) // 2, end - size):
                for got, wanted in zip(out, feed.stored(layer, first, first + size), strict=True):
                    part = got[first - start : first - start + size]
                    expect(same_bits(part, wanted.float()), f"layer {layer}, positions from {first}, reads back wrong")

        rate = self._read_layers("reading every layer back to FP32", read)
        self._read_layers("  verifying what was read", read_and_verify)
        return rate

    # Plain torch, on the same storage: it overwrites what the cache holds, which nothing reads after it.

    def compare_with_torch(self, fills: list[Fill], peer: str, fill: Callable[[int], float]) -> None:
        rate = fill(min(TORCH_SAMPLE, self.shape.positions))
        for ours in fills:
            ours.peers[peer] = rate

    def torch_by_copy(self, positions: int) -> float:
        feed, layers = self.feed, range(self.shape.layers)

        def step(position: int) -> None:
            feed.draw(position)
            for layer in layers:
                self.k_storage[layer][position].copy_(feed.keys[layer])
                self.v_storage[layer][position].copy_(feed.values[layer])

        return self.fill_stepwise("plain torch: slice copy_", step, positions)

    def torch_by_graph(self, positions: int) -> float:
        feed, layers = self.feed, range(self.shape.layers)
        slot = torch.zeros_like(feed.position)

        def step() -> None:
            slot.copy_(feed.position)  # before draw_next moves it on
            feed.draw_next()
            for layer in layers:
                self.k_storage[layer].index_copy_(0, slot, feed.keys[layer].half().unsqueeze(0))
                self.v_storage[layer].index_copy_(0, slot, feed.values[layer].half().unsqueeze(0))

        feed.position.zero_()
        graph = Captured(step)
        feed.position.zero_()
        return self.fill_stepwise("plain torch: index_copy_, CUDA graph", lambda _: graph.replay(), positions)

    def torch_in_chunks(self, chunks: int) -> float:
        positions, layers = min(chunks * CHUNK, self.shape.positions), range(self.shape.layers)
        watch = Stopwatch(self.device)
        with progress("plain torch: slice copy_ of chunks", positions) as advance:
            for start in range(0, positions, CHUNK):
                end = min(start + CHUNK, positions)
                keys, values = self.feed.draw_chunk(start, end)
                with watch.running():
                    for layer in layers:
                        self.k_storage[layer][start:end].copy_(keys[layer])
                        self.v_storage[layer][start:end].copy_(values[layer])
                advance(end - start)
        rate = positions / watch.seconds()
        self.feed.drop_chunk()
        return rate

    def _torch_layers(self) -> int:
        return self.shape.layers if on_gpu(self.device) else min(2, self.shape.layers)

    def torch_read_copy(self) -> float:
        def read(layer: int, start: int, end: int, out: tuple[Tensor, Tensor]) -> None:
            out[0].copy_(self.k_storage[layer][start:end])
            out[1].copy_(self.v_storage[layer][start:end])

        return self._read_layers("plain torch: copy_ into the buffer", read, self._torch_layers())

    def torch_read_float(self) -> float:
        def read(layer: int, start: int, end: int, _: tuple[Tensor, Tensor]) -> None:
            self.k_storage[layer][start:end].float()
            self.v_storage[layer][start:end].float()

        return self._read_layers("plain torch: .float()", read, self._torch_layers())
