"""Reading rows that several ranks hold: each has its own, and zeros for the others' rows. Their sum has all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange


def add_up(tensors: Iterable[Tensor], exchange: Exchange) -> None:
    """Every rank gets what any of them has, in place. Bits stay as they are: whole bytes or words are added, of which
    all but one rank's are 0 (as numbers, -0.0 + 0.0 would lose its sign)."""
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        dense = tensor.contiguous()
        flat = dense.view(-1).view(torch.uint8)
        if flat.numel() % 4 == 0 and flat.data_ptr() % 4 == 0:
            flat = flat.view(torch.int32)
        exchange.run(lambda flat=flat: dist.all_reduce(flat, group=exchange.group, async_op=True))  # type: ignore[misc]
        if dense.data_ptr() != tensor.data_ptr():
            tensor.copy_(dense)
