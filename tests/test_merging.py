"""Merging what ranks answer over their shares of a text: gathered, and exchanged through inboxes.

All ranks are caches of this process. An exchange runs in two steps, which the kernel knows for these tests: every rank
sends, then every rank receives.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, Backend, assert_same_bits
from prompts import Answer
from shares import RANKS, Dealt

from kvcache_ext import merge_states
from kvcache_ext._extension import extension

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TIMED_OUT, OTHER_CALL = 1, 2  # kMergeTimedOut, kMergeOtherCall in csrc/kernels/params.h

EXCHANGING = ["emulated"] + ([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else [])
exchanging = pytest.mark.parametrize("backend", EXCHANGING, indirect=True)


def failed(kind: int, rank: int) -> int:
    return kind | rank << 8


def random_answers(dealt: Dealt, rows: int, heads: int = 4) -> list[Answer]:
    """Some answers are empty."""
    p, answers = dealt.plain, []
    for _ in dealt.shares:
        out = torch.randn(p.batch_size, rows, heads, p.head_dim)
        lse = 3 * torch.randn(p.batch_size, rows, heads)
        nothing = torch.rand(lse.shape) < 0.2
        answers.append((out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -torch.inf)))
    return [(out.to(dealt.device), lse.to(dealt.device)) for out, lse in answers]


def exact(answers: list[Answer]) -> Answer:
    """Merged in FP64."""
    lses = torch.stack([lse.cpu().double() for _, lse in answers])
    total = lses.logsumexp(0)
    weights = torch.where(lses == -torch.inf, 0.0, (lses - torch.where(total == -torch.inf, 0.0, total)).exp())
    return (torch.stack([out.cpu().double() for out, _ in answers]) * weights[..., None]).sum(0), total


def assert_merged(got: Answer, answers: list[Answer]) -> None:
    want, want_lse = exact(answers)
    bound = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[got[0].dtype]
    torch.testing.assert_close(got[0].cpu().double(), want, rtol=bound, atol=bound)
    torch.testing.assert_close(got[1].cpu().double(), want_lse, rtol=1e-6, atol=1e-6)


# Gathered


@pytest.mark.parametrize("ranks", [*RANKS, 1, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 72])
def test_gathered(backend: Backend, ranks: int, dtype: torch.dtype, head_dim: int) -> None:
    dealt = Dealt(backend, ranks, num_layers=2, batch_size=3, head_dim=head_dim, max_positions=ranks)
    for rows in (1, 5):
        answers = random_answers(dealt, rows)
        assert_merged(dealt.merge(1, answers, dtype), answers)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_into_any_strides(backend: Backend, ranks: int, dtype: torch.dtype) -> None:
    """With LSEs or without; of no rows."""
    dealt = Dealt(backend, ranks, batch_size=2)
    for rows in (3, 0):
        answers = random_answers(dealt, rows)
        want = dealt.merge(0, answers, dtype)
        together = dealt.gathered(0, answers)
        tag = torch.zeros(1, dtype=torch.int64, device=dealt.device)
        wide = torch.full((2, 4, rows + 2, 13), torch.nan, dtype=dtype, device=dealt.device)
        out = wide[:, :, 1 : rows + 1, 3:11].transpose(1, 2)
        dealt.shares[1].native.merge_gathered(0, together, out, None, tag, None, dealt.new_failure())
        assert_same_bits(out, want[0])
        out.fill_(torch.nan)
        assert wide.isnan().all()


def test_empty_answers_are_left_out(backend: Backend) -> None:
    """Whatever they hold: other libraries answer NaN where nothing is seen."""
    dealt = Dealt(backend, 3, batch_size=2)
    answers = random_answers(dealt, 2)
    for _, lse in answers:
        lse[1] = -torch.inf
    want = dealt.merge(0, answers, torch.float32)
    assert not want[0][1].any() and (want[1][1] == -torch.inf).all()
    for out, lse in answers:
        out[lse == -torch.inf] = torch.nan
    for got, clean in zip(dealt.merge(0, answers, torch.float32), want, strict=True):
        assert_same_bits(got, clean)


def test_what_is_not_finite(backend: Backend) -> None:
    """Infinite and NaN answers stay, however small their weight is."""
    dealt = Dealt(backend, 2)
    answers = random_answers(dealt, 4, heads=2)
    for number, row, lse in ((torch.inf, 0, 1.0), (torch.nan, 1, -500.0), (-torch.inf, 2, -3e38)):
        answers[1][0][0, row, 0, 3] = number
        answers[1][1][0, row, 0] = lse
    answers[0][1][0, :3, 0] = 2.0
    answers[1][1][0, 3, 1] = torch.nan
    answers[0][1][0, 3, 1] = 0.0
    out, lse = dealt.merge(0, answers, torch.float32)
    assert out[0, :3, 0, 3].tolist()[0] == torch.inf and out[0, 1, 0, 3].isnan() and out[0, 2, 0, 3] == -torch.inf
    assert out[0, 3, 1].isnan().all() and lse[0, 3, 1].isnan()
    out[0, :3, 0, 3], out[0, 3, 1], lse[0, 3, 1] = 0.0, 0.0, 0.0
    assert not out.isnan().any() and out.isfinite().all() and not lse.isnan().any()


def test_it_is_merge_states(backend: Backend) -> None:
    dealt = Dealt(backend, 3)
    answers = random_answers(dealt, 5)
    want = merge_states([out for out, _ in answers], [lse for _, lse in answers])
    for got, of_states in zip(dealt.merge(0, answers, torch.float32), want, strict=True):
        torch.testing.assert_close(got, of_states, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", ["seqlen", "first", "tag"])
@pytest.mark.parametrize("rank", [0, 2])
def test_gathered_from_a_rank_that_differs(backend: Backend, what: str, rank: int) -> None:
    """Its number is noted, on every other rank; a later merge of ranks that agree notes nothing."""
    dealt = Dealt(backend, 3, batch_size=2).append(5, layer=1)
    answers = random_answers(dealt, 2)
    tags = [7, 7, 7]
    if what == "tag":
        tags[rank] = 2**40 + 7
    else:
        dealt.shares[rank].tensors.state[("seqlen", "first").index(what), 1, 1] += 2**32
    together = dealt.gathered(1, answers, tags)
    for share in dealt.shares:
        failure = dealt.new_failure()
        tag = torch.tensor([tags[share.rank]], device=dealt.device)
        share.native.merge_gathered(1, together, torch.empty_like(answers[0][0]), None, tag, None, failure)
        dealt.wait()
        if share.rank == rank:
            assert int(failure) in [failed(OTHER_CALL, other) for other in range(3) if other != rank]
        else:
            assert int(failure) == failed(OTHER_CALL, rank)
    dealt.merge(0, answers, torch.float32)  # the other layer's lengths agree


# Exchanged


class Inboxes:
    """What ranks of this process exchange answers through."""

    def __init__(self, dealt: Dealt, lines: int = 1000, timeout: float = 0.5) -> None:
        self.dealt = dealt
        ranks = dealt.ranks
        self.inboxes = [self._zeros(2 * ranks * lines * 4) for _ in range(ranks)]
        self.failures = [dealt.new_failure() for _ in range(ranks)]
        self.tags = [torch.zeros(1, dtype=torch.int64, device=dealt.device) for _ in range(ranks)]
        addresses = [inbox.data_ptr() for inbox in self.inboxes]
        self.controls = [[self._zeros(3) for _ in range(ranks)] for _ in range(3)]
        self.senders, self.receivers, self.both = (
            [
                extension.ExchangeMemory(addresses, lines, controls[r], self.failures[r], timeout, sends, receives)
                for r in range(ranks)
            ]
            for controls, sends, receives in zip(self.controls, (True, False, True), (False, True, True), strict=True)
        )

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.dealt.device)

    def run(
        self, memories: list[Any], rank: int, layer: int, answer: Answer, dtype: torch.dtype, sequences: Any = None
    ) -> Answer:
        out = torch.zeros_like(answer[0], dtype=dtype)
        lse = torch.zeros_like(answer[1])
        self.dealt.shares[rank].native.merge_exchanged(
            layer, answer[0], answer[1], out, lse, self.tags[rank], 0, sequences, memories[rank]
        )
        return out, lse

    def send(self, rank: int, layer: int, answer: Answer, sequences: Any = None) -> None:
        out, _ = self.run(self.senders, rank, layer, answer, torch.float32, sequences)
        assert not out.any(), "a launch that only sends wrote an answer"

    def receive(
        self, rank: int, layer: int, answer: Answer, dtype: torch.dtype = torch.float32, sequences: Any = None
    ) -> Answer:
        return self.run(self.receivers, rank, layer, answer, dtype, sequences)

    def merge(self, layer: int, answers: list[Answer], dtype: torch.dtype, sequences: Any = None) -> list[Answer]:
        """Of every rank."""
        for rank, answer in enumerate(answers):
            self.send(rank, layer, answer, sequences)
        return [self.receive(rank, layer, answer, dtype, sequences) for rank, answer in enumerate(answers)]

    def noted(self) -> list[int]:
        self.dealt.wait()
        return [int(failure) for failure in self.failures]


def assert_all_same(got: list[Answer], want: Answer) -> None:
    for of_rank in got:
        for mine, theirs in zip(of_rank, want, strict=True):
            assert_same_bits(mine, theirs)


@exchanging
@pytest.mark.parametrize("ranks", [*RANKS, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 72])
def test_exchanged(backend: Backend, ranks: int, dtype: torch.dtype, head_dim: int) -> None:
    """Several calls in a row, of several shapes, through both tables: each rank gets the bits of a gathered merge."""
    dealt = Dealt(backend, ranks, batch_size=2, head_dim=head_dim, max_positions=ranks)
    inboxes = Inboxes(dealt, lines=16 * (head_dim // 2 + 1))
    for call, rows in enumerate((1, 2, 1, 1, 2)):
        answers = random_answers(dealt, rows)
        assert_all_same(inboxes.merge(call % 2, answers, dtype), dealt.merge(call % 2, answers, dtype))
    assert inboxes.noted() == [0] * ranks


@exchanging
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("lines", [1, 5, 7, 8, 11])
def test_rows_in_several_launches(backend: Backend, ranks: int, lines: int) -> None:
    """Where a table is too small for a call. `lines`: for so many of a row's, and some too few for another row."""
    dealt = Dealt(backend, ranks, batch_size=2, head_dim=6)
    inboxes = Inboxes(dealt, lines=lines * 4 + 3)
    for rows in (lines, lines // 2 + 1):  # 2 launches, as sending all at once has room for
        answers = random_answers(dealt, rows, heads=2)
        answers = [(out[:1], lse[:1]) for out, lse in answers]
        want = dealt.merge(0, answers, torch.float16, sequences=[1])
        assert_all_same(inboxes.merge(0, answers, torch.float16, sequences=[1]), want)
    assert inboxes.noted() == [0] * ranks


@exchanging
def test_exchanged_into_any_strides(backend: Backend) -> None:
    dealt = Dealt(backend, 2, batch_size=2)
    inboxes = Inboxes(dealt)
    answers = random_answers(dealt, 3)
    want = dealt.merge(0, answers, torch.bfloat16)
    for rank, answer in enumerate(answers):
        inboxes.send(rank, 0, answer)
    for share, answer, tag, memory in zip(dealt.shares, answers, inboxes.tags, inboxes.receivers, strict=True):
        wide = torch.full((2, 4, 5, 13), torch.nan, dtype=torch.bfloat16, device=dealt.device)
        out = wide[:, :, 1:4, 3:11].transpose(1, 2)
        share.native.merge_exchanged(0, answer[0], answer[1], out, None, tag, 0, None, memory)
        assert_same_bits(out, want[0])
        out.fill_(torch.nan)
        assert wide.isnan().all()


@exchanging
def test_what_is_not_finite_is_exchanged(backend: Backend) -> None:
    dealt = Dealt(backend, 2)
    inboxes = Inboxes(dealt)
    answers = random_answers(dealt, 2)
    answers[1][0][0, 0, 0, 1], answers[1][1][0, 0, 0] = torch.inf, 0.0
    answers[0][0][0, 1, 2], answers[0][1][0, 1, 2] = torch.nan, 3.0
    want = dealt.merge(0, answers, torch.float32)
    assert_all_same(inboxes.merge(0, answers, torch.float32), want)
    assert inboxes.noted() == [0, 0]


@exchanging
@pytest.mark.parametrize("what", ["seqlen", "first", "tag", "layer", "rows", "entries"])
def test_exchanged_with_a_rank_that_differs(backend: Backend, what: str) -> None:
    """NaN and a note on both ranks; and from then on nothing is sent, waited for or answered."""
    dealt = Dealt(backend, 2, batch_size=2).append(5)
    inboxes = Inboxes(dealt)
    answers = random_answers(dealt, 2)
    inboxes.merge(0, answers, torch.float32)
    calls: list[tuple[int, Answer]] = [(0, answers[0]), (0, answers[1])]
    if what == "tag":
        inboxes.tags[1] += 2**40
    elif what == "layer":
        calls[1] = (1, answers[1])
    elif what == "rows":  # as many numbers, of another shape
        calls[1] = (0, (answers[1][0].reshape(2, 4, 2, 8), answers[1][1].reshape(2, 4, 2)))
    elif what == "entries":
        calls[1] = (0, (answers[1][0].reshape(1, 4, 4, 8), answers[1][1].reshape(1, 4, 4)))
    else:
        dealt.shares[1].tensors.state[("seqlen", "first").index(what)] += 2**32
    chosen = [None, [0] if what == "entries" else None]
    for rank, (layer, answer) in enumerate(calls):
        inboxes.send(rank, layer, answer, chosen[rank])
    for rank, (layer, answer) in enumerate(calls):
        out, lse = inboxes.receive(rank, layer, answer, sequences=chosen[rank])
        assert out.isnan().all() and lse.isnan().all()
    assert inboxes.noted() == [failed(OTHER_CALL, 1), failed(OTHER_CALL, 0)]
    before = [inbox.clone() for inbox in inboxes.inboxes]
    memories = inboxes.receivers
    for rank, (layer, answer) in enumerate(calls):
        out, lse = inboxes.run(memories, rank, layer, answer, torch.float16, chosen[rank])
        assert out.isnan().all() and lse.isnan().all()
    assert inboxes.noted() == [failed(OTHER_CALL, 1), failed(OTHER_CALL, 0)]
    for inbox, as_it_was in zip(inboxes.inboxes, before, strict=True):
        assert torch.equal(inbox, as_it_was)


@exchanging
def test_lengths_of_other_sequences_do_not_matter(backend: Backend) -> None:
    """Of a call about some sequences only their lengths are compared; rows of those that agree are answered."""
    dealt = Dealt(backend, 2, batch_size=3)
    inboxes = Inboxes(dealt)
    dealt.shares[1].tensors.state[0, 0, 2] += 1
    answers = [(out[:2], lse[:2]) for out, lse in random_answers(dealt, 1)]
    chosen = torch.tensor([1, 7], device=dealt.device)
    merged = inboxes.merge(0, answers, torch.float32, chosen)
    assert inboxes.noted() == [0, 0]
    assert_merged(merged[0], answers)
    inboxes.merge(0, answers, torch.float32, torch.tensor([1, 2], device=dealt.device))
    assert inboxes.noted() == [failed(OTHER_CALL, 1), failed(OTHER_CALL, 0)]


@exchanging
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_sends(backend: Backend, missing: int) -> None:
    """The others note that it timed out, and answer NaN; they do so at once from then on."""
    dealt = Dealt(backend, 3)
    inboxes = Inboxes(dealt, timeout=0.2)
    answers = random_answers(dealt, 2)
    want = dealt.merge(0, answers, torch.float32)
    assert_all_same(inboxes.merge(0, answers, torch.float32), want)
    others = [rank for rank in range(3) if rank != missing]
    for rank in others:
        inboxes.send(rank, 0, answers[rank])
    for _ in range(3):
        for rank in others:
            out, lse = inboxes.receive(rank, 0, answers[rank])
            assert out.isnan().all() and lse.isnan().all()
        noted = inboxes.noted()
        assert [noted[rank] for rank in others] == [failed(TIMED_OUT, missing)] * 2
    # The one that is late has all that it waits for, but its own answers have failed the others.
    inboxes.send(missing, 0, answers[missing])
    assert_all_same([inboxes.receive(missing, 0, answers[missing])], want)
    assert inboxes.noted()[missing] == 0


@exchanging
def test_a_rank_that_is_a_call_ahead(backend: Backend) -> None:
    """Its answers lie in the other table, and are waited for again by the call that they belong to."""
    dealt = Dealt(backend, 2)
    inboxes = Inboxes(dealt)
    answers = [random_answers(dealt, 1) for _ in range(2)]
    want = [dealt.merge(0, of_call, torch.float32) for of_call in answers]
    for of_call in answers:
        inboxes.send(0, 0, of_call[0])
    for of_call, wanted in zip(answers, want, strict=True):
        inboxes.send(1, 0, of_call[1])
        assert_all_same([inboxes.receive(rank, 0, of_call[rank]) for rank in range(2)], wanted)
    assert inboxes.noted() == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("ranks", RANKS)
def test_exchanged_at_the_same_time(backend: Backend, ranks: int) -> None:
    """As ranks do it: each on a stream of its own sends and waits in one launch, for 100 calls in a row."""
    dealt = Dealt(backend, ranks, batch_size=2)
    inboxes = Inboxes(dealt, timeout=10.0)
    calls = [random_answers(dealt, 1 + call % 3) for call in range(100)]
    want = [dealt.merge(0, answers, torch.float32) for answers in calls]
    Inboxes(dealt).merge(0, calls[0], torch.float32)  # loading a kernel could wait for one that waits for a rank
    got: list[list[Answer]] = [[] for _ in range(ranks)]

    def work(rank: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(dealt.device)):
            for answers in calls:
                got[rank].append(inboxes.run(inboxes.both, rank, 0, answers[rank], torch.float32))

    dealt.wait()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inboxes.noted() == [0] * ranks
    for call, wanted in enumerate(want):
        assert_all_same([of_rank[call] for of_rank in got], wanted)


# What is refused


def test_wrong_tensors(backend: Backend) -> None:
    dealt = Dealt(backend, 2)
    answers = random_answers(dealt, 1)
    together, tag, failure = dealt.gathered(0, answers), torch.zeros(1, dtype=torch.int64), dealt.new_failure()
    tag = tag.to(dealt.device)
    out = torch.empty_like(answers[0][0])
    native = dealt.shares[0].native
    with pytest.raises(ValueError, match=r"merge: gathered must be contiguous and \[2, \d+\], got \[1, \d+\]"):
        native.merge_gathered(0, together[:1], out, None, tag, None, failure)
    with pytest.raises(IndexError, match="layer"):
        native.merge_gathered(2, together, out, None, tag, None, failure)
    with pytest.raises(ValueError, match="at most 16 ranks can exchange answers through shared memory, got 17"):
        extension.ExchangeMemory([0] * 17, 1, torch.zeros(3, dtype=torch.int32), failure, 1.0)
    memory = extension.ExchangeMemory([0, 0], 100, torch.zeros(3, dtype=torch.int32), failure, 1.0)
    with pytest.raises(ValueError, match="answers and LSEs must be contiguous and as many as the queries"):
        native.merge_exchanged(0, answers[0][0][:, :, :2], answers[0][1], out, None, tag, 0, None, memory)
