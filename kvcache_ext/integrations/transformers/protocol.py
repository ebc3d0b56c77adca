"""How an `Fp16Cache` and transformers talk: all that travels through transformers' code in disguise.

A forward pass takes a mask, lengths, keys and values from place to place. Between those places lies code of
transformers, which hands on only what it knows: ints, tensors, masks. What it does not know travels as one of those.
This file defines all five disguises; nothing else is disguised.

    model.generate / model(...)      attention_mask: none, 2D [B, columns + T], or 4D
        |
        v
    decoder -- hook: passes.begin_pass      looks at positions and masks before anything is stored
        |
        |   create_causal_mask of transformers, once for each kind of layer  (a 4D mask skips this and goes to [4])
        |     |
        |     |-- asks Fp16Layer.get_mask_sizes(T)             how many columns will there be?
        |     |     answers   kv_length = TaggedLength         [1] eager: the layer rides on the int
        |     |     or        kv_offset < 0                    [2] compiled: the window is sent as an offset
        |     |
        |     `-- asks masks.make_mask(kv_length, kv_offset, mask_function, 2D mask)
        |           is_plain(mask_function)?                   [3] the pattern is told by its closure
        |           yes: layer.mask_for(2D mask), which looks up and records padding (padding.py), answers
        |                     None                             no padding among the new tokens
        |                     int32 [B, 1, 1, 1]               [4] how many new tokens are real: left padding
        |                     int8  [B, 1, 1, T]               [4] which new tokens are real: padding anywhere
        |           no: answers bool [B, 1, T, columns]        the 4D mask of the pattern
        v
    each layer of the model
        |-- Fp16Layer.update(key, value)
        |     answers         PendingKeyValues, twice          [5] stands in for the key and for the value
        |
        `-- attention.attend(query, PendingKeyValues, PendingKeyValues, mask)
              None, int32, int8:  layer.append_attend -> StreamingKVCacheFp16.append_attend(new_lengths) -> kernel
              bool, float:        layer.append_gather, then torch's attention under the mask
        |
        v
    decoder -- hook: passes.end_pass        remembers the positions that were fed

T: new tokens of the call. Columns: tokens of a text with its padding, as transformers counts them.

With `attention=None` the model keeps its own attention. There are no disguises then: `get_mask_sizes` answers plain
ints, and `update` appends and answers gathered keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from .version import NAME


class Layer(Protocol):
    """What is asked of the layer in a disguise, once that is opened: see `Fp16Layer`."""

    window: int | None

    def mask_for(self, attention_mask: Tensor | None, columns: int, new_tokens: int) -> Tensor | None: ...

    def drop_pending(self) -> None: ...

    def append_pending(self, pending: PendingKeyValues) -> None: ...

    def gathered_columns(self, new_tokens: int) -> int: ...

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...

    def append_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        new_lengths: Tensor | None,
        *,
        scale: float | None,
        softcap: float | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


# [1] The layer, on the int that says how many columns a mask has. transformers gives a mask function sizes and a 2D
# mask, and not the cache. But it hands the int on as the object that it is.


class TaggedLength(int):
    """A number of columns that also says which layer it was asked of."""

    layer: Layer

    @classmethod
    def of(cls, layer: Layer, columns: int) -> TaggedLength:
        tagged = cls(columns)
        tagged.layer = layer
        return tagged


# [2] The window, as a negative offset. torch.compile makes a plain int of a `TaggedLength`, so in compiled code the
# layer cannot come along. The offset of the first column can. It is never negative with any other cache, which tells
# `make_mask` that the question is about an `Fp16Cache`.


def offset_of_window(window: int | None) -> int:
    return -1 - (window or 0)


def window_of_offset(kv_offset: int) -> int | None:
    """The window that a negative offset stands for."""
    return (-1 - kv_offset) or None


# [3] The pattern. transformers describes it by a function of indices, composed of closures, and does not say which
# pattern it is. The cache's attention is causal, or sliding, by itself. So it must know whether the function is one of
# these two and nothing more. A causal one is always the same object. A sliding one is made anew by each call: it is
# compared with one that is made here, closure by closure.

_SLIDING = sliding_window_causal_mask_function(1)


def _closed_over(function: Any) -> Any:
    return function.__closure__[0].cell_contents


def is_plain(mask_function: Any, window: int | None) -> bool:
    """Whether a pattern is the causal one or, with a window, the causal one within it."""
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


def is_plain_in_compiled_code(mask_function: Callable[..., Any], window: int | None) -> bool:
    """`is_plain` as far as the compiler lets one look: closures cannot be opened there."""
    if window is not None and is_compiling():
        return mask_function.__name__ == "and_mask"
    return is_plain(mask_function, window)  # (not compiling: the compiler has given up on the code around)


# [4] Padding, as a mask of an integer dtype. The kernels need no mask: they take the number of new tokens to append for
# each sequence. That number has to come from `make_mask` to `attend`, and only a mask does. It has four dimensions,
# because transformers hands a 4D mask on untouched. It is int32 or int8, which tells it from real masks: those are bool
# or floating point.


def mask_of_left_padding(real: Tensor) -> Tensor:
    """int32 `[B, 1, 1, 1]`: how many of the last new tokens are real. `real`: bool `[B, T]`."""
    return real.sum(1, dtype=torch.int32)[:, None, None, None]


def mask_of_padding(real: Tensor) -> Tensor:
    """int8 `[B, 1, 1, T]`: 1 for each new token that is real. `real`: bool `[B, T]`."""
    return real.to(torch.int8)[:, None, None]


def is_padding_mask(mask: Tensor) -> bool:
    return mask.dtype in (torch.int8, torch.int32)


def counts_of(mask: Tensor, batch: int) -> Tensor | None:
    """int32 `[B]`, the argument of `mask_of_left_padding` summed up; None if this is no such mask."""
    return mask.flatten() if mask.dtype == torch.int32 and mask.shape == (batch, 1, 1, 1) else None


def flags_of(mask: Tensor, batch: int, new_tokens: int) -> Tensor | None:
    """int8 `[B, T]`, the argument of `mask_of_padding`; None if this is no such mask."""
    return mask[:, 0, 0] if mask.dtype == torch.int8 and mask.shape == (batch, 1, 1, new_tokens) else None


# [5] New keys and values. A model's layer calls `update` and gives what it returns to the attention as key and value.
# To append and attend in one call, the attention needs the layer and its new keys and values. So `update` returns an
# object that holds all three, twice: as the key and as the value.


class PendingKeyValues:
    """A layer's new keys and values on their way from `update` to `attend`. Any other use of it is an error."""

    def __init__(self, layer: Layer, key: Tensor, value: Tensor, *, in_pass: bool) -> None:
        self.layer = layer
        self.new_key = key  # [B, H, T, D]
        self.new_value = value
        self.in_pass = in_pass  # whether a forward pass is known to be under way
        self.appended = False  # as a past made by hand: see `Fp16Layer.append_pending`

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> NoReturn:
        for value in (*arguments, *(options or {}).values()):
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, PendingKeyValues):
                    each._refuse()
        raise RuntimeError("Fp16Cache: keys and values of a layer were used in a place that is not known")

    def _refuse(self) -> NoReturn:
        self.layer.drop_pending()  # or they would be appended after this error
        raise RuntimeError(
            f"Fp16Cache: this model uses keys and values elsewhere than in the attention named {NAME!r}, or was not "
            "set to it; make the cache with for_model for this very model, or with attention=None, which gives it "
            "gathered keys and values"
        )
