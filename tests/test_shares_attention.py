"""Attention over a text that is dealt out: the ranks' merged answers against FP64, on every backend.

What merges them here is merge_gathered; test_merging.py is about merging itself.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import Backend, assert_same_kinds
from shares import RANKS, Dealt, DealtPrompt

from kvcache_ext import merge_states

FEW, MANY = (1, 2, 5, 16), (17, 40)  # queries of a call, by the kernels that serve them


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("group", [1, 4, 9])
@pytest.mark.parametrize("sinks", [0, 1])
def test_one_query(backend: Backend, ranks: int, group: int, sinks: int) -> None:
    """At lengths around the number of ranks and the ring's end, so that each rank is the one that appends."""
    p = DealtPrompt(backend, ranks, slots=8 * ranks, sinks=sinks * ranks, heads=2, head_dim=16)
    p.attend(p.new(1, group)[0])
    for rows in [1] * (ranks + 2) + [5 * ranks, 1, 1, 3 * ranks - 2, 1, 1, 9 * ranks, 1]:
        if rows > 1:
            p.append(rows)
        p.check_both(1, group)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", FEW[1:] + MANY)
@pytest.mark.parametrize("sinks", [0, 1])
def test_several_queries(backend: Backend, ranks: int, rows: int, sinks: int) -> None:
    """Onto nothing, onto some, around the ring, and more of them than it has slots."""
    p = DealtPrompt(backend, ranks, slots=12 * ranks, sinks=sinks * ranks, heads=1, head_dim=64)
    p.check_both(rows, 2)
    p.append(ranks + 1)
    for _ in range(2 if backend.slow else 4):
        p.check_both(rows, 2)
    p.truncate(5)
    p.check_both(rows, 2)
    p.append(20 * ranks)
    p.check_both(rows, 2)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_call_longer_than_the_ring(backend: Backend, ranks: int, rows: int, slots: int) -> None:
    """A rank has one slot, or a sink and one."""
    p = DealtPrompt(backend, ranks, slots=slots * ranks, sinks=(slots - 1) * ranks, head_dim=16)
    for _ in range(4):
        p.check_both(rows)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("window", [1, 3, 10, 1000])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_windows(backend: Backend, ranks: int, window: int, rows: int) -> None:
    """A window that is smaller than the number of ranks leaves some of them nothing but sinks."""
    for sinks in (0, ranks):
        p = DealtPrompt(backend, ranks, slots=10 * ranks, sinks=sinks, head_dim=32)
        for held in (2, 7 * ranks, 6 * ranks):
            p.append(held)
            p.check_both(rows, window=window)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_softcap_and_scale(backend: Backend, ranks: int, rows: int) -> None:
    p = DealtPrompt(backend, ranks, slots=15 * ranks, sinks=ranks).append(40)
    p.check_both(rows, 2, softcap=1.5)
    p.check_both(rows, 2, scale=0.3)
    p.check_both(rows, 2, softcap=20.0, scale=0.5, window=11)
    p.check_both(rows, scale=0.0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 16), (1, 40), (4, 4), (2, 9), (17, 4)])
def test_groups(backend: Backend, ranks: int, rows: int, group: int) -> None:
    DealtPrompt(backend, ranks, slots=20 * ranks).append(23 * ranks + 1).check_both(rows, group)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 4), (3, 2), (17, 1)])
@pytest.mark.parametrize("head_dim", [8, 72, 128, 512])
def test_head_sizes(backend: Backend, ranks: int, rows: int, group: int, head_dim: int) -> None:
    DealtPrompt(backend, ranks, slots=20 * ranks, head_dim=head_dim).append(35).check_both(rows, group)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 4, 18])
