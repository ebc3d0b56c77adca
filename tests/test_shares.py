"""A text that is dealt out to several caches: what each stores and reads, bit for bit a share of one cache's.

Attention over shares: test_shares_attention.py. Merging: test_merging.py. Ranks that are processes: test_sharded.py.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import Backend, make_cache
from shares import RANKS, Dealt

from kvcache_ext._extension import extension

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int64, torch.int32)


def numbers(dealt: Dealt, *values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=dealt.device)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append(backend: Backend, ranks: int, sinks: int, dtype: torch.dtype) -> None:
    """One position and several, up to the ring's end, around it, and more of them than the ring has slots."""
    dealt = Dealt(backend, ranks, sink_positions=sinks * ranks, batch_size=2)
    dealt.check_readings()
    for rows in (1, 1, 2, ranks, 5, 1, 7 * ranks, 1, 3, 20 * ranks + 1, 0, 2):
        dealt.call("append", 0, dealt.randn(rows, dtype=dtype), dealt.randn(rows, dtype=dtype))
        dealt.check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_left_padding(backend: Backend, ranks: int, index_dtype: torch.dtype) -> None:
    dealt = Dealt(backend, ranks, sink_positions=ranks, batch_size=4)
    for rows, lengths in ((5, (0, 1, 5, 3)), (1, (1, 0, 1, 0)), (9, (9, -2, 100, 4)), (40, (40, 39, 1, 0))):
        new = numbers(dealt, *lengths, dtype=index_dtype)
        dealt.call("append", 1, dealt.randn(rows), dealt.randn(rows), new_lengths=new)
        dealt.check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
def test_of_some_sequences(backend: Backend, ranks: int) -> None:
    """As a list, or as a tensor, some of whose numbers belong to no sequence."""
    dealt = Dealt(backend, ranks, sink_positions=ranks, batch_size=4)
    choices: list[Any] = [[2], [3, 0], [], *(numbers(dealt, 1, -1, 3, 9, dtype=dtype) for dtype in INDEX_DTYPES)]
    for sequences in choices:
        count = len(sequences)
        for rows in (1, 4, 11 * ranks):
            dealt.call("append", 0, dealt.randn(rows, count), dealt.randn(rows, count), sequences=sequences)
            new = numbers(dealt, *(rows - i for i in range(count)))
            dealt.call(
                "append", 1, dealt.randn(rows, count), dealt.randn(rows, count), new_lengths=new, sequences=sequences
            )
            dealt.check()
        some = torch.randint(-2, 8 * ranks, (count, 9), device=dealt.device)
        owners = dealt.owners(0, some, [int(b) for b in sequences])
        dealt.check_reading(lambda c, a=(0, some), s=sequences: c.gather(*a, sequences=s), owners)  # type: ignore[misc]
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
def test_append_all(backend: Backend, ranks: int) -> None:
    dealt = Dealt(backend, ranks, sink_positions=ranks, batch_size=2, num_layers=3)
    dealt.append(3, layer=1)  # layers of other lengths
    for rows in (1, 4, 9 * ranks, 1):
        keys, values = torch.randn(2, 3, 2, rows, 2, 8, device=dealt.device)
        dealt.call("append_all", keys, values)
        dealt.call("append_all", keys[:, :1], values[:, :1], sequences=[1])
        dealt.call("append_all", values, keys, new_lengths=numbers(dealt, 1, rows - 1))
        dealt.check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 7), (1, 1), (2, 80), (1, 512)])
def test_row_shapes(backend: Backend, ranks: int, heads: int, head_dim: int) -> None:
    dealt = Dealt(backend, ranks, sink_positions=ranks, num_heads=heads, head_dim=head_dim)
    for rows in (1, 3, 8 * ranks):
        dealt.append(rows).check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
def test_strided_rows(backend: Backend, ranks: int) -> None:
    dealt = Dealt(backend, ranks, batch_size=2)
    for rows in (1, 5, 7 * ranks):
        wide = torch.randn(2, rows + 1, 2, 3, 11, device=dealt.device)
        spaced = wide[:, 1:, :, 1, 1:9]
        of_heads = torch.randn(2, 2, rows, 8, device=dealt.device).transpose(1, 2)
        dealt.call("append", 0, spaced, of_heads)
        dealt.call("append", 1, of_heads, torch.randn(2, 1, 2, 8, device=dealt.device).expand(2, rows, 2, 8))
        dealt.check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_overflows_are_counted_where_they_are_stored(backend: Backend, ranks: int, overflow: str) -> None:
    """Their sum is one cache's, also of rows that the same call overwrites."""
    dealt = Dealt(backend, ranks, sink_positions=ranks, overflow=overflow)
    for rows in (1, 2, ranks + 1, 15 * ranks):
        dealt.call("append", 0, 5e4 * dealt.randn(rows), 5e4 * dealt.randn(rows))
        dealt.check()
    assert dealt.plain.overflow_counts()[0] > 0
    dealt.check_readings()
    dealt.call("clear")
    dealt.check()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("sinks", "appended"), [(0, 4), (1, 30)])
