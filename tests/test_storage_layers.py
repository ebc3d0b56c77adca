"""save_layers and open_layers: files of layers of several caches, as Fp16Cache has them."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, make_cache, needs_gpu
from saved import LateBuffers, contents, fill, header_of, held
from torch import Tensor

import kvcache_ext
from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.files import layout, open_layers, save_layers, transfer

Layers = list[tuple[StreamingKVCacheFp16, int]]
SLOTS = (12, 5)  # of full attention, and of a sliding window
METADATA = {"config": '{"a": "ö"}', "empty": ""}


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


def make_layers(
    device: torch.device, slots: tuple[int, int] = SLOTS, batch: int = 3, sliding_device: torch.device | None = None
) -> Layers:
    """Empty: layers of two caches, in turn, the second of other heads."""
    full = make_cache(device, num_layers=2, max_positions=slots[0], batch_size=batch)
    sliding = make_cache(
        sliding_device or device, num_layers=1, max_positions=slots[1], num_heads=1, head_dim=24, batch_size=batch
    )
    return [(full, 1), (sliding, 0), (full, 0)]


def filled_layers(device: torch.device, seed: int = 0, **arguments: Any) -> Layers:
    """With sequences that have wrapped, are empty, are not full, and with overflows."""
    layers = make_layers(device, **arguments)
    for cache in (layers[0][0], layers[1][0]):
        fill(cache, 14, seed, [14, 0, 4, 9][: cache.batch_size])
    full = layers[0][0]
    large = torch.full((1, 1, 2, 8), 1e6, device=full.device)
    full.append(1, large, -large, sequences=[2])
    return layers


def tensors() -> dict[str, Tensor]:
    return {
        "record": torch.tensor([[True, False, True], [True, True, True]]),  # 6 bytes
        "columns": torch.tensor([3, -4, 2**40]),
        "nothing": torch.empty(0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "a half": torch.tensor([1.5, float("nan")], dtype=torch.float16),
        "strided": torch.arange(12, dtype=torch.int32).view(3, 4).t(),
    }


def save(path: Path, layers: Layers, sequences: int = 3, **options: Any) -> None:
    save_layers(path, layers, **{"sequences": sequences, "metadata": METADATA, "tensors": tensors(), **options})


def assert_same_layers(got: Layers, want: Layers, sequences: int = 3) -> None:
    """State and everything held; the slots may differ."""
    for (mine, i), (theirs, j) in zip(got, want, strict=True):
        assert torch.equal(mine.tensors.state[:2, i, :sequences].cpu(), theirs.tensors.state[:2, j, :sequences].cpu())
        for b in range(sequences):
            for x, y in zip(contents(mine, i, b), contents(theirs, j, b), strict=True):
                assert_same_bits(x.cpu(), y.cpu())


def everything(layers: Layers) -> list[Tensor]:
    caches = (layers[0][0], layers[1][0])
    return [
        t.cpu().clone()
        for c in caches
        for t in (c.k_cache.view(torch.int16), c.v_cache.view(torch.int16), c.tensors.state, c.tensors.overflow_counts)
    ]


def assert_unchanged(layers: Layers, before: list[Tensor]) -> None:
    assert all(map(torch.equal, everything(layers), before))


def counts(layers: Layers) -> list[int]:
    return [int(cache.overflow_counts()[i]) for cache, i in layers]


# What comes back


def test_round_trip(device: torch.device, path: Path) -> None:
    layers = filled_layers(device)
    before = everything(layers)
    save(path, layers)
    assert_unchanged(layers, before)
    target = filled_layers(device, 5)
    target[0][0].clear()
    natives = [cache.native for cache, _ in target]
    with open_layers(path) as file:
        assert file.sequences == 3 and file.metadata == METADATA
        assert list(file.tensors) == sorted(file.tensors, key=lambda name: (-file.tensors[name].itemsize, name))
        assert set(file.tensors) == set(tensors())
        for name, tensor in tensors().items():
            got = file.tensors[name]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert bytes(got.flatten().view(torch.uint8).tolist() if got.numel() else b"") == bytes(
                tensor.flatten().contiguous().view(torch.uint8).tolist() if tensor.numel() else b""
            )
        for saved, (cache, i) in zip(file.layers, layers, strict=True):
            shape = (saved.max_positions, saved.num_heads, saved.head_dim)
            assert shape == (cache.max_positions, cache.num_heads, cache.head_dim)
            assert saved.lengths == tuple(len(held(cache, i, b)) for b in range(3))
            assert [list(saved.seen), list(saved.first)] == cache.tensors.state[:2, i].tolist()
        file.load(target)
    assert_same_layers(target, layers)
    assert counts(target) == counts(layers) == [32, 0, 0]
    assert [cache.native for cache, _ in target] == natives, "captured graphs belong to them"
    for (mine, _), (theirs, _) in zip(target, layers, strict=True):
        assert (len(mine), mine.position) == (len(theirs), theirs.position)
    for these in (target, layers):
        for cache in (these[0][0], these[1][0]):
            fill(cache, 3, 8)
    assert_same_layers(target, layers)


@pytest.mark.parametrize("slots", [(3, 2), (30, 4), (13, 60), (1, 1)])
def test_other_sizes(device: torch.device, path: Path, slots: tuple[int, int]) -> None:
    """As `StreamingKVCacheFp16.load` of each."""
    layers = filled_layers(device)
    save(path, layers)
    target = filled_layers(device, 5, slots=slots)
    with open_layers(path) as file:
        file.load(target, fresh=True)
    for n, (cache, i) in enumerate(layers):
        cache.save(path)
        want = StreamingKVCacheFp16.load(path, device=device, max_positions=target[n][0].max_positions)
        assert_same_layers([target[n]], [(want, i)])


def test_grouped_in_another_way(device: torch.device, path: Path) -> None:
    layers = filled_layers(device)
    save(path, layers)
    alone: Layers = [
        (make_cache(device, num_layers=2, max_positions=7, batch_size=3), 1),
        (make_cache(device, num_layers=1, max_positions=5, num_heads=1, head_dim=24, batch_size=3), 0),
        (make_cache(device, num_layers=1, max_positions=12, batch_size=3), 0),
    ]
    other_layer = alone[0][0].k_cache[0].clone()
    with open_layers(path) as file:
        file.load(alone)
    assert_same_layers(alone[1:], layers[1:])
    assert [len(held(alone[0][0], 1, b)) for b in range(3)] == [7, 0, 5]
    assert counts(alone) == [32, 0, 0]
    assert torch.equal(alone[0][0].k_cache[0].view(torch.int16), other_layer.view(torch.int16))
    assert not alone[0][0].tensors.state[0, 0].any()


@pytest.mark.parametrize("fresh", [False, True])
def test_fewer_sequences_than_there_are(device: torch.device, path: Path, fresh: bool) -> None:
    layers = filled_layers(device)
    save(path, layers, 2)
    target = filled_layers(device, 5, batch=4)
    before = everything(target)
    with open_layers(path) as file:
        assert file.sequences == 2
        file.load(target, fresh=fresh)
    assert_same_layers(target, layers, 2)
    after = everything(target)
    for i in (0, 1, 4, 5):
        assert torch.equal(after[i][:, 2:], before[i][:, 2:])
    for i in (2, 6):
        assert torch.equal(after[i][:, :, 2:], before[i][:, :, 2:])


def test_every_dtype(path: Path) -> None:
    """Those that torch and the format both have."""
    safetensors = pytest.importorskip("safetensors")
    layers = filled_layers(torch.device("cpu"))
    bits = torch.arange(3 * 16, dtype=torch.uint8)
    small = {name: (bits % 2).bool() if name == "BOOL" else bits.view(dtype) for name, dtype in layout.DTYPES.items()}
    save(path, layers, tensors=small)
    with open_layers(path) as file:
        for name, tensor in small.items():
            assert file.tensors[name].dtype == tensor.dtype
            assert torch.equal(file.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
    with safetensors.safe_open(path, "pt") as file:
        for name, tensor in small.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_safetensors_reads_it(device: torch.device, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    layers = filled_layers(device)
    save(path, layers)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "kvcache_ext.Fp16Cache",
            "version": "1",
            "writer": f"kvcache_ext {kvcache_ext.__version__}",
            "num_layers": "3",
            "batch_size": "3",
            "max_positions": "12,5,12",
            "block_bytes": "100",
            **METADATA,
        }
        for name, tensor in tensors().items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype
            torch.testing.assert_close(got, tensor, rtol=0, atol=0, equal_nan=True)
        lengths = file.get_tensor("lengths").tolist()
        assert file.get_tensor("overflow_counts").tolist() == [32, 0, 0]
        for n, (cache, i) in enumerate(layers):
            assert file.get_tensor("seen")[n].tolist() == cache.cache_seqlens[i].tolist()
            for which, name in enumerate((f"keys.{n}", f"values.{n}")):
                parts = file.get_tensor(name).split(lengths[n])
                for b, part in enumerate(parts):
                    assert_same_bits(part, contents(cache, i, b)[which].cpu().view(part.shape))
        checksums = file.get_tensor("checksums").tolist()
    header, rest = header_of(path)
    data = path.read_bytes()
    start = len(data) - len(rest) + header["keys.0"]["data_offsets"][0]
    assert start % 8 == 0
    end = len(data) - 4 * len(checksums)
    assert checksums == [zlib.crc32(part) for part in (data[:start], *_cut(data[start:end]))]


def _cut(data: bytes) -> list[bytes]:
    return [data[i : i + 100] for i in range(0, len(data), 100)]


# Wrong files


def test_each_kind_of_file_says_who_reads_it(path: Path) -> None:
    layers = filled_layers(torch.device("cpu"))
    save(path, layers)
    words = f"{path} is a file of Fp16Cache.save, which Fp16Cache.load reads"
    with pytest.raises(ValueError) as raised:
        StreamingKVCacheFp16.load(path, device="cpu")
    assert str(raised.value) == f"load: {words}"
    with pytest.raises(ValueError) as raised:
        layers[0][0].load_sequences(path, [0])
    assert str(raised.value) == f"load_sequences: {words}"
    layers[0][0].save(path)
    with pytest.raises(ValueError) as raised:
        open_layers(path)
    assert str(raised.value) == (
        f"Fp16Cache.load: {path} is a file of StreamingKVCacheFp16.save, which StreamingKVCacheFp16.load reads"
    )
    path.write_bytes(b"#!/bin/sh\nexit 0\n")
    with pytest.raises(ValueError, match=r"^Fp16Cache\.load: .* is not a file of Fp16Cache\.save"):
        open_layers(path)


@pytest.mark.long
def test_damaged_files_change_nothing(path: Path) -> None:
    """A bit turned in every byte, and every length."""
    device = torch.device("cpu")
    save(path, filled_layers(device, slots=(4, 2)))
    target = filled_layers(device, 5)
    before = everything(target)
    data = bytearray(path.read_bytes())

    def fails() -> None:
        with pytest.raises(ValueError, match=r"^Fp16Cache\.load: ") as raised, open_layers(path) as file:
            file.load(target)
        assert "empty now" not in str(raised.value)
        assert_unchanged(target, before)

    for i in range(len(data)):
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        fails()
        data[i] ^= 1 << i % 8
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        fails()
    path.write_bytes(bytes(data) + b"\0")
    fails()


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With another header, and the first checksum right, so that it is not what gives the file away."""
    header, rest = header_of(path)
    small = header["keys.0"]["data_offsets"][0]
    tail = header["checksums"]["data_offsets"][0]
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    checksum = struct.pack("<I", zlib.crc32(head + rest[:small]))
    path.write_bytes(head + rest[:tail] + checksum + rest[tail + 4 :])


