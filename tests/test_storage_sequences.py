"""save(sequences=...) and load_sequences: some sequences of a cache, to a file and from one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, Backend, assert_same_bits, make_cache, needs_gpu
from saved import LateBuffers, assert_same_held, contents, fill, peak_memory, rows

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.files import transfer

NEW_LENGTHS = [13, 0, 5, 9]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are no multiple of a row (32 bytes here), so that small caches have many."""
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


@pytest.fixture(params=["cpu", "late", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The one called late is a CPU, through buffers as on a GPU, with copies as late as they may be."""
    if request.param == "late":
        monkeypatch.setattr(transfer, "block_memory", LateBuffers)
        monkeypatch.setattr(transfer, "BUFFERS", 3)
        return torch.device("cpu")
    return torch.device(request.param)


def ragged(device: torch.device | Backend, seed: int = 0, **arguments: Any) -> StreamingKVCacheFp16:
    """Sequences that have wrapped, are empty, are not full."""
    cache = make_cache(device, **{"batch_size": 4, "sink_positions": 1, **arguments})
    fill(cache, 13, seed, NEW_LENGTHS)
    cache.append(1, rows(cache, 3, 7)[:1], rows(cache, 3, 8)[:1], sequences=[2])  # and layers differ
    return cache


def everything(cache: StreamingKVCacheFp16) -> tuple[torch.Tensor, ...]:
    """All bits of a cache, those in unused slots too."""
    storages = (cache.k_cache.view(torch.int16), cache.v_cache.view(torch.int16))
    return tuple(t.cpu().clone() for t in (*storages, cache.tensors.state, cache.tensors.overflow_counts))


def assert_unchanged(cache: StreamingKVCacheFp16, before: tuple[torch.Tensor, ...]) -> None:
    for now, then in zip(everything(cache), before, strict=True):
        assert torch.equal(now, then)


def assert_others_unchanged(
    cache: StreamingKVCacheFp16, before: tuple[torch.Tensor, ...], sequences: list[int]
) -> None:
    """Bits and lengths of all sequences but these, and the counters."""
    rest = [b for b in range(cache.batch_size) if b not in sequences]
    keys, values, state, counts = everything(cache)
    for now, then in zip((keys, values), before[:2], strict=True):
        assert torch.equal(now[:, rest], then[:, rest])
    assert torch.equal(state[:, :, rest], before[2][:, :, rest])
    assert torch.equal(counts, before[3])


def assert_same_sequences(
    got: StreamingKVCacheFp16, mine: list[int], want: StreamingKVCacheFp16, theirs: list[int]
) -> None:
    """State and everything held of some sequences; the slots may differ."""
    assert torch.equal(got.tensors.state[:2, :, mine].cpu(), want.tensors.state[:2, :, theirs].cpu())
    for layer in range(want.num_layers):
        for a, b in zip(mine, theirs, strict=True):
            for x, y in zip(contents(got, layer, a), contents(want, layer, b), strict=True):
                assert_same_bits(x.cpu(), y.cpu())


# Saving


@pytest.mark.parametrize("sequences", [[2], [2, 0], [3, 1, 0], [0, 1, 2, 3], [1]])
def test_saving_some(device: torch.device, path: Path, tmp_path: Path, sequences: list[int]) -> None:
    """The file is one of a cache of so many sequences: the same file, byte for byte."""
    cache = ragged(device)
    before = everything(cache)
    cache.save(path, sequences=sequences)
    assert_unchanged(cache, before)
    loaded = StreamingKVCacheFp16.load(path, device=device)
    assert loaded.batch_size == len(sequences)
    assert_same_sequences(loaded, list(range(len(sequences))), cache, sequences)
    assert torch.equal(loaded.overflow_counts(), cache.overflow_counts())
    alone = make_cache(device, batch_size=len(sequences), sink_positions=1)
    for i, b in enumerate(sequences):
        for layer in range(cache.num_layers):
            new = rows(cache, 13, layer)[b : b + 1, 13 - NEW_LENGTHS[b] :]
            alone.append(layer, new, -new, sequences=[i])
        if b == 2:
            alone.append(1, rows(cache, 3, 7)[:1], rows(cache, 3, 8)[:1], sequences=[i])
    alone.save(tmp_path / "alone")
    assert path.read_bytes() == (tmp_path / "alone").read_bytes()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_saving_those_of_a_tensor(device: torch.device, path: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    cache = ragged(device)
    cache.save(path, sequences=[3, 0])
    cache.save(tmp_path / "host", sequences=torch.tensor([3, 0], dtype=dtype))
    cache.save(tmp_path / "device", sequences=torch.tensor([3, 0], dtype=dtype, device=device))
    assert path.read_bytes() == (tmp_path / "host").read_bytes() == (tmp_path / "device").read_bytes()


class NoList:
    """Passes for a list until it is asked."""

    def __len__(self) -> int:
        raise RuntimeError("no")

    def __getitem__(self, i: int) -> int:
        raise RuntimeError("no")


A_LIST = "sequences must be a list of ints or a tensor of them"
WRONG_LISTS: dict[str, tuple[Any, type[Exception], str]] = {
    "too large": ([0, 7], IndexError, "sequences must be from 0 to 3, as the cache has 4 sequences, got 7"),
    "negative": ([-1], IndexError, "sequences must be from 0 to 3, as the cache has 4 sequences, got -1"),
    "the first after the last": ([4], IndexError, "sequences must be from 0 to 3, as the cache has 4 sequences, got 4"),
    "huge": ([10**5000], IndexError, "sequences must be from 0 to 3, as the cache has 4 sequences, got an int of "
             "16610 bits"),
    "endless": (range(2**62), IndexError, "sequences must be from 0 to 3, as the cache has 4 sequences, got 4"),
    "twice": ([1, 0, 1], ValueError, "sequences must name each sequence once, got 1 twice"),
    "empty": ([], ValueError, "sequences must name at least one sequence, got none"),
    "an empty tensor": (torch.empty(0, dtype=torch.int64), ValueError, "sequences must name at least one sequence, "
                        "got none"),
    "an int": (1, TypeError, f"{A_LIST}, got int"),
    "a string": ("01", TypeError, f"{A_LIST}, got str"),
    "bytes": (b"01", TypeError, f"{A_LIST}, got bytes"),
    "a set": ({0, 1}, TypeError, f"{A_LIST}, got set"),
    "a dict": ({0: 1}, TypeError, f"{A_LIST}, got dict"),
    "floats": ([0.0], TypeError, "each of sequences must be an int, got float"),
    "bools": ([True], TypeError, "each of sequences must be an int, got bool"),
    "no list": (NoList(), TypeError, f"{A_LIST}, got a NoList that is none"),
    "a float tensor": (torch.ones(1), TypeError, f"{A_LIST}, int64 or int32 [n], got torch.float32 [1]"),
    "a bool tensor": (torch.ones(1).bool(), TypeError, f"{A_LIST}, int64 or int32 [n], got torch.bool [1]"),
    "a tensor of one number": (torch.tensor(1), TypeError, f"{A_LIST}, int64 or int32 [n], got torch.int64 []"),
    "a matrix": (torch.zeros(1, 1).long(), TypeError, f"{A_LIST}, int64 or int32 [n], got torch.int64 [1, 1]"),
    "a tensor on meta": (torch.zeros(1, device="meta").long(), ValueError, f"{A_LIST}, and this tensor has no numbers"),
    "a tensor out of range": (torch.tensor([0, 4]), IndexError, "sequences must be from 0 to 3, as the cache has 4 "
                              "sequences, got 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_wrong_lists(path: Path, name: str) -> None:
    sequences, kind, words = WRONG_LISTS[name]
    cache = ragged(torch.device("cpu"))
    cache.save(path, sequences=[0, 1])
    data, before = path.read_bytes(), everything(cache)
    with pytest.raises(kind) as raised:
        cache.save(path, sequences=sequences)
    assert str(raised.value) == f"save: {words}"
    with pytest.raises(kind) as raised:
        cache.load_sequences(path, sequences)
    assert str(raised.value) == f"load_sequences: {words}"
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]
    assert_unchanged(cache, before)


def test_no_list() -> None:
    with pytest.raises(TypeError, match=rf"^load_sequences: {A_LIST}, got NoneType$"):
        ragged(torch.device("cpu")).load_sequences("file", None)  # type: ignore[arg-type]


# Loading


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("slots", [4, 5, 8, 11])
@pytest.mark.parametrize("sequences", [[2], [5, 0, 3]])
def test_loading_some(device: torch.device, path: Path, sinks: int, slots: int, sequences: list[int]) -> None:
    """They become what `load(max_positions=...)` makes of them, and both go on alike."""
    source = ragged(device, sink_positions=sinks)
    saved = [0, 2, 3][: len(sequences)]
    source.save(path, sequences=saved)
    want = StreamingKVCacheFp16.load(path, device=device, max_positions=slots)
    cache = make_cache(device, batch_size=6, max_positions=slots, sink_positions=sinks, overflow="inf")
    fill(cache, 9, 5, [9, 2, 6, 0, 7, 8])
    new = torch.full((6, 1, 2, 8), 1e6, device=device)
    cache.append(1, new, new)
    before = everything(cache)
    assert before[3].tolist() == [0, 2 * 6 * 16]
    cache.load_sequences(path, sequences)
    order = list(range(len(sequences)))
    assert_same_sequences(cache, sequences, want, order)
    assert_others_unchanged(cache, before, sequences)
    assert cache.overflow == "inf"
    for step in range(3):
        for layer in range(cache.num_layers):
            new = rows(want, 2, 60 + step)
            want.append(layer, new, -new)
            cache.append(layer, new, -new, sequences=sequences)
        assert_same_sequences(cache, sequences, want, order)
        assert_others_unchanged(cache, before, sequences)
    query = rows(want, 1, 99)
    for layer in range(cache.num_layers):
        assert_same_bits(cache.attend(layer, query, sequences=sequences), want.attend(layer, query))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_loading_those_of_a_tensor(device: torch.device, path: Path, dtype: torch.dtype) -> None:
    cache, other = ragged(device), ragged(device, 3)
    cache.save(path, sequences=[0, 2])
    for numbers in (torch.tensor([3, 1], dtype=dtype), torch.tensor([3, 1], dtype=dtype, device=device)):
        other.reset([1, 3])
        other.load_sequences(path, numbers)
        assert_same_sequences(other, [3, 1], cache, [0, 2])


def test_lengths_on_the_host(device: torch.device, path: Path) -> None:
    """Also where they have been asked for before, and by what does not look at the device."""
    cache = make_cache(device, batch_size=2)
    fill(cache, 13)
    cache.save(path, sequences=[1])
    cache.clear()
    fill(cache, 3)
    assert (len(cache), cache.position) == (3, 3)
    native = cache.native
    cache.load_sequences(path, [0])
    assert cache.native is native, "captured graphs belong to it"
    assert (len(cache), cache.position) == (3, 13)
    cache.load_sequences(path, [1])
    assert (len(cache), cache.position) == (8, 13)
    assert cache.get_valid_f32(0)[0].shape == (2, 8, 2, 8)
    fill(cache, 1)
    assert (len(cache), cache.position) == (8, 14)
    cache.truncate(2)
    assert len(cache) == 2


def test_under_inference_mode(device: torch.device, path: Path) -> None:
    cache, other = ragged(device), ragged(device, 3)
    with torch.inference_mode():
        cache.save(path, sequences=[0, 2])
        other.load_sequences(path, [1, 0])
        assert_same_sequences(other, [1, 0], cache, [0, 2])
        assert other.position == 13
    fill(other, 1)
    other.clear()


def test_a_whole_cache(device: torch.device, path: Path) -> None:
    cache, other = ragged(device), ragged(device, 3)
    cache.save(path)
    other.load_sequences(path, range(4))
    assert_same_held(other, cache)


def test_an_empty_file(device: torch.device, path: Path) -> None:
    make_cache(device, batch_size=2, sink_positions=1).save(path)
    cache = ragged(device)
    before = everything(cache)
    cache.load_sequences(path, [2, 0])
    assert cache.tensors.state[0, :, [0, 2]].tolist() == [[0, 0]] * 2
    assert_others_unchanged(cache, before, [0, 2])


# Files that do not fit, or are damaged


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 3}, "does not fit this cache: num_layers is 3 in the file and 2 here"),
    ({"num_heads": 4}, "does not fit this cache: num_heads is 4 in the file and 2 here"),
    ({"head_dim": 16}, "does not fit this cache: head_dim is 16 in the file and 8 here"),
    ({"sink_positions": 2}, "does not fit this cache: sink_positions is 2 in the file and 1 here"),
    ({"num_heads": 1, "head_dim": 16, "sink_positions": 0},
     "does not fit this cache: num_heads is 1 in the file and 2 here, head_dim is 16 in the file and 8 here, "
     "sink_positions is 0 in the file and 1 here"),
]  # fmt: skip


@pytest.mark.parametrize("shape, words", OTHERS, ids=range(len(OTHERS)))
def test_files_of_other_shapes(path: Path, shape: dict[str, Any], words: str) -> None:
    other = make_cache(torch.device("cpu"), **{"sink_positions": 1, **shape})
    fill(other, 11)
    other.save(path)
    cache = ragged(torch.device("cpu"))
    before = everything(cache)
    with pytest.raises(ValueError) as raised:
        cache.load_sequences(path, [1])
    assert str(raised.value) == f"load_sequences: {path} {words}"
    assert_unchanged(cache, before)


@pytest.mark.parametrize("sequences", [[1], [0, 1, 2]])
def test_files_of_other_numbers_of_sequences(path: Path, sequences: list[int]) -> None:
    cache = ragged(torch.device("cpu"))
    cache.save(path, sequences=[0, 2])
    before = everything(cache)
    with pytest.raises(ValueError) as raised:
        cache.load_sequences(path, sequences)
    assert str(raised.value) == (
        f"load_sequences: sequences must name one for each of the 2 sequences of {path}, got {len(sequences)}"
    )
    assert_unchanged(cache, before)


def test_damaged_files_change_nothing(device: torch.device, path: Path) -> None:
    """A bit turned in every byte, and every length."""
    cache = ragged(device, 3)
    ragged(device, num_layers=2).save(path, sequences=[2])
    data = bytearray(path.read_bytes())
    before = everything(cache)

    def fails() -> None:
        with pytest.raises(ValueError, match=r"^load_sequences: ") as raised:
            cache.load_sequences(path, [1])
        assert "empty now" not in str(raised.value)
        assert_unchanged(cache, before)

    for i in range(len(data)):
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        fails()
        data[i] ^= 1 << i % 8
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        fails()
    path.write_bytes(data)
    cache.load_sequences(path, [1])


def in_second_pass(act: Callable[[], object]) -> Callable[[int, int], None]:
    """A function for `progress` that does something when half of the bytes, the first pass, are done."""

    def progress(done: int, total: int) -> None:
        if done == total // 2:
            act()

    return progress


def assert_emptied(cache: StreamingKVCacheFp16, before: tuple[torch.Tensor, ...], sequences: list[int]) -> None:
    assert_others_unchanged(cache, before, sequences)
    state = cache.tensors.state[:2, :, sequences].cpu()
    assert not state[0].any() and bool((state[1] == cache.sink_positions).all())
    assert len(cache) == 0  # and the host knows it
    fill(cache, 2)


def test_a_file_that_changes_between_the_passes(device: torch.device, path: Path) -> None:
    ragged(device).save(path, sequences=[0, 2])
    cache = ragged(device, 3)
    before = everything(cache)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    with pytest.raises(
        ValueError,
        match=r"^load_sequences: .* is damaged: its bytes .*; sequences \[3, 0\] of the cache are empty now$",
    ):
        cache.load_sequences(path, [3, 0], progress=in_second_pass(lambda: path.write_bytes(data)))
    assert_emptied(cache, before, [3, 0])


def test_a_file_that_is_cut_between_the_passes(device: torch.device, path: Path) -> None:
    ragged(device).save(path, sequences=[0])
    cache = ragged(device, 3)
    before = everything(cache)
    size = path.stat().st_size
    with pytest.raises(
        ValueError, match=r"was cut short while it was being read; sequence 2 of the cache is empty now$"
    ):
        cache.load_sequences(path, [2], progress=in_second_pass(lambda: os.truncate(path, size - 200)))
    assert_emptied(cache, before, [2])


@pytest.mark.parametrize("second", [False, True])
def test_a_disk_that_fails(device: torch.device, path: Path, second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged(device).save(path, sequences=[0, 3])
    cache = ragged(device, 3)
    before = everything(cache)

    def failing(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fail() -> None:
        monkeypatch.setattr(os, "preadv", failing)

    progress = in_second_pass(fail) if second else lambda done, total: fail()
    end = r"; sequences \[1, 2\] of the cache are empty now" if second else ""
    words = rf"^\[Errno 5\] load_sequences: path cannot be read: Input/output error{end}: '{re.escape(str(path))}'$"
    with pytest.raises(OSError, match=words) as raised:
        cache.load_sequences(path, [1, 2], progress=progress)
    assert raised.value.errno == errno.EIO and raised.value.filename == str(path)
    if second:
        assert_emptied(cache, before, [1, 2])
    else:
        assert_unchanged(cache, before)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_function_that_raises(device: torch.device, path: Path, second: bool, error: type[BaseException]) -> None:
    ragged(device).save(path, sequences=[0, 3])
    cache = ragged(device, 3)
    before = everything(cache)

    def progress(done: int, total: int) -> None:
        if done > total * (0.75 if second else 0.25):
            raise error

    with pytest.raises(error):
        cache.load_sequences(path, [1, 2], progress=progress)
    if second:
        assert_emptied(cache, before, [1, 2])
    else:
        assert_unchanged(cache, before)


def test_memory_that_was_moved(path: Path) -> None:
    cache = ragged(torch.device("cpu"))
    cache.save(path, sequences=[0])
    with torch.no_grad():
        cache.v_cache.set_(torch.zeros_like(cache.v_cache))
    with pytest.raises(RuntimeError, match=r"^load_sequences: the cache's memory has been moved"):
        cache.load_sequences(path, [0])


def test_paths_and_progress(path: Path) -> None:
    cache = ragged(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^load_sequences: path must be a str"):
        cache.load_sequences(5, [0])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"load_sequences: path cannot be read: No such file"):
        cache.load_sequences(path, [0])
    cache.save(path, sequences=[0, 2])
    with pytest.raises(TypeError, match=r"^load_sequences: progress must be"):
        cache.load_sequences(path, [0, 2], progress=1)  # type: ignore[arg-type]
    calls: list[tuple[int, int]] = []
    cache.load_sequences(path, [0, 2], progress=lambda done, total: calls.append((done, total)))
    data = 2 * 32 * (2 * 8 + 5 + 8)
    ends = [min(i, data) for i in range(100, data + 100, 100)]
    assert calls == [(done, 2 * data) for done in (0, *ends, *(data + end for end in ends))]


def test_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block for each buffer, however large the file."""
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 2**20)
    cache = StreamingKVCacheFp16(4, 4096, 8, 128, batch_size=2, device="cpu")
    fill(cache, 4096)
    cache.save(path, sequences=[1])
    cache.load_sequences(path, [0])  # the threads and their stacks
    limit = (transfer.BUFFERS + 4) * 2**20
    assert peak_memory(lambda: cache.load_sequences(path, [0])) < limit < path.stat().st_size / 2


# Graphs and streams


@needs_gpu
@pytest.mark.gpu
def test_captured_graphs_go_on(path: Path) -> None:
    cache, want = (make_cache(torch.device("cuda"), batch_size=3) for _ in range(2))
    for c in (cache, want):
        fill(c, 5)
    donor = make_cache(torch.device("cuda"), batch_size=1)
    fill(donor, 13, 2)
    donor.save(path)
    new = rows(cache, 1, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = cache.append_attend(0, new, new, -new)
        with pytest.raises(RuntimeError, match=r"^load_sequences: a file cannot be part of a CUDA graph"):
            cache.load_sequences(path, [1])
    for _ in range(3):
        cache.load_sequences(path, [1])
        want.load_sequences(path, [1])
        assert cache.position == want.position
        graph.replay()
        assert_same_bits(answer, want.append_attend(0, new, new, -new))
        assert_same_held(cache, want)


@needs_gpu
@pytest.mark.gpu
def test_on_another_stream(path: Path) -> None:
    """Behind what the stream has still to do, and before what comes after."""
    cache = StreamingKVCacheFp16(2, 2048, 8, 128, batch_size=2)
    fill(cache, 2500)
    cache.save(path, sequences=[0])
    donor = StreamingKVCacheFp16.load(path)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        fill(cache, 2500, 1)
        cache.load_sequences(path, [1])
        assert_same_sequences(cache, [1], donor, [0])


@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")
@pytest.mark.gpu
def test_some_of_a_gpu_on_a_cpu(path: Path) -> None:
    cache, other = ragged(torch.device("cuda")), ragged(torch.device("cpu"), 3)
    cache.save(path, sequences=torch.tensor([0, 2], device="cuda"))
    other.load_sequences(path, torch.tensor([1, 3], device="cuda"))
    assert_same_sequences(other, [1, 3], cache, [0, 2])