@pytest.mark.parametrize("sinks", [0, 1])
def test_padding(backend: Backend, ranks: int, rows: int, sinks: int) -> None:
    """Sequences of other lengths, one of them empty; queries of left padding answer zeros."""
    p = DealtPrompt(backend, ranks, slots=8 * ranks, sinks=sinks * ranks, batch=4, head_dim=16)
    p.append([0, 1, 3 * ranks, 9 * ranks])
    for new in ([0, rows, 1, rows], [0, 0, 0, 0], [rows, 1, 0, rows - 1], [-3, rows + 5, rows, 1]):
        p.check_both(rows, 2, new_lengths=torch.tensor(new, device=p.device))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_of_some_sequences(backend: Backend, ranks: int, rows: int) -> None:
    """As a list, or as a tensor, some of whose numbers belong to no sequence."""
    p = DealtPrompt(backend, ranks, slots=8 * ranks, sinks=ranks, batch=4, head_dim=16)
    p.append([1, 2 * ranks, 7, 9 * ranks])
    tensors = [torch.tensor([3, -1, 1], dtype=dtype, device=p.device) for dtype in (torch.int64, torch.int32)]
    chosen: list[Any] = [[2, 0], *tensors]
    for sequences in chosen:
        new = p.new(rows, 2, batch=len(sequences))
        p.attend(new[0], sequences=sequences)
        p.append_attend(*new, sequences=sequences)
        lengths = torch.tensor([rows, 1, rows - 1][: len(sequences)], device=p.device)
        p.append_attend(*new, sequences=sequences, new_lengths=lengths)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    ("query", "new"), [(torch.float32, torch.bfloat16), (torch.float16,) * 2, (torch.bfloat16,) * 2]
)
def test_dtypes(backend: Backend, ranks: int, rows: int, query: torch.dtype, new: torch.dtype) -> None:
    """Ranks answer in FP32, whatever the query is; the merged answer is rounded once."""
    p = DealtPrompt(backend, ranks, slots=9 * ranks, sinks=ranks, head_dim=32).append(6)
    for _ in range(3):
        inputs = p.new(rows, 2, query=query, new=new)
        p.attend(inputs[0])
        p.append_attend(*inputs)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_strides(backend: Backend, ranks: int, rows: int) -> None:
    p = DealtPrompt(backend, ranks, slots=9 * ranks, batch=2, heads=2, head_dim=16).append([5, 11 * ranks])
    for _ in range(2):
        query, key, value = p.new(rows, 2)
        of_heads = query.transpose(1, 2).contiguous().transpose(1, 2)
        p.append_attend(of_heads, torch.cat([key, value], -1)[..., :16], value[:, :1].expand_as(value))
        wide = torch.full((2, rows + 1, 5, 27), torch.nan, device=p.device)
        spaced = wide[:, 1:, 1:, 3:19]
        spaced.copy_(query)
        p.attend(spaced)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 8), (3, 2), (17, 1)])
def test_several_blocks(backend: Backend, ranks: int, rows: int, group: int) -> None:
    """So many positions that several blocks of a rank share those of a head."""
    p = DealtPrompt(backend, ranks, slots=300 * ranks, sinks=ranks).append(290 * ranks)
    for _ in range(2):
        p.check_both(rows, group)
        p.append(9 * ranks + 1)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rows", "precision"), [(70, "fp16"), (130, "fp32")])
