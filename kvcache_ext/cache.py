"""`StreamingKVCacheFp16`: the calls of the cache, and what they promise.

One class in one file, longer than others, as most of it is docstrings. What is behind it: `native` (`_C.Cache`, csrc)
does the work; while torch.compile traces, `traced.TracedCalls` takes its place, with the same methods.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import files, memory
from ._extension import extension
from .errors import checked_device, checked_int, shown
from .tensors import CacheTensors
from .traced import TracedCalls


def may_round(precision: str) -> bool:
    """Whether kernels may round queries and weights to FP16."""
    if not isinstance(precision, str) or precision not in ("fp32", "fp16"):
        raise ValueError(f"precision must be 'fp32' or 'fp16', got {shown(precision)}")
    return precision == "fp16"


class StreamingKVCacheFp16:
    """A preallocated key/value cache that stores FP16 and speaks FP32, FP16 and BF16; a ring when full.

    Args:
        num_layers: layers of the model, `L`.
        max_positions: slots for each sequence of each layer, `N`. Position `N` overwrites the oldest one held.
        num_heads: key/value heads, `H` (with grouped-query attention fewer than the query has).
        head_dim: elements of a head, `D`.
        batch_size: sequences, `B`.
        device: a CUDA device or `"cpu"`.
        sink_positions: how many first positions of each sequence are never overwritten, `0 <= sinks < N`. Their keys
            stay as they came, rotated in most models. StreamingLLM (Xiao et al., 2023) also rotates them again; that
            is left to the model.
        overflow: what becomes of a finite value that FP16 cannot hold (`|x| >= 65520`): `"saturate"` stores +-65504,
            `"inf"` stores +-inf, as `.half()` does. Either way it is counted: see `overflow_counts()`.

    Raises:
        MemoryError: the cache does not fit on the device (see `plan`), or could not be allocated. Nothing is kept.
        TypeError, ValueError: an argument is wrong.

    Shapes. `key` and `value` are `[B, T, H, D]` for `T` new positions; with `batch_size` 1 also `[T, H, D]`, `[H, D]`
    and the flat `[H * D]`. The last dimension's stride must be 1, the others may be any. So model code passes its
    `[B, H, T, D]` as `tensor.transpose(1, 2)`, without a copy. What is read back is `[B, n, H, D]`, or `[n, H, D]` with
    `batch_size` 1.

    Order. Index 0 is the oldest position held by a sequence of a layer. Indices count up in the order of appending,
    also after the ring has wrapped. Layers may be appended to in any order.

    Some of the sequences. With `sequences`, entry i of the call's tensors belongs to sequence `sequences[i]`, and
    shapes are those of a cache of that many sequences. `sequences` is one of two:

    - A list of distinct ints. It is checked, and copied to the device at each call.
    - An int64 or int32 tensor `[n]` on the cache's device. It is read there, so it costs nothing and can be captured;
      the host no longer knows exact lengths afterwards. An entry whose number is out of range is not appended, and
      answers zeros (LSE -inf). A number that occurs twice cannot be noticed without a synchronisation: what becomes of
      that sequence is undefined.

    Storage. `k_cache` and `v_cache` are FP16 `[L, B, N, H, D]`, with the slots in physical order; unwritten slots hold
    anything. Methods answer in chronological order, from written slots only.

    Conversion is IEEE round-to-nearest-even, bit for bit `tensor.to(torch.float16)`; NaN stays NaN, inf stays inf.

    GPU. Calls run on the current stream of the cache's device. A cache is used by one stream at a time.

    Synchronisation. Calls do not wait for the GPU, with one exception: `len`, `lengths`, `position`, `is_empty`,
    `get_valid_f32`, `get_range_*`, and `truncate` and `drop_newest` with an int or a list need lengths on the host.
    They wait if lengths have changed on the device alone: by a replayed graph, by `new_lengths`, or by another tensor
    of lengths or of sequences.

    Graphs. A CUDA graph can capture `append`, `append_all`, `gather`, `attend`, `append_attend`, `clear` and
    `device_lengths`, and with tensors also `truncate`, `drop_newest`, `reset`, `reorder` and `copy_sequence`. Each
    replay moves the cache on. Lists are copied from the host, which a graph cannot record: calls raise if they get one
    during capture. The cache must outlive its graphs. The same calls work under `torch.compile(fullgraph=True)`.
    """

    def __init__(
        self,
        num_layers: int,
        max_positions: int,
        num_heads: int,
        head_dim: int,
        *,
        batch_size: int = 1,
        device: torch.device | str | int = "cuda",
        sink_positions: int = 0,
        overflow: str = "saturate",
    ) -> None:
        self.num_layers = checked_int("num_layers", num_layers, 1)
        self._max_positions = checked_int("max_positions", max_positions, 1)
        self.num_heads = checked_int("num_heads", num_heads, 1)
        self.head_dim = checked_int("head_dim", head_dim, 1)
        self.batch_size = checked_int("batch_size", batch_size, 1)
        self.sink_positions = checked_int("sink_positions", sink_positions, 0)
        if self.sink_positions >= self._max_positions:
            raise ValueError(
                f"StreamingKVCacheFp16: sink_positions must be less than max_positions, {self._max_positions}, "
                f"got {self.sink_positions}"
            )
        if not isinstance(overflow, str) or overflow not in ("saturate", "inf"):
            raise ValueError(f"StreamingKVCacheFp16: overflow must be 'saturate' or 'inf', got {shown(overflow)}")
        self.device = checked_device(device)

        planned = memory.plan(
            self.num_layers,
            self._max_positions // self.ranks,
            self.num_heads,
            self.head_dim,
            self.batch_size,
            device=self.device,
        )
        memory.check_fits(planned)
        sinks = self.sink_positions // self.ranks
        self._take(CacheTensors.allocate(planned, self.device, sinks, overflow == "saturate"))
        self.native.clear()

    # Of a text that is dealt out to several ranks, this one has a share (kvcache_ext.distributed).
    ranks = 1
    rank = 0
    group: Any = None

    def _take(self, tensors: CacheTensors) -> None:
        # For this package's own modules:
        self.tensors = tensors.prepared()
        self.native = extension.Cache(*self.tensors, self.ranks, self.rank)

    def _calls(self) -> Any:
        """What the calls go to."""
        return TracedCalls(self.tensors) if is_compiling() else self.native

    @property
    def overflow(self) -> str:
        """What becomes of values that FP16 cannot hold, "saturate" or "inf": as it was made."""
        return "saturate" if self.tensors.saturate else "inf"

    @staticmethod
    def plan(
        num_layers: int,
        max_positions: int,
        num_heads: int,
        head_dim: int,
        *,
        batch_size: int = 1,
        device: torch.device | str | int | None = None,
        free_bytes: int | None = None,
        weights_bytes: int = 0,
    ) -> memory.Plan:
        """What a cache of this shape takes, and whether it fits, without allocating anything.

        Construction makes the same plan for its device and raises MemoryError when `fits` is false.

        Args:
            num_layers, max_positions, num_heads, head_dim, batch_size: as for the constructor.
            device: what the plan is for: its free memory counts, unless `free_bytes` says otherwise. None: any GPU.
            free_bytes: bytes to fit into.
            weights_bytes: bytes of the model's weights that have yet to be loaded beside the cache. (What is loaded
                already is no longer free.)

        Returns:
            A `kvcache_ext.memory.Plan`: bytes of keys and values and of what is beside them, the total, what FP32 would
            take; with a device or `free_bytes` also the largest `max_positions`, the largest `batch_size`, and whether
            it fits.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        return memory.plan(
            checked_int("num_layers", num_layers, 1),
            checked_int("max_positions", max_positions, 1),
            checked_int("num_heads", num_heads, 1),
            checked_int("head_dim", head_dim, 1),
            checked_int("batch_size", batch_size, 1),
            device=None if device is None else checked_device(device),
            free=None if free_bytes is None else checked_int("free_bytes", free_bytes, 0),
            weights_bytes=checked_int("weights_bytes", weights_bytes, 0),
        )

    @property
    def k_cache(self) -> Tensor:
        """The keys as they lie: FP16 `[L, B, N, H, D]`, slots in physical order, unwritten ones holding anything."""
        return self.tensors.k_cache

    @property
    def v_cache(self) -> Tensor:
        """The values, as `k_cache`."""
        return self.tensors.v_cache

    # Writing

    def append(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        new_lengths: Tensor | None = None,
        sequences: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Converts `T` new positions of one layer to FP16 and stores them behind what each sequence holds.

        One kernel launch on a GPU. The result is that of appending the positions one by one, also when there are more
        of them than slots.

        Args:
            layer: 0 to `num_layers - 1`.
            key, value: `[B, T, H, D]` (short forms: see the class), FP32, FP16 or BF16, on the cache's device.
            new_lengths: int64 or int32 `[B]` on the cache's device: only the *last* `new_lengths[b]` rows of sequence
                `b` are appended (the rest is left padding); clamped to 0..T.
            sequences: the sequences to append to (see the class); `B` is then their number.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong. The cache is unchanged.
        """
        calls = self._calls()
        calls.append(layer, key, value, new_lengths, sequences)

    def append_all(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        new_lengths: Tensor | None = None,
        sequences: Sequence[int] | Tensor | None = None,
    ) -> None:
        """`append` to every layer in one launch: `keys`, `values` are `[L, B, T, H, D]` (or `L` and a short form)."""
        calls = self._calls()
        calls.append_all(keys, values, new_lengths, sequences)

    def truncate(self, n: int | Sequence[int] | Tensor, *, sequences: Sequence[int] | Tensor | None = None) -> None:
        """Keeps the `n` oldest held positions of every layer and sequence, or of the chosen sequences. No data moves.

        Positions that the ring has evicted do not come back. The next position appended gets the number of the oldest
        one dropped.

        Args:
            n: an int for all, `0 <= n <= len(cache)` (or what the shortest of the chosen sequences holds); a list of
                ints, one a sequence, checked likewise; or an int64 or int32 tensor `[B]` on the cache's device. A
                tensor is read there, without a synchronisation, and each number is clamped to 0 and to what its
                sequence holds. With `sequences`, one number for each of those.
            sequences: a list of ints, or an int64 or int32 tensor `[n]` on the cache's device. With a
                tensor, lengths are not checked on the host either.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong or out of range. The cache is unchanged.

        A graph captures it with tensors, or with an int and `sequences` as a tensor. (Under torch.compile, where
        lengths are not known, an `n` beyond what is held changes nothing.)
        """
        calls = self._calls()
        calls.truncate(n, sequences)

    def drop_newest(self, n: int | Sequence[int] | Tensor, *, sequences: Sequence[int] | Tensor | None = None) -> None:
        """Takes back the newest `n` positions of every layer and sequence, or of the chosen sequences. No data moves.

        For rejected draft tokens, or a prompt that was broken off. Unlike `truncate` it needs no knowledge of how many
        are held. Layers may hold different numbers; each loses its own newest `n`.

        Args:
            n: an int for all, `0 <= n <= len(cache)` (or what the shortest of the chosen sequences holds); a list of
                ints, one a sequence, checked likewise; or an int64 or int32 tensor `[B]` on the cache's device. A
                tensor is read there, without a synchronisation, and each number is clamped to 0 and to what its
                sequence holds. With `sequences`, one number for each of those.
            sequences: a list of ints, or an int64 or int32 tensor `[n]` on the cache's device. With a
                tensor `n` is clamped on the device, whatever it is.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong or out of range. The cache is unchanged.

        A graph captures it with tensors, or with an int and `sequences` as a tensor. (Under torch.compile, where
        lengths are not known, an `n` beyond what is held takes back all of it.)
        """
        calls = self._calls()
        calls.drop_newest(n, sequences)

    def reset(self, sequences: Sequence[int] | Tensor | None = None) -> None:
        """Forgets every position of the chosen sequences (None: of all) in every layer. No data moves.

        Numbering begins at 0 again. The overflow counters, which belong to no sequence, stay; `clear()` zeroes them.

        Args:
            sequences: a list of ints, or an int64 or int32 tensor `[n]` on the cache's device, of
                which those out of range are left out. A list is copied to the device; in a graph pass a tensor.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong. The cache is unchanged.
        """
        calls = self._calls()
        calls.reset(sequences)

    def reorder(self, batch_indices: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence `batch_indices[b]` was, in every layer: beams change places. In place.

        An index may occur more than once. A sequence whose index does not occur is lost. Held rows move, each to the
        slot of the same number, and lengths with them; sequences that stay are not touched.

        Args:
            batch_indices: `B` ints as a list, or as an int64 or int32 tensor `[B]` on the cache's device. A tensor is
                read there, without a synchronisation; an index out of range leaves its sequence as it is. A list is
                copied to the device; in a graph pass a tensor.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong. The cache is unchanged.
        """
        calls = self._calls()
        calls.reorder(batch_indices)

    def copy_sequence(
        self,
        src: int | Sequence[int] | Tensor,
        dst: int | Sequence[int] | Tensor,
        *,
        source: StreamingKVCacheFp16 | None = None,
    ) -> None:
        """Sequence `dst` becomes a copy of sequence `src`, in every layer: a fork, a shared prompt. In place.

        With several of them, `dst[i]` becomes what `src[i]` was before the call. The cost is that of the rows that
        move, as with `reorder`.

        With `source`, `src` are sequences of that cache, and `dst[i]` becomes a copy of its `src[i]`: the rows held,
        with their positions. If this ring is smaller than `source`'s, it holds the sinks and the newest. If it is
        larger, evicted positions do not come back. Overflow counters stay, as they belong to no sequence; `source` is
        not changed.

        Args:
            source: another cache on the same device, with the same `num_layers`, `num_heads`, `head_dim` and
                `sink_positions`, of any `batch_size` and `max_positions`. None, or the cache itself: from its own.
            src, dst: an int, a list of ints, or an int64 or int32 tensor `[n]` (or of no dimension) on the cache's
                device, equally many of both. An int `src` also goes with a list: `copy_sequence(0, [1, 2])`. Those of
                `dst` must be distinct. In a tensor that cannot be checked without a synchronisation: a sequence that is
                named twice becomes undefined. A pair of tensors' indices that is out of range does nothing. Lists are
                copied to the device; in a graph pass tensors.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong. The cache is unchanged.
        """
        if isinstance(src, int) and isinstance(dst, (list, tuple)):
            src = [src] * len(dst)
        calls = self._calls()
        if source is None or source is self:
            calls.copy_sequence(src, dst)
            return
        self._check_source(source)
        calls.copy_from(src, dst, source.tensors if is_compiling() else source.native)

    def _check_source(self, source: Any) -> None:
        if not isinstance(source, StreamingKVCacheFp16):
            raise TypeError(f"copy_sequence: source must be a StreamingKVCacheFp16 or None, got {shown(source)}")
        if source.device != self.device:
            raise ValueError(f"copy_sequence: source must be on the cache's device {self.device}, got {source.device}")
        for name in ("num_layers", "num_heads", "head_dim", "sink_positions", "ranks", "rank"):
            wanted, got = getattr(self, name), getattr(source, name)
            if got != wanted:
                raise ValueError(f"copy_sequence: source must have the cache's {name}, {wanted}, got {got}")

    def clear(self) -> None:
        """Forgets every position and zeroes the overflow counters. No data moves."""
        calls = self._calls()
        calls.clear()

    # Reading

    def get_range_f32(
        self, layer: int, start: int, end: int, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values at chronological indices `[start, end)` of one layer, as FP32.

        Where sequences hold different numbers of positions, `end` may go up to the largest of them, and rows beyond a
        sequence's own are zero.

        Args:
            out: a pair of FP32 tensors of the answer's shape to write into, with a stride of 1 in `head_dim`.

        Returns:
            keys, values: FP32 `[B, end - start, H, D]`, or without `B` when it is 1.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong.
        """
        return self.native.get_range_f32(layer, start, end, out)

    def get_valid_f32(self, layer: int, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All that one layer holds, oldest first, as FP32: `get_range_f32` from 0 to the largest number held."""
        return self.native.get_valid_f32(layer, out)

    def get_range_raw(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values at chronological indices `[start, end)` of one layer, as the FP16 that is stored.

        Views of the storage if the range lies in consecutive slots, the same for every sequence; else copies. Until the
        ring wraps they are views, unless some sequence holds less: its missing rows are zeros. Do not write to them.

        Returns:
            keys, values: FP16 `[B, end - start, H, D]`, or without `B` when it is 1.

        Raises:
            TypeError, IndexError: an argument is wrong.
        """
        return self.native.get_range_raw(layer, start, end)

    def gather(
        self,
        layer: int,
        indices: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        out: tuple[Tensor, Tensor] | None = None,
        sequences: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values at any chronological indices of one layer, in one launch, without a length on the host.

        Args:
            indices: int64 `[n]`, the same for every sequence, or `[B, n]`, on the cache's device. An index that is
                negative or not held gives rows of zeros.
            dtype: FP32, FP16 or BF16.
            out: a pair of tensors of the answer's shape and dtype to write into, with a stride of 1 in `head_dim`.
            sequences: the sequences to read (see the class); `B` is then their number.

        Returns:
            keys, values: `[B, n, H, D]` of `dtype`, or without `B` when it is 1.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong.
        """
        calls = self._calls()
        answer: tuple[Tensor, Tensor] = calls.gather(layer, indices, dtype, out, sequences)
        return answer

    # Attention

    def attend(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
        precision: str = "fp32",
        sequences: Sequence[int] | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Softmax attention of `query` over what one layer holds, read as FP16 where it lies, computed in FP32.

        Causal, aligned to the end: query t of `T` stands `T - 1 - t` positions before the newest one, whether that is
        still held or not, and sees what is held up to there. Where nothing is seen the answer is zeros, its LSE -inf.

        Args:
            layer: 0 to `num_layers - 1`.
            query: `[B, T, Hq, D]`, `Hq` a multiple of `num_heads` (query head j reads KV head `j // (Hq / H)`); with
                `batch_size` 1 also `[T, Hq, D]`, `[Hq, D]` and `[Hq * D]`. FP32, FP16 or BF16, a stride of 1 in
                head_dim. head_dim must be a multiple of 8, at most 512.
            scale: of the scores, at most 2^86 in magnitude, so that scores of FP16 numbers stay within FP32;
                `head_dim ** -0.5` if None.
            window: a query at position p sees the positions `p - window + 1` to p, and the sinks.
            softcap: scores become `softcap * tanh(score / softcap)`.
            return_lse: also return the natural log-sum-exp of the scaled and capped scores: FP32 of the query's shape
                without head_dim.
            out: a tensor of the query's shape and dtype to write into.
            precision: "fp32" answers at FP32 accuracy, whatever the query's dtype; "fp16" lets the kernels for many
                queries round queries and weights to FP16: faster on a GPU, with an error of some 3e-4. On a CPU both
                are the same.
            sequences: the sequences to attend to (see the class); `B` is then their number.

        Returns:
            The answer, of the query's shape and dtype; with `return_lse` a pair with the LSE.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong.

        Which kernels: up to 16 queries that share a KV head (`T * Hq / H`) take those that read each key once for up
        to 16 of them (4 above head_dim 256). More of them, if `T` > 1, take those for prompts: on tensor cores
        on a GPU, and on a CPU from 10 queries on. On a GPU the only memory beside the answer is the cache's workspace
        (see `plan`), whatever `T` is. Lengths are read on the device: a call never waits, and a graph can capture it.
        """
        calls = self._calls()
        answer: Tensor | tuple[Tensor, Tensor] = calls.attend(
            layer, query, scale, window, softcap, return_lse, out, may_round(precision), sequences
        )
        return answer

    def append_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        new_lengths: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
        precision: str = "fp32",
        sequences: Sequence[int] | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`append` and `attend` in one: each new position is appended, then attended to by its query.

        For one position (`T` = 1) this is one kernel launch, and its answer is bit for bit that of `append` followed
        by `attend`. For more, each query sees the ring as it stands at its turn, so it still sees positions that later
        ones of the same call evict. The call may be longer than the ring. Queries of left padding (`new_lengths`)
        answer zeros with LSE -inf.

        Args, Returns, Raises: as `append` and `attend`; `query` has as many positions as `key` and `value`.
        """
        calls = self._calls()
        answer: Tensor | tuple[Tensor, Tensor] = calls.append_attend(
            layer,
            query,
            key,
            value,
            new_lengths,
            scale,
            window,
            softcap,
            return_lse,
            out,
            may_round(precision),
            sequences,
        )
        return answer

    # Lengths and figures

    def __len__(self) -> int:
        """The number of positions held: the smallest over layers and sequences. (An empty cache so is false.)"""
        return self.native.shortest()

    def lengths(self) -> list[int]:
        """The number of positions held by each sequence: the smallest over layers.

        Reads the device where the host does not know them, as `len` does; `device_lengths` never waits.

        Returns:
            `B` ints.

        Raises:
            RuntimeError: the current stream is being captured into a graph.
        """
        return self.native.lengths()

    def device_lengths(self) -> Tensor:
        """The number of positions held by each sequence of each layer, on the device, without a synchronisation.

        Can be captured into a graph. (`cache_seqlens` counts evicted positions as well.)

        Returns:
            A new int64 tensor `[L, B]` on the cache's device.
        """
        seqlens, firsts = self.tensors.state[0], self.tensors.state[1]
        return seqlens.clamp(max=self.sink_positions) + (seqlens - firsts).clamp(min=0)

    def is_empty(self) -> bool:
        """Whether `len(cache)` is 0."""
        return len(self) == 0

    @property
    def max_positions(self) -> int:
        """Slots for each sequence of each layer."""
        return self._max_positions

    @property
    def position(self) -> int:
        """The largest seqlen over layers and sequences: positions appended so far, evicted ones counted."""
        return self.native.position()

    @property
    def cache_seqlens(self) -> Tensor:
        """Positions appended so far to each sequence of each layer: int64 `[L, B]` on the device.

        A live view: do not write to it.

        Inside a captured graph this is where a model finds the position to rotate by.
        """
        return self.tensors.state[0]

    def overflow_counts(self) -> Tensor:
        """Finite values that FP16 could not hold, by layer, since the last `clear()`: int64 `[L]` on the device."""
        return self.tensors.overflow_counts.clone()

    def memory_bytes(self) -> int:
        """Bytes of keys and values: exactly half of what FP32 would take."""
        return memory.cache_bytes(self.num_layers, self.batch_size, self._max_positions, self.num_heads, self.head_dim)

    def memory_mb(self) -> float:
        """`memory_bytes()` in units of 10^6 bytes."""
        return self.memory_bytes() / 1e6

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_layers={self.num_layers}, max_positions={self._max_positions}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, batch_size={self.batch_size}, "
            f"device='{self.device}', sink_positions={self.sink_positions}, overflow='{self.overflow}')"
        )

    # Files

    def save(
        self,
        path: str | PathLike[str],
        *,
        sequences: Sequence[int] | Tensor | None = None,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> None:
        """Writes what is held to a file in the safetensors format, and the state with it: `load` goes on from there.

        The file holds the positions held and no others, oldest first, as the FP16 that is stored, bit for bit; with
        them the seqlens (so that `position` and `cache_seqlens` come back), the overflow counters, and
        checksums. The head of `kvcache_ext/files/__init__.py` says what is where, for other readers.

        It is written under another name in the same folder, synced, and renamed: `path` names the old file or the whole
        new one, never half of it, whatever happens. An error removes what was written so far. A process that is killed
        leaves it (`.<name>.<8 digits>.tmp`). `load` refuses such a file unless it is whole, because the process was
        killed between the last write and the renaming; it is then what `path` would have named.

        Waits for the current stream of the cache's device. Takes up to 84 MB of pinned host memory for a GPU's cache,
        for a CPU's next to none.

        Args:
            path: the file. One that is there is replaced, keeping its mode; a link is followed.
            sequences: the batch sequences to save, in that order: distinct ints as a list, or an int64 or int32 tensor
                `[n]` on any device. The file is then one of a cache with `batch_size` n: sequence i of it is sequence
                `sequences[i]` of this one. The overflow counters belong to layers, and are saved as they are. None
                means all.
            progress: True shows a bar (tqdm's, where that is installed) or lines on stderr; a function is called now
                and then with the bytes of keys and values done and all that there are. What it raises ends the save.

        Raises:
            TypeError, ValueError, IndexError: an argument is wrong.
            OSError: the file cannot be written, such as for lack of space, of which what is free is looked at first.
            RuntimeError: the current stream is being captured into a graph, or the cache's memory has been moved.
        """
        files.save(self, path, sequences, progress)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str | int = "cuda",
        max_positions: int | None = None,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> StreamingKVCacheFp16:
        """A cache with what `save` wrote to a file, from any device onto any device.

        Takes no more host memory beside the cache than `save` does.

        Args:
            path: the file.
            device: where to, as for the constructor.
            max_positions: slots of the new cache; None: as many as the saved one had. With more, positions that had
                been evicted stay so. With fewer, what is held is what a ring of that size would hold: the sinks and the
                newest. Either way positions keep their numbers. It must be more than the saved `sink_positions`.
            progress: as for `save`.

        Raises:
            ValueError: the file is none of `save`'s, has a newer format, is truncated or damaged: its structure, length
                and state are checked before anything is allocated, keys and values against checksums as they are read.
            MemoryError: the cache does not fit on the device.
            TypeError, ValueError, OSError, RuntimeError: an argument is wrong, the file cannot be read, the current
                stream is being captured into a graph.
        """
        return files.load(cls, path, device, max_positions, progress)

    def load_sequences(
        self,
        path: str | PathLike[str],
        sequences: Sequence[int] | Tensor,
        *,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> None:
        """Reads a file of `save` into chosen sequences of this cache, in every layer. In place.

        Sequence `sequences[i]` becomes what sequence i of the file was: the positions held, bit for bit, with their
        numbers. Where this cache has fewer slots, what is held is what a ring of this size would hold: the sinks and
        the newest. Other sequences and the overflow counters are untouched, and the file's overflow policy does not
        matter. Graphs that were captured from the cache go on working.

        The file is read twice: once to compare all checksums, then into the cache, on the current stream of its device.
        Waits until that is done. Takes up to 84 MB of host memory, pinned for a GPU's cache.

        Args:
            path: the file. It must have as many sequences as are named, and this cache's num_layers, num_heads,
                head_dim and sink_positions.
            sequences: distinct batch sequences: ints as a list, or an int64 or int32 tensor `[n]` on any device.
            progress: as for `save`. The bytes of both passes count.

        Raises:
            ValueError: the file is none of `save`'s, has a newer format, is truncated or damaged, or does not fit the
                cache.
            TypeError, ValueError, IndexError, OSError, RuntimeError: an argument is wrong, the file cannot be read, the
                current stream is being captured into a graph, or the cache's memory has been moved.

        The cache is unchanged after an error, with one exception: where the second pass fails (the disk fails, the
        file changes after the first pass, `progress` raises), the named sequences are empty, as after `reset`. The
        ValueError or OSError then says so.
        """
        files.load_sequences(self, path, sequences, progress)

    # Copies (copy.copy, copy.deepcopy, pickle) have tensors and lengths of their own.

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "native"}
        return {**state, "tensors": self.tensors.saved()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take(CacheTensors.restored(state["tensors"]))
        self.device = self.k_cache.device  # not what was pickled, where torch.load has a map_location

    def __copy__(self) -> StreamingKVCacheFp16:
        import copy

        return copy.deepcopy(self)


def _sent_to_a_process(cache: StreamingKVCacheFp16) -> tuple[Callable[[bytes], StreamingKVCacheFp16], tuple[bytes]]:
    """A copy, as with any pickle. Left to itself torch would move the tensors into memory that both processes share."""
    return pickle.loads, (pickle.dumps(cache),)


ForkingPickler.register(StreamingKVCacheFp16, _sent_to_a_process)
