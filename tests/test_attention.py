"""attend, append_attend and merge_states against attention in FP64 over the stored values, on every backend.

Mostly of few queries; test_prompt.py is about many.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, assert_same_kinds, make_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache_ext import StreamingKVCacheFp16, merge_states, reference

# Relative error of an answer, by the query's dtype: the design's for FP32; rounding the answer itself for the others.
# Of many queries (over 16) a single one may be off by more in FP32, though not all of them: test_prompt.py.
ONE_OF_MANY = 2.5e-6
BOUND = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
LSE_BOUND = 4e-6  # absolute, for scores of a few units


def assert_close(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    magnitude: float = 0.0,
) -> None:
    """`magnitude`: the largest `scale * sum |q_i k_i|`; an FP32 score is itself off by some 2^-24 of it."""
    out, lse = got[0].cpu().double(), got[1].cpu().double()
    want_out, want_lse = (w.view(g.shape) for w, g in zip(want, (out, lse), strict=True))
    nothing = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (out[nothing] == 0).all()
    error = (out - want_out).norm(dim=-1) / want_out.norm(dim=-1)
    bound = BOUND[dtype] + 2**-22 * magnitude
    if dtype == torch.float32 and out.dim() == 4 and out.shape[1] > 16:
        bound += ONE_OF_MANY - BOUND[dtype]
    assert (error[~nothing] <= bound).all(), f"relative error {error[~nothing].max():.2e}"
    assert ((lse - want_lse)[~nothing].abs() <= LSE_BOUND).all()


def attention_twin(backend: Backend, appended: int, **arguments: object) -> Twin:
    """A cache of one layer, filled; its layer 1 stays full of NaN."""
    twin = Twin(backend, **({"num_layers": 2, "head_dim": 64, "max_positions": 128} | arguments))
    c = twin.cache
    shape = (c.batch_size, appended, c.num_heads, c.head_dim)
    if appended:
        twin.append(0, torch.randn(shape, device=backend.device), torch.randn(shape, device=backend.device))
    return twin


def check_both(
    twin: Twin,
    backend: Backend,
    rows: int = 1,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
    new_lengths: list[int] | None = None,
    **options: object,
) -> None:
    """attend, then append_attend, each against the reference; then all that the cache holds."""
    c = twin.cache
    query = torch.randn(c.batch_size, rows, c.num_heads * group, c.head_dim).to(dtype).to(backend.device)
    settings = {"sink_positions": c.sink_positions} | options
    magnitude = 0.0
    if "scale" in options:  # at the default scale the plain bound holds
        keys = twin.k_cache[0].nan_to_num(0).double().abs().repeat_interleave(group, dim=2)
        products = torch.einsum("bthd,bnhd->bthn", query.cpu().double().abs(), keys)
        magnitude = float(options["scale"] * products.max())  # type: ignore[operator]
    got = c.attend(0, query, return_lse=True, **options)
    assert got[0].dtype == dtype and got[0].shape == query.shape and got[1].dtype == torch.float32
    assert_close(
        got, reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query.cpu(), **settings), dtype, magnitude
    )
    shape = (c.batch_size, rows, c.num_heads, c.head_dim)
    key, value = (torch.randn(shape, device=backend.device).to(dtype) for _ in range(2))
    lengths = None if new_lengths is None else torch.tensor(new_lengths, device=backend.device)
    got = c.append_attend(0, query, key, value, new_lengths=lengths, return_lse=True, **options)
    want = reference.append_attend(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, query.cpu(), key.cpu(), value.cpu(),
        None if lengths is None else lengths.cpu(), **settings,
    )  # fmt: skip
    assert_close(got, want, dtype, 1.5 * magnitude)  # the new keys may be somewhat larger
    twin.check()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 63, 64, 65, 127, 128, 129, 200, 300])
@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("group", [1, 4, 9])
def test_lengths(backend: Backend, length: int, sinks: int, group: int) -> None:
    check_both(attention_twin(backend, length, sink_positions=sinks), backend, group=group)


@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 128), (2, 64), (5, 64), (16, 64), (71, 64), (4, 128), (7, 128), (16, 128), (2, 256), (8, 256), (3, 512)],
)
@pytest.mark.parametrize("what", ["full", "ring", "window", "queries", "ragged", "softcap"])
def test_splits(backend: Backend, group: int, head_dim: int, what: str) -> None:
    """So many positions that several blocks share those of a head."""
    options: dict[str, object] = {"window": {"window": 130}, "softcap": {"softcap": 3.0}}.get(what, {})
    twin = attention_twin(
        backend,
        {"ring": 700, "ragged": 0}.get(what, 510),
        max_positions=512,
        head_dim=head_dim,
        num_heads=1,
        batch_size=2 if what == "ragged" else 1,
        num_layers=1,
        sink_positions=3 if what == "ring" else 0,
    )
    if what == "ragged":
        lengths = torch.tensor([500, 131], device=backend.device)
        twin.append(0, *torch.randn(2, 2, 500, 1, head_dim, device=backend.device), new_lengths=lengths)
    check_both(twin, backend, rows=2 if what in ("queries", "window") else 1, group=group, **options)


@pytest.mark.parametrize("length", [1000, 4097])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_long(backend: Backend, length: int, group: int) -> None:
    check_both(attention_twin(backend, length, max_positions=4096, num_layers=1), backend, group=group)


@pytest.mark.parametrize("held", [0, 1, 17, 130, 700])
@pytest.mark.parametrize(("group", "rows"), [(1, 1), (3, 1), (8, 1), (16, 1), (40, 1), (3, 2)])
def test_a_short_text_in_a_long_cache(backend: Backend, held: int, group: int, rows: int) -> None:
    """Blocks are launched for as many positions as there is room for; those without any leave nothing to be merged."""
    twin = attention_twin(backend, held, max_positions=3_000, num_heads=1, num_layers=1)
    check_both(twin, backend, rows=rows, group=group)
    twin.append(0, *torch.randn(2, 1, 2, 1, 64, device=backend.device))
    check_both(twin, backend, rows=rows, group=group)  # the workspace is as it was


def test_sequences_of_other_lengths_are_merged_in_other_groups(
    backend: Backend, emulated_multiprocessors: Callable[[int], None]
) -> None:
    """Where partials are merged in groups first, sequences of other lengths have other numbers of groups."""
    emulated_multiprocessors(16)
    lengths, head_dim, group = ([900, 300], 64, 3) if backend.slow else ([4096, 1500], 256, 8)
    twin = attention_twin(
        backend, 0, max_positions=lengths[0], num_heads=1, head_dim=head_dim, batch_size=2, num_layers=1
    )
    rows = torch.randn(2, 2, lengths[0], 1, head_dim, device=backend.device)
    twin.append(0, *rows, new_lengths=torch.tensor(lengths, device=backend.device))
    for _ in range(2):  # the workspace is as it was
        check_both(twin, backend, group=group)


def check_batch(backend: Backend, batch: int, heads: int, positions: int, head_dim: int, group: int) -> None:
    """One append_attend on a full ring with sinks, for every sequence."""
    sinks = 3
    cache = make_cache(
        backend,
        num_layers=1,
        max_positions=positions,
        num_heads=heads,
        head_dim=head_dim,
        batch_size=batch,
        sink_positions=sinks,
    )
    cache.append(0, *torch.randn(2, batch, positions + 50, heads, head_dim, device=backend.device))
    query = torch.randn(batch, 1, heads * group, head_dim, device=backend.device)
    key, value = torch.randn(2, batch, 1, heads, head_dim, device=backend.device)
    got = cache.append_attend(0, query, key, value, return_lse=True)
    want = reference.attend(*cache.tensors[:3], 0, query, sink_positions=sinks)
    # The bound for any data: of tens of thousands of heads some are beyond 1e-6.
    queries = query.view(batch, heads, group, head_dim).abs()
    magnitude = torch.einsum("bhgd,bnhd->bhgn", queries, cache.k_cache[0].float().abs()).max() * head_dim**-0.5
    assert_close(got, tuple(w.cpu() for w in want), magnitude=float(magnitude))


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 64), (8, 64), (16, 64), (8, 128), (2, 256)])
@pytest.mark.parametrize("positions", [70, 1030])
def test_any_number_of_sequences(backend: Backend, group: int, head_dim: int, positions: int) -> None:
    """On a GPU it decides how large blocks are and into how many parts the positions are cut."""
    if backend.device.type == "cpu" and not backend.slow:
        pytest.skip("a matter of the GPU kernels")
    numbers = [*range(1, 10), 12, 17, 20, 24, 33, 67, 133] + ([270, 540] if positions == 70 else [])
    if backend.slow:  # with 6 multiprocessors
        numbers = [2, 4] + ([9, 24] if positions == 70 else [])
    for batch in numbers:
        check_batch(backend, batch, 2, positions, head_dim, group)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize(
    ("group", "batch", "positions"),
    [
        (4, 70, 200),  # a few more heads than multiprocessors
        (4, 300, 100),  # many
        (8, 70, 200),
        (8, 140, 100),
        (16, 64, 300),  # 16 queries a block
        (16, 132, 300),
        (16, 32, 4100),  # and two for a head's positions
        (1, 1, 9000),  # more parts than are merged at a time
        (4, 1, 20000),
        (8, 1, 20000),
        (16, 1, 20000),
    ],
)
def test_sizes_of_blocks(backend: Backend, group: int, batch: int, positions: int, head_dim: int) -> None:
    """Each kernel in every number of rings, if the GPU has 132 multiprocessors; parts to be merged in several rounds.

    For the emulator's 6 as many sequences as there are for each of those.
    """
    if backend.device.type == "cpu" and not backend.slow:
        pytest.skip("a matter of the GPU kernels")
    if backend.slow:
        batch = -(-batch * 6 // 132)
        positions = min(positions, 60 if batch > 2 else 300 if group == 16 else 600)
    check_batch(backend, batch, 1 if batch == 1 else 2, positions, head_dim, group)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 71])
@pytest.mark.parametrize("dtype", BOUND)
def test_groups_and_dtypes(backend: Backend, group: int, dtype: torch.dtype) -> None:
    check_both(attention_twin(backend, 70, num_heads=1 if group > 16 else 2), backend, group=group, dtype=dtype)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 72, 80, 96, 112, 120, 128, 136, 192, 200, 256, 264, 512])
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 5), (3, 2)])
def test_head_sizes(backend: Backend, head_dim: int, rows: int, group: int) -> None:
    check_both(attention_twin(backend, 90, head_dim=head_dim), backend, rows=rows, group=group)


@pytest.mark.parametrize("rows", [2, 3, 5, 16, 17, 40])
@pytest.mark.parametrize("appended", [0, 3, 60, 64, 65, 150])
@pytest.mark.parametrize("sinks", [0, 3])
def test_several_queries(backend: Backend, rows: int, appended: int, sinks: int) -> None:
    """Causal, aligned to the end; with an append, each query sees what later positions of the call evict."""
    twin = attention_twin(backend, appended, max_positions=64, sink_positions=sinks, num_heads=1)
    check_both(twin, backend, rows=rows, group=2)


@pytest.mark.parametrize("rows", [1, 4, 16, 20])
def test_a_call_longer_than_the_ring(backend: Backend, rows: int) -> None:
    twin = attention_twin(backend, 11, max_positions=7, sink_positions=2, num_heads=1)
    for _ in range(3):
        check_both(twin, backend, rows=rows)


@pytest.mark.parametrize("window", [1, 2, 10, 63, 64, 1000])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_windows(backend: Backend, window: int, sinks: int, rows: int) -> None:
    twin = attention_twin(backend, 150, max_positions=64, sink_positions=sinks, num_heads=1)
    check_both(twin, backend, rows=rows, window=window)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_softcap_and_scale(backend: Backend, rows: int) -> None:
    twin = attention_twin(backend, 50)
    check_both(twin, backend, rows=rows, group=2, softcap=1.5)
    check_both(twin, backend, rows=rows, group=2, scale=0.3)
    check_both(twin, backend, rows=rows, group=2, softcap=20.0, scale=0.5, window=30)
    check_both(twin, backend, rows=rows, scale=0.0)  # all scores equal: the mean


@pytest.mark.parametrize("rows", [1, 4, 18])
@pytest.mark.parametrize("sinks", [0, 2])
def test_ragged_batches(backend: Backend, rows: int, sinks: int) -> None:
    """Sequences of different lengths, one of them empty; padding queries answer zeros."""
    twin = attention_twin(backend, 0, batch_size=4, max_positions=32, sink_positions=sinks)
    c = twin.cache
    for lengths in ([0, 1, 20, 30], [0, 0, 30, 5]):
        key = torch.randn(4, 30, 2, 64, device=backend.device)
        twin.append(0, key, key * 0.5, torch.tensor(lengths, device=backend.device))
    for new in ([0, rows, 1, rows], [0, 0, 0, 0], [rows, 1, 0, rows]):
        check_both(twin, backend, rows=rows, new_lengths=new)
    assert c.cache_seqlens[0].tolist() == [rows, 2 + rows if rows > 1 else 3, 51, 35 + 2 * rows]


def test_nothing_is_held(backend: Backend) -> None:
    cache = make_cache(backend, batch_size=2)
    for rows in (1, 3, 20):
        out, lse = cache.attend(0, torch.randn(2, rows, 4, 8, device=backend.device), return_lse=True)
        assert not out.any() and (lse == -torch.inf).all() and lse.shape == (2, rows, 4)


@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_append_attend_is_its_two_halves_of_several_blocks(backend: Backend, group: int) -> None:
    """Bit for bit, where several blocks share a head's positions."""
    one, two = (make_cache(backend, num_layers=1, max_positions=600, num_heads=1, head_dim=128) for _ in range(2))
    for held in (1, 597, 1, 1, 1, 1):  # up to a full ring, and around it
        query = torch.randn(1, group, 128, device=backend.device)
        keys, values = torch.randn(2, held, 1, 128, device=backend.device)
        if held > 1:
            one.append(0, keys, values)
            two.append(0, keys, values)
            continue
        got = one.append_attend(0, query, keys, values, return_lse=True)
        two.append(0, keys, values)
        want = two.attend(0, query, return_lse=True)
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("rows", [1, 3])
def test_append_attend_is_its_two_halves(backend: Backend, rows: int) -> None:
    """Bit for bit at decode, whatever the ring, the sinks and the dtype; in bounds for several queries."""
    for sinks, dtype, heads, group in [(0, torch.float32, 2, 1), (3, torch.bfloat16, 1, 5), (1, torch.float16, 3, 2)]:
        one, two = (
            make_cache(backend, max_positions=30, num_heads=heads, head_dim=64, sink_positions=sinks) for _ in range(2)
        )
        for step in range(36 if rows == 1 else 12):
            query = torch.randn(rows, heads * group, 64, device=backend.device).to(dtype)
            key = torch.randn(rows, heads, 64, device=backend.device).to(dtype)
            value = torch.randn_like(key) * (10 if dtype == torch.float16 else 30_000)  # some overflow
            got = one.append_attend(0, query, key, value, return_lse=True)
            two.append(0, key, value)
            want = two.attend(0, query, return_lse=True)
            if rows == 1:
                assert_same_bits(got[0], want[0])
                assert_same_bits(got[1], want[1])
            elif step < 30 // rows:  # until the ring wraps, when the halves no longer mean the same
                assert_same_bits(got[0], want[0])
        assert torch.equal(one.tensors.state, two.tensors.state)
        assert_same_bits(one.k_cache, two.k_cache)
        assert_same_bits(one.v_cache, two.v_cache)
        assert torch.equal(one.overflow_counts(), two.overflow_counts())
        assert dtype == torch.float16 or one.overflow_counts()[0] > 0