HEADERS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda h: h["__metadata__"].update(version="2", writer="kvcache_ext 9"),
     "has version 2 of the format (written by kvcache_ext 9), and this kvcache_ext reads version 1; a newer "
     "kvcache_ext is needed"),
    (lambda h: h["__metadata__"].update(max_positions="12,5"),
     "is damaged: its header gives num_layers as 3, and max_positions of 2 layers"),
    (lambda h: h["__metadata__"].update(max_positions=12),
     "is damaged: its header gives num_layers as 3, and max_positions of 0 layers"),
    (lambda h: h["__metadata__"].update(max_positions="12,,12"), "is damaged: its header gives max_positions as ''"),
    (lambda h: h["__metadata__"].update(max_positions="12,0,12"),
     "is damaged: its header gives max_positions as 0, and it is at least 1"),
    (lambda h: h["__metadata__"].update(max_positions="12,4,12"),
     "is damaged: no cache has the lengths that it gives for layer 1: 14 seen, 9 the first, 5 held"),
    (lambda h: h["__metadata__"].update(num_layers="4", max_positions="12,5,12,1"),
     "is damaged: its header has no keys.3, or not its shape"),
    (lambda h: h["__metadata__"].update(batch_size="x"), "is damaged: its header gives batch_size as 'x'"),
    (lambda h: h["__metadata__"].update(block_bytes="0"),
     "is damaged: its header gives block_bytes as 0, and it is at least 1"),
    (lambda h: h["__metadata__"].update(block_bytes=str(2**27)),
     "is damaged: its header gives block_bytes as 134217728"),
    (lambda h: h["__metadata__"].update(more=5), "is damaged: its header gives 'more' as 5"),
    (lambda h: h["keys.1"].update(shape=[9, 1, 0]), "is damaged: its header has no keys.1, or not its shape"),
    (lambda h: h["keys.1"].update(shape=[9, 1]), "is damaged: its header has no keys.1, or not its shape"),
    (lambda h: h["keys.1"].update(shape=[9, True, 24]), "is damaged: its header has no keys.1, or not its shape"),
    (lambda h: h["record"].update(dtype="I4"), "is damaged: its header has {"),
    (lambda h: h.update(record=3), "is damaged: its header has 3 as 'record'"),
    (lambda h: h["record"].update(shape=[-2, -3]), "is damaged: its header has [-2, -3] as the shape of 'record'"),
    (lambda h: h["record"].update(data_offsets=[0, 6]), "is damaged: its header has {"),
    (lambda h: h.pop("padding"), "is damaged: its header has null as padding"),
    (lambda h: h.update({"keys.9": h["keys.1"]}), "is damaged: its header has an entry 'keys.9' that no cache has"),
]  # fmt: skip


