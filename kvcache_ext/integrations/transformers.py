"""Hugging Face transformers on the FP16 cache.

    from kvcache_ext.integrations.transformers import Fp16Cache

    cache = Fp16Cache.for_model(model, max_positions=65536, batch_size=1)
    model.generate(**inputs, past_key_values=cache)

What is here, and how a forward pass goes through it:

1. The model asks for a mask. `_mask` is what transformers finds under this attention's name. A plain causal or sliding
   pattern needs no mask: attention over the cache is causal by itself. A 2D mask says which of the new tokens exist:
   `_Shared.plan` turns it into what the kernels take, the number of rows to append for each sequence, and checks that
   it says of the old tokens what it said before. Every other pattern is built as the 4D mask that it is.
2. Each layer calls `update`. With this attention it only hands the new rows on, in a `_NewRows`; with any other
   (eager, sdpa, flex, ...) it appends them and returns all keys and values, gathered, in the dtype that came in.
3. Each layer calls its attention, `_attention`: `append_attend` on the cache where it lies, or under a 4D mask
   masked attention over gathered keys and values.

A cache so holds real tokens only: padding is not stored. transformers counts columns of its token matrix, padding
included; `columns` is that number.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..cache import StreamingKVCacheFp16

NAME = "kvcache_ext"  # of the attention; transformers treats names with "flash", "sdpa" or "flex_attention" specially
OLDEST, NEWEST = (5, 17), (5, 23)  # the releases of transformers that this is written for and tested with
CROP_MARGIN = 128  # tokens that `crop` can take back from a sliding window layer


def _check_version() -> None:
    wanted = f"kvcache_ext.integrations.transformers needs transformers {OLDEST[0]}.{OLDEST[1]} to "
    wanted += f"{NEWEST[0]}.{NEWEST[1]}"
    install = f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{wanted}, and it cannot be imported ({error}): {install}") from error
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise ImportError(f"{wanted}, and this is transformers {transformers.__version__}: {install}")


_check_version()

from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

# What all layers of a cache share


class _LateCheck:
    """Looks at a flag on the device without waiting for it: a raised one is noticed a step later."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._done: Any = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins without a flag: events cannot be copied
        return _LateCheck, ()

    def raise_if_bad(self) -> None:
        if self._flag is None:
            return
        if self._done is not None:
            self._done.synchronize()  # of the step before; the device has the latest step still to do
        flag, self._flag = self._flag, None
        if flag.item():
            _mask_changed()

    def post(self, bad: Tensor) -> None:
        if not bad.is_cuda:
            self._flag = bad
            return
        self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._flag.copy_(bad, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()


def _mask_changed() -> NoReturn:
    raise ValueError(
        "Fp16Cache: attention_mask says something else of the tokens in the cache than it did when they were appended "
        "(padding is not stored, so it cannot come back, and what is stored cannot be hidden by a 2D mask); pass the "
        "mask of the whole text, old and new, or reset() the cache"
    )


@dataclass
class _Shared:
    """What the layers of one cache have in common. (Not the cache itself: a cycle would keep its memory alive.)"""

    batch_size: int
    max_positions: int
    config: Any  # of the model's attention modules: says which attention is in use
    precision: str
    compileable: bool
    active: int | None = None  # sequences in use; None before the first tokens
    # Which columns the layers with each window hold: bool [active, n]. None: all of them. Columns beyond n are held.
    records: dict[int | None, Tensor | None] = field(default_factory=dict)
    sequences: dict[torch.device, Tensor] = field(default_factory=dict)
    late: dict[int | None, _LateCheck] = field(default_factory=dict)
    refresh: Callable[[], None] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        memo[id(self.config)] = self.config  # it is the model's, whose attention may be changed later
        new = _Shared.__new__(_Shared)
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    @property
    def own_attention(self) -> bool:
        return self.config._attn_implementation == NAME

    def use_batch(self, batch: int) -> None:
        if self.active == batch:
            return
        if self.active is not None:
            raise ValueError(
                f"Fp16Cache: it holds {self.active} sequences, and these are {batch}; reset() it to begin anew"
            )
        if batch > self.batch_size:
            raise ValueError(
                f"Fp16Cache: {batch} sequences need batch_size={batch} or more at construction, got {self.batch_size} "
                "(beam search and num_return_sequences multiply the batch)"
            )
        self.set_active(batch)

    def slots(self, device: torch.device) -> dict[str, Any]:
        """The batch slots in use, as the cache's methods take them; nothing where all of them are."""
        if self.active == self.batch_size:
            return {}
        if device not in self.sequences:
            self.sequences[device] = torch.arange(self.active or 0, device=device)
        return {"sequences": self.sequences[device]}

    def set_active(self, active: int | None) -> None:
        self.active = active
        self.sequences.clear()

    def plan(self, mask: Tensor, seen: int, new: int, window: int | None, *, no_padding: bool = False) -> Tensor | None:
        """What a 2D mask `[B, seen + new]` means for the layers with this window.

        None: all new tokens exist. int32 `[B, 1, 1, 1]`: the last so many of each sequence do. int8 `[B, 1, 1, new]`:
        these do. (Four dimensions, because transformers takes those for a finished mask and passes them on.)

        On a GPU several tokens cost one synchronisation; one token costs none, and a mask that does not fit is then
        noticed at the next step. With `no_padding` a new token that does not exist is an error too.
        """
        late = self.late.setdefault(window, _LateCheck())
        late.raise_if_bad()
        if mask.shape[1] != seen + new:
            raise ValueError(
                f"Fp16Cache: attention_mask has {mask.shape[1]} columns, and the cache holds {seen} tokens and gets "
                f"{new} more: pass the mask of the whole text, old and new, or None if nothing is padding"
            )
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Fp16Cache: an attention_mask cannot be captured into a CUDA graph, as it grows with the text; pass "
                "attention_mask=None (new tokens of a decode step are never padding)"
            )
        mask = mask.bool()
        keep = mask[:, seen:]
        record = self.records.get(window)
        recorded = 0 if record is None else min(record.shape[1], seen)
        same = mask[:, recorded:seen].all()
        if record is not None:
            same = same & (mask[:, :recorded] == record[:, :recorded].to(mask.device)).all()
        if self.looks_late(mask) and new == 1:
            late.post(~(same & keep.all()) if no_padding else ~same)
            self.records[window] = mask.clone()
            return keep.to(torch.int32)[:, None, None]
        padded_left = (keep[:, 1:] >= keep[:, :-1]).all()
        same_, all_old, all_new, left = torch.stack([same, mask[:, :seen].all(), keep.all(), padded_left]).tolist()
        if not same_ or (no_padding and not all_new):
            _mask_changed()
        self.refresh()
        self.records[window] = None if all_old and all_new else mask.clone()
        if all_new:
            return None
        if left:
            return keep.sum(1, dtype=torch.int32)[:, None, None, None]
        return keep.to(torch.int8)[:, None, None]

    @staticmethod
    def looks_late(mask: Tensor) -> bool:
        """Whether looking at a mask on the host costs a synchronisation."""
        return mask.is_cuda

    def all_held_from(self, column: int, window: int | None) -> None:
        """That from this column on, the layers with this window hold all that came."""
        if is_compiling():  # no mask has been planned for it; and a record that grows would mean compiling anew
            return
        record = self.records.get(window)
        if record is not None:
            self.records[window] = record[:, :column]


