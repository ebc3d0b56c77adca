"""The ops over plain tensors, as PyTorch's dispatcher knows them (`torch.ops.kvcache_ext.*`).

`StreamingKVCacheFp16` calls the native cache directly; under `torch.compile` it calls these. They take a
cache as its tensors:

- `k_cache`, `v_cache`: FP16 `[layers, batch, positions, kv_heads, head_dim]`, contiguous.
- `state`: int64 `[3, layers, batch]`: seqlens; the oldest position held that is not a sink; and a
  scratch row that is zero between calls.
- `overflow_counts`: int64 `[layers]`.

`append`, `append_all`, `append_attend`, `copy_sequences`, `copy_from`, `truncate`, `reset` and `clear` change them in
place and return nothing. Each op is written again in plain torch in `kvcache_ext.reference`.

`sequences`, int64 or int32 `[n]`, are the sequences that a call is about: its other tensors have n entries then. They
must be distinct, which is not checked; entries whose sequence is out of range are left out, and read as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._extension import extension as _extension  # noqa: F401  (loading it registers the ops)

_ops = torch.ops.kvcache_ext


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
    """Converts `key` and `value` (`[B, T, H, D]`, FP32, FP16 or BF16) to FP16 and stores them in one layer."""
    _ops.append(
        k_cache, v_cache, state, overflow_counts, layer, key, value, new_lengths, sink_positions, saturate, sequences
    )


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
    """`append` to every layer at once: `keys` and `values` are `[layers, B, T, H, D]`."""
    _ops.append_all(
        k_cache, v_cache, state, overflow_counts, keys, values, new_lengths, sink_positions, saturate, sequences
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
    out: tuple[Tensor, Tensor] | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Copies the rows at chronological `indices` (int64 `[n]` or `[B, n]`) of one layer out, converted to `dtype`."""
    if out is None:
        return _ops.gather(k_cache, v_cache, state, layer, indices, sink_positions, dtype, sequences)
    _ops.gather_out(k_cache, v_cache, state, layer, indices, sink_positions, out[0], out[1], sequences)
    return out


def attend(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    workspace: Tensor,
    layer: int,
    query: Tensor,
    *,
    sink_positions: int = 0,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor,
    lse: Tensor | None = None,
    sequences: Tensor | None = None,
    rounds: bool = False,
) -> None:
    """Attention of the positions of `query`, `[B, T, Hq, D]`, over one layer, written to `out` and `lse`.

    `T` is any number. `scale` is at most 2^86 in magnitude; `window` and `softcap` 0 mean none. `rounds`: the kernels
    for many queries may round queries and weights to FP16. `workspace`: FP32, its first 1,024 elements zero;
    `memory.workspace_floats` says how many elements it must have.
    """
    _ops.attend(
        k_cache, v_cache, state, workspace, layer, query, sink_positions, scale, window, softcap, out, lse, sequences,
        rounds,
    )  # fmt: skip


def append_attend(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    overflow_counts: Tensor,
    workspace: Tensor,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_lengths: Tensor | None = None,
    *,
    sink_positions: int = 0,
    saturate: bool = True,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor,
    lse: Tensor | None = None,
    sequences: Tensor | None = None,
    rounds: bool = False,
) -> None:
    """`append` and `attend` in one call, as if each position were appended and attended to in turn.

    Many new positions are stored before attention, unless that evicts what queries of the call still see; then
    afterwards. The device decides, for each sequence.
    """
    _ops.append_attend(
        k_cache, v_cache, state, overflow_counts, workspace, layer, query, key, value, new_lengths, sink_positions,
        saturate, scale, window, softcap, out, lse, sequences, rounds,
    )  # fmt: skip


def copy_sequences(
    k_cache: Tensor,
    v_cache: Tensor,
    state: Tensor,
    sources: Tensor,
    destinations: Tensor | None = None,
    *,
    sink_positions: int = 0,
) -> None:
    """Sequences `destinations` become what `sources` were, in every layer: rows held, and state. All at once.

    Both are int64 or int32 `[n]`, `destinations` distinct; without them, sequence b becomes what `sources[b]` was. A
    pair with an index out of range does nothing.
    """
    _ops.copy_sequences(k_cache, v_cache, state, sources, destinations, sink_positions)


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
    """Sequences `destinations` become what `sources` of another cache are, in every layer: rows held, and numbering.

    The other cache has the same layers, kv_heads, head_dim and sinks; a smaller ring keeps the sinks and the newest.
    Both are int64 or int32 `[n]`, `destinations` distinct. A pair with an index out of range does nothing.
    """
    _ops.copy_from(
        k_cache, v_cache, state, source_k_cache, source_v_cache, source_state, sources, destinations, sink_positions
    )


