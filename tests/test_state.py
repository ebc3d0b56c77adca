"""Lengths, truncation, clearing, copies: the state model, on every backend."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache, poison

from kvcache_ext import StreamingKVCacheFp16, ops


def rows(backend: Backend, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(backend.device)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("appended", [0, 2, 5, 8, 11, 21])
def test_truncate_then_append(backend: Backend, sinks: int, appended: int) -> None:
    """From every length to every shorter one, then on past another wrap."""
    for n in range(min(appended, 8) + 1):
        twin = Twin(backend, num_layers=1, num_heads=1, head_dim=4, sink_positions=sinks)
        twin.append(0, rows(backend, 1, appended, 1, 4), rows(backend, 1, appended, 1, 4))
        before = twin.cache.get_range_f32(0, 0, n)
        twin.truncate(n)
        twin.check()
        assert len(twin.cache) == n
        assert_same_bits(twin.cache.get_valid_f32(0)[0], before[0])
        for count in (1, 2, 9):
            twin.append(0, rows(backend, 1, count, 1, 4), rows(backend, 1, count, 1, 4))
            twin.check()


def test_truncation_goes_on_where_it_cut(backend: Backend) -> None:
    cache = make_cache(backend, sink_positions=2)
    for layer in range(2):
        cache.append(layer, rows(backend, 20, 2, 8), rows(backend, 20, 2, 8))
    assert (len(cache), cache.position) == (8, 20)  # held: 0, 1 and 14 to 19
    cache.truncate(5)
    assert (len(cache), cache.position) == (5, 17)  # 0, 1, 14, 15, 16
    cache.truncate(2)
    assert (len(cache), cache.position) == (2, 14)  # 0, 1; the next is 14
    cache.truncate(1)
    assert (len(cache), cache.position) == (1, 1)  # 0; the next is 1, which is a sink again
    cache.truncate(0)
    assert (len(cache), cache.position, cache.is_empty()) == (0, 0, True)


def test_evicted_positions_do_not_come_back(backend: Backend) -> None:
    """After a wrap and a truncation fewer positions are held than before, and stay few until new ones come."""
    cache = make_cache(backend, num_layers=1)
    key = rows(backend, 12, 2, 8)
    cache.append(0, key, key)
    cache.truncate(3)
    assert_same_bits(cache.get_valid_f32(0)[0], key[4:7].half().float())
    cache.append(0, key[:1], key[:1])
    assert len(cache) == 4


def test_nan_that_is_evicted_or_truncated_changes_nothing(backend: Backend) -> None:
    cache = make_cache(backend, num_layers=1, sink_positions=1)
    nan = torch.full((3, 2, 8), float("nan"), device=backend.device)
    key = rows(backend, 9, 2, 8)
    cache.append(0, key[:1], key[:1])
    cache.append(0, nan, nan)
    cache.append(0, key[1:8], key[1:8])  # evicts the NaN
    assert_same_bits(cache.get_valid_f32(0)[0], key[:8].half().float())
    cache.truncate(4)
    cache.append(0, nan, nan)
    cache.truncate(4)
    assert_same_bits(cache.get_valid_f32(0)[1], key[:4].half().float())
    everything = cache.gather(0, torch.arange(-3, 12, device=backend.device))
    assert not torch.stack(everything).isnan().any()


def test_layers_and_sequences_have_lengths_of_their_own(backend: Backend) -> None:
    cache = make_cache(backend, num_layers=3, batch_size=2)
    cache.append(
        2, rows(backend, 2, 5, 2, 8), rows(backend, 2, 5, 2, 8), new_lengths=torch.tensor([5, 1], device=backend.device)
    )
    cache.append(0, rows(backend, 2, 10, 2, 8), rows(backend, 2, 10, 2, 8))
    assert cache.cache_seqlens.tolist() == [[10, 10], [0, 0], [5, 1]]
    assert (len(cache), cache.position, cache.is_empty()) == (0, 10, True)
    cache.append(1, rows(backend, 2, 3, 2, 8), rows(backend, 2, 3, 2, 8))
    assert (len(cache), cache.is_empty()) == (1, False)
    cache.truncate(1)
    assert cache.cache_seqlens.tolist() == [[3, 3], [1, 1], [1, 1]]


def test_clear(backend: Backend) -> None:
    twin = Twin(backend, sink_positions=2)
    for _ in range(2):
        twin.append(0, rows(backend, 1, 11, 2, 8), rows(backend, 1, 11, 2, 8) * 1e5)
        twin.append(1, rows(backend, 1, 3, 2, 8), rows(backend, 1, 3, 2, 8))
        twin.check()
        assert twin.overflow_counts[0] > 0
        twin.clear()
        twin.check()
        assert (len(twin.cache), twin.cache.position, twin.cache.is_empty()) == (0, 0, True)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks(backend: Backend, seed: int) -> None:
    """Any calls in any order leave what the reference leaves."""
    generator = random.Random(seed)
    slots = generator.randint(1, 9)
    twin = Twin(
        backend,
        num_layers=2,
        batch_size=generator.randint(1, 3),
        max_positions=slots,
        sink_positions=generator.randrange(slots),
        num_heads=generator.randint(1, 3),
        head_dim=generator.choice([1, 3, 4, 8]),
        overflow=generator.choice(["saturate", "inf"]),
    )
    c = twin.cache
    for _ in range(15 if backend.slow else 40):
        action = generator.choice(["append", "append", "append_all", "ragged", "truncate", "clear"])
        count = generator.choice([1, 1, 1, 2, 3, slots, slots + 1, 3 * slots])
        shape = (c.batch_size, count, c.num_heads, c.head_dim)
        lengths = torch.tensor([generator.randint(-1, count + 1) for _ in range(c.batch_size)], device=backend.device)
        if action == "append":
            twin.append(generator.randrange(2), rows(backend, *shape), rows(backend, *shape) * 3e4)
        elif action == "append_all":
            twin.append_all(rows(backend, 2, *shape), rows(backend, 2, *shape))
        elif action == "ragged":
            twin.append(generator.randrange(2), rows(backend, *shape), rows(backend, *shape), lengths)
        elif action == "truncate":
            twin.truncate(generator.randint(0, len(c)))
        elif generator.random() < 0.2:
            twin.clear()
        twin.check()


def test_deep_copies_and_pickles_are_independent(backend: Backend) -> None:
    twin = Twin(backend, sink_positions=1, overflow="inf")
    for layer in range(2):
        twin.append(layer, rows(backend, 1, 11, 2, 8), rows(backend, 1, 11, 2, 8))
    original = twin.cache
    buffer = io.BytesIO()
    pickle.dump(original, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(original), copy.copy(original), pickle.load(buffer)):
        assert (len(other), other.position, repr(other)) == (8, 11, repr(original))
        assert_same_bits(other.get_valid_f32(1)[0], original.get_valid_f32(1)[0])
        poison(other)
        other.append(0, rows(backend, 2, 8) * 1e6, rows(backend, 2, 8))
        other.clear()
        twin.check()
        other.append_all(rows(backend, 2, 3, 2, 8), rows(backend, 2, 3, 2, 8))
        assert (len(other), len(original)) == (3, 8)


def test_ops_on_plain_tensors(backend: Backend) -> None:
    """The functions of kvcache_ext.ops reach the same kernels, and a cache notices what they do to its tensors."""
    twin = Twin(backend, sink_positions=1)
    c = twin.cache
    key, value = rows(backend, 1, 10, 2, 8), rows(backend, 1, 10, 2, 8)
    ops.append(*c.tensors[:4], 0, key, value, sink_positions=1)
    ops.append_all(
        *c.tensors[:4], key.expand(2, 1, 10, 2, 8), value.expand(2, 1, 10, 2, 8),
        sink_positions=1,
    )  # fmt: skip
    twin.reference.append(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, key.cpu(), value.cpu(), sink_positions=1
    )
    twin.reference.append_all(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts,
        key.cpu().expand(2, 1, 10, 2, 8), value.cpu().expand(2, 1, 10, 2, 8), sink_positions=1,
    )  # fmt: skip
    twin.check()
    ops.truncate(c.k_cache, c.tensors.state, 4, sink_positions=1)
    twin.reference.truncate(twin.state, 4, sink_positions=1)
    twin.check()
    indices = torch.tensor([2, 0, 9], device=backend.device)
    got = ops.gather(*c.tensors[:3], 0, indices, sink_positions=1)
    assert_same_bits(got[0].cpu(), twin.gather(0, indices)[0])
    out = (torch.empty_like(got[0]), torch.empty_like(got[1]))
    ops.gather(*c.tensors[:3], 1, indices, sink_positions=1, out=out)
    assert_same_bits(out[1].cpu(), twin.gather(1, indices)[1])
    ops.clear(c.k_cache, c.tensors.state, c.tensors.overflow_counts, sink_positions=1)
    twin.reference.clear(twin.state, twin.overflow_counts, sink_positions=1)
    twin.check()


def test_made_in_inference_mode_used_outside(backend: Backend) -> None:
    with torch.inference_mode():
        cache = StreamingKVCacheFp16(1, 8, 2, 8, device=backend.device)
        cache.append(0, rows(backend, 2, 8), rows(backend, 2, 8))
        copied = copy.deepcopy(cache)
    for c in (cache, copied):
        c.append(0, rows(backend, 2, 8), rows(backend, 2, 8))
        assert len(c) == 2
        c.clear()
        assert len(c) == 0


def test_memory_is_exactly_half(backend: Backend) -> None:
    cache = StreamingKVCacheFp16(3, 50, 7, 5, batch_size=2, device=backend.device)
    assert cache.memory_bytes() == 3 * 2 * 50 * 7 * 5 * 2 * 2
    assert cache.memory_bytes() == cache.k_cache.nbytes + cache.v_cache.nbytes
    assert cache.memory_mb() == cache.memory_bytes() / 1e6
    assert cache.k_cache.shape == (3, 2, 50, 7, 5)
    everything = [*vars(cache).values(), *cache.tensors]
    hidden = [t for t in everything if isinstance(t, torch.Tensor) and t.dtype != torch.float16]
    plan = StreamingKVCacheFp16.plan(3, 50, 7, 5, batch_size=2, device=backend.device)
    assert sum(t.nbytes for t in hidden) == plan.state_bytes + plan.workspace_bytes < 13 * 10**6
    assert {id(t) for t in hidden} == {
        id(t) for t in (cache.tensors.state, cache.tensors.overflow_counts, cache.tensors.workspace)
    }
