"""append and append_all against the reference, bit for bit, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * 3).to(dtype).to(backend.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [1, 3, 5, 8])
def test_one_and_many_positions(backend: Backend, dtype: torch.dtype, positions: int) -> None:
    twin = Twin(backend)
    for layer in (1, 0):
        twin.append(
            layer, rows(backend, 1, positions, 2, 8, dtype=dtype), rows(backend, 1, positions, 2, 8, dtype=dtype)
        )
        twin.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [(1, 1), (3, 1), (1, 7), (2, 7), (3, 80), (1, 80), (2, 127), (71, 5), (71, 64), (32, 128), (5, 16), (2, 258)],
)
def test_head_shapes(backend: Backend, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    twin = Twin(backend, num_heads=heads, head_dim=head_dim, num_layers=1, max_positions=6)
    for count in (1, 4, 3):
        twin.append(
            0,
            rows(backend, 1, count, heads, head_dim, dtype=dtype),
            rows(backend, 1, count, heads, head_dim, dtype=dtype),
        )
        twin.check()


def strided(base: torch.Tensor, kind: str) -> torch.Tensor:
    """A tensor with the values of `base`, `[B, T, H, D]`, laid out as model code leaves it."""
    b, t, h, d = base.shape
    if kind == "contiguous":
        return base.contiguous()
    if kind == "bhtd":
        return base.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    if kind == "tbhd":
        return base.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    if kind == "fused_qkv":  # the middle third of a projection's output
        whole = torch.full((b, t, 3 * h * d), float("nan"), dtype=base.dtype, device=base.device)
        view = whole[..., h * d : 2 * h * d].view(b, t, h, d)
        return view.copy_(base)
    if kind == "odd_offset":  # rows lie a multiple of a vector apart, and start at none
        whole = torch.full((b, t, h, d + 8 + -d % 8), float("nan"), dtype=base.dtype, device=base.device)
        return whole[..., 1 : d + 1].copy_(base)
    if kind == "odd_stride":  # the other way round
        whole = torch.full((b, t, h, d + 3), float("nan"), dtype=base.dtype, device=base.device)
        return whole[..., :d].copy_(base)
    if kind == "every_other":
        whole = torch.full((b, 2 * t, 2 * h, d), float("nan"), dtype=base.dtype, device=base.device)
        return whole[:, ::2, 1::2].copy_(base)
    if kind == "expanded":  # one position for all, stride 0
        return base[:, :1].expand(b, t, h, d)
    raise ValueError(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["contiguous", "bhtd", "tbhd", "fused_qkv", "odd_offset", "odd_stride", "every_other", "expanded"]
)
@pytest.mark.parametrize("head_dim", [8, 7])
def test_strides(backend: Backend, dtype: torch.dtype, kind: str, head_dim: int) -> None:
    twin = Twin(backend, batch_size=2, num_heads=3, head_dim=head_dim)
    for count in (3, 1, 6):
        key = strided(rows(backend, 2, count, 3, head_dim, dtype=dtype), kind)
        value = strided(rows(backend, 2, count, 3, head_dim, dtype=dtype), "contiguous" if count == 1 else kind)
        twin.append(0, key, value)
        twin.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["odd_offset", "odd_stride"])
@pytest.mark.parametrize("count", [1, 3, 200, 400])
def test_one_of_keys_and_values_is_not_aligned(backend: Backend, dtype: torch.dtype, kind: str, count: int) -> None:
    """Keys that vectors can be loaded from say nothing about values, nor the other way round, in any of the kernels."""
    twin = Twin(backend, num_heads=3)
    for kinds in (("contiguous", kind), (kind, "contiguous")):
        key, value = (strided(rows(backend, 1, count, 3, 8, dtype=dtype), k) for k in kinds)
        twin.append(0, key, value)
        twin.append_all(torch.stack([key, key]), value[None].expand(2, *value.shape))
    twin.check()


def test_short_forms_are_the_same_append(backend: Backend) -> None:
    key, value = rows(backend, 4, 2, 8), rows(backend, 4, 2, 8)
    want = make_cache(backend)
    want.append(0, key[None], value[None])
    for form in ("thd", "hd", "flat"):
        got = make_cache(backend)
        if form == "thd":
            got.append(0, key, value)
        for t in range(4):
            if form == "hd":
                got.append(0, key[t], value[t])
            if form == "flat":
                got.append(0, key[t].reshape(-1), value[t].reshape(-1))
        assert_same_bits(got.k_cache, want.k_cache)
        assert_same_bits(got.v_cache, want.v_cache)


def test_keys_and_values_of_different_forms(backend: Backend) -> None:
    cache = make_cache(backend)
    key, value = rows(backend, 2, 8), rows(backend, 16)
    cache.append(0, key, value)
    keys, values = cache.get_valid_f32(0)
    assert_same_bits(keys[0], key.half().float())
    assert_same_bits(values[0], value.half().float().view(2, 8))


@pytest.mark.parametrize("sinks", [0, 1, 3, 7])
@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 9, 17])
def test_every_wrap_offset(backend: Backend, sinks: int, chunk: int) -> None:
    """Chunks of one size, so that each begins at another place of the ring, also chunks longer than the ring."""
    twin = Twin(backend, num_layers=1, head_dim=4, num_heads=1, sink_positions=sinks)
    for _ in range(9):
        twin.append(0, rows(backend, 1, chunk, 1, 4), rows(backend, 1, chunk, 1, 4))
        twin.check()


def test_a_chunk_is_its_positions_one_by_one(backend: Backend) -> None:
    """Overflow counts included, also those of positions that the same chunk overwrites."""
    key, value = rows(backend, 1, 30, 2, 8) * 20000, rows(backend, 1, 30, 2, 8) * 20000
    for sinks in (0, 2):
        whole, single = (make_cache(backend, sink_positions=sinks) for _ in range(2))
        whole.append(0, key, value)
        for t in range(30):
            single.append(0, key[:, t : t + 1], value[:, t : t + 1])
        assert_same_bits(whole.k_cache, single.k_cache)
        assert_same_bits(whole.v_cache, single.v_cache)
        assert torch.equal(whole.tensors.state, single.tensors.state)
        assert torch.equal(whole.overflow_counts(), single.overflow_counts())
        assert whole.overflow_counts()[0] > 0


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sinks", [0, 2])
def test_ragged_batch(backend: Backend, index_dtype: torch.dtype, sinks: int) -> None:
    """The last rows of each sequence; none for some; lengths out of range are clamped; padding may hold anything."""
    twin = Twin(backend, batch_size=4, sink_positions=sinks)
    for lengths in ([3, 0, 5, 1], [0, 0, 0, 0], [5, 9, -3, 2], [1, 1, 1, 1], [2, 5, 4, 0]):
        key, value = rows(backend, 4, 5, 2, 8), rows(backend, 4, 5, 2, 8)
        for b, n in enumerate(lengths):
            key[b, : 5 - min(max(n, 0), 5)] = 1e30  # padding: neither stored nor counted as overflow
            value[b, : 5 - min(max(n, 0), 5)] = float("nan")
        twin.append(0, key, value, torch.tensor(lengths, dtype=index_dtype, device=backend.device))
        twin.check()
    assert twin.overflow_counts.sum() == 0


@pytest.mark.parametrize("count", [1, 3, 11])
def test_append_all(backend: Backend, count: int) -> None:
    twin = Twin(backend, num_layers=3, batch_size=2, sink_positions=1)
    for lengths in (None, [count, 1]):
        keys, values = rows(backend, 3, 2, count, 2, 8), rows(backend, 3, 2, count, 2, 8)
        new = None if lengths is None else torch.tensor(lengths, device=backend.device)
        twin.append_all(keys, values, new)
        twin.check()
    # Layers that stand at different places of the ring.
    twin.append(1, rows(backend, 2, 3, 2, 8), rows(backend, 2, 3, 2, 8))
    twin.append_all(rows(backend, 2, 3, count, 2, 8).transpose(0, 1), rows(backend, 3, 2, count, 2, 8))
    twin.check()


def test_append_all_short_forms(backend: Backend) -> None:
    for shape in [(2, 4, 2, 8), (2, 2, 8), (2, 16)]:
        cache = make_cache(backend)
        keys, values = rows(backend, *shape), rows(backend, *shape)
        cache.append_all(keys, values)
        for layer in range(2):
            got, _ = cache.get_valid_f32(layer)
            assert_same_bits(got, keys[layer].half().float().view(-1, 2, 8))


def test_nothing_to_append(backend: Backend) -> None:
    twin = Twin(backend)
    twin.append(0, rows(backend, 1, 3, 2, 8), rows(backend, 1, 3, 2, 8))
    twin.append(0, rows(backend, 1, 0, 2, 8), rows(backend, 1, 0, 2, 8))
    twin.check()


def test_a_large_append(backend: Backend) -> None:
    """Enough to take the many-vectors path of the GPU kernel. (The CPU's threads: test_threads.py.)"""
    positions = 40 if backend.slow else 700
    heads = 60 if backend.slow else 8
    cache = make_cache(backend, num_layers=1, max_positions=positions, num_heads=heads, head_dim=128)
    key, value = rows(backend, heads, positions, 128).transpose(0, 1), rows(backend, positions, heads, 128)
    cache.append(0, key, value)
    keys, values = cache.get_valid_f32(0)
    assert_same_bits(keys, key.half().float())
    assert_same_bits(values, value.half().float())


def test_many_vectors_on_every_path(backend: Backend) -> None:
    """Over a million vectors: the unrolled kernels. A ring shorter than the append, so that most rows are not kept."""
    if backend.slow:
        pytest.skip("minutes under emulation")
    for dtype in DTYPES:
        twin = Twin(backend, num_layers=1, batch_size=2, max_positions=5, num_heads=64, head_dim=128, sink_positions=1)
        key = rows(backend, 1, 64, 1, 128, dtype=dtype).expand(2, 64, 64, 128)
        twin.append(0, key, rows(backend, 2, 64, 64, 128, dtype=dtype))
        big = rows(backend, 2, 300, 64, 128, dtype=dtype)
        twin.cache.append(0, big, big)
        twin.cache.truncate(5)
        keys, _ = twin.cache.get_valid_f32(0)
        assert_same_bits(keys[:, 1:], big[:, -4:].half().float())
