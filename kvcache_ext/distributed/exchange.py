"""How ranks merge what each of them answers over its share of a text.

Two ways. `SymmetricExchange`: each GPU writes its answers into the memory of the others (torch's symmetric memory), in
one launch that merges as well; csrc/kernels/merge.cu says how. `GatheringExchange`: an all-gather of torch.distributed
(NCCL on GPUs, gloo on CPUs), then a merge. Both merge in the order of ranks, so that every rank gets the same bits.

With every call ranks compare their lengths and a tag (which `Fp16Cache` makes of the tokens that it is fed). That costs
nothing beside the answers. A rank that is missing, or differs, is an error within `timeout` seconds. A GPU finds it
while the host is elsewhere: it leaves a number in memory of the host, its answers are NaN from then on, and the next
call raises. After such an error the caches of the ranks no longer agree, and every further call raises.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import memory
from .._extension import extension
from ..errors import checked_int, shown

WAYS = ("auto", "symmetric", "gather")
MOST_SECONDS = 10**6  # of a timeout
_TIMED_OUT, _OTHER_CALL = 1, 2  # kMergeTimedOut, kMergeOtherCall in csrc/kernels/params.h


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer torch has the first


def agree(group: Any, device: torch.device, fine: bool) -> bool:
    """Whether all ranks say that all is fine."""
    word = torch.tensor([int(fine)], dtype=torch.int32, device=device)
    dist.all_reduce(word, dist.ReduceOp.MIN, group=group)
    return bool(word.item())


def checked_group(of: str, group: Any, exchange: Any, timeout: Any) -> None:
    """Raises RuntimeError or ValueError unless these are a process group and how its ranks exchange. `of`: whose."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{of}: call torch.distributed.init_process_group first")
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"{of}: group must be a process group of this process, got {shown(group)}")
    if not isinstance(exchange, Exchange) and (not isinstance(exchange, str) or exchange not in WAYS):
        raise ValueError(f"{of}: exchange must be one of {', '.join(WAYS)}, got {shown(exchange)}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= MOST_SECONDS:
        raise ValueError(
            f"{of}: timeout must be a positive number of seconds, at most {MOST_SECONDS:,}, got {shown(timeout)}"
        )


def check_multiples(ranks: int, **numbers: Any) -> None:
    """Raises TypeError or ValueError unless positions can be dealt out evenly."""
    for name, number in numbers.items():
        if checked_int(name, number, 1 if name == "max_positions" else 0) % ranks != 0:
            raise ValueError(
                f"ShardedKVCacheFp16: {name} must be a multiple of the group's {ranks} ranks, got {number}"
            )


def told_by_all(group: Any, device: torch.device, said: Any) -> list[Any]:
    """What each rank says, in the order of ranks."""
    everybody: list[Any] = [None] * dist.get_world_size(group)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # through which NCCL sends it
        dist.all_gather_object(everybody, said, group=group)
    return everybody


def one_host(group: Any, device: torch.device) -> bool:
    """Whether all ranks run on one machine."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = f"{socket.gethostname()} {uuid.getnode()}"
    return len(set(told_by_all(group, device, machine))) == 1


class Exchange:
    """What both ways have: how a failure is noticed, and what is said of it."""

    name = ""

    def __init__(self, group: Any, device: torch.device, timeout: float) -> None:
        self.group = group
        self.device = device
        self.timeout = timeout
        self.ranks = dist.get_world_size(group)
        # What the device has found: by merging, and by comparing calls that read.
        self.failure = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        with torch.inference_mode(False):  # they are to be written outside of it, too
            self.tag = torch.zeros(1, dtype=torch.int64, device=device)
            self._differed = torch.zeros(1, dtype=torch.int32, device=device)
        self._caches = 0
        self._broken = ""

    def enter(self) -> int:
        """A number for a cache whose answers are exchanged here. Ranks make their caches in the same order."""
        self._caches += 1
        return self._caches

    def merge(
        self,
        native: Any,
        layer: int,
        answers: Tensor,
        lses: Tensor,
        out: Tensor,
        lse: Tensor | None,
        sequences: Any,
        call: int = 0,
    ) -> None:
        """Merges this rank's answers of one call with the others' into `out`, and their LSEs into `lse`.

        `call`: a number of `number_of_call`, which must be the same on all ranks.
        """
        raise NotImplementedError

    def compare(self, call: int, layer: int, shape: Sequence[int], state: Tensor) -> None:
        """Compares a call that reads, and the lengths that it goes by, ahead of a collective call of that size.

        On a CPU a difference raises. A GPU tells the host of it later; nothing waits.
        """
        if self.device.type == "cpu":
            self._compare_on_host(call, layer, shape, state)
            return
        mine = torch.cat([torch.full((1,), call, dtype=torch.int64, device=self.device), state.reshape(-1)])
        most = torch.stack([mine, -mine])
        self.run(lambda: dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group, async_op=True))
        self._differed.copy_(torch.maximum(self._differed, (most[0] != -most[1]).any().int().view(1)))
        self.failure[1:].copy_(self._differed, non_blocking=True)

    def _compare_on_host(self, call: int, layer: int, shape: Sequence[int], state: Tensor) -> None:
        """Ahead of collective calls on CPUs: gloo ends the process where ranks make calls of different sizes."""
        numbers = [call, zlib.crc32(repr(state.tolist()).encode()), layer, len(shape), *shape]
        mine = torch.tensor(numbers + [0] * (9 - len(numbers)), dtype=torch.int64, device="cpu")
        calls = torch.empty(self.ranks * 9, dtype=torch.int64, device="cpu")
        self.run(lambda: _all_gather(calls, mine, group=self.group, async_op=True))
        for rank, theirs in enumerate(calls.view(self.ranks, 9).tolist()):
            if theirs[2:] != mine.tolist()[2:]:
                self.fail(
                    f"rank {rank} is at layer {theirs[2]} with a call of shape {theirs[4 : 4 + theirs[3]]}, and rank "
                    f"{self.rank} at layer {layer} with {list(shape)}"
                )
            if theirs[0] != call:
                self.fail(f"rank {rank} made another call, or gave other arguments, than rank {self.rank}")
            if theirs[1] != numbers[1]:
                self.fail(f"rank {rank} holds other lengths than rank {self.rank}")

    def check(self) -> None:
        """Raises RuntimeError if the ranks have fallen apart, as far as the host has been told."""
        if not self._broken:
            failure, differed = self.failure.tolist()
            if failure == 0 and differed == 0:
                return
            kind, rank = failure & 0xFF, failure >> 8
            if failure == 0:
                self._broken = "ranks hold other lengths, or made other calls"
            elif kind == _TIMED_OUT:
                self._broken = (
                    f"rank {rank} did not answer within {self.timeout:g} s: it has ended, is stuck, or made fewer calls"
                )
            else:
                self._broken = (
                    f"rank {rank} holds other lengths, was fed other tokens, or made another call than rank {self.rank}"
                )
        raise RuntimeError(
            f"ShardedKVCacheFp16: {self._broken}. What was answered or read since then is wrong; end the process "
            "group, make another, and make the caches anew on all ranks"
        )

    def fail(self, words: str) -> None:
        """From now on `check` raises."""
        self._broken = words
        self.check()

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def run(self, begin: Callable[[], Any]) -> None:
        """Runs a collective call, which `begin` starts (`async_op=True`). A CPU waits, at most `timeout` seconds. On a
        GPU the stream waits, not the host."""
        try:
            work = begin()
            if self.device.type == "cpu":
                work.wait(timedelta(seconds=self.timeout))
            else:
                work.wait()
        except RuntimeError as error:  # DistBackendError and DistNetworkError among them
            reason = str(error).strip().partition("\n")[0]
            self._broken = f"the ranks could not exchange their answers within {self.timeout:g} s ({reason})"
            try:
                self.check()
            except RuntimeError as found:
                raise found from error

    def synchronize(self) -> None:
        """Waits for the current stream, at most `timeout` seconds, and checks."""
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            began = time.monotonic()
            while not done.query():
                self.check()
                if time.monotonic() - began > self.timeout:
                    self.fail(f"the GPU of rank {self.rank} did not end its work within {self.timeout:g} s")
                time.sleep(1e-4)
        self.check()


class SymmetricExchange(Exchange):
    """Through symmetric memory: GPUs of one host that reach each other's memory."""

    name = "symmetric"

    def __init__(self, group: Any, device: torch.device, timeout: float) -> None:
        import torch.distributed._symmetric_memory as symmetric

        super().__init__(group, device, timeout)
        lines = memory.EXCHANGE_BYTES // (2 * self.ranks * 16)
        with torch.cuda.device(device), torch.inference_mode(False):
            self.inbox = symmetric.empty(2 * self.ranks * lines * 4, dtype=torch.int32, device=device)
            self.handle = symmetric.rendezvous(self.inbox, group)
            self.inbox.zero_()
            self.control = torch.zeros(3, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        buffers = [
            self.handle.get_buffer(rank, self.inbox.shape, self.inbox.dtype).data_ptr() for rank in range(self.ranks)
        ]
        if buffers[self.rank] != self.inbox.data_ptr():
            raise RuntimeError("torch's symmetric memory gave another address than that of the memory itself")
        dist.barrier(group=group)  # nobody sends before all inboxes are empty
        self.memory = extension.ExchangeMemory(buffers, lines, self.control, self.failure, timeout)

    def merge(
        self,
        native: Any,
        layer: int,
        answers: Tensor,
        lses: Tensor,
        out: Tensor,
        lse: Tensor | None,
        sequences: Any,
        call: int = 0,
    ) -> None:
        native.merge_exchanged(layer, answers, lses, out, lse, self.tag, call, sequences, self.memory)


class GatheringExchange(Exchange):
    """Through an all-gather of torch.distributed."""

    name = "gather"

    def merge(
        self,
        native: Any,
        layer: int,
        answers: Tensor,
        lses: Tensor,
        out: Tensor,
        lse: Tensor | None,
        sequences: Any,
        call: int = 0,
    ) -> None:
        state = native.lengths_of_layer(layer)  # int64 [2, B]
        behind = -(-(answers.numel() + lses.numel()) // 2) * 2
        part = torch.empty(behind + 2 * state.numel() + 2, dtype=torch.float32, device=self.device)
        part[: answers.numel()] = answers.view(-1)
        part[answers.numel() : answers.numel() + lses.numel()] = lses.view(-1)
        tag = self.tag + call
        numbers = part[behind:].view(torch.int64)
        numbers[:-1].view(state.shape).copy_(state)
        numbers[-1:] = tag
        if self.device.type == "cpu":
            self._compare_on_host(call, layer, out.shape, state)
        gathered = torch.empty(self.ranks * part.numel(), dtype=torch.float32, device=self.device)
        self.run(lambda: _all_gather(gathered, part, group=self.group, async_op=True))
        native.merge_gathered(layer, gathered.view(self.ranks, -1), out, lse, tag, sequences, self.failure)
        if self.device.type == "cpu":
            self.check()


def number_of_call(*what: Any) -> int:
    """A number made of what must be the same on all ranks, of values that have the same `repr` there."""
    return zlib.crc32(repr(what).encode())


def resolved(way: str) -> str:
    """With the environment's choice in place of "auto"."""
    way = os.environ.get("KVCACHE_EXT_EXCHANGE", way) if way == "auto" else way
    if way not in WAYS:
        raise ValueError(f"ShardedKVCacheFp16: KVCACHE_EXT_EXCHANGE must be one of {', '.join(WAYS)}, got {way!r}")
    return way


def check_same_arguments(group: Any, device: torch.device, exchange: Any, **numbers: int) -> None:
    """Raises RuntimeError on all ranks unless all pass the same to the constructor. A collective call."""
    way = -1 if isinstance(exchange, Exchange) else WAYS.index(resolved(exchange))
    mine = torch.tensor([*numbers.values(), way], dtype=torch.int64, device=device)
    most = torch.stack([mine, -mine])
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    if not torch.equal(most[0], -most[1]):
        passed = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise RuntimeError(
            f"ShardedKVCacheFp16: all ranks must pass the same arguments, and rank {dist.get_rank(group)} passed "
            f"{passed}, exchange={'that of another cache' if way < 0 else WAYS[way]}"
        )


def choose(way: str, group: Any, device: torch.device, timeout: float) -> Exchange:
    """The exchange that is asked for; "auto": through symmetric memory where all ranks can, else by all-gather.

    Every rank of the group calls it, and gets the same.
    """
    way = resolved(way)
    ranks = dist.get_world_size(group)
    most = 16  # Exchange::kMostRanks in csrc/kernels/params.h
    possible = device.type == "cuda" and ranks <= most and one_host(group, device)
    found: Exchange | None = None
    why = "it needs GPUs of one host" if device.type != "cuda" or ranks <= most else f"it serves {most} ranks at most"
    if way != "gather" and possible:
        try:
            found = SymmetricExchange(group, device, timeout)
        except Exception as error:  # torch has many kinds where a driver or a topology does not allow it
            why = str(error).strip().partition("\n")[0]
    if way != "gather" and agree(group, device, found is not None):
        assert found is not None
        return found
    if way == "symmetric":
        raise RuntimeError(f"ShardedKVCacheFp16: exchange='symmetric' is not possible on every rank: {why}")
    return GatheringExchange(group, device, timeout)