def test_prompts(backend: Backend, ranks: int, rows: int, precision: str) -> None:
    """In one call and in chunks, onto nothing and around a ring."""
    p = DealtPrompt(backend, ranks, slots=60 * ranks, sinks=ranks, batch=2)
    for _ in range(1 if backend.slow else 2):
        p.check_both(rows, 2, precision=precision)
    p.check_both(rows, precision=precision, new_lengths=torch.tensor([rows - 1, rows // 2], device=p.device), window=31)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_empty_shares_are_neutral(backend: Backend, ranks: int, rows: int) -> None:
    """A rank that holds nothing answers zeros and -inf, and what it is merged with stays as it is."""
    dealt = Dealt(backend, ranks, head_dim=16, batch_size=2)
    query = torch.randn(2, rows, 2, 16, device=dealt.device)
    out, lse = dealt.attend(0, query)
    assert not out.any() and (lse == -torch.inf).all()
    dealt.append(1)
    answers = dealt.on_shares("attend", 0, query, return_lse=True)
    for out, lse in answers[1:]:
        assert not out.any() and (lse == -torch.inf).all()
    out, lse = dealt.merge(0, answers, torch.float32)
    assert torch.equal(out, answers[0][0]) and torch.equal(lse, answers[0][1])
    assert (lse[:, -1] > -torch.inf).all() and (lse[:, :-1] == -torch.inf).all()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite(backend: Backend, ranks: int, rows: int, which: str, number: float) -> None:
    """It reaches the queries that see it, and no others, whichever rank it lies on."""
    for place in range(0, 2 * rows, rows):  # among what is held, then among what is new
        dealt = Dealt(backend, ranks, head_dim=16, max_positions=32 * ranks).append(rows)
        query, key, value = (torch.randn(1, rows, 2, 16, device=dealt.device) for _ in range(3))
        if place < rows:
            held_key, held_value = dealt.randn(ranks), dealt.randn(ranks)
            (held_key if which == "key" else held_value)[:, -1, 0, 3] = number
            dealt.call("append", 0, held_key, held_value)
            seen_from = 0
        else:
            seen_from = rows // 2
            (key if which == "key" else value)[:, seen_from, 0, 3] = number
        out, lse = dealt.append_attend(0, query, key, value)
        want, want_lse = dealt.plain.append_attend(0, query, key, value, return_lse=True)
        assert out[:, :seen_from].isfinite().all() and out[:, :, 1].isfinite().all()
        assert not out[:, seen_from:, 0].isfinite().all(-1).any() or which == "key"
        assert_same_kinds(out, want.cpu())
        assert_same_kinds(lse, want_lse.cpu())
        got = dealt.attend(0, query[:, -1:])
        assert_same_kinds(got[0], dealt.plain.attend(0, query[:, -1:]).cpu())
        far = dealt.attend(0, query[:, -1:], window=rows - seen_from - 1) if rows - seen_from > 1 else None
        assert far is None or far[0].isfinite().all()
        dealt.check()


def test_merge_states_merges_them_too(backend: Backend) -> None:
    """The package's public function, over the same answers."""
    dealt = Dealt(backend, 3, head_dim=16).append(11)
    query = torch.randn(1, 3, 4, 16, device=dealt.device)
    answers = dealt.on_shares("attend", 0, query, return_lse=True)
    out, lse = merge_states([answer[0] for answer in answers], [answer[1] for answer in answers])
    for got, want in zip(dealt.merge(0, answers, torch.float32), (out, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks(backend: Backend, seed: int) -> None:
    for number in range(1 if backend.slow else 8):
        walk(backend, random.Random(100 * seed + number), 4 if backend.slow else 8)


def walk(backend: Backend, r: random.Random, steps: int) -> None:
    ranks, batch = r.choice((2, 3, 4, 7)), r.choice((1, 2, 3))
    sinks = ranks * r.choice((0, 0, 1, 2))
    p = DealtPrompt(
        backend, ranks, slots=sinks + ranks * r.randint(1, 12), sinks=sinks, heads=r.choice((1, 2)), batch=batch,
        head_dim=r.choice((8, 24, 64)),
    )  # fmt: skip
    for _ in range(steps):
        kind = r.choice(("append", "truncate", "attend", "append_attend", "append_attend"))
        rows = r.choice((1, 1, 2, 3, 7, 16, 17, r.randint(18, 60)))
        options: dict[str, Any] = {}
        if r.random() < 0.4:
            options["window"] = r.randint(1, 2 * p.model.slots)
        if r.random() < 0.2:
            options["softcap"] = r.choice((2.0, 30.0))
        lengths = [r.randint(0, rows) for _ in range(batch)]
        if kind == "append":
            p.append(rows if r.random() < 0.5 else lengths)
        elif kind == "truncate":
            p.truncate(r.randint(0, min(p.appended.lengths())))
        else:
            new = p.new(rows, r.choice((1, 2, 5)), query=r.choice((torch.float32, torch.float16)))
            if kind == "attend":
                p.attend(new[0], **options)
            elif r.random() < 0.4:
                p.append_attend(*new, new_lengths=torch.tensor(lengths, device=p.device), **options)
            else:
                p.append_attend(*new, **options)
        p.check_contents()
