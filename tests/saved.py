"""Caches that are saved and loaded, and how they are compared: for test_storage*.py."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16, reference
from kvcache_ext.files import transfer
from kvcache_ext.files.rows import Block


def rows(cache: StreamingKVCacheFp16, count: int, seed: int = 0) -> Tensor:
    shape = (cache.batch_size, count, cache.num_heads, cache.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(cache.device)


def fill(cache: StreamingKVCacheFp16, count: int, seed: int = 0, new_lengths: list[int] | None = None) -> None:
    """The same number of positions for every layer, each with values of its own."""
    lengths = None if new_lengths is None else torch.tensor(new_lengths, device=cache.device)
    for layer in range(cache.num_layers):
        new = rows(cache, count, 100 * seed + layer)
        cache.append(layer, new, -new, new_lengths=lengths)


def held(cache: StreamingKVCacheFp16, layer: int, sequence: int) -> list[int]:
    seen, first = (int(cache.tensors.state[i, layer, sequence]) for i in (0, 1))
    return reference.held_positions(seen, first, cache.sink_positions)


def contents(cache: StreamingKVCacheFp16, layer: int, sequence: int) -> tuple[Tensor, ...]:
    """All that a sequence holds, as stored."""
    indices = torch.arange(len(held(cache, layer, sequence)), device=cache.device)
    return cache.gather(layer, indices, dtype=torch.float16, sequences=[sequence])


def assert_same_held(got: StreamingKVCacheFp16, want: StreamingKVCacheFp16) -> None:
    """State, counters and everything held; the slots may differ."""
    assert torch.equal(got.tensors.state.cpu(), want.tensors.state.cpu())
    assert torch.equal(got.overflow_counts().cpu(), want.overflow_counts().cpu())
    assert (len(got), got.position) == (len(want), want.position)
    for layer in range(want.num_layers):
        for b in range(want.batch_size):
            for mine, theirs in zip(contents(got, layer, b), contents(want, layer, b), strict=True):
                assert_same_bits(mine.cpu(), theirs.cpu())


class LateEvent:
    """Copies of a GPU that are done no earlier than somebody waits for them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        with self.lock:
            for target, source in self.copies:
                target.copy_(source)
            self.copies = []


class LateBuffers(transfer.Buffers):
    """The way through pinned buffers, on a CPU."""

    def make_events(self, count: int, gpus: list[torch.device]) -> list[Any]:
        return [LateEvent() for _ in range(count)]

    def fetch(self, i: int, block: Block) -> None:
        event = self.events[i % len(self.events)]
        assert not event.copies, "the buffer is still in use"
        event.copies = [(here, there) for there, here in self.pairs(i, block)]

    def store(self, i: int, block: Block) -> None:
        event = self.events[i % len(self.events)]
        assert not event.copies, "the buffer is still in use"
        event.copies = list(self.pairs(i, block))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def peak_memory(call: Callable[[], object]) -> int:
    """How many bytes of host memory the process takes more, at most, while a call runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")

    def peak() -> int:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return next((int(line[1]) * 1024 for line in lines if line[0] == "VmHWM:"), 0)

    before = peak()
    if before == 0:
        pytest.skip("the peak of memory is not told here")
    call()
    return peak() - before
