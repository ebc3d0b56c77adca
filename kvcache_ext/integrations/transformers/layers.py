"""A layer: what a model's own layer appends to and attends to."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin

from .groups import LayerGroup
from .laid_out import as_handed_over, as_stored
from .layer_plan import LayerPlan
from .protocol import PendingKeyValues, TaggedLength, mask_of_left_padding, offset_of_window
from .shared import SharedState
from .version import CROP_MARGIN


class _NoGradient(torch.autograd.Function):
    """Its backward pass is an error. Without it, a part of the gradient would be missing silently."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, source: Tensor) -> Tensor:
        return answer.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError("Fp16Cache: attention over it has no gradient; train without a cache (use_cache=False)")


def without_gradient(answer: Tensor, source: Tensor) -> Tensor:
    """Returns `answer`. If `source`, from which it was computed, requires grad, a backward pass through it raises."""
    if source.requires_grad and torch.is_grad_enabled() and not is_compiling():
        return _NoGradient.apply(answer, source)
    return answer


def copied_with_the_cache(layer: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a layer, as a part of a copy of its cache."""
    if id(layer.shared) not in memo:
        raise NotImplementedError(
            "Fp16Cache: a layer cannot be copied without its cache, as the copy would be left out when tokens are "
            "taken back, forgotten or put in another order; copy the whole cache"
        )
    kind: Any = type(layer)
    new = kind.__new__(kind)
    memo[id(layer)] = new
    new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in layer.__dict__.items()})
    return new


def belongs_to_the_cache(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("Fp16Cache: layers share their storage; call this on the cache")


class Fp16Layer(CacheLayerMixin):
    """One layer of an `Fp16Cache`: a layer of one of its `StreamingKVCacheFp16`."""

    is_croppable = True

    def __init__(self, shared: SharedState, cache: LayerGroup, index: int, plan: LayerPlan) -> None:
        window = plan.window
        self.shared = shared
        self.chunked = plan.chunked
        self.widths = plan.key_dim, plan.value_dim  # as the model has them
        self.shard = plan.shard
        self.cache = cache
        self.index = index  # of this layer in `cache`
        self.window = window
        self.is_sliding = window is not None
        self.is_compileable = shared.compileable
        # Whether max_positions is the end. A ring that holds a whole window goes round: no query sees what it forgets.
        self.bounded = window is None or cache.max_positions < window + CROP_MARGIN
        shared.bounded = shared.bounded or self.bounded
        # The most new tokens at a time, where other layers attend to them again when they are stored.
        self.most_new = cache.max_positions - window + 1 if window is not None and plan.attended_again else None
        self.columns = 0  # that have gone through this layer, padding included
        # The ring holds all columns from this one on. Of texts with padding it may hold older ones, too.
        self.first_held = 0
        self.dtype, self.device, self.batch_size = torch.float16, cache.device, shared.batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.columns} columns, window={self.window})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied_with_the_cache(self, memo)

    @property
    def is_initialized(self) -> bool:
        """Whether it holds something. Models ask this to tell a text's first pass from the others."""
        return self.columns > 0

    @property
    def keys(self) -> Tensor | None:
        """A copy of what it holds: FP16 `[B, H, n, D]`, zeros in padding. With a window: what the next token sees."""
        return self._held(0)

    @property
    def values(self) -> Tensor | None:
        return self._held(1)

    def _held(self, which: int) -> Tensor | None:
        self.shared.append_pending()
        if self.columns == 0:
            return None
        return self._gather(self._first_visible(), self.columns, torch.float16)[which]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache is there from the beginning."""

    # Lengths

    def get_seq_length(self) -> int:
        if not is_compiling():
            self.shared.append_pending()
        return self.columns

    def get_max_length(self) -> int:
        return self.shared.max_positions if self.bounded else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns a mask of the next `query_length` tokens has, and the first of them: see protocol.py."""
        length, offset = self.gathered_columns(query_length), self._first_visible()
        if not self.shared.own_attention:
            return length, offset
        if is_compiling():
            if self.chunked:
                raise NotImplementedError(
                    "Fp16Cache: compiled code cannot serve chunked attention; do not compile, or make the cache with "
                    "attention=None"
                )
            return length, offset_of_window(self.window)
        return TaggedLength.of(self, length), offset

    def mask_for(self, attention_mask: Tensor | None, columns: int, new_tokens: int) -> Tensor | None:
        """What a 2D mask `[B, columns + T]` means for this layer: see protocol.py."""
        shared = self.shared
        if attention_mask is None:
            shared.raise_deferred_errors()
            return None
        if shared.compileable and new_tokens == 1:
            shared.padding.record_last_column(attention_mask, columns, self.window)
            # Of the same dtype and shape at every step, and without looking: what compiled code needs.
            return mask_of_left_padding(attention_mask[:, -1:])
        if columns:
            shared.use_sequences(attention_mask.shape[0], columns)
        return shared.padding.mask_for(attention_mask, columns, new_tokens, self.window)

    def check_room(self, batch: int, new_tokens: int) -> None:
        """Raises if any layer has no room for so many new tokens, so before the first layer has stored them."""
        if self.shared.bounded and self.columns + new_tokens > self.shared.max_positions:
            raise ValueError(
                f"Fp16Cache: {self.columns} tokens are in the cache and {new_tokens} more do not fit into "
                f"max_positions={self.shared.max_positions}; make a larger cache, or reset() this one"
            )
        if self.most_new is not None and new_tokens > self.most_new:
            raise ValueError(
                f"Fp16Cache: {new_tokens} new tokens at a time are more than the {self.most_new} that a sliding window "
                "layer can take whose keys and values other layers share; make a cache with a larger max_positions, or "
                "feed them in parts"
            )
        self.shared.use_sequences(batch, self.columns)

    def advance(self, new_tokens: int) -> None:
        self.columns += new_tokens
        self.first_held = max(self.first_held, self.columns - self.cache.max_positions)

    # What `attend` calls, besides `append_gather`

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
        """`query` `[B, T, Hq, D]`, `key`, `value` `[B, T, H, D]`: the answer, and the LSE if it is wanted.

        `new_lengths`: int32 `[B]`, how many of the last new tokens are real; None: all. `update` has checked the room.
        """
        new_tokens = query.shape[1]
        key, value = as_stored(key, value)
        if new_lengths is None:
            self.shared.padding.all_real_from(self.columns, self.window)
        answer = self.cache.storage.append_attend(
            self.cache,
            self.index,
            query,
            key,
            value,
            new_lengths=new_lengths,
            scale=scale,
            window=self.window,
            softcap=softcap,
            return_lse=return_lse,
            precision=self._precision(query),
            **self.shared.sequences_argument(self.device),
        )
        self.advance(new_tokens)
        return answer if isinstance(answer, tuple) else (answer, None)

    def attend_again(
        self, query: Tensor, *, scale: float | None, softcap: float | None, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`append_attend` for another layer, with the same keys and values, after the call that stored them."""
        answer = self.cache.storage.attend(
            self.cache,
            self.index,
            query,
            scale=scale,
            window=self.window,
            softcap=softcap,
            return_lse=return_lse,
            precision=self._precision(query),
            **self.shared.sequences_argument(self.device),
        )
        return answer if isinstance(answer, tuple) else (answer, None)

    def _precision(self, query: Tensor) -> str:
        if self.shared.precision != "auto":
            return self.shared.precision
        return "fp32" if query.dtype == torch.float32 else "fp16"

    # New keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What a model's layer does with its new keys and values `[B, H, T, D]`.

        With this attention it gets a `PendingKeyValues`, twice, to hand to `attend`. With any other they are appended,
        and it gets all keys and values, gathered, in the dtype that came in.
        """
        shared = self.shared
        if is_compiling():
            self.check_room(key_states.shape[0], key_states.shape[2])
        else:
            shared.append_pending()
            self._check_new(key_states, value_states)
        if not shared.own_attention:
            return self.append_gather(key_states, value_states)
        in_pass = not is_compiling() and shared.current_pass is not None
        pending = PendingKeyValues(self, key_states, value_states, in_pass=in_pass)
        if not is_compiling():
            shared.pending = pending
        return pending, pending

    def drop_pending(self) -> None:
        """Forgets what `update` handed out: attention has taken it, or it was used in a wrong place."""
        self.shared.pending = None

    def note_masked_step(self) -> None:
        """Attention is about to go over gathered keys under a 4D mask, whose columns a CUDA graph would keep."""
        if not is_compiling():
            self.shared.masked_calls += 1

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        """Raises before anything of a layer is stored: wrong shapes, no room, or not this layer's turn in the pass."""
        heads = self.cache.num_heads
        for name, tensor, head_dim in (("keys", key, self.widths[0]), ("values", value, self.widths[1])):
            if tensor.dim() != 4 or tensor.shape[1] != heads or tensor.shape[3] != head_dim:
                raise ValueError(
                    f"Fp16Cache: {name} of a layer must be [B, {heads}, T, {head_dim}], as the cache was made for such "
                    f"heads, got {list(tensor.shape)}"
                )
        new_tokens = key.shape[2]
        self.check_room(key.shape[0], new_tokens)
        begun = self.shared.current_pass
        if begun is None:
            return
        if self.columns != begun.columns or new_tokens != (begun.new_tokens or new_tokens):
            others = "" if begun.new_tokens is None else f", and those of {begun.new_tokens} to layers before it"
            raise RuntimeError(
                f"Fp16Cache: a forward pass that began with {begun.columns} tokens hands keys and values of "
                f"{new_tokens} more to a layer that holds {self.columns}{others}: only a text's own keys and values, "
                "of each layer once, can be stored, and none of an image or an encoder; reset() the cache"
            )
        begun.new_tokens = new_tokens

    def append_pending(self, pending: PendingKeyValues) -> None:
        """Appends what `update` handed out and no attention took: a past made by hand."""
        pending.appended = True
        new_key, new_value = (x.detach().transpose(1, 2) for x in (pending.new_key, pending.new_value))
        key, value = as_stored(new_key, new_value)
        self.shared.padding.all_real_from(self.columns, self.window)
        self._append(key, value)

    def gathered_columns(self, new_tokens: int) -> int:
        """How many columns `append_gather` returns for so many new tokens."""
        return self.columns + new_tokens - self._first_visible()

    def _first_visible(self) -> int:
        """The first column that the next token sees."""
        return 0 if self.window is None else max(self.columns - self.window + 1, 0)

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends all new tokens, padding too, and gathers as many columns as `get_mask_sizes` returned.

        `key`, `value`: `[B, H, T, D]`. Returns keys and values `[B, H, columns, D]` in the key's dtype.
        """
        new_tokens = key.shape[2]
        self.shared.padding.all_real_from(self.columns, self.window)
        before = self.columns
        start = self._first_visible()
        new_key, new_value = as_stored(key.detach().transpose(1, 2), value.detach().transpose(1, 2))
        if before + new_tokens - start <= self.cache.max_positions:
            self._append(new_key, new_value)
            keys, values = self._gather(start, self.columns, key.dtype)
        else:  # more than the ring can hold at once
            parts = [self._gather(start, before, key.dtype)]
            for begin in range(0, new_tokens, self.cache.max_positions):
                part = slice(begin, min(begin + self.cache.max_positions, new_tokens))
                self._append(new_key[:, part], new_value[:, part])
                parts.append(self._gather(before + part.start, before + part.stop, key.dtype))
            keys, values = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return without_gradient(keys, key), without_gradient(values, value)

    def gather_again(self, new_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `append_gather` returned for the newest tokens, for another layer."""
        start = 0 if self.window is None else max(self.columns - new_tokens - self.window + 1, 0)
        return self._gather(start, self.columns, dtype)

    def _append(self, key: Tensor, value: Tensor) -> None:
        self.cache.storage.append(self.cache, self.index, key, value, **self.shared.sequences_argument(self.device))
        self.advance(key.shape[1])

    def _gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Columns `[start, stop)`, contiguous `[B, H, n, D]`; zeros where a column is padding."""
        batch = self.shared.active or 1
        indices = torch.arange(start, stop, device=self.cache.device)
        real = self.shared.padding.real_columns(self.window, stop)
        oldest_held = self.cache.tensors.state[1, self.index, :batch, None]
        if real is not None:
            real = real.to(self.cache.device)
            indices = torch.where(real, real.cumsum(1) - 1 - oldest_held, -1)[:, start:].contiguous()
        elif self.first_held:
            indices = indices - oldest_held  # `first_held` would not do: see there
        shape = (batch, self.cache.num_heads, stop - start, self.cache.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=self.cache.device) for _ in range(2))
        out = keys.transpose(1, 2), values.transpose(1, 2)
        sequences = self.shared.sequences_argument(self.device)
        if self.cache.ranks > 1:
            self.shared.compare_ranks()
        self.cache.gather(self.index, indices, dtype=dtype, out=out, **sequences)
        return as_handed_over(keys, values, self.widths)

    # The cache does the rest of what transformers may call on a layer: its layers share their memory.

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = belongs_to_the_cache

    def _stays(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"Fp16Cache: keys and values stay where they are allocated, on {self.device}: there is no offloading"
        )

    offload = prefetch = _stays


class AbsentLayer(Fp16Layer):
    """A layer that another stage of a pipeline has. It has no memory, and the counts of a layer that is `beside` it."""

    def __init__(self, beside: Fp16Layer, plan: LayerPlan) -> None:
        window = plan.window
        self.beside = beside
        self.shared, self.cache, self.index = beside.shared, beside.cache, beside.index
        self.window, self.widths, self.most_new = window, (plan.key_dim, plan.value_dim), None
        self.chunked = plan.chunked
        self.is_sliding, self.is_compileable, self.bounded = window is not None, beside.is_compileable, False
        self.dtype, self.device, self.batch_size = beside.dtype, beside.device, beside.batch_size

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.beside.columns

    @columns.setter
    def columns(self, value: int) -> None: ...

    @property
    def first_held(self) -> int:  # type: ignore[override]
        return 0

    @first_held.setter
    def first_held(self, value: int) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "Fp16Cache: the model that it was made for has no such layer, and so there is no memory for it"
        )

    def _held(self, which: int) -> None:
        return None
