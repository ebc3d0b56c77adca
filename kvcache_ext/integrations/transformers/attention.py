"""The attention that a model calls: over an `Fp16Cache` in place, or over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .layers import without_gradient
from .protocol import PendingKeyValues, counts_of, flags_of, is_padding_mask
from .version import NAME


def attend(
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
    """The attention function that transformers finds under this attention's name.

    `query`: `[B, Hq, T, D]`. `key`, `value`: the same `PendingKeyValues`, or tensors where there is no `Fp16Cache`.
    `attention_mask`: what `make_mask` returned, or a 4D mask of the caller's. Returns `[B, T, Hq, D]`, and no weights.
    """
    if not isinstance(key, PendingKeyValues):
        return _other_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, options)
    if not is_compiling():
        key.layer.drop_pending()
        if key.appended:
            raise RuntimeError(
                "Fp16Cache: a layer's attention came after the cache was asked for something else, by when its keys "
                "and values had been taken for a past made by hand; reset() the cache"
            )
    refused = [
        what
        for what, wrong in (
            ("attention that is not causal", not _is_causal(module, options)),
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
    again, key.attended = key.attended, True
    if attention_mask is not None and (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        key.layer.note_masked_step()
        if again:
            keys, values = layer.gather_again(key.new_key.shape[2], query.dtype)
            _check_mask(attention_mask, query, keys.shape[2])
        else:
            _check_mask(attention_mask, query, layer.gathered_columns(query.shape[2]))
            keys, values = (x.to(query.dtype) for x in layer.append_gather(key.new_key, key.new_value))
        return _masked_attention(query, keys, values, attention_mask, scaling, softcap, s_aux), None
    new_query, new_key, new_value = (x.detach().transpose(1, 2) for x in (query, key.new_key, key.new_value))
    queries, new_tokens = new_query.shape[1], new_key.shape[1]
    if queries < new_tokens:  # the last ones alone: of a layer that shares keys and values (Gemma 4, logits_to_keep)
        new_query = nn.functional.pad(new_query, (0, 0, 0, 0, new_tokens - queries, 0))
    new_lengths = order = None
    if attention_mask is not None:
        batch = new_key.shape[0]
        new_lengths, flags = counts_of(attention_mask, batch), flags_of(attention_mask, batch, new_tokens)
        if flags is not None:
            # Padding among the new tokens: the real ones move to the end in their order, and back after attention.
            new_lengths = flags.sum(1, dtype=torch.int32)
            order = flags.argsort(dim=1, stable=True)
            new_query, new_key, new_value = (_reordered(x, order) for x in (new_query, new_key, new_value))
        elif new_lengths is None:
            raise ValueError(
                f"Fp16Cache: a mask of {attention_mask.dtype} and shape {list(attention_mask.shape)} reached the "
                "attention; pass the model a 2D mask, or a 4D one of bool or floating point"
            )
    if again:
        answer, lse = layer.attend_again(new_query, scale=scaling, softcap=softcap, return_lse=s_aux is not None)
    else:
        answer, lse = layer.append_attend(
            new_query, new_key, new_value, new_lengths, scale=scaling, softcap=softcap, return_lse=s_aux is not None
        )
    if s_aux is not None and lse is not None:  # a learned logit (sink) that takes a share of the weights
        answer = answer * torch.sigmoid(lse - s_aux.float())[..., None].to(answer.dtype)
    if order is not None:
        answer = _reordered(answer, order.argsort(dim=1))
    return without_gradient(answer[:, new_tokens - queries :], query), None


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """`x` `[B, T, H, D]` with the tokens of each sequence in this order, `[B, T]`."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _check_mask(mask: Tensor, query: Tensor, keys: int) -> None:
    """Raises unless a 4D mask fits `query` `[B, Hq, T, D]` and so many keys. To be called before an append."""
    batch, heads, queries, _ = query.shape
    fits = mask.dim() == 4 and mask.shape[-1] == keys and mask.shape[-2] in (1, queries)
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"Fp16Cache: an attention mask of shape {list(mask.shape)} does not fit {queries} queries and {keys} keys, "
            f"{batch} sequences and {heads} heads"
        )


def _masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention under a 4D mask: bool, or added to the scores.

    `query`: `[B, Hq, T, D]`. `keys`, `values`: `[B, H, n, D]`. Returns `[B, T, Hq, D]`.
    """
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
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
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
    """Attention over tensors `[B, heads, n, D]`: a forward pass without a cache, or with another."""
    if mask is not None and is_padding_mask(mask):
        raise RuntimeError("Fp16Cache: a mask that was prepared for an Fp16Cache reached attention without one")
    queries, keys = query.shape[2], key.shape[2]
    plain = softcap is None and s_aux is None
    if not plain and dropout != 0.0:
        raise NotImplementedError(f"{NAME!r} attention has no dropout beside a softcap or sinks; use 'eager'")
    # Without a mask attention is causal, and the last query sees the last key. torch's causal mask is aligned to the
    # first query and the first key.
    if mask is None and (not plain or (keys > queries > 1 and _is_causal(module, options))):
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if plain:
        answer, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
        return answer, None
    assert mask is not None
    _check_mask(mask, query, keys)
    return _masked_attention(query, key, value, mask, scaling, softcap, s_aux), None
