"""A layer: what a model's own layer appends to and attends to."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin

from ...cache import StreamingKVCacheFp16
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

    def __init__(self, shared: Shared, cache: StreamingKVCacheFp16, index: int, window: int | None) -> None:
        super().__init__()
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
        """`query` `[B, T, Hq, D]`, `key`, `value` `[B, T, H, D]`: the answer, and the LSE if it is wanted."""
        batch, rows = query.shape[:2]
        key, value = _of_one_dtype(key, value)
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
            rows = NewRows(self, key_states, value_states)
            return rows, rows
        return self.append_gather(key_states, value_states)

    def gathered(self, rows: int) -> int:
        """How many columns `append_gather` gives for so many new rows."""
        start = 0 if self.window is None else max(self.columns - self.window + 1, 0)
        return self.columns + rows - start

    def append_gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends every row; the columns that `get_mask_sizes` spoke of, `[B, H, kv, D]` of the key's dtype."""
        batch, _, rows, _ = key.shape
        self._check(batch, rows)
        self.shared.all_held_from(self.columns, self.window)
        before = self.columns
        start = before + rows - self.gathered(rows)
        new_key, new_value = _of_one_dtype(key.detach().transpose(1, 2), value.detach().transpose(1, 2))
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
        return without_gradient(keys, key).transpose(1, 2), without_gradient(values, value).transpose(1, 2)

    def _append(self, key: Tensor, value: Tensor) -> None:
        self.cache.append(self.index, key, value, **self.shared.slots(self.device))
        self._advance(key.shape[1])

    def _gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Columns `[start, stop)`, `[B, n, H, D]`; zeros where a column was padding."""
        batch = self.shared.active or 1
        indices = torch.arange(start, stop, device=self.cache.device)
        record = self.shared.records.get(self.window)
        start_held = self.cache._state[1, self.index, :batch, None]
        if record is None:
            if self.first:  # of texts that had padding once fewer are gone
                indices = indices - start_held
        else:
            held = record[:, :stop].to(self.cache.device)
            if held.shape[1] < stop:
                held = torch.nn.functional.pad(held, (0, stop - held.shape[1]), value=True)
            indices = torch.where(held, held.cumsum(1) - 1 - start_held, -1)[:, start:].contiguous()
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
