"""copy_sequence with a source: sequences of another cache, whatever the size of its ring, on every backend.

Every comparison is of the whole storage, bit for bit. What nobody has written is NaN.
"""

from __future__ import annotations

import random

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache
from test_sequences import filled, rows

from kvcache_ext import ops

LENGTHS = [0, 2, 5, 8, 13, 31]  # of the source's sequences: empty, short, full, wrapped


def numbers(backend: Backend, *values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=backend.device)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("source_slots", [4, 8, 13])
@pytest.mark.parametrize("slots", [4, 7, 8, 20])
def test_from_any_ring_to_any(backend: Backend, source_slots: int, slots: int, sinks: int) -> None:
    """Smaller, equal and larger rings; then both caches go on."""
    source = filled(backend, LENGTHS, max_positions=source_slots, sink_positions=sinks)
    twin = filled(backend, [3, 9, 1, 30, 0], max_positions=slots, sink_positions=sinks)
    twin.copy_from(source, [5, 1, 4], [0, 3, 4])
    twin.check()
    source.check()
    for count in (1, 2, slots):
        for each in (twin, source):
            batch = each.cache.batch_size
            each.append_all(rows(backend, 2, batch, count, 2, 8), rows(backend, 2, batch, count, 2, 8))
            each.check()
    twin.copy_from(source, [0, 2, 3], [1, 2, 0])
    twin.check()
    source.check()


@pytest.mark.parametrize("sinks", [0, 2])
def test_from_what_was_truncated(backend: Backend, sinks: int) -> None:
    """After a wrap and a truncation fewer positions are held than there are slots, and the oldest lies anywhere."""
    for slots in (3, 8, 11):
        for kept in range(9):
            source = filled(backend, [13, 21, 6], sink_positions=sinks)
            source.truncate(torch.tensor([kept, kept, kept], device=backend.device))
            source.append(0, rows(backend, 3, 2, 2, 8), rows(backend, 3, 2, 2, 8))
            twin = Twin(backend, batch_size=3, max_positions=slots, sink_positions=sinks)
            twin.copy_from(source, [2, 0, 1], [0, 1, 2])
            twin.check()
            twin.append(1, rows(backend, 3, 4, 2, 8), rows(backend, 3, 4, 2, 8))
            twin.check()


def test_numbers_of_positions_are_kept(backend: Backend) -> None:
    source = make_cache(backend, num_layers=1, batch_size=2, sink_positions=2)
    key = rows(backend, 2, 20, 2, 8)
    source.append(0, key, key)  # holds 0, 1 and 14 to 19
    cache = make_cache(backend, num_layers=1, max_positions=5, sink_positions=2)
    cache.copy_sequence(1, 0, source=source)
    assert cache.cache_seqlens.tolist() == [[20]]
    assert (cache.lengths(), cache.position) == ([5], 20)
    keys, _ = cache.gather(0, torch.arange(5, device=backend.device), dtype=torch.float16)
    assert_same_bits(keys, key[1, [0, 1, 17, 18, 19]].half())
    larger = make_cache(backend, num_layers=1, max_positions=50, sink_positions=2)
    larger.copy_sequence(1, 0, source=source)
    assert (larger.lengths(), larger.position) == ([8], 20)  # what had been evicted does not come back


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_every_form_of_src_and_dst(backend: Backend, index_dtype: torch.dtype) -> None:
    source = filled(backend, LENGTHS, sink_positions=2)
    twin = filled(backend, [3, 9, 5, 1], max_positions=6, sink_positions=2)
    of = [numbers(backend, 5, 2, 4, dtype=index_dtype), numbers(backend, 3, 0, 1, dtype=index_dtype)]
    for src in (of[0], [5, 2, 4]):
        for dst in (of[1], [3, 0, 1]):
            twin.reset()
            twin.copy_from(source, src, dst)
            twin.check()
    for src, dst in ((4, 2), (of[0][2], of[1][1]), (of[0][2], 3), (0, of[1][0])):
        twin.copy_from(source, src, dst)
        twin.check()
    twin.cache.copy_sequence(3, [2, 0], source=source.cache)  # a prompt, to several
    twin.reference.copy_from(
        twin.k_cache, twin.v_cache, twin.state, source.k_cache, source.v_cache, source.state,
        torch.tensor([3, 3]), torch.tensor([2, 0]), sink_positions=2,
    )  # fmt: skip
    twin.check()
    for nothing in ([], numbers(backend, dtype=index_dtype)):
        twin.copy_from(source, nothing, nothing)
        twin.check()
    source.check()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_pairs_out_of_range_do_nothing(backend: Backend, index_dtype: torch.dtype) -> None:
    """Each number is held against its own cache's sequences."""
    for batches in ((2, 5), (5, 2)):
        source = filled(backend, [9, 4, 13, 2, 7][: batches[0]])
        twin = filled(backend, [3, 9, 5, 1, 8][: batches[1]])
        src, dst = [-1, 4, 1, 0, 2], [0, 1, -5, 4, 3]
        twin.copy_from(source, numbers(backend, *src, dtype=index_dtype), numbers(backend, *dst, dtype=index_dtype))
        twin.check()
        source.check()


