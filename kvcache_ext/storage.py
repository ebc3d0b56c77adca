"""Saving a cache to a file and loading it: `StreamingKVCacheFp16.save` and `load`.

The file is in the safetensors format (https://github.com/huggingface/safetensors), so that any of its readers can open
it. Its tensors, in the order in which they lie, for `L` layers and `B` sequences:

- `seen`, `first`: int64 `[L, B]`, the state: positions ever appended, and the oldest one held that is not a sink.
- `lengths`: int64 `[L, B]`, positions held: `min(seen, sinks) + max(seen - first, 0)`.
- `overflow_counts`: int64 `[L]`.
- `keys.0`, `values.0`, `keys.1` ...: FP16 `[rows, H, D]`, what the layer's sequences hold, oldest first, one sequence
  behind the other: `keys.split(lengths[layer].tolist())` takes them apart. Nothing is padded, whatever the lengths.
- `checksums`: uint32 `[1 + blocks]`, CRC-32 of everything before `keys.0`, the header included, and of each block of
  `block_bytes` of all that lies between `overflow_counts` and `checksums` (the last block may be shorter).

`__metadata__` has "format": "kvcache_ext", "version", "writer", and of the cache num_layers, batch_size, max_positions,
num_heads, head_dim, sink_positions, overflow; and block_bytes.

Keys and values pass through as bytes, block by block. On a CPU they are written from where they lie and read to where
they belong. On a GPU blocks go through a few pinned buffers: while one is copied between GPU and host, others are being
written or read, and checked, by threads. (One thread computes 1 to 3 GB/s of CRC-32, several keep up with a disk.)
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import json
import operator
import os
import secrets
import stat
import struct
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import StreamingKVCacheFp16

FORMAT = "kvcache_ext"
VERSION = 1
BLOCK_BYTES = 8 * 2**20
SYNC_BLOCKS = 8  # a sync begins after so many
_USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = max(2, min(8, _USABLE))  # that write or read, and compute checksums
BUFFERS = THREADS + 2  # blocks under way
LARGEST_BLOCK_BYTES = 64 * 2**20  # BUFFERS of them stay below 1 GB
LARGEST_HEADER = 100_000_000  # what safetensors itself reads
LARGEST_POSITION = 2**62
PARTS_A_CALL = 512  # of pwritev and preadv; Linux takes 1,024

Progress = Callable[[int, int], object]
Piece = tuple[int, int, int]  # 0 keys, 1 values, NOWHERE; first byte in that storage; bytes
Block = list[Piece]
NOWHERE = -1
T = TypeVar("T")


# What a file holds


@dataclass(frozen=True)
class _Contents:
    """All that the header depends on."""

    num_layers: int
    batch_size: int
    max_positions: int
    num_heads: int
    head_dim: int
    sink_positions: int
    overflow: str
    block_bytes: int
    rows: tuple[int, ...]  # positions held in each layer, all sequences together

    @property
    def row_bytes(self) -> int:
        return self.num_heads * self.head_dim * 2

    @property
    def data_bytes(self) -> int:
        """Keys and values."""
        return 2 * sum(self.rows) * self.row_bytes

    @property
    def blocks(self) -> int:
        return -(-self.data_bytes // self.block_bytes)

    @property
    def state_bytes(self) -> int:
        """What lies between the header and keys.0."""
        return (3 * self.num_layers * self.batch_size + self.num_layers) * 8

    @property
    def checksum_bytes(self) -> int:
        return 4 * (1 + self.blocks)

    def entries(self) -> dict[str, Any]:
        """The header, without its metadata."""
        entries: dict[str, Any] = {}
        offset = 0

        def add(name: str, dtype: str, shape: list[int], size: int) -> None:
            nonlocal offset
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size

        of_sequences = self.num_layers * self.batch_size * 8
        for name in ("seen", "first", "lengths"):
            add(name, "I64", [self.num_layers, self.batch_size], of_sequences)
        add("overflow_counts", "I64", [self.num_layers], self.num_layers * 8)
        for layer, rows in enumerate(self.rows):
            for name in ("keys", "values"):
                shape = [rows, self.num_heads, self.head_dim]
                add(f"{name}.{layer}", "F16", shape, rows * self.row_bytes)
        add("checksums", "U32", [1 + self.blocks], self.checksum_bytes)
        return entries

    def header(self) -> bytes:
        """With the eight bytes before it that tell its length."""
        from . import __version__

        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "writer": f"kvcache_ext {__version__}",
            **{name: str(getattr(self, name)) for name in (*_NUMBERS, "overflow")},
        }
        text = json.dumps({"__metadata__": metadata, **self.entries()}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        return struct.pack("<Q", len(text)) + text


# In the metadata, with the least that each may be.
_NUMBERS = {
    "num_layers": 1,
    "batch_size": 1,
    "max_positions": 1,
    "num_heads": 1,
    "head_dim": 1,
    "sink_positions": 0,
    "block_bytes": 1,
}


def _held(seen: int, first: int, sinks: int) -> int:
    return min(seen, sinks) + max(seen - first, 0)


def _runs(seen: int, first: int, slots: int, sinks: int) -> Iterator[tuple[int, int]]:
    """The held positions in order, as runs of slots: the first slot and their number."""
    if seen > 0 and sinks > 0:
        yield 0, min(seen, sinks)
    in_ring = max(seen - first, 0)
    start = (first - sinks) % (slots - sinks)
    before_end = min(in_ring, slots - sinks - start)
    if before_end > 0:
        yield sinks + start, before_end
    if in_ring > before_end:
        yield sinks, in_ring - before_end


def _pieces(
    cache: StreamingKVCacheFp16, seen: Sequence[Sequence[int]], first: Sequence[Sequence[int]], lost: Any = None
) -> Iterator[Piece]:
    """Where the bytes of the file's keys and values lie in the cache's storage, one after the other.

    `seen`, `first`: the cache's state. `lost[layer][sequence]`: how many positions of the file, those behind the sinks,
    the cache has no room for.
    """
    row = cache.num_heads * cache.head_dim * 2
    slots, sinks = cache.max_positions, cache.sink_positions
    for layer in range(cache.num_layers):
        for which in (0, 1):
            for b in range(cache.batch_size):
                base = (layer * cache.batch_size + b) * slots
                skipped = 0 if lost is None else lost[layer][b]
                for slot, count in _runs(seen[layer][b], first[layer][b], slots, sinks):
                    if skipped and slot >= sinks:
                        yield NOWHERE, 0, skipped * row
                        skipped = 0
                    yield which, (base + slot) * row, count * row


def _size(block: Block) -> int:
    return sum(size for _, _, size in block)


def _cut(pieces: Iterable[Piece], block_bytes: int) -> Iterator[Block]:
    block: Block = []
    room = block_bytes
    for which, start, size in pieces:
        while size > 0:
            part = min(size, room)
            block.append((which, start, part))
            start, size, room = start + part, size - part, room - part
            if room == 0:
                yield block
                block, room = [], block_bytes
    if block:
        yield block


# Bytes, files, threads


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without NumPy. It and all slices of it keep the tensor alive."""
    array: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor
    return memoryview(array).cast("B")


