"""Short calls of this package as some checkout has it: to hold two checkouts against each other.

    for tree in OLD NEW OLD NEW; do PYTHONPATH=$tree python bench/compare_trees.py; done

Both must be built in place. Prints microseconds: `attend` alone in CUDA graphs of many layers, the host's time of calls
about one position, and replayed steps of small Llamas with random FP16 weights. Nothing is written to bench/results.
Needs a GPU. On a host that others use, whole prompts and eager generation differ by more than anything to be seen here.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import kvcache_ext
from kvcache_ext import StreamingKVCacheFp16

DEVICE = torch.device("cuda")
SHAPES = (  # query heads, KV heads, batch, positions
    *((32, 32, 1, 1_024), (32, 32, 1, 4_096), (32, 32, 1, 65_536), (32, 32, 8, 4_096)),
    *((32, 8, 1, 1_024), (32, 8, 1, 4_096), (32, 8, 1, 65_536), (32, 8, 8, 4_096)),
    *((64, 8, 1, 4_096), (28, 4, 1, 1_024), (28, 4, 64, 4_096), (64, 4, 1, 65_536)),
)


def show(name: str, microseconds: float) -> None:
    print(f"{name:<44} {microseconds:10.3f} us", flush=True)


def attention(query_heads: int, heads: int, batch: int, positions: int) -> float:
    layers = max(2, min(32, 2 * 10**9 // (4 * batch * positions * heads * 128)))
    cache = StreamingKVCacheFp16(layers, positions + 64, heads, 128, batch_size=batch, device=DEVICE)
    rows = torch.randn(batch, 512, heads, 128, device=DEVICE)
    for layer in range(layers):
        for _ in range(0, positions, 512):
            cache.append(layer, rows, rows)
    query = torch.randn(batch, 1, query_heads, 128, device=DEVICE)
    out = torch.empty_like(query)
    cache.attend(0, query, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            cache.attend(layer, query, out=out)

    def replays() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1_000 / 20 / layers

    replays()
    return statistics.median(replays() for _ in range(9))


def on_the_host(call: Callable[[], object], times: int = 2_000) -> float:
    def once() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds / times * 1e6

    once()
    return statistics.median(once() for _ in range(7))


def replayed_step(layers: int, hidden: int, heads: int, kv_heads: int) -> float:
    transformers: Any = importlib.import_module("transformers")
    integration: Any = importlib.import_module("kvcache_ext.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with DEVICE:
        model = transformers.LlamaForCausalLM(config).half().eval()
    cache = integration.Fp16Cache.for_model(model, 4_096, 2)
    ids = torch.randint(1, 32_000, (1, 512), device=DEVICE)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        step = cache.decode_graph(model)

        def steps() -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                step(ids[:, :1])
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            cache.crop(-100)
            return seconds / 100 * 1e6

        steps()
        return statistics.median(steps() for _ in range(9))


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, {kvcache_ext.__file__}")
    for query_heads, heads, batch, positions in SHAPES:
        name = f"attend, {query_heads} on {heads}, {batch} x {positions:,}"
        show(name, attention(query_heads, heads, batch, positions))
        torch.cuda.empty_cache()
    cache = StreamingKVCacheFp16(4, 4_096, 8, 64, device=DEVICE)
    key = torch.randn(1, 1, 8, 64, device=DEVICE)
    out, indices = torch.empty_like(key), torch.arange(16, device=DEVICE)
    for layer in range(4):
        cache.append(layer, key, key)
    show("host, append", on_the_host(lambda: cache.append(0, key, key)))
    show("host, attend into out", on_the_host(lambda: cache.attend(1, key, out=out)))
    show("host, append_attend", on_the_host(lambda: cache.append_attend(2, key, key, key)))
    show("host, gather", on_the_host(lambda: cache.gather(0, indices)))
    show("host, truncate", on_the_host(lambda: cache.truncate(1)))
    show("replayed step, 8 layers of 512", replayed_step(8, 512, 8, 8))
    show("replayed step, 16 layers of 2,048", replayed_step(16, 2_048, 32, 8))


if __name__ == "__main__":
    main()