def truncate(
    k_cache: Tensor,
    state: Tensor,
    length: int | Tensor,
    *,
    sequences: Tensor | None = None,
    sink_positions: int = 0,
    newest: bool = False,
) -> None:
    """Keeps the `length` oldest held positions of every layer and sequence (all of them where fewer are held).

    With `newest`, takes back the `length` newest instead (likewise all of them where fewer are held).

    A tensor `length`, int64 or int32 `[batch]` or `[n]`, has one number for each sequence, or for each of the chosen
    `sequences`, `[n]`.
    """
    if isinstance(length, Tensor):
        _ops.truncate(k_cache, state, 0, sink_positions, length, sequences, newest)
    else:
        _ops.truncate(k_cache, state, length, sink_positions, None, sequences, newest)


def reset(k_cache: Tensor, state: Tensor, sequences: Tensor | None = None, *, sink_positions: int = 0) -> None:
    """Forgets every position of the chosen sequences, int64 or int32 `[n]`, or of all. No data moves."""
    _ops.reset(k_cache, state, sequences, sink_positions)


def clear(k_cache: Tensor, state: Tensor, overflow_counts: Tensor, *, sink_positions: int = 0) -> None:
    """Forgets every position and zeroes the overflow counters. No data moves."""
    _ops.clear(k_cache, state, overflow_counts, sink_positions)


def _check_devices(op: str, on: Tensor, **tensors: Tensor | None) -> None:
    """A fake also answers where one tensor alone is on `meta`, and would let the call do nothing without a word."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != on.device:
            raise ValueError(f"{op}: {name} must be on the cache's device {on.device}, got {tensor.device}")


@torch.library.register_fake("kvcache_ext::append")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, overflow_counts, layer, key, value, new_lengths, sink_positions, saturate, sequences=None
):
    _check_devices(
        "append", k_cache, v_cache=v_cache, state=state, overflow_counts=overflow_counts, key=key,
        value=value, new_lengths=new_lengths, sequences=sequences,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::append_all")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, overflow_counts, keys, values, new_lengths, sink_positions, saturate, sequences=None
):
    _check_devices(
        "append_all", k_cache, v_cache=v_cache, state=state, overflow_counts=overflow_counts, keys=keys,
        values=values, new_lengths=new_lengths, sequences=sequences,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::gather")
def _(k_cache, v_cache, state, layer, indices, sink_positions, dtype, sequences=None):  # type: ignore[no-untyped-def]
    _check_devices("gather", k_cache, v_cache=v_cache, state=state, indices=indices, sequences=sequences)
    shape = [indices.shape[-1], *k_cache.shape[3:]]
    batch = k_cache.shape[1] if sequences is None else sequences.shape[0]
    if batch != 1:
        shape = [batch, *shape]
    return k_cache.new_empty(shape, dtype=dtype), v_cache.new_empty(shape, dtype=dtype)


@torch.library.register_fake("kvcache_ext::gather_out")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, layer, indices, sink_positions, key_out, value_out, sequences=None
):
    _check_devices(
        "gather_out", k_cache, v_cache=v_cache, state=state, indices=indices, key_out=key_out,
        value_out=value_out, sequences=sequences,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::attend")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, workspace, layer, query, sink_positions, scale, window, softcap, out, lse,
    sequences=None, rounds=False,
):  # fmt: skip
    _check_devices(
        "attend", k_cache, v_cache=v_cache, state=state, workspace=workspace, query=query,
        out=out, lse=lse, sequences=sequences,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::append_attend")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, overflow_counts, workspace, layer, query, key, value, new_lengths, sink_positions,
    saturate, scale, window, softcap, out, lse, sequences=None, rounds=False,
):  # fmt: skip
    _check_devices(
        "append_attend", k_cache, v_cache=v_cache, state=state, overflow_counts=overflow_counts, workspace=workspace,
        query=query, key=key, value=value, new_lengths=new_lengths, out=out, lse=lse, sequences=sequences,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::copy_sequences")
def _(k_cache, v_cache, state, sources, destinations, sink_positions):  # type: ignore[no-untyped-def]
    _check_devices("copy_sequences", k_cache, v_cache=v_cache, state=state, sources=sources, destinations=destinations)


@torch.library.register_fake("kvcache_ext::copy_from")
def _(  # type: ignore[no-untyped-def]
    k_cache, v_cache, state, source_k_cache, source_v_cache, source_state, sources, destinations, sink_positions
):
    _check_devices(
        "copy_from", k_cache, v_cache=v_cache, state=state, source_k_cache=source_k_cache,
        source_v_cache=source_v_cache, source_state=source_state, sources=sources, destinations=destinations,
    )  # fmt: skip


@torch.library.register_fake("kvcache_ext::truncate")
def _(  # type: ignore[no-untyped-def]
    k_cache, state, length, sink_positions, lengths=None, sequences=None, newest=False
):
    op = "drop_newest" if newest else "truncate"
    _check_devices(op, k_cache, state=state, lengths=lengths, sequences=sequences)


@torch.library.register_fake("kvcache_ext::reset")
def _(k_cache, state, sequences, sink_positions):  # type: ignore[no-untyped-def]
    _check_devices("reset", k_cache, state=state, sequences=sequences)


@torch.library.register_fake("kvcache_ext::clear")
def _(k_cache, state, overflow_counts, sink_positions):  # type: ignore[no-untyped-def]
    _check_devices("clear", k_cache, state=state, overflow_counts=overflow_counts)
