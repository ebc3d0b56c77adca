"""Attention over many queries at once, and merging attention over parts.

Up to `MOST_KERNEL_QUERIES` positions of a query are the kernels' affair (csrc/kernels/decode_attention.cu). More of
them (a prompt, a long chunk) are matmul work, which PyTorch's libraries do well: `prefill` goes through the keys in
blocks, converted to FP32, with an online softmax over the blocks (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops

if TYPE_CHECKING:
    from .cache import StreamingKVCacheFp16

MOST_KERNEL_QUERIES = 16  # kMostQueries in csrc/bindings/checks.h
_KEYS_PER_BLOCK = 1024
_SCORES_PER_BLOCK = 2**26  # FP32 elements at most: 256 MB, whatever T is


def outputs(query: Tensor, head_dim: int, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The tensors that a kernel writes its answer to: `out` or a new one, and the LSE if it is wanted."""
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not return_lse:
        return out, None
    shape = query.shape[:-1] if query.dim() > 1 else (query.shape[0] // head_dim,)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def merge_states(
    outs: list[Tensor] | tuple[Tensor, ...], lses: list[Tensor] | tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of positions, from attention over each.

    Args:
        outs: answers, all of one shape `[..., D]` and dtype.
        lses: their natural log-sum-exps, FP32 `[...]`; -inf where a set was empty.

    Returns:
        The merged answer, of the same shape and dtype, and its LSE, FP32. Merging empty states gives zeros and -inf.

    Raises:
        TypeError, ValueError: the lists are empty, of different lengths, or hold tensors that do not fit.

    Each answer is weighed by `exp(lse - max)` (Rabe and Staats, 2021; the merge of flash decoding).
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge_states: outs and lses must be of one length, at least 1, got {len(outs)} and {len(lses)}"
        )
    for name, tensors in (("outs", outs), ("lses", lses)):
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"merge_states: {name} must hold tensors, got {type(tensor).__name__}")
    for o, s in zip(outs, lses, strict=True):
        if o.shape != outs[0].shape or o.dtype != outs[0].dtype or s.shape != o.shape[:-1]:
            raise ValueError(
                "merge_states: outs must have one shape [..., head_dim] and one dtype, and lses that shape without "
                f"head_dim, got {list(o.shape)} of {o.dtype} with {list(s.shape)}"
            )
    all_lses = torch.stack([lse.float() for lse in lses])
    largest = all_lses.amax(0)
    weights = torch.exp(all_lses - torch.where(largest == -torch.inf, 0.0, largest))
    total = weights.sum(0)
    merged = torch.stack([out.float() for out in outs]).mul_(weights[..., None]).sum(0)
    merged = torch.where(total[..., None] == 0, 0.0, merged / total[..., None])
    return merged.to(outs[0].dtype), largest + total.log()


def _checked_query(cache: StreamingKVCacheFp16, op: str, query: Tensor) -> None:
    fits = query.dim() == 4 or (query.dim() == 3 and cache.batch_size == 1)
    fits = fits and (query.dim() == 3 or query.shape[0] == cache.batch_size) and query.shape[-1] == cache.head_dim
    if not fits or query.shape[-2] == 0 or query.shape[-2] % cache.num_heads != 0:
        raise ValueError(
            f"{op}: query must have shape [{cache.batch_size}, T, query heads, {cache.head_dim}], query heads a "
            f"multiple of {cache.num_heads}, got {list(query.shape)}"
        )
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{op}: query must be torch.float32, torch.float16 or torch.bfloat16, got {query.dtype}")
    if query.device != cache.device:
        raise ValueError(f"{op}: query must be on the cache's device {cache.device}, got {query.device}")
    if query.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: query must not require grad, as a cache records no gradients; call it under torch.no_grad()"
        )


