"""Several GPUs: what each takes in the three ways to deal a model and its cache out to them.

- By layers: each GPU holds some layers, weights and cache (a device map). They compute one after the other.
- By heads: each GPU holds its share of the heads of every layer, and of the weights (tensor parallelism).
- By positions: each GPU holds every n-th position of the layers with full attention, and all weights.

docs/multi-gpu.md draws the three and says when to use which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import memory
from .errors import checked_int
from .memory import LayerShape

MOST_LAYERS = 10_000  # of a model that is planned for
LayersOf = Callable[[int], Sequence[LayerShape | None]]  # the layers of a model, in order, for so many positions


@dataclass(frozen=True)
class WayPlan:
    """What a GPU takes, in bytes, in one way to deal a model out: the GPU that takes the most.

    Attributes:
        way: "one GPU", "by layers", "by heads" or "by positions".
        why_not: why this way is not possible, in words; None: it is. Where it is not, the bytes below and
            `largest_max_positions` are 0.
        weights_bytes: the GPU's share of the model's weights.
        cache_bytes: its keys and values.
        beside_bytes: lengths, counters, attention's workspace and what the allocator rounds up; by positions also the
            buffer for the exchange between GPUs.
        gpu_bytes: what can be allocated on each GPU.
        largest_max_positions: the largest `max_positions` of the whole model that fits, all else equal; 0: not even one
            position does; None: any number does, as every layer has a sliding window.
    """

    way: str
    why_not: str | None
    weights_bytes: int
    cache_bytes: int
    beside_bytes: int
    gpu_bytes: int
    largest_max_positions: int | None

    @property
    def total_bytes(self) -> int:
        """All that the GPU takes."""
        return self.weights_bytes + self.cache_bytes + self.beside_bytes

    @property
    def fits(self) -> bool:
        """Whether this way is possible, and each GPU has room for what it takes."""
        return self.why_not is None and self.total_bytes <= self.gpu_bytes


@dataclass(frozen=True)
class GpusPlan:
    """What `plan_gpus` and `plan_model_on_gpus` return.

    Attributes:
        gpus, gpu_bytes: how many GPUs, and the bytes that can be allocated on each.
        max_positions, batch_size: of the whole model, whatever a GPU holds of it.
        one_gpu: everything on one of these GPUs, for comparison.
        by_layers, by_heads, by_positions: the three ways.
    """

    gpus: int
    gpu_bytes: int
    max_positions: int
    batch_size: int
    one_gpu: WayPlan
    by_layers: WayPlan
    by_heads: WayPlan
    by_positions: WayPlan

    @property
    def best(self) -> WayPlan | None:
        """Of the three ways, the first that fits of: by heads, by positions, by layers. None: none fits.

        In this order they decode fastest, on two H200. By heads all GPUs at once read their shares of weights and
        cache. By positions they share the cache alone. By layers one GPU reads at a time. But by heads has more
        exchanges. Where a layer has less than some 160 MB of weights, these cost more than the weights save, and by
        positions is faster. docs/multi-gpu.md has the figures.
        """
        return next((way for way in (self.by_heads, self.by_positions, self.by_layers) if way.fits), None)


def plan_gpus(
    num_layers: int,
    max_positions: int,
    num_heads: int,
    head_dim: int,
    *,
    gpus: int,
    gpu_bytes: int,
    batch_size: int = 1,
    weights_bytes: int = 0,
) -> GpusPlan:
    """What a cache of this shape and a model's weights take on each of several equal GPUs. Nothing is allocated.

    Args:
        num_layers, max_positions, num_heads, head_dim, batch_size: of the whole model, as for
            `StreamingKVCacheFp16.plan`. `num_heads` are key/value heads, and all layers have full attention.
        gpus: how many GPUs, at least 2.
        gpu_bytes: bytes that can be allocated on each of them.
        weights_bytes: bytes of all weights of the model. By layers they are counted as spread evenly over the layers,
            and by heads over the GPUs. What is not (the embedding and the head lie whole on one GPU by layers, the
            embedding on every GPU by heads) comes on top.

    Returns:
        A `GpusPlan`. Its `by_layers`, `by_heads` and `by_positions` say what a GPU takes, whether it fits, the largest
        `max_positions` that fits, and why a way is not possible.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    layers = checked_int("num_layers", num_layers, 1, of="plan_gpus")
    if layers > MOST_LAYERS:
        raise ValueError(f"plan_gpus: num_layers must be at most {MOST_LAYERS}, got {layers}")
    heads = checked_int("num_heads", num_heads, 1, of="plan_gpus")
    width = checked_int("head_dim", head_dim, 1, of="plan_gpus")
    return plan_model_on_gpus(
        layers_alike(layers, heads, width),
        checked_int("max_positions", max_positions, 1, of="plan_gpus"),
        gpus=checked_int("gpus", gpus, 2, of="plan_gpus"),
        gpu_bytes=checked_int("gpu_bytes", gpu_bytes, 0, of="plan_gpus"),
        batch_size=checked_int("batch_size", batch_size, 1, of="plan_gpus"),
        weights_bytes=checked_int("weights_bytes", weights_bytes, 0, of="plan_gpus"),
    )


