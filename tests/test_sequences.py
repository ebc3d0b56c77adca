"""Sequences one by one: truncate and reset of some, reorder, copy_sequence, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import Backend, Twin, as_tensor, assert_same_bits, make_cache
from test_attention import assert_close

from kvcache_ext import ops


def rows(backend: Backend, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(backend.device)


def filled(backend: Backend, lengths: list[int], **arguments: object) -> Twin:
    """A twin with so many positions of each sequence in its first layer, and one less in each after it."""
    twin = Twin(backend, batch_size=len(lengths), **arguments)
    c = twin.cache
    most = max([*lengths, 1])
    for layer in range(c.num_layers):
        new = torch.tensor([max(n - layer, 0) for n in lengths], device=backend.device)
        shape = (len(lengths), most, c.num_heads, c.head_dim)
        twin.append(layer, rows(backend, *shape), rows(backend, *shape), new)
    return twin


ORDERS = {
    "stay": [0, 1, 2, 3, 4],
    "swap": [1, 0, 2, 3, 4],
    "rotate": [1, 2, 3, 4, 0],
    "chain": [0, 0, 1, 2, 3],
    "all one": [3, 3, 3, 3, 3],
    "beams": [4, 4, 1, 1, 4],
    "two cycles": [1, 0, 4, 2, 3],
}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_reorder(backend: Backend, order: str, on_device: bool) -> None:
    """Empty, short, full and wrapped sequences, with and without sinks; then on with appending."""
    for sinks in (0, 3):
        twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=sinks)
        indices = torch.tensor(ORDERS[order], device=backend.device) if on_device else ORDERS[order]
        for _ in range(3):
            twin.reorder(indices)
            twin.check()
            twin.append(1, rows(backend, 5, 3, 2, 8), rows(backend, 5, 3, 2, 8))
            twin.check()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_indices_out_of_range_leave_their_sequence(backend: Backend, index_dtype: torch.dtype) -> None:
    twin = filled(backend, [3, 5, 11, 8])
    twin.reorder(torch.tensor([1, -1, 4, 2], dtype=index_dtype, device=backend.device))
    twin.check()
    twin.copy_sequence(
        torch.tensor([0, 7, 1], dtype=index_dtype, device=backend.device),
        torch.tensor([2, 0, -2], dtype=index_dtype, device=backend.device),
    )
    twin.check()


@pytest.mark.parametrize(
    ("heads", "head_dim", "slots"),
    [
        (1, 1, 5),
        (3, 1, 7),
        (1, 7, 5),
        (2, 7, 9),
        (3, 80, 6),
        (1, 12, 4),
        (2, 4, 6),
        (5, 16, 3),
        (32, 128, 3),
        (2, 258, 4),
    ],
)
def test_row_shapes(backend: Backend, heads: int, head_dim: int, slots: int) -> None:
    twin = filled(backend, [2, 9, 4], num_heads=heads, head_dim=head_dim, max_positions=slots, sink_positions=1)
    twin.reorder([1, 2, 0])
    twin.check()
    twin.copy_sequence(1, 0)
    twin.check()


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 33, 64, 65, 300])
def test_any_batch(backend: Backend, batch: int) -> None:
    generator = random.Random(batch)
    lengths = [generator.choice([0, 1, 3, 4, 7]) for _ in range(batch)]
    twin = filled(backend, lengths, max_positions=5, num_heads=2, head_dim=8 if batch % 2 else 4, sink_positions=1)
    orders = [[(b + 1) % batch for b in range(batch)], [generator.randrange(batch) for _ in range(batch)]]
    shuffled = list(range(batch))
    generator.shuffle(shuffled)
    for order in (*orders, shuffled, [min(b, 2) % batch for b in range(batch)]):
        twin.reorder(torch.tensor(order, device=backend.device))
        twin.check()
    if batch > 1:
        twin.copy_sequence(0, batch - 1)
        twin.check()


def test_more_than_a_block_of_each_layer(backend: Backend) -> None:
    """Many tiles, whose blocks go through them in turn; part of the storage holds nothing."""
    slots = 60 if backend.slow else 700
    twin = filled(
        backend, [slots // 2, slots * 2 // 3, 5], max_positions=slots, num_heads=4, head_dim=128, sink_positions=2
    )
    for order in ([1, 2, 0], [0, 0, 1]):
        twin.reorder(order)
        twin.check()


def test_copy_sequence(backend: Backend) -> None:
    for device in (None, backend.device):

        def given(*numbers: int, device: torch.device | None = device) -> object:
            return list(numbers) if device is None else torch.tensor(numbers, dtype=torch.int64, device=device)

        twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=2)
        for src, dst in (([3], [0]), ([0, 3], [3, 1]), ([2, 1, 0], [0, 2, 1]), ([1, 1], [4, 2]), ([], [])):
            twin.copy_sequence(given(*src), given(*dst))
            twin.check()
    twin.cache.copy_sequence(1, [3, 0])
    twin._copy(torch.tensor([1, 1]), torch.tensor([3, 0]))
    twin.check()
    twin.copy_sequence(1, 3)
    twin.check()
    twin.copy_sequence(torch.tensor(3, device=backend.device), 0)
    twin.check()
    twin.copy_sequence(2, 2)
    twin.check()


def test_a_fork_goes_its_own_way(backend: Backend) -> None:
    """A prompt in sequence 0, forked: both forks continue as the prompt's cache would have."""
    twin = filled(backend, [7, 3], num_layers=1, sink_positions=1)
    twin.cache.copy_sequence(0, 1)
    twin._copy(torch.tensor([0]), torch.tensor([1]))
    for _ in range(4):
        twin.append(0, rows(backend, 2, 2, 2, 8), rows(backend, 2, 2, 2, 8))
        twin.check()


