"""Attention of many queries by torch's scaled_dot_product_attention: what bench_prompt.py holds ours against.

Every backend gets what it is fastest with. Causal attention of T queries to S > T keys: flash and memory-efficient have
`causal_lower_right`; cuDNN, and torch on a CPU, get an additive mask of the query's dtype, made once beforehand. A
sliding window: flash has an argument for it (of the op below SDPA, which does not pass it on); the others get a mask,
and only the keys that some query sees. Memory-efficient attention cannot share a KV head between query heads: its keys
and values are repeated beforehand.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from common import Sampler, Work, cpu_sampler, eager_sampler, on_gpu
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

FLASH, CUDNN, EFFICIENT = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
TOLERANCE = 0.02  # of a peer's answer beside ours: BF16 differs by some 0.005
ROUNDS, FEWEST_ROUNDS = 9, 3
NAMES = {FLASH: "SDPA flash", CUDNN: "SDPA cuDNN", EFFICIENT: "SDPA FP32"}  # efficient is used for FP32 alone


def using(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    """Within it torch uses this backend or raises; None: whichever it chooses."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def additive_mask(queries: int, held: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[1, 1, queries, held]`: 0 where a query sees a key, else -inf. The last query stands at the last key."""
    visible = torch.ones(queries, held, dtype=torch.bool, device=device).tril_(held - queries)
    if window is not None:
        visible.triu_(held - queries - window + 1)
    return torch.zeros(1, 1, queries, held, dtype=dtype, device=device).masked_fill_(visible.logical_not_(), -torch.inf)


def repeated(keys: Tensor, query_heads: int) -> Tensor:
    """A KV head `[B, H, S, D]` for every query head."""
    return keys if keys.shape[1] == query_heads else keys.repeat_interleave(query_heads // keys.shape[1], 1)


@dataclass
class Attention:
    """Causal attention, ready to be called, of sequences of one length. All tensors are `[B, H, rows, D]`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    arguments: dict[str, Any]  # of scaled_dot_product_attention
    flash_window: int | None = None

    @staticmethod
    def prepared(
        backend: SDPBackend | None, query: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Attention:
        query_heads, queries = query.shape[1:3]
        if window is not None and backend is FLASH:
            return Attention(query, keys, values, {}, window)
        if window is not None:  # the oldest key that the first query sees, and some more so that rows stay aligned
            first = max(0, keys.shape[2] - queries - window + 1) // 8 * 8
            keys, values = keys[:, :, first:].contiguous(), values[:, :, first:].contiguous()
        held = keys.shape[2]
        if backend is EFFICIENT:
            keys, values = repeated(keys, query_heads), repeated(values, query_heads)
        arguments: dict[str, Any] = {"enable_gqa": True} if keys.shape[1] != query_heads else {}
        if window is None and queries == held:
            arguments["is_causal"] = True
        elif window is None and backend in (FLASH, EFFICIENT):
            arguments["attn_mask"] = causal_lower_right(queries, held)
        else:
            arguments["attn_mask"] = additive_mask(queries, held, window, query.dtype, query.device)
        return Attention(query, keys, values, arguments)

    def __call__(self) -> Tensor:
        return self.attend(self.query)

    def attend(self, query: Tensor) -> Tensor:
        """With another query of the same shape."""
        if self.flash_window is None:
            return functional.scaled_dot_product_attention(query, self.keys, self.values, **self.arguments)
        query, keys, values = (x.transpose(1, 2) for x in (query, self.keys, self.values))
        answer: Tensor = torch.ops.aten._flash_attention_forward(
            query, keys, values, None, None, query.shape[1], keys.shape[1], 0.0, True, False,
            window_size_left=self.flash_window - 1, window_size_right=0,
        )[0]  # fmt: skip
        return answer.transpose(1, 2)


# Timing, and who takes part


def in_eager_calls(work: Work, device: torch.device, backend: SDPBackend | None = None) -> Sampler:
    """Times calls as they are, on a GPU while the host is ahead, with this backend of torch's."""
    with using(backend):
        inner = eager_sampler(work) if on_gpu(device) else cpu_sampler(work)

    def sample() -> float:
        with using(backend):
            return inner()

    return sample


def difference(answers: Sequence[Tensor], want: Tensor) -> float:
    """How far answers `[1, H, T, D]`, one a sequence, are from ours, `[B, T, H, D]`: relative, of three queries."""
    rows = [0, want.shape[1] // 2, want.shape[1] - 1]
    answer = torch.cat([a[:, :, rows] for a in answers]).transpose(1, 2).float()
    return float((answer - want[:, rows].float()).norm() / want[:, rows].float().norm())


class Missing:
    """Says once for each reason which peer or row there is not."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()
        self.failed: list[str] = []

    def note(self, row: str, peer: str, error: Exception) -> None:
        words = (str(error).strip().splitlines() or [""])[0][:160]
        no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        words = "does not fit into memory" if no_memory else words
        if (peer, words) not in self._said:
            self._said.add((peer, words))
            print(f"{row}: {peer} is left out: {type(error).__name__}: {words}", flush=True)
        if peer == "ours" and not no_memory:
            self.failed.append(row)


def checked(answers: Sequence[Tensor], want: Tensor) -> None:
    off = difference(answers, want)
    if not off <= TOLERANCE:  # nor NaN
        raise ValueError(f"its answer differs from ours by {off:.2g}")


def rounds_for(samplers: dict[str, Sampler], seconds: float, quick: bool) -> int:
    """As many rounds as take these seconds, within limits."""
    if quick:
        return 1
    begin = time.perf_counter()
    for sampler in samplers.values():
        sampler()
    return max(FEWEST_ROUNDS, min(ROUNDS, int(seconds / (time.perf_counter() - begin))))


def chosen(name: str, only: str) -> bool:
    return any(part in name for part in only.split(","))
