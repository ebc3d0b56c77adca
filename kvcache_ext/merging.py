"""Merging answers of attention over disjoint sets of positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .errors import shown

_LEAST_WEIGHT = 2.0**-100  # of an answer in a sum of several: nothing beside 1, but not 0, which times infinity is NaN


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
