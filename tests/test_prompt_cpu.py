"""Attention of many queries on the CPU's own kernels, against FP64 attention over what is stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import Unavailable, using
from conftest import Backend, assert_same_bits, make_cache

from kvcache_ext import StreamingKVCacheFp16

WORST_ROW = 2.5e-6  # relative error of one answer, FP32
ALL_ROWS = 1.0e-6  # and of all answers of a head
LSE_BOUND = 4e-6


@pytest.fixture(params=["cpu-generic", "cpu-avx2", "cpu-avx512"])
def cpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        with using(request.param) as backend:
            yield backend
    except Unavailable as reason:
        pytest.skip(str(reason))


class Held:
    """Keys and values that a sequence has been given, as they are stored, with their positions."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.keys = torch.empty(0, heads, head_dim, dtype=torch.float16)
        self.values = self.keys.clone()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = torch.cat([self.keys, keys.half()])
        self.values = torch.cat([self.values, values.half()])


def attention(
    held: Held,
    query: torch.Tensor,
    *,
    slots: int,
    sinks: int = 0,
    appends: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 attention of `query` `[T, Hq, D]`, the last at the newest position, in a cache of so many slots.

    With `appends`, each query sees what was held at its turn; else what is held at the end.
    """
    rows, query_heads, head_dim = query.shape
    total = len(held.keys)
    positions, own = torch.arange(total), torch.arange(total - rows, total)[:, None]
    sees = (positions <= own) & ((positions < sinks) | (positions > (own if appends else total - 1) - (slots - sinks)))
    if window is not None:
        sees &= (positions < sinks) | (positions > own - window)
    group = query_heads // held.keys.shape[1]
    keys, values = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (held.keys, held.values))
    scores = (query.double().transpose(0, 1) @ keys.transpose(1, 2)) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, -torch.inf)
    lse = scores.logsumexp(-1)
    nothing = ~sees.any(-1)
    weights = scores.softmax(-1)
    weights = torch.where(scores == -torch.inf, weights, weights.clamp_min(torch.finfo(torch.float64).tiny))
    finite = values.isfinite()
    out = weights.masked_fill(~sees, 0) @ torch.where(finite, values, 0.0)
    for head, position, element in (~finite).nonzero().tolist():  # these reach only who sees them
        seeing = sees[:, position]
        out[head, seeing, element] += weights[head, seeing, position] * values[head, position, element]
    out[:, nothing] = 0
    lse[:, nothing] = -torch.inf
    return out.transpose(0, 1), lse.transpose(0, 1)


def check(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> None:
    """One entry's answer `[T, Hq, D]` and LSE. `factor`: how many times the error of plain N(0, 1) data is allowed."""
    out, lse = got[0].double(), got[1].double()
    nothing = want[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (out[nothing] == 0).all()
    difference, size = (out - want[0])[~nothing], want[0][~nothing]
    error = (difference.norm(dim=-1) / size.norm(dim=-1)).max() if len(size) else torch.tensor(0.0)
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert error <= WORST_ROW * factor + rounding, f"{error:.2e}"
    assert difference.norm() <= (ALL_ROWS * factor + rounding) * size.norm()
    assert ((lse - want[1])[~nothing].abs() <= LSE_BOUND * factor).all()


def both_calls(
    backend: Backend,
    rows: int,
    before: int,
    *,
    slots: int,
    heads: int = 2,
    group: int = 1,
    head_dim: int = 64,
    sinks: int = 0,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    **options: float,
) -> None:
    """append_attend of `rows` positions to `before`, then attend, each against FP64."""
    cache = make_cache(
        backend, num_layers=1, num_heads=heads, head_dim=head_dim, max_positions=slots, sink_positions=sinks
    )
    held = Held(heads, head_dim)
    settings = {"slots": slots, "sinks": sinks} | options
    for count, appends in ((before, False), (rows, True)):
        key, value = torch.randn(2, count, heads, head_dim).to(dtype)
        held.append(key, value)
        if not appends:
            cache.append(0, key[None], value[None])
            continue
        query = torch.randn(rows, heads * group, head_dim).to(dtype)
        got = cache.append_attend(0, query[None], key[None], value[None], return_lse=True, **options)
        check((got[0][0], got[1][0]), attention(held, query, appends=True, **settings), dtype, factor)
        got = cache.attend(0, query[None], return_lse=True, **options)
        check((got[0][0], got[1][0]), attention(held, query, **settings), dtype, factor)


@pytest.mark.parametrize("rows", [10, 17, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_rows_and_groups(cpu: Backend, rows: int, group: int) -> None:
    both_calls(cpu, rows, 150, slots=500, group=group)


@pytest.mark.parametrize("head_dim", [8, 72, 128, 264, 512])
@pytest.mark.parametrize(("rows", "group"), [(17, 1), (65, 3)])
def test_head_sizes(cpu: Backend, head_dim: int, rows: int, group: int) -> None:
    both_calls(cpu, rows, 100, slots=300, head_dim=head_dim, group=group)


@pytest.mark.parametrize(("rows", "before"), [(17, 0), (17, 70), (65, 130), (300, 40), (129, 333)])
@pytest.mark.parametrize("sinks", [0, 5, 70])
@pytest.mark.parametrize("window", [None, 1, 30, 200])
def test_rings(cpu: Backend, rows: int, before: int, sinks: int, window: int | None) -> None:
    """Rings that wrap once, several times or within the call; windows shorter and longer than they are."""
    options = {"window": window} if window else {}
    both_calls(cpu, rows, before, slots=120, sinks=sinks, head_dim=16, group=2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("options", "factor"), [
    ({"softcap": 0.5}, 1), ({"softcap": 30.0}, 1), ({"scale": -0.125}, 1), ({"scale": 0.0}, 1), ({"scale": 1.0}, 10),
    ({"softcap": 2.0, "window": 40, "scale": -0.3}, 2),
])  # fmt: skip
def test_options(cpu: Backend, dtype: torch.dtype, options: dict[str, float], factor: float) -> None:
    both_calls(cpu, 65, 100, slots=170, sinks=2, dtype=dtype, factor=factor, **options)


def test_accuracy(cpu: Backend) -> None:
    both_calls(cpu, 24, 8000, slots=9000, heads=1, head_dim=128)  # in splits
    both_calls(cpu, 24, 4000, slots=5000, heads=2, head_dim=128, group=4)


@pytest.mark.parametrize("chosen", [None, [3, 0, -1, 7]])
@pytest.mark.parametrize("rows", [17, 70])
def test_ragged(cpu: Backend, chosen: list[int] | None, rows: int) -> None:
    """Sequences of different lengths, left padding, and sequences that are not there."""
    sequences = [0, 1, 2, 3] if chosen is None else chosen
    numbers = None if chosen is None else torch.tensor(chosen)
    cache = make_cache(cpu, num_layers=2, batch_size=4, max_positions=100, sink_positions=3, head_dim=24)
    held = {sequence: Held(2, 24) for sequence in sequences}
    for lengths in ([0, 1, 60, 90], [rows, 5, 0, rows - 1]):
        count = max(*lengths, rows)
        key, value = torch.randn(2, 4, count, 2, 24)
        query = torch.randn(4, count, 4, 24)
        for i, sequence in enumerate(sequences):
            held[sequence].append(key[i, count - lengths[i] :], value[i, count - lengths[i] :])
        out, lse = cache.append_attend(
            1, query, key, value, new_lengths=torch.tensor(lengths), sequences=numbers, return_lse=True
        )
        for i, sequence in enumerate(sequences):
            padding = count - lengths[i] if 0 <= sequence < 4 else count
            assert (out[i, :padding] == 0).all() and (lse[i, :padding] == -torch.inf).all()
            if padding < count:
                want = attention(held[sequence], query[i, padding:], slots=100, sinks=3, appends=True)
                check((out[i, padding:], lse[i, padding:]), want)


def test_strides(cpu: Backend) -> None:
    """Everything laid out as model code has it, with gaps."""
    rows, slots = 70, 200
    cache, other = (make_cache(cpu, num_layers=1, batch_size=2, head_dim=40, max_positions=slots) for _ in range(2))
    query, whole = torch.randn(2, 4, rows, 48), torch.full((2, 4, rows, 48), 7.0)
    new = torch.randn(2, 2, 2, rows, 48)
    views = [x[..., :40].transpose(1, 2) for x in (query, new[0], new[1], whole)]
    cache.append_attend(0, *views[:3], out=views[3])
    assert_same_bits(views[3].contiguous(), other.append_attend(0, *(x.contiguous() for x in views[:3])))
    assert (whole[..., 40:] == 7).all()
    assert_same_bits(cache.k_cache, other.k_cache)
    # What was appended first is seen just the same.
    assert_same_bits(cache.attend(0, views[0]), other.attend(0, views[0].contiguous()))
    assert_same_bits(cache.attend(0, views[0]), views[3].contiguous())


def test_more_queries_than_positions(cpu: Backend) -> None:
    cache = make_cache(cpu, num_layers=1, max_positions=50)
    for length in (0, 20):
        if length:
            cache.append(0, *torch.randn(2, 1, length, 2, 8))
        out, lse = cache.attend(0, torch.randn(1, 100, 4, 8), return_lse=True)
        assert (out[0, : 100 - length] == 0).all() and (lse[0, : 100 - length] == -torch.inf).all()
        assert (out[0, 100 - length :] != 0).all() and lse[0, 100 - length :].isfinite().all()
    cache.truncate(0)
    assert not cache.attend(0, torch.randn(1, 100, 4, 8)).any()
    assert cache.attend(0, torch.randn(1, 0, 4, 8)).shape == (1, 0, 4, 8)


def same_kinds(got: torch.Tensor, want: torch.Tensor) -> None:
    """NaN, either infinity and finite numbers in the same places; those about the same."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(want))
    finite = want.isfinite()
    torch.testing.assert_close(got.double()[finite], want[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "before", "sinks"), [(17, 100, 0), (65, 130, 3), (129, 30, 2), (20, 2500, 1)])
@pytest.mark.parametrize("options", [{}, {"window": 35}, {"softcap": 4.0}])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("size", [1.0, 40.0])  # of scores: of 40, some weigh less than FP32 can say
def test_numbers_that_are_not_finite(
    cpu: Backend, rows: int, before: int, sinks: int, options: dict[str, float], appends: bool, size: float
) -> None:
    if before > 1000 and (size > 1 or cpu.name == "cpu-generic"):
        pytest.skip("once is enough")
    slots, head_dim = before - 10, 16
    cache = make_cache(cpu, num_layers=1, max_positions=slots, sink_positions=sinks, overflow="inf", head_dim=head_dim)
    held = Held(2, head_dim)
    total = before + rows
    key, value = torch.randn(2, total, 2, head_dim)
    key *= size**0.5
    for i, place in enumerate([0, 1, 12, 40, 64, before - 1, before, before + 3, before + rows // 2, total - 2]):
        value[place, i % 2, i] = (torch.inf, -torch.inf, torch.nan)[i % 3]
    value[before + 2, 0, 13], value[before + rows // 2, 0, 13] = torch.inf, -torch.inf
    key[before + 5, 0, 3], value[before + 5, 0, 12] = -torch.inf, torch.inf  # a weight of 0, times infinity
    key[before + 6, 1, 3] = -torch.inf
    key[before + rows // 2 + 1, 1, 2] = torch.nan
    key[total - 3, 0, 2] = torch.inf
    query = torch.randn(rows, 4, head_dim) * size**0.5
    query[..., 3] = query[..., 3].abs() + 0.1  # scores of minus infinity
    held.append(key, value)
    if appends:
        cache.append(0, key[None, :before], value[None, :before])
        got = cache.append_attend(0, query[None], key[None, before:], value[None, before:], **options)
    else:
        cache.append(0, key[None], value[None])
        got = cache.attend(0, query[None], **options)
    same_kinds(got[0], attention(held, query, slots=slots, sinks=sinks, appends=appends, **options)[0])


def test_nan_that_is_not_held_changes_nothing(cpu: Backend) -> None:
    cache, clean = (make_cache(cpu, num_layers=1, max_positions=100, sink_positions=2) for _ in range(2))
    clean.k_cache.zero_()
    clean.v_cache.zero_()
    nan = torch.full((1, 60, 2, 8), torch.nan)
    prompt, query = torch.randn(2, 1, 40, 2, 8), torch.randn(1, 30, 6, 8)
    for c in (cache, clean):
        c.append(0, *prompt)
        c.append(0, nan, nan)
        c.truncate(35)
    clean.k_cache[0, 0, 40:] = 0
    clean.v_cache[0, 0, 40:] = 0
    new = torch.randn(2, 1, 30, 2, 8)
    for c in (cache, clean):
        c.append(0, nan[:, :3], nan[:, :3])
        c.truncate(35)
    answers = [(c.attend(0, query), c.append_attend(0, query, *new)) for c in (cache, clean)]
    for got, want in zip(*answers, strict=True):
        assert not got.isnan().any()
        assert_same_bits(got, want)


@pytest.mark.parametrize(("rows", "heads", "before"), [(300, 3, 100), (17, 1, 5000)])
def test_threads_change_nothing(cpu: Backend, rows: int, heads: int, before: int) -> None:
    cache = StreamingKVCacheFp16(num_layers=1, max_positions=6000, num_heads=heads, head_dim=64, device=cpu.device)
    cache.append(0, *torch.randn(2, 1, before + rows, heads, 64))
    query = torch.randn(1, rows, 2 * heads, 64)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(cache.attend(0, query, return_lse=True))
    finally:
        torch.set_num_threads(threads)
    for out, lse in answers[1:]:
        assert_same_bits(out, answers[0][0])
        assert_same_bits(lse, answers[0][1])