def test_shortening(backend: Backend, ranks: int, sinks: int, appended: int) -> None:
    """truncate, drop_newest and reset, with every kind of argument; positions appended behind what is left."""
    dealt = Dealt(backend, ranks, sink_positions=sinks * ranks, batch_size=3)

    def fill() -> None:
        dealt.call("clear")
        for layer in range(2):
            dealt.append([appended, appended - 1, appended // 2], layer)

    fill()
    short = min(dealt.plain.lengths())
    shortenings: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        *((name, (n,), {}) for name in ("truncate", "drop_newest") for n in (0, 1, short // 2, short)),
        *((name, ([1, 0, short],), {}) for name in ("truncate", "drop_newest")),
        *((name, (numbers(dealt, 99, -4, 2),), {}) for name in ("truncate", "drop_newest")),
        *((name, (1,), {"sequences": [2, 0]}) for name in ("truncate", "drop_newest")),
        *(
            (name, (numbers(dealt, 1, 2, 3),), {"sequences": numbers(dealt, 2, 7, 1)})
            for name in ("truncate", "drop_newest")
        ),
        ("reset", (), {}),
        ("reset", ([1],), {}),
        ("reset", (numbers(dealt, 2, -1, dtype=torch.int32),), {}),
    ]
    for name, arguments, options in shortenings:
        fill()
        dealt.call(name, *arguments, **options)
        dealt.check()
        dealt.check_readings()
        dealt.append(2).append(1).check()
    dealt.append(9 * ranks).check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("sinks", [0, 1])
def test_moves_of_sequences(backend: Backend, ranks: int, sinks: int) -> None:
    dealt = Dealt(backend, ranks, sink_positions=sinks * ranks, batch_size=4)
    for layer in range(2):
        dealt.append([0, 3, 5 * ranks, 9 * ranks + 1], layer)
    moves: list[tuple[str, tuple[Any, ...]]] = [
        ("reorder", ([3, 2, 1, 0],)),
        ("reorder", (numbers(dealt, 1, 1, 9, 0, dtype=torch.int32),)),
        ("copy_sequence", (2, [0, 3])),
        ("copy_sequence", ([1, 0], [0, 1])),
        ("copy_sequence", (numbers(dealt, 0, -1, 3), numbers(dealt, 1, 2, 0))),
    ]
    for name, arguments in moves:
        dealt.call(name, *arguments)
        dealt.check()
        dealt.append([1, 2, 0, ranks], 1).check()
    dealt.check_readings()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("source_slots", [2, 6, 9])
@pytest.mark.parametrize("appended", [1, 5, 40])
def test_copies_from_another_cache(backend: Backend, ranks: int, source_slots: int, appended: int) -> None:
    """Whose ring is smaller, as large, or larger, and wrapped or not."""
    dealt = Dealt(backend, ranks, sink_positions=ranks, batch_size=3)
    source = Dealt(backend, ranks, sink_positions=ranks, batch_size=2, max_positions=source_slots * ranks)
    for layer in range(2):
        source.append([appended, appended // 2], layer)
        dealt.append([1, 8 * ranks, 3], layer)
    dealt.call("append", 0, dealt.randn(1), dealt.randn(1))
    for src, dst in (
        ([0, 1], [2, 0]),
        (0, 1),
        (numbers(dealt, 1, 5, 0), numbers(dealt, 1, 2, 9)),
    ):
        dealt.plain.copy_sequence(src, dst, source=source.plain)
        for share, of in zip(dealt.shares, source.shares, strict=True):
            share.copy_sequence(src, dst, source=of)
        dealt.check()
        dealt.append(2).check()
    dealt.check_readings()
    source.check()


def test_copies_between_other_shares_are_refused(backend: Backend) -> None:
    two, three = Dealt(backend, 2, max_positions=12), Dealt(backend, 3, max_positions=12)
    with pytest.raises(ValueError, match="source must have the cache's ranks, 2, got 3"):
        two.shares[0].copy_sequence(0, 0, source=three.shares[0])
    with pytest.raises(ValueError, match="source must have the cache's rank, 0, got 1"):
        two.shares[0].copy_sequence(0, 0, source=two.shares[1])
    with pytest.raises(ValueError, match="source must have the cache's ranks, 1, got 2"):
        two.plain.copy_sequence(0, 0, source=two.shares[0])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(backend: Backend, ranks: int, dtype: torch.dtype) -> None:
    """In every dtype, of one list of indices or one for each sequence, into tensors of any strides."""
    dealt = Dealt(backend, ranks, sink_positions=ranks, batch_size=2).append([4, 9 * ranks + 1])
    everyone = range(2)
    for indices in (
        torch.randint(-3, 7 * ranks, (2, 11), device=dealt.device),
        torch.randint(-3, 7 * ranks, (11,), device=dealt.device),
        torch.tensor([-1, 2**40, 0, -(2**40)], device=dealt.device),
        torch.empty(0, dtype=torch.int64, device=dealt.device),
    ):
        owners = dealt.owners(0, indices, everyone)
        dealt.check_reading(lambda c, i=indices: c.gather(0, i, dtype=dtype), owners)  # type: ignore[misc]

        def into(c: Any, i: torch.Tensor = indices) -> tuple[torch.Tensor, ...]:
            wide = torch.full((2, 2, 2, i.shape[-1], 11), torch.nan, dtype=dtype, device=dealt.device)
            outs = tuple(of[..., 2:10].transpose(1, 2) for of in wide)
            c.gather(0, i, dtype=dtype, out=outs)
            assert wide[..., :2].isnan().all() and wide[..., 10:].isnan().all()
            return outs

        dealt.check_reading(into, owners)


@pytest.mark.parametrize("ranks", RANKS)
def test_raw_ranges_are_copies(backend: Backend, ranks: int) -> None:
    dealt = Dealt(backend, ranks).append(4)
    for share in dealt.shares:
        keys, values = share.get_range_raw(0, 0, 3)
        keys.zero_(), values.zero_()
    dealt.check()


def test_more_positions_than_32_bits(backend: Backend) -> None:
    """Numbers of positions are of 64 bits."""
    dealt = Dealt(backend, 3, sink_positions=3)
    dealt.append(4)
    for cache in (dealt.plain, *dealt.shares):
        cache.tensors.state[0] = 3 * 2**40 + 1
        cache.tensors.state[1] = 3 * 2**40 - 2
    for rows in (1, 4, 30):
        dealt.call("append", 0, dealt.randn(rows), dealt.randn(rows), new_lengths=numbers(dealt, rows))
        for share in dealt.shares:
            assert torch.equal(share.tensors.state, dealt.plain.tensors.state)
            assert share.position == dealt.plain.position
    dealt.check()
    dealt.check_readings()


def test_a_rank_that_is_none(backend: Backend) -> None:
    tensors = make_cache(backend).tensors
    for ranks, rank in ((2, 2), (2, -1), (1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be from 0 to {ranks - 1}, got {rank}"):
            extension.Cache(*tensors, ranks, rank)


class Walk:
    """Random calls on a text that is dealt out."""

    def __init__(self, backend: Backend, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        r = self.random
        ranks, layers, batch = r.choice((2, 3, 4, 5, 8)), r.choice((1, 2, 3)), r.choice((1, 2, 3))
        sinks = ranks * r.choice((0, 0, 1, 2))
        self.dealt = Dealt(
            backend, ranks, num_layers=layers, batch_size=batch, sink_positions=sinks,
            max_positions=sinks + ranks * r.randint(1, 7), num_heads=r.choice((1, 2, 3)),
            head_dim=r.choice((1, 5, 8, 16)), overflow=r.choice(("saturate", "inf")),
        )  # fmt: skip

    def chosen(self) -> Any:
        """Some sequences, or none given; as a list or as a tensor."""
        batch = self.dealt.plain.batch_size
        if self.random.random() < 0.6:
            return None
        some = self.random.sample(range(batch), self.random.randint(1, batch))
        if self.random.random() < 0.5:
            return some
        if self.random.random() < 0.3:
            some[0] = self.random.choice((-1, batch, 2**31 - 1))
        return numbers(self.dealt, *some)

    def append(self) -> None:
        d, r = self.dealt, self.random
        sequences = self.chosen()
        count = d.plain.batch_size if sequences is None else len(sequences)
        rows = r.choice((1, 1, 2, 3, r.randint(1, 3 * d.plain.max_positions)))
        shape = (count, rows, d.plain.num_heads, d.plain.head_dim)
        dtype = r.choice(DTYPES)
        every_layer = r.random() < 0.3
        if every_layer:
            shape = (d.plain.num_layers, *shape)
        new = [(torch.randn(shape) * r.choice((1, 3e4))).to(dtype).to(d.device) for _ in range(2)]
        lengths = None
        if r.random() < 0.4:
            lengths = numbers(d, *(r.randint(-1, rows + 1) for _ in range(count)), dtype=r.choice(INDEX_DTYPES))
        if every_layer:
            d.call("append_all", *new, new_lengths=lengths, sequences=sequences)
        else:
            layer = r.randrange(d.plain.num_layers)
            d.call("append", layer, *new, new_lengths=lengths, sequences=sequences)

    def shorten(self) -> None:
        d, r = self.dealt, self.random
        sequences = self.chosen()
        name = r.choice(("truncate", "drop_newest", "reset"))
        if name == "reset":
            d.call("reset", sequences)
            return
        count = d.plain.batch_size if sequences is None else len(sequences)
        n = numbers(d, *(r.randint(-1, d.plain.max_positions + 1) for _ in range(count)))
        d.call(name, r.randint(0, len(d.plain)) if r.random() < 0.5 else n, sequences=sequences)

    def move(self) -> None:
        d, r = self.dealt, self.random
        batch = d.plain.batch_size
        d.call("reorder", [r.randrange(batch) for _ in range(batch)])

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice((self.append, self.append, self.append, self.shorten, self.move))()
            self.dealt.check()
        self.dealt.check_readings()


@pytest.mark.parametrize("seed", range(8))
def test_random_walks(backend: Backend, seed: int) -> None:
    for number in range(2 if backend.slow else 12):
        Walk(backend, 100 * seed + number).run(8 if backend.slow else 15)
