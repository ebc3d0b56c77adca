"""Taking tokens back, and choosing sequences: what an `Fp16Cache` does to all of its layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import shown
from .indexed import IndexedLayer
from .shared import WholeCache
from .states import StateLayer
from .version import CROP_MARGIN


def take_back(cache: WholeCache, count: int) -> None:
    """`Fp16Cache.crop`, but for states, which stay as they are unless all tokens are taken back."""
    shared = cache.shared
    for layer in cache.attention_layers:
        left = layer.columns - count
        if left < 0:
            raise ValueError(f"Fp16Cache: crop({-count}) of {layer.columns} tokens")
        if layer.window is not None and layer.first_held > max(left - layer.window + 1, 0):
            raise ValueError(
                f"Fp16Cache: crop({-count}): a full ring of a sliding window layer can take back "
                f"{CROP_MARGIN} tokens; reset() the cache and prefill the text anew"
            )
    shared.raise_deferred_errors(wait=True)
    left = cache.attention_layers[0].columns - count
    if left == 0:
        cache.reset()  # which also clears sequences that are not in use
        return
    for group in cache.caches:
        layer = next(layer for layer in cache.attention_layers if layer.cache is group)
        real = shared.padding.real_columns(layer.window, layer.columns)
        removed: int | Tensor = count  # with an int the host keeps exact lengths
        if real is not None:
            removed = real[:, left:].sum(1).to(group.device)
        group.storage.drop_newest(group, removed, **shared.sequences_argument(group.device))
    for layer in cache.attention_layers:
        layer.columns = left
        if isinstance(layer, IndexedLayer):
            layer.indexed = left
        shared.padding.all_real_from(left, layer.window)
    shared.fed_tokens.crop(left)
    shared.positions.remove(count, left)


def select(cache: WholeCache, sequences: Tensor) -> None:
    """Sequence i becomes what sequence `sequences[i]` was. Only these are in use then."""
    shared = cache.shared
    shared.append_pending()
    if shared.active is None:
        return
    if not isinstance(sequences, Tensor):
        sequences = torch.tensor(sequences, device="cpu")
    if sequences.dim() != 1 or sequences.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"Fp16Cache: indices of sequences must be integers [n], got {sequences.dtype} {list(sequences.shape)}"
        )
    if not 1 <= len(sequences) <= cache.batch_size:
        raise ValueError(f"Fp16Cache: 1 to batch_size={cache.batch_size} sequences can be chosen, got {len(sequences)}")
    if sequences.is_cpu and not bool(((sequences >= 0) & (sequences < shared.active)).all()):
        raise IndexError(
            f"Fp16Cache: indices of sequences must be from 0 to {shared.active - 1}, as {shared.active} are in "
            f"use, got {sequences.tolist()[:8]}"
        )
    rest = torch.arange(len(sequences), cache.batch_size, device=sequences.device)
    all_sequences = torch.cat([sequences.long(), rest])
    for group in cache.caches:
        group.storage.reorder(group, all_sequences.to(group.device))
    if shared.agreement is not None:
        shared.agreement.select(sequences.long())
    shared.fed_tokens.select(sequences)
    shared.positions.select(sequences)
    shared.padding.select(sequences)
    for layer in cache.layers:
        if isinstance(layer, (StateLayer, IndexedLayer)):
            layer.select(sequences.long())
    shared.active = len(sequences)


def repeat(cache: WholeCache, repeats: int) -> None:
    """See `Fp16Cache.batch_repeat_interleave`."""
    cache.shared.append_pending()
    active = cache.shared.active
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"Fp16Cache: repeats must be an integer, at least 1, got {shown(repeats)}")
    if active is None:
        return
    if active * repeats > cache.batch_size:
        raise ValueError(
            f"Fp16Cache: {active} sequences {repeats} times need batch_size={active * repeats} at construction, "
            f"got {cache.batch_size}"
        )
    select(cache, torch.arange(active, device="cpu").repeat_interleave(repeats))


def keep(cache: WholeCache, indices: Tensor) -> None:
    """See `Fp16Cache.batch_select_indices`."""
    cache.shared.append_pending()
    active = cache.shared.active
    if active is None:
        return
    try:
        chosen = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Fp16Cache: indices of sequences must be integers [n], got {shown(indices)}") from None
    if chosen.dtype == torch.bool and chosen.shape == (active,):
        chosen = chosen.nonzero()[:, 0]
    select(cache, chosen)
