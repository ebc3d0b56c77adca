"""Every op once more in plain PyTorch, one position at a time: the truth that the tests compare with.

Slow and short on purpose. The functions take a cache as its tensors, as `kvcache_ext.ops` does, and change them the
same way. Read this to learn exactly what an op does.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_OVERFLOW = 65520.0  # the smallest magnitude that rounds to more than HALF_MAX


def to_half(x: Tensor, saturate: bool) -> tuple[Tensor, int]:
    """`x` as it is stored, and how many of its finite values FP16 cannot hold."""
    overflow = x.isfinite() & (x.float().abs() >= HALF_OVERFLOW)
    half = x.to(torch.float16)
    if saturate:
        half = torch.where(overflow, torch.copysign(torch.full_like(half, HALF_MAX), x.to(half)), half)
    return half, int(overflow.sum())


def slot_of(position: int, positions: int, sink_positions: int) -> int:
    """The slot in which a position lies: its own while it is a sink, else one of the ring's in turn."""
    if position < sink_positions:
        return position
    return sink_positions + (position - sink_positions) % (positions - sink_positions)


def held_positions(seqlen: int, first: int, sink_positions: int) -> list[int]:
    """The positions a sequence holds, oldest first: chronological index i is the i-th of them."""
    return [*range(min(seqlen, sink_positions)), *range(first, seqlen)]


def _chosen(sequences: Tensor | None, batch: int) -> list[tuple[int, int]]:
    """(entry, sequence): which of the cache's sequences the entries of a call's tensors belong to."""
    numbers = range(batch) if sequences is None else sequences.tolist()
    return [(i, b) for i, b in enumerate(numbers) if 0 <= b < batch]


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    overflow_counts: Tensor,
    layer: int,
    key: Tensor,
    value: Tensor,
    new_lengths: Tensor | None = None,
    *,
    sink_positions: int = 0,
    saturate: bool = True,
    sequences: Tensor | None = None,
) -> None:
    """Appends `key` and `value`, `[B, T, H, D]`, to one layer, or `[n, T, H, D]` to the n chosen `sequences` of it."""
    positions = k_cache.shape[2]
    rows = key.shape[1]
    for i, b in _chosen(sequences, k_cache.shape[1]):
        count = rows if new_lengths is None else min(max(int(new_lengths[i]), 0), rows)
        for t in range(rows - count, rows):
            seqlen = int(state[0, layer, b])
            slot = slot_of(seqlen, positions, sink_positions)
            for cache, new in ((k_cache, key), (v_cache, value)):
                cache[layer, b, slot], overflows = to_half(new[i, t], saturate)
                overflow_counts[layer] += overflows
            state[0, layer, b] = seqlen + 1
            state[1, layer, b] = max(int(state[1, layer, b]), seqlen + 1 - (positions - sink_positions))


def append_all(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    overflow_counts: Tensor,
    keys: Tensor,
    values: Tensor,
    new_lengths: Tensor | None = None,
    *,
    sink_positions: int = 0,
    saturate: bool = True,
    sequences: Tensor | None = None,
) -> None:
    """Appends `keys` and `values`, `[L, B, T, H, D]`, to every layer."""
    for layer in range(k_cache.shape[0]):
        append(
            k_cache,
            v_cache,
            state,
            overflow_counts,
            layer,
            keys[layer],
            values[layer],
            new_lengths,
            sink_positions=sink_positions,
            saturate=saturate,
            sequences=sequences,
        )


