"""`ShardedKVCacheFp16`: one cache over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from .. import memory
from ..cache import StreamingKVCacheFp16, may_round
from ..errors import checked_device, checked_int
from . import store
from .collect import add_up
from .exchange import Exchange, agree, check_multiples, check_same_arguments, checked_group, choose, number_of_call


class ShardedKVCacheFp16(StreamingKVCacheFp16):
    """A `StreamingKVCacheFp16` whose positions are dealt out to the ranks of a process group.

    Position `p` lies on rank `p mod W` of `W`. So each rank has a `W`-th of the memory and reads a `W`-th of the cache
    for each token. The calls are those of `StreamingKVCacheFp16`, made on every rank with the same arguments: the same
    tensors, bit for bit, on each rank's own device. Each rank stores its own positions. `attend` and `append_attend`
    exchange and merge answers once a call; all ranks get the same bits.

    Args:
        num_layers, max_positions, num_heads, head_dim, batch_size, sink_positions, overflow: as for
            `StreamingKVCacheFp16`, and of the whole cache. `max_positions` and `sink_positions` are multiples of the
            number of ranks.
        device: this rank's.
        group: a process group of torch.distributed, of which this process is a member; None: the default group. Ranks
            below are ranks in this group.
        exchange: how answers are exchanged. "symmetric": GPUs of one host write into each other's memory (torch's
            symmetric memory; at most 16 ranks). "gather": a collective of the group (NCCL between GPUs, on one host or
            several; gloo between CPUs). "auto": symmetric where every rank can, else gather; the environment variable
            KVCACHE_EXT_EXCHANGE overrides "auto". The attribute `exchange` says which it is. Or the `between_ranks` of
            another cache of this group and device: the two then share the memory that it takes, and its `timeout`.
            Caches that share it run on one stream at a time, as one cache does.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        MemoryError: the share of some rank does not fit or could not be allocated. It is raised on all ranks.
        RuntimeError: torch.distributed is not initialised, ranks were given different arguments, or `exchange` is not
            possible.
        TypeError, ValueError: an argument is wrong.

    What differs from one cache:

    - `k_cache`, `v_cache`, `memory_bytes` are this rank's share; `len`, `lengths`, `position`, `cache_seqlens`,
      `device_lengths`, `max_positions` are of the whole cache, and the same on every rank.
    - Reading rows (`gather`, `get_*`), `overflow_counts`, `save`, `load` are collective calls, as attention is: every
      rank makes them. With `local=True` `gather` and `get_*` read this rank's rows alone, the others being zeros.
    - `get_range_raw` copies.
    - A wrong argument raises on the rank that has it. The others wait for that rank in the next collective call:
      attention and reads for `timeout` seconds, the constructor, files and NCCL for the process group's own limit.
    - torch.compile is refused; CUDA graphs work. With "gather" the group's NCCL communicator is captured.
    - It cannot be copied or pickled; `save` and `load` do that.

    Errors between ranks. A rank that has ended or is stuck, holds other lengths or makes another call is found by the
    next attention call, without any cost there, and by reads and `save`. On a CPU the call raises RuntimeError. On a
    GPU attention answers NaN, and the next eager call, `check` or `synchronize` raises. After a graph's replay nothing
    raises by itself: call `check`, which does not wait, behind whatever waits for the replay. Through NCCL ("gather"
    on GPUs, reads) a rank that is missing or has other sizes is left to NCCL's watchdog, which ends the process after
    the group's own timeout; graphs have none, so wait with `synchronize` there. Tensors among the arguments, such as
    `new_lengths`, are not compared.
    """

    def __init__(
        self,
        num_layers: int,
        max_positions: int,
        num_heads: int,
        head_dim: int,
        *,
        group: Any = None,
        batch_size: int = 1,
        device: torch.device | str | int = "cuda",
        sink_positions: int = 0,
        overflow: str = "saturate",
        exchange: str | Exchange = "auto",
        timeout: float = 60.0,
    ) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        checked_group("ShardedKVCacheFp16", group, exchange, timeout)
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        check_multiples(self.ranks, max_positions=max_positions, sink_positions=sink_positions)
        of_group = checked_device(device)
        if isinstance(exchange, Exchange) and (exchange.group is not group or exchange.device != of_group):
            raise ValueError("ShardedKVCacheFp16: exchange must be of the cache's group and device")
        # A rank that cannot go on must not leave the others waiting: all learn of it.
        failed: Exception | None = None
        try:
            super().__init__(
                num_layers,
                max_positions,
                num_heads,
                head_dim,
                batch_size=batch_size,
                device=of_group,
                sink_positions=sink_positions,
                overflow=overflow,
            )
        except (MemoryError, RuntimeError) as error:
            failed = error
        check_same_arguments(
            group,
            of_group,
            exchange,
            num_layers=self.num_layers,
            max_positions=self._max_positions,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            batch_size=self.batch_size,
            sink_positions=self.sink_positions,
            saturates=int(overflow == "saturate"),
        )
        if not agree(group, of_group, failed is None):
            if failed is not None:
                raise failed
            raise MemoryError("ShardedKVCacheFp16: the share of another rank could not be allocated; nothing is kept")
        # For this package's own modules: what the ranks exchange their answers through.
        self.between_ranks = (
            exchange if isinstance(exchange, Exchange) else choose(exchange, group, of_group, float(timeout))
        )
        self._number = self.between_ranks.enter()

    # Errors between ranks

    @property
    def exchange(self) -> str:
        """How answers are exchanged: "symmetric" or "gather"."""
        return self.between_ranks.name

    def check(self) -> None:
        """Raises RuntimeError if ranks have fallen apart, as far as is known. Does not wait for the GPU."""
        self.between_ranks.check()

    def synchronize(self) -> None:
        """Waits until the current stream has done its work, at most `timeout` seconds, and checks.

        Raises:
            RuntimeError: it did not end in time, or a rank is missing or has fallen apart.
        """
        self.between_ranks.synchronize()

    def _calls(self) -> Any:
        if is_compiling():
            raise RuntimeError(
                "ShardedKVCacheFp16: torch.compile cannot trace it; leave its calls out of the compiled code "
                "(torch.compiler.disable), or capture them into a CUDA graph"
            )
        return self.native

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
        """As `StreamingKVCacheFp16.attend`, over the positions of all ranks. A collective call."""
        native = self._ready("attend", query, out)
        rounds = may_round(precision)
        self._check_flag("attend", return_lse)
        part = native.attend(layer, query, scale, window, softcap, True, self._out(out), rounds, sequences)
        call = self._call("attend", scale, window, softcap, precision, sequences, query.shape)
        return self._merged(layer, query, part, return_lse, out, sequences, call)

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
        """As `StreamingKVCacheFp16.append_attend`, over the positions of all ranks. A collective call."""
        native = self._ready("append_attend", query, out, key, value, new_lengths)
        rounds = may_round(precision)
        self._check_flag("append_attend", return_lse)
        part = native.append_attend(
            layer, query, key, value, new_lengths, scale, window, softcap, True, self._out(out), rounds, sequences
        )
        call = self._call("append_attend", scale, window, softcap, precision, sequences, query.shape)
        return self._merged(layer, query, part, return_lse, out, sequences, call)

    def _call(self, op: str, *arguments: Any) -> int:
        """A number of what must be the same on all ranks. Tensors stay on the device, and are not compared."""
        return number_of_call(op, self._number, *(None if isinstance(a, Tensor) else a for a in arguments))

    def _ready(
        self,
        op: str,
        query: Tensor,
        out: Tensor | None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        new_lengths: Tensor | None = None,
    ) -> Any:
        """What runs the call, once it is known that the answer can be written and that the ranks are there."""
        native = self._checked()
        if out is not None and self.ranks > 1:
            native.check_output(op, query, out, key, value, new_lengths)
        return native

    def _checked(self) -> Any:
        """What runs calls, once it is known that the ranks are there."""
        native = self._calls()
        self.between_ranks.check()
        return native

    def _out(self, out: Tensor | None) -> Tensor | None:
        """What this rank answers into. Of a group of one its share is all."""
        return out if self.ranks == 1 else None

    @staticmethod
    def _check_flag(op: str, return_lse: bool) -> None:
        if not isinstance(return_lse, bool):
            raise TypeError(f"{op}: return_lse must be True or False, got {type(return_lse).__name__}")

    def _merged(
        self,
        layer: int,
        query: Tensor,
        part: tuple[Tensor, Tensor],
        return_lse: bool,
        out: Tensor | None,
        sequences: Sequence[int] | Tensor | None,
        call: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        answers, lses = part
        if self.ranks == 1:
            return part if return_lse else answers
        merged = torch.empty_like(answers, dtype=query.dtype) if out is None else out
        lse = torch.empty_like(lses) if return_lse else None
        self.between_ranks.merge(self.native, layer, answers, lses, merged, lse, sequences, call)
        return merged if lse is None else (merged, lse)

    # Reading

    def _collected(self, op: str, layer: int, pair: tuple[Tensor, Tensor], local: bool) -> tuple[Tensor, Tensor]:
        if not local and self.ranks > 1:
            call = self._call(op, pair[0].dtype)
            self.between_ranks.compare(call, layer, pair[0].shape, self.native.lengths_of_layer(layer))
            add_up(pair, self.between_ranks)
        return pair

    def gather(
        self,
        layer: int,
        indices: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        out: tuple[Tensor, Tensor] | None = None,
        sequences: Sequence[int] | Tensor | None = None,
        local: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `StreamingKVCacheFp16.gather`. A collective call, unless `local`: then rows of other ranks are zeros."""
        return self._collected("gather", layer, self._checked().gather(layer, indices, dtype, out, sequences), local)

    def get_range_f32(
        self, layer: int, start: int, end: int, *, out: tuple[Tensor, Tensor] | None = None, local: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `StreamingKVCacheFp16.get_range_f32`. A collective call, unless `local`."""
        return self._collected("get_range_f32", layer, self._checked().get_range_f32(layer, start, end, out), local)

    def get_valid_f32(
        self, layer: int, *, out: tuple[Tensor, Tensor] | None = None, local: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `StreamingKVCacheFp16.get_valid_f32`. A collective call, unless `local`."""
        return self._collected("get_valid_f32", layer, self._checked().get_valid_f32(layer, out), local)

    def get_range_raw(self, layer: int, start: int, end: int, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """As `StreamingKVCacheFp16.get_range_raw`, always a copy. A collective call, unless `local`."""
        return self._collected("get_range_raw", layer, self._checked().get_range_raw(layer, start, end), local)

    def overflow_counts(self) -> Tensor:
        """As `StreamingKVCacheFp16.overflow_counts`, of all ranks. A collective call."""
        self.between_ranks.check()
        counts = super().overflow_counts()
        if self.ranks > 1:
            state = self.native.lengths_of_layer(0)
            self.between_ranks.compare(self._call("overflow_counts"), 0, counts.shape, state)
            self.between_ranks.run(lambda: dist.all_reduce(counts, group=self.group, async_op=True))
        return counts

    @staticmethod
    def plan(  # type: ignore[override]
        num_layers: int, max_positions: int, num_heads: int, head_dim: int, *, ranks: int, **options: Any
    ) -> memory.Plan:
        """As `StreamingKVCacheFp16.plan`, for one of `ranks` ranks: its share of `max_positions`, a multiple of them.

        The plan's own numbers of positions are one rank's, and the buffer of the exchange is not in it.
        """
        check_multiples(checked_int("ranks", ranks, 1), max_positions=max_positions)
        return StreamingKVCacheFp16.plan(num_layers, max_positions // ranks, num_heads, head_dim, **options)

    def memory_bytes(self) -> int:
        """Bytes of this rank's keys and values."""
        return memory.cache_bytes(
            self.num_layers, self.batch_size, self._max_positions // self.ranks, self.num_heads, self.head_dim
        )

    # Files

    def save(
        self,
        path: str | PathLike[str],
        *,
        sequences: Sequence[int] | Tensor | None = None,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> None:
        """As `StreamingKVCacheFp16.save`. A collective call; rank 0 writes one file, as of a whole cache.

        Any number of ranks can load it, and `StreamingKVCacheFp16.load` too. `path` and `progress` count on rank 0.

        Raises:
            RuntimeError: rank 0 could not write it (on the other ranks).
            TypeError, ValueError, IndexError, OSError: as `StreamingKVCacheFp16.save`, on rank 0.
        """
        self.between_ranks.check()
        store.save(self, path, sequences, progress)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | PathLike[str],
        *,
        group: Any = None,
        device: torch.device | str | int = "cuda",
        max_positions: int | None = None,
        exchange: str = "auto",
        timeout: float = 60.0,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> ShardedKVCacheFp16:
        """As `StreamingKVCacheFp16.load`, of a file of either class. A collective call: every rank reads the file.

        Args:
            path: the file, which every rank can read.
            max_positions: None: as many as the saved cache had, rounded up to a multiple of the ranks.
            group, device, exchange, timeout: as for the constructor.

        Raises:
            RuntimeError: another rank could not read it.
            ValueError, MemoryError, TypeError, OSError: as `StreamingKVCacheFp16.load`.
        """
        return store.load(cls, path, group, device, max_positions, progress, exchange=exchange, timeout=timeout)

    def load_sequences(
        self,
        path: str | PathLike[str],
        sequences: Sequence[int] | Tensor,
        *,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> None:
        """As `StreamingKVCacheFp16.load_sequences`. A collective call: every rank reads the file.

        After an error on some rank the named sequences may be loaded on others: reset them.
        """
        self.between_ranks.check()
        store.load_sequences(self, path, sequences, progress)

    # Copies would need a process group of their own.

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "ShardedKVCacheFp16: it cannot be copied or pickled, as its process group cannot; save() and load() write "
            "and read it"
        )

    def __repr__(self) -> str:
        plain = super().__repr__().removesuffix(")")
        return f"{plain}, rank={self.rank} of {self.ranks}, exchange='{self.exchange}')"