@pytest.mark.parametrize("sinks", [0, 3])
def test_truncate_each(backend: Backend, sinks: int) -> None:
    for n in ([0, 2, 8, 5, 6], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [0, 2, 4, 8, 1]):
        for on_device in (False, True):
            twin = filled(backend, [0, 2, 8, 13, 6], num_layers=1, sink_positions=sinks)
            twin.truncate(torch.tensor(n, device=backend.device) if on_device else n)
            twin.check()
            twin.append(0, rows(backend, 5, 2, 2, 8), rows(backend, 5, 2, 2, 8))
            twin.check()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_lengths_on_the_device_are_clamped(backend: Backend, index_dtype: torch.dtype) -> None:
    twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=1)
    twin.truncate(torch.tensor([4, -2, 100, 7, 6], dtype=index_dtype, device=backend.device))
    twin.check()


def test_truncate_some(backend: Backend) -> None:
    for on_device in (False, True):

        def given(*numbers: int, on_device: bool = on_device) -> object:
            return torch.tensor(numbers, dtype=torch.int64, device=backend.device) if on_device else list(numbers)

        twin = filled(backend, [7, 2, 8, 13, 6], num_layers=1, sink_positions=2)
        twin.truncate(4, given(3, 0))
        twin.check()
        twin.truncate(given(5, 1), given(2, 3))
        twin.check()
        twin.truncate(0, given(4))
        twin.check()
        twin.truncate(3, given())
        twin.check()
    twin.truncate(torch.tensor([2, 2, 2], device=backend.device), torch.tensor([2, 9, -1], device=backend.device))
    twin.check()
    twin.truncate([1], torch.tensor([2], device=backend.device))
    twin.check()


def test_an_int_is_held_against_the_chosen_sequences(backend: Backend) -> None:
    cache = filled(backend, [5, 2, 7], num_layers=2).cache
    assert len(cache) == 1
    cache.truncate(4, sequences=[0, 2])
    assert cache.cache_seqlens.tolist() == [[4, 2, 4], [4, 1, 4]]
    with pytest.raises(IndexError, match="from 0 to 1, the number of positions held by sequence 1, got 2"):
        cache.truncate(2, sequences=[0, 1])


@pytest.mark.parametrize("sinks", [0, 3])
def test_reset(backend: Backend, sinks: int) -> None:
    twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=sinks)
    twin.append(0, rows(backend, 5, 1, 2, 8) * 1e6, rows(backend, 5, 1, 2, 8))
    assert twin.overflow_counts[0] > 0
    twin.reset([3])
    twin.check()
    twin.reset(torch.tensor([4, 7, 0, -1], device=backend.device))
    twin.check()
    twin.append_all(rows(backend, 2, 5, 4, 2, 8), rows(backend, 2, 5, 4, 2, 8))
    twin.check()
    twin.reset([])
    twin.check()
    twin.truncate(0)
    twin.reset()
    twin.check()  # the counters are as they were
    assert (len(twin.cache), twin.cache.position) == (0, 0)
    twin.append_all(rows(backend, 2, 5, 9, 2, 8), rows(backend, 2, 5, 9, 2, 8))
    twin.check()