@pytest.mark.parametrize(
    ("heads", "head_dim", "slots"),
    [(1, 1, 5), (3, 1, 7), (1, 7, 5), (2, 7, 9), (3, 80, 6), (1, 12, 4), (2, 4, 6), (32, 128, 3), (2, 258, 4)],
)
def test_row_shapes(backend: Backend, heads: int, head_dim: int, slots: int) -> None:
    shape = {"num_heads": heads, "head_dim": head_dim, "sink_positions": 1}
    source = filled(backend, [2, 9, 4], max_positions=5, **shape)
    twin = filled(backend, [7, 1], max_positions=slots, **shape)
    twin.copy_from(source, [1, 0], [0, 1])
    twin.check()
    twin.copy_from(source, 2, 1)
    twin.check()


@pytest.mark.parametrize("batch", [1, 9, 65])
def test_many_pairs(backend: Backend, batch: int) -> None:
    generator = random.Random(batch)
    shape = {"num_heads": 1, "head_dim": 8, "sink_positions": 1}
    source = filled(backend, [generator.choice([0, 1, 3, 4, 7]) for _ in range(batch)], max_positions=5, **shape)
    twin = filled(backend, [generator.choice([0, 2, 9]) for _ in range(batch)], max_positions=4, **shape)
    order = list(range(batch))
    generator.shuffle(order)
    twin.copy_from(source, generator.choices(range(batch), k=batch), numbers(backend, *order))
    twin.check()


