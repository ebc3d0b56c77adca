"""Fp16Cache's protocol with transformers: all that travels in disguise, and a diagram of a forward pass.

The cache's own code stands at both ends of a forward pass: where masks are made, and where attention is computed.
transformers' code lies between. It hands on only what it knows: ints, masks, keys and values. The cache needs more to
arrive than that, so some of these are not what they seem. This file defines them all; the reason stands at each.

    model.generate / model(...)      attention_mask: none, 2D [B, columns + T], or 4D
        |
        v
    decoder -- hook: passes.begin_pass      checks positions and masks before anything is stored
        |
        |   create_causal_mask of transformers, once for each kind of layer (a 4D mask skips this and goes to attend)
        |     |
        |     |-- calls Fp16Layer.get_seq_length()             returns the columns so far: q_offset
        |     |-- calls Fp16Layer.get_mask_sizes(T)
        |     |     returns   kv_length: a TaggedLength        [1] eager: the int says which layer it is of
        |     |     or        kv_offset < 0                    [2] compiled: the window is sent as an offset
        |     |
        |     `-- calls masks.make_mask(q_offset, kv_length, kv_offset, mask_function, 2D mask)
        |           is_plain(mask_function)?                   [3] a pattern is recognised by its closures
        |           yes: layer.mask_for(2D mask) has padding.py check and record the mask. It returns
        |                     None                             no padding, and the host knows it
        |                     int32 [B, 1, 1, 1]               [4] left padding, or one token on a GPU: how many real
        |                     int8  [B, 1, 1, T]               [4] padding anywhere: which new tokens are real
        |           no: returns bool [B, 1, T, columns]        the 4D mask of the pattern
        v
    each layer of the model
        |-- calls Fp16Layer.update(key, value)
        |     returns         PendingKeyValues, twice          [5] in place of the key and of the value
        |
        `-- calls attention.attend(query, PendingKeyValues, PendingKeyValues, mask)
              (of a layer that shares another's keys and values: layer.attend_again, or gather_again)
              None, int32, int8:  layer.append_attend -> StreamingKVCacheFp16.append_attend(new_lengths=)
                                  -> AppendParams::new_lengths -> appended_rows (ring.h), AttendPlan (visibility.h)
              bool, float:        layer.append_gather, then torch's attention under the mask
        |
        v
    decoder -- hook: passes.end_pass        records the positions that were fed

T: new tokens of the call. Columns: tokens of a text with its padding, as transformers counts them. Real: not padding.

Two ways are shorter. A replayed CUDA graph has no mask in it: graphs.py calls `Padding.mask_for` before the replay.
With `attention=None` the model keeps its own attention and nothing is in disguise: `get_mask_sizes` returns plain ints,
and `update` appends and returns gathered keys and values.
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
    """`Fp16Layer`, as far as `make_mask`, `attend` and this file call it. It cannot be imported: it imports this."""

    window: int | None

    def mask_for(self, attention_mask: Tensor | None, columns: int, new_tokens: int) -> Tensor | None: ...

    def drop_pending(self) -> None: ...

    def note_masked_step(self) -> None: ...

    def append_pending(self, pending: PendingKeyValues) -> None: ...

    def gathered_columns(self, new_tokens: int) -> int: ...

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...

    def gather_again(self, new_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def attend_again(
        self, query: Tensor, *, scale: float | None, softcap: float | None, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]: ...

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


# [1] The layer, as an attribute of an int. `make_mask` must know which layer, and so which cache, it makes a mask for.
# transformers gives it sizes and a 2D mask, but no cache. It does hand on the very object that `get_mask_sizes`
# returns.


class TaggedLength(int):
    """A number of columns that also says which layer they are of."""

    layer: Layer

    @classmethod
    def of(cls, layer: Layer, columns: int) -> TaggedLength:
        tagged = cls(columns)
        tagged.layer = layer
        return tagged


# [2] The window, as a negative offset. An int subclass does not survive tracing, so in compiled code `TaggedLength`
# cannot be used. The offset of the first column takes its place. Other caches have no negative ones, so `make_mask`
# knows that an `Fp16Cache` was asked. A 2D mask in compiled code is an error, so `make_mask` needs no more than the
# window.


def offset_of_window(window: int | None) -> int:
    """The offset that stands for a window. Always negative."""
    return -1 - (window or 0)


def window_of_offset(kv_offset: int) -> int | None:
    """The window that a negative offset stands for; None: full attention."""
    return (-1 - kv_offset) or None


# [3] The pattern, as a function. The kernels are causal or sliding by themselves, so these two patterns need no mask.
# transformers does not name a pattern: it passes a function of indices, composed of closures. The causal one is always
# the same object. A sliding one is made anew each time, so it is compared, closure by closure, with one that is made
# here.

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
    """`is_plain` where masks were asked for by compiled code. The compiler cannot open closures: the name must do."""
    if window is not None and is_compiling():
        return mask_function.__name__ == "and_mask"
    return is_plain(mask_function, window)  # (not compiling: the compiler has given up on the code around)


# [4] Padding, as a mask of an integer dtype. The kernels take no mask but the number of new tokens to append to each
# sequence. It must get from `make_mask` to `attend`, and only a mask does. This one has four dimensions, since
# transformers hands those on untouched. It is int32 or int8, while masks of transformers and of callers are bool or
# floating point.


def mask_of_left_padding(real: Tensor) -> Tensor:
    """int32 `[B, 1, 1, 1]`: how many of the last new tokens are real. `real`: bool `[B, T]`."""
    return real.sum(1, dtype=torch.int32)[:, None, None, None]


def mask_of_padding(real: Tensor) -> Tensor:
    """int8 `[B, 1, 1, T]`: 1 for each new token that is real. `real`: bool `[B, T]`."""
    return real.to(torch.int8)[:, None, None]


def is_padding_mask(mask: Tensor) -> bool:
    """Whether this is one of the two, by its dtype."""
    return mask.dtype in (torch.int8, torch.int32)


def counts_of(mask: Tensor, batch: int) -> Tensor | None:
    """int32 `[B]`: the counts in a `mask_of_left_padding`; None if this is no such mask."""
    return mask.flatten() if mask.dtype == torch.int32 and mask.shape == (batch, 1, 1, 1) else None


def flags_of(mask: Tensor, batch: int, new_tokens: int) -> Tensor | None:
    """int8 `[B, T]`: the flags in a `mask_of_padding`; None if this is no such mask."""
    return mask[:, 0, 0] if mask.dtype == torch.int8 and mask.shape == (batch, 1, 1, new_tokens) else None


# [5] New keys and values, and their layer, as one object in place of a key and a value. A kernel appends and attends in
# one call, so `attend` needs all three. A model's layer gives its attention no cache, only what `update` returns: a key
# and a value. So `update` returns this object as both. Layers that share keys and values hand the same object to their
# own attention later in the pass (`attended`): nothing is stored then.


class PendingKeyValues:
    """A layer's new keys and values on their way from `update` to `attend`. Any other use of it is an error."""

    def __init__(self, layer: Layer, key: Tensor, value: Tensor, *, in_pass: bool) -> None:
        self.layer = layer
        self.new_key = key  # [B, H, T, D]
        self.new_value = value
        self.in_pass = in_pass  # whether a forward pass is known to be under way
        self.appended = False  # as a past made by hand: see `Fp16Layer.append_pending`
        self.attended = False  # a layer has attended to them, and so they are stored

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PendingKeyValues:
        """Itself: layers that share keys and values ask for them on their own device before they hand them on."""
        if isinstance(device, torch.dtype):
            self._refuse()
        return self

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