@pytest.mark.parametrize("seed", range(6))
def test_random_walks(backend: Backend, seed: int) -> None:
    generator = random.Random(seed)
    slots = generator.randint(1, 9)
    batch = generator.randint(1, 6)
    twin = Twin(
        backend,
        num_layers=2,
        batch_size=batch,
        max_positions=slots,
        sink_positions=generator.randrange(slots),
        num_heads=generator.randint(1, 3),
        head_dim=generator.choice([1, 3, 4, 8]),
    )
    c = twin.cache

    def some(distinct: bool = False, count: int = batch) -> object:
        numbers = generator.sample(range(batch), count) if distinct else generator.choices(range(batch), k=count)
        return generator.choice([numbers, torch.tensor(numbers, dtype=torch.int64, device=backend.device)])

    for _ in range(12 if backend.slow else 40):
        action = generator.choice(["append", "append", "truncate", "truncate", "reset", "reorder", "copy"])
        count = generator.randint(0, batch)
        if action == "append":
            shape = (batch, generator.choice([1, 2, slots, slots + 1]), c.num_heads, c.head_dim)
            lengths = torch.tensor(generator.choices(range(shape[1] + 1), k=batch), device=backend.device)
            twin.append(generator.randrange(2), rows(backend, *shape), rows(backend, *shape), lengths)
        elif action == "truncate":
            n = torch.tensor(generator.choices(range(-1, slots + 2), k=count), dtype=torch.int64).to(backend.device)
            twin.truncate(n, some(True, count))
        elif action == "reset":
            twin.reset(some(True, min(count, 1)))
        elif action == "reorder":
            twin.reorder(some())
        else:
            twin.copy_sequence(some(False, count), some(True, count))
        twin.check()


def test_what_nobody_holds_is_not_read(backend: Backend) -> None:
    """The whole storage is NaN where nothing was written, also in what is moved around."""
    cache = filled(backend, [0, 2, 8, 13, 6], sink_positions=2).cache
    cache.reorder([4, 0, 3, 1, 2])
    cache.truncate(torch.tensor([6, 0, 5, 2, 4], device=backend.device))
    cache.reorder([2, 2, 0, 0, 4])
    for layer in range(2):
        everything = cache.gather(layer, torch.arange(-1, 12, device=backend.device))
        assert not torch.stack(everything).isnan().any()


def test_ops_on_plain_tensors(backend: Backend) -> None:
    twin = filled(backend, [3, 9, 5], sink_positions=1)
    c = twin.cache
    order = torch.tensor([2, 0, 1], device=backend.device)
    ops.copy_sequences(*c.tensors[:3], order, sink_positions=1)
    twin._copy(order.cpu(), None)
    twin.check()
    ops.copy_sequences(*c.tensors[:3], order[:1], order[1:2], sink_positions=1)
    twin._copy(order[:1].cpu(), order[1:2].cpu())
    twin.check()
    ops.truncate(c.k_cache, c.tensors.state, order, sequences=order, sink_positions=1)
    twin.reference.truncate(twin.state, order.cpu(), sequences=order.cpu(), sink_positions=1)
    twin.check()
    ops.reset(c.k_cache, c.tensors.state, order[:2], sink_positions=1)
    twin.reference.reset(twin.state, order[:2].cpu(), sink_positions=1)
    twin.check()


def test_equal_caches_stay_equal(backend: Backend) -> None:
    """A list and a tensor of the same numbers are the same call."""
    caches = [make_cache(backend, batch_size=3, sink_positions=1) for _ in range(2)]
    keys = rows(backend, 2, 3, 11, 2, 8)
    for cache in caches:
        cache.append_all(keys, keys * 2)
    caches[0].reorder([2, 0, 0])
    caches[1].reorder(torch.tensor([2, 0, 0], device=backend.device))
    caches[0].truncate([4, 5, 6])
    caches[1].truncate(torch.tensor([4, 5, 6], device=backend.device))
    assert_same_bits(caches[0].k_cache, caches[1].k_cache)
    assert_same_bits(caches[0].v_cache, caches[1].v_cache)
    assert torch.equal(caches[0].tensors.state, caches[1].tensors.state)
    assert len(caches[0]) == len(caches[1]) == 4


# Calls about some of the sequences


def both_forms(backend: Backend, *sequences: int) -> list[list[int] | torch.Tensor]:
    return [list(sequences), torch.tensor(sequences, dtype=torch.int64, device=backend.device)]