# Masks


class _Columns(int):
    """A number of columns, and whose they are: how `_mask`, which is not told, learns of the cache."""

    shared: _Shared
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


def _mask(
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
    if is_compiling() and kv_offset < 0:  # ours: see `Fp16Layer.get_mask_sizes`
        window = -1 - kv_offset
        if local_size is None:
            plain = mask_function is causal_mask_function
        else:
            plain = mask_function.__name__ == "and_mask"  # closures are out of sight here
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
    if not isinstance(kv_length, _Columns):
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
        return None
    if shared.compileable and q_length == 1:
        # The same for every step, so that the compiled code is: what the last column says, without looking.
        return attention_mask[:, -1:].expand(batch_size, 1).to(torch.int32)[:, None, None].contiguous()
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


# Layers


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass be, and says that there is no backward one, instead of leaving out a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, source: Tensor) -> Tensor:
        return answer.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError("Fp16Cache: attention over it has no gradient; train without a cache (use_cache=False)")


def _without_gradient(answer: Tensor, source: Tensor) -> Tensor:
    if source.requires_grad and torch.is_grad_enabled() and not is_compiling():
        return _NoGradient.apply(answer, source)
    return answer


class _NewRows:
    """The new keys and values of a layer on their way from `update` to `_attention`, in the place of both."""

    def __init__(self, layer: Fp16Layer, key: Tensor, value: Tensor) -> None:
        self.layer = layer
        self.new_key = key
        self.new_value = value

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *arguments: Any, **options: Any) -> NoReturn:
        cls._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise RuntimeError(
            f"Fp16Cache: this model uses keys and values elsewhere than in the attention named {NAME!r}, or was not "
            "set to it; make the cache with attention=None, which gives the model gathered keys and values"
        )


