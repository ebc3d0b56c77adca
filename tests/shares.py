"""A text that is dealt out to several caches in one process, for test_shares*.py and test_merging.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from conftest import Backend, assert_same_bits, bits, make_cache, poison
from prompts import Answer, Expected, Prompt

from kvcache_ext import StreamingKVCacheFp16, reference

RANKS = (2, 3, 4)


class Share(StreamingKVCacheFp16):
    """What one rank stores, without a process group. Its answers are FP32, and yet to be merged with the others'."""

    def __init__(self, rank: int, ranks: int, **arguments: Any) -> None:
        self.rank, self.ranks = rank, ranks
        super().__init__(**arguments)
        poison(self)


class Dealt:
    """A cache of a whole text, and the caches of as many ranks that share it; poisoned, and small unless told."""

    def __init__(self, backend: Backend, ranks: int, **arguments: Any) -> None:
        self.device = backend.device
        self.plain = make_cache(backend, **({"max_positions": 6 * ranks} | arguments))
        p = self.plain
        self.shares = [
            Share(
                rank, ranks, num_layers=p.num_layers, max_positions=p.max_positions, num_heads=p.num_heads,
                head_dim=p.head_dim, batch_size=p.batch_size, sink_positions=p.sink_positions, overflow=p.overflow,
                device=p.device,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    @property
    def ranks(self) -> int:
        return len(self.shares)

    def on_shares(self, name: str, *arguments: Any, **options: Any) -> list[Any]:
        """One call, made on every rank."""
        return [getattr(share, name)(*arguments, **options) for share in self.shares]

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """One call, made on the whole cache and on every rank; the answer of the whole cache."""
        self.on_shares(name, *arguments, **options)
        return getattr(self.plain, name)(*arguments, **options)

    def randn(self, rows: int, batch: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Keys or values, `[B, T, H, D]`."""
        p = self.plain
        shape = (p.batch_size if batch is None else batch, rows, p.num_heads, p.head_dim)
        return torch.randn(shape).to(dtype).to(self.device)

    def append(self, rows: int | Sequence[int], layer: int = 0) -> Dealt:
        """N(0, 1); as many of each sequence, or a number for each."""
        lengths = None if isinstance(rows, int) else torch.tensor(rows, device=self.device)
        most = rows if isinstance(rows, int) else max(rows)
        self.call("append", layer, self.randn(most), self.randn(most), new_lengths=lengths)
        return self

    # What they hold

    def check(self) -> None:
        """Storage, unwritten slots too, lengths and counters: each rank's are its share of the whole cache's."""
        p = self.plain
        for share in self.shares:
            # Slot s of a rank is slot s * ranks + rank of the whole.
            assert_same_bits(share.k_cache, p.k_cache[:, :, share.rank :: self.ranks])
            assert_same_bits(share.v_cache, p.v_cache[:, :, share.rank :: self.ranks])
            assert torch.equal(share.tensors.state, p.tensors.state)
            assert (len(share), share.lengths(), share.position) == (len(p), p.lengths(), p.position)
            assert torch.equal(share.device_lengths(), p.device_lengths())
        counts = torch.stack([share.overflow_counts() for share in self.shares])
        assert torch.equal(counts.sum(0), p.overflow_counts())

    def held(self, layer: int, sequence: int) -> list[int]:
        seqlen, first = self.plain.tensors.state[:2, layer, sequence].tolist()
        return reference.held_positions(seqlen, first, self.plain.sink_positions)

    def owners(self, layer: int, indices: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
        """The rank that stores each index of each sequence, -1 where it is not held: `[B, n]`."""
        rows = []
        for b, of_sequence in zip(sequences, indices.cpu().expand(len(sequences), -1).tolist(), strict=True):
            held = self.held(layer, b) if 0 <= b < self.plain.batch_size else []
            rows.append([held[i] % self.ranks if 0 <= i < len(held) else -1 for i in of_sequence])
        return torch.tensor(rows, dtype=torch.int64).view(len(sequences), indices.shape[-1])

    def check_reading(self, read: Callable[[StreamingKVCacheFp16], Any], owners: torch.Tensor) -> None:
        """Each row from the rank that has it, bit for bit; of the other ranks zeros. `owners`: `[B, n]`."""
        whole = read(self.plain)
        for share in self.shares:
            for got, want in zip(read(share), whole, strict=True):
                assert got.dtype == want.dtype and got.shape == want.shape
                mine = (owners == share.rank).view(*want.shape[:-2], 1, 1)
                assert_same_bits(got.cpu(), torch.where(mine, want.cpu(), torch.zeros_like(want.cpu())))
                assert not bits(want)[(owners == -1).view(want.shape[:-2])].any()

    def check_readings(self) -> None:
        """All that can be read, of every layer, in each way."""
        p, everyone = self.plain, range(self.plain.batch_size)
        for layer in range(p.num_layers):
            longest = max(len(self.held(layer, b)) for b in everyone)
            everything = torch.arange(longest, device=self.device)
            owners = self.owners(layer, everything, everyone)
            self.check_reading(lambda c, layer=layer: c.get_valid_f32(layer), owners)  # type: ignore[misc]
            start, end = longest // 3, longest - longest // 4
            for name in ("get_range_f32", "get_range_raw"):
                self.check_reading(
                    lambda c, name=name, a=(layer, start, end): getattr(c, name)(*a),  # type: ignore[misc]
                    owners[:, start:end],
                )
            some = torch.randint(-3, longest + 3, (p.batch_size, 7), device=self.device)
            self.check_reading(lambda c, a=(layer, some): c.gather(*a), self.owners(layer, some, everyone))  # type: ignore[misc]

    # Answers

    def attend(self, layer: int, query: torch.Tensor, **options: Any) -> Answer:
        """The merged answer of all ranks; the whole cache is not asked."""
        return self._answer("attend", layer, query, **options)

    def append_attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> Answer:
        """The merged answer of all ranks. The whole cache does not append."""
        return self._answer("append_attend", layer, query, key, value, **options)

    def _answer(self, name: str, layer: int, query: torch.Tensor, *new: torch.Tensor, **options: Any) -> Answer:
        options["return_lse"] = True
        answers = self.on_shares(name, layer, query, *new, **options)
        for out, lse in answers:
            assert out.dtype == lse.dtype == torch.float32 and out.shape == query.shape
            assert not out[lse == -torch.inf].any()
        return self.merge(layer, answers, query.dtype, options.get("sequences"))

    def merge(self, layer: int, answers: list[Answer], dtype: torch.dtype, sequences: Any = None) -> Answer:
        """What merge_gathered makes of the ranks' answers: the same bits on each of them."""
        together = self.gathered(layer, answers)
        tag = torch.zeros(1, dtype=torch.int64, device=self.device)
        merged = []
        for share in self.shares:
            out = torch.full_like(answers[0][0], torch.nan, dtype=dtype)
            lse = torch.full_like(answers[0][1], torch.nan)
            failure = self.new_failure()
            share.native.merge_gathered(layer, together, out, lse, tag, sequences, failure)
            self.wait()
            assert int(failure) == 0
            merged.append((out, lse))
        for out, lse in merged[1:]:
            assert_same_bits(out, merged[0][0])
            assert_same_bits(lse, merged[0][1])
        return merged[0]

    def gathered(self, layer: int, answers: list[Answer], tags: Sequence[int] | None = None) -> torch.Tensor:
        """What a collective makes of them: FP32 `[ranks, floats]`, see merge_gathered in csrc/bindings/merge.h."""
        rows = []
        for share, (out, lse), tag in zip(self.shares, answers, tags or [0] * self.ranks, strict=True):
            numbers = torch.cat([share.tensors.state[:2, layer].reshape(-1), torch.tensor([tag], device=self.device)])
            floats = torch.cat([out.reshape(-1), lse.reshape(-1)])
            gap = torch.full((floats.numel() % 2,), torch.nan, device=self.device)
            rows.append(torch.cat([floats, gap, numbers.view(torch.float32)]))
        return torch.stack(rows)

    def new_failure(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class DealtPrompt(Prompt):
    """Attention over a text that is dealt out, against the model; what it leaves behind against a whole cache."""

    def __init__(self, backend: Backend, ranks: int, *, slots: int, **shape: Any) -> None:
        super().__init__(backend, slots=slots, **shape)
        self.dealt = Dealt(
            backend, ranks, num_layers=1, max_positions=slots, num_heads=self.model.heads,
            head_dim=self.model.head_dim, batch_size=self.model.batch, sink_positions=self.model.sinks,
            overflow=self.appended.overflow,
        )  # fmt: skip
        self.appended = self.dealt.plain

    def append_these(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None) -> DealtPrompt:
        self.dealt.call("append", 0, key, value, new_lengths=lengths)
        self._store(key, value, lengths, None)
        return self

    def truncate(self, rows: int) -> DealtPrompt:
        self.dealt.call("truncate", rows)
        for b in range(self.model.batch):
            self.model.truncate(b, rows)
        return self

    def check(self, got: Answer, query: torch.Tensor, want: Expected, options: dict[str, Any]) -> None:
        want.merged = True
        super().check(got, query, want, options)

    def attend(self, query: torch.Tensor, **options: Any) -> Answer:
        self.poison()
        want = self.expect_attend(query, **options)
        got = self.dealt.attend(0, query, **options)
        self.check(got, query, want, options)
        return got

    def append_attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Answer:
        self.poison()
        want = self.expect_append_attend(query, key, value, **options)
        got = self.dealt.append_attend(0, query, key, value, **options)
        self.check(got, query, want, options)
        self.append_instead(key, value, options.get("new_lengths"), options.get("sequences"))
        return got

    def poison(self, value: float = torch.nan) -> None:
        empty = self.unheld()
        for share in (*self.dealt.shares, self.appended):
            for storage in (share.k_cache, share.v_cache):
                storage[0][empty[:, share.rank :: share.ranks]] = value

    def check_contents(self) -> None:
        self.dealt.check()
        assert self.appended.lengths() == [self.model.held(0, b) for b in range(self.model.batch)]

    def check_both(self, rows: int, group: int = 1, **options: Any) -> None:
        """attend, then append_attend, of new random queries and positions."""
        new = self.new(rows, group)
        self.attend(new[0], **{name: x for name, x in options.items() if name != "new_lengths"})
        self.append_attend(*new, **options)