def gather(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    layer: int,
    indices: Tensor,
    *,
    sink_positions: int = 0,
    dtype: torch.dtype = torch.float32,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows at chronological `indices`, `[n]` or `[B, n]`, of one layer: `[B, n, H, D]`; zeros where nothing is held."""
    batch, positions = k_cache.shape[1:3]
    indices = indices.expand(batch if sequences is None else len(sequences), indices.shape[-1])
    out = [torch.zeros((*indices.shape, *k_cache.shape[3:]), dtype=dtype, device=k_cache.device) for _ in range(2)]
    for i, b in _chosen(sequences, batch):
        held = held_positions(int(state[0, layer, b]), int(state[1, layer, b]), sink_positions)
        for j, index in enumerate(indices[i].tolist()):
            if 0 <= index < len(held):
                slot = slot_of(held[index], positions, sink_positions)
                out[0][i, j] = k_cache[layer, b, slot].to(dtype)
                out[1][i, j] = v_cache[layer, b, slot].to(dtype)
    return out[0], out[1]


def attend(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    layer: int,
    query: Tensor,
    *,
    sink_positions: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in FP64 of `query`, `[B, T, Hq, D]`, over one layer: the answer, and the LSE `[B, T, Hq]`.

    Query t of T stands at the position T - 1 - t before the newest one, and sees the held positions up to its own.
    """
    _, rows, query_heads, head_dim = query.shape
    positions, heads = k_cache.shape[2:4]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=query.device)
    for i, b in _chosen(sequences, k_cache.shape[1]):
        seqlen = int(state[0, layer, b])
        held = held_positions(seqlen, int(state[1, layer, b]), sink_positions)
        for t in range(rows):
            own = seqlen - rows + t
            seen_by_it = [p for p in held if p <= own and (window is None or p < sink_positions or p > own - window)]
            if not seen_by_it:
                continue
            slots = [slot_of(p, positions, sink_positions) for p in seen_by_it]
            keys = k_cache[layer, b, slots].double().repeat_interleave(query_heads // heads, dim=1)  # [n, Hq, D]
            values = v_cache[layer, b, slots].double().repeat_interleave(query_heads // heads, dim=1)
            scores = scale * torch.einsum("hd,nhd->hn", query[i, t].double(), keys)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            lse[i, t] = scores.logsumexp(-1)
            # The weight of a finite score is not 0, though it may be less than FP64 can hold.
            weights = scores.softmax(-1)
            weights = torch.where(scores == -torch.inf, weights, weights.clamp_min(torch.finfo(torch.float64).tiny))
            out[i, t] = torch.einsum("hn,nhd->hd", weights, values)
    return out, lse


def append_attend(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    overflow_counts: Tensor,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_lengths: Tensor | None = None,
    *,
    sink_positions: int = 0,
    saturate: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each new position appended, then attended to by its query; padding queries answer zeros with LSE -inf."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=query.device)
    batch, rows = key.shape[:2]
    for t in range(rows):
        count = torch.ones(batch, dtype=torch.int64)
        if new_lengths is not None:
            count = (t >= rows - new_lengths.cpu().clamp(0, rows)).long()
        append(
            k_cache, v_cache, state, overflow_counts, layer, key[:, t : t + 1], value[:, t : t + 1], count,
            sink_positions=sink_positions, saturate=saturate, sequences=sequences,
        )  # fmt: skip
        o, s = attend(
            k_cache, v_cache, state, layer, query[:, t : t + 1],
            sink_positions=sink_positions, scale=scale, window=window, softcap=softcap,
            sequences=sequences,
        )  # fmt: skip
        for b in range(batch):
            if count[b]:
                out[b, t], lse[b, t] = o[b, 0], s[b, 0]
    return out, lse


def copy_sequences(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    sources: Tensor,
    destinations: Tensor | None = None,
    *,
    sink_positions: int = 0,
) -> None:
    """Sequences `destinations` (0, 1, ... if None) become what `sources` were: the slots they held, and their state."""
    layers, batch, positions = k_cache.shape[:3]
    old_keys, old_values, old_state = k_cache.clone(), v_cache.clone(), state.clone()
    pairs = zip(sources.tolist(), range(batch) if destinations is None else destinations.tolist(), strict=True)
    for source, destination in pairs:
        if not (0 <= source < batch and 0 <= destination < batch):
            continue
        for layer in range(layers):
            held = held_positions(int(old_state[0, layer, source]), int(old_state[1, layer, source]), sink_positions)
            slots = [slot_of(position, positions, sink_positions) for position in held]
            k_cache[layer, destination, slots] = old_keys[layer, source, slots]
            v_cache[layer, destination, slots] = old_values[layer, source, slots]
            state[:2, layer, destination] = old_state[:2, layer, source]


def copy_from(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    source_k_cache: Tensor,
    source_v_cache: Tensor,
    source_state: Tensor,
    sources: Tensor,
    destinations: Tensor,
    *,
    sink_positions: int = 0,
) -> None:
    """Sequences `destinations` become what `sources` of another cache are: its positions, as many as a ring of this
    size would hold (the sinks and the newest), each in the slot that it has here."""
    layers, batch, positions = k_cache.shape[:3]
    source_batch, source_positions = source_k_cache.shape[1:3]
    for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
        if not (0 <= source < source_batch and 0 <= destination < batch):
            continue
        for layer in range(layers):
            seqlen, first = source_state[:2, layer, source].tolist()
            first = max(first, seqlen - (positions - sink_positions))
            for position in held_positions(seqlen, first, sink_positions):
                slot = slot_of(position, positions, sink_positions)
                source_slot = slot_of(position, source_positions, sink_positions)
                k_cache[layer, destination, slot] = source_k_cache[layer, source, source_slot]
                v_cache[layer, destination, slot] = source_v_cache[layer, source, source_slot]
            state[0, layer, destination], state[1, layer, destination] = seqlen, first


def truncate(
    state: Tensor,
    length: int | Tensor,
    *,
    sequences: Tensor | None = None,
    sink_positions: int = 0,
    newest: bool = False,
) -> None:
    """Keeps the `length` (a tensor: `length[i]`) oldest held positions of the chosen sequences, in every layer.

    With `newest`, takes back that many of the newest instead: each layer and sequence keeps what it holds less those.

    What is kept is a prefix of the held positions, so the next position appended is the one after the last kept; with
    sinks alone kept whole, it is the first of the rest. Evicted positions do not come back: `first` stays, unless
    sinks are dropped too, for then nothing else is left.
    """
    _, layers, batch = state.shape
    for layer in range(layers):
        for i, b in _chosen(sequences, batch):
            n = max(int(length[i]), 0) if isinstance(length, Tensor) else length
            seqlen, first = int(state[0, layer, b]), int(state[1, layer, b])
            held = len(held_positions(seqlen, first, sink_positions))
            if newest:
                n = max(held - n, 0)
            if n >= held:
                continue
            if n < sink_positions:
                seqlen, first = n, sink_positions
            else:
                seqlen = first + n - sink_positions
            state[0, layer, b], state[1, layer, b] = seqlen, first


def reset(state: Tensor, sequences: Tensor | None = None, *, sink_positions: int = 0) -> None:
    """Forgets every position of the chosen sequences; numbering begins at 0 again."""
    for _, b in _chosen(sequences, state.shape[2]):
        state[0, :, b] = 0
        state[1, :, b] = sink_positions


def clear(state: Tensor, overflow_counts: Tensor, *, sink_positions: int = 0) -> None:
    """Forgets every position."""
    state.zero_()
    state[1] = sink_positions
    overflow_counts.zero_()