@pytest.mark.parametrize("change, words", HEADERS, ids=range(len(HEADERS)))
def test_wrong_headers(path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    save(path, filled_layers(torch.device("cpu")))
    rewrite(path, lambda header: None)
    open_layers(path).close()
    rewrite(path, change)
    with pytest.raises(ValueError) as raised:
        open_layers(path)
    assert str(raised.value).startswith(f"Fp16Cache.load: {path} {words}")
    if not words.endswith("{"):
        assert str(raised.value) == f"Fp16Cache.load: {path} {words}" or "padding" in words


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "sequences, words", [(3, "sequences 0 to 2 of the cache are"), (1, "sequence 0 of the cache is")]
)
def test_a_second_pass_that_fails(device: torch.device, path: Path, fresh: bool, sequences: int, words: str) -> None:
    """Or the only one: the sequences are empty, the others are what they were."""
    save(path, filled_layers(device), sequences)
    target = filled_layers(device, 5)
    before = everything(target)
    data = bytearray(path.read_bytes())
    header, rest = header_of(path)
    data[len(data) - len(rest) + header["checksums"]["data_offsets"][0] - 1] ^= 1  # the last of the values

    def damage(done: int, total: int) -> None:
        if done == (0 if fresh else total // 2):
            path.write_bytes(data)

    with (
        pytest.raises(ValueError, match=rf"^Fp16Cache\.load: .* is damaged: its bytes .*; {words} empty now$"),
        open_layers(path) as file,
    ):
        file.load(target, fresh=fresh, progress=damage)
    for cache in (target[0][0], target[1][0]):
        assert not cache.tensors.state[0, :, :sequences].any() and len(cache) == 0
    after = everything(target)
    for i in (0, 1, 4, 5):
        assert torch.equal(after[i][:, sequences:], before[i][:, sequences:])
    for i in (3, 7):
        assert torch.equal(after[i], before[i])


# Wrong calls


def test_targets_that_do_not_fit(path: Path) -> None:
    device = torch.device("cpu")
    layers = filled_layers(device)
    save(path, layers)
    target = filled_layers(device, 5)
    before = everything(target)
    (full, _), (sliding, _), _ = target
    sinks = make_cache(device, sink_positions=1, max_positions=12, batch_size=3)
    small = make_cache(device, max_positions=12, batch_size=2)
    wide = make_cache(device, max_positions=12, batch_size=3, head_dim=16)
    fit = re.escape(f"{path} does not fit this cache: ")
    cases: list[tuple[Layers, type[Exception], str]] = [
        (target[:2], ValueError, re.escape(f"{path} has 3 layers, and it is loaded into 2")),
        ([(full, 1), (full, 0), (sliding, 0)], ValueError, fit + "num_heads of layer 1 is 1 in the file and 2 here"),
        ([(wide, 1), (sliding, 0), (full, 0)], ValueError, fit + "head_dim of layer 0 is 8 in the file and 16 here"),
        ([(full, 1), (sliding, 0), (full, 1)], ValueError,
         "layer 2 is layer 1 of a cache, which an earlier one is, too"),
        ([(full, 1), (sliding, 0), (full, 2)], IndexError, "layer 2 is layer 2 of a cache that has 2 layers"),
        ([(full, 1), (sliding, 0), (sinks, 0)], ValueError, "layer 2 is of a cache with 1 sink positions, not of 0"),
        ([(full, 1), (sliding, 0), (small, 0)], ValueError,
         "sequences must be from 1 to 2, as the cache of layer 2 has 2 sequences, got 3"),
    ]  # fmt: skip
    with open_layers(path) as file:
        for wrong, kind, words in cases:
            with pytest.raises(kind, match=rf"^Fp16Cache\.load: {words}$"):
                file.load(wrong)
        with pytest.raises(TypeError, match=r"^Fp16Cache\.load: progress must be"):
            file.load(target, progress=3)  # type: ignore[arg-type]
        with torch.no_grad():
            layers[0][0].k_cache.set_(torch.zeros(1).half())
        with pytest.raises(RuntimeError, match=r"^Fp16Cache\.load: the cache's memory has been moved"):
            file.load(layers)
    assert_unchanged(target, before)


def test_wrong_calls_of_save(path: Path) -> None:
    layers = filled_layers(torch.device("cpu"))
    save(path, layers)
    data = path.read_bytes()
    taken = "must not have the name {!r}, which is the format's own"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layers": []}, ValueError, "layers must name at least one layer, got none"),
        ({"sequences": 0}, ValueError, "sequences must be from 1 to 3, as the cache of layer 0 has 3 sequences, got 0"),
        ({"sequences": 4}, ValueError, "sequences must be from 1 to 3, as the cache of layer 0 has 3 sequences, got 4"),
        ({"metadata": {"overflow": "inf"}}, ValueError, "metadata " + taken.format("overflow")),
        ({"metadata": {"a": 1}}, TypeError, "metadata must be of str, got int as 'a'"),
        ({"tensors": {"padding": torch.ones(1)}}, ValueError, "tensors " + taken.format("padding")),
        ({"tensors": {"keys.7": torch.ones(1)}}, ValueError, "tensors " + taken.format("keys.7")),
        ({"tensors": {"a": torch.ones(1, dtype=torch.complex128)}}, TypeError,
         "tensors must have dtypes that safetensors has, got torch.complex128 as 'a'"),
        ({"tensors": {"a": [1]}}, TypeError, "tensors must have dtypes that safetensors has, got list as 'a'"),
        ({"progress": 1}, TypeError, "progress must be True, False, None or a function of two ints, got int"),
    ]  # fmt: skip
    for wrong, kind, words in cases:
        with pytest.raises(kind) as raised:
            save(path, **{"layers": layers, **wrong})
        assert str(raised.value) == f"Fp16Cache.save: {words}"
    with pytest.raises(IsADirectoryError, match=r"Fp16Cache\.save: path must name a file, not a folder"):
        save(path.parent, layers)
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]


