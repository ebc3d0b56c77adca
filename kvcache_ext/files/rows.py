"""Where rows lie: from a cache's state to pieces of its storage, and those cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..tensors import CacheTensors

Matrix = Sequence[Sequence[int]]  # [layer][sequence]
Piece = tuple[int, int, int]  # the number of a storage, or NOWHERE; the first byte in it; bytes
Block = list[Piece]
NOWHERE = -1  # of bytes of a file that no cache has room for


class Cache(Protocol):
    """What files need of a `StreamingKVCacheFp16`. It cannot be imported here, as it imports this package."""

    num_layers: int
    batch_size: int
    num_heads: int
    head_dim: int
    sink_positions: int
    device: torch.device
    tensors: CacheTensors
    native: Any
    ranks: int  # of the group that positions are dealt out to
    rank: int
    group: Any

    @property
    def max_positions(self) -> int: ...

    @property
    def overflow(self) -> str: ...

    def overflow_counts(self) -> Tensor: ...


def _runs(seen: int, first: int, lost: int, slots: int, sinks: int) -> Iterator[tuple[int, int]]:
    """The positions of a file in order, as runs of slots: the first slot and their number.

    `lost`: how many positions behind the sinks the cache has no room for; their slot is NOWHERE.
    """
    if seen > 0 and sinks > 0:
        yield 0, min(seen, sinks)
    if lost > 0:
        yield NOWHERE, lost
    in_ring = max(seen - first, 0)
    start = (first - sinks) % (slots - sinks)
    before_end = min(in_ring, slots - sinks - start)
    if before_end > 0:
        yield sinks + start, before_end
    if in_ring > before_end:
        yield sinks, in_ring - before_end


def _runs_of_share(
    seen: int, first: int, lost: int, slots: int, sinks: int, ranks: int, rank: int
) -> Iterator[tuple[int, int]]:
    """The same where positions are dealt out to ranks: those of the others are NOWHERE, too.

    `slots` and `sinks` are this rank's.
    """
    for begin, end in ((0, min(seen, sinks * ranks)), (first, seen)):
        if begin == first and lost > 0:
            yield NOWHERE, lost
        position = begin
        while position < end:
            others = min((rank - position) % ranks, end - position)
            if others > 0:
                yield NOWHERE, others
                position += others
            if position < end:
                local = position // ranks
                yield (local if local < sinks else sinks + (local - sinks) % (slots - sinks)), 1
                position += 1


class Selection:
    """Layers of caches, and some of their sequences: what a file is made of, or what it is read into.

    Layer i and sequence j of the file are layer `layers[i][1]` of the cache `layers[i][0]`, and its sequence
    `sequences[j]`. The layers may belong to different caches, on different devices.
    """

    def __init__(self, layers: Sequence[tuple[Cache, int]], sequences: Sequence[int]) -> None:
        self.layers = list(layers)
        self.sequences = list(sequences)
        self.caches: list[Cache] = []
        for cache, _ in self.layers:
            if not any(cache is other for other in self.caches):
                self.caches.append(cache)

    @classmethod
    def of_cache(cls, cache: Cache, sequences: Sequence[int] | None = None) -> Selection:
        """All layers of one cache. `sequences`: None means all."""
        chosen = range(cache.batch_size) if sequences is None else sequences
        return cls([(cache, layer) for layer in range(cache.num_layers)], chosen)

    @property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys(cache.device for cache in self.caches))

    @property
    def group(self) -> Any:
        """The group that positions are dealt out to, be it of some caches alone; None: they are not."""
        return next((cache.group for cache in self.caches if cache.ranks > 1), None)

    def check_in_place(self, op: str) -> None:
        """RuntimeError where torch has moved a cache's memory."""
        for cache in self.caches:
            cache.native.check_in_place(op)

    def _of(self, cache: Cache) -> tuple[list[int], list[int]]:
        """The cache's layers: their numbers in the file, and in the cache."""
        pairs = [(i, layer) for i, (other, layer) in enumerate(self.layers) if other is cache]
        return [i for i, _ in pairs], [layer for _, layer in pairs]

    def storages(self) -> list[Tensor]:
        """Bytes: keys of the first cache, its values, keys of the second, ..."""
        return [t.view(torch.uint8).view(-1) for cache in self.caches for t in cache.tensors[:2]]

    def read_state(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """seen and first `[layer][sequence]`, overflow counts `[layer]`. Waits for the devices' current streams.

        With a `group` it is a collective call.
        """
        of_caches = [
            (cache.tensors.state[:2].cpu().tolist(), cache.overflow_counts().tolist()) for cache in self.caches
        ]
        seen, first, counts = [], [], []
        for cache, layer in self.layers:
            (all_seen, all_first), of_layers = next(
                state for other, state in zip(self.caches, of_caches, strict=True) if other is cache
            )
            seen.append([all_seen[layer][b] for b in self.sequences])
            first.append([all_first[layer][b] for b in self.sequences])
            counts.append(of_layers[layer])
        return seen, first, counts

    def write_state(self, seen: Matrix, first: Matrix) -> None:
        """Behind what the devices' current streams have to do.

        The state tensors are written by torch and stay where they are, for the sake of captured graphs. The native
        object notices by the tensor's version that its own lengths are no longer right.
        """
        for cache in self.caches:
            numbers, layers = self._of(cache)
            new = [[rows[i] for i in numbers] for rows in (seen, first)]
            chosen = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (layers, self.sequences, new)]
            of_layers, of_sequences, values = (t.to(cache.device) for t in chosen)
            cache.tensors.state[:2][:, of_layers[:, None], of_sequences] = values

    def write_overflow_counts(self, counts: Sequence[int]) -> None:
        for cache in self.caches:
            numbers, layers = self._of(cache)
            chosen = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (layers, [counts[i] for i in numbers])]
            of_layers, values = (t.to(cache.device) for t in chosen)
            cache.tensors.overflow_counts[of_layers] = values if cache.rank == 0 else torch.zeros_like(values)

    def reset(self) -> None:
        """Forgets the sequences, in all layers of the caches."""
        for cache in self.caches:
            cache.native.reset(list(self.sequences))  # also of a cache whose own `reset` refuses

    def shortened(self, seen: Matrix, first: Matrix) -> tuple[list[list[int]], list[list[int]]]:
        """The file's `first` as rings of these sizes have it, and by how many positions that is more.

        As appending the file's positions to such a ring would leave it: the newest are held, and the sinks.
        """
        new = []
        for (cache, _), all_seen, all_first in zip(self.layers, seen, first, strict=True):
            ring = cache.max_positions - cache.sink_positions
            new.append([max(f, s - ring) for s, f in zip(all_seen, all_first, strict=True)])
        lost = [[f - old for f, old in zip(*pair, strict=True)] for pair in zip(new, first, strict=True)]
        return new, lost

    def pieces(
        self, seen: Matrix, first: Matrix, lost: Matrix | None = None, *, dealt_out_alone: bool = False
    ) -> Iterator[Piece]:
        """Where the bytes of the file's keys and values lie in the storages, one after the other.

        `seen`, `first`: the state of the caches. `lost[layer][sequence]`: how many positions of the file, those that
        follow the sinks, the cache has no room for. With `dealt_out_alone` all bytes of caches that are whole on every
        rank lie nowhere.
        """
        for i, (cache, layer) in enumerate(self.layers):
            row = cache.num_heads * cache.head_dim * 2
            slots, sinks = cache.max_positions // cache.ranks, cache.sink_positions // cache.ranks
            number = next(n for n, other in enumerate(self.caches) if other is cache)
            for storage in (2 * number, 2 * number + 1):
                for j, sequence in enumerate(self.sequences):
                    base = (layer * cache.batch_size + sequence) * slots
                    state = seen[i][j], first[i][j], 0 if lost is None else lost[i][j], slots, sinks
                    of_share = cache.ranks > 1
                    nowhere = dealt_out_alone and not of_share
                    for slot, count in _runs_of_share(*state, cache.ranks, cache.rank) if of_share else _runs(*state):
                        yield (NOWHERE, 0, count * row) if nowhere or slot == NOWHERE else (
                            storage, (base + slot) * row, count * row
                        )  # fmt: skip


def block_size(block: Block) -> int:
    return sum(size for _, _, size in block)


def blocks_of(pieces: Iterable[Piece], block_bytes: int) -> Iterator[Block]:
    """Blocks of so many bytes; the last may be shorter."""
    block: Block = []
    room = block_bytes
    for storage, start, size in pieces:
        while size > 0:
            part = min(size, room)
            block.append((storage, start, part))
            start, size, room = start + part, size - part, room - part
            if room == 0:
                yield block
                block, room = [], block_bytes
    if block:
        yield block
