"""attend and append_attend of many queries, as a prompt has them, against attention in FP64, on every backend.

Kernels for many queries work on tiles of 64 or 128 rows, numbered query * group + head of the group, and of 16 to 128
keys. The sizes here lie around those. The emulator runs thread by thread: what would take it long is left out there,
and each way through the kernels has a case that is small enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, assert_same_kinds, make_cache
from model import Sequence, attention
from prompts import HALF_ULP, HEAD_BOUND, Prompt, assert_same_state

from kvcache_ext import StreamingKVCacheFp16, reference

DTYPES = list(HALF_ULP)
PRECISIONS = ["fp32", "fp16"]


def leave_out(condition: bool) -> None:
    if condition:
        pytest.skip("long under emulation; smaller cases take the same ways")


def short_enough(backend: Backend, *sizes: int, most: int = 2_000_000) -> None:
    """`sizes`: whose product is that of the elements that are multiplied."""
    leave_out(backend.slow and math.prod(sizes) > most)


def check_both(prompt: Prompt, rows: int, group: int = 1, **options: Any) -> None:
    """append_attend, then attend with other queries, and again at the end of what has been appended."""
    prompt.append_attend(*prompt.new(rows, group), **options)
    prompt.attend(prompt.new(rows, group)[0], **options)


# Sizes


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rows", [17, 63, 64, 65, 127, 128, 129, 1000])
def test_rows(backend: Backend, rows: int, group: int) -> None:
    """Of a call that evicts nothing. The same by append and attend differs no more than both may."""
    short_enough(backend, rows, group, rows + 40, 64)
    prompt = Prompt(backend, slots=40 + rows, heads=2 if rows < 1000 and not backend.slow else 1).append(40)
    query, key, value = prompt.new(rows, group)
    out, lse = prompt.append_attend(query, key, value)
    again = prompt.attend(query)
    difference, size = (x.double().movedim(2, 1).flatten(2).norm(dim=-1) for x in (out - again[0], out))
    assert (difference <= 2 * HEAD_BOUND * size).all()
    assert (lse - again[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 136, 256, 264, 512])
@pytest.mark.parametrize(("rows", "group"), [(70, 1), (22, 3)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_head_sizes(backend: Backend, head_dim: int, rows: int, group: int, precision: str) -> None:
    short_enough(backend, rows, group, rows + 30, head_dim, most=4_000_000)
    prompt = Prompt(backend, slots=60 + rows, heads=1 if backend.slow else 2, head_dim=head_dim).append(30)
    if backend.slow and (head_dim > 128 or precision == "fp16"):
        prompt.append_attend(*prompt.new(rows, group), precision=precision)
    else:
        check_both(prompt, rows, group, precision=precision)


@pytest.mark.parametrize(("rows", "group"), [(17, 3), (17, 8), (43, 3), (32, 2), (33, 2), (17, 28), (130, 8)])
@pytest.mark.parametrize("heads", [1, 3])
def test_groups(backend: Backend, rows: int, group: int, heads: int) -> None:
    """Tiles that end within a group of heads, and with one."""
    short_enough(backend, rows, group, heads, rows + 20, 64)
    check_both(Prompt(backend, slots=50 + rows, heads=heads).append(20), rows, group)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_batches(backend: Backend, batch: int) -> None:
    check_both(Prompt(backend, slots=64, batch=batch, heads=2, head_dim=16).append(9), 20, 2)


@pytest.mark.parametrize("held", [0, 1, 16, 63, 64, 65, 127, 128, 129, 300])
def test_more_is_held_than_new(backend: Backend, held: int) -> None:
    """Keys in the cache end anywhere in a tile, and new ones begin there."""
    check_both(Prompt(backend, slots=held + 40, head_dim=16).append(held), 20, 2)


@pytest.mark.parametrize(("rows", "held", "group"), [(1000, 300, 1), (600, 1500, 4), (1800, 0, 1)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_long_prompts_of_one_head(backend: Backend, rows: int, held: int, group: int, precision: str) -> None:
    leave_out(backend.slow)
    prompt = Prompt(backend, slots=held + rows, head_dim=128 if backend.name == "cuda" else 64).append(held)
    prompt.append_attend(*prompt.new(rows, group), precision=precision)


# Rings


RINGS = [  # rows of the call, slots, sinks, appended before it
    (70, 96, 0, 127),  # full, wrapped, all that is held goes but 26
    (70, 96, 5, 130),
    (40, 96, 3, 60),  # the last four evict
    (20, 96, 0, 96 + 86),  # wrapped within a tile
    (70, 48, 0, 0),  # longer than the ring, onto nothing
    (70, 48, 4, 20),
    (70, 48, 4, 2),  # some of its own are sinks
    (65, 64, 0, 64),
    (130, 33, 32, 40),  # a ring of one slot
    (20, 7, 2, 11),
    (17, 1, 0, 3),
    (200, 130, 1, 500),
]


@pytest.mark.parametrize(("rows", "slots", "sinks", "appended"), RINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_calls_that_evict(backend: Backend, rows: int, slots: int, sinks: int, appended: int, precision: str) -> None:
    """Each query sees what the ring held at its turn, also what later positions of the call evict."""
    prompt = Prompt(backend, slots=slots, sinks=sinks, head_dim=32, heads=1 if backend.slow else 2).append(appended)
    leave_out(backend.slow and (rows == 200 or (precision == "fp16" and sinks != 5)))
    check_both(prompt, rows, 1 if backend.slow else 2, precision=precision)
    if not backend.slow:
        check_both(prompt, rows, 3, precision=precision)


@pytest.mark.parametrize(("rows", "slots", "sinks", "appended"), [(70, 96, 5, 130), (40, 48, 0, 20), (70, 33, 4, 2)])
def test_as_if_position_by_position(backend: Backend, rows: int, slots: int, sinks: int, appended: int) -> None:
    """Compared with that many calls of one position each."""
    prompt = Prompt(backend, slots=slots, sinks=sinks, head_dim=16).append(appended)
    single = copy.deepcopy(prompt.cache)
    query, key, value = prompt.new(rows, 2)
    out, lse = prompt.append_attend(query, key, value)
    each = [
        single.append_attend(0, *(x[:, t : t + 1] for x in (query, key, value)), return_lse=True) for t in range(rows)
    ]
    outs, lses = (torch.cat(x, 1) for x in zip(*each, strict=True))
    difference, size = (x.double().movedim(2, 1).flatten(2).norm(dim=-1) for x in (out - outs, outs))
    assert (difference <= 2 * HEAD_BOUND * size).all()
    assert (lse - lses).abs().max() <= 1e-5
    assert_same_state(prompt.cache, single)


@pytest.mark.parametrize(("slots", "sinks"), [(64, 0), (64, 3), (64, 40)])
@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sequences_of_which_some_evict(backend: Backend, rows: int, slots: int, sinks: int, precision: str) -> None:
    """In one call: one is empty, one has room, one is filled to the last slot, one evicts a position, one is full."""
    short_enough(backend, rows, 5, 16, rows + slots)
    held = [0, 20, max(slots - rows, 0), max(slots - rows + 1, 1), slots + 13]
    prompt = Prompt(backend, slots=slots, sinks=sinks, batch=5, head_dim=16).append(held)
    check_both(prompt, rows, 2, precision=precision)


@pytest.mark.parametrize("rows", [17, 40, 90])
@pytest.mark.parametrize("sinks", [0, 2, 11, 30])
@pytest.mark.parametrize("window", [None, 5])
def test_queries_at_evicted_positions(backend: Backend, sinks: int, rows: int, window: int | None) -> None:
    """`attend` with more queries than the ring holds: the first ones see its sinks, if any, or nothing."""
    options = {} if window is None else {"window": window}
    prompt = Prompt(backend, slots=33, sinks=sinks, batch=2, head_dim=16).append([90, 50])
    prompt.attend(prompt.new(rows, 2)[0], **options)


@pytest.mark.parametrize("rows", [20, 130])
def test_more_queries_than_positions(backend: Backend, rows: int) -> None:
    """Nothing held at all, and less than there are queries, which then stand before the first position."""
    prompt = Prompt(backend, slots=64, batch=2, head_dim=16).append([0, 7])
    prompt.attend(prompt.new(rows, 2)[0])


@pytest.mark.parametrize("window", [1, 5, 16, 63, 64, 65, 100, 1000, 2**62])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_windows(backend: Backend, window: int, sinks: int, precision: str) -> None:
    """Smaller and larger than tiles, in a call that evicts from a ring that has wrapped; with sinks far behind."""
    leave_out(backend.slow and (precision == "fp16" or window in (16, 63, 65, 2**62)))
    prompt = Prompt(backend, slots=160, sinks=sinks, head_dim=16).append(210)
    check_both(prompt, 70, 2, window=window, precision=precision)


@pytest.mark.parametrize("window", [3, 40])
def test_windows_of_ragged_sequences(backend: Backend, window: int) -> None:
    prompt = Prompt(backend, slots=96, sinks=2, batch=3, head_dim=16).append([5, 80, 140])
    lengths = torch.tensor([30, 0, 41], device=backend.device)
    prompt.append_attend(*prompt.new(41, 2), new_lengths=lengths, window=window)


# Scores


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 1.5},
        {"softcap": 30.0},
        {"scale": 0.0},
        {"scale": -0.3},
        {"scale": 1e-6},
        {"scale": 3.0},
        {"scale": -1e-30},
        {"softcap": 20.0, "scale": 0.5, "window": 30},
        {"softcap": 1e-3, "scale": -2.0},
        {"softcap": 3e38},
    ],
    ids=str,
)
def test_softcap_and_scale(backend: Backend, options: dict[str, Any], precision: str) -> None:
    leave_out(backend.slow and precision == "fp16")
    check_both(Prompt(backend, slots=80, head_dim=32).append(30), 40, 2, precision=precision, **options)


@pytest.mark.parametrize("power", [-80, -60, -14, 14, 40, 60])
def test_queries_of_any_size(backend: Backend, power: int) -> None:
    """The scale makes up for it, so that the answers are those of usual queries."""
    prompt = Prompt(backend, slots=80, head_dim=64).append(30)
    query, key, value = prompt.new(40)
    prompt.append_attend(query * 2.0**power, key, value, scale=0.125 * 2.0**-power)


def test_queries_of_all_sizes_in_a_tile(backend: Backend) -> None:
    """From rows of zeros over tiny ones to scores of hundreds; elements of one row differ as well."""
    prompt = Prompt(backend, slots=120, head_dim=64).append(30)
    query, key, value = prompt.new(70)
    query *= 2.0 ** (torch.arange(70, device=backend.device) % 24 - 16)[:, None, None]
    query[:, ::7] = 0
    query[..., ::5] *= 2.0**-12
    prompt.append_attend(query, key, value, scale=0.125)


@pytest.mark.parametrize("slope", [1.0, -1.0, 0.25])
def test_scores_that_rise_and_fall(backend: Backend, slope: float) -> None:
    """Each tile of keys has a larger maximum than all before it, or a far smaller one."""
    prompt = Prompt(backend, slots=400, head_dim=16)
    _, key, value = prompt.new(300)
    key[..., 0] = slope * torch.arange(300, device=backend.device)[:, None]
    query = prompt.new(20, 2)[0]
    query[..., 0] = 1.0
    prompt.append_these(key, value)
    prompt.attend(query, scale=1.0)
    prompt.append_attend(query, *prompt.new(20)[1:], scale=0.5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e7, 1e9, -(2.0**30), 2.0**80])
def test_scores_of_no_bits_behind_the_point(backend: Backend, scale: float, precision: str) -> None:
    """The key of the largest score has all weight, however the scores are rounded."""
    cache = StreamingKVCacheFp16(1, 100, 1, 64, device=backend.device)
    key, value = torch.randn(60, 1, 64).half().float(), torch.randn(60, 1, 64).half().float()
    cache.append(0, key.to(backend.device), value.to(backend.device))
    query = torch.randn(20, 1, 64)
    if precision == "fp16":
        query = query.half().float()
    scores = (query[:, 0].double() @ key[:, 0].double().T) * (1 if scale > 0 else -1)
    scores.masked_fill_(torch.arange(60) > torch.arange(40, 60)[:, None], -torch.inf)
    got = cache.attend(0, query.to(backend.device), scale=scale, precision=precision)
    assert isinstance(got, torch.Tensor)
    assert (got[:, 0].cpu() - value[scores.argmax(1), 0]).abs().max() < 2e-3


def test_the_largest_query(backend: Backend) -> None:
    """Its FP16 parts are finite: all scores are about -1 here."""
    cache = StreamingKVCacheFp16(1, 40, 1, 8, device=backend.device)
    cache.append(0, torch.full((40, 1, 8), -0.25).to(backend.device), torch.ones(40, 1, 8).to(backend.device))
    query = torch.full((20, 1, 8), 3.4028e38, device=backend.device)
    for precision in PRECISIONS:
        got, lse = cache.attend(0, query, scale=1 / 3.4028e38, precision=precision, return_lse=True)
        want = math.log(40 - 19) - 2.0, math.log(40) - 2.0
        assert (got - 1).abs().max() < 1e-3
        assert abs(lse[0, 0].item() - want[0]) < 2e-3 and abs(lse[-1, 0].item() - want[1]) < 2e-3


def test_long_tails(backend: Backend) -> None:
    """Many keys of next to no weight each add up to more than an error is allowed to be."""
    count, score = (4096, 20.0) if backend.slow else (65_535, 23.0)
    cache = StreamingKVCacheFp16(1, count + 17, 1, 8, device=backend.device)
    key, value = torch.zeros(count + 17, 1, 8), torch.ones(count + 17, 1, 8)
    key[3, 0, 0] = score
    value[3] = torch.tensor([0.5, -0.25, 1.0, -1.0, 2.0, 0.125, -0.5, 0.0])[None]
    cache.append(0, key.to(backend.device), value.to(backend.device))
    query = torch.zeros(17, 1, 8, device=backend.device)
    query[..., 0] = 1.0
    got = cache.attend(0, query, scale=1.0)
    assert isinstance(got, torch.Tensor)
    tail = (count + torch.arange(17))[:, None].double() * math.exp(-score)
    want = (value[3].double() + tail) / (1 + tail)
    error = (got[:, 0].cpu().double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert (want - value[3].double()).norm(dim=-1).min() > 5e-6 and error.max() <= HEAD_BOUND


# Tensors


@pytest.mark.parametrize("new", DTYPES)
@pytest.mark.parametrize("query", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dtypes(backend: Backend, query: torch.dtype, new: torch.dtype, precision: str) -> None:
    """Of queries and of new keys, where the call evicts and where it does not."""
    for held in (20, 60):
        prompt = Prompt(backend, slots=64, head_dim=16, heads=2).append(held)
        prompt.append_attend(*prompt.new(40, 2, query=query, new=new), precision=precision)
    prompt.attend(prompt.new(40, 2, query=query)[0], precision=precision)


def view(form: str, x: torch.Tensor) -> torch.Tensor:
    """The same numbers, otherwise laid out."""
    if form == "[B, H, T, D]":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "every second head":
        return x.repeat_interleave(2, 2)[:, :, ::2]
    if form == "one row of all heads and more":
        return torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]]
    if form == "gaps of an element":
        return torch.cat([x, x[..., :1]], -1)[..., :-1]
    if form == "an element from the start":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    raise ValueError(form)


FORMS = ["[B, H, T, D]", "every second head", "one row of all heads and more", "gaps of an element",
         "an element from the start"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_strides(backend: Backend, form: str, dtype: torch.dtype) -> None:
    """Of query, key, value and answer, aligned or not: the bits are those of contiguous tensors."""
    held = [10, 50]
    one, two = (Prompt(backend, slots=64, head_dim=16, heads=2, batch=2) for _ in range(2))
    rows = one.new(max(held))[1:]
    lengths = torch.tensor(held, device=backend.device)
    one.append_these(*rows, lengths)
    two.append_these(*rows, lengths)
    tensors = one.new(40, 3, query=dtype, new=dtype)
    want = one.append_attend(*tensors)
    viewed = [view(form, x) for x in tensors]
    out = view(form, torch.zeros_like(tensors[0]))
    got = two.append_attend(*viewed, out=out)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g.contiguous(), w)
    for x, before in zip(viewed, tensors, strict=True):
        assert torch.equal(x, before)
    got = two.attend(viewed[0], out=out)
    for g, w in zip(got, one.attend(tensors[0]), strict=True):
        assert_same_bits(g.contiguous(), w)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(backend: Backend, dim: int) -> None:
    """With a stride of 0: of sequences, positions or heads."""
    prompt = Prompt(backend, slots=64, head_dim=16, heads=2, batch=2).append(40)
    tensors = prompt.new(30, 2)
    prompt.append_attend(*(x.narrow(dim, 0, 1).expand(x.shape) for x in tensors))
    prompt.attend(tensors[0].narrow(dim, 0, 1).expand(tensors[0].shape))


def test_an_answer_between_other_numbers(backend: Backend) -> None:
    """What lies between the rows of `out` stays."""
    prompt = Prompt(backend, slots=64, head_dim=16, heads=2).append(40)
    whole = torch.full((1, 4, 33, 21), 7.0, device=backend.device)
    out = whole[:, :, 2:-1, 3:-2].transpose(1, 2)
    query, key, value = prompt.new(30, 2)
    prompt.append_attend(query, key, value, out=out)
    out.fill_(7.0)
    assert (whole == 7).all()
    prompt.attend(query, out=out)
    out.fill_(7.0)
    assert (whole == 7).all()


# Sequences


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_new_lengths(backend: Backend, rows: int, dtype: torch.dtype, precision: str) -> None:
    """The last so many rows of each sequence; the others are padding, whose queries answer zeros."""
    short_enough(backend, rows, 6, 16, rows + 64)
    prompt = Prompt(backend, slots=80, batch=6, head_dim=16, sinks=2).append([0, 10, 80, 90, 3, 40])
    for numbers in ([0, rows, 1, rows - 1, rows + 3, -1], [rows, 0, 0, 5, 17, rows], [0] * 6):
        lengths = torch.tensor(numbers, dtype=dtype, device=backend.device)
        query, key, value = prompt.new(rows, 2)
        out, lse = prompt.append_attend(query, key, value, new_lengths=lengths, precision=precision)
        for b, n in enumerate(numbers):
            padding = rows - min(max(n, 0), rows)
            assert not out[b, :padding].any() and (lse[b, :padding] == -torch.inf).all()


def test_padding_is_not_read(backend: Backend) -> None:
    """NaN in rows and queries that are padding reaches nothing."""
    prompt = Prompt(backend, slots=64, batch=3, head_dim=16).append([0, 10, 60])
    lengths = torch.tensor([20, 3, 39], device=backend.device)
    query, key, value = prompt.new(40, 2)
    plain = copy.deepcopy(prompt.cache).append_attend(0, query, key, value, new_lengths=lengths)
    assert isinstance(plain, torch.Tensor)
    padding = torch.arange(40, device=backend.device)[None] < 40 - lengths[:, None]
    for x in (query, key, value):
        x[padding] = torch.nan
    got = prompt.cache.append_attend(0, query, key, value, new_lengths=lengths)
    assert isinstance(got, torch.Tensor)
    assert_same_bits(got, plain)
    prompt.append_instead(key, value, lengths)


@pytest.mark.parametrize("form", ["list", "int32", "int64"])
@pytest.mark.parametrize("rows", [20, 70])
def test_chosen_sequences(backend: Backend, rows: int, form: str) -> None:
    """Some of a batch, on the device also none of it: entries of no sequence answer zeros and append nothing."""
    numbers = [4, 0, 2] if form == "list" else [4, -1, 2, 0, 99]
    prompt = Prompt(backend, slots=64, batch=5, head_dim=16, sinks=1).append([0, 10, 64, 90, 30])
    chosen: Any = numbers
    if form != "list":
        chosen = torch.tensor(numbers, dtype=getattr(torch, form), device=backend.device)
    lengths = torch.tensor([rows, 3, 1, rows - 1, 7][: len(numbers)], device=backend.device)
    for options in ({}, {"new_lengths": lengths}, {"precision": "fp16"}):
        tensors = prompt.new(rows, 2, batch=len(numbers))
        out, lse = prompt.append_attend(*tensors, sequences=chosen, **options)
        for i, b in enumerate(numbers):
            assert 0 <= b < 5 or (not out[i].any() and (lse[i] == -torch.inf).all())
    prompt.attend(prompt.new(rows, 2, batch=len(numbers))[0], sequences=chosen)


@pytest.mark.parametrize("rows", [0, 70])
def test_calls_about_nothing(backend: Backend, rows: int) -> None:
    """No queries, or no sequences."""
    prompt = Prompt(backend, slots=64, batch=2, head_dim=16).append([3, 70])
    empty = torch.zeros(0, dtype=torch.int64, device=backend.device)
    for chosen in ([], empty) if rows else (None, [0, 1]):
        tensors = prompt.new(rows, 2, batch=0 if rows else 2)
        for out, lse in (
            prompt.append_attend(*tensors, sequences=chosen),
            prompt.attend(tensors[0], sequences=chosen),
        ):
            assert out.shape == tensors[0].shape and lse.shape == out.shape[:-1]
    assert prompt.cache.lengths() == [3, 64]


@pytest.mark.parametrize("shape", ["[T, H, D]", "[1, T, H, D]"])
def test_short_forms(backend: Backend, shape: str) -> None:
    prompt = Prompt(backend, slots=64, head_dim=16).append(10)
    query, key, value = prompt.new(30, 2)
    want = copy.deepcopy(prompt.cache).append_attend(0, query, key, value)
    forms = [x[0] if shape == "[T, H, D]" else x for x in (query, key, value)]
    out, lse = prompt.cache.append_attend(0, *forms, return_lse=True)
    assert out.shape == forms[0].shape and lse.shape == out.shape[:-1]
    assert isinstance(want, torch.Tensor)
    assert_same_bits(out.view(want.shape), want)


# What is not held


def bare(prompt: Prompt, tensors: list[torch.Tensor], filler: float, **options: Any) -> list[torch.Tensor]:
    """The answers on copies of the cache whose slots that hold nothing are full of something."""
    prompt.poison(filler)
    answers = [*copy.deepcopy(prompt.cache).attend(0, tensors[0], return_lse=True, **options)]
    return [*answers, *copy.deepcopy(prompt.cache).append_attend(0, *tensors, return_lse=True, **options)]


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 65504.0])
@pytest.mark.parametrize(("rows", "group", "head_dim"), [(20, 2, 16), (70, 1, 32), (17, 1, 264)])
def test_slots_that_hold_nothing(backend: Backend, rows: int, group: int, head_dim: int, filler: float) -> None:
    """Never written, truncated, or lost by the ring: whatever is in them, the answer has the same bits."""
    leave_out(backend.slow and filler != torch.nan and rows != 20)
    caches = {
        "not full": (37, None), "empty": (0, None), "truncated": (60, 21), "wrapped, truncated": (100, 30),
        "truncated to the sinks": (100, 3), "full": (100, None),
    }  # fmt: skip
    for name, (appended, left) in caches.items():
        if backend.slow and name in ("not full", "empty", "full"):
            continue
        prompt = Prompt(backend, slots=64, sinks=3, head_dim=head_dim).append(appended)
        if left is not None:
            prompt.truncate(left)
        tensors = prompt.new(rows, group)
        for options in ({},) if backend.slow else ({}, {"window": 11}):
            want = bare(prompt, tensors, 0.0, **options)
            for g, w in zip(bare(prompt, tensors, filler, **options), want, strict=True):
                assert_same_bits(g, w)


# What is not finite


@pytest.mark.parametrize(("rows", "group"), [(20, 2), (70, 1)])
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_what_is_not_finite(backend: Backend, rows: int, group: int, size: float) -> None:
    """Infinite and NaN keys and values, held and new: who sees them gets what FP64 gives, and nobody else.

    With keys of `size` 40 most weights are far below what FP32 holds, and an infinite value stays infinite.
    """
    twin = Twin(backend, num_layers=1, max_positions=64, num_heads=2, head_dim=32, sink_positions=2, overflow="inf")
    new = 50 + rows
    key, value = torch.randn(1, new, 2, 32) * size, torch.randn(1, new, 2, 32)
    value[0, [1, 30, 49], [0, 1, 0], [0, 1, 2]] = torch.tensor([torch.inf, -torch.inf, torch.inf])
    value[0, [50 + rows // 2, 50 + rows // 3], 0, 3] = torch.tensor([1e5, -1e5])  # infinities that overflow made
    value[0, new - 3, 1, 4] = torch.nan
    key[0, [45, 50 + rows // 2, new - 5], 1, 5] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    twin.append(0, key[:, :50].to(backend.device), value[:, :50].to(backend.device))
    query = torch.randn(1, rows, 2 * group, 32)
    options = {"scale": 1.0} if size > 1 else {}
    for softcap in (None, 3.0) if rows == 20 else (None,):
        got = twin.cache.attend(0, query.to(backend.device), softcap=softcap, **options)
        want, _ = reference.attend(
            twin.k_cache, twin.v_cache, twin.state, 0, query, sink_positions=2, softcap=softcap, **options
        )
        assert isinstance(got, torch.Tensor)
        if size == 1.0 or softcap is not None:
            assert_same_kinds(got, want)
        else:  # scores of hundreds: known to some 1e-4
            assert torch.equal(got.cpu().isnan(), want.isnan()) and torch.equal(got.cpu().isinf(), want.isinf())
    tensors = [query, key[:, 50:], value[:, 50:]]
    got = twin.cache.append_attend(0, *(x.to(backend.device) for x in tensors), **options)
    want, _ = reference.append_attend(
        twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, *tensors, sink_positions=2, saturate=False,
        **options,
    )  # fmt: skip
    assert isinstance(got, torch.Tensor)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got.cpu()), kind(want))
    assert size > 1 or (assert_same_kinds(got, want) is None)
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    twin.check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ["key", "value"])
def test_nan_reaches_those_who_see_it(backend: Backend, which: str, precision: str) -> None:
    """In the last position of a prompt: its own query alone. Earlier, all from there on."""
    for place in (0, 17, 69):
        prompt = Prompt(backend, slots=128, head_dim=16, heads=2).append(30)
        query, key, value = prompt.new(70, 2)
        clean = copy.deepcopy(prompt.cache).append_attend(0, query, key, value, precision=precision)
        (key if which == "key" else value)[0, place, 1, 5] = torch.nan
        got = prompt.cache.append_attend(0, query, key, value, precision=precision)
        assert isinstance(got, torch.Tensor) and isinstance(clean, torch.Tensor)
        reached = torch.zeros_like(got, dtype=torch.bool)
        reached[0, place:, 2:, slice(None) if which == "key" else 5] = True
        assert torch.equal(got.isnan(), reached)
        torch.testing.assert_close(got[~reached], clean[~reached], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", ["saturate", "inf"])
@pytest.mark.parametrize("held", [10, 60])
def test_new_values_beyond_fp16(backend: Backend, policy: str, held: int) -> None:
    """The answer is of what is stored: 65,504 or infinite; they are counted as `append` counts them."""
    prompt = Prompt(backend, slots=64, head_dim=16, heads=2, overflow=policy).append(held)
    query, key, value = prompt.new(30, 2)
    key[0, 3, 0, 0], key[0, 29, 1, 2], value[0, 7, 1, 3], value[0, 8, 0, 1] = 65519.9, -65520.0, 1e5, -3e38
    query *= 1e-3
    if policy == "saturate":
        prompt.append_attend(query, key, value, scale=0.25)
    else:
        got = prompt.cache.append_attend(0, query, key, value, scale=0.25)
        assert isinstance(got, torch.Tensor)
        assert (got[0, 7:29, 2:, 3] == torch.inf).all() and (got[0, 8:29, :2, 1] == -torch.inf).all()
        assert got[0, :7].isfinite().all()
        prompt.append_instead(key, value)
    assert prompt.cache.overflow_counts().tolist() == [3]


# The call itself


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "group", "slots"), [(70, 2, 128), (20, 3, 30), (40, 1, 300)])
def test_the_same_call_gives_the_same_bits(backend: Backend, rows: int, group: int, slots: int, precision: str) -> None:
    leave_out(backend.slow and precision == "fp16" and slots > 100)
    prompt = Prompt(backend, slots=slots, head_dim=16, batch=2).append(slots - 20)
    tensors = prompt.new(rows, group)
    first = bare(prompt, tensors, torch.nan, precision=precision)
    for _ in range(2 if backend.slow else 5):
        for got, want in zip(bare(prompt, tensors, torch.nan, precision=precision), first, strict=True):
            assert_same_bits(got, want)


def test_rounding_is_allowed_and_not_asked_for(backend: Backend) -> None:
    """precision="fp16" of few queries and of many; what else it might be is refused."""
    prompt = Prompt(backend, slots=64, head_dim=16).append(40)
    for rows in (1, 5, 20):
        prompt.attend(prompt.new(rows, 2)[0], precision="fp16")
    for wrong in ("fp8", "FP16", "", None, 16, torch.float16):
        with pytest.raises(ValueError, match="precision must be 'fp32' or 'fp16', got"):
            prompt.cache.attend(0, prompt.new(20)[0], precision=wrong)  # type: ignore[arg-type]


WRONG: dict[str, Callable[[StreamingKVCacheFp16, list[torch.Tensor]], object]] = {
    "precision": lambda c, x: c.append_attend(0, *x, precision="fp8"),
    "scale": lambda c, x: c.append_attend(0, *x, scale=3e38),
    "window": lambda c, x: c.append_attend(0, *x, window=0),
    "softcap": lambda c, x: c.append_attend(0, *x, softcap=-1.0),
    "layer": lambda c, x: c.append_attend(1, *x),
    "query": lambda c, x: c.append_attend(0, x[0][:, 1:], *x[1:]),
    "key": lambda c, x: c.append_attend(0, x[0], x[1].double(), x[2]),
    "value": lambda c, x: c.append_attend(0, *x[:2], x[2][:, 1:]),
    "out": lambda c, x: c.append_attend(0, *x, out=x[0]),
    "out of another shape": lambda c, x: c.append_attend(0, *x, out=torch.empty_like(x[0][:, 1:])),
    "new_lengths": lambda c, x: c.append_attend(0, *x, new_lengths=torch.ones(3, device=x[0].device).long()),
    "sequences": lambda c, x: c.append_attend(0, *x, sequences=[0, 0]),
    "a view of the cache": lambda c, x: c.append_attend(0, x[0].half(), c.k_cache[0][:, :30], x[2].half()),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_changes_nothing(device: torch.device, name: str) -> None:
    prompt = Prompt(Backend(device.type, device), slots=64, head_dim=16, batch=2).append([3, 70])
    tensors = prompt.new(30, 2)
    with pytest.raises((TypeError, ValueError, IndexError)):
        WRONG[name](prompt.cache, tensors)
    prompt.check_contents()
    prompt.append_attend(*tensors)


def test_calls_of_any_length_in_turn(backend: Backend) -> None:
    """Prompts, pieces of prompts, steps and drafts that are taken back, on one cache."""
    prompt = Prompt(backend, slots=96, sinks=2, head_dim=16, heads=2)
    for step, rows in enumerate((50, 1, 17, 3, 16, 1, 64, 20, 1, 130)):
        prompt.append_attend(*prompt.new(rows, 2), **({"precision": "fp16"} if step % 3 == 2 else {}))
        prompt.attend(prompt.new(rows, 2)[0])
        if step % 4 == 3:
            prompt.truncate(min(prompt.model.shortest(), 40))


def test_another_layer_is_left_alone(backend: Backend) -> None:
    cache = make_cache(backend, num_layers=2, max_positions=64, head_dim=16)
    key = torch.randn(50, 2, 16, device=backend.device)
    cache.append_all(key.expand(2, *key.shape), key.expand(2, *key.shape))
    before = cache.k_cache[0].clone(), cache.v_cache[0].clone(), cache.tensors.state[:, 0].clone()
    cache.append_attend(1, key[:30], key[:30], key[:30])
    assert_same_bits(cache.k_cache[0], before[0])
    assert_same_bits(cache.v_cache[0], before[1])
    assert torch.equal(cache.tensors.state[:, 0], before[2])
    assert cache.cache_seqlens.tolist() == [[50], [80]]


def test_the_model_is_one_position_at_a_time(device: torch.device) -> None:
    """What these tests compare with, and the plainest way to say it: append a position, attend to it."""
    prompt = Prompt(Backend(device.type, device), slots=20, sinks=3, head_dim=8).append(25)
    query, keys, values = (x[0].double().cpu().numpy() for x in prompt.new(30, 2))
    halves = [x.astype(np.float16).view(np.uint16) for x in (keys, values)]
    for window in (None, 7):
        options = prompt.options({"window": window})
        got = prompt.model.append_attend(0, 0, query, *(x[5:] for x in halves), options)
        sequence: Sequence = prompt.model.at[0][0].copy()
        assert not got.seen[:5].any()
        for t in range(5, 30):
            sequence.append(halves[0][t], halves[1][t], 20, 3)
            one = attention([sequence], query[t : t + 1], np.array([sequence.next - 1]), 3, options)
            np.testing.assert_allclose(got.out[t], one.out[0], rtol=1e-12)
            np.testing.assert_allclose(got.lse[t], one.lse[0], rtol=1e-12)