def _flat_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).view(-1)


def _crc(parts: Iterable[memoryview], crc: int = 0) -> int:
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _transfer(call: Callable[[int, list[memoryview], int], int], fd: int, parts: list[memoryview], offset: int) -> None:
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
def _saying(words: str, path: Path) -> Iterator[None]:
    """An OSError within is raised again as one sentence, of the same kind."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"{words}: {reason}", str(path)) from error


def _in_turn(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What tasks return, in order. At most BUFFERS are under way; the next one is made after a result was taken."""
    pending: deque[Future[T]] = deque()
    for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) == BUFFERS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _InPlace:
    """Blocks on their way between a CPU's cache and a file: as they lie."""

    def __init__(self, cache: StreamingKVCacheFp16) -> None:
        self.storage = (_flat_bytes(cache.k_cache), _flat_bytes(cache.v_cache))
        self.views = [_memory(tensor) for tensor in self.storage]

    def parts(self, i: int, block: Block) -> list[memoryview]:
        """The memory that block number `i` is written from or read into."""
        return [
            memoryview(bytearray(size)) if which == NOWHERE else self.views[which][start : start + size]
            for which, start, size in block
        ]

    def fetch(self, i: int, block: Block) -> None:
        """Begins to bring it from the cache to that memory."""

    def store(self, i: int, block: Block) -> None:
        """Begins to bring it from that memory to the cache."""

    def wait(self, i: int) -> None:
        """Until what was begun for the block, or for an earlier one in the same memory, is done. From any thread."""

    def finish(self) -> None:
        """Waits for all."""