def test_the_same_call_gives_the_same_bits(backend: Backend) -> None:
    twin = attention_twin(backend, 120, batch_size=2)
    query = torch.randn(2, 1, 4, 64, device=backend.device)
    first = twin.cache.attend(0, query, return_lse=True)
    for _ in range(10):
        again = twin.cache.attend(0, query, return_lse=True)
        assert_same_bits(again[0], first[0])
        assert_same_bits(again[1], first[1])


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 4), (1, 16), (3, 2), (20, 2)])
def test_large_scores(backend: Backend, size: float, rows: int, group: int) -> None:
    """Scores up to 1e4 and beyond: an FP32 score is itself off by 2^-24 of the magnitudes in its sum."""
    twin = attention_twin(backend, 100, num_heads=1, batch_size=1)
    query = torch.randn(1, rows, group, 64, device=backend.device) * size
    out = twin.cache.attend(0, query)
    want, _ = reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query.cpu())
    products = query.cpu().double() @ twin.k_cache[0, 0, :100, 0].double().T * 64**-0.5  # [1, T, Hq, 100]
    magnitudes = 64**-0.5 * (query.cpu().double().abs() @ twin.k_cache[0, 0, :100, 0].double().abs().T).amax(-1)
    error = (out.cpu().double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error <= (ONE_OF_MANY if rows > 16 else 1e-6) + 2**-22 * magnitudes).all()
    assert size < 1e4 or products.abs().max() > 1e4


