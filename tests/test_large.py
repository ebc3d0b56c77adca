"""More than 2^31 elements in a layer: offsets are 64 bits wide everywhere.

Storage is not touched where nothing is written, so that a CPU machine with some 10 GB of address room takes part.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Backend, assert_same_bits

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.memory import cache_bytes, free_bytes

pytestmark = pytest.mark.usefixtures("gigabytes")


def large_cache(device: torch.device, *shape: int, batch_size: int = 1) -> StreamingKVCacheFp16:
    layers, positions, heads, head_dim = shape
    assert batch_size * positions * heads * head_dim > 2**31
    needed = cache_bytes(layers, batch_size, positions, heads, head_dim)
    free = free_bytes(device)
    if free is not None and free < needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB")
    return StreamingKVCacheFp16(layers, positions, heads, head_dim, batch_size=batch_size, device=device)


def move_to(cache: StreamingKVCacheFp16, position: int) -> None:
    """As if `position` positions had been appended, without writing gigabytes of them."""
    first = max(cache.sink_positions, position - cache.max_positions)
    cache.tensors.state[0] = position
    cache.tensors.state[1] = first
    cache._take(cache.tensors)  # lengths on the host start anew


def test_the_far_end_of_a_layer(backend: Backend) -> None:
    """The last slots of a layer of 2^31 + 2^20 elements, and the wrap to its first."""
    heads, head_dim = 16, 128
    positions = 2**31 // (heads * head_dim) + 512
    cache = large_cache(backend.device, 1, positions, heads, head_dim)
    move_to(cache, positions - 3)
    key = torch.randn(6, heads, head_dim, device=backend.device)
    cache.append(0, key, -key)
    assert cache.position == positions + 3
    want = key.half().float()
    keys, values = cache.get_range_f32(0, positions - 6, positions)
    assert_same_bits(keys, want)
    assert_same_bits(values, -want)
    assert_same_bits(cache.k_cache[0, 0, -3:].float(), want[:3])
    assert_same_bits(cache.k_cache[0, 0, :3].float(), want[3:])
    query = torch.randn(heads, head_dim, device=backend.device)
    answer = cache.attend(0, query, window=6)
    weights = (torch.einsum("hd,nhd->hn", query.double(), want.double()) * head_dim**-0.5).softmax(-1)
    expected = torch.einsum("hn,nhd->hd", weights, -want.double())
    assert ((answer - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-6
    indices = torch.tensor([positions - 1, positions - 6, positions], device=backend.device)
    keys, _ = cache.gather(0, indices)
    assert_same_bits(keys, torch.stack([want[5], want[0], torch.zeros_like(want[0])]))


@pytest.mark.parametrize("group", [1, 4])
def test_attention_over_a_whole_layer(backend: Backend, group: int) -> None:
    """Over all of 2^31 elements and more, on a GPU: one row in every slot but the last."""
    if backend.name != "cuda":
        pytest.skip("minutes on a CPU")
    heads, head_dim = 4, 128
    positions = 2**31 // (heads * head_dim) + 4096
    cache = large_cache(backend.device, 1, positions, heads, head_dim)
    row = torch.randn(heads, head_dim, device=backend.device)
    other = torch.randn(2, heads, head_dim, device=backend.device)
    chunk = row.expand(4096, heads, head_dim).contiguous()
    for _ in range(positions // 4096):
        cache.append(0, chunk, chunk)
    cache.k_cache[0, 0, -1], cache.v_cache[0, 0, -1] = other.half()
    query = torch.randn(heads * group, head_dim, device=backend.device)
    answer, lse = cache.attend(0, query, return_lse=True)
    k, v = (torch.stack([row.half(), o]).double().repeat_interleave(group, 1) for o in other.half())  # [2, Hq, D]
    scores = (query.double() * k).sum(-1) * head_dim**-0.5
    scores[0] += math.log(len(cache) - 1)
    want = (scores.softmax(0)[..., None] * v).sum(0)
    assert ((answer - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-5  # millions of equal terms
    torch.testing.assert_close(lse.double(), scores.logsumexp(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_prompt_at_the_far_end_of_a_layer(backend: Backend, precision: str) -> None:
    """Of 2,048 queries on a GPU, some that see a window on both sides of 2^31 elements, and of the ring's end."""
    rows = 2048 if backend.name == "cuda" else 40
    heads, head_dim, window = 16, 128, 30
    far = 2**31 // (heads * head_dim)  # the position of element 2^31: a quarter of the new rows lie before it,
    positions = far + rows // 4  # and a half before the ring's end
    cache = large_cache(backend.device, 1, positions, heads, head_dim)
    move_to(cache, far - rows // 4 - window)
    held, key = (torch.randn(n, heads, head_dim, device=backend.device) for n in (window, rows))
    cache.append(0, held, -held)
    query = torch.randn(rows, heads, head_dim, device=backend.device)
    answer = cache.append_attend(0, query, key, -key, window=window, precision=precision)
    again = cache.attend(0, query, window=window, precision=precision)
    assert cache.position == far - rows // 4 + rows > positions
    keys = torch.cat([held, key]).half().double()
    bound = 2.5e-6 if precision == "fp32" else 2e-3
    for t in (0, rows // 4 - 1, rows // 4, rows // 4 + 9, rows // 2 - 1, rows // 2, rows // 2 + 9, rows - 1):
        seen = keys[t + 1 : t + 1 + window]
        weights = (torch.einsum("hd,nhd->hn", query[t].double(), seen) * head_dim**-0.5).softmax(-1)
        want = torch.einsum("hn,nhd->hd", weights, -seen)
        for got in (answer[t], again[t]):
            assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < bound


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_prompt_over_a_whole_layer(backend: Backend, precision: str) -> None:
    """2,048 queries over 2^31 elements and more, on a GPU: of few heads the answers, every position seen."""
    if backend.name != "cuda":
        pytest.skip("hours on a CPU")
    heads, head_dim, rows = 32, 512, 2048
    positions = 2**31 // (heads * head_dim) + 4096
    cache = large_cache(backend.device, 1, positions, heads, head_dim)
    for begin in range(0, positions - rows, 4096):
        count = min(4096, positions - rows - begin)
        cache.append(0, *torch.randn(2, count, heads, head_dim, device=backend.device))
    query, key, value = torch.randn(3, rows, heads, head_dim, device=backend.device)
    answer = cache.append_attend(0, query, key, value, precision=precision)
    assert len(cache) == positions
    bound = 2 * 2.5e-6 if precision == "fp32" else 2e-3  # of head_dim 512
    for t in (0, 63, 64, 1000, rows - 1):
        seen = positions - rows + t + 1
        for head in (0, 17, heads - 1):
            keys, values = (x[0, 0, :seen, head].double() for x in (cache.k_cache, cache.v_cache))
            want = (keys @ query[t, head].double() * head_dim**-0.5).softmax(-1) @ values
            assert (answer[t, head] - want).norm() < bound * want.norm()


def test_the_last_sequence_of_a_wide_batch(backend: Backend) -> None:
    batch, heads, head_dim, positions = 3, 16, 128, 2**30 // 2048
    cache = large_cache(backend.device, 1, positions, heads, head_dim, batch_size=batch)
    key = torch.randn(batch, 2, heads, head_dim, device=backend.device)
    cache.append(0, key, -key)
    keys, values = cache.get_valid_f32(0)
    assert_same_bits(keys, key.half().float())
    assert_same_bits(values, -key.half().float())
    assert_same_bits(cache.v_cache[0, 2, :2].float(), -key[2].half().float())


def test_more_than_2_to_the_31_positions(backend: Backend) -> None:
    """Position numbers beyond 32 bits, of a ring and of a cache with as many slots."""
    if backend.name == "cuda" and (free_bytes(backend.device) or 0) < 10**10:
        pytest.skip("needs 10 GB")
    cache = StreamingKVCacheFp16(1, 1000, 2, 8, device=backend.device, sink_positions=3)
    move_to(cache, 2**40 + 17)
    key = torch.randn(5, 2, 8, device=backend.device)
    cache.append(0, key, key)
    assert cache.position == 2**40 + 22
    assert_same_bits(cache.get_range_f32(0, 995, 1000)[0], key.half().float())
    slot = 3 + (2**40 + 17 - 3) % 997
    assert_same_bits(cache.k_cache[0, 0, slot].float(), key[0].half().float())

    wide = large_cache(backend.device, 1, 2**31 + 10, 1, 1)
    move_to(wide, 2**31 + 8)
    key = torch.randn(4, 1, 1, device=backend.device)
    wide.append(0, key, -key)
    assert_same_bits(wide.k_cache[0, 0, -2:].float(), key[:2].half().float())
    assert_same_bits(wide.v_cache[0, 0, :2].float(), -key[2:].half().float())
    keys, _ = wide.get_range_f32(0, 2**31 + 6, 2**31 + 10)
    assert_same_bits(keys, key.half().float())


def test_copies_at_the_far_end(backend: Backend) -> None:
    """Only the last slots of sequences of 2^30 elements hold anything: those move, and no other."""
    if backend.slow:
        pytest.skip("hours under emulation: a thread looks at every vector")
    heads, head_dim, positions = 16, 128, 2**30 // 2048 + 8
    cache = large_cache(backend.device, 1, positions, heads, head_dim, batch_size=3)
    cache.tensors.state[0] = positions
    cache.tensors.state[1] = positions - 3
    cache._take(cache.tensors)
    rows = torch.randn(3, 3, heads, head_dim, device=backend.device).half()
    cache.k_cache[0, :, -3:] = rows
    cache.v_cache[0, :, -3:] = -rows
    cache.k_cache[0, :, -4] = 7
    cache.reorder([2, 0, 2])
    assert_same_bits(cache.k_cache[0, :, -3:], rows[[2, 0, 2]])
    assert_same_bits(cache.v_cache[0, :, -3:], -rows[[2, 0, 2]])
    assert (cache.k_cache[0, :, -4] == 7).all()


def test_copies_between_caches_at_the_far_end(backend: Backend) -> None:
    """From the last slots of a layer of 3 * 2^30 elements into a small cache, and from there to another such end."""
    heads, head_dim, positions = 16, 128, 2**30 // 2048 + 8
    large = large_cache(backend.device, 1, positions, heads, head_dim, batch_size=3)
    large.tensors.state[0] = positions
    large.tensors.state[1] = positions - 3
    large._take(large.tensors)
    rows = torch.randn(3, 3, heads, head_dim, device=backend.device).half()
    large.k_cache[0, :, -3:] = rows
    large.v_cache[0, :, -3:] = -rows
    small = StreamingKVCacheFp16(1, 2, heads, head_dim, batch_size=2, device=backend.device)
    small.copy_sequence([2, 0], [0, 1], source=large)  # the newest two of each
    assert (small.lengths(), small.position) == ([2, 2], positions)
    keys, values = small.gather(0, torch.arange(2, device=backend.device), dtype=torch.float16)
    assert_same_bits(keys, rows[[2, 0], 1:])
    assert_same_bits(values, -rows[[2, 0], 1:])
    large.copy_sequence(1, 2, source=small)
    assert large.lengths() == [3, 3, 2]
    assert_same_bits(large.k_cache[0, 2, -2:], rows[0, 1:])
    assert_same_bits(large.v_cache[0, 2, -2:], -rows[0, 1:])
    assert_same_bits(large.k_cache[0, :2, -3:], rows[:2])