def _as_stored(
    cache: StreamingKVCacheFp16, layer: int, key: Tensor, value: Tensor, new_lengths: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """What `append` would store of `key` and `value`, `[B, T, H, D]` FP16; raises what it would raise."""
    if not is_compiling():  # there, `append` itself will say what is wrong
        cache._compiled.check_append("append_attend", layer, key, value, new_lengths)
    positions = key.shape[-3] if key.dim() >= 3 else 1
    if positions != rows:
        raise ValueError(f"append_attend: query must have as many positions as key, {positions}, got {rows}")
    # Appended to a cache of their own. The kernel converts as it always does, and a compiler cannot look inside and
    # leave the rounding out, as it may with `.half().float()`.
    shape = (1, cache.batch_size, rows, cache.num_heads, cache.head_dim)
    keys, values = (torch.empty(shape, dtype=torch.float16, device=cache.device) for _ in range(2))
    state = torch.zeros((3, 1, cache.batch_size), dtype=torch.int64, device=cache.device)
    counts = torch.zeros(1, dtype=torch.int64, device=cache.device)
    ops.append(keys, values, state, counts, 0, key, value, saturate=cache.overflow == "saturate")
    return keys[0], values[0]


class _Softmax:
    """Attention over blocks of keys so far: an answer that is not yet divided by its sum of weights."""

    def __init__(self, query: Tensor, heads: int, scale: float, softcap: float | None) -> None:
        batch, rows, query_heads, head_dim = query.shape
        # [B, H, T * group, D]: the queries that share a KV head side by side, so that one matmul serves them all.
        grouped = query.float().view(batch, rows, heads, query_heads // heads, head_dim)
        self.query = grouped.permute(0, 2, 1, 3, 4).reshape(batch, heads, -1, head_dim) * scale
        self.group = query_heads // heads
        self.softcap = softcap
        self.largest = torch.full_like(self.query[..., :1], -torch.inf)
        self.total = torch.zeros_like(self.largest)
        self.answer = torch.zeros_like(self.query)

    def add(self, keys: Tensor, values: Tensor, sees: Tensor) -> None:
        """keys, values: FP32 `[B, n, H, D]`. sees: bool `[B, T, n]`.

        What a query does not see may hold anything. Zero times NaN is NaN, so values that are not finite are kept out
        of the product, and the heads of the queries that do see one answer NaN.
        """
        finite = values.isfinite()
        spoiled = (~finite).any(-1).float()  # [B, n, H]
        spoilt = torch.einsum("btn,bnh->bht", sees.float(), spoiled) > 0
        spoilt = spoilt.repeat_interleave(self.group, dim=-1)[..., None]
        values = torch.where(finite, values, 0.0)
        scores = self.query @ keys.permute(0, 2, 3, 1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = sees.repeat_interleave(self.group, dim=1)[:, None]
        scores.masked_fill_(~mask, -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        base = torch.where(largest == -torch.inf, 0.0, largest)
        weights = torch.exp(scores - base)
        rescale = torch.exp(self.largest - base)
        self.total = self.total * rescale + weights.sum(-1, keepdim=True)
        answer = self.answer * rescale + weights @ values.transpose(1, 2)
        self.answer = torch.where(spoilt, torch.nan, answer)
        self.largest = largest

    def finish(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The answer `[B, T, Hq, D]` and the LSE `[B, T, Hq]`."""
        batch, rows, query_heads, _ = query.shape
        answer = torch.where(self.total == 0, 0.0, self.answer / self.total)
        lse = self.largest + self.total.log()

        def ungrouped(t: Tensor) -> Tensor:
            heads = query_heads // self.group
            split = t.view(batch, heads, rows, self.group, t.shape[-1])
            return split.permute(0, 2, 1, 3, 4).reshape(batch, rows, query_heads, t.shape[-1])

        return ungrouped(answer).to(query.dtype), ungrouped(lse)[..., 0]


def prefill(
    cache: StreamingKVCacheFp16,
    layer: int,
    query: Tensor,
    new: tuple[Tensor, Tensor, Tensor | None] | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` (or, with `new` = key, value, new_lengths, `append_attend`) for many queries, in FP32.

    Memory beside the answer: the scores of one block of keys against one block of queries, 256 MB at most, and that
    block's keys and values in FP32. Without a length on the host (after `new_lengths` or a captured graph) it goes
    through all slots, for it does not synchronise.
    """
    op = "attend" if new is None else "append_attend"
    _checked_query(cache, op, query)
    if window is not None and window <= 0:
        raise ValueError(f"{op}: window must be positive or None, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")
    if out is not None and (out.shape != query.shape or out.dtype != query.dtype or out.device != query.device):
        raise ValueError(
            f"{op}: out must have the query's shape {list(query.shape)}, dtype {query.dtype} and device, got "
            f"{list(out.shape)} of {out.dtype} on {out.device}"
        )
    scale = cache.head_dim**-0.5 if scale is None else scale
    longest = cache.max_positions if is_compiling() else cache._compiled.longest_or_all(layer)  # checks the layer
    batch, sinks, ring = cache.batch_size, cache.sink_positions, cache.max_positions - cache.sink_positions
    q4 = query if query.dim() == 4 else query[None]
    rows = q4.shape[1]

    seen, first = cache._state[0, layer], cache._state[1, layer]  # [B]
    before, first = seen[:, None].clone(), first[:, None].clone()
    padding = torch.zeros_like(before)
    if new is not None:
        key, value, new_lengths = new
        appended = _as_stored(cache, layer, key, value, new_lengths, rows)  # checks, converts; nothing is appended yet
        if new_lengths is not None:
            padding = rows - new_lengths.long().clamp(0, rows)[:, None]
        total = before + rows - padding
    else:
        total = before
    t = torch.arange(rows, device=cache.device)[None]
    own = total - rows + t  # [B, T]: the queries' positions
    oldest = first.expand_as(own)
    if new is not None:
        oldest = torch.maximum(oldest, own + 1 - ring)
    if window is not None:
        oldest = torch.maximum(oldest, own + 1 - window)
    oldest = torch.where(t >= padding, oldest, 2**62)  # padding queries see nothing, not even sinks
    own = torch.where(t >= padding, own, -1)

    answers, lses = [], []
    queries_per_block = max(1, _SCORES_PER_BLOCK // (_KEYS_PER_BLOCK * batch * q4.shape[2]))
    for start in range(0, rows, queries_per_block):
        part = slice(start, start + queries_per_block)
        softmax = _Softmax(q4[:, part], cache.num_heads, scale, softcap)

        def sees(positions: Tensor, part: slice = part) -> Tensor:
            """positions: `[B, n]`. Bool `[B, T, n]`."""
            p = positions[:, None]
            return (p <= own[:, part, None]) & ((p < sinks) | (p >= oldest[:, part, None]))

        for begin in range(0, longest, _KEYS_PER_BLOCK):
            index = torch.arange(begin, min(begin + _KEYS_PER_BLOCK, longest), device=cache.device)[None]
            sinks_held = before.clamp(max=sinks)
            positions = torch.where(index < sinks_held, index, first + index - sinks_held)
            positions = torch.where(positions < before, positions, 2**62)  # not held
            keys, values = cache.gather(layer, index[0])
            keys, values = (x if x.dim() == 4 else x[None] for x in (keys, values))
            softmax.add(keys, values, sees(positions))
        if new is not None:
            for begin in range(0, rows, _KEYS_PER_BLOCK):
                index = torch.arange(begin, min(begin + _KEYS_PER_BLOCK, rows), device=cache.device)[None]
                positions = torch.where(index >= padding, before + index - padding, 2**62)
                keys, values = (x[:, begin : begin + _KEYS_PER_BLOCK].float() for x in appended)
                softmax.add(keys, values, sees(positions))
        answer, lse = softmax.finish(q4[:, part])
        answers.append(answer)
        lses.append(lse)
    if new is not None:
        cache.append(layer, key, value, new_lengths=new_lengths)
    result = torch.cat(answers, 1).view(query.shape)
    if out is not None:
        result = out.copy_(result)
    return (result, torch.cat(lses, 1).view(query.shape[:-1])) if return_lse else result
