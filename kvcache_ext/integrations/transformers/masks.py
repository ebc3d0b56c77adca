"""The masks that transformers asks for. How they travel: see protocol.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .protocol import TaggedLength, counts_of, flags_of, is_plain, is_plain_in_compiled_code, window_of_offset


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask function that transformers finds under this attention's name.

    For a plain pattern of an `Fp16Cache` it returns None, or padding in an integer dtype. For anything else it returns
    the mask of scaled_dot_product_attention: bool `[B, 1, q, kv]`, or None where that needs none.
    """
    if kv_offset < 0:  # compiled code, and an Fp16Cache: see `offset_of_window`
        window = window_of_offset(kv_offset)
        plain = is_plain_in_compiled_code(mask_function, local_size)
        if plain and attention_mask is None and window == local_size:
            return None
        if not plain or attention_mask is not None:
            raise RuntimeError(
                "Fp16Cache: compiled code can serve a plain causal or sliding pattern without attention_mask only: "
                "pass attention_mask=None (new tokens of a decode step are never padding), or make the cache with "
                "compileable=True, so that generate() prepares masks before the compiled part"
            )
        kv_offset = max(q_offset - window + 1, 0) if window else 0
        options["allow_is_causal_skip"] = False
    elif isinstance(kv_length, TaggedLength):
        layer = kv_length.layer
        # (The second condition: some models ask for masks of a window that no layer has.)
        if is_plain(mask_function, local_size) and local_size == layer.window:
            mask = None if attention_mask is None else attention_mask.expand(batch_size, -1)
            return layer.mask_for(mask, int(q_offset), q_length)
        options["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **options,
    )


def real_tokens(mask: Any, batch: int, new_tokens: int) -> tuple[Tensor | None, bool]:
    """Reads a decoder's `attention_mask` of any kind.

    Returns:
        Which of the new tokens are real, bool `[B, T]` or None for all; and whether the mask could be read.
    """
    if isinstance(mask, dict):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        return None, True
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None, False
    if mask.dim() == 2 and mask.shape[1] >= new_tokens:
        return mask[:, -new_tokens:].bool().expand(batch, -1), True
    flags = flags_of(mask, batch, new_tokens)
    if flags is not None:
        return flags.bool(), True
    counts = counts_of(mask, batch)
    if counts is not None:
        return torch.arange(new_tokens, device=mask.device) >= new_tokens - counts[:, None], True
    if mask.dim() == 4 and mask.shape[2] == new_tokens and mask.shape[3] >= new_tokens:
        own = mask[:, 0].diagonal(mask.shape[3] - new_tokens, 1, 2)  # a real token sees itself
        if own.dtype == torch.bool:
            return own.expand(batch, -1), True
        if own.is_floating_point():
            return (own > torch.finfo(own.dtype).min / 2).expand(batch, -1), True
    return None, False
