"""The attention that a model calls: over an `Fp16Cache` in place, or over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .layers import NewRows, without_gradient
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
    """What transformers calls for this attention: `query` `[B, Hq, T, D]`; answers `[B, T, Hq, D]`."""
    if not isinstance(key, NewRows):  # no cache, or another one
        return _other_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, options)
    if not is_compiling():
        key.layer.shared.handed_out = None
        if key.appended:
            raise RuntimeError(
                "Fp16Cache: a layer's attention came after the cache was asked for something else, by when its keys "
                "and values had been taken for a past made by hand; reset() the cache"
            )
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
        _check_mask(attention_mask, query, layer.gathered(query.shape[2]))
        keys, values = (x.to(query.dtype) for x in layer.append_gather(key.new_key, key.new_value))
        return _masked(query, keys, values, attention_mask, scaling, softcap, s_aux), None
    new_query, new_key, new_value = (x.detach().transpose(1, 2) for x in (query, key.new_key, key.new_value))
    new_lengths = order = None
    if attention_mask is not None:
        ours = {torch.int32: (len(new_key), 1, 1, 1), torch.int8: (len(new_key), 1, 1, new_key.shape[1])}
        if attention_mask.shape != ours.get(attention_mask.dtype):
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
    return without_gradient(answer, query), None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """`x` `[B, T, H, D]` with the rows of each sequence in this order, `[B, T]`."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _check_mask(mask: Tensor, query: Tensor, keys: int) -> None:
    """Before anything is appended: a 4D mask for `query` `[B, Hq, T, D]` and so many keys."""
    batch, heads, rows, _ = query.shape
    fits = mask.dim() == 4 and mask.shape[-1] == keys and mask.shape[-2] in (1, rows)
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"Fp16Cache: an attention mask of shape {list(mask.shape)} does not fit {rows} queries and {keys} keys, "
            f"{batch} sequences and {heads} heads"
        )


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
    rows, keys = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    if mask is None and rows > 1 and keys > rows and (getattr(module, "is_causal", True) if causal is None else causal):
        # A mask that was not needed for an Fp16Cache: torch's own causal one is aligned to the other corner.
        mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    if softcap is None and s_aux is None:
        answer, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
        return answer, None
    if dropout != 0.0:
        raise NotImplementedError(f"{NAME!r} attention has no dropout beside a softcap or sinks; use 'eager'")
    if mask is None:
        mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    _check_mask(mask, query, key.shape[2])
    return _masked(query, key, value, mask, scaling, softcap, s_aux), None
