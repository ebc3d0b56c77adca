"""How a layer's keys and values lie in a `StreamingKVCacheFp16`, which wants both of one dtype and one width."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def as_stored(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[B, T, H, D]`, in the wider of their dtypes: under autocast rotated keys are FP32 and values are not."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    key, value = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (key, value))
    if key.shape[-1] == value.shape[-1]:
        return key, value
    both = torch.cat([key, value], -1)
    both = nn.functional.pad(both, (0, both.shape[-1] % 2))
    first, second = both.chunk(2, -1)
    return first, second


def as_handed_over(first: Tensor, second: Tensor, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What `as_stored` made of keys and values of these widths."""
    if widths[0] == widths[1]:
        return first, second
    key, value, _ = torch.cat([first, second], -1).tensor_split([widths[0], sum(widths)], -1)
    return key.contiguous(), value.contiguous()
