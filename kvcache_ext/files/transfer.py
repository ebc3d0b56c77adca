"""Bytes between files and the memory of caches, block by block, in threads.

On a CPU blocks are written from where they lie and read to where they belong. On a GPU they go through a few pinned
buffers: while one is copied between GPU and host, others are being written or read, and checked, by threads. (One
thread computes 1 to 3 GB/s of CRC-32, several keep up with a disk.)
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .rows import NOWHERE, Block, block_size

BLOCK_BYTES = 8 * 2**20
SYNC_BLOCKS = 8  # a sync begins after so many
_USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = max(2, min(8, _USABLE))  # that write or read, and compute checksums
BUFFERS = THREADS + 2  # blocks under way
LARGEST_BLOCK_BYTES = 64 * 2**20  # BUFFERS of them stay below 1 GB
PARTS_A_CALL = 512  # of pwritev and preadv; Linux takes 1,024

T = TypeVar("T")


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without NumPy. It and all slices of it keep the tensor alive."""
    array: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor
    return memoryview(array).cast("B")


def crc_of(parts: Iterable[memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def transfer(call: Callable[[int, list[memoryview], int], int], fd: int, parts: list[memoryview], offset: int) -> None:
    """pwritev or preadv of all the parts, however many calls that takes. EOFError where a file ends before."""
    for i in range(0, len(parts), PARTS_A_CALL):
        todo = parts[i : i + PARTS_A_CALL]
        while todo:
            done = call(fd, todo, offset)
            if done == 0:
                raise EOFError
            offset += done
            while todo and done >= len(todo[0]):
                done -= len(todo.pop(0))
            if done:
                todo[0] = todo[0][done:]


@contextmanager
def reworded_oserror(words: str, path: Path) -> Iterator[None]:
    """Raises an OSError from within again, with the same errno and one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"{words}: {reason}", str(path)) from error


def bounded_map(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of tasks, in order, with at most BUFFERS of them running or waiting to be taken."""
    pending: deque[Future[T]] = deque()
    for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) == BUFFERS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def on_device(devices: Iterable[torch.device]) -> Any:
    """Makes the first GPU among them the current device: pinned memory is allocated for that one."""
    gpu = next((device for device in devices if device.type == "cuda"), None)
    return nullcontext() if gpu is None else torch.cuda.device(gpu)


class InPlace:
    """Blocks between storages of a CPU and a file: as they lie."""

    def __init__(self, storages: Sequence[Tensor]) -> None:
        self.views = [memory_of(storage) for storage in storages]

    def parts(self, i: int, block: Block) -> list[memoryview]:
        """The memory that block number `i` is written from or read into."""
        return [
            memoryview(bytearray(size)) if storage == NOWHERE else self.views[storage][start : start + size]
            for storage, start, size in block
        ]

    def fetch(self, i: int, block: Block) -> None:
        """Begins to bring it from the storages to that memory."""

    def store(self, i: int, block: Block) -> None:
        """Begins to bring it from that memory to the storages."""

    def wait(self, i: int) -> None:
        """Until what was begun for the block, or for an earlier one in the same memory, is done. From any thread."""

    def finish(self) -> None:
        """Waits for all."""


class CopyEvent:
    """Marks copies on the current streams of some GPUs, to be waited for."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.events = [(device, torch.cuda.Event(blocking=True)) for device in devices]

    def record(self) -> None:
        for device, event in self.events:
            event.record(torch.cuda.current_stream(device))

    def synchronize(self) -> None:
        for _, event in self.events:
            event.synchronize()


class Buffers(InPlace):
    """Blocks that go through buffers in turn, between storages of any devices and a file.

    Each buffer has an event for the copies that it is part of.
    """

    def __init__(self, storages: Sequence[Tensor], blocks: int, block_bytes: int) -> None:
        self.storages = storages
        gpus = list(dict.fromkeys(storage.device for storage in storages if storage.device.type == "cuda"))
        count = min(BUFFERS, blocks)
        self.tensors = [
            torch.empty(block_bytes, dtype=torch.uint8, device="cpu", pin_memory=bool(gpus)) for _ in range(count)
        ]
        self.views = [memory_of(tensor) for tensor in self.tensors]
        self.events = self.make_events(count, gpus)

    def make_events(self, count: int, gpus: list[torch.device]) -> list[Any]:
        return [CopyEvent(gpus) for _ in range(count)]

    def parts(self, i: int, block: Block) -> list[memoryview]:
        return [self.views[i % len(self.views)][: block_size(block)]]

    def pairs(self, i: int, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """What belongs together in the storages and in the buffer."""
        buffer, at = self.tensors[i % len(self.tensors)], 0
        for storage, start, size in block:
            if storage != NOWHERE:
                yield self.storages[storage][start : start + size], buffer[at : at + size]
            at += size

    def fetch(self, i: int, block: Block) -> None:
        for there, here in self.pairs(i, block):
            here.copy_(there, non_blocking=True)
        self.events[i % len(self.events)].record()

    def store(self, i: int, block: Block) -> None:
        for there, here in self.pairs(i, block):
            there.copy_(here, non_blocking=True)
        self.events[i % len(self.events)].record()

    def wait(self, i: int) -> None:
        self.events[i % len(self.events)].synchronize()

    def finish(self) -> None:
        for event in self.events:
            event.synchronize()


class Collected(Buffers):
    """Blocks of a cache whose positions are dealt out to the ranks of a group: rank 0 gets what all ranks have of them.

    Rank 0 announces each block, so that the others know whether there is one more to take part in.
    """

    def __init__(self, storages: Sequence[Tensor], blocks: int, block_bytes: int, group: Any) -> None:
        super().__init__(storages, blocks, block_bytes)
        self.group = group
        self.part = torch.empty(-(-block_bytes // 4), dtype=torch.int32, device=storages[0].device)

    @staticmethod
    def announce(more: bool, group: Any, device: torch.device) -> None:
        word = torch.tensor([int(more)], dtype=torch.int32, device=device)
        torch.distributed.broadcast(word, group_src=0, group=group)

    @staticmethod
    def announced(group: Any, device: torch.device) -> bool:
        word = torch.empty(1, dtype=torch.int32, device=device)
        torch.distributed.broadcast(word, group_src=0, group=group)
        return bool(word.item())

    def add_up(self, i: int, block: Block) -> Tensor:
        """The block's bytes; on rank 0 those of all ranks. (The others' are 0, so words can be added.)"""
        self.part.zero_()
        part, at = self.part.view(torch.uint8), 0
        for storage, start, size in block:
            if storage != NOWHERE:
                part[at : at + size].copy_(self.storages[storage][start : start + size], non_blocking=True)
            at += size
        torch.distributed.reduce(self.part[: -(-at // 4)], group_dst=0, group=self.group)
        return part[:at]

    def fetch(self, i: int, block: Block) -> None:
        self.announce(True, self.group, self.part.device)
        whole = self.add_up(i, block)
        self.tensors[i % len(self.tensors)][: whole.numel()].copy_(whole, non_blocking=True)
        self.events[i % len(self.events)].record()


def block_memory(storages: Sequence[Tensor], blocks: int, block_bytes: int) -> InPlace:
    """The memory through which so many blocks of at most that size go."""
    if all(storage.device.type == "cpu" for storage in storages):
        return InPlace(storages)
    return Buffers(storages, blocks, block_bytes)


def writers(
    op: str, memory: InPlace, blocks: Iterable[Block], fd: int, offset: int, path: Path
) -> Iterator[Callable[[], int]]:
    """For each block a function that writes it and returns its checksum."""

    def write(i: int, parts: list[memoryview], at: int) -> int:
        memory.wait(i)
        with reworded_oserror(f"{op}: path cannot be written", path):
            transfer(os.pwritev, fd, parts, at)
        return crc_of(parts)

    for i, block in enumerate(blocks):
        memory.fetch(i, block)
        yield functools.partial(write, i, memory.parts(i, block), offset)
        offset += block_size(block)


def readers(
    op: str, memory: InPlace, blocks: Iterable[Block], fd: int, offset: int, path: Path
) -> Iterator[Callable[[], int]]:
    """For each block a function that reads it and returns its checksum."""

    def read(i: int, parts: list[memoryview], at: int) -> int:
        memory.wait(i)  # for what was in the same memory before
        read_parts(op, fd, parts, at, path)
        return crc_of(parts)

    for i, block in enumerate(blocks):
        yield functools.partial(read, i, memory.parts(i, block), offset)
        offset += block_size(block)


def read_parts(op: str, fd: int, parts: list[memoryview], offset: int, path: Path) -> None:
    try:
        with reworded_oserror(f"{op}: path cannot be read", path):
            transfer(os.preadv, fd, parts, offset)
    except EOFError:
        raise ValueError(f"{op}: {path} was cut short while it was being read") from None