class Fp16Layer(CacheLayerMixin):
    """One layer of an `Fp16Cache`: a layer of one of its `StreamingKVCacheFp16`."""

    is_croppable = True

    def __init__(self, shared: _Shared, cache: StreamingKVCacheFp16, index: int, window: int | None) -> None:
        super().__init__()
        self.shared = shared
        self.cache = cache
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_compileable = shared.compileable
        # A window's ring forgets what no query can see; only a shorter one has an end.
        self.bounded = window is None or cache.max_positions < window + CROP_MARGIN
        self.columns = 0  # that have gone through this layer, padding included
        self.first = 0  # at least this many of the oldest columns are gone from the ring
        self.is_initialized = True
        self.dtype, self.device, self.batch_size = torch.float16, cache.device, shared.batch_size

    def __repr__(self) -> str:
        return f"Fp16Layer({self.columns} columns, window={self.window})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache is there from the beginning."""

    # Lengths

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return self.shared.max_positions if self.bounded else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = 0 if self.window is None else max(self.columns - self.window + 1, 0)
        length = self.columns + query_length - offset
        if not self.shared.own_attention:
            return length, offset
        if is_compiling():  # where `_Columns` cannot pass; an offset that no other cache has says that it is ours
            return length, -1 - (self.window or 0)
        columns = _Columns(length)
        columns.shared, columns.window = self.shared, self.window
        return columns, offset

    def _check(self, batch: int, rows: int) -> None:
        self.shared.use_batch(batch)
        if self.bounded and self.columns + rows > self.cache.max_positions:
            raise ValueError(
                f"Fp16Cache: {self.columns} tokens are in the cache and {rows} more do not fit into "
                f"max_positions={self.shared.max_positions}; make a larger cache, or reset() this one"
            )

    def _advance(self, rows: int) -> None:
        self.columns += rows
        self.first = max(self.first, self.columns - self.cache.max_positions)

    # With this attention

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
    ) -> tuple[Tensor, Tensor | None]:
        """`query` `[B, T, Hq, D]`, `key`, `value` `[B, T, H, D]`: the answer, and the LSE if it is wanted."""
        batch, rows = query.shape[:2]
        self._check(batch, rows)
        if new_lengths is None:
            self.shared.all_held_from(self.columns, self.window)
        precision = self.shared.precision
        if precision == "auto":
            precision = "fp16" if query.dtype == torch.float16 else "fp32"
        # Within a window a long prompt goes in pieces, each of which looks at a ring instead of at the whole prompt.
        piece = rows if self.window is None else max(self.cache.max_positions, CROP_MARGIN)
        answers, lses = [], []
        for begin in range(0, rows, piece):
            part = slice(begin, min(begin + piece, rows))
            lengths = new_lengths
            if new_lengths is not None and piece < rows:
                lengths = (new_lengths - (rows - part.stop)).clamp(0, part.stop - begin)
            answer = self.cache.append_attend(
                self.index,
                query[:, part],
                key[:, part],
                value[:, part],
                new_lengths=lengths,
                scale=scale,
                window=self.window,
                softcap=softcap,
                return_lse=return_lse,
                precision=precision,
                **self.shared.slots(self.device),
            )
            if isinstance(answer, tuple):
                answers.append(answer[0])
                lses.append(answer[1])
            else:
                answers.append(answer)
        self._advance(rows)
        if len(answers) == 1:
            return answers[0], lses[0] if lses else None
        return torch.cat(answers, 1), torch.cat(lses, 1) if lses else None

    # With any other

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The new keys and values, `[B, H, T, D]`: handed on to this attention, or appended and all gathered."""
        if self.shared.own_attention:
            rows = _NewRows(self, key_states, value_states)
            return rows, rows
        return self.append_gather(key_states, value_states)

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends every row; the columns that `get_mask_sizes` spoke of, `[B, H, kv, D]` of the key's dtype."""
        batch, _, rows, _ = key.shape
        self._check(batch, rows)
        self.shared.all_held_from(self.columns, self.window)
        before = self.columns
        start = 0 if self.window is None else max(before - self.window + 1, 0)
        new_key, new_value = key.detach().transpose(1, 2), value.detach().transpose(1, 2)
        if before + rows - start <= self.cache.max_positions:
            self._append(new_key, new_value)
            parts = [self._gather(start, self.columns, key.dtype)]
        else:  # more than the ring can hold at once
            parts = [self._gather(start, before, key.dtype)]
            for begin in range(0, rows, self.cache.max_positions):
                part = slice(begin, min(begin + self.cache.max_positions, rows))
                self._append(new_key[:, part], new_value[:, part])
                parts.append(self._gather(before + part.start, before + part.stop, key.dtype))
        keys, values = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*parts, strict=True))
        return _without_gradient(keys, key).transpose(1, 2), _without_gradient(values, value).transpose(1, 2)

    def _append(self, key: Tensor, value: Tensor) -> None:
        self.cache.append(self.index, key, value, **self.shared.slots(self.device))
        self._advance(key.shape[1])

    def _gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Columns `[start, stop)`, `[B, n, H, D]`; zeros where a column was padding."""
        batch = self.shared.active or 1
        indices = torch.arange(start, stop, device=self.cache.device)
        record = self.shared.records.get(self.window)
        if record is None:
            indices = indices - self.first
        else:
            held = record[:, :stop].to(self.cache.device)
            if held.shape[1] < stop:
                held = torch.nn.functional.pad(held, (0, stop - held.shape[1]), value=True)
            first = self.cache._state[1, self.index, :batch, None]
            indices = torch.where(held, held.cumsum(1) - 1 - first, -1)[:, start:].contiguous()
        keys, values = self.cache.gather(self.index, indices, dtype=dtype, **self.shared.slots(self.device))
        shape = (batch, stop - start, self.cache.num_heads, self.cache.head_dim)
        return keys.view(shape), values.view(shape)

    # The rest of what transformers may call on a layer is done for whole groups of them, by the cache.

    def _by_the_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("Fp16Cache: layers share their storage; call this on the cache")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _by_the_cache

    def _stays(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"Fp16Cache: keys and values stay where they are allocated, on {self.device}: there is no offloading"
        )

    offload = prefetch = _stays


# Attention


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for this attention: `query` `[B, Hq, T, D]`; answers `[B, T, Hq, D]`."""
    if not isinstance(key, _NewRows):  # no cache, or another one
        return _other_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, options)
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    refused = [
        what
        for what, wrong in (
            ("attention that is not causal", not causal),
            ("dropout", dropout != 0.0),
            ("a position bias", options.get("position_bias") is not None),
            ("packed sequences", options.get("cu_seq_lens_q") is not None),
            ("attention weights (output_attentions)", bool(options.get("output_attentions"))),
        )
        if wrong
    ]
    if refused:
        raise NotImplementedError(
            f"Fp16Cache: {NAME!r} attention has no {refused[0]}; make the cache with attention=None, and set the "
            "model's attention to 'eager'"
        )
    layer = key.layer
    if attention_mask is not None and (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        keys, values = (x.to(query.dtype) for x in layer.append_gather(key.new_key, key.new_value))
        return _masked(query, keys, values, attention_mask, scaling, softcap, s_aux), None
    new_query, new_key, new_value = (x.detach().transpose(1, 2) for x in (query, key.new_key, key.new_value))
    new_lengths = order = None
    if attention_mask is not None:
        if attention_mask.dim() != 4 or attention_mask.dtype not in (torch.int32, torch.int8):
            raise ValueError(
                f"Fp16Cache: a mask of {attention_mask.dtype} and shape {list(attention_mask.shape)} reached the "
                "attention; pass the model a 2D mask, or a 4D one of bool or floating point"
            )
        if attention_mask.dtype == torch.int32:
            new_lengths = attention_mask.flatten()
        else:  # gaps among the new tokens: the real ones go to the end, in their order, and back again afterwards
            keep = attention_mask[:, 0, 0]
            new_lengths = keep.sum(1, dtype=torch.int32)
            order = keep.argsort(dim=1, stable=True)
            new_query, new_key, new_value = (_rows(x, order) for x in (new_query, new_key, new_value))
    answer, lse = layer.append_attend(
        new_query, new_key, new_value, new_lengths, scale=scaling, softcap=softcap, return_lse=s_aux is not None
    )
    if s_aux is not None and lse is not None:  # a learned logit beside the keys', which takes its share of the weights
        answer = answer * torch.sigmoid(lse - s_aux.float())[..., None].to(answer.dtype)
    if order is not None:
        answer = _rows(answer, order.argsort(dim=1))
    return _without_gradient(answer, query), None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """`x` `[B, T, H, D]` with the rows of each sequence in this order, `[B, T]`."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _masked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention under a 4D mask (bool, or added to the scores): `[B, heads, n, D]` to `[B, T, Hq, D]`."""
    if mask.dim() != 4 or mask.shape[-1] != keys.shape[2] or mask.shape[-2] not in (1, query.shape[2]):
        raise ValueError(
            f"Fp16Cache: an attention mask of shape {list(mask.shape)} does not fit {query.shape[2]} queries and "
            f"{keys.shape[2]} keys"
        )
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if softcap is None and s_aux is None:
        if mask.is_floating_point():
            mask = mask.to(query.dtype)
        answer = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        return answer.transpose(1, 2).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.float() @ keys.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    scores = scores + (torch.where(mask, 0.0, lowest) if mask.dtype == torch.bool else mask.float())
    if s_aux is not None:
        beside = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, beside], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.float()).to(query.dtype).transpose(1, 2).contiguous()


