"""An `Fp16Cache` whose positions are dealt out to the ranks of a process group: its storage, and making it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ...distributed import ShardedKVCacheFp16, store
from ...distributed.exchange import Exchange, checked_group, told_by_all
from ...files.rows import Selection
from .agreement import UNCOMPILED
from .groups import LayerGroup
from .layer_plan import LayerPlan
from .tensor_parallel import TensorParallel

T = TypeVar("T")


class ShardedLayerGroup(LayerGroup, ShardedKVCacheFp16):
    """The storage of layers of one shape with full attention: this rank's share of their positions."""

    storage = ShardedKVCacheFp16


class Sharding:
    """A process group that positions are dealt out to, and how its ranks exchange their answers."""

    def __init__(self, group: Any, exchange: Any, timeout: Any) -> None:
        checked_group("Fp16Cache", group, exchange, timeout)
        self.group = group
        self.ranks = torch.distributed.get_world_size(group)
        self.exchange: str | Exchange = exchange  # the caches have one Exchange in common: that of the first
        self.timeout = timeout
        self.described = ""  # what all ranks must have in common

    def rounded(self, max_positions: Any) -> Any:
        """The next multiple of the ranks. What is no number of positions stays as it is, for others to refuse."""
        return -(-max_positions // self.ranks) * self.ranks if type(max_positions) is int else max_positions

    def check(self, model: Any, plans: Sequence[LayerPlan], compileable: bool) -> None:
        """Raises NotImplementedError where positions of this model cannot be dealt out."""
        name = type(model).__name__
        parallel = TensorParallel.of(model).ranks > 1
        devices = {plan.device for plan in plans if plan.present}
        dealt_out = any(self.deals_out(plan) for plan in plans)
        refused = [
            what
            for what, wrong in (
                ("is sharded by tensor parallelism, too: leave group= out, as each rank has its own heads", parallel),
                (
                    "is a stage of a pipeline: load the whole model on every rank",
                    not all(plan.present for plan in plans),
                ),
                ("is spread over several devices: load it on one device of each rank", len(devices) > 1),
                ("has a sliding window in every layer, and such layers stay whole on every rank", not dealt_out),
            )
            if wrong
        ]
        if refused:
            raise NotImplementedError(f"Fp16Cache: positions cannot be dealt out to a group, as {name} {refused[0]}")
        if compileable:
            raise NotImplementedError(f"Fp16Cache: {UNCOMPILED} (compileable=True); decode with cuda_graphs() instead")

    def describe(self, model: Any, plans: Sequence[LayerPlan], *options: Any) -> None:
        """Notes what all ranks must have in common. `together` compares it."""
        shapes = [dataclasses.replace(plan, device=torch.device("meta")) for plan in plans]
        told = [option.name if isinstance(option, Exchange) else option for option in options]
        self.described = repr((type(model).__name__, model.dtype, shapes, told))

    @staticmethod
    def deals_out(plan: LayerPlan) -> bool:
        """Whether the positions of such a layer are dealt out. Rings of sliding windows stay whole on every rank."""
        return plan.attends and plan.window is None

    def together(self, device: torch.device, make: Callable[[], T]) -> T:
        """What `make` returns, if it raises on no rank and all ranks have described the same. A collective call."""
        failed: Exception | None = None
        try:
            made = make()
        except Exception as error:  # the others wait for this rank, whatever it is
            failed = error
        told = told_by_all(self.group, device, (self.described, None if failed is None else str(failed)))
        if failed is not None:
            raise failed
        for rank, (theirs, words) in enumerate(told):
            if words is not None:
                raise RuntimeError(f"Fp16Cache: rank {rank} could not make its cache: {words}")
            if theirs != self.described:
                raise RuntimeError(
                    f"Fp16Cache: rank {rank} passed another model or other arguments to for_model than this rank"
                )
        return made

    def make(self, *shape: int, **options: Any) -> ShardedLayerGroup:
        """The storage of layers of one shape. A collective call."""
        made = ShardedLayerGroup(*shape, group=self.group, exchange=self.exchange, timeout=self.timeout, **options)
        self.exchange = made.between_ranks
        return made


def write_together(exchange: Exchange, write: Callable[[], None], layers: Any, sequences: int) -> None:
    """Rank 0 writes a file, `write`, of these layers. A collective call.

    `layers`: pairs of a storage and of a layer there.
    """
    if exchange.ranks == 1:
        write()
    else:
        store.write_together(
            "Fp16Cache.save", exchange.group, exchange.device, write, lambda: Selection(layers, range(sequences))
        )


@contextmanager
def failing_together(op: str, group: Any, device: torch.device) -> Iterator[None]:
    """What is done within raises on all ranks if it does on one. A collective call."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # the others wait for this rank, whatever it is
        failed = error
    store.raise_together(op, group, device, failed)
