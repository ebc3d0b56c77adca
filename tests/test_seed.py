"""The three tests that the project was ordered with, by name: full size on a GPU, less on a CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import assert_same_bits

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.memory import free_bytes

LAYERS, HEADS, HEAD_DIM, POSITIONS = 32, 32, 128, 65_536


def cache_for(device: torch.device) -> StreamingKVCacheFp16:
    """The 7B cache, or as many of its layers as fit: in a third of free memory, on a GPU in all but 8 GB."""
    layers = LAYERS
    free = free_bytes(device)
    per_layer = POSITIONS * HEADS * HEAD_DIM * 2 * 2
    if free is not None:
        budget = free - 8 * 10**9 if device.type == "cuda" else free // 3
        layers = min(LAYERS, max(budget // per_layer, 0))
    if layers == 0:
        pytest.skip(f"one layer needs {per_layer / 1e9:.1f} GB")
    return StreamingKVCacheFp16(layers, POSITIONS, HEADS, HEAD_DIM, device=device)


def test_f32_f16_conversion_roundtrip(device: torch.device) -> None:
    x = torch.randn(64, HEADS, HEAD_DIM, device=device)
    cache = StreamingKVCacheFp16(1, 64, HEADS, HEAD_DIM, device=device)
    cache.append(0, x, -x)
    keys, values = cache.get_valid_f32(0)
    assert_same_bits(keys, x.half().float())
    assert_same_bits(values, -x.half().float())
    # Half a unit in the last place of FP16's 11 bits, and half its smallest step.
    assert ((keys - x).abs() <= x.abs() * 2**-11 + 2**-25).all()


@pytest.mark.usefixtures("gigabytes")
def test_streaming_kv_cache_fp16_65536_positions(device: torch.device) -> None:
    """Filled to the last position in chunks, layer by layer; every layer read back and compared bit for bit."""
    cache = cache_for(device)
    layers = cache.num_layers if device.type == "cuda" else min(cache.num_layers, 2)
    chunk = 8192
    pool = torch.randn(chunk + 64, HEADS, HEAD_DIM, device=device)

    def rows(layer: int, start: int) -> torch.Tensor:
        """Other rows for every layer and chunk, out of one pool."""
        offset = (layer * 13 + start // chunk * 7) % 64
        return pool[offset : offset + chunk]

    for start in range(0, POSITIONS, chunk):
        for layer in range(layers):
            cache.append(layer, rows(layer, start), -rows(layer, start))
    assert cache.position == POSITIONS
    assert layers < cache.num_layers or len(cache) == POSITIONS
    out = (torch.empty_like(pool[:chunk]), torch.empty_like(pool[:chunk]))
    for layer in range(layers):
        for start in range(0, POSITIONS, chunk):
            cache.get_range_f32(layer, start, start + chunk, out=out)
            want = rows(layer, start).half().float()
            assert torch.equal(out[0], want)
            assert torch.equal(out[1], -want)


@pytest.mark.usefixtures("gigabytes")
def test_fp16_kv_cache_memory_half(device: torch.device) -> None:
    fp32_bytes = LAYERS * POSITIONS * HEADS * HEAD_DIM * 2 * 4
    if device.type == "cuda" and (free_bytes(device) or 0) > fp32_bytes // 2 + 8 * 10**9:
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        cache = StreamingKVCacheFp16(LAYERS, POSITIONS, HEADS, HEAD_DIM, device=device)
        taken = torch.cuda.memory_allocated(device) - before
        assert cache.memory_bytes() * 2 == fp32_bytes
        plan = StreamingKVCacheFp16.plan(LAYERS, POSITIONS, HEADS, HEAD_DIM, device=device)
        assert plan.workspace_bytes < 13 * 10**6
        beside = plan.state_bytes + plan.workspace_bytes + 2**22  # the last for the allocator's rounding
        assert cache.memory_bytes() <= taken < cache.memory_bytes() + beside
        assert cache.memory_bytes() < 36e9
    small = StreamingKVCacheFp16(2, 1024, HEADS, HEAD_DIM, device=device)
    fp32 = torch.empty(2, 2, 1024, HEADS, HEAD_DIM, dtype=torch.float32, device="meta")
    assert small.memory_bytes() * 2 == fp32.nbytes
    assert small.k_cache.nbytes + small.v_cache.nbytes == small.memory_bytes()
