"""`python -m kvcache_ext plan --gpus`: the three ways to spread a model over several GPUs, as a table."""

from __future__ import annotations

import argparse

import torch

from . import memory
from .memory import shown_gb
from .multi_gpu import GpusPlan, LayersOf, WayPlan, plan_model_on_gpus


def check_options(chosen: argparse.Namespace) -> None:
    """Raises ValueError where `--gpus` and `--gpu-gb` do not go with each other, or with other options."""
    if chosen.gpus is None:
        if chosen.gpu_gb is not None:
            raise ValueError(
                "plan: --gpu-gb is the memory of each of several GPUs and needs --gpus; for one: --free-gb"
            )
        return
    if chosen.gpus < 2:
        raise ValueError(f"plan: --gpus must be at least 2, got {chosen.gpus}; for one GPU leave it out")
    if chosen.free_gb is not None or chosen.device is not None:
        option = "--device" if chosen.free_gb is None else "--free-gb"
        raise ValueError(f"plan: {option} is for one device; with --gpus the memory of each GPU is --gpu-gb")


def plan(chosen: argparse.Namespace, layers: LayersOf, positions: int, why_not_by_heads: str | None) -> GpusPlan:
    """The plan of these options. Without `--gpu-gb` it is for the GPUs that are here.

    Raises:
        ValueError: without `--gpu-gb`, where there are fewer GPUs.
    """
    return plan_model_on_gpus(
        layers,
        positions,
        gpus=chosen.gpus,
        gpu_bytes=_least_free(chosen.gpus) if chosen.gpu_gb is None else chosen.gpu_gb,
        batch_size=chosen.batch,
        weights_bytes=chosen.weights_gb or 0,
        why_not_by_heads=why_not_by_heads,
    )


def _least_free(gpus: int) -> int:
    """What the fullest of the first so many GPUs has free, in bytes."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here < gpus:
        there = "no GPU" if here == 0 else "1 GPU" if here == 1 else f"{here} GPUs"
        raise ValueError(
            f"plan: --gpus {gpus} needs --gpu-gb, the memory of each GPU in GB, as torch sees {there} here"
        )
    free = [memory.free_bytes(torch.device("cuda", index)) for index in range(gpus)]
    return min(size for size in free if size is not None)


def lines(planned: GpusPlan, weights_given: bool) -> list[str]:
    """The table, which way to pick, and what the figures assume."""
    share = f"1/{planned.gpus}"
    rows = [("each GPU takes", "weights", "cache", "beside it", "total", "most positions", "")]
    rows += [_row(way) for way in (planned.one_gpu, planned.by_layers, planned.by_heads, planned.by_positions)]
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    table = [
        "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, 6)), row[6]]).rstrip()
        for row in rows
    ]
    found = [
        f"  {planned.gpus} GPUs of {shown_gb(planned.gpu_bytes)} each",
        *table,
        *(f"  {way.way}: not possible, as {way.why_not}" for way in _ways(planned) if way.why_not is not None),
        f"  pick: {_which_to_pick(planned)}",
    ]
    if not weights_given:
        found.append("  note: no weights are counted: --weights-gb")
    elif planned.by_heads.why_not is None:
        found.append(
            f"  note: by heads counts {share} of the weights; what lies whole on every GPU (embedding) adds to it"
        )
    if planned.by_layers.why_not is None:
        found.append(
            f"  note: by layers counts {share} of the layers, in order, and of the weights, as nearly as it goes"
        )
    return found


def _ways(planned: GpusPlan) -> tuple[WayPlan, WayPlan, WayPlan]:
    return planned.by_heads, planned.by_positions, planned.by_layers


def _row(way: WayPlan) -> tuple[str, str, str, str, str, str, str]:
    if way.why_not is not None:
        return way.way, "-", "-", "-", "-", "-", "not possible"
    sizes = (way.weights_bytes, way.cache_bytes, way.beside_bytes, way.total_bytes)
    weights, cache, beside, total = map(shown_gb, sizes)
    most = "any" if way.largest_max_positions is None else f"{way.largest_max_positions:,}"
    verdict = "fits" if way.fits else f"does not fit: {shown_gb(way.total_bytes - way.gpu_bytes)} too much"
    return way.way, weights, cache, beside, total, most, verdict


def _which_to_pick(planned: GpusPlan) -> str:
    """One sentence: `GpusPlan.best`, and why."""
    share = f"1/{planned.gpus}"
    best = planned.best
    if best is None:
        most = max(_ways(planned), key=lambda way: way.largest_max_positions or 0)
        if not most.largest_max_positions:
            return "none, as not even one position fits beside the weights"
        return f"none, as none fits; {most.way} there is room for the most, {most.largest_max_positions:,} positions"
    if best is planned.by_layers:
        reason = "the only way that fits: the GPUs read their layers one after the other"
    elif best is planned.by_heads:
        reason = f"as for each token all GPUs at once read {share} of the weights and of the cache"
    else:
        reason = f"as for each token all GPUs at once read {share} of the cache, and each all of the weights"
    if planned.one_gpu.fits:
        reason += (
            f" (all of it fits on one GPU, too, and is {'as fast' if best is planned.by_layers else 'slower'} there)"
        )
    return f"{best.way}, {reason}"
