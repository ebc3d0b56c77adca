"""Files of a `ShardedKVCacheFp16`: one file, that of a whole cache, which any number of ranks can load, or one cache.

`save`: rank 0 writes. It announces each block; then all ranks add up what they have of it, and rank 0 gets the sum.
`load`: every rank reads the file and keeps its own rows. All ranks raise when one of them fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import files
from ..errors import checked_device
from ..files.layout import CORE
from ..files.paths import check_progress, checked_path, checked_sequences, refuse_capture
from ..files.reading import OpenFile
from ..files.rows import Selection, blocks_of
from ..files.transfer import BLOCK_BYTES, Collected
from .exchange import agree, check_multiples, checked_group, number_of_call, told_by_all


def save(cache: Any, path: Any, sequences: Sequence[int] | Tensor | None, progress: Any) -> None:
    """See `ShardedKVCacheFp16.save`."""
    op = "save"
    refuse_capture(op, [cache.device])
    chosen = None if sequences is None else checked_sequences(op, sequences, cache.batch_size)
    if cache.ranks == 1:
        files.save(cache, path, chosen, progress)
        return
    # Rows of ranks that hold others would make a file of two texts.
    call = number_of_call(op, chosen, cache.tensors.state[:2].tolist())
    cache.between_ranks.compare(call, 0, (), cache.native.lengths_of_layer(0))
    cache.synchronize()
    write_together(
        op,
        cache.group,
        cache.device,
        lambda: files.save(cache, path, chosen, progress),
        lambda: Selection.of_cache(cache, chosen),
    )


def write_together(
    op: str, group: Any, device: torch.device, write: Callable[[], None], selected: Callable[[], Selection]
) -> None:
    """Rank 0 writes a file, `write`, while the others send what they have of it: `selected`. A collective call.

    Raises what `write` raises, and RuntimeError on the other ranks.
    """
    failed: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            write()
        except Exception as error:  # the others wait for rank 0, whatever it is
            failed = error
        Collected.announce(False, group, device)
    else:
        _take_part(selected(), group, device)
    words = [str(failed) if failed is not None else None]
    dist.broadcast_object_list(words, group_src=0, group=group, device=device)
    if failed is not None:
        raise failed
    if words[0] is not None:
        raise RuntimeError(f"{op}: rank 0 could not write the file: {words[0]}")


def _take_part(selection: Selection, group: Any, device: torch.device) -> None:
    """What the other ranks do while rank 0 writes."""
    with torch.inference_mode(False), torch.no_grad():
        if not Collected.announced(group, device):  # rank 0 failed before it read the state
            return
        seen, first, _ = selection.read_state()
        memory = Collected(selection.storages(), 1, BLOCK_BYTES, group)
        pieces = selection.pieces(seen, first, dealt_out_alone=True)
        for i, block in enumerate(blocks_of(pieces, BLOCK_BYTES)):
            if not Collected.announced(group, device):
                return
            memory.add_up(i, block)
        Collected.announced(group, device)


def load(
    cls: Callable[..., Any],
    path: Any,
    group: Any,
    device: Any,
    max_positions: int | None,
    progress: Any,
    **options: Any,
) -> Any:
    """See `ShardedKVCacheFp16.load`."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    checked_group("load", group, options.get("exchange", "auto"), options.get("timeout", 1.0))
    of_group = checked_device(device)
    ranks = dist.get_world_size(group)
    failed: Exception | None = None
    slots = max_positions
    found: Any = None
    try:  # what the constructor would refuse on one rank alone is refused here, on all
        check_progress("load", progress)
        with OpenFile("load", checked_path("load", path), CORE) as file:
            found = file.found.layout
            if slots is None:
                slots = -(-found.layers[0].max_positions // ranks) * ranks
            check_multiples(ranks, max_positions=slots, sink_positions=found.sink_positions)
    except Exception as error:  # the others wait for this rank, whatever it is
        failed = error
    raise_together("load", group, of_group, failed)
    if len({repr(told) for told in told_by_all(group, of_group, (slots, found))}) > 1:
        raise RuntimeError("load: all ranks must read the same file and pass the same max_positions")
    try:
        cache = files.load(functools.partial(cls, group=group, **options), path, of_group, slots, progress)
    except Exception as error:  # the others wait for this rank, whatever it is
        failed = error
    raise_together("load", group, of_group, failed)
    return cache


def load_sequences(cache: Any, path: Any, sequences: Sequence[int] | Tensor, progress: Any) -> None:
    """See `ShardedKVCacheFp16.load_sequences`."""
    failed: Exception | None = None
    try:
        files.load_sequences(cache, path, sequences, progress)
    except Exception as error:  # the others wait for this rank, whatever it is
        failed = error
    raise_together("load_sequences", cache.group, cache.device, failed)


def raise_together(op: str, group: Any, device: torch.device, failed: Exception | None) -> None:
    """Raises on all ranks if one has failed: its own error there. A collective call."""
    if not agree(group, device, failed is None):
        raise failed if failed is not None else RuntimeError(f"{op}: another rank could not read the file")