@pytest.mark.parametrize("count", [1, 3, 9, 40])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 8), (1, 7), (9, 64)])
def test_append_to_some(backend: Backend, count: int, heads: int, head_dim: int) -> None:
    """Few rows and many, whole vectors and odd sizes; in any order; from views of the model's tensors."""
    for sinks in (0, 2):
        twin = filled(backend, [0, 2, 8, 13, 6], num_heads=heads, head_dim=head_dim, sink_positions=sinks)
        for chosen in (*both_forms(backend, 3, 0), *both_forms(backend, 4), *both_forms(backend, 2, 1, 4, 0, 3)):
            new = rows(backend, len(chosen), heads, count, head_dim).transpose(1, 2)
            twin.append(1, new, new * 2, sequences=chosen)
            twin.check()
            lengths = torch.tensor([count, 1, 0, 2, count][: len(chosen)], device=backend.device)
            twin.append(0, new, new * 3, lengths, chosen)
            twin.check()
            twin.append_all(new.expand(2, *new.shape), new.expand(2, *new.shape), sequences=chosen)
            twin.check()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_entries_out_of_range_are_left_out(backend: Backend, index_dtype: torch.dtype) -> None:
    twin = filled(backend, [3, 9, 5], head_dim=64, sink_positions=1)
    chosen = torch.tensor([2, -1, 3], dtype=index_dtype, device=backend.device)
    indices = torch.arange(-1, 9, device=backend.device)
    for count in (1, 4, 20):
        key = rows(backend, 3, count, 2, 64)
        key[1:] = 1e30  # nobody counts these overflows
        twin.append(0, key, key, sequences=chosen)
        twin.check()
        query = rows(backend, 3, count, 2, 64)
        out, lse = twin.cache.attend(0, query, return_lse=True, sequences=chosen)
        assert not out[1:].any() and (lse[1:] == -torch.inf).all() and out[0].all()
        out, lse = twin.cache.append_attend(0, query, key, key, return_lse=True, sequences=chosen)
        twin.reference.append(
            twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, key.cpu(), key.cpu(),
            sequences=chosen.cpu(), sink_positions=1,
        )  # fmt: skip
        assert not out[1:].any() and (lse[1:] == -torch.inf).all() and out[0].all()
        twin.check()
        for got, want in zip(
            twin.cache.gather(0, indices, sequences=chosen), twin.gather(0, indices, sequences=chosen), strict=True
        ):
            assert_same_bits(got.cpu(), want)
    assert twin.overflow_counts.sum() == 0


def test_gather_from_some(backend: Backend) -> None:
    twin = filled(backend, [0, 2, 8, 13, 6], sink_positions=2)
    for chosen in (*both_forms(backend, 3, 1, 2), *both_forms(backend, 4)):
        each = torch.tensor([[7, 0, 3], [1, 0, -1], [2, 4, 9]][: len(chosen)], device=backend.device)
        for indices in (each, each[0]):
            for dtype in (torch.float32, torch.float16):
                wants = twin.gather(0, indices, dtype, chosen)
                gots = twin.cache.gather(0, indices, dtype=dtype, sequences=chosen)
                out = tuple(torch.empty_like(got) for got in gots)
                twin.cache.gather(0, indices, dtype=dtype, out=out, sequences=chosen)
                for got, again, want in zip(gots, out, wants, strict=True):
                    assert_same_bits(got.cpu(), want)
                    assert_same_bits(again.cpu(), want)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("group", [1, 3])
def test_attend_to_some(backend: Backend, count: int, group: int) -> None:
    twin = filled(backend, [0, 40, 64, 100, 6], head_dim=64, max_positions=64, sink_positions=3)
    c = twin.cache
    on_device = torch.tensor([2, 1, 4, 0, 3], device=backend.device)
    for chosen, window in (([3, 0], None), ([4], 9), (on_device, 9), (on_device[:1], None)):
        numbers = as_tensor(chosen)
        query = rows(backend, len(chosen), count, 2 * group, 64)
        key, value = rows(backend, len(chosen), count, 2, 64), rows(backend, len(chosen), count, 2, 64)
        settings = {"sink_positions": 3, "window": window, "sequences": numbers}
        storage = (twin.k_cache, twin.v_cache, twin.state)
        got = c.attend(0, query, window=window, return_lse=True, sequences=chosen)
        assert_close(got, twin.reference.attend(*storage, 0, query.cpu(), **settings))
        lengths = torch.tensor([count, 1, 0, 2, count][: len(chosen)], device=backend.device)
        new_lengths = None if isinstance(chosen, list) else lengths
        got = c.append_attend(
            0, query, key, value, new_lengths=new_lengths, window=window, return_lse=True, sequences=chosen
        )
        want = twin.reference.append_attend(
            *storage, twin.overflow_counts, 0, query.cpu(), key.cpu(), value.cpu(),
            None if new_lengths is None else lengths.cpu(), **settings,
        )  # fmt: skip
        assert_close(got, want)
        twin.check()


