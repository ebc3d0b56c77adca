"""Attention over many queries at once, and merging attention over parts.

Up to `MOST_KERNEL_QUERIES` positions of a query are the kernels' affair (csrc/kernels/decode_attention.cu). More of
them (a prompt, a long chunk) are matmul work, which PyTorch's libraries do well: `prefill` goes through the keys in
blocks, converted to FP32, with an online softmax over the blocks (Milakov and Gimelshein, 2018); or, where FP16 answers
will do (`precision="fp16"`), through scaled_dot_product_attention on the FP16 data where it lies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention

from . import ops
from ._extension import extension

if TYPE_CHECKING:
    from .cache import StreamingKVCacheFp16

MOST_KERNEL_QUERIES = 16  # kMostQueries in csrc/bindings/checks.h
_KEYS_PER_BLOCK = 1024  # at most, and so many that their elements are at most:
_ELEMENTS_PER_BLOCK = 2**24
_HALF_QUERIES_PER_BLOCK = 256
_LARGEST_SCALE = 2.0**86  # kLargestScale in csrc/bindings/checks.h
_LARGEST_SOFTCAP = torch.finfo(torch.float32).max
_LEAST_WEIGHT = 2.0**-100  # of an answer in a sum of several: nothing beside 1, but not 0, which times infinity is NaN
_SMALLEST_SOFTCAP = 2.0**-149
_SCORES_PER_BLOCK = 2**24  # FP32 elements at most: 64 MB, whatever T is; some copies of it are alive at a time


def outputs(query: Tensor, head_dim: int, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The tensors that a kernel writes its answer to: `out` or a new one, and the LSE if it is wanted."""
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not return_lse:
        return out, None
    shape = query.shape[:-1] if query.dim() > 1 else (query.shape[0] // head_dim,)
    return out, torch.empty(shape, dtype=torch.float32, device=query.device)


def kernel_options(
    head_dim: int, scale: float | None, window: int | None, softcap: float | None
) -> tuple[float, int, float]:
    """The options as the registered ops take them, where 0 means none; for compiled code, which checks them here."""
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive or None, got {window}")
    if softcap is not None and not softcap > 0:  # nor NaN
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return head_dim**-0.5 if scale is None else scale, window or 0, softcap or 0.0


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """What the bindings refuse, for compiled code, where tensors no longer say so when the kernels see them."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad, as a cache records no gradients, got requires_grad=True; call it "
                "under torch.no_grad() or pass .detach()"
            )


def _check_long(
    cache: StreamingKVCacheFp16,
    layer: int,
    query: Tensor,
    new: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    softcap: float,
    out: Tensor | None,
    batch: int,
) -> None:
    """What `check_attend` of the bindings says of many queries, for compiled code, which cannot call it."""
    key, value, _ = new
    op = "attend" if key is None else "append_attend"
    heads, head_dim = cache.num_heads, cache.head_dim
    refuse_gradients(op, query=query, key=key, value=value, out=out)
    if not 0 <= layer < cache.num_layers:
        raise IndexError(
            f"{op}: layer must be from 0 to {cache.num_layers - 1}, as the cache has {cache.num_layers} layers, "
            f"got {layer}"
        )
    if head_dim % 8 != 0 or head_dim > 512:
        raise ValueError(
            f"{op}: head_dim must be a multiple of 8 up to 512 for attention, and the cache's is {head_dim}"
        )
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"{op}: scale must be finite and at most 2^86 in magnitude, so that scores of FP16 numbers stay within "
            f"FP32, got {scale}"
        )
    if softcap != 0.0 and not _SMALLEST_SOFTCAP <= softcap <= _LARGEST_SOFTCAP:
        raise ValueError(f"{op}: softcap must be positive, finite and within FP32, got {softcap}")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if query.dtype not in dtypes:
        raise TypeError(f"{op}: query must be torch.float32, torch.float16 or torch.bfloat16, got {query.dtype}")
    if query.dim() > 4 or query.shape[-1] != head_dim or (query.shape[0] if query.dim() == 4 else 1) != batch:
        raise ValueError(f"{op}: query must have shape [{batch}, T, query heads, {head_dim}], got {list(query.shape)}")
    if query.shape[-2] == 0 or query.shape[-2] % heads != 0:
        raise ValueError(f"{op}: query must have a multiple of the cache's {heads} heads, got {query.shape[-2]}")
    if out is not None and out.dtype != query.dtype:
        raise TypeError(f"{op}: out must have the dtype of query, {query.dtype}, got {out.dtype}")
    if out is not None and out.shape != query.shape:
        raise ValueError(f"{op}: out must have the shape of query, {list(query.shape)}, got {list(out.shape)}")
    if key is None:
        return
    for name, tensor in (("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must be torch.float32, torch.float16 or torch.bfloat16, got {tensor.dtype}")
        entries = tensor.shape[0] if tensor.dim() == 4 else 1
        if tensor.dim() not in (3, 4) or tensor.shape[-2:] != (heads, head_dim) or entries != batch:
            raise ValueError(
                f"{op}: {name} must have shape [{batch}, T, {heads}, {head_dim}], got {list(tensor.shape)}"
            )
        if tensor.shape[-3] != query.shape[-3]:
            raise ValueError(
                f"{op}: query must have as many positions as {name}, {tensor.shape[-3]}, got {query.shape[-3]}"
            )


def is_long(query: Tensor) -> bool:
    """Whether it is for `prefill`. What is no query at all is left to the kernels' checks."""
    if not isinstance(query, Tensor) or query.is_nested or query.dim() < 3:
        return False
    return query.shape[-3] > MOST_KERNEL_QUERIES


def shown(value: object) -> str:
    """A wrong argument for an error's one sentence: whole if it is short, else its type.

    A tensor's text has many lines, and that of one whose memory is gone crashes the process.
    """
    if value is None or isinstance(value, (str, bool, float, torch.device, torch.dtype)):
        text = repr(value)
        if len(text) <= 60:  # and in one line, as a repr's are
            return text
    if isinstance(value, int) and value.bit_length() <= 64:
        return str(value)
    return f"a {type(value).__name__}"


def check_precision(precision: str) -> None:
    if not isinstance(precision, str) or precision not in ("fp32", "fp16"):
        raise ValueError(f"precision must be 'fp32' or 'fp16', got {shown(precision)}")


def _check_mergeable(name: str, tensor: Tensor, first: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"merge_states: {name} must hold tensors, got {shown(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise TypeError(f"merge_states: {name} must hold dense (strided) tensors, got another layout")
    if not tensor.is_floating_point():
        raise TypeError(f"merge_states: {name} must hold tensors of a float dtype, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(
            f"merge_states: {name} must be on one device, that of outs[0], {first.device}, got {tensor.device}"
        )
    # Reading one whose storage was resized away crashes the process. (A subclass may have no storage to ask.)
    if type(tensor) is Tensor and not is_compiling() and tensor.device.type != "meta":
        if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
            raise ValueError(f"merge_states: {name} must hold tensors that have memory, got one without any")


def merge_states(
    outs: list[Tensor] | tuple[Tensor, ...], lses: list[Tensor] | tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of positions, from attention over each.

    Args:
        outs: answers, all of one shape `[..., D]` and dtype.
        lses: their natural log-sum-exps, FP32 `[...]`; -inf where a set was empty, whatever its answer (NaN, of some
            libraries).

    Returns:
        The merged answer, of the same shape and dtype, and its LSE, FP32. Merging empty states gives zeros and -inf.

    Raises:
        TypeError, ValueError: the lists are empty, of different lengths, or hold tensors that do not fit.

    Each answer is weighed by `exp(lse - max)` (Rabe and Staats, 2021; the merge of flash decoding).
    """
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"merge_states: {name} must be a list of tensors, got {shown(tensors)}")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge_states: outs and lses must be of one length, at least 1, got {len(outs)} and {len(lses)}"
        )
    for name, tensors in (("outs", outs), ("lses", lses)):
        for tensor in tensors:
            _check_mergeable(name, tensor, outs[0])
    for o, s in zip(outs, lses, strict=True):
        if o.dim() == 0 or o.shape != outs[0].shape or o.dtype != outs[0].dtype or s.shape != o.shape[:-1]:
            raise ValueError(
                "merge_states: outs must have one shape [..., head_dim] and one dtype, and lses that shape without "
                f"head_dim, got {list(o.shape)} of {o.dtype} with {list(s.shape)}"
            )
    all_lses = torch.stack([lse.float() for lse in lses])
    largest = all_lses.amax(0)
    weights = torch.exp(all_lses - torch.where(largest == -torch.inf, 0.0, largest)).clamp_min(_LEAST_WEIGHT)
    weights = weights.masked_fill(all_lses == -torch.inf, 0.0)
    total = weights.sum(0)
    answers = torch.stack([out.float() for out in outs]).masked_fill((all_lses == -torch.inf)[..., None], 0.0)
    merged = (answers * weights[..., None]).sum(0)
    merged = torch.where(total[..., None] == 0, 0.0, merged / total[..., None])
    return merged.to(outs[0].dtype), largest + total.log()


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before: list[str] = []


@contextlib.contextmanager
def _ieee_fp32(device: torch.device) -> Iterator[None]:
    """FP32 matmul in FP32, whatever autocast and TF32 or BF16 settings the caller has for the model's own.

    Those settings are the process's, not a thread's: the first thread to come changes them, the last to go puts them
    back.
    """
    global _precision_users, _precision_before
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with torch.autocast(device.type, enabled=False):
        with _precision_lock:
            if _precision_users == 0:
                _precision_before = [setting.fp32_precision for setting in settings]
                for setting in settings:
                    setting.fp32_precision = "ieee"
            _precision_users += 1
        try:
            yield
        finally:
            with _precision_lock:
                _precision_users -= 1
                if _precision_users == 0:
                    for setting, value in zip(settings, _precision_before, strict=True):
                        setting.fp32_precision = value


class _Softmax:
    """Attention over blocks of keys so far: an answer that is not yet divided by its sum of weights."""

    def __init__(self, query: Tensor, heads: int, scale: float, softcap: float) -> None:
        batch, rows, query_heads, head_dim = query.shape
        # [B, H, T * group, D]: the queries that share a KV head side by side, so that one matmul serves them all.
        grouped = query.float().view(batch, rows, heads, query_heads // heads, head_dim)
        self.query = grouped.permute(0, 2, 1, 3, 4).reshape(batch, heads, -1, head_dim) * scale
        self.group = query_heads // heads
        self.softcap = softcap
        self.largest = torch.full_like(self.query[..., :1], -torch.inf)
        self.total = torch.zeros_like(self.largest)
        self.answer = torch.zeros_like(self.query)

    def add(self, block: _KeyBlock, visible: _Visible) -> None:
        scores = self.query @ block.keys
        if self.softcap:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        mask = visible.sees(block.positions).repeat_interleave(self.group, dim=1)[:, None]
        scores.masked_fill_(~mask, -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        base = torch.where(largest == -torch.inf, 0.0, largest)
        weights = scores.sub_(base).exp_()
        rescale = torch.exp(self.largest - base).clamp_min_(_LEAST_WEIGHT)
        self.total = self.total * rescale + weights.sum(-1, keepdim=True)
        self.answer = self.answer * rescale + weights @ block.finite_values
        self.answer += visible.strange(block).transpose(1, 2).repeat_interleave(self.group, dim=2)
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


class _Visible:
    """Which positions some queries see: their own and those before, back to their oldest, and the sinks."""

    def __init__(self, own: Tensor, oldest: Tensor, sinks: int) -> None:
        """own, oldest: int64 `[B, T]`. A query whose own is -1 sees nothing."""
        self.own, self.oldest = own.contiguous(), oldest.contiguous()
        self.sinks = torch.full_like(self.own[:, :1], sinks)

    def sees(self, positions: Tensor) -> Tensor:
        """positions: int64 `[B, n]`, -1 for none. Bool `[B, T, n]`."""
        p = positions[:, None]
        return (p >= 0) & (p <= self.own[..., None]) & ((p < self.sinks[..., None]) | (p >= self.oldest[..., None]))

    def strange(self, block: _KeyBlock) -> Tensor:
        """What the values that a query sees and that are not finite come to: `[B, T, H, D]`, each 0, +-inf or NaN."""
        counts, sequence = block.counts, torch.arange(len(block.counts), device=block.counts.device)[:, None]
        end = torch.searchsorted(block.positions, self.own, right=True)
        begin = torch.minimum(torch.searchsorted(block.positions, self.oldest), end)
        of_sinks = torch.minimum(torch.searchsorted(block.positions, self.sinks), end)
        count = counts[sequence, end] - counts[sequence, begin] + counts[sequence, of_sinks]
        return torch.where(count & 0xFFFF != 0, torch.inf, 0.0) - torch.where(count >> 16 != 0, torch.inf, 0.0)


class _KeyBlock:
    """Some keys and values, in the forms that every block of queries takes them in.

    Zero times NaN is NaN, so that values that are not finite are kept out of the product, and reach the answers of the
    queries that see them as `_Visible.strange`. Without a look at the device there is no telling whether there are any.
    Running counts, of which three places are looked up for each query, cost little beside a product with a mask.
    """

    def __init__(self, positions: Tensor, keys: Tensor, values: Tensor, capped: bool = False) -> None:
        """positions: int64 `[B, n]`, ascending, -1 for none. keys, values: FP32 `[B, n, H, D]`, n below 2^15; where no
        query sees them they may hold anything. `capped`: scores are, and so are finite unless they are NaN."""
        self.positions = positions.contiguous()
        self.keys = keys.permute(0, 2, 3, 1)
        finite = values.isfinite()
        self.finite_values = torch.where(finite, values, 0.0).transpose(1, 2)  # [B, H, n, D]
        strange = ~finite & (positions >= 0)[..., None, None]
        plus, minus = strange & ~(values < 0), strange & ~(values > 0)  # NaN is both
        if not capped:
            # A key that is not finite has a score of minus infinity, whose weight is 0, or one that makes all NaN. Zero
            # times an infinite value is NaN. (Sums of FP16 numbers are within FP32.)
            nan = strange & ~keys.sum(-1, keepdim=True).isfinite()
            plus, minus = plus | nan, minus | nan
        counts = (plus.int() + (minus.int() << 16)).cumsum(1, dtype=torch.int32)
        self.counts = torch.cat([torch.zeros_like(counts[:, :1]), counts], 1)  # [B, n + 1, H, D]


@torch.library.custom_op("kvcache_ext::prefill", mutates_args=())
def _prefill(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    layer: int,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    new_lengths: Tensor | None,
    sink_positions: int,
    saturate: bool,
    scale: float,
    window: int,
    softcap: float,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The answer `[B, T, Hq, D]` and the LSE `[B, T, Hq]`; nothing is appended. One op, which a compiler takes whole.

    All arguments have been checked; `query` is `[B, T, Hq, D]`. `window` and `softcap` 0 mean none.
    """
    if len(query) == 0:
        return query.clone(), query.new_empty(query.shape[:-1], dtype=torch.float32)
    with _ieee_fp32(query.device):
        return _prefill_in_blocks(
            k_cache, v_cache, state, layer, query, key, value, new_lengths, sink_positions, saturate, scale, window,
            softcap, sequences,
        )  # fmt: skip


@_prefill.register_fake
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, layer, query, key, value, new_lengths, sink_positions, saturate, scale, window, softcap,
    sequences=None,
):  # fmt: skip
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


def keys_per_block(batch: int, heads: int, head_dim: int) -> int:
    return max(16, min(_KEYS_PER_BLOCK, _ELEMENTS_PER_BLOCK // (batch * heads * head_dim)))


def _prefill_in_blocks(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    layer: int,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    new_lengths: Tensor | None,
    sinks: int,
    saturate: bool,
    scale: float,
    window: int,
    softcap: float,
    sequences: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, rows = query.shape[:2]
    max_positions, heads, head_dim = k_cache.shape[2:]
    device = query.device
    seen, first = (state[i, layer][:, None].clone() for i in range(2))  # [B, 1]
    there = None
    if sequences is not None:
        there = ((sequences >= 0) & (sequences < k_cache.shape[1]))[:, None]
        slots = sequences.long().clamp(0, k_cache.shape[1] - 1)
        seen, first = torch.where(there, seen[slots], 0), torch.where(there, first[slots], sinks)
    padding = torch.zeros_like(seen)
    total = seen
    new_keys = new_values = None
    if key is not None and value is not None:
        if new_lengths is not None:
            padding = rows - new_lengths.long().clamp(0, rows)[:, None]
        if there is not None:
            padding = torch.where(there, padding, rows)
        total = seen + rows - padding
        # As they will be stored: appended to a cache of their own, by the kernel that always converts.
        new_keys, new_values = (torch.empty_like(k_cache[:1, :1, :1].expand(1, batch, rows, heads, head_dim),
                                                 memory_format=torch.contiguous_format) for _ in range(2))  # fmt: skip
        new_state = torch.zeros((3, 1, batch), dtype=torch.int64, device=device)
        counts = torch.zeros(1, dtype=torch.int64, device=device)
        ops.append(new_keys, new_values, new_state, counts, 0, key, value, saturate=saturate)

    t = torch.arange(rows, device=device)[None]
    own = total - rows + t  # [B, T]: the queries' positions
    oldest = first.expand_as(own)
    if new_keys is not None:
        oldest = torch.maximum(oldest, own + 1 - (max_positions - sinks))
    if window:
        oldest = torch.maximum(oldest, own + 1 - window)
    own = torch.where(t >= padding, own, -1)  # padding queries see nothing

    block_keys = keys_per_block(batch, heads, head_dim)
    per_part = max(1, _SCORES_PER_BLOCK // (block_keys * batch * query.shape[2]))
    parts = [slice(start, min(start + per_part, rows)) for start in range(0, rows, per_part)]
    softmaxes = [_Softmax(query[:, part], heads, scale, softcap) for part in parts]
    visible = [_Visible(own[:, part], oldest[:, part], sinks) for part in parts]

    def add(block: _KeyBlock, first: int) -> None:
        """To the parts that end after query number `first`: the others see nothing of it."""
        for i, part in enumerate(parts):
            if part.stop > first:
                softmaxes[i].add(block, visible[i])

    shape = (batch, -1, heads, head_dim)
    longest = extension.longest_or_all(state, layer, max_positions, 0, k_cache.shape[1])
    for begin in range(0, longest, block_keys):
        index = torch.arange(begin, min(begin + block_keys, longest), device=device)
        sinks_held = seen.clamp(max=sinks)
        positions = torch.where(index < sinks_held, index, first + index - sinks_held)
        positions = torch.where(positions < seen, positions, 2**62)  # not held
        keys, values = ops.gather(k_cache, v_cache, state, layer, index, sink_positions=sinks, sequences=sequences)
        # Without new keys, query t sees no held index beyond t + longest - rows; but for sinks, behind which the ring
        # may have lost positions.
        all_see = new_keys is not None or begin < sinks
        block = _KeyBlock(positions, keys.view(shape), values.view(shape), softcap != 0)
        add(block, 0 if all_see else begin - (longest - rows))
    if new_keys is not None and new_values is not None:
        for begin in range(0, rows, block_keys):  # a query sees the new keys up to its own
            index = torch.arange(begin, min(begin + block_keys, rows), device=device)
            positions = torch.where(index >= padding, seen + index - padding, -1)
            keys, values = (x[0, :, begin : begin + block_keys].float() for x in (new_keys, new_values))
            add(_KeyBlock(positions, keys, values, softcap != 0), begin)
    answers, lses = zip(*(s.finish(query[:, p]) for s, p in zip(softmaxes, parts, strict=True)), strict=True)
    return torch.cat(answers, 1), torch.cat(lses, 1)


def _run_of(cache: StreamingKVCacheFp16, sequences: Sequence[int] | Tensor | None) -> slice | None:
    """The batch slots of a call, if the host knows them and they follow each other, so that there are views of them."""
    if sequences is None:
        return slice(0, cache.batch_size)
    if isinstance(sequences, Tensor) or len(sequences) == 0:
        return None
    begin, end = sequences[0], sequences[-1] + 1
    return slice(begin, end) if list(sequences) == list(range(begin, end)) else None


def _half_answer(cache: StreamingKVCacheFp16, layer: int, query: Tensor, scale: float, chosen: slice) -> Tensor | None:
    """Attention of `query` `[B, T, Hq, D]` by torch over views of the FP16 data; None where there are no such views.

    The mask is causal and aligned to the lower right, as torch's own `is_causal` is not. On a CPU torch builds that
    mask, so that the queries go in blocks there.
    """
    from torch.nn.attention.bias import causal_lower_right  # here, as it imports torch._dynamo, which takes a second

    slot, held = extension.run_or_none(cache._state, layer, chosen.start, chosen.stop)
    rows = query.shape[1]
    if slot < 0 or held < rows:
        return None
    keys, values = (
        x[layer, chosen, slot : slot + held].transpose(1, 2) for x in (cache.k_cache, cache.v_cache)
    )  # [B, H, held, D], where they lie
    queries = query.transpose(1, 2).half()
    block = rows if query.is_cuda else _HALF_QUERIES_PER_BLOCK
    answers = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, rows, block):
            some = queries[:, :, start : start + block]
            seen = held - rows + start + some.shape[2]
            answer = scaled_dot_product_attention(
                some, keys[:, :, :seen], values[:, :, :seen], attn_mask=causal_lower_right(some.shape[2], seen),
                scale=scale, enable_gqa=query.shape[2] != cache.num_heads,
            )  # fmt: skip
            answers.append(answer.transpose(1, 2))
    return (answers[0] if len(answers) == 1 else torch.cat(answers, 1)).to(query.dtype)


def prefill(
    cache: StreamingKVCacheFp16,
    layer: int,
    query: Tensor,
    new: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    out: Tensor | None,
    precision: str,
    sequences: Sequence[int] | Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` (or, with `new` = key, value, new_lengths, `append_attend`) for many queries, in FP32 or FP16.

    `precision="fp32"`:

    Memory beside the answer: FP32 copies of the query and of the answer; FP16 ones of new keys and values; some 28
    bytes for each element of a block of keys (1,024 positions of every sequence, or fewer: at most 470 MB); and its
    scores, 64 MB a few times (more only where 16 positions of the whole batch, or a single query of it, take more).
    It does not synchronise: where
    lengths are not known on the host (after `new_lengths` or a captured graph) it goes through all slots. The error
    against FP64 is that of the kernels, whatever precision is set for matmul or autocast: tests/test_attention.py holds
    it to 1e-6 for N(0, 1) data at small sizes; of thousands of answers of a head the worst come to some 2e-6
    (docs/accuracy.md).

    `precision="fp16"`: queries rounded to FP16, torch's scaled_dot_product_attention on views of the storage; its
    error is that of FP16 attention (the tests hold it to 2e-3, whatever the query's dtype), and a query beyond the
    FP16 range gives NaN. For that the sequences must hold equally many positions in consecutive slots, which is known
    on the host until the ring wraps; the call must evict nothing, have a positive scale and no window, softcap, LSE or
    new_lengths, and be about all sequences or a list of some that follow each other.
    Every other call, and compiled code, gets the FP32 answer.
    """
    key, value, new_lengths = new
    half = (
        precision == "fp16" and not is_compiling() and not (window or softcap or return_lse or new_lengths is not None)
    )
    if is_compiling():
        scale, window, softcap = kernel_options(cache.head_dim, scale, window, softcap)
        numbers = cache._optional_slots("attend" if key is None else "append_attend", sequences)
        batch = cache.batch_size if numbers is None else numbers.shape[0]
        _check_long(cache, layer, query, new, scale, softcap, out, batch)
    else:
        scale, window, softcap, numbers = cache._compiled.check_attend(
            layer, query, key, value, new_lengths, scale, window, softcap, return_lse, out, sequences
        )
    # torch's kernels take the maximum of the unscaled scores, so that 0 and negative scales give NaN.
    chosen = _run_of(cache, sequences) if half and scale > 0 else None
    batched = query if query.dim() == 4 else query[None]
    answer = lse = before = None
    if chosen is not None and key is not None and value is not None:
        of = (cache._state, layer, chosen.start, chosen.stop)
        longest = extension.longest_or_all(cache._state, layer, cache.max_positions, chosen.start, chosen.stop)
        if longest + batched.shape[1] > cache.max_positions or (longest > 0 and extension.run_or_none(*of)[0] < 0):
            chosen = None
        else:
            # Nothing is evicted, so that appending first changes nothing for the earlier queries, and can be taken back
            # where there is no memory for the answer.
            before = cache._state[:, layer].clone(), cache._overflow_counts[layer].clone()
            cache._append(layer, key, value, sequences=sequences)
            key = value = None
    try:
        if chosen is not None:
            answer = _half_answer(cache, layer, batched, scale, chosen)
        if answer is None:
            answer, lse = _prefill(
                cache.k_cache, cache.v_cache, cache._state, layer, batched, key, value, new_lengths,
                cache.sink_positions, cache.overflow == "saturate", scale, window, softcap, numbers,
            )  # fmt: skip
    except BaseException:
        if before is not None:
            cache._state[:, layer].copy_(before[0])
            cache._overflow_counts[layer].copy_(before[1])
        raise
    if key is not None and value is not None:
        cache._append(layer, key, value, new_lengths=new_lengths, sequences=sequences)
    answer = answer.reshape(query.shape)
    if out is not None:
        answer = out.copy_(answer)
    if not return_lse:
        return answer
    assert lse is not None  # FP16 answers come without
    return answer, lse.view(query.shape[:-1])