class _Buffers(_InPlace):
    """Between a GPU's cache and a file: through pinned buffers in turn, each with an event for the copies it is in."""

    def __init__(self, cache: StreamingKVCacheFp16, contents: _Contents) -> None:
        self.storage = (_flat_bytes(cache.k_cache), _flat_bytes(cache.v_cache))
        count, size = min(BUFFERS, contents.blocks), min(contents.block_bytes, contents.data_bytes)
        pinned = cache.device.type == "cuda"  # always, but in tests
        self.tensors = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(count)]
        self.views = [_memory(tensor) for tensor in self.tensors]
        self.events = self.make_events(count)

    def make_events(self, count: int) -> list[Any]:
        return [torch.cuda.Event(blocking=True) for _ in range(count)]

    def parts(self, i: int, block: Block) -> list[memoryview]:
        return [self.views[i % len(self.views)][: _size(block)]]

    def pairs(self, i: int, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """What belongs together in the cache and in the buffer."""
        buffer, at = self.tensors[i % len(self.tensors)], 0
        for which, start, size in block:
            if which != NOWHERE:
                yield self.storage[which][start : start + size], buffer[at : at + size]
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


def _way(cache: StreamingKVCacheFp16, contents: _Contents) -> _InPlace:
    return _Buffers(cache, contents) if cache.device.type == "cuda" else _InPlace(cache)


def _on_device(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_capture(op: str) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: a file cannot be part of a CUDA graph, and the current stream is being captured")


def _checked_path(op: str, path: Any) -> Path:
    try:
        name = os.fspath(path)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise TypeError(f"{op}: path must be a str or an os.PathLike of one, got {type(path).__name__}")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        encoded = b""
    if encoded == b"" or b"\0" in encoded or os.path.basename(name) in ("", ".", ".."):
        raise ValueError(f"{op}: path must be a file's name, got {name!r}")
    return Path(os.path.realpath(name))  # what a link points to is written and read, the link stays


@contextmanager
def _reporting(op: str, path: Path, progress: Any, total: int) -> Iterator[Callable[[int], object]]:
    """A function that takes the number of bytes done so far."""
    if callable(progress):
        yield lambda done: progress(done, total)
        return
    if not progress:
        yield lambda done: None
        return
    try:
        bars: Any = importlib.import_module("tqdm")
    except ImportError:
        shown = -1

        def line(done: int) -> None:
            nonlocal shown
            percent = 100 if total == 0 else done * 100 // total
            if percent // 10 > shown:
                shown = percent // 10
                print(f"{op} {path.name}: {percent}% of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

        yield line
        return
    with bars.tqdm(total=total, desc=f"{op} {path.name}", unit="B", unit_scale=True) as bar:
        yield lambda done: bar.update(done - bar.n)


def _check_progress(op: str, progress: Any) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"{op}: progress must be True, False, None or a function of two ints, got {type(progress).__name__}"
        )


# Saving


def save(cache: StreamingKVCacheFp16, path: Any, progress: bool | Progress | None) -> None:
    """See `StreamingKVCacheFp16.save`."""
    target = _checked_path("save", path)
    _check_progress("save", progress)
    cache._compiled.check_in_place("save")
    with _on_device(cache.device):
        _refuse_capture("save")
    mode = stat.S_IFREG
    with suppress(FileNotFoundError), _saying("save: path cannot be looked at", target):
        mode = target.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "save: path must name a file, not a folder", str(target))
    if not stat.S_ISREG(mode):
        raise ValueError(f"save: path must name a regular file or a new one, {target} is neither")

    state = cache._state[:2].cpu()  # waits for all that the current stream has to do
    counts = cache._overflow_counts.cpu()
    seen, first = state.tolist()
    sinks = cache.sink_positions
    lengths = [
        [_held(s, f, sinks) for s, f in zip(*of_layer, strict=True)] for of_layer in zip(seen, first, strict=True)
    ]
    contents = _Contents(
        cache.num_layers,
        cache.batch_size,
        cache.max_positions,
        cache.num_heads,
        cache.head_dim,
        sinks,
        cache.overflow,
        BLOCK_BYTES,
        tuple(sum(of_layer) for of_layer in lengths),
    )
    head = contents.header()
    for tensor in (state, torch.tensor(lengths, dtype=torch.int64, device="cpu"), counts):
        head += bytes(_memory(tensor.contiguous()))

    with _replacing(target, len(head) + contents.data_bytes + contents.checksum_bytes) as fd:
        with _saying("save: path cannot be written", target):
            _transfer(os.pwritev, fd, [memoryview(head)], 0)
        checksums = [zlib.crc32(head)]
        with (
            _on_device(cache.device),
            ThreadPoolExecutor(THREADS + 1) as pool,
            _reporting("save", target, progress, contents.data_bytes) as report,
        ):
            report(0)
            syncing: Future[None] | None = None
            blocks = _cut(_pieces(cache, seen, first), BLOCK_BYTES)
            for crc in _in_turn(pool, _writers(cache, contents, blocks, fd, len(head), target)):
                checksums.append(crc)
                # The disk is to begin now: left to itself, the system lets some gigabytes pile up first.
                if len(checksums) % SYNC_BLOCKS == 0 and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()  # an error is told once, and to whoever asks first
                    syncing = pool.submit(_sync, fd, target)
                report(min((len(checksums) - 1) * BLOCK_BYTES, contents.data_bytes))
            if syncing is not None:
                syncing.result()
        # The end of the file comes last: one that was left unfinished is too short.
        tail = struct.pack(f"<{len(checksums)}I", *checksums)
        with _saying("save: path cannot be written", target):
            _transfer(os.pwritev, fd, [memoryview(tail)], len(head) + contents.data_bytes)


def _sync(fd: int, path: Path) -> None:
    with _saying("save: path cannot be written", path):
        os.fdatasync(fd)


def _writers(
    cache: StreamingKVCacheFp16, contents: _Contents, blocks: Iterable[Block], fd: int, offset: int, path: Path
) -> Iterator[Callable[[], int]]:
    """For each block a function that writes it and returns its checksum."""
    way = _way(cache, contents)

    def write(i: int, parts: list[memoryview], at: int) -> int:
        way.wait(i)
        with _saying("save: path cannot be written", path):
            _transfer(os.pwritev, fd, parts, at)
        return _crc(parts)

    for i, block in enumerate(blocks):
        way.fetch(i, block)
        yield functools.partial(write, i, way.parts(i, block), offset)
        offset += _size(block)


@contextmanager
def _replacing(target: Path, size: int) -> Iterator[int]:
    """A new file to write to, which becomes `target` at the end, or is removed where there is an error."""
    folder = target.parent
    temporary = folder / f".{target.name[:40]}.{secrets.token_hex(4)}.tmp"
    with _saying("save: path cannot be written", target):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            with suppress(OSError):  # as the one that it replaces
                os.fchmod(fd, stat.S_IMODE(target.stat().st_mode))
            room = os.fstatvfs(fd)
            free = room.f_bavail * room.f_frsize
            if size > free and room.f_blocks > 0:
                raise OSError(
                    errno.ENOSPC,
                    f"save: path needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk",
                    str(target),
                )
            yield fd
            with _saying("save: path cannot be written", target):
                os.fsync(fd)
        finally:
            os.close(fd)
        with _saying("save: path cannot be written", target):
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(PermissionError), _saying("save: path is written, but its folder cannot be synced", target):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # may be for writing only
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # on file systems that have no such thing
                raise
        finally:
            os.close(descriptor)


# Loading


def load(
    cls: type[StreamingKVCacheFp16],
    path: Any,
    device: torch.device | str | int,
    max_positions: int | None,
    progress: bool | Progress | None,
) -> StreamingKVCacheFp16:
    """See `StreamingKVCacheFp16.load`."""
    source = _checked_path("load", path)
    _check_progress("load", progress)
    _refuse_capture("load")
    slots = None if max_positions is None else _checked_slots(max_positions)
    with _saying("load: path cannot be read", source):
        # O_NONBLOCK: a pipe would make it wait, and is refused below.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _load(cls, fd, source, device, slots, progress)
    finally:
        os.close(fd)


def _checked_slots(value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except Exception as error:  # what __index__ raises, too: a tensor of floats has one
        raise TypeError(f"load: max_positions must be an int or None, got {type(value).__name__}") from error


def _load(
    cls: type[StreamingKVCacheFp16],
    fd: int,
    source: Path,
    device: torch.device | str | int,
    max_positions: int | None,
    progress: bool | Progress | None,
) -> StreamingKVCacheFp16:
    found = _read_contents(fd, source)
    contents = found.contents
    slots = contents.max_positions if max_positions is None else max_positions
    if slots <= contents.sink_positions:
        raise ValueError(
            f"load: max_positions must be more than the {contents.sink_positions} sink positions of {source}, "
            f"got {slots}"
        )
    ring = slots - contents.sink_positions
    # As appending its positions to a ring of that size would leave it: the newest are held, and the sinks.
    first = [
        [max(f, s - ring) for s, f in zip(*pair, strict=True)] for pair in zip(found.seen, found.first, strict=True)
    ]
    lost = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(first, found.first, strict=True)]

    cache = cls(
        contents.num_layers,
        slots,
        contents.num_heads,
        contents.head_dim,
        batch_size=contents.batch_size,
        device=device,
        sink_positions=contents.sink_positions,
        overflow=contents.overflow,
    )
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _on_device(cache.device),
        ThreadPoolExecutor(THREADS) as pool,
        _reporting("load", source, progress, contents.data_bytes) as report,
    ):
        report(0)
        blocks = list(_cut(_pieces(cache, found.seen, first, lost), contents.block_bytes))
        way = _way(cache, contents)
        for i, crc in enumerate(_in_turn(pool, _readers(way, blocks, fd, found.data_start, source))):
            if crc != found.checksums[1 + i]:
                start = found.data_start + i * contents.block_bytes
                end = start + _size(blocks[i]) - 1
                raise ValueError(
                    f"load: {source} is damaged: its bytes {start:,} to {end:,} are not those that were saved"
                )
            way.store(i, blocks[i])
            report(min((i + 1) * contents.block_bytes, contents.data_bytes))
        cache._state[:2].copy_(torch.tensor([found.seen, first], dtype=torch.int64, device="cpu"))
        cache._overflow_counts.copy_(torch.tensor(found.overflow_counts, dtype=torch.int64, device="cpu"))
        way.finish()
    cache._connect()  # lengths on the host begin anew
    return cache