def test_a_save_that_fails_leaves_the_old_file(device: torch.device, path: Path) -> None:
    layers = filled_layers(device)
    save(path, layers)
    data = path.read_bytes()

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(path, filled_layers(device, 3), progress=fail)
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]


def test_files_are_closed(path: Path) -> None:
    save(path, filled_layers(torch.device("cpu")))
    before = len(os.listdir("/proc/self/fd"))
    file = open_layers(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    for _ in range(2):
        file.close()
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError):
        open_layers(path)
    assert len(os.listdir("/proc/self/fd")) == before


# Devices


def test_a_default_device(device: torch.device, path: Path) -> None:
    """What is made on the host is made there."""
    layers, target, small = filled_layers(device), filled_layers(device, 5), tensors()
    with torch.device("meta"):
        save(path, layers, tensors=small)
        layers[0][0].save(path.parent / "one", sequences=[0, 2])
        target[0][0].load_sequences(path.parent / "one", [1, 0])
        with open_layers(path) as file:
            file.load(target)
    assert all(tensor.is_cpu for tensor in file.tensors.values())
    assert_same_layers(target, layers)


def test_under_inference_mode(device: torch.device, path: Path) -> None:
    layers, target = filled_layers(device), filled_layers(device, 5)
    with torch.inference_mode():
        save(path, layers)
        with open_layers(path) as file:
            file.load(target)
    assert_same_layers(target, layers)
    file.tensors["columns"] += 1
    fill(target[0][0], 2)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("there", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("back", [("cuda", "cpu"), ("cpu", "cpu"), ("cpu", "cuda")])
def test_across_devices(path: Path, there: tuple[str, str], back: tuple[str, str]) -> None:
    layers = filled_layers(torch.device(there[0]), sliding_device=torch.device(there[1]))
    save(path, layers, tensors={"a": torch.ones(3, device="cuda")})
    target = filled_layers(torch.device(back[0]), 5, sliding_device=torch.device(back[1]))
    with open_layers(path) as file:
        assert file.tensors["a"].tolist() == [1, 1, 1]
        file.load(target)
    assert_same_layers(target, layers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.gpu
def test_across_gpus(path: Path) -> None:
    devices = (torch.device("cuda", 0), torch.device("cuda", 1))
    layers = filled_layers(devices[0], sliding_device=devices[1])
    save(path, layers)
    target = filled_layers(devices[1], 5, sliding_device=devices[0])
    with open_layers(path) as file:
        file.load(target)
    assert_same_layers(target, layers)


@needs_gpu
@pytest.mark.gpu
def test_not_during_capture(path: Path) -> None:
    layers = filled_layers(torch.device("cuda"))
    save(path, layers)
    (full, _), _, _ = layers
    new = torch.randn(3, 1, 2, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with open_layers(path) as file, torch.cuda.graph(graph):
        full.append(0, new, new)
        with pytest.raises(RuntimeError, match=r"^Fp16Cache\.save: a file cannot be part of a CUDA graph"):
            save(path, layers)
        with pytest.raises(RuntimeError, match=r"^Fp16Cache\.load: a file cannot be part of a CUDA graph"):
            file.load(layers)
    with open_layers(path) as file:
        file.load(layers)
    assert full.position == 14
    graph.replay()
    assert full.position == 15