def test_all_of_them_are_the_plain_call(backend: Backend) -> None:
    """Bit for bit; and for one position append_attend is append, then attend."""
    plain, some, apart = (make_cache(backend, batch_size=3, head_dim=64, sink_positions=1) for _ in range(3))
    chosen = torch.arange(3, dtype=torch.int32, device=backend.device)
    for count in (1, 3, 1, 9, 1, 30):
        query, key = rows(backend, 3, count, 4, 64), rows(backend, 3, count, 2, 64)
        want = plain.append_attend(1, query, key, key * 2)
        assert_same_bits(some.append_attend(1, query, key, key * 2, sequences=chosen), want)
        apart.append(1, key, key * 2, sequences=[2, 1, 0][::-1])
        if count == 1:
            assert_same_bits(apart.attend(1, query, sequences=[0, 1, 2]), want)
        assert_same_bits(some.k_cache, plain.k_cache)
        assert_same_bits(some.v_cache, apart.v_cache)
        assert torch.equal(some.tensors.state, plain.tensors.state)


def test_conversations_in_turns(backend: Backend) -> None:
    """What a sequence answers does not depend on its companions' contents, nor on the slot that it lives in."""
    together = make_cache(backend, num_layers=1, batch_size=4, head_dim=64, max_positions=20, sink_positions=1)
    alone = make_cache(backend, num_layers=1, batch_size=4, head_dim=64, max_positions=20, sink_positions=1)
    for step in range(12):
        count = step % 3 + 1
        query, key = rows(backend, 1, count, 2, 64), rows(backend, 1, count, 2, 64)
        want = alone.append_attend(0, query, key, key, sequences=[0])
        assert_same_bits(together.append_attend(0, query, key, key, sequences=[2]), want)
        other = rows(backend, 2, 2, 2, 64)
        together.append(0, other, other, sequences=[3, 1])
        if step % 5 == 4:
            together.reset([3])


def test_short_forms_of_one_sequence(backend: Backend) -> None:
    twin = filled(backend, [3, 9, 5], head_dim=64)
    c = twin.cache
    key = rows(backend, 4, 2, 64)
    for form in (key, key[0], key[0].reshape(-1)):
        c.append(0, form, form, sequences=[1])
        whole = form.view(1, -1, 2, 64).cpu()
        twin.reference.append(
            twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, whole, whole, sequences=torch.tensor([1])
        )
        twin.check()
        assert c.attend(0, form, sequences=[1]).shape == form.shape
    keys, _ = c.gather(0, torch.arange(3, device=backend.device), sequences=[1])
    assert keys.shape == (3, 2, 64)


def test_none_of_them(backend: Backend) -> None:
    twin = filled(backend, [3, 9, 5], head_dim=64)
    c = twin.cache
    for chosen in both_forms(backend):
        for count in (1, 3, 20):
            nothing = rows(backend, 0, count, 2, 64)
            twin.append(0, nothing, nothing, sequences=chosen)
            assert c.attend(0, nothing, sequences=chosen).shape == nothing.shape
            assert c.append_attend(0, nothing, nothing, nothing, sequences=chosen).shape == nothing.shape
        assert c.gather(0, torch.arange(3, device=backend.device), sequences=chosen)[0].shape == (0, 3, 2, 64)
        twin.check()


@pytest.mark.parametrize("rows_of_each", [1, 60])
def test_rounded_attention_of_some(backend: Backend, rows_of_each: int) -> None:
    """precision="fp16" of slots that follow each other and of others, as a list and on the device."""
    cache, want = (make_cache(backend, batch_size=4, max_positions=100, head_dim=64) for _ in range(2))
    key, query = rows(backend, 4, rows_of_each, 2, 64), rows(backend, 4, rows_of_each, 4, 64)
    want.append(0, key, key)
    answer = want.attend(0, query)
    assert isinstance(answer, torch.Tensor)
    cache.append(0, key, key, sequences=[0, 1, 2, 3])
    cache.reset([1, 2])
    got = cache.append_attend(0, query[1:3], key[1:3], key[1:3], precision="fp16", sequences=[1, 2])
    assert ((got - answer[1:3]).norm(dim=-1) / answer[1:3].norm(dim=-1)).max() < 2e-3
    for chosen in ([2, 1], torch.tensor([2, 1], device=backend.device)):
        got = cache.attend(0, query[[2, 1]], precision="fp16", sequences=chosen)
        assert ((got - answer[[2, 1]]).norm(dim=-1) / answer[[2, 1]].norm(dim=-1)).max() < 2e-3
