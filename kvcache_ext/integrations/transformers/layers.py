"""A layer: what a model's own layer appends to and attends to."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin

from ...cache import StreamingKVCacheFp16
from .groups import LayerGroup
from .masks import Columns
from .shared import Shared
from .version import CROP_MARGIN, NAME


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass be, and says that there is no backward one, instead of leaving out a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, source: Tensor) -> Tensor:
        return answer.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError("Fp16Cache: attention over it has no gradient; train without a cache (use_cache=False)")


def without_gradient(answer: Tensor, source: Tensor) -> Tensor:
    if source.requires_grad and torch.is_grad_enabled() and not is_compiling():
        return _NoGradient.apply(answer, source)
    return answer


class NewRows:
    """The new keys and values of a layer on their way from `update` to `attend`, in the place of both."""

    def __init__(self, layer: Fp16Layer, key: Tensor, value: Tensor) -> None:
        self.layer = layer
        self.new_key = key
        self.new_value = value
        self.of_a_pass = not is_compiling() and layer.shared.passing is not None
        self.appended = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> NoReturn:
        for value in (*arguments, *(options or {}).values()):
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, NewRows):
                    each._refuse()
        raise RuntimeError("Fp16Cache: keys and values of a layer were used in a place that is not known")

    def _refuse(self) -> NoReturn:
        self.layer.shared.handed_out = None  # not to be appended, after this error
        raise RuntimeError(
            f"Fp16Cache: this model uses keys and values elsewhere than in the attention named {NAME!r}, or was not "
            "set to it; make the cache with for_model for this very model, or with attention=None, which gives it "
            "gathered keys and values"
        )


def _of_one_dtype(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast rotated keys are FP32 and values are not."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    return key.to(dtype), value.to(dtype)


class Fp16Layer(CacheLayerMixin):
    """One layer of an `Fp16Cache`: a layer of one of its `StreamingKVCacheFp16`."""

    is_croppable = True

    def __init__(self, shared: Shared, cache: LayerGroup, index: int, window: int | None) -> None:
        self.shared = shared
        self.cache = cache
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_compileable = shared.compileable
        # A window's ring forgets what no query can see; only a shorter one has an end.
        self.bounded = window is None or cache.max_positions < window + CROP_MARGIN
        shared.bounded = shared.bounded or self.bounded
        self.columns = 0  # that have gone through this layer, padding included
        self.first = 0  # at most this many of the oldest columns are gone from the ring (fewer where some were padding)
        self.dtype, self.device, self.batch_size = torch.float16, cache.device, shared.batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.columns} columns, window={self.window})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp16Layer:
        if id(self.shared) not in memo:
            raise NotImplementedError(
                "Fp16Cache: a layer cannot be copied without its cache, as the copy would be left out when tokens are "
                "taken back, forgotten or put in another order; copy the whole cache"
            )
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    @property
    def is_initialized(self) -> bool:
        """Whether it holds something: models ask that, to tell the first pass of a text from the others."""
        return self.columns > 0

    @property
    def keys(self) -> Tensor | None:
        """A copy of what it holds: FP16 `[B, H, n, D]`, zeros in padding. Of a window what the next token sees."""
        return self._held(0)

    @property
    def values(self) -> Tensor | None:
        return self._held(1)

    def _held(self, which: int) -> Tensor | None:
        self.shared.settle()
        if self.columns == 0:
            return None
        return self._gather(self.columns - self.gathered(0), self.columns, torch.float16)[which]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache is there from the beginning."""

    # Lengths

    def get_seq_length(self) -> int:
        if not is_compiling():
            self.shared.settle()
        return self.columns

    def get_max_length(self) -> int:
        return self.shared.max_positions if self.bounded else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = 0 if self.window is None else max(self.columns - self.window + 1, 0)
        length = self.columns + query_length - offset
        if not self.shared.own_attention:
            return length, offset
        if is_compiling():  # where `Columns` cannot pass; an offset that no other cache has says that it is ours
            return length, -1 - (self.window or 0)
        columns = Columns(length)
        columns.shared, columns.window = self.shared, self.window
        return columns, offset

    def _check(self, batch: int, rows: int) -> None:
        """For all layers, so that the first of them refuses what a later one has no room for."""
        if self.shared.bounded and self.columns + rows > self.shared.max_positions:
            raise ValueError(
                f"Fp16Cache: {self.columns} tokens are in the cache and {rows} more do not fit into "
                f"max_positions={self.shared.max_positions}; make a larger cache, or reset() this one"
            )
        self.shared.use_batch(batch, self.columns)

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
        """`query` `[B, T, Hq, D]`, `key`, `value` `[B, T, H, D]`: the answer, and the LSE if it is wanted.

        `update` has checked that there is room.
        """
        rows = query.shape[1]
        key, value = _of_one_dtype(key, value)
        if new_lengths is None:
            self.shared.all_held_from(self.columns, self.window)
        precision = self.shared.precision
        if precision == "auto":
            precision = "fp32" if query.dtype == torch.float32 else "fp16"
        answer = StreamingKVCacheFp16.append_attend(
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
            precision=precision,
            **self.shared.slots(self.device),
        )
        self._advance(rows)
        return answer if isinstance(answer, tuple) else (answer, None)

    # With any other

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The new keys and values, `[B, H, T, D]`: handed on to this attention, or appended and all gathered."""
        if is_compiling():
            self._check(key_states.shape[0], key_states.shape[2])
            rows = NewRows(self, key_states, value_states) if self.shared.own_attention else None
            return (rows, rows) if rows is not None else self.append_gather(key_states, value_states)
        self.shared.settle()
        self._check_new(key_states, value_states)
        if not self.shared.own_attention:
            return self.append_gather(key_states, value_states)
        self.shared.handed_out = NewRows(self, key_states, value_states)
        return self.shared.handed_out, self.shared.handed_out

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        """Before anything of a layer is stored, and in a forward pass also whether it is the layer's turn."""
        heads, head_dim = self.cache.num_heads, self.cache.head_dim
        for name, tensor in (("keys", key), ("values", value)):
            if tensor.dim() != 4 or tensor.shape[1] != heads or tensor.shape[3] != head_dim:
                raise ValueError(
                    f"Fp16Cache: {name} of a layer must be [B, {heads}, T, {head_dim}], as the cache was made for such "
                    f"heads, got {list(tensor.shape)}"
                )
        rows = key.shape[2]
        self._check(key.shape[0], rows)
        passing = self.shared.passing
        if passing is None:
            return
        if self.columns != passing.columns or rows != (passing.rows or rows):
            raise RuntimeError(
                f"Fp16Cache: a forward pass that began with {passing.columns} tokens hands keys and values of {rows} "
                f"more to a layer that holds {self.columns}"
                + ("" if passing.rows is None else f", and those of {passing.rows} to layers before it")
                + ": only a text's own keys and values, of each layer once, can be stored, and none of an image or an "
                "encoder; reset() the cache"
            )
        passing.rows = rows

    def append_rows(self, rows: NewRows) -> None:
        """Appends what was handed out, and attended to by nobody: a past made by hand."""
        rows.appended = True
        key, value = _of_one_dtype(rows.new_key.detach().transpose(1, 2), rows.new_value.detach().transpose(1, 2))
        self.shared.all_held_from(self.columns, self.window)
        self._append(key, value)

    def gathered(self, rows: int) -> int:
        """How many columns `append_gather` gives for so many new rows."""
        start = 0 if self.window is None else max(self.columns - self.window + 1, 0)
        return self.columns + rows - start

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends every row; the columns that `get_mask_sizes` spoke of, `[B, H, kv, D]` of the key's dtype."""
        rows = key.shape[2]
        self.shared.all_held_from(self.columns, self.window)
        before = self.columns
        start = before + rows - self.gathered(rows)
        new_key, new_value = _of_one_dtype(key.detach().transpose(1, 2), value.detach().transpose(1, 2))
        if before + rows - start <= self.cache.max_positions:
            self._append(new_key, new_value)
            keys, values = self._gather(start, self.columns, key.dtype)
        else:  # more than the ring can hold at once
            parts = [self._gather(start, before, key.dtype)]
            for begin in range(0, rows, self.cache.max_positions):
                part = slice(begin, min(begin + self.cache.max_positions, rows))
                self._append(new_key[:, part], new_value[:, part])
                parts.append(self._gather(before + part.start, before + part.stop, key.dtype))
            keys, values = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return without_gradient(keys, key), without_gradient(values, value)

    def _append(self, key: Tensor, value: Tensor) -> None:
        StreamingKVCacheFp16.append(self.cache, self.index, key, value, **self.shared.slots(self.device))
        self._advance(key.shape[1])

    def _gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Columns `[start, stop)`, contiguous `[B, H, n, D]`; zeros where a column was padding."""
        batch = self.shared.active or 1
        indices = torch.arange(start, stop, device=self.cache.device)
        record = self.shared.records.get(self.window)
        start_held = self.cache.tensors.state[1, self.index, :batch, None]
        if record is None:
            if self.first:  # of texts that had padding once fewer are gone
                indices = indices - start_held
        else:
            held = record[:, :stop].to(self.cache.device)
            if held.shape[1] < stop:
                held = torch.nn.functional.pad(held, (0, stop - held.shape[1]), value=True)
            indices = torch.where(held, held.cumsum(1) - 1 - start_held, -1)[:, start:].contiguous()
        shape = (batch, self.cache.num_heads, stop - start, self.cache.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=self.cache.device) for _ in range(2))
        out = keys.transpose(1, 2), values.transpose(1, 2)
        self.cache.gather(self.index, indices, dtype=dtype, out=out, **self.shared.slots(self.device))
        return keys, values

    # The rest of what transformers may call on a layer is done for whole groups of them, by the cache.

    def _by_the_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("Fp16Cache: layers share their storage; call this on the cache")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _by_the_cache

    def _stays(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"Fp16Cache: keys and values stay where they are allocated, on {self.device}: there is no offloading"
        )

    offload = prefetch = _stays


class AbsentLayer(Fp16Layer):
    """A layer that this model has not: another stage of a pipeline has it. Counts what a layer beside it holds."""

    def __init__(self, beside: Fp16Layer, window: int | None) -> None:
        self.beside = beside
        self.shared, self.cache, self.index = beside.shared, beside.cache, beside.index
        self.window = window
        self.is_sliding, self.is_compileable, self.bounded = window is not None, beside.is_compileable, False
        self.dtype, self.device, self.batch_size = beside.dtype, beside.device, beside.batch_size

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.beside.columns

    @columns.setter
    def columns(self, value: int) -> None: ...

    @property
    def first(self) -> int:  # type: ignore[override]
        return 0

    @first.setter
    def first(self, value: int) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "Fp16Cache: the model that it was made for has no such layer, and so there is no memory for it"
        )

    def _held(self, which: int) -> None:
        return None
