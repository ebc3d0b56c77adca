"""A cache and the plain NumPy model of it (model.py), for calls with many queries: test_prompt.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from conftest import Backend, assert_same_bits, make_cache
from model import Array, Attention, AttentionOptions, Model, to_half

from kvcache_ext import StreamingKVCacheFp16

# Relative errors that the design promises for FP32, each times sqrt(head_dim / 128) above 128, and for data that is not
# N(0, 1) with 2^-22 of the largest `scale * sum |q_i k_i|` more: of all queries of a head together, and of one alone.
HEAD_BOUND = 1.1e-6
ROW_BOUND = 2.5e-6
ROUNDED_BOUND = 2e-3  # of a single query with precision="fp16", where the scale is the usual one
LSE_BOUND = 4e-6  # absolute, for scores of a few units
# How far rounding to a dtype moves a number: at most this share of it, or this much where it is next to nothing.
HALF_ULP = {torch.float32: (0.0, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}

Answer = tuple[torch.Tensor, torch.Tensor]
Chosen = Sequence[int] | torch.Tensor | None


def as_numbers(chosen: Sequence[int] | torch.Tensor) -> list[int]:
    return chosen.tolist() if isinstance(chosen, torch.Tensor) else list(chosen)


def doubles(x: torch.Tensor) -> Array:
    return np.asarray(x.detach().double().cpu().numpy())


def norm(x: Array) -> Array:
    return np.asarray(np.linalg.norm(x, axis=-1))


@dataclass
class Expected:
    """What FP64 attention comes to, for every entry of a call."""

    of: list[Attention]
    options: AttentionOptions
    usual: bool  # N(0, 1) data and the default scale: the plain bounds hold
    merged: bool = False  # from answers of several ranks, weighed by their LSEs, which FP32 has rounded

    def check(self, got: Answer, rounds: bool = False) -> None:
        out, lse = got
        assert lse.dtype == torch.float32 and lse.shape == out.shape[:-1]
        assert len(self.of) == len(out)
        for i, want in enumerate(self.of):
            self._check(want, doubles(out[i]), doubles(lse[i]), out.dtype, rounds)

    def _check(self, want: Attention, out: Array, lse: Array, dtype: torch.dtype, rounds: bool) -> None:
        """`out`: `[T, Hq, D]`."""
        if out.size == 0:
            return
        seen = want.seen
        assert want.finite.all(), "the test's own data is not finite"
        assert not out[~seen].any() and (lse[~seen] == -np.inf).all(), "a query that sees nothing has an answer"
        assert np.isfinite(out).all() and np.isfinite(lse[seen]).all()
        share, least = HALF_ULP[dtype]
        error = np.abs(out - want.out)
        error = np.maximum(error - np.maximum(share * np.abs(out), least), 0.0)  # before it was rounded to its dtype
        of_head_dim = max(1.0, (out.shape[-1] / 128) ** 0.5)
        scores_off = np.zeros_like(want.magnitude) if self.usual else 2.0**-22 * want.magnitude
        if self.merged:
            scores_off = scores_off + 2.0**-23 * np.abs(np.where(seen, want.lse, 0.0))
        row_bound, lse_bound = ROW_BOUND * of_head_dim + scores_off, LSE_BOUND * np.maximum(1.0, np.abs(want.lse))
        lse_bound = lse_bound + 2.0**-22 * want.magnitude
        if rounds:
            scores_off = np.zeros_like(want.magnitude) if self.usual else 2.0**-10 * want.magnitude
            row_bound, lse_bound = ROUNDED_BOUND + scores_off, ROUNDED_BOUND + 2.0**-10 * want.magnitude
        else:
            of_head = norm(error.transpose(1, 0, 2).reshape(out.shape[1], -1))
            size = norm(want.out.transpose(1, 0, 2).reshape(out.shape[1], -1))
            bound = HEAD_BOUND * of_head_dim + scores_off.max(0)
            worst = (of_head / np.where(size == 0, 1.0, bound * size)).argmax()
            assert (of_head <= bound * size).all(), (
                f"head {worst}: relative error {of_head[worst] / size[worst]:.2e} of {bound[worst]:.2e}"
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(seen, norm(error) / norm(want.out) / row_bound, 0.0)
            of_lse = np.where(seen, np.abs(lse - want.lse) / lse_bound, 0.0)
        for what, values in (("answer", relative), ("LSE", of_lse)):
            t, head = np.unravel_index(values.argmax(), values.shape)
            assert (values <= 1).all(), f"{what} of query {t}, head {head}: error {values[t, head]:.2f} of its bound"


class Prompt:
    """A cache, the model of it, and a cache of the same calls in which append takes the place of append_attend.

    Before each attention call, every slot that holds nothing is made NaN.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        slots: int,
        heads: int = 1,
        head_dim: int = 64,
        batch: int = 1,
        sinks: int = 0,
        overflow: str = "saturate",
    ) -> None:
        self.device = backend.device
        self.cache, self.appended = (
            make_cache(
                backend, num_layers=1, max_positions=slots, num_heads=heads, head_dim=head_dim, batch_size=batch,
                sink_positions=sinks, overflow=overflow,
            )
            for _ in range(2)
        )  # fmt: skip
        self.model = Model(1, batch, slots, heads, head_dim, sinks, overflow == "saturate")

    # Inputs

    def randn(self, batch: int, rows: int, heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(batch, rows, heads, self.model.head_dim).to(dtype).to(self.device)

    def new(self, rows: int, group: int = 1, batch: int | None = None, **dtypes: torch.dtype) -> list[torch.Tensor]:
        """query, key, value of N(0, 1); `query` and `new` are dtypes."""
        batch, heads = self.model.batch if batch is None else batch, self.model.heads
        of = (dtypes.get("query", torch.float32), *[dtypes.get("new", torch.float32)] * 2)
        return [self.randn(batch, rows, h, dtype) for h, dtype in zip((heads * group, heads, heads), of, strict=True)]

    # Calls

    def append(self, rows: int | Sequence[int]) -> Prompt:
        """N(0, 1); as many of each sequence, or a number for each."""
        lengths = None if isinstance(rows, int) else torch.tensor(rows, device=self.device)
        _, key, value = self.new(rows if isinstance(rows, int) else max(rows))
        return self.append_these(key, value, lengths)

    def append_these(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None) -> Prompt:
        for cache in (self.cache, self.appended):
            cache.append(0, key, value, new_lengths=lengths)
        self._store(key, value, lengths, None)
        return self

    def truncate(self, rows: int) -> Prompt:
        for cache in (self.cache, self.appended):
            cache.truncate(rows)
        for b in range(self.model.batch):
            self.model.truncate(b, rows)
        return self

    def attend(self, query: torch.Tensor, **options: Any) -> Answer:
        """Checked against the model."""
        self.poison()
        want = self.expect_attend(query, **options)
        got = self.cache.attend(0, query, return_lse=True, **options)
        self.check(got, query, want, options)
        return got

    def append_attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Answer:
        """Checked against the model, and what it leaves behind against `append`."""
        self.poison()
        want = self.expect_append_attend(query, key, value, **options)
        got = self.cache.append_attend(0, query, key, value, return_lse=True, **options)
        self.check(got, query, want, options)
        self.append_instead(key, value, options.get("new_lengths"), options.get("sequences"))
        return got

    def append_instead(
        self, key: torch.Tensor, value: torch.Tensor, new_lengths: torch.Tensor | None = None, sequences: Chosen = None
    ) -> None:
        """After an append_attend: it has left what `append` of the same rows leaves, to the bit."""
        self.appended.append(0, key, value, new_lengths=new_lengths, sequences=sequences)
        self._store(key, value, new_lengths, sequences)
        self.check_contents()

    # What they should come to

    def check(self, got: Answer, query: torch.Tensor, want: Expected, options: dict[str, Any]) -> None:
        out = options.get("out")
        assert out is None or got[0] is out
        assert got[0].shape == query.shape and got[0].dtype == query.dtype
        want.check(got, options.get("precision") == "fp16")

    def expect_attend(self, query: torch.Tensor, sequences: Chosen = None, **options: Any) -> Expected:
        m, queries = self.model, doubles(query)
        of = self.options(options)
        answers = [
            Attention.of_nothing(*query.shape[1:]) if b is None else m.attend(0, b, q, of)
            for b, q in zip(self.entries(sequences), queries, strict=True)
        ]
        return Expected(answers, of, "scale" not in options)

    def expect_append_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        new_lengths: torch.Tensor | None = None,
        sequences: Chosen = None,
        **options: Any,
    ) -> Expected:
        m, rows, of = self.model, query.shape[1], self.options(options)
        keys, values = (self.bits(x) for x in (key, value))
        answers = []
        for i, b in enumerate(self.entries(sequences)):
            answer = Attention.of_nothing(*query.shape[1:])
            if b is not None:
                skip = rows - self.count(new_lengths, i, rows)
                answer = m.append_attend(0, b, doubles(query[i]), keys[i, skip:], values[i, skip:], of)
            answers.append(answer)
        return Expected(answers, of, "scale" not in options)

    def options(self, given: dict[str, Any]) -> AttentionOptions:
        return AttentionOptions(
            given.get("scale", self.model.head_dim**-0.5), given.get("window"), given.get("softcap")
        )

    def entries(self, sequences: Chosen) -> list[int | None]:
        numbers = range(self.model.batch) if sequences is None else as_numbers(sequences)
        return [b if 0 <= b < self.model.batch else None for b in numbers]

    def bits(self, x: torch.Tensor) -> Array:
        return to_half(x.float().cpu().numpy(), self.model.saturate)[0]

    @staticmethod
    def count(new_lengths: torch.Tensor | None, entry: int, rows: int) -> int:
        return rows if new_lengths is None else min(max(int(new_lengths[entry]), 0), rows)

    def _store(
        self, key: torch.Tensor, value: torch.Tensor, new_lengths: torch.Tensor | None, sequences: Chosen
    ) -> None:
        for i, b in enumerate(self.entries(sequences)):
            if b is not None:
                skip = key.shape[1] - self.count(new_lengths, i, key.shape[1])
                halves = [to_half(x[i, skip:].float().cpu().numpy(), self.model.saturate) for x in (key, value)]
                overflows = sum(int(of.sum()) for _, of in halves)
                self.model.append(0, b, halves[0][0], halves[1][0], overflows)

    # The storage

    def unheld(self) -> torch.Tensor:
        """The slots of each sequence that hold nothing, `[B, N]` bool."""
        m = self.model
        empty = torch.ones(m.batch, m.slots, dtype=torch.bool)
        for b, s in enumerate(m.at[0]):
            empty[b, [p if p < m.sinks else m.sinks + (p - m.sinks) % (m.slots - m.sinks) for p in s.positions]] = False
        return empty.to(self.device)

    def poison(self, value: float = torch.nan) -> None:
        empty = self.unheld()
        for cache in (self.cache, self.appended):
            for storage in (cache.k_cache, cache.v_cache):
                storage[0][empty] = value

    def check_contents(self) -> None:
        """Storage, unwritten slots too, lengths and counters are those of the cache that was only appended to."""
        assert_same_state(self.cache, self.appended)
        m = self.model
        assert self.cache.lengths() == [m.held(0, b) for b in range(m.batch)]
        assert self.cache.position == m.position()
        assert self.cache.overflow_counts().tolist() == m.overflow_counts


def assert_same_state(got: StreamingKVCacheFp16, want: StreamingKVCacheFp16) -> None:
    """To the bit: storage, lengths, counters."""
    assert_same_bits(got.k_cache, want.k_cache)
    assert_same_bits(got.v_cache, want.v_cache)
    assert torch.equal(got.tensors.state, want.tensors.state)
    assert torch.equal(got.overflow_counts(), want.overflow_counts())
