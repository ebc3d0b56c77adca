"""`StreamingKVCacheFp16.save`, `load` and `load_sequences`: files of one cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import transfer
from .layout import CORE, LayerShape, Layout
from .paths import (
    Progress,
    check_progress,
    check_target,
    checked_int,
    checked_path,
    checked_sequences,
    refuse_capture,
)
from .reading import OpenFile
from .rows import Cache, Selection
from .writing import write

C = TypeVar("C", bound=Cache)


def save(
    cache: Cache,
    path: Any,
    sequences: Sequence[int] | Tensor | None,
    progress: bool | Progress | None,
) -> None:
    """See `StreamingKVCacheFp16.save`."""
    target = checked_path("save", path)
    check_progress("save", progress)
    whole = Selection.of_cache(cache)
    whole.check_in_place("save")
    refuse_capture("save", [cache.device])
    chosen = None if sequences is None else checked_sequences("save", sequences, cache.batch_size)
    check_target("save", target)
    selection = whole if chosen is None else Selection.of_cache(cache, chosen)
    shape = LayerShape(cache.max_positions, cache.num_heads, cache.head_dim, 0)
    layout = Layout(
        CORE,
        len(selection.sequences),
        cache.sink_positions,
        transfer.BLOCK_BYTES,
        (shape,) * cache.num_layers,
        cache.overflow,
    )
    write("save", target, selection, layout, b"", progress)


def load(
    cls: Callable[..., C],
    path: Any,
    device: torch.device | str | int,
    max_positions: int | None,
    progress: bool | Progress | None,
) -> C:
    """See `StreamingKVCacheFp16.load`."""
    source = checked_path("load", path)
    check_progress("load", progress)
    refuse_capture("load")
    slots = None if max_positions is None else checked_int("load", "max_positions", max_positions, "an int or None")
    with OpenFile("load", source, CORE) as file:
        layout = file.found.layout
        shape = layout.layers[0]
        slots = shape.max_positions if slots is None else slots
        if slots <= layout.sink_positions:
            raise ValueError(
                f"load: max_positions must be more than the {layout.sink_positions} sink positions of {source}, "
                f"got {slots}"
            )
        cache = cls(
            layout.num_layers,
            slots,
            shape.num_heads,
            shape.head_dim,
            batch_size=layout.batch_size,
            device=device,
            sink_positions=layout.sink_positions,
            overflow=str(layout.overflow),
        )
        file.read(Selection.of_cache(cache), progress, verify=False, emptied=None, overflow_counts=True)
    return cache


def load_sequences(
    cache: Cache, path: Any, sequences: Sequence[int] | Tensor, progress: bool | Progress | None
) -> None:
    """See `StreamingKVCacheFp16.load_sequences`."""
    op = "load_sequences"
    source = checked_path(op, path)
    check_progress(op, progress)
    Selection.of_cache(cache).check_in_place(op)
    refuse_capture(op, [cache.device])
    chosen = checked_sequences(op, sequences, cache.batch_size)
    with OpenFile(op, source, CORE) as file:
        layout = file.found.layout
        if layout.batch_size != len(chosen):
            raise ValueError(
                f"{op}: sequences must name one for each of the {layout.batch_size} sequences of {source}, "
                f"got {len(chosen)}"
            )
        shape = layout.layers[0]
        figures = (
            ("num_layers", layout.num_layers, cache.num_layers),
            ("num_heads", shape.num_heads, cache.num_heads),
            ("head_dim", shape.head_dim, cache.head_dim),
            ("sink_positions", layout.sink_positions, cache.sink_positions),
        )
        differing = [f"{name} is {there} in the file and {here} here" for name, there, here in figures if there != here]
        if differing:
            raise ValueError(f"{op}: {source} does not fit this cache: {', '.join(differing)}")
        emptied = f"sequences {chosen} of the cache are empty now"
        if len(chosen) == 1:
            emptied = f"sequence {chosen[0]} of the cache is empty now"
        file.read(Selection.of_cache(cache, chosen), progress, verify=True, emptied=emptied, overflow_counts=False)
