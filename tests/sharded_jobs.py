"""What each process of test_sharded.py runs: jobs on a `ShardedKVCacheFp16`, each beside one cache of the whole text.

A job is a method of `Rank`; every rank runs the same ones, in the same order. What it raised is left in the folder as
`RANK.json`. After a job that failed on some ranks but not on all, whose calls no longer match, no more are run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits, poison

from kvcache_ext import StreamingKVCacheFp16, memory
from kvcache_ext.distributed import ShardedKVCacheFp16

SECONDS = 30  # for a collective of the tests themselves
LIMIT = 2.0  # seconds, where a rank is missing
SHAPE = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "batch_size": 3}


@dataclass(frozen=True)
class Config:
    backend: str  # of torch.distributed
    ranks: int
    exchange: str

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.exchange}-{self.ranks}"

    def jobs(self) -> list[str]:
        """`a_rank_that_ended` is the last: after it there is nobody to work with."""
        names = [name for name, value in vars(Rank).items() if getattr(value, "is_job", False) and value.serves(self)]
        return [*(name for name in names if name != LAST), *(name for name in names if name == LAST)]


LAST = "a_rank_that_ended"


def job(serves: Callable[[Config], bool] = lambda config: True) -> Callable[[Any], Any]:
    def mark(method: Any) -> Any:
        method.is_job, method.serves = True, serves
        return method

    return mark


def on_gpus(config: Config) -> bool:
    return config.backend == "nccl"


def notices_missing_ranks(config: Config) -> bool:
    """NCCL's watchdog would end the process."""
    return config.backend == "gloo" or config.exchange == "symmetric"


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """FP32 of about 1, from two kernels or in two orders. (test_shares_attention.py has the bounds.)"""
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


