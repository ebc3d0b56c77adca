"""The parts of a model's decoding step, each timed by itself: for gpu015_model.py and bench_generate.py."""

from __future__ import annotations

from typing import Any

import llama
import torch
from common import compare, on_gpu, throughput_sampler
from llama import LlamaShape
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16


def time_products(model: Any, weights: str, device: torch.device, batch: int = 1) -> float:
    """Every matrix product of a step, for a token of each sequence."""
    modules = llama.linears(model)
    inputs = {n: torch.randn(batch, 1, n, device=device).to(model.dtype) for n in {m.in_features for m in modules}}

    def products() -> list[Tensor]:
        return [module(inputs[module.in_features]) for module in modules]

    with llama.compiler_set_up(weights):
        # 8-bit weights are read as such in compiled code alone; the others' products are the same kernels there.
        work = torch.compile(products) if weights == "w8" and on_gpu(device) else products
        work()
        return compare({"": throughput_sampler(work, device)}, 5)[""].seconds


def time_attention(cache: Any, shape: LlamaShape, dtype: torch.dtype, device: torch.device) -> float:
    """One position appended and attended to in each layer of the full cache, each answer the next one's query."""
    batch = cache.caches[0].batch_size
    query = torch.randn(batch, 1, shape.heads, shape.head_dim, device=device).to(dtype)
    key, value = (torch.randn(batch, 1, shape.kv_heads, shape.head_dim, device=device).to(dtype) for _ in range(2))

    def attend() -> None:
        x = query
        for layer in cache.attention_layers:
            # (The group's own method refuses: what goes past the Fp16Cache is counted by nobody, as is fine here.)
            answer = StreamingKVCacheFp16.append_attend(layer.cache, layer.index, x, key, value)
            assert isinstance(answer, Tensor)
            x = answer

    return compare({"": throughput_sampler(attend, device)}, 5)[""].seconds