def test_one_key_dominates(backend: Backend) -> None:
    twin = attention_twin(backend, 100, num_heads=1)
    query = twin.cache.get_range_f32(0, 37, 38)[0][0] * 100
    out = twin.cache.attend(0, query)
    torch.testing.assert_close(out, twin.cache.get_range_f32(0, 37, 38)[1][0], rtol=1e-6, atol=1e-6)


def test_equal_scores_average(backend: Backend) -> None:
    twin = attention_twin(backend, 100)
    out, lse = twin.cache.attend(0, torch.zeros(2, 64, device=backend.device), return_lse=True)
    mean = twin.cache.get_valid_f32(0)[1].double().mean(0)
    assert ((out.double() - mean).norm(dim=-1) / mean.norm(dim=-1)).max() < 1e-6
    torch.testing.assert_close(lse.cpu(), torch.full((2,), math.log(100)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_that_is_not_held_changes_nothing(backend: Backend, rows: int) -> None:
    """Unused slots are NaN in every test here; this one adds NaN that was held: truncated, and evicted by the ring."""
    twin = attention_twin(backend, 40, max_positions=64, sink_positions=2, num_heads=1, num_layers=1)
    nan = torch.full((1, 30, 1, 64), torch.nan, device=backend.device)
    twin.append(0, nan, nan)
    twin.truncate(10)
    check_both(twin, backend, rows=rows)
    twin.truncate(10)
    twin.append(0, nan[:, :5], nan[:, :5])
    fresh = torch.randn(1, 62, 1, 64, device=backend.device)
    twin.append(0, fresh, fresh)  # the NaN has gone from the ring
    check_both(twin, backend, rows=rows)


@pytest.mark.parametrize("rows", [2, 16, 20])
def test_nan_in_a_later_position_does_not_reach_earlier_queries(backend: Backend, rows: int) -> None:
    twin = attention_twin(backend, 30)
    nan = torch.full((1, 1, 2, 64), torch.nan, device=backend.device)
    twin.append(0, nan, nan)
    query = torch.randn(1, rows, 2, 64, device=backend.device)
    out = twin.cache.attend(0, query)
    assert out[0, -1].isnan().all() and not out[0, :-1].isnan().any()


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_that_is_held_reaches_the_answer(backend: Backend, rows: int) -> None:
    for which in ("key", "value"):
        twin = attention_twin(backend, 30)
        key, value = torch.randn(1, 1, 2, 64, device=backend.device), torch.randn(1, 1, 2, 64, device=backend.device)
        (key if which == "key" else value)[..., 0, 3] = torch.nan
        twin.append(0, key, value)
        shape = (1, rows, 2, 64)
        twin.append(0, torch.randn(shape, device=backend.device), torch.randn(shape, device=backend.device))
        out = twin.cache.attend(0, torch.randn(shape, device=backend.device))
        assert out[0, :, 0, 3].isnan().all() and not out[0, :, 1].isnan().any()


def test_minus_infinity_scores(backend: Backend) -> None:
    """A key of -inf (overflow='inf') weighs nothing, first or last; it is no NaN."""
    twin = attention_twin(backend, 0, overflow="inf", num_heads=1, num_layers=1)
    key = torch.zeros(20, 1, 64, device=backend.device)
    key[:3] = -1e6
    value = torch.randn(20, 1, 64, device=backend.device)
    twin.cache.append(0, key, value)
    out = twin.cache.attend(0, torch.ones(1, 64, device=backend.device))
    want = twin.cache.get_valid_f32(0)[1][3:].mean(0)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("element", [1e-6, 1e-12, 1e-20])
def test_minus_infinity_times_little(backend: Backend, element: float) -> None:
    """An infinite key element against a query element that is next to nothing beside the query's others."""
    twin = attention_twin(backend, 0, overflow="inf", num_heads=1, num_layers=1)
    key = torch.zeros(20, 1, 64, device=backend.device)
    key[5, 0, 1] = -1e6
    value = torch.randn(20, 1, 64, device=backend.device)
    twin.cache.append(0, key, value)
    query = torch.zeros(1, 64, device=backend.device)
    query[0, 0], query[0, 1] = 1.0, element
    values = twin.cache.get_valid_f32(0)[1]
    want = (values.sum(0) - values[5]) / 19
    torch.testing.assert_close(twin.cache.attend(0, query), want, rtol=1e-5, atol=1e-6)


def test_strides_and_out(backend: Backend) -> None:
    """[B, H, T, D] queries, keys and answers as model code has them; the answer written where it is wanted."""
    twin = attention_twin(backend, 50, batch_size=2)
    base = torch.randn(2, 4, 3, 64, device=backend.device)
    query = base.transpose(1, 2)
    want = twin.cache.attend(0, query.contiguous())
    whole = torch.full((2, 4, 3, 70), 7.0, device=backend.device)
    out = whole[..., :64].transpose(1, 2)
    assert twin.cache.attend(0, query, out=out).data_ptr() == out.data_ptr()
    assert_same_bits(out.contiguous(), want)
    assert (whole[..., 64:] == 7).all()
    prompt = torch.randn(2, 4, 20, 64, device=backend.device).transpose(1, 2)
    large = torch.empty(2, 4, 20, 64, device=backend.device).transpose(1, 2)
    assert_same_bits(twin.cache.attend(0, prompt, out=large).contiguous(), twin.cache.attend(0, prompt))


def test_short_forms(backend: Backend) -> None:
    twin = attention_twin(backend, 50)
    query = torch.randn(1, 1, 4, 64, device=backend.device)
    want, want_lse = twin.cache.attend(0, query, return_lse=True)
    for form in (query[0], query[0, 0], query.flatten()):
        out, lse = twin.cache.attend(0, form, return_lse=True)
        assert out.shape == form.shape and lse.shape == (form.shape[:-1] if form.dim() > 1 else (4,))
        assert_same_bits(out.flatten(), want.flatten())
        assert_same_bits(lse.flatten(), want_lse.flatten())


@pytest.mark.parametrize("dtype", BOUND)
def test_merge_states(device: torch.device, dtype: torch.dtype) -> None:
    """Attention over parts of a sequence, merged, is attention over the whole; empty parts do not matter."""
    key, value = torch.randn(2, 90, 2, 64, device=device), torch.randn(2, 90, 2, 64, device=device)
    query = torch.randn(2, 1, 6, 64, device=device).to(dtype)
    whole = make_cache(device, batch_size=2, max_positions=128, head_dim=64)
    whole.append(0, key, value)
    outs, lses = [], []
    for begin, end in [(0, 1), (1, 40), (40, 40), (40, 90)]:
        part = make_cache(device, batch_size=2, max_positions=128, head_dim=64)
        part.append(0, key[:, begin:end], value[:, begin:end])
        out, lse = part.attend(0, query, return_lse=True)
        outs.append(out)
        lses.append(lse)
    got, want = merge_states(outs, lses), whole.attend(0, query, return_lse=True)
    assert got[0].dtype == dtype
    torch.testing.assert_close(got[0], want[0], rtol=4 * BOUND[dtype], atol=4 * BOUND[dtype])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    # Of an empty set the answer means nothing, as other libraries have it.
    assert bool((lses[2] == -torch.inf).all())
    again = merge_states([outs[0], outs[1], torch.full_like(outs[2], torch.nan), outs[3]], lses)
    assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])
    empty = merge_states([torch.full_like(outs[2], 0)] * 2, [lses[2]] * 2)
    assert not empty[0].any() and (empty[1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("outs", "lses", "error"),
    [
        ([], [], ValueError),
        ([torch.zeros(2, 8)], [], ValueError),
        ([torch.zeros(2, 8)], [torch.zeros(3)], ValueError),
        ([torch.zeros(2, 8), torch.zeros(2, 8).half()], [torch.zeros(2)] * 2, ValueError),
        ([torch.zeros(2, 8), torch.zeros(3, 8)], [torch.zeros(2), torch.zeros(3)], ValueError),
        ([1.0], [torch.zeros(2)], TypeError),
    ],
)
def test_merge_states_wrong(outs: list[torch.Tensor], lses: list[torch.Tensor], error: type[Exception]) -> None:
    with pytest.raises(error, match="merge_states"):
        merge_states(outs, lses)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 6),
    head_dim=st.sampled_from([8, 16, 40, 64]),
    slots=st.integers(1, 40),
    sinks=st.integers(0, 39),
    appended=st.integers(0, 90),
    rows=st.sampled_from([1, 1, 2, 5, 17]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.one_of(st.none(), st.just(3.0)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_shape(
    batch: int, heads: int, group: int, head_dim: int, slots: int, sinks: int, appended: int, rows: int,
    window: int | None, softcap: float | None, data: st.DataObject,
) -> None:  # fmt: skip
    on_cpu = Backend("cpu", torch.device("cpu"))
    twin = attention_twin(
        on_cpu, appended, batch_size=batch, num_heads=heads, head_dim=head_dim, max_positions=slots,
        sink_positions=min(sinks, slots - 1),
    )  # fmt: skip
    lengths = data.draw(st.one_of(st.none(), st.lists(st.integers(0, rows), min_size=batch, max_size=batch)))
    check_both(twin, on_cpu, rows=rows, group=group, new_lengths=lengths, window=window, softcap=softcap)


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (3, 1), (5, 1), (2, 4), (4, 3), (16, 1), (3, 16), (20, 1)])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_not_finite(backend: Backend, rows: int, group: int, value: float) -> None:
    """It reaches its own element of the answers that see it, and nothing else."""
    twin = attention_twin(backend, 30, overflow="inf")
    values = torch.randn(1, rows, 2, 64, device=backend.device)
    values[0, rows // 2, 1, 5] = value  # the first half of the queries does not see it
    twin.append(0, torch.randn_like(values), values)
    query = torch.randn(1, rows, 2 * group, 64, device=backend.device)
    out = twin.cache.attend(0, query)
    assert isinstance(out, torch.Tensor)
    want, _ = reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query.cpu())
    assert torch.equal(out.cpu().isnan(), want.isnan())
    assert torch.equal(out.cpu() == torch.inf, want == torch.inf)
    assert torch.equal(out.cpu() == -torch.inf, want == -torch.inf)
    finite = want.isfinite()
    assert 0 < (~finite).sum() < finite.numel()
    torch.testing.assert_close(out.cpu().double()[finite], want.double()[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_the_models_precision_settings_do_not_matter(device: torch.device, rows: int) -> None:
    cache = make_cache(device, num_layers=1, max_positions=200, head_dim=64)
    cache.append(0, torch.randn(200, 2, 64, device=device), torch.randn(200, 2, 64, device=device))
    query = torch.randn(1, rows, 4, 64, device=device)
    want = cache.attend(0, query)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert_same_bits(cache.attend(0, query), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("batch", "rows", "positions"), [(64, 1, 4096), (64, 2, 4096), (1, 2, 65_536), (1, 17, 65_536)]
)
def test_error_over_many_rows(device: torch.device, batch: int, rows: int, positions: int) -> None:
    """The promise where few pieces share the work and each sums many rows."""
    cache = StreamingKVCacheFp16(1, positions, 1, 64, batch_size=batch, device=device)
    for _ in range(0, positions, 4096):
        new = (torch.randn(batch, 4096, 1, 64, device=device) for _ in range(2))
        cache.append(0, *new)
    query = torch.randn(batch, rows, 1, 64, device=device)
    got = cache.attend(0, query, return_lse=True)
    keys, values = cache.k_cache[0, :, :, 0].double(), cache.v_cache[0, :, :, 0].double()
    scores = query[:, :, 0].double() @ keys.transpose(1, 2) / 8
    future = torch.arange(positions, device=device) > positions - rows + torch.arange(rows, device=device)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    want = (weights @ values)[:, :, None]
    error = (got[0] - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= (ONE_OF_MANY if rows > 16 else 1e-6)
    assert (got[0] - want).norm() <= 1.1e-6 * want.norm()


def test_error_over_65536_positions(device: torch.device) -> None:
    """The promise at full length: FP32 accumulation does not drift."""
    cache = StreamingKVCacheFp16(1, 65_536, 2, 128, device=device)
    for _ in range(16):
        cache.append(0, torch.randn(4096, 2, 128, device=device), torch.randn(4096, 2, 128, device=device))
    query = torch.randn(8, 128, device=device)
    out = cache.attend(0, query).double()
    k16, v16 = cache.get_range_raw(0, 0, 65_536)
    keys, values = (x.double().repeat_interleave(4, 1) for x in (k16, v16))
    weights = (torch.einsum("hd,nhd->hn", query.double(), keys) * 128**-0.5).softmax(-1)
    want = torch.einsum("hn,nhd->hd", weights, values)
    assert ((out - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-6


@pytest.mark.parametrize("scale", [2.0**86, -(2.0**86)])
@pytest.mark.parametrize("softcap", [None, 2.0, 3e38])
@pytest.mark.parametrize(
    ("rows", "group", "head_dim"), [(1, 1, 128), (1, 1, 512), (1, 5, 64), (3, 4, 512), (20, 2, 512), (70, 1, 64)]
)
def test_the_largest_scale(
    backend: Backend, scale: float, softcap: float | None, rows: int, group: int, head_dim: int
) -> None:
    """Scores of the largest FP16 numbers stay within FP32."""
    twin = attention_twin(backend, 0, head_dim=head_dim, num_heads=1)
    key = torch.full((1, 40 + rows, 1, head_dim), 65504.0)
    key[:, 1::2] *= -1  # scores next to FP32's largest number, of either sign
    key[:, 2::4] = 0
    twin.append(0, key.to(backend.device), torch.randn(key.shape, device=backend.device))
    query = torch.full((1, rows, group, head_dim), 65504.0)
    query[:, ::2, ::2] *= -1
    query = query.to(backend.device)
    got = twin.cache.attend(0, query, scale=scale, softcap=softcap, return_lse=True)
    want = reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query.cpu(), scale=scale, softcap=softcap)
    assert not got[0].isnan().any() and not got[1].isnan().any()
    torch.testing.assert_close(got[0].cpu().double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].cpu().double(), want[1], rtol=1e-5, atol=1e-5)
    if softcap is None:
        half = twin.cache.attend(0, query, scale=scale, precision="fp16")
        torch.testing.assert_close(half.cpu().double(), want[0], rtol=1e-2, atol=1e-2)


def of_large_scores(rows: int, heads: int, head_dim: int, size: float) -> torch.Tensor:
    """Keys or queries with next to nothing but a first element, of some `size`."""
    x = torch.zeros(1, rows, heads, head_dim)
    x[..., 0] = torch.randn(1, rows, heads) * size
    return x


@pytest.mark.long("emulated")
@pytest.mark.parametrize(
    ("rows", "group", "head_dim", "held"),
    [
        (1, 1, 64, 100), (1, 1, 256, 300), (1, 4, 64, 100), (1, 16, 128, 400), (1, 1, 512, 60), (3, 1, 64, 100),
        (2, 8, 128, 300), (16, 2, 64, 90), (1, 1, 64, 2500), (20, 2, 64, 100), (20, 1, 16, 2500),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1.0, 12.0, 40.0])
def test_infinite_values_of_little_weight(
    backend: Backend, rows: int, group: int, head_dim: int, held: int, size: float
) -> None:
    """However little a visible value weighs, with a finite score, if it is infinite then so is the answer."""
    if backend.slow and held > 1000:
        held = 600
    twin = attention_twin(
        backend, 0, head_dim=head_dim, max_positions=held, sink_positions=2, overflow="inf", num_layers=1
    )
    values = torch.randn(1, held + 30, 2, head_dim)
    places = [0, 1, 45, held // 2, held - 1, held, held + 29]  # the first two are sinks
    for i, place in enumerate(places):
        values[0, place, i % 2, i] = torch.inf if i % 3 else -torch.inf
    values[0, 50, 0, 8:10] = torch.tensor([torch.inf, torch.nan])
    values[0, held + 5, 0, 8] = -torch.inf
    keys = of_large_scores(held + 30, 2, head_dim, size)
    twin.append(0, keys.to(backend.device), values.to(backend.device))
    query = of_large_scores(rows, 2 * group, head_dim, size).to(backend.device)
    new = [of_large_scores(rows, 2, head_dim, size).to(backend.device) for _ in range(2)]
    new[1][:, rows // 2, 0, 12] = torch.inf
    for options in ({}, {"window": 35}, {"softcap": 1000.0}):
        got = twin.cache.attend(0, query, scale=1.0, **options)
        want, _ = reference.attend(
            twin.k_cache, twin.v_cache, twin.state, 0, query.cpu(), scale=1.0, sink_positions=2, **options
        )
        assert_same_kinds(got, want)
        assert want.isinf().any() and want.isfinite().any()
    got = twin.cache.append_attend(0, query, *new, scale=1.0)
    want, _ = reference.append_attend(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, query.cpu(), *(x.cpu() for x in new),
        scale=1.0, sink_positions=2, saturate=False,
    )  # fmt: skip
    assert_same_kinds(got, want)
    assert want[..., 12].isinf().any()


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 4), (4, 2), (2, 9), (20, 2)])
def test_infinite_values_of_scores_that_are_not_finite(backend: Backend, rows: int, group: int) -> None:
    """Of a score of minus infinity the weight is 0, and that times an infinite value is NaN, as in FP64."""
    twin = attention_twin(backend, 0, overflow="inf", num_layers=1)
    key, value = torch.randn(1, 60, 2, 64), torch.randn(1, 60, 2, 64)
    key[0, 7, 0, 3] = -torch.inf
    value[0, 7, 0, 5] = torch.inf  # NaN in element 5
    value[0, 9, 0, 6] = torch.inf
    key[0, 58, 1, 3] = -torch.inf
    value[0, 58, 1, 4] = -torch.inf
    twin.append(0, key.to(backend.device), value.to(backend.device))
    query = torch.rand(1, rows, 2 * group, 64) + 0.1
    got = twin.cache.attend(0, query.to(backend.device))
    want, _ = reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query)
    assert_same_kinds(got, want)
    assert want[..., :group, 5].isnan().all() and want[..., :group, 6].isinf().all()
    capped = twin.cache.attend(0, query.to(backend.device), softcap=5.0)
    want, _ = reference.attend(twin.k_cache, twin.v_cache, twin.state, 0, query, softcap=5.0)
    assert_same_kinds(capped, want)
    assert want[..., :group, 5].isinf().all()


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_new_rows_with_scores_of_minus_infinity(backend: Backend, rows: int, softcap: float | None) -> None:
    """The same of rows that the call itself appends. A softcap makes their scores finite."""
    twin = attention_twin(backend, 30, overflow="inf", num_layers=1)
    key, value = torch.randn(1, rows, 2, 64), torch.randn(1, rows, 2, 64)
    key[0, 1, 0, 3], value[0, 1, 0, 5] = -torch.inf, torch.inf
    query = torch.rand(1, rows, 4, 64) + 0.1
    on_device = (x.to(backend.device) for x in (query, key, value))
    options = {} if softcap is None else {"softcap": softcap}
    got = twin.cache.append_attend(0, *on_device, **options)
    want, _ = reference.append_attend(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, query, key, value, saturate=False, **options
    )
    assert_same_kinds(got, want)
    assert (want[0, 1:, :2, 5].isnan() if softcap is None else want[0, 1:, :2, 5].isposinf()).all()


def test_merge_states_has_gradients() -> None:
    lses = torch.tensor([[0.5], [-0.5]], requires_grad=True)
    outs = torch.randn(2, 1, 3, requires_grad=True)
    merged, lse = merge_states(list(outs), list(lses))
    (merged.sum() + lse.sum()).backward()
    weights = torch.tensor([0.5, -0.5]).softmax(0)
    torch.testing.assert_close(outs.grad, weights[:, None, None].expand(2, 1, 3).contiguous())
    assert lses.grad is not None and lses.grad.isfinite().all() and lses.grad.abs().min() > 0


@pytest.mark.parametrize("difference", [1.0, 100.0, 1e4])
def test_merge_states_of_infinite_answers(device: torch.device, difference: float) -> None:
    """An infinite answer stays that, however little it weighs."""
    outs = [torch.tensor([[1.0, torch.inf, 2.0]], device=device), torch.tensor([[3.0, 4.0, -torch.inf]], device=device)]
    lses = [torch.tensor([0.0], device=device), torch.tensor([difference], device=device)]
    out, lse = merge_states(outs, lses)
    assert out[0, 1] == torch.inf and out[0, 2] == -torch.inf and 1 < out[0, 0] <= 3
    assert float(lse) == pytest.approx(math.log1p(math.exp(-difference)) + difference)


@pytest.mark.long("emulated")
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 20), (64, 1)])
@pytest.mark.parametrize(("infinite", "largest"), [(5, 2490), (2490, 5), (1030, 2490), (2490, 1030)])
def test_infinite_values_far_from_the_largest_score(
    backend: Backend, batch: int, rows: int, infinite: int, largest: int
) -> None:
    """In another of the pieces that the positions are cut into: fewer of each of many sequences."""
    if backend.slow:
        batch = min(batch, 2)
    twin = attention_twin(
        backend, 0, batch_size=batch, head_dim=16, num_heads=1, max_positions=2500, overflow="inf", num_layers=1
    )
    key, value = torch.zeros(batch, 2500, 1, 16), torch.randn(batch, 2500, 1, 16)
    key[:, largest, 0, 0] = 1000.0
    value[:, infinite, 0, 3] = -torch.inf
    twin.cache.append(0, key.to(backend.device), value.to(backend.device))
    out = twin.cache.attend(0, torch.ones(batch, rows, 1, 16, device=backend.device), scale=1.0).cpu()[:, -1, 0]
    want = value[:, largest, 0].half().float()
    want[:, 3] = -torch.inf
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