def test_more_than_a_block_of_each_layer(backend: Backend) -> None:
    """Many blocks, each with several vectors for a thread; on a CPU several threads' worth of rows."""
    slots = 90 if backend.slow else 700
    shape = {"num_heads": 4, "head_dim": 128, "sink_positions": 2}
    source = filled(backend, [slots // 2, slots * 5 // 3, 5], max_positions=slots, **shape)
    for other in (slots * 3 // 4, slots + 100):
        twin = filled(backend, [other * 2, 4], max_positions=other, **shape)
        twin.copy_from(source, [1, 0], [0, 1])
        twin.check()


def test_the_cache_itself_is_the_ordinary_call(backend: Backend) -> None:
    """Also where sequences change places, which copying one after the other would not do."""
    twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=2)
    twin.cache.copy_sequence([3, 1], [1, 3], source=twin.cache)
    twin._copy(torch.tensor([3, 1]), torch.tensor([1, 3]))
    twin.check()


def test_overflow_counters_stay(backend: Backend) -> None:
    """They belong to layers, not to sequences."""
    source, twin = (filled(backend, [3, 9]) for _ in range(2))
    source.append(0, rows(backend, 2, 1, 2, 8) * 1e6, rows(backend, 2, 1, 2, 8))
    twin.append(1, rows(backend, 2, 3, 2, 8) * 1e6, rows(backend, 2, 3, 2, 8))
    before = [each.cache.overflow_counts().tolist() for each in (source, twin)]
    assert before[0][0] > 0 and before[1][1] > 0
    twin.copy_from(source, [0, 1], [1, 0])
    twin.check()
    source.check()
    assert [each.cache.overflow_counts().tolist() for each in (source, twin)] == before


def test_the_copy_answers_as_the_source(backend: Backend) -> None:
    """Attention over the copy is attention over the original, bit for bit, and goes on to be."""
    source = make_cache(backend, num_layers=1, batch_size=3, max_positions=30, head_dim=64, sink_positions=3)
    cache = make_cache(backend, num_layers=1, batch_size=2, max_positions=30, head_dim=64, sink_positions=3)
    key = rows(backend, 3, 50, 2, 64)
    source.append(0, key, key * 2)
    cache.copy_sequence([2, 0], [0, 1], source=source)
    for _ in range(4):
        query, new = rows(backend, 2, 1, 4, 64), rows(backend, 2, 1, 2, 64)
        want = source.append_attend(0, query, new, new, sequences=[2, 0])
        assert_same_bits(cache.append_attend(0, query, new, new), want)


@pytest.mark.parametrize("which", ["cache", "source"])
def test_storage_that_is_not_aligned(backend: Backend, which: str) -> None:
    """Plain tensors may begin at any element: then elements move one at a time."""
    source, twin = filled(backend, [2, 9], sink_positions=1), filled(backend, [4, 0], max_positions=6, sink_positions=1)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return buffer[1:].view(t.shape).copy_(t)

    tensors = {}
    for name, each in (("cache", twin.cache), ("source", source.cache)):
        storage = (each.k_cache, each.v_cache)
        tensors[name] = [*(map(shifted, storage) if name == which else storage), each.tensors.state.clone()]
    order = (numbers(backend, 1, 0), numbers(backend, 0, 1))
    ops.copy_from(*tensors["cache"], *tensors["source"], *order, sink_positions=1)
    twin.copy_from(source, *order)
    for got, want in zip(tensors["cache"], (twin.k_cache, twin.v_cache), strict=False):
        assert_same_bits(got.cpu(), want)
    assert torch.equal(tensors["cache"][2].cpu(), twin.state)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks(backend: Backend, seed: int) -> None:
    """Two caches of different rings and batches, each now and then the other's source."""
    generator = random.Random(seed)
    sinks = generator.randrange(4)
    shape = {
        "num_layers": generator.randint(1, 3), "num_heads": generator.randint(1, 3),
        "head_dim": generator.choice([1, 3, 4, 8]), "sink_positions": sinks,
    }  # fmt: skip
    twins = [
        Twin(backend, batch_size=generator.randint(1, 4), max_positions=sinks + generator.randint(1, 9), **shape)
        for _ in range(2)
    ]
    for _ in range(12 if backend.slow else 40):
        twin, other = generator.sample(twins, 2)
        c, batch = twin.cache, twin.cache.batch_size
        action = generator.choice(["append", "append", "copy", "copy", "drop_newest", "truncate"])
        if action == "append":
            new = (batch, generator.choice([1, 2, c.max_positions + 1]), c.num_heads, c.head_dim)
            lengths = numbers(backend, *generator.choices(range(new[1] + 1), k=batch))
            twin.append(generator.randrange(c.num_layers), rows(backend, *new), rows(backend, *new), lengths)
        elif action == "copy":
            count = generator.randint(0, batch)
            src = generator.choices(range(other.cache.batch_size), k=count)
            dst = generator.sample(range(batch), count)
            on_device = [generator.random() < 0.5 for _ in range(2)]
            twin.copy_from(
                other, *(numbers(backend, *n) if t else n for n, t in zip((src, dst), on_device, strict=True))
            )
        elif action == "drop_newest":
            twin.drop_newest(numbers(backend, *generator.choices(range(-1, 9), k=batch)))
        else:
            twin.truncate(numbers(backend, *generator.choices(range(-1, 9), k=batch)))
        twin.check()
    for twin in twins:
        twin.check()