def layers_alike(num_layers: int, num_heads: int, head_dim: int) -> LayersOf:
    """A model of so many layers of one shape, all with full attention."""
    return lambda positions: [LayerShape(positions, num_heads, head_dim)] * num_layers


def plan_model_on_gpus(
    layers: LayersOf,
    max_positions: int,
    *,
    gpus: int,
    gpu_bytes: int,
    batch_size: int = 1,
    weights_bytes: int = 0,
    why_not_by_heads: str | None = None,
) -> GpusPlan:
    """`plan_gpus` for a model whose layers may differ. Arguments are not checked.

    Args:
        layers: called with a `max_positions`, it gives the shapes of the model's layers, in order. None stands for a
            layer without keys and values.
        max_positions, gpus, gpu_bytes, batch_size, weights_bytes: as for `plan_gpus`.
        why_not_by_heads: why the model cannot be dealt out by heads, in words, whatever the number of its heads.
    """

    def way(name: str, why_not: str | None, shares: Callable[[int], list[_Share]]) -> WayPlan:
        if why_not is not None:
            return WayPlan(name, why_not, 0, 0, 0, gpu_bytes, 0)
        most = max(shares(max_positions), key=lambda share: share.total_bytes)
        largest = memory.largest_that_fits(
            lambda positions: max(share.total_bytes for share in shares(positions)), gpu_bytes
        )
        return WayPlan(name, None, most.weights_bytes, most.cache_bytes, most.beside_bytes, gpu_bytes, largest)

    def share(held: Sequence[LayerShape | None], weights: int, exchange: int = 0) -> _Share:
        plans = memory.plans_of_layers(held, batch_size)
        return _Share(
            weights, sum(plan.cache_bytes for plan in plans), exchange + sum(plan.beside_bytes for plan in plans)
        )

    def by_layers(positions: int) -> list[_Share]:
        all_layers = layers(positions)
        count = len(all_layers)
        cuts = [count * gpu // gpus for gpu in range(gpus + 1)]
        return [
            share(all_layers[begin:end], _divide_up(weights_bytes * (end - begin), count))
            for begin, end in pairwise(cuts)
        ]

    def by_heads(positions: int) -> list[_Share]:
        held = [_with_heads_of_one(layer, gpus) for layer in layers(positions)]
        return [share(held, _divide_up(weights_bytes, gpus))]

    def by_positions(positions: int) -> list[_Share]:
        held = [_with_positions_of_one(layer, gpus) for layer in layers(_divide_up(positions, gpus) * gpus)]
        return [share(held, weights_bytes, memory.EXCHANGE_BYTES)]

    shapes = layers(max_positions)
    return GpusPlan(
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        max_positions=max_positions,
        batch_size=batch_size,
        one_gpu=way("one GPU", None, lambda positions: [share(layers(positions), weights_bytes)]),
        by_layers=way("by layers", _why_not_by_layers(shapes, gpus), by_layers),
        by_heads=way("by heads", why_not_by_heads or _why_not_by_heads(shapes, gpus), by_heads),
        by_positions=way("by positions", _why_not_by_positions(shapes), by_positions),
    )


@dataclass(frozen=True)
class _Share:
    """What one GPU takes."""

    weights_bytes: int
    cache_bytes: int
    beside_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.beside_bytes


def _divide_up(number: int, by: int) -> int:
    return -(-number // by)


def _with_heads_of_one(layer: LayerShape | None, gpus: int) -> LayerShape | None:
    return None if layer is None else LayerShape(layer.slots, layer.heads // gpus, layer.head_dim, layer.window)


def _with_positions_of_one(layer: LayerShape | None, gpus: int) -> LayerShape | None:
    """`max_positions` is rounded up to a multiple of the GPUs. Sliding-window layers stay whole on every GPU."""
    if layer is None or layer.window is not None:
        return layer
    return LayerShape(_divide_up(layer.slots, gpus), layer.heads, layer.head_dim)


def _why_not_by_layers(layers: Sequence[LayerShape | None], gpus: int) -> str | None:
    if len(layers) >= gpus:
        return None
    return f"the model has {len(layers)} {'layer' if len(layers) == 1 else 'layers'}, and a layer stays on one GPU"


def _why_not_by_heads(layers: Sequence[LayerShape | None], gpus: int) -> str | None:
    heads = sorted({layer.heads for layer in layers if layer is not None and layer.heads % gpus})
    if not heads:
        return None
    counts = " and ".join(f"{number:,}" for number in heads)
    return (
        f"{counts} key/value {'head' if heads == [1] else 'heads'} of a layer cannot be dealt equally to {gpus:,} GPUs"
    )


def _why_not_by_positions(layers: Sequence[LayerShape | None]) -> str | None:
    if any(layer is not None and layer.window is None for layer in layers):
        return None
    return "every layer has a sliding window, and such layers stay whole on every GPU"