class Rank:
    def __init__(self, rank: int, config: Config, folder: Path) -> None:
        self.rank, self.config, self.folder = rank, config, folder
        self.ranks = config.ranks
        self.device = torch.device("cuda", rank) if config.backend == "nccl" else torch.device("cpu")

    # Caches and tensors

    def sharded(self, **arguments: Any) -> ShardedKVCacheFp16:
        ranks = arguments["group"].size() if arguments.get("group") is not None else self.ranks
        shape = SHAPE | {"max_positions": 6 * ranks, "exchange": self.config.exchange, "timeout": 20.0}
        cache = ShardedKVCacheFp16(**shape | {"device": self.device} | arguments)  # type: ignore[arg-type]
        poison(cache)
        return cache

    def plain(self, like: ShardedKVCacheFp16) -> StreamingKVCacheFp16:
        cache = StreamingKVCacheFp16(
            like.num_layers, like.max_positions, like.num_heads, like.head_dim, batch_size=like.batch_size,
            device=like.device, sink_positions=like.sink_positions, overflow=like.overflow,
        )  # fmt: skip
        poison(cache)
        return cache

    def pair(self, **arguments: Any) -> Pair:
        cache = self.sharded(**arguments)
        return Pair(self, cache, self.plain(cache))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same on every rank."""
        return torch.randn(shape).to(dtype).to(self.device)

    def numbers(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def own_group(self) -> Any:
        """A group of all ranks for one job alone: after an error of its collectives it is of no more use."""
        return dist.new_group(list(range(self.ranks)), timeout=timedelta(seconds=SECONDS))

    def of_all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def raises(self, error: type[Exception], *words: str) -> Iterator[None]:
        """One sentence with these words in it."""
        with pytest.raises(error) as raised:
            yield
        for word in words:
            assert word in str(raised.value), str(raised.value)
        assert "\n" not in str(raised.value)

    # Calls

    @job()
    def storing(self) -> None:
        for sinks in (0, self.ranks):
            p = self.pair(sink_positions=sinks)
            new = [self.randn(2, 3, 7, 2, 16) for _ in range(2)]
            new[0][0, 0, 0, 0, 0] = -0.0
            p.call("append", 0, new[0][0], new[1][0]).check()
            p.call("append", 1, new[0][1] * 3e4, new[1][1], new_lengths=self.numbers(0, 7, 2)).check()
            p.call("append_all", *new).check()
            p.call("append_all", *new, new_lengths=self.numbers(5, -1, 1)).check()
            p.call("append", 0, new[0][0, :2], new[1][0, :2], sequences=[2, 0]).check()
            p.call("append", 0, new[0][0], new[1][0], sequences=self.numbers(1, -1, 9)).check()
            p.call("truncate", 3).check()
            p.call("append_all", *new).check()
            p.call("drop_newest", [1, 0, 2]).check()
            p.call("truncate", self.numbers(2, 4), sequences=[1, 2]).check()
            p.call("reorder", [2, 2, 1]).check()
            p.call("append_all", *new).check()
            p.call("copy_sequence", 0, 2).check()
            p.call("reset", [1]).check()
            assert p.cache.overflow_counts()[1] > 0
            p.call("clear").check()
            assert p.cache.is_empty() and p.cache.position == 0

    @job()
    def copies_from_another_cache(self) -> None:
        source, p = (
            self.pair(max_positions=9 * self.ranks, sink_positions=self.ranks),
            self.pair(sink_positions=self.ranks),
        )
        new = [self.randn(2, 3, 8 * self.ranks, 2, 16) for _ in range(2)]
        source.call("append_all", *new)
        p.cache.copy_sequence([0, 2], [1, 0], source=source.cache)
        p.whole.copy_sequence([0, 2], [1, 0], source=source.whole)
        p.check()
        with self.raises(ValueError, "copy_sequence: source must have the cache's ranks"):
            p.cache.copy_sequence(0, 0, source=source.whole)
        with self.raises(ValueError, "copy_sequence: source must have the cache's ranks"):
            p.whole.copy_sequence(0, 0, source=source.cache)

    @job()
    def attention(self) -> None:
        p = self.pair(sink_positions=self.ranks, max_positions=40 * self.ranks)
        for rows in (1, 1, 3, 16, 40, 1, 70):
            for group in (1, 4):
                query, key, value = (
                    self.randn(3, rows, 2 * group, 16),
                    self.randn(3, rows, 2, 16),
                    self.randn(3, rows, 2, 16),
                )
                p.attention("append_attend", 0, query, key, value)
                p.attention("attend", 0, query, window=5)
                p.attention("attend", 0, query, softcap=3.0, scale=0.2, precision="fp16")
                p.attention("append_attend", 1, query, key, value, new_lengths=self.numbers(rows, 0, rows // 2))
                p.attention("attend", 1, query[:2], sequences=[2, 0])
                p.attention("append_attend", 0, query, key, value, sequences=self.numbers(1, -1, 0))
                for dtype in (torch.float16, torch.bfloat16):
                    p.attention("append_attend", 1, query.to(dtype), key.to(dtype), value.to(dtype), window=3)
        p.check()
        p.attention("attend", 0, self.randn(3, 0, 4, 16))
        p.call("clear")
        p.attention("attend", 0, self.randn(3, 2, 4, 16))

    @job()
    def outputs_and_short_forms(self) -> None:
        p = self.pair(batch_size=1)
        for shape in ((1, 3, 4, 16), (3, 4, 16), (4, 16), (64,)):
            query = self.randn(*shape)
            rows = (*shape[:-2], 2, 16) if len(shape) > 1 else (32,)
            key, value = self.randn(*rows), self.randn(*rows)
            wide = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, device=self.device)
            out = wide[..., :-3]
            got = p.cache.append_attend(0, query, key, value, out=out)
            close(out, p.whole.append_attend(0, query, key, value))
            assert got is out and wide[..., -3:].isnan().all()
            got, lse = p.cache.attend(0, query, out=torch.empty_like(query), return_lse=True)  # type: ignore[misc]
            want, want_lse = p.whole.attend(0, query, return_lse=True)  # type: ignore[misc]
            assert lse.shape == want_lse.shape
            close(got, want)
            close(lse, want_lse)
        p.check()

    @job()
    def reading(self) -> None:
        p = self.pair(sink_positions=self.ranks, overflow="inf")
        assert p.cache.overflow == "inf"
        for rows in (2, 3 * self.ranks, 6 * self.ranks):
            p.call("append_all", self.randn(2, 3, rows, 2, 16) * 2e4, self.randn(2, 3, rows, 2, 16))
            p.call("append", 1, self.randn(1, 1, 2, 16), self.randn(1, 1, 2, 16), sequences=[1])
            p.check()
            indices = torch.randint(-2, 6 * self.ranks + 2, (3, 9)).to(self.device)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                p.reading("gather", 0, indices, dtype=dtype)
                p.reading("gather", 1, indices[:2], dtype=dtype, sequences=[2, 0])
                p.reading("gather", 1, indices[0], dtype=dtype, sequences=self.numbers(1, 7))
            longest = int(p.whole.device_lengths()[1].max())
            p.reading("get_range_f32", 1, 1, longest)
            p.reading("get_range_raw", 1, longest // 2, longest)
            p.reading("get_range_raw", 1, 1, 1)
            for make in (torch.empty, torch.ones):
                wide = [make(2, 9, 3, 19, device=self.device)[..., 1:17].transpose(0, 1)[:, None] for _ in range(2)]
                outs = tuple(of.expand(9, 1, 2, 3, 16)[:, 0].permute(2, 0, 1, 3) for of in wide)
                got = p.cache.gather(0, indices, out=outs)
                for mine, theirs in zip(got, p.whole.gather(0, indices), strict=True):
                    assert_same_bits(mine, theirs)
                assert got[0] is outs[0]
            out = tuple(torch.empty(3, longest, 2, 16, device=self.device) for _ in range(2))
            for mine, theirs in zip(p.cache.get_valid_f32(1, out=out), p.whole.get_valid_f32(1), strict=True):
                assert_same_bits(mine, theirs)

    @job()
    def figures(self) -> None:
        p = self.pair(sink_positions=self.ranks)
        cache = p.cache
        assert (cache.ranks, cache.rank, cache.exchange) == (self.ranks, self.rank, self.config.exchange)
        assert cache.max_positions == 6 * self.ranks
        assert cache.memory_bytes() * self.ranks == p.whole.memory_bytes()
        assert cache.memory_bytes() == cache.k_cache.nbytes + cache.v_cache.nbytes
        assert repr(cache) == (
            f"ShardedKVCacheFp16(num_layers=2, max_positions={6 * self.ranks}, num_heads=2, head_dim=16, batch_size=3, "
            f"device='{self.device}', sink_positions={self.ranks}, overflow='saturate', rank={self.rank} of "
            f"{self.ranks}, exchange='{self.config.exchange}')"
        )
        cache.check()
        cache.synchronize()

    # Files

    def filled(self, **arguments: Any) -> Pair:
        p = self.pair(**{"sink_positions": self.ranks, "max_positions": 10 * self.ranks} | arguments)
        rows = 9 * self.ranks + 2
        p.call("append_all", self.randn(2, 3, rows, 2, 16) * 3e4, self.randn(2, 3, rows, 2, 16))
        p.call("append", 0, self.randn(3, 4, 2, 16), self.randn(3, 4, 2, 16), new_lengths=self.numbers(1, 0, 4))
        return p

    def path(self, name: str) -> Path:
        return self.folder / name

    @job()
    def saving(self) -> None:
        """The file is that of one cache, to the byte; any number of ranks can load it, and one cache can."""
        p = self.filled()
        seen: list[tuple[int, int]] = []
        p.cache.save(self.path("all"), progress=lambda done, of: seen.append((done, of)))
        assert bool(seen) == (self.rank == 0) and all(a <= b for a, b in seen)
        p.cache.save(self.path("some"), sequences=[2, 0])
        if self.rank == 0:
            p.whole.save(self.path("whole"))
            p.whole.save(self.path("some of whole"), sequences=self.numbers(2, 0))
        dist.barrier()
        for mine, theirs in (("all", "whole"), ("some", "some of whole")):
            assert self.path(mine).read_bytes() == self.path(theirs).read_bytes()
        one = dist.new_group([self.rank], use_local_synchronization=True)
        for path in (self.path("all"), self.path("whole")):
            again = self.load(path)
            assert again.max_positions == p.cache.max_positions and again.exchange == self.config.exchange
            Pair(self, again, p.whole).check()
            for options in ({"max_positions": 4 * self.ranks}, {"max_positions": 30 * self.ranks}):
                whole = StreamingKVCacheFp16.load(path, device=self.device, **options)
                Pair(self, self.load(path, **options), whole).check()
                alone = self.load(path, group=one, **options)
                assert alone.ranks == 1
                Pair(self, alone, whole).check()
        loaded = Pair(self, self.load(path), StreamingKVCacheFp16.load(path, device=self.device))
        query, key, value = self.randn(3, 2, 4, 16), self.randn(3, 2, 2, 16), self.randn(3, 2, 2, 16)
        loaded.attention("append_attend", 1, query, key, value)
        loaded.check()

    def load(self, path: Path, **options: Any) -> ShardedKVCacheFp16:
        return ShardedKVCacheFp16.load(path, device=self.device, **{"exchange": self.config.exchange} | options)

    @job()
    def loading_sequences(self) -> None:
        """Into a smaller ring and a larger one, from a file of either class."""
        p = self.filled()
        p.cache.save(self.path("sequences"), sequences=[0, 2])
        for slots in (5, 30):
            other = self.pair(sink_positions=self.ranks, max_positions=slots * self.ranks)
            other.call("append_all", self.randn(2, 3, 4, 2, 16), self.randn(2, 3, 4, 2, 16))
            other.call("load_sequences", self.path("sequences"), [1, 0]).check()
        with self.raises(ValueError, "load_sequences", "sink_positions"):
            self.sharded().load_sequences(self.path("sequences"), [1, 0])

    @job()
    def a_positions_file_of_other_ranks(self) -> None:
        """Slots are rounded up to a multiple of the ranks; sinks cannot be."""
        whole = StreamingKVCacheFp16(2, 4 * self.ranks + 1, 2, 16, batch_size=3, device=self.device)
        whole.append_all(self.randn(2, 3, 6 * self.ranks, 2, 16), self.randn(2, 3, 6 * self.ranks, 2, 16))
        path = self.path(f"odd {self.rank}")  # each rank its own, of the same bytes
        whole.save(path)
        cache = self.load(path)
        assert cache.max_positions == 5 * self.ranks
        for mine, theirs in zip(cache.get_valid_f32(1), whole.get_valid_f32(1), strict=True):
            assert_same_bits(mine, theirs)
        with self.raises(ValueError, f"max_positions must be a multiple of the group's {self.ranks} ranks, got"):
            self.load(path, max_positions=self.ranks + 1)
        with_sink = StreamingKVCacheFp16(1, 8, 1, 8, device=self.device, sink_positions=1)
        with_sink.save(path)
        with self.raises(ValueError, f"sink_positions must be a multiple of the group's {self.ranks} ranks, got 1"):
            self.load(path)

    @job()
    def files_that_fail(self) -> None:
        """Every rank raises, and the cache goes on."""
        p = self.filled()
        nowhere = self.path("no such folder") / "file"
        if self.rank == 0:
            with pytest.raises(OSError, match="save"):
                p.cache.save(nowhere)
        else:
            with self.raises(RuntimeError, "save: rank 0 could not write the file", "no such folder"):
                p.cache.save(nowhere)

        def stop(done: int, of: int) -> None:
            raise KeyError("enough")

        with pytest.raises(KeyError if self.rank == 0 else RuntimeError, match="enough"):
            p.cache.save(self.path("stopped"), progress=stop)
        assert not self.path("stopped").exists()
        with pytest.raises(TypeError if self.rank == 0 else RuntimeError, match="path"):
            p.cache.save(7)  # type: ignore[arg-type]
        with pytest.raises((ValueError, IndexError), match="sequences"):
            p.cache.save(self.path("never"), sequences=[0, 0])
        p.cache.save(self.path("good"))
        dist.barrier()
        if self.rank == 0:
            data = bytearray(self.path("good").read_bytes())
            data[-5] ^= 1
            self.path("damaged").write_bytes(data)
            self.path("short").write_bytes(data[:-7])
        dist.barrier()
        for read in (lambda path: self.load(path), lambda path: p.cache.load_sequences(path, [0, 1, 2])):
            with pytest.raises(FileNotFoundError):
                read(self.path("missing"))
            for name in ("damaged", "short"):
                with pytest.raises(ValueError, match=name):
                    read(self.path(name))
            last = self.rank == self.ranks - 1
            shutil.copy(self.path("damaged" if last else "good"), self.path(f"one bad {self.rank}"))
            words = "one bad" if last else "another rank could not read the file"
            with pytest.raises(ValueError if last else RuntimeError, match=words):
                read(self.path(f"one bad {self.rank}"))

        def stop_one(done: int, of: int) -> None:
            if self.rank == self.ranks - 1:
                raise KeyError("enough")

        words = "enough" if last else "another rank could not read the file"
        for load in (
            lambda: self.load(self.path("good"), progress=stop_one),
            lambda: p.cache.load_sequences(self.path("good"), [0, 1, 2], progress=stop_one),
        ):
            with pytest.raises(KeyError if last else RuntimeError, match=words):
                load()
        p.call("reset")
        p.call("append_all", self.randn(2, 3, 4, 2, 16), self.randn(2, 3, 4, 2, 16))
        p.check()

    # Arguments

    @job()
    def wrong_construction(self) -> None:
        """On all ranks alike: each raises by itself."""
        ranks = self.ranks
        wrong: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
            ({"max_positions": ranks + 1}, ValueError, ["max_positions", f"{ranks} ranks", f"got {ranks + 1}"]),
            ({"max_positions": 0}, ValueError, ["max_positions", "0"]),
            ({"max_positions": "8"}, TypeError, ["max_positions", "str"]),
            ({"sink_positions": 1}, ValueError, ["sink_positions", f"{ranks} ranks", "got 1"]),
            ({"sink_positions": -ranks}, ValueError, ["sink_positions", str(-ranks)]),
            ({"sink_positions": 6 * ranks}, ValueError, ["sink_positions", "max_positions"]),
            ({"num_layers": 0}, ValueError, ["num_layers", "0"]),
            ({"num_heads": 1.0}, TypeError, ["num_heads", "float"]),
            ({"head_dim": None}, TypeError, ["head_dim", "NoneType"]),
            ({"batch_size": True}, TypeError, ["batch_size", "bool"]),
            ({"overflow": "x"}, ValueError, ["overflow", "saturate", "x"]),
            ({"device": "meta"}, ValueError, ["device", "meta"]),
            ({"exchange": "x"}, ValueError, ["exchange", "auto, symmetric, gather", "'x'"]),
            ({"exchange": None}, ValueError, ["exchange", "None"]),
            ({"exchange": ["auto"]}, ValueError, ["exchange"]),
            ({"timeout": 0}, ValueError, ["timeout", "positive", "0"]),
            ({"timeout": -1.5}, ValueError, ["timeout", "-1.5"]),
            ({"timeout": float("nan")}, ValueError, ["timeout", "nan"]),
            ({"timeout": float("inf")}, ValueError, ["timeout", "inf"]),
            ({"timeout": "1"}, ValueError, ["timeout", "'1'"]),
            ({"timeout": True}, ValueError, ["timeout", "True"]),
            ({"max_positions": 2**40 * ranks}, MemoryError, ["GB"]),
        ]
        for arguments, error, words in wrong:
            with self.raises(error, *words):
                self.sharded(**arguments)
        for group in ("x", 1, dist.GroupMember.NON_GROUP_MEMBER):
            with self.raises(ValueError, "ShardedKVCacheFp16: group must be a process group of this process, got"):
                ShardedKVCacheFp16(1, ranks, 1, 8, device=self.device, group=group)
        if self.config.backend == "gloo":
            with self.raises(
                RuntimeError, "exchange='symmetric' is not possible on every rank: it needs GPUs of one host"
            ):
                self.sharded(exchange="symmetric")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVCACHE_EXT_EXCHANGE", "x")
            with self.raises(ValueError, "KVCACHE_EXT_EXCHANGE must be one of auto, symmetric, gather, got 'x'"):
                self.sharded(exchange="auto")
            patch.setenv("KVCACHE_EXT_EXCHANGE", "gather")
            assert self.sharded(exchange="auto").exchange == "gather"
            assert self.sharded(exchange=self.config.exchange).exchange == self.config.exchange
        assert self.sharded(exchange="auto").exchange == ("symmetric" if on_gpus(self.config) else "gather")

    @job()
    def construction_that_fails_on_one_rank(self) -> None:
        for name, value in (
            ("num_layers", 3), ("max_positions", 9 * self.ranks), ("num_heads", 1), ("head_dim", 8),
            ("batch_size", 2), ("sink_positions", self.ranks),
        ):  # fmt: skip
            with self.raises(RuntimeError, "all ranks must pass the same arguments", f"rank {self.rank} passed"):
                self.sharded(**{name: value} if self.rank == 1 else {})
        with pytest.MonkeyPatch.context() as patch:

            def check_fits(planned: Any) -> None:
                raise MemoryError("it does not fit here")

            if self.rank == 1:
                patch.setattr(memory, "check_fits", check_fits)
            words = "it does not fit here" if self.rank == 1 else "share of another rank could not be allocated"
            with self.raises(MemoryError, words):
                self.sharded()

    @job()
    def wrong_calls(self) -> None:
        """On all ranks alike: the cache stays as it is, and goes on."""
        p = self.pair()
        p.call("append_all", self.randn(2, 3, 4, 2, 16), self.randn(2, 3, 4, 2, 16))
        q, k, v = self.randn(3, 1, 4, 16), self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
        c = p.cache
        for error, words, call in (
            (ValueError, ["out", "[3, 1, 4, 16]", "got [3, 1, 2, 16]"], lambda: c.append_attend(0, q, k, v, out=k + 1)),
            (TypeError, ["out", "float32", "float16"], lambda: c.append_attend(0, q, k, v, out=q.half())),
            (TypeError, ["out", "list"], lambda: c.append_attend(0, q, k, v, out=[1.0])),
            (ValueError, ["out", "query"], lambda: c.append_attend(0, q, k, v, out=q)),
            (ValueError, ["out", "expanded"], lambda: c.attend(0, q, out=q[:1].clone().expand_as(q))),
            (ValueError, ["out", "share memory with key"], lambda: c.append_attend(0, k + 1, k, v, out=k)),
            (TypeError, ["return_lse", "int"], lambda: c.append_attend(0, q, k, v, return_lse=1)),
            (ValueError, ["precision"], lambda: c.append_attend(0, q, k, v, precision="fp8")),
            (IndexError, ["layer"], lambda: c.append_attend(2, q, k, v)),
            (ValueError, ["window"], lambda: c.append_attend(0, q, k, v, window=0)),
            (ValueError, ["query"], lambda: c.attend(0, q[..., :8])),
            (TypeError, ["query", "list"], lambda: c.attend(0, [1.0], out=q)),
            (ValueError, ["sequences"], lambda: c.attend(0, q, sequences=[0, 1, 1])),
            (IndexError, ["end"], lambda: c.get_range_f32(0, 0, 99)),
            (IndexError, ["layer"], lambda: c.get_valid_f32(7)),
            (TypeError, ["indices"], lambda: c.gather(0, [1])),
        ):  # fmt: skip
            with self.raises(error, *words):  # type: ignore[arg-type]
                call()  # type: ignore[operator]
        p.check()
        p.attention("append_attend", 0, q, k, v)

    @job()
    def copies_and_compilation_are_refused(self) -> None:
        cache = self.sharded()
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with self.raises(TypeError, "it cannot be copied or pickled", "save() and load()"):
                call(cache)  # type: ignore[operator]
        query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
        for call in (
            lambda: cache.append_attend(0, query, key, key),
            lambda: cache.attend(0, query),
            lambda: cache.append(0, key, key),
            lambda: cache.gather(0, torch.zeros(1, dtype=torch.int64, device=self.device)),
            lambda: cache.clear(),
        ):
            with pytest.raises(Exception, match=r"torch\.compile cannot trace it"):
                torch.compile(call, backend="eager", fullgraph=True)()
        assert cache.is_empty()

    # Groups

    @job()
    def a_group_of_one(self) -> None:
        """It is the plain cache: the same bits, the same errors."""
        p = self.pair(group=dist.new_group([self.rank], use_local_synchronization=True), max_positions=7)
        assert (p.cache.ranks, p.cache.rank) == (1, 0)
        torch.manual_seed(self.rank)  # nobody else takes part
        for rows in (1, 3, 20):
            query, key, value = self.randn(3, rows, 4, 16), self.randn(3, rows, 2, 16), self.randn(3, rows, 2, 16)
            for dtype in (torch.float32, torch.float16):
                inputs = [x.to(dtype) for x in (query, key, value)]
                got = p.cache.append_attend(0, *inputs, return_lse=True)
                for mine, theirs in zip(got, p.whole.append_attend(0, *inputs, return_lse=True), strict=True):
                    assert_same_bits(mine, theirs)
                out = torch.empty_like(inputs[0])
                assert p.cache.attend(0, inputs[0], out=out) is out
                assert_same_bits(out, p.whole.attend(0, inputs[0]))  # type: ignore[arg-type]
        p.check(alone=True)
        with self.raises(ValueError, "out", "[3, 20, 4, 16]"):
            p.cache.attend(0, query, out=torch.empty(3, 1, 4, 16, device=self.device))
        with self.raises(TypeError, "out", "float16"):
            p.cache.attend(0, query, out=query.half())
        path = self.path(f"one {self.rank}")
        p.cache.save(path)
        assert_same_bits(
            StreamingKVCacheFp16.load(path, device=self.device).get_valid_f32(0)[0], p.whole.get_valid_f32(0)[0]
        )
        p.cache.check()
        p.cache.synchronize()

    @job(lambda config: config.ranks == 3)
    def a_group_within_the_world(self) -> None:
        """Ranks are those in the group. The process outside is refused."""
        group = dist.new_group([0, 2], timeout=timedelta(seconds=SECONDS))
        if self.rank == 1:
            with self.raises(ValueError, "group must be a process group of this process"):
                ShardedKVCacheFp16(1, 4, 1, 8, device=self.device, group=group)
            return
        p = self.pair(group=group, max_positions=12, sink_positions=2)
        assert (p.cache.ranks, p.cache.rank) == (2, self.rank // 2)
        for rows in (1, 5, 11):
            query, key, value = self.randn(3, rows, 4, 16), self.randn(3, rows, 2, 16), self.randn(3, rows, 2, 16)
            p.attention("append_attend", 1, query, key, value, alone=True)
            p.check(alone=True)
        p.cache.save(self.path("within"))
        dist.barrier(group)
        again = self.load(self.path("within"), group=group)
        Pair(self, again, StreamingKVCacheFp16.load(self.path("within"), device=self.device)).check(alone=True)

    @job(lambda config: config.ranks == 3)
    def files_between_other_numbers_of_ranks(self) -> None:
        """Saved by three, loaded by two, saved by those, loaded by three: the same bytes."""
        torch.manual_seed(5)
        p = self.pair(max_positions=12, sink_positions=0)
        p.call("append_all", self.randn(2, 3, 15, 2, 16) * 3e4, self.randn(2, 3, 15, 2, 16))
        p.cache.save(self.path("by three"))
        dist.barrier()
        two = dist.new_group([0, 1], timeout=timedelta(seconds=SECONDS))
        if self.rank < 2:
            of_two = self.load(self.path("by three"), group=two)
            assert torch.equal(of_two.overflow_counts(), p.whole.overflow_counts())
            of_two.save(self.path("by two"))
        dist.barrier()
        assert self.path("by two").read_bytes() == self.path("by three").read_bytes()
        Pair(self, self.load(self.path("by two")), p.whole).check()

    # Errors between ranks

    def fell_apart(self, cache: ShardedKVCacheFp16, *words: str) -> None:
        """Every call that ranks make together raises from now on."""
        query = self.randn(3, 1, 2, 16)
        for call in (
            lambda: cache.check(),
            lambda: cache.synchronize(),
            lambda: cache.attend(0, query),
            lambda: cache.append_attend(0, query, query, query),
            lambda: cache.get_valid_f32(0),
            lambda: cache.get_range_f32(0, 0, 1),
            lambda: cache.get_range_raw(0, 0, 1),
            lambda: cache.gather(0, torch.zeros(1, dtype=torch.int64, device=self.device)),
            lambda: cache.save(self.path("never")),
            lambda: cache.load_sequences(self.path("never"), [0]),
        ):
            with self.raises(RuntimeError, "make the caches anew on all ranks", *words):
                call()  # type: ignore[no-untyped-call]

    @job()
    def other_lengths(self) -> None:
        for change in ("append", "truncate", "first", "tag"):
            cache = self.sharded(timeout=5.0)
            query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
            cache.append_attend(0, query, key, key)
            cache.append_attend(0, query, key, key)
            if self.rank == 1:
                if change == "append":
                    cache.append(0, key[:1], key[:1], sequences=[2])
                elif change == "truncate":
                    cache.truncate(0)
                elif change == "first":
                    cache.tensors.state[1, 0, 0] += 1
                else:
                    cache.between_ranks.tag += 1
            who = "rank" if self.rank == 1 else "rank 1"
            words = (f"ShardedKVCacheFp16: {who}", "holds other lengths")
            with self.raises(RuntimeError, *words):
                cache.append_attend(0, query, key, key)
                cache.synchronize()
            self.fell_apart(cache, *words)
            dist.barrier()

    @job(notices_missing_ranks)
    def another_shape_or_layer(self) -> None:
        for change in ("rows", "layer", "heads"):
            cache = self.sharded(timeout=5.0)
            rows = 3 if change == "rows" and self.rank == 1 else 1
            heads = 4 if change == "heads" and self.rank == 1 else 2
            query, key = self.randn(3, rows, heads, 16), self.randn(3, rows, 2, 16)
            with self.raises(RuntimeError, "rank", "make the caches anew on all ranks"):
                cache.append_attend(int(change == "layer" and self.rank == 1), query, key, key)
                cache.synchronize()
            self.fell_apart(cache)
            dist.barrier()

    @job()
    def other_reads_and_arguments(self) -> None:
        """What no call of attention would notice: reads, files, options, another cache of the same exchange."""
        for change in ("gather", "get_valid_f32", "overflow_counts", "save", "window", "scale", "cache", "sequences"):
            if change == "get_valid_f32" and self.device.type == "cuda":
                continue  # NCCL waits where sizes differ; its watchdog would end the process
            cache = self.sharded(timeout=5.0)
            other = self.sharded(exchange=cache.between_ranks)
            query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
            for each in (cache, other):
                each.append_attend(0, query, key, key)
            odd = self.rank == 1
            if odd and change in ("gather", "get_valid_f32", "overflow_counts"):
                cache.append(0, key, key)
            with self.raises(RuntimeError, "ShardedKVCacheFp16", "rank"):
                if change == "gather":
                    cache.gather(0, torch.arange(2, device=self.device))
                elif change == "save":
                    cache.save(self.path("mixed"), sequences=[1, 0] if odd else [0, 1])
                elif change == "window":
                    cache.attend(0, query, window=2 if odd else 3)
                elif change == "scale":
                    cache.attend(0, query, scale=0.5 if odd else None)
                elif change == "cache":
                    (other if odd else cache).attend(0, query)
                elif change == "sequences":
                    cache.attend(0, query[:1], sequences=[1] if odd else [0])
                else:
                    getattr(cache, change)(*([0] if change == "get_valid_f32" else []))
                cache.synchronize()
            dist.barrier()
        with self.raises(RuntimeError, "all ranks must pass the same arguments"):
            self.sharded(overflow="inf" if self.rank == 1 else "saturate")
        with self.raises(RuntimeError, "all ranks must pass the same arguments"):
            self.sharded(exchange="gather" if self.rank == 1 else "auto")
        p = self.filled()
        p.cache.save(self.path("positions"))
        with self.raises(RuntimeError, "load"):
            self.load(self.path("positions"), max_positions=self.ranks * (5 if self.rank == 1 else 6))
        with pytest.raises(RuntimeError if self.rank != 1 else ValueError):
            self.load(self.path("positions"), max_positions=self.ranks * 6 + (self.rank == 1))

    @job(notices_missing_ranks)
    def a_call_fewer(self) -> None:
        """The others give up within the limit."""
        cache = self.sharded(timeout=LIMIT, group=self.own_group())
        query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
        cache.append_attend(0, query, key, key)
        if self.rank != self.ranks - 1:
            began = time.monotonic()
            with self.raises(RuntimeError, "rank", f"within {LIMIT:g} s"):
                cache.append_attend(0, query, key, key)
                cache.synchronize()
            assert time.monotonic() - began < 2 * LIMIT + 2
            self.fell_apart(cache, f"within {LIMIT:g} s")
        dist.barrier()

    @job(notices_missing_ranks)
    def a_rank_that_ended(self) -> None:
        cache = self.sharded(timeout=LIMIT)
        query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
        cache.append_attend(0, query, key, key)
        cache.synchronize()
        if self.rank == self.ranks - 1:
            return
        began = time.monotonic()
        time.sleep(0.5)
        with self.raises(RuntimeError, "ShardedKVCacheFp16", "make the caches anew on all ranks"):
            for _ in range(2):
                cache.append_attend(0, query, key, key)
                cache.synchronize()
        assert time.monotonic() - began < 2 * LIMIT + 2

    # On GPUs

    @job(on_gpus)
    def a_call_in_several_launches(self) -> None:
        """So many answers that the inboxes have room for a part of them at a time."""
        p = self.pair(num_layers=1, batch_size=1, num_heads=8, head_dim=128, max_positions=1000 * self.ranks)
        for _ in range(3):
            query, key, value = self.randn(1, 700, 32, 128), self.randn(1, 700, 8, 128), self.randn(1, 700, 8, 128)
            p.attention("append_attend", 0, query, key, value)

    @job(on_gpus)
    def captured_in_a_graph(self) -> None:
        """Two caches of several layers that append and attend in one graph: checked after each of 50 replays."""
        pairs = [
            self.pair(num_layers=3, batch_size=2, max_positions=20 * self.ranks, sink_positions=sinks, head_dim=64)
            for sinks in (0, self.ranks)
        ]
        new = [torch.empty(3, 2, 1, heads, 64, device=self.device) for heads in (4, 2, 2)]

        def step(caches: list[Any]) -> list[Any]:
            return [
                cache.append_attend(layer, *(x[layer] for x in new), return_lse=True)
                for layer in range(3)
                for cache in caches
            ]

        def fill() -> None:
            for x in new:
                x.copy_(self.randn(*x.shape))

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            fill()
            step([p.cache for p in pairs])
            step([p.whole for p in pairs])
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                got = step([p.cache for p in pairs])
            for _ in range(50):
                fill()
                graph.replay()
                want = step([p.whole for p in pairs])
                pairs[0].cache.synchronize()
                pairs[1].cache.check()
                for mine, theirs in zip(got, want, strict=True):
                    close(mine[0], theirs[0])
                    close(mine[1], theirs[1])
            for p in pairs:
                p.check()
        torch.cuda.synchronize(self.device)
        del graph

    @job(lambda config: config.backend == "nccl" and config.exchange == "symmetric")
    def a_graph_of_ranks_that_differ(self) -> None:
        """Nothing raises by itself: the answers are NaN, and `check` says why."""
        cache = self.sharded(timeout=5.0)
        query, key = self.randn(3, 1, 2, 16), self.randn(3, 1, 2, 16)
        cache.append_attend(0, query, key, key)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cache.append_attend(0, query, key, key)
        graph.replay()
        cache.synchronize()
        assert out.isfinite().all()  # type: ignore[union-attr]
        if self.rank == 1:
            cache.tensors.state[0, 0, 0] += 1
        graph.replay()
        torch.cuda.synchronize(self.device)
        assert out[0].isnan().all()  # type: ignore[index]
        self.fell_apart(cache, "holds other lengths")
        del graph
        dist.barrier()


class Pair:
    """A cache that is dealt out, and one that has the whole text on every rank."""

    def __init__(self, of: Rank, cache: ShardedKVCacheFp16, whole: StreamingKVCacheFp16) -> None:
        self.of, self.cache, self.whole = of, cache, whole

    def call(self, name: str, *arguments: Any, **options: Any) -> Pair:
        getattr(self.cache, name)(*arguments, **options)
        getattr(self.whole, name)(*arguments, **options)
        return self

    def attention(self, name: str, *arguments: Any, alone: bool = False, **options: Any) -> None:
        """`alone`: some ranks of the world do not take part."""
        got = getattr(self.cache, name)(*arguments, return_lse=True, **options)
        want = getattr(self.whole, name)(*arguments, return_lse=True, **options)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            if name == "attend" and options.get("precision") == "fp16" and self.of.device.type == "cuda":
                torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=5e-3)
            else:
                close(mine, theirs)
        if not alone:
            bits = [zlib.crc32(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for x in got if x.numel()]
            assert self.of.of_all(bits) == [bits] * self.of.ranks, "ranks have other bits"

    def reading(self, name: str, *arguments: Any, **options: Any) -> None:
        """Collected: the whole cache's bits. Local: those of this rank's rows, and zeros."""
        want = getattr(self.whole, name)(*arguments, **options)
        for mine, theirs in zip(getattr(self.cache, name)(*arguments, **options), want, strict=True):
            assert_same_bits(mine, theirs)
        local = getattr(self.cache, name)(*arguments, local=True, **options)
        for mine, theirs in zip(local, want, strict=True):
            assert mine.shape == theirs.shape
            ours = (mine != 0).flatten(-2).any(-1)
            assert_same_bits(mine[ours], theirs[ours])
            everyones = self.of.of_all(int(ours.sum()))
            assert sum(everyones) == int((theirs != 0).flatten(-2).any(-1).sum())

    def check(self, alone: bool = False) -> None:
        """Lengths, counters and all that is held."""
        cache, whole = self.cache, self.whole
        assert torch.equal(cache.tensors.state[:2], whole.tensors.state[:2])
        assert torch.equal(cache.cache_seqlens, whole.cache_seqlens)
        assert torch.equal(cache.device_lengths(), whole.device_lengths())
        assert (len(cache), cache.lengths(), cache.position) == (len(whole), whole.lengths(), whole.position)
        assert cache.is_empty() == whole.is_empty()
        assert torch.equal(cache.overflow_counts(), whole.overflow_counts())
        for layer in range(whole.num_layers):
            longest = int(whole.device_lengths()[layer].max())
            for name, arguments in (("get_valid_f32", ()), ("get_range_raw", (0, longest))):
                got, want = (getattr(c, name)(layer, *arguments) for c in (cache, whole))
                for mine, theirs in zip(got, want, strict=True):
                    assert_same_bits(mine, theirs)


def leave(outcomes: dict[str, str], path: Path) -> None:
    """Whole, whenever the process is ended."""
    path.with_suffix(".new").write_text(json.dumps(outcomes))
    path.with_suffix(".new").rename(path)


def run(rank: int, config: Config, folder: Path) -> None:
    """On one rank: every job."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.ranks)}
    torch.set_num_threads(1)
    if config.backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        config.backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=config.ranks,
        timeout=timedelta(seconds=SECONDS),
        device_id=torch.device("cuda", rank) if config.backend == "nccl" else None,
    )
    this = Rank(rank, config, folder)
    outcomes: dict[str, str] = {}
    for name in config.jobs():
        torch.manual_seed(zlib.crc32(name.encode()))
        try:
            getattr(this, name)()
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        if name == LAST:
            break
        leave(outcomes, folder / f"{rank}.json")
        if outcomes[name]:
            (folder / f"{name} failed on {rank}").touch()
        try:
            dist.barrier()
        except RuntimeError:
            break
        if 0 < len(list(folder.glob(f"{name} failed on *"))) < config.ranks:
            break
    leave(outcomes, folder / f"{rank}.json")
    # Without its ranks a group cannot be taken down in order.
    os._exit(0)
