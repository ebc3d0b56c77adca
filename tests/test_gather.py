"""gather, get_range_f32, get_valid_f32 and get_range_raw against the reference, bit for bit, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(backend: Backend, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(backend.device) * 3


def filled(backend: Backend, *, ragged: bool = False, appended: int = 13, **arguments: object) -> Twin:
    twin = Twin(backend, **arguments)
    c = twin.cache
    for layer in range(c.num_layers):
        shape = (c.batch_size, appended, c.num_heads, c.head_dim)
        lengths = torch.arange(c.batch_size, device=backend.device) * 3 if ragged else None
        twin.append(layer, rows(backend, *shape), rows(backend, *shape), lengths)
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sinks", [0, 2])
def test_indices(backend: Backend, dtype: torch.dtype, batch: int, sinks: int) -> None:
    """In any order, twice, negative, beyond what is held, at the edges of 64 bits."""
    twin = filled(backend, batch_size=batch, sink_positions=sinks, ragged=batch > 1)
    edge = 2**63 - 1
    one_list = torch.tensor([7, 0, 0, 3, -1, 8, 100, edge, -edge - 1, 5, 2, 6, 1, 4])
    for indices in (one_list, torch.stack([one_list.roll(b) for b in range(batch)])):
        for layer in range(2):
            got = twin.cache.gather(layer, indices.to(backend.device), dtype=dtype)
            for g, w in zip(got, twin.gather(layer, indices, dtype), strict=True):
                assert_same_bits(g.cpu(), w)


@pytest.mark.parametrize(
    ("heads", "head_dim"), [(1, 1), (3, 1), (1, 7), (2, 7), (3, 80), (2, 127), (71, 5), (32, 128), (2, 258)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_shapes(backend: Backend, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    twin = filled(backend, num_heads=heads, head_dim=head_dim, num_layers=1)
    indices = torch.tensor([3, 1, 9, 7, 0])
    got = twin.cache.gather(0, indices.to(backend.device), dtype=dtype)
    for g, w in zip(got, twin.gather(0, indices, dtype), strict=True):
        assert_same_bits(g.cpu(), w)


@pytest.mark.parametrize("appended", range(0, 20, 3))
@pytest.mark.parametrize("sinks", [0, 3])
def test_every_range(backend: Backend, appended: int, sinks: int) -> None:
    twin = filled(backend, appended=appended, sink_positions=sinks, num_layers=1, num_heads=1)
    held = len(twin.held(0, 0))
    assert len(twin.cache) == held == min(appended, 8)
    for start in range(held + 1):
        for end in range(start, held + 1):
            want = twin.gather(0, torch.arange(start, end))
            for got in (twin.cache.get_range_f32(0, start, end), twin.cache.get_range_raw(0, start, end)):
                for g, w in zip(got, want, strict=True):
                    assert_same_bits(g.cpu().float(), w)


def test_raw_ranges_are_views_until_they_wrap(backend: Backend) -> None:
    twin = filled(backend, appended=6, batch_size=2, num_layers=1)
    storage = twin.cache.k_cache.untyped_storage().data_ptr()
    keys, values = twin.cache.get_range_raw(0, 1, 5)
    assert keys.dtype == torch.float16
    assert keys.untyped_storage().data_ptr() == storage
    assert values.untyped_storage().data_ptr() == twin.cache.v_cache.untyped_storage().data_ptr()
    twin.append(0, rows(backend, 2, 5, 2, 8), rows(backend, 2, 5, 2, 8))  # 11 seen: index 5 is slot 0
    assert twin.cache.get_range_raw(0, 0, 5)[0].untyped_storage().data_ptr() == storage
    assert twin.cache.get_range_raw(0, 5, 8)[0].untyped_storage().data_ptr() == storage
    copied, _ = twin.cache.get_range_raw(0, 4, 6)
    assert copied.untyped_storage().data_ptr() != storage
    assert_same_bits(copied.float().cpu(), twin.gather(0, torch.arange(4, 6))[0])


def test_raw_ranges_of_sequences_at_different_slots(backend: Backend) -> None:
    """The same range lies in consecutive slots of each sequence, but not in the same ones: there is no view of it."""
    twin = filled(backend, appended=8, batch_size=2, num_layers=1)
    new = (rows(backend, 1, 3, 2, 8), rows(backend, 1, 3, 2, 8))
    twin.append(0, *new, sequences=[1])  # whose index 0 is slot 3
    storage = [x.untyped_storage().data_ptr() for x in (twin.cache.k_cache, twin.cache.v_cache)]
    for start, end in ((0, 5), (0, 1), (5, 8), (7, 8)):
        got = twin.cache.get_range_raw(0, start, end)
        for g, w, s in zip(got, twin.gather(0, torch.arange(start, end), torch.float16), storage, strict=True):
            assert g.untyped_storage().data_ptr() != s
            assert_same_bits(g.cpu(), w)
    twin.append(0, *new, sequences=[0])
    for g, w, s in zip(
        twin.cache.get_range_raw(0, 0, 5), twin.gather(0, torch.arange(5), torch.float16), storage, strict=True
    ):
        assert g.untyped_storage().data_ptr() == s
        assert_same_bits(g.cpu(), w)


def test_ragged_rows_beyond_a_sequence_are_zero(backend: Backend) -> None:
    twin = filled(backend, batch_size=3, ragged=True, appended=7)  # 0, 3 and 6 positions
    assert len(twin.cache) == 0
    keys, values = twin.cache.get_valid_f32(0)
    assert keys.shape == (3, 6, 2, 8)
    assert not keys[0].any() and not values[0].any() and not keys[1, 3:].any() and not values[1, 3:].any()
    assert keys[1, :3].all() and keys[2].all()
    raw, _ = twin.cache.get_range_raw(0, 0, 6)
    assert_same_bits(raw.float(), keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_out(backend: Backend, dtype: torch.dtype, batch: int) -> None:
    """Into contiguous tensors, into [B, H, n, D] ones, and into interleaved halves of one; nothing else is touched."""
    twin = filled(backend, batch_size=batch, ragged=batch > 1)
    indices = torch.tensor([7, 2, 50, 0, 4])
    want = twin.gather(0, indices, dtype)
    shape = (batch, 5, 2, 8)

    def blank(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, -77.0, dtype=dtype, device=backend.device)

    contiguous = (blank(*shape), blank(*shape))
    heads_first = tuple(blank(batch, 2, 5, 8).transpose(1, 2) for _ in range(2))
    both = blank(batch, 5, 2, 2, 8)
    interleaved = (both[:, :, 0], both[:, :, 1])
    padded_storage = [blank(batch, 5, 2, 11) for _ in range(2)]
    padded = tuple(t[..., 1:9] for t in padded_storage)
    for out in (contiguous, heads_first, interleaved, padded):
        if batch == 1:
            out = tuple(t[0] for t in out)
        got = twin.cache.gather(0, indices.to(backend.device), dtype=dtype, out=out)
        for o, g, w in zip(out, got, want, strict=True):
            assert g is o or g.data_ptr() == o.data_ptr()
            assert_same_bits(o.cpu(), w)
    for t in padded_storage:
        assert (t[..., 0] == -77).all() and (t[..., 9:] == -77).all()
    with_batch = tuple(t.clone() for t in contiguous)
    twin.cache.gather(0, indices.to(backend.device), dtype=dtype, out=with_batch)  # [1, n, H, D] is welcome too
    assert_same_bits(with_batch[0].cpu().view(want[0].shape), want[0])


def test_out_of_ranges(backend: Backend) -> None:
    twin = filled(backend)
    out = tuple(torch.full((4, 2, 8), float("nan"), device=backend.device) for _ in range(2))
    twin.cache.get_range_f32(1, 3, 7, out=out)
    assert_same_bits(out[0].cpu(), twin.gather(1, torch.arange(3, 7))[0])
    whole = tuple(torch.full((8, 2, 8), float("nan"), device=backend.device) for _ in range(2))
    twin.cache.get_valid_f32(1, out=whole)
    assert_same_bits(whole[1].cpu(), twin.gather(1, torch.arange(8))[1])


def test_strided_indices(backend: Backend) -> None:
    twin = filled(backend, batch_size=2)
    base = torch.randint(0, 9, (7, 4), device=backend.device)
    for indices in (base[:, 1], base[::2, :2].T, base[0].expand(2, 4)):
        got = twin.cache.gather(0, indices)
        assert_same_bits(got[0].cpu(), twin.gather(0, indices)[0])


def test_empty_answers(backend: Backend) -> None:
    cache = make_cache(backend)
    assert cache.get_valid_f32(0)[0].shape == (0, 2, 8)
    assert cache.get_range_f32(1, 0, 0)[1].shape == (0, 2, 8)
    assert cache.get_range_raw(1, 0, 0)[1].shape == (0, 2, 8)
    assert cache.gather(0, torch.empty(0, dtype=torch.int64, device=backend.device))[0].shape == (0, 2, 8)
    keys, values = cache.gather(0, torch.arange(3, device=backend.device))
    assert not keys.any() and not values.any()
    batched = make_cache(backend, batch_size=3)
    assert batched.get_valid_f32(0)[0].shape == (3, 0, 2, 8)


def test_a_large_gather(backend: Backend) -> None:
    positions = 40 if backend.slow else 600
    cache = make_cache(backend, num_layers=1, max_positions=positions, num_heads=32, head_dim=128)
    key = rows(backend, positions + 9, 32, 128)
    cache.append(0, key, -key)
    keys, values = cache.get_valid_f32(0)
    assert_same_bits(keys, key[9:].half().float())
    assert_same_bits(values, -key[9:].half().float())