def _readers(way: _InPlace, blocks: Iterable[Block], fd: int, offset: int, source: Path) -> Iterator[Callable[[], int]]:
    """For each block a function that reads it and returns its checksum."""

    def read(i: int, parts: list[memoryview], at: int) -> int:
        way.wait(i)  # for what was in the same memory before
        _read(fd, parts, at, source)
        return _crc(parts)

    for i, block in enumerate(blocks):
        yield functools.partial(read, i, way.parts(i, block), offset)
        offset += _size(block)


def _read(fd: int, parts: list[memoryview], offset: int, source: Path) -> None:
    try:
        with _saying("load: path cannot be read", source):
            _transfer(os.preadv, fd, parts, offset)
    except EOFError:
        raise ValueError(f"load: {source} was cut short while it was being read") from None


@dataclass(frozen=True)
class _Found:
    """A file's small parts, read and checked."""

    contents: _Contents
    seen: list[list[int]]
    first: list[list[int]]
    overflow_counts: list[int]
    checksums: tuple[int, ...]
    data_start: int


def _read_contents(fd: int, source: Path) -> _Found:
    """Everything but keys and values. Raises ValueError where the file is not one to be loaded."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "load: path must name a file, not a folder", str(source))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"load: path must name a regular file, {source} is none")
    size = status.st_size

    def part(offset: int, length: int) -> bytes:
        read = bytearray(length)
        if length:
            _read(fd, [memoryview(read)], offset, source)
        return bytes(read)

    foreign = f"load: {source} is not a file of StreamingKVCacheFp16.save"
    if size < 8:
        raise ValueError(f"{foreign}: it has {size} bytes")
    prefix = part(0, 8)
    length = struct.unpack("<Q", prefix)[0]
    if not 2 <= length <= LARGEST_HEADER:
        raise ValueError(f"{foreign}, nor of any other safetensors writer: its header would have {length:,} bytes")
    if 8 + length > size:
        raise ValueError(
            f"load: {source} is truncated, or not a safetensors file: its header would end at byte {8 + length:,} "
            f"of {size:,}"
        )
    text = part(8, length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{foreign}, or its header is damaged: it is not JSON") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{foreign}: its metadata does not say format {FORMAT!r}")
    contents = _contents_of(header, metadata, source)

    expected = 8 + length + contents.state_bytes + contents.data_bytes + contents.checksum_bytes
    if size != expected:
        what = "is truncated" if size < expected else "has something behind its end"
        raise ValueError(f"load: {source} {what}: it has {size:,} bytes, and its header describes {expected:,}")
    state = part(8 + length, contents.state_bytes)
    count = 1 + contents.blocks
    checksums = struct.unpack(f"<{count}I", part(size - contents.checksum_bytes, contents.checksum_bytes))
    if _crc([memoryview(prefix), memoryview(text), memoryview(state)]) != checksums[0]:
        raise ValueError(f"load: {source} is damaged: its header or its lengths are not those that were saved")

    numbers = list(struct.unpack(f"<{len(state) // 8}q", state))
    pairs = contents.num_layers * contents.batch_size

    def matrix(i: int) -> list[list[int]]:
        flat = numbers[i * pairs : (i + 1) * pairs]
        return [flat[j : j + contents.batch_size] for j in range(0, pairs, contents.batch_size)]

    found = _Found(contents, matrix(0), matrix(1), numbers[3 * pairs :], checksums, 8 + length + len(state))
    _check_lengths(found, matrix(2), source)
    return found


def _short(text: str) -> str:
    """What a file says is not to fill the screen."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _contents_of(header: dict[str, Any], metadata: dict[str, Any], source: Path) -> _Contents:
    """What the header describes, every entry of it checked."""
    damaged = f"load: {source} is damaged: its header"

    def number(name: str, least: int) -> int:
        value = metadata.get(name)
        if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 18:
            raise ValueError(f"{damaged} gives {name} as {_short(repr(value))}")
        if int(value) < least:
            raise ValueError(f"{damaged} gives {name} as {value}, and it is at least {least}")
        return int(value)

    version = number("version", 1)
    if version > VERSION:
        writer = _short(json.dumps(metadata.get("writer")).strip('"'))
        raise ValueError(
            f"load: {source} has version {version} of the format (written by {writer}), and this "
            f"kvcache_ext reads version {VERSION}; a newer kvcache_ext is needed"
        )
    numbers = {name: number(name, least) for name, least in _NUMBERS.items()}
    overflow = metadata.get("overflow")
    if overflow not in ("saturate", "inf"):
        raise ValueError(f"{damaged} gives overflow as {_short(repr(overflow))}")
    if numbers["sink_positions"] >= numbers["max_positions"]:
        raise ValueError(
            f"{damaged} gives sink_positions as {numbers['sink_positions']}, "
            f"and max_positions as {numbers['max_positions']}"
        )
    if numbers["block_bytes"] > LARGEST_BLOCK_BYTES:
        raise ValueError(f"{damaged} gives block_bytes as {numbers['block_bytes']}")
    rows = []
    for layer in range(numbers["num_layers"]):
        entry = header.get(f"keys.{layer}")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        count = shape[0] if isinstance(shape, list) and shape else None
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < LARGEST_POSITION:
            raise ValueError(f"{damaged} has no keys.{layer}, or not its shape")
        rows.append(count)
    contents = _Contents(**numbers, overflow=str(overflow), rows=tuple(rows))  # type: ignore[arg-type]
    wanted = contents.entries()
    for name, entry in wanted.items():
        if header.get(name) != entry:
            raise ValueError(
                f"{damaged} has {_short(json.dumps(header.get(name)))} as {name}, and should have {json.dumps(entry)}"
            )
    for name in header:
        if name not in wanted and name != "__metadata__":
            raise ValueError(f"{damaged} has an entry {_short(repr(name))} that no cache has")
    return contents


def _check_lengths(found: _Found, lengths: list[list[int]], source: Path) -> None:
    """Whether a cache can be in that state, and whether it fits the tensors' shapes."""
    contents = found.contents
    sinks, ring = contents.sink_positions, contents.max_positions - contents.sink_positions
    wrong = f"load: {source} is damaged: no cache has the lengths that it gives"
    for layer in range(contents.num_layers):
        for seen, first, length in zip(found.seen[layer], found.first[layer], lengths[layer], strict=True):
            possible = 0 <= seen < LARGEST_POSITION and sinks <= first < LARGEST_POSITION
            possible = possible and seen - first <= ring and (seen >= first or first == sinks)
            if not possible or length != _held(seen, first, sinks):
                raise ValueError(f"{wrong} for layer {layer}: {seen} seen, {first} the first, {length} held")
        if sum(lengths[layer]) != contents.rows[layer]:
            raise ValueError(f"{wrong} for layer {layer}: {sum(lengths[layer])} positions, {contents.rows[layer]} rows")
    for layer, count in enumerate(found.overflow_counts):
        if count < 0:
            raise ValueError(f"load: {source} is damaged: it gives {count} overflows for layer {layer}")