def _other_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention over plain tensors: a forward pass without a cache, or with another."""
    if mask is not None and mask.dtype in (torch.int8, torch.int32):
        raise RuntimeError("Fp16Cache: a mask that was prepared for an Fp16Cache reached attention without one")
    if softcap is None and s_aux is None:
        answer, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
        return answer, None
    if dropout != 0.0:
        raise NotImplementedError(f"{NAME!r} attention has no dropout beside a softcap or sinks; use 'eager'")
    if mask is None:
        rows, keys = query.shape[2], key.shape[2]
        mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    return _masked(query, key, value, mask, scaling, softcap, s_aux), None


# The name contains none of the words that transformers looks for, and is known to both registries: an attention without
# a mask function would get no mask at all.
ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


# The cache


@dataclass(frozen=True)
class _LayerPlan:
    device: torch.device
    capacity: int
    heads: int
    head_dim: int
    window: int | None

    @property
    def group(self) -> tuple[Any, ...]:
        # The window too, though it changes no storage: layers with equal windows hold the same tokens.
        return self.device, self.capacity, self.heads, self.head_dim, self.window


class Fp16Cache(Cache):
    """A transformers `Cache` whose keys and values are FP16 in preallocated memory, for models of any float dtype.

    Make one with `for_model`, and pass it as `past_key_values` to `generate` or to the model.
    """

    def __init__(self, layers: list[Fp16Layer], caches: list[StreamingKVCacheFp16], shared: _Shared) -> None:
        super().__init__(layers=layers)
        self.caches = caches
        self._shared = shared
        shared.refresh = _Refresh(caches)

    @classmethod
    def for_model(
        cls,
        model: Any,
        max_positions: int,
        batch_size: int = 1,
        *,
        attention: str | None = NAME,
        overflow: str = "saturate",
        precision: str = "auto",
        compileable: bool = False,
    ) -> Fp16Cache:
        """A cache for this model: shapes, windows and devices are the model's.

        Args:
            model: a decoder-only model of transformers, on its device or devices.
            max_positions: the longest text, in tokens. Sliding window layers take window + 128 positions at most.
            batch_size: the most sequences at a time. Beams count: batch times `num_beams`.
            attention: "kvcache_ext" sets the model to this package's attention, which reads the FP16 data where it lies
                (`model.set_attn_implementation("sdpa")` undoes that, also between two calls with the same cache). None
                leaves the model's attention alone: it then gets gathered keys and values of its own dtype, copied out
                at every step.
            overflow: what becomes of finite values beyond FP16's range: see `StreamingKVCacheFp16`.
            precision: of attention over many new tokens: "fp32"; "fp16" through torch's FP16 attention where that can
                serve; "auto" takes "fp16" for models in FP16.
            compileable: let `generate` compile the model by itself, as it does with `StaticCache`.

        Raises:
            NotImplementedError: the model has layers that such a cache cannot hold (see docs/transformers.md).
            MemoryError: it does not fit.
            TypeError, ValueError: an argument is wrong.
        """
        if attention not in (None, NAME):
            raise ValueError(f"Fp16Cache: attention must be {NAME!r} or None, got {attention!r}")
        if precision not in ("auto", "fp32", "fp16"):
            raise ValueError(f"Fp16Cache: precision must be 'auto', 'fp32' or 'fp16', got {precision!r}")
        plans, config = _plan_layers(model, max_positions)
        if attention is not None:
            _check_attention(model, plans)
        members: dict[tuple[Any, ...], list[int]] = {}
        for i, plan in enumerate(plans):
            members.setdefault(plan.group, []).append(i)
        shared = _Shared(batch_size, max_positions, config, precision, compileable)
        layers: list[Fp16Layer | None] = [None] * len(plans)
        caches = []
        for indices in members.values():
            first = plans[indices[0]]
            cache = StreamingKVCacheFp16(
                len(indices),
                first.capacity,
                first.heads,
                first.head_dim,
                batch_size=batch_size,
                device=first.device,
                overflow=overflow,
            )
            caches.append(cache)
            for position, i in enumerate(indices):
                layers[i] = Fp16Layer(shared, cache, position, plans[i].window)
        if attention is not None:
            model.set_attn_implementation(NAME)
            if config._attn_implementation != NAME:
                raise NotImplementedError(
                    f"Fp16Cache: the attention of {type(model).__name__} cannot be set; make the cache with "
                    "attention=None, which gives the model gathered keys and values"
                )
        return cls([layer for layer in layers if layer is not None], caches, shared)

    # Figures

    @property
    def batch_size(self) -> int:
        return self._shared.batch_size

    def memory_bytes(self) -> int:
        """Bytes of keys and values, all layers together."""
        return sum(cache.memory_bytes() for cache in self.caches)

    def overflow_counts(self) -> Tensor:
        """Finite values that FP16 could not hold, by layer: int64 on the CPU (so this waits for the device)."""
        counts = {id(cache): cache.overflow_counts().cpu() for cache in self.caches}
        return torch.stack([counts[id(layer.cache)][layer.index] for layer in self.layers])

    def __repr__(self) -> str:
        windows = sorted({layer.window for layer in self.layers if layer.window is not None})
        return (
            f"Fp16Cache({len(self.layers)} layers, max_positions={self._shared.max_positions}, "
            f"batch_size={self.batch_size}, windows={windows}, {self.memory_bytes() / 1e6:.1f} MB, "
            f"{self.get_seq_length()} tokens)"
        )

    # What generation does to a cache

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of columns that a mask of this layer has, and the first of them. Asked at each forward pass."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        if not is_compiling():
            counts = {layer.columns for layer in self.layers}
            if len(counts) != 1:
                raise RuntimeError(
                    f"Fp16Cache: its layers hold from {min(counts)} to {max(counts)} tokens, as after a forward pass "
                    "that was broken off; reset() it"
                )
        return sizes

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        for cache in self.caches:
            cache.clear()
        for layer in self.layers:
            layer.columns = layer.first = 0
        self._shared.records.clear()
        self._shared.set_active(None)
        self._shared.late.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest `-tokens_to_remove` tokens back: assisted decoding's rejected ones.

        Raises:
            ValueError: the number is positive, more than there are tokens, or more than the ring of a sliding window
                layer can take back (128, once it is full). The cache is unchanged.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(
                f"Fp16Cache: crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}"
            )
        if count == 0:
            return
        for layer in self.layers:
            left = layer.columns - count
            if left < 0:
                raise ValueError(f"Fp16Cache: crop({tokens_to_remove}) of {layer.columns} tokens")
            if layer.window is not None and layer.first > max(left - layer.window + 1, 0):
                raise ValueError(
                    f"Fp16Cache: crop({tokens_to_remove}): a full ring of a sliding window layer can take back "
                    f"{CROP_MARGIN} tokens; reset() the cache and prefill the text anew"
                )
        shared = self._shared
        left = self.layers[0].columns - count
        for cache in self.caches:
            layer = next(layer for layer in self.layers if layer.cache is cache)
            record = shared.records.get(layer.window)
            if record is None:
                cache.truncate(left - layer.first, **shared.slots(cache.device))
            else:
                removed = record[:, left:].sum(1) + count - max(record.shape[1] - left, 0)
                held = (cache._state[0] - cache._state[1])[0, : shared.active]
                cache.truncate(held - removed.to(cache.device), **shared.slots(cache.device))
        for layer in self.layers:
            layer.columns = left
            shared.all_held_from(left, layer.window)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, beside each other. `batch_size` must have room for them."""
        active = self._shared.active
        if active is None:
            return
        if active * repeats > self.batch_size:
            raise ValueError(
                f"Fp16Cache: {active} sequences {repeats} times need batch_size={active * repeats} at construction, "
                f"got {self.batch_size}"
            )
        self._take(torch.arange(active).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences, in this order."""
        if self._shared.active is not None:
            self._take(torch.arange(self._shared.active)[torch.as_tensor(indices).cpu()])

    def _take(self, indices: Tensor) -> None:
        shared = self._shared
        if shared.active is None:
            return
        indices = torch.as_tensor(indices)
        rest = torch.arange(len(indices), self.batch_size, device=indices.device)
        whole = torch.cat([indices.long(), rest])
        for cache in self.caches:
            cache.reorder(whole.to(cache.device))
        for window, record in shared.records.items():
            if record is not None:
                shared.records[window] = record[indices.to(record.device)]
        shared.set_active(len(indices))

    # CUDA graphs

    def decode_graph(self, model: Any, *, compile: bool = False) -> DecodeGraph:
        """One decode step of `model` with this cache as a CUDA graph: see `DecodeGraph`."""
        return DecodeGraph(model, self, compile=compile)

    @contextmanager
    def cuda_graphs(self, model: Any, *, compile: bool = False) -> Iterator[None]:
        """Within this block `model` (and so `model.generate`) runs its one-token steps as a replayed CUDA graph.

            with cache.cuda_graphs(model):
                model.generate(**inputs, past_key_values=cache)

        Prefill and everything else runs as it always does. `compile`: see `DecodeGraph`. On a CPU there is no graph.
        """
        graph: DecodeGraph | None = None
        original, own = model.forward, model.__dict__.get("forward")

        @functools.wraps(original)  # generate() reads the signature to know what to pass
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal graph
            ids: Any = kwargs.get("input_ids")
            mask: Any = kwargs.get("attention_mask")
            one_token = not args and ids is not None and ids.dim() == 2 and ids.shape[1] == 1
            plain = not any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states", "labels"))
            known = kwargs.get("past_key_values") is self and self._shared.active == (ids.shape[0] if one_token else 0)
            known = known and kwargs.get("inputs_embeds") is None and self._shared.own_attention
            if not (one_token and plain and known and (mask is None or mask.dim() == 2)):
                return original(*args, **kwargs)
            if graph is None:
                graph = DecodeGraph(model, self, compile=compile, forward=original)
            if mask is not None:
                for window in {layer.window for layer in self.layers}:
                    self._shared.plan(mask.to(ids.device), self.get_seq_length(), 1, window, no_padding=True)
            logits = graph(ids, kwargs.get("position_ids"))
            return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=self)

        model.forward = forward
        try:
            yield
        finally:
            del model.forward
            if own is not None:
                model.forward = own


class _Refresh:
    """Reads lengths that only the device knows, so that a long prompt goes through what is held and not all slots."""

    def __init__(self, caches: list[StreamingKVCacheFp16]) -> None:
        self.caches = caches

    def __call__(self) -> None:
        for cache in self.caches:
            len(cache)


class DecodeGraph:
    """One decode step of a model with its `Fp16Cache`, captured once in a CUDA graph and replayed for each token.

        step = cache.decode_graph(model)          # after the prefill
        logits = step(token)                      # token: int64 [B, 1]; logits: [B, 1, vocabulary]

    The logits are overwritten by the next step. A token's position is the number of tokens held, padding not counted,
    as `generate` has it, unless `position_ids` says otherwise. Lengths move on the device; `get_seq_length()` is kept
    right by counting replays. The cache must outlive this object.

    Capturing runs the step a few times and takes those back, for which the cache must have room. With `compile` the
    step goes through torch.compile first, which fuses what lies between the matrix products. On a CPU there is no
    graph: each call is the step itself.
    """

    def __init__(
        self,
        model: Any,
        cache: Fp16Cache,
        *,
        compile: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        shared = cache._shared
        if not shared.own_attention:
            used = shared.config._attn_implementation
            raise ValueError(f"DecodeGraph: the model's attention must be {NAME!r}, got {used!r}")
        if shared.active is None:
            raise ValueError("DecodeGraph: run the prompt through the model first")
        devices = {layer.device for layer in cache.layers}
        if len(devices) != 1:
            raise NotImplementedError("DecodeGraph: one CUDA graph cannot hold a model on several devices")
        self._forward = model if forward is None else forward
        if compile:
            self._forward = torch.compile(self._forward)
        self._cache = cache
        self._batch = shared.active
        device = devices.pop()
        self._ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(self._batch, 1, dtype=torch.int64, device=device)
        self._graph: Any = None
        self._logits: Tensor | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture(device)

    @torch.no_grad()
    def _step(self) -> Tensor:
        out = self._forward(
            input_ids=self._ids,
            position_ids=self._positions,
            attention_mask=None,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        return out.logits

    def _capture(self, device: torch.device) -> None:
        warmups = 3  # compiled code is there at the third: lengths are constants to the first, and not to the second
        layers = self._cache.layers
        for layer in layers:
            layer._check(self._batch, warmups)
        counts = [cache.overflow_counts() for cache in self._cache.caches]
        self._positions.copy_(self._held())
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(warmups):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._cache.crop(-warmups)
        for cache, count in zip(self._cache.caches, counts, strict=True):
            cache._overflow_counts.copy_(count)
        before = [(layer.columns, layer.first) for layer in layers]
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._logits = self._step()
        finally:  # a capture runs nothing on the device
            for layer, (columns, first) in zip(layers, before, strict=True):
                layer.columns, layer.first = columns, first

    def _held(self) -> Tensor:
        """How many tokens each sequence has: the next one's position, `[B, 1]`."""
        return self._cache.caches[0].cache_seqlens[self._cache.layers[0].index, : self._batch, None]

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        shared = self._cache._shared
        if shared.active != self._batch or input_ids.shape != self._ids.shape:
            raise ValueError(
                f"DecodeGraph: it steps {self._batch} sequences by one token each, got input_ids of shape "
                f"{list(input_ids.shape)} and a cache that holds {shared.active}"
            )
        for layer in self._cache.layers:
            layer._check(self._batch, 1)
        self._ids.copy_(input_ids)
        self._positions.copy_(self._held() if position_ids is None else position_ids)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        for layer in self._cache.layers:
            layer._advance(1)
        assert self._logits is not None
        return self._logits


# What a model is made of


def _plan_layers(model: Any, max_positions: int) -> tuple[list[_LayerPlan], Any]:
    """What each layer needs, and the configuration that its attention looks at; raises where a cache cannot serve."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"Fp16Cache: model must be a model of transformers, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"Fp16Cache: {name} is an encoder-decoder model; only decoders are supported")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(
            f"Fp16Cache: {name} has multi-head latent attention, whose keys and values differ in size"
        )
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise NotImplementedError(f"Fp16Cache: {name} has layers that share the keys and values of others")
    if getattr(text, "cross_attention_layers", None):
        raise NotImplementedError(f"Fp16Cache: {name} has cross-attention layers")
    if not isinstance(max_positions, int) or isinstance(max_positions, bool) or max_positions < 1:
        raise ValueError(f"Fp16Cache: max_positions must be a positive int, got {max_positions!r}")

    modules = _attention_modules(model, text.num_hidden_layers)
    plans = []
    for i, layer_type in enumerate(_layer_types(text)):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(
                f"Fp16Cache: layer {i} of {name} is of type {layer_type!r}; only 'full_attention' and "
                "'sliding_attention' layers can be held"
            )
        module = modules.get(i)
        layer_config = getattr(text, "per_layer_config", None)
        layer_config = text if layer_config is None else layer_config[i]
        heads = getattr(layer_config, "num_key_value_heads", None) or layer_config.num_attention_heads
        head_dim = getattr(layer_config, "head_dim", None)
        head_dim = head_dim or layer_config.hidden_size // layer_config.num_attention_heads
        if module is not None:
            head_dim = module.head_dim if isinstance(getattr(module, "head_dim", None), int) else head_dim
            sizes = [getattr(getattr(module, part, None), "out_features", None) for part in ("k_proj", "v_proj")]
            if isinstance(sizes[0], int) and sizes[0] % head_dim == 0:
                heads = sizes[0] // head_dim
            if None not in sizes and sizes[0] != sizes[1]:
                raise NotImplementedError(f"Fp16Cache: layer {i} of {name} has keys and values of different sizes")
        window = None
        capacity = max_positions
        if layer_type == "sliding_attention":
            window = layer_config.sliding_window
            if window is None:
                raise NotImplementedError(f"Fp16Cache: layer {i} of {name} has a sliding window of no size")
            capacity = min(max_positions, window + CROP_MARGIN)
        plans.append(_LayerPlan(_device(model, module), capacity, heads, head_dim, window))
    configs = [module.config for module in modules.values() if hasattr(module, "config")]
    return plans, configs[0] if configs else text


def _layer_types(text: Any) -> list[str]:
    given = getattr(text, "layer_types", None)
    if given is not None:
        return list(given)
    if getattr(text, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    else:
        kind = "full_attention"
    return [kind] * text.num_hidden_layers


def _attention_modules(model: Any, layers: int) -> dict[int, Any]:
    """The attention module of each layer, as far as they are to be found."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: dict[int, Any] = {}
    for module in (root or model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers and hasattr(module, "head_dim") and index not in found:
            found[index] = module
    return found


def _device(model: Any, module: Any) -> torch.device:
    """Where a layer computes."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        parameter = None if module is None else next(module.parameters(), None)
        device = model.device if parameter is None else parameter.device
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"Fp16Cache: the model must be on a CPU or a CUDA device, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _check_attention(model: Any, plans: list[_LayerPlan]) -> None:
    instead = "make the cache with attention=None, which gives the model gathered keys and values"
    for i, plan in enumerate(plans):
        if plan.head_dim % 8 or plan.head_dim > 512:
            raise NotImplementedError(
                f"Fp16Cache: {NAME!r} attention needs a head_dim that is a multiple of 8, at most 512, and layer {i} "
                f"has {plan.head_dim}; {instead}"
            )
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(
            f"Fp16Cache: {type(model).__name__} does not take attention from transformers' registry; {instead}"
        )
