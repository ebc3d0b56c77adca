"""The masks that transformers asks for: none for plain patterns, what padding means, or a whole 4D mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from .shared import Shared


class Columns(int):
    """A number of columns, and whose they are: how `make_mask`, which is not told, learns of the cache."""

    shared: Shared
    window: int | None


_SLIDING = sliding_window_causal_mask_function(1)


def _closed_over(function: Any) -> Any:
    return function.__closure__[0].cell_contents


def _is_plain(mask_function: Any, window: int | None) -> bool:
    """Whether a pattern is the causal one, or with a window the causal one within it."""
    if window is None:
        return mask_function is causal_mask_function
    if getattr(mask_function, "__code__", None) is not _SLIDING.__code__:
        return False
    parts, known = _closed_over(mask_function), _closed_over(_SLIDING)
    return (
        len(parts) == 2
        and getattr(parts[0], "__code__", None) is known[0].__code__
        and _closed_over(parts[0]) == window
        and parts[1] is causal_mask_function
    )


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
    """The mask that transformers gets for this attention: see the head of this file."""
    if kv_offset < 0:  # ours, asked for its sizes by compiled code: see `Fp16Layer.get_mask_sizes`
        window = -1 - kv_offset
        if is_compiling() and local_size is not None:
            plain = mask_function.__name__ == "and_mask"  # closures are out of sight here
        else:  # (not compiling: where the compiler has given up on the code around)
            plain = _is_plain(mask_function, local_size)
        if plain and attention_mask is None and window == (local_size or 0):
            return None
        if not plain or attention_mask is not None:
            raise RuntimeError(
                "Fp16Cache: compiled code can serve a plain causal or sliding pattern without attention_mask only: "
                "pass attention_mask=None (new tokens of a decode step are never padding), or make the cache with "
                "compileable=True, so that generate() prepares masks before the compiled part"
            )
        kv_offset = max(q_offset - window + 1, 0) if window else 0
        options["allow_is_causal_skip"] = False
    if not isinstance(kv_length, Columns):
        return _other_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, options
        )
    shared, seen = kv_length.shared, int(q_offset)
    if not _is_plain(mask_function, local_size) or local_size != kv_length.window:
        # (The second: some models ask for masks that no layer will use, and so of no layer's window.)
        options["allow_is_causal_skip"] = False
        return _other_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, options
        )
    if attention_mask is None:
        shared.raise_if_late()
        return None
    if shared.compileable and q_length == 1:
        attention_mask = attention_mask.expand(batch_size, -1)
        shared.note_last(attention_mask, seen, kv_length.window)
        # The same for every step, so that the compiled code is: what the last column says, without looking.
        return attention_mask[:, -1:].to(torch.int32)[:, None, None].contiguous()
    return shared.plan(attention_mask.expand(batch_size, -1), seen, q_length, kv_length.window)


def _other_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    local_size: int | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The mask of scaled_dot_product_attention: bool `[B, 1, q, kv]`, or None where it needs none."""
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
