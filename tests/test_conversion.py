"""FP16 conversion: exact on every bit pattern and boundary, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, assert_same_bits, make_cache

from kvcache_ext import reference


def through_cache(
    backend: Backend, values: torch.Tensor, overflow: str = "inf"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`values` (flat) as stored, as read back to FP32, and the overflow count; through K and V alike."""
    flat = values.to(backend.device)
    cache = make_cache(backend, num_layers=1, max_positions=1, num_heads=1, head_dim=flat.numel(), overflow=overflow)
    cache.append(0, flat, flat)
    keys, read_values = cache.get_valid_f32(0)
    assert_same_bits(cache.k_cache, cache.v_cache)
    assert_same_bits(keys, read_values)
    count = int(cache.overflow_counts()[0])
    assert count % 2 == 0
    return cache.k_cache.flatten().cpu(), keys.flatten().cpu(), count // 2


def all_halves() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_half_through_gather_and_back(backend: Backend, dtype: torch.dtype) -> None:
    """63,490 patterns bit for bit; the 2,046 NaNs stay NaN."""
    halves = all_halves()
    stored, read, overflows = through_cache(backend, halves.to(dtype))
    nan = halves.isnan()
    assert int(nan.sum()) == 2046 and int((~nan).sum()) == 63490
    assert torch.equal(stored[~nan].view(torch.int16), halves[~nan].view(torch.int16))
    assert torch.equal(read[~nan].view(torch.int32), halves[~nan].float().view(torch.int32))
    assert stored[nan].isnan().all() and read[nan].isnan().all()
    assert overflows == 0


def test_every_half_to_bf16(backend: Backend) -> None:
    halves = all_halves().to(backend.device)
    cache = make_cache(backend, num_layers=1, max_positions=1, num_heads=1, head_dim=halves.numel())
    cache.append(0, halves, halves)
    keys, values = cache.gather(0, torch.zeros(1, dtype=torch.int64, device=backend.device), dtype=torch.bfloat16)
    assert_same_bits(keys.flatten(), halves.to(torch.bfloat16))
    assert_same_bits(values.flatten(), halves.to(torch.bfloat16))


def boundary_floats() -> torch.Tensor:
    """Every half, its neighbours in FP32, the points midway to the next half and their neighbours; and more."""
    halves = all_halves()
    exact = halves[halves.isfinite()].float()
    ordered = exact.sort().values
    midway = (ordered[1:] + ordered[:-1]) / 2
    base = torch.cat([exact, midway])
    infinity = torch.tensor(float("inf"))
    near = [base, torch.nextafter(base, infinity), torch.nextafter(base, -infinity)]
    special = [
        65504.0, 65519.0, 65519.99, 65519.996, 65520.0, 65520.01, 65536.0, 1e5, 3.4e38, float("inf"), float("nan"),
        0.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 2.0**-26, 1e-45, 1e-38, 6.1e-5, 6.097e-5, 2.0**-14,
    ]  # fmt: skip
    signed = torch.tensor(special)
    return torch.cat([*near, signed, -signed])


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_rounding_boundaries(backend: Backend, overflow: str) -> None:
    x = boundary_floats()
    stored, _, overflows = through_cache(backend, x, overflow)
    want, count = reference.to_half(x, overflow == "saturate")
    assert_same_bits(stored, want)
    assert overflows == count > 0
    if overflow == "inf":
        assert_same_bits(stored, x.half())
    else:
        assert torch.equal(stored.isinf(), x.isinf())


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_every_bf16(backend: Backend, overflow: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    stored, _, overflows = through_cache(backend, x, overflow)
    want, count = reference.to_half(x, overflow == "saturate")
    assert_same_bits(stored, want)
    assert overflows == count > 0


def test_random_bit_patterns(backend: Backend) -> None:
    """Floats of every exponent alike."""
    patterns = torch.randint(-(2**31), 2**31, (100_003 if backend.slow else 2_000_003,), dtype=torch.int64)
    x = patterns.to(torch.int32).view(torch.float32)
    stored, _, _ = through_cache(backend, x)
    assert_same_bits(stored, x.half())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100])
def test_overflow_anywhere_in_a_row(backend: Backend, length: int) -> None:
    """The vector loops and their tails all count, and none counts twice."""
    for place in range(0, length, 1 if length < 34 else 7):
        x = torch.randn(length)
        x[place] = -70000.0
        for overflow, want in (("saturate", -65504.0), ("inf", float("-inf"))):
            stored, _, overflows = through_cache(backend, x, overflow)
            assert overflows == 1
            assert stored[place] == want
            x_rest, stored_rest = x.clone(), stored.clone()
            x_rest[place] = stored_rest[place] = 0
            assert_same_bits(stored_rest, x_rest.half())


def test_infinities_and_nans_are_not_overflow(backend: Backend) -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0] * 9)
    for overflow in ("saturate", "inf"):
        stored, _, overflows = through_cache(backend, x, overflow)
        assert overflows == 0
        assert_same_bits(stored, x.half())


def test_overflow_is_counted_by_layer(backend: Backend) -> None:
    cache = make_cache(backend, num_layers=3, num_heads=1, head_dim=4)
    x = torch.tensor([[7e4, 1.0, -7e4, 65520.0], [65519.0, 1e9, 0.0, float("inf")]], device=backend.device)
    cache.append(1, x[:, None], torch.zeros_like(x)[:, None])
    cache.append(2, torch.zeros_like(x)[:, None], x[:, None])
    cache.append(2, x[0], x[1])
    assert cache.overflow_counts().tolist() == [0, 4, 8]
    assert cache.overflow_counts().device == backend.device
    cache.clear()
    assert cache.overflow_counts().tolist() == [0, 0, 0]


@pytest.mark.parametrize("length", [3, 16, 33])
def test_streaming_stores(backend: Backend, length: int) -> None:
    """A cache beyond the processor's caches is written past them, rows of every alignment."""
    if backend.name != "cpu-avx2":
        pytest.skip("only this backend has such stores")
    positions = 2**29 // (4 * length)
    cache = make_cache(backend, num_layers=1, max_positions=positions, num_heads=1, head_dim=length)
    x = torch.randn(64, 1, length)
    for start in (0, 64):
        cache.append(0, x + start, x - start)
    keys, values = cache.get_range_f32(0, 0, 128)
    assert_same_bits(keys, torch.cat([x, x + 64]).half().float())
    assert_same_bits(values, torch.cat([x, x - 64]).half().float())
    assert cache.k_cache[0, 0, 128:200].isnan().all()
