"""save and load: what comes back, other readers, wrong files, and what an end in the middle leaves."""

from __future__ import annotations

import base64
import copy
import errno
import json
import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Backend, assert_same_bits, make_cache, needs_gpu
from saved import LateBuffers, assert_same_held, contents, fill, header_of, held, peak_memory, rows

from kvcache_ext import StreamingKVCacheFp16, memory, version
from kvcache_ext.files import transfer
from kvcache_ext.tensors import CacheTensors

LAYERS, HEADS, HEAD_DIM = 2, 2, 8


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are no multiple of a row (32 bytes here), so that small caches have many."""
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


# Round trips


def _special(cache: StreamingKVCacheFp16) -> None:
    new = rows(cache, 5)
    new.view(-1)[:8] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e6, -7e4, 1e-7, -0.0, 65_504.0])
    cache.append(1, new, -new)


def _layers_apart(cache: StreamingKVCacheFp16) -> None:
    cache.append(1, rows(cache, 13), rows(cache, 13, 1))


def _truncated(cache: StreamingKVCacheFp16, n: int) -> None:
    fill(cache, 21)
    cache.truncate(n)


def _partly_reset(cache: StreamingKVCacheFp16) -> None:
    fill(cache, 11)
    cache.reset([1])
    cache.append(0, rows(cache, 3)[:1], rows(cache, 3)[:1], sequences=[1])


CASES: dict[str, tuple[dict[str, Any], Callable[[StreamingKVCacheFp16], None]]] = {
    "empty": ({}, lambda cache: None),
    "a few": ({}, lambda cache: fill(cache, 3)),
    "full": ({}, lambda cache: fill(cache, 8)),
    "wrapped": ({}, lambda cache: fill(cache, 21)),
    "sinks": ({"sink_positions": 3}, lambda cache: fill(cache, 21)),
    "fewer than sinks": ({"sink_positions": 3}, lambda cache: fill(cache, 2)),
    "sinks and no more": ({"sink_positions": 7}, lambda cache: fill(cache, 30)),
    "truncated after a wrap": ({"sink_positions": 3}, lambda cache: _truncated(cache, 5)),
    "truncated into sinks": ({"sink_positions": 3}, lambda cache: _truncated(cache, 2)),
    "truncated to nothing": ({"sink_positions": 3}, lambda cache: _truncated(cache, 0)),
    "layers apart": ({"sink_positions": 1}, _layers_apart),
    "ragged": ({"batch_size": 4, "sink_positions": 1}, lambda cache: fill(cache, 13, 0, [13, 0, 5, 1])),
    "partly reset": ({"batch_size": 2}, _partly_reset),
    "special values": ({}, _special),
    "special values as inf": ({"overflow": "inf"}, _special),
    "one number a row": ({"num_heads": 1, "head_dim": 1, "max_positions": 5}, lambda cache: fill(cache, 7)),
    "one slot": ({"max_positions": 1}, lambda cache: fill(cache, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(backend: Backend, name: str, path: Path, small_blocks: None) -> None:
    arguments, use = CASES[name]
    cache = make_cache(backend, **arguments)
    use(cache)
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=backend.device)
    assert repr(loaded) == repr(cache)
    assert_same_held(loaded, cache)
    for seed in (1, 2):  # and both go on alike
        for c in (cache, loaded):
            fill(c, 3, seed)
        assert_same_held(loaded, cache)
    query = rows(cache, 1, 9)
    if cache.head_dim % 8 == 0:
        assert_same_bits(loaded.attend(1, query), cache.attend(1, query))
    for c in (cache, loaded):
        c.truncate(1)
    assert_same_held(loaded, cache)


def test_blocks_of_the_usual_size(device: torch.device, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StreamingKVCacheFp16(2, 700, 8, 128, batch_size=6, device=device, sink_positions=2)
    fill(cache, 900, 0, [900, 0, 1, 400, 701, 899])
    assert cache.memory_bytes() > 4 * transfer.BLOCK_BYTES
    monkeypatch.setattr(transfer, "SYNC_BLOCKS", 2)
    cache.save(path)
    assert_same_held(StreamingKVCacheFp16.load(path, device=device), cache)


def test_bits_survive_with_their_nan_payloads(device: torch.device, path: Path) -> None:
    cache = make_cache(device, num_layers=1, max_positions=64, num_heads=4, head_dim=256)
    fill(cache, 64)
    every = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16).to(device)
    cache.k_cache.view(-1).copy_(every)
    cache.v_cache.view(-1).copy_(every.flip(0))
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device)
    for got, want in ((loaded.k_cache, cache.k_cache), (loaded.v_cache, cache.v_cache)):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_many_short_sequences(device: torch.device, path: Path) -> None:
    """More pieces of memory in one block than one system call takes."""
    cache = make_cache(device, batch_size=1500, max_positions=2)
    fill(cache, 1)
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device)
    for layer in range(LAYERS):
        assert_same_bits(loaded.get_valid_f32(layer)[1], cache.get_valid_f32(layer)[1])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("there, back", [("cpu", "cuda"), ("cuda", "cpu")])
def test_from_device_to_device(there: str, back: str, path: Path, small_blocks: None) -> None:
    cache = make_cache(torch.device(there), batch_size=2, sink_positions=1)
    fill(cache, 13, 0, [13, 4])
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=back)
    assert loaded.device.type == back
    assert_same_held(loaded, cache)


def test_counters_and_policy_come_back(device: torch.device, path: Path) -> None:
    cache = make_cache(device, overflow="inf")
    _special(cache)
    assert cache.overflow_counts().tolist() == [0, 4]
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device)
    assert loaded.overflow == "inf" and loaded.overflow_counts().tolist() == [0, 4]
    _special(loaded)
    assert loaded.overflow_counts().tolist() == [0, 8]


def test_positions_beyond_32_bits(device: torch.device, path: Path) -> None:
    cache = make_cache(device, sink_positions=1)
    fill(cache, 8)
    cache.tensors.state[:2] += 7 * 2**35  # seven slots beside the sink: every position stays in its slot
    cache._take(cache.tensors)
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device)
    assert loaded.position == 8 + 7 * 2**35
    assert_same_held(loaded, cache)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_way_of_a_gpu(
    name: str, count: int, path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """With copies as late as they may be, it writes the same bytes and reads them back, here and into fewer slots."""
    arguments, use = CASES[name]
    cache = make_cache(torch.device("cpu"), **arguments)
    use(cache)
    cache.save(path)
    data = path.read_bytes()
    monkeypatch.setattr(transfer, "BUFFERS", count)
    slots = (cache.max_positions, max(cache.max_positions // 2, cache.sink_positions + 1))
    usual = [StreamingKVCacheFp16.load(path, device="cpu", max_positions=n) for n in slots]
    monkeypatch.setattr(transfer, "block_memory", LateBuffers)
    cache.save(path)
    assert path.read_bytes() == data
    for n, want in zip(slots, usual, strict=True):
        assert_same_held(StreamingKVCacheFp16.load(path, device="cpu", max_positions=n), want)


# Other sizes


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("seen", [0, 2, 6, 12, 40])
@pytest.mark.parametrize("slots", [4, 5, 11])
def test_fewer_slots(device: torch.device, sinks: int, seen: int, slots: int, path: Path, small_blocks: None) -> None:
    """As if the positions had been appended to a cache of that size, one by one."""
    shape = {"batch_size": 2, "sink_positions": sinks}
    cache, smaller = (make_cache(device, max_positions=n, **shape) for n in (12, slots))
    for position in range(seen):
        for c in (cache, smaller):
            fill(c, 1, position, [1, int(position % 2 == 0)])
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device, max_positions=slots)
    assert loaded.max_positions == slots
    assert_same_held(loaded, smaller)
    for position in range(100, 107):
        for c in (loaded, smaller):
            fill(c, 1, position)
        assert_same_held(loaded, smaller)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("seen", [0, 2, 6, 8, 29])
@pytest.mark.parametrize("slots", [9, 17, 100])
def test_more_slots(device: torch.device, sinks: int, seen: int, slots: int, path: Path, small_blocks: None) -> None:
    """What was evicted stays so; what is appended from then on is evicted by the new size."""
    cache = make_cache(device, sink_positions=sinks)
    fill(cache, seen)
    cache.save(path)
    loaded = StreamingKVCacheFp16.load(path, device=device, max_positions=slots)
    assert torch.equal(loaded.tensors.state, cache.tensors.state)
    positions = held(cache, 0, 0)
    model = dict(zip(positions, contents(cache, 0, 0)[0].cpu(), strict=True))
    for step in range(2 * slots):
        assert sorted(model) == held(loaded, 0, 0)
        want = torch.stack([model[p] for p in sorted(model)]) if model else torch.empty(0, HEADS, HEAD_DIM).half()
        assert_same_bits(contents(loaded, 0, 0)[0].cpu(), want)
        fill(loaded, 1, 50 + step)
        model[seen + step] = rows(loaded, 1, 100 * (50 + step))[0, 0].half().cpu()
        evictable = [p for p in sorted(model) if p >= sinks]
        if len(evictable) > slots - sinks:
            del model[evictable[0]]


def test_no_room_for_the_sinks(path: Path) -> None:
    make_cache(torch.device("cpu"), sink_positions=3).save(path)
    with pytest.raises(ValueError, match=r"max_positions must be more than the 3 sink positions of .*, got 3"):
        StreamingKVCacheFp16.load(path, device="cpu", max_positions=3)


# Other readers


def test_safetensors_reads_it(device: torch.device, path: Path, small_blocks: None) -> None:
    safetensors = pytest.importorskip("safetensors")
    cache = make_cache(device, batch_size=3, sink_positions=1)
    fill(cache, 13, 0, [13, 0, 5])
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "kvcache_ext" and metadata["version"] == "1"
        assert metadata["writer"].startswith("kvcache_ext ")
        for name in ("num_layers", "batch_size", "max_positions", "num_heads", "head_dim", "sink_positions"):
            assert int(metadata[name]) == getattr(cache, name)
        assert metadata["overflow"] == "saturate"
        assert torch.equal(file.get_tensor("seen"), cache.tensors.state[0].cpu())
        assert torch.equal(file.get_tensor("first"), cache.tensors.state[1].cpu())
        assert torch.equal(file.get_tensor("overflow_counts"), cache.overflow_counts().cpu())
        lengths = file.get_tensor("lengths")
        assert lengths.tolist() == [[8, 0, 5]] * 2
        names = {"seen", "first", "lengths", "overflow_counts", "checksums"}
        for layer in range(LAYERS):
            for which, name in enumerate((f"keys.{layer}", f"values.{layer}")):
                names.add(name)
                parts = file.get_tensor(name).split(lengths[layer].tolist())
                for b, part in enumerate(parts):
                    assert_same_bits(part, contents(cache, layer, b)[which].cpu().view(part.shape))
        assert set(file.keys()) == names
        checksums = file.get_tensor("checksums").tolist()
    data = path.read_bytes()
    end = len(data) - 4 * len(checksums)
    start = 8 + struct.unpack("<Q", data[:8])[0] + (3 * LAYERS * 3 + LAYERS) * 8
    blocks = [data[i : min(i + 100, end)] for i in range(start, end, 100)]
    assert checksums == [zlib.crc32(part) for part in (data[:start], *blocks)]


def test_safetensors_reads_an_empty_one(path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    make_cache(torch.device("cpu")).save(path)
    tensors = safetensors.load_file(path)
    assert tensors["keys.1"].shape == (0, HEADS, HEAD_DIM)


# A file of version 1 as the release 0.1.0 wrote it: zlib, base 85.
VERSION_1 = """
c-ozkziZn-6vwah2VDwTx*N?$&@Y4%TF_L|#0Cv&6g3T!Y@aG&>j&1^v6}>L%;>ey!CP1V0WE0gP!bz5hzPCS`WJM`&^zN6JB<tRTb}N#_x-&0
bW$IJS)6dT9U|;DUF_O6w|&BSaVK;!x6QSB4Y%PV8}%^<xgP4IK^#$Cpr_+bfKg|;sKRdwn>>9Pbwj)D4yb_^h*YS%xZ&Gr@BvXlqC)8Q?IcbE
Oo^;Wox6PGHq&_v_G~wUaL!1BsI}x_HT8DfXxa4vMl*$H-D5hb*N%^=5JVn#My&`%Y_ldFBy57$ip+q%%T9+Pl#U=b+duZa6k&=w<e{t{QL7hp
QhZOZtimmYncFCOkNxzX_ALbpvdsK{HnAIVH^Tqp{7az-C@4I`w9p`>_p;!AB`6DSL4pFj3!(5(6hwyTx$Q1m3qk=<ROG*N2x}k|8A^h(Fvl7Y
3V@O_yHonRHd<*nT>7AIByoWv-vLlmD5-RjvkHr6U^yPo^D6zxJU_UVSLshza8~J$Ze<!Tz%JPZdt?t(wJND*RZ!Dvq?XmdDLB;(-EfS=AjZ%b
8Dk?et_(oH7jQu?z$Li^6Kz5!*#u0rDVb(da070%T+f|6$w@xUNBKC<@~d3i*Y|<BVOC7u)J)xU%)}(-&>Wd#bJoY&v2^ReaxC9UtiDC8b4$C{
uR*a<R0_V(3cYZOq#(tx7!~7U)~DPl_41%}O216Xeo4yn^5f^`5A^)&_fIdsiSOS2{Pi0WoM-R
"""


def test_a_file_of_version_1(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """Files that were saved once can be loaded for ever; and as long as it is version 1, bytes are the same."""
    path.write_bytes(zlib.decompress(base64.b85decode(VERSION_1.replace("\n", ""))))
    shape = {"max_positions": 8, "num_heads": 1, "head_dim": 2, "batch_size": 3, "sink_positions": 1}
    cache = make_cache(torch.device("cpu"), overflow="inf", **shape)
    for layer in range(LAYERS):
        new = torch.arange(3 * 13 * 2).view(3, 13, 1, 2) + 100.0 * layer
        new[0, -1] = 70_000.0
        cache.append(layer, new, -new, new_lengths=torch.tensor([13, 0, 5]))
    loaded = StreamingKVCacheFp16.load(path, device="cpu")
    assert repr(loaded) == repr(cache)
    assert_same_held(loaded, cache)
    monkeypatch.setattr(version, "__version__", "0.1.0")
    cache.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_held_positions_and_nothing_else(path: Path) -> None:
    cache = make_cache(torch.device("cpu"), num_layers=1, max_positions=100_000)
    fill(cache, 10)
    cache.save(path)
    assert path.stat().st_size < 2000 + 10 * 2 * HEADS * HEAD_DIM * 2


def test_the_same_cache_makes_the_same_file(tmp_path: Path) -> None:
    cache = make_cache(torch.device("cpu"), sink_positions=1)
    fill(cache, 20)
    copies = [cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for i, c in enumerate(copies):
        c.save(tmp_path / str(i))
    copies[0].save(tmp_path / "3")
    StreamingKVCacheFp16.load(tmp_path / "0", device="cpu").save(tmp_path / "4")
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1


def test_a_loaded_cache_is_a_cache(device: torch.device, path: Path) -> None:
    """Copied, pickled, cleared, reordered, under inference mode and outside."""
    cache = make_cache(device, batch_size=2)
    fill(cache, 13, 0, [13, 4])
    with torch.inference_mode():
        cache.save(path)
        loaded = StreamingKVCacheFp16.load(path, device=device)
        assert_same_held(loaded, cache)
    for c in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded):
        assert_same_held(c, cache)
    cache.reorder([1, 0])
    loaded.reorder([1, 0])
    assert_same_held(loaded, cache)
    loaded.clear()
    assert loaded.is_empty() and loaded.position == 0


def test_short_transfers(path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """The system may write and read less than it was asked to."""
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: os.pwrite(fd, parts[0][:7], offset))

    def preadv(fd: int, parts: list[memoryview], offset: int) -> int:
        data = os.pread(fd, min(11, len(parts[0])), offset)
        parts[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", preadv)
    cache = make_cache(torch.device("cpu"), sink_positions=1)
    fill(cache, 20)
    cache.save(path)
    assert_same_held(StreamingKVCacheFp16.load(path, device="cpu"), cache)


# Wrong files


def load_fails(path: Path, words: str = "", kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as raised:
        StreamingKVCacheFp16.load(path, device="cpu")
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500


@pytest.fixture
def saved(path: Path, small_blocks: None) -> Path:
    cache = make_cache(torch.device("cpu"), num_layers=1, batch_size=2, sink_positions=1)
    fill(cache, 11, 0, [11, 4])
    cache.save(path)
    return path


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*arguments: object, **named: object) -> None:
        raise AssertionError("something was allocated")

    monkeypatch.setattr(CacheTensors, "allocate", allocate)


def test_truncated_anywhere(saved: Path, no_allocation: None) -> None:
    data = saved.read_bytes()
    for size in range(len(data)):
        saved.write_bytes(data[:size])
        load_fails(saved, "is truncated" if size >= 8 else "is not a file of")
    saved.write_bytes(data + b"\0")
    load_fails(saved, "has something behind its end")


def test_any_bit_flipped(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    for i in range(len(data)):
        data[i] ^= 1 << i % 8
        saved.write_bytes(data)
        load_fails(saved)
        data[i] ^= 1 << i % 8
    saved.write_bytes(data)
    StreamingKVCacheFp16.load(saved, device="cpu")


def test_damaged_rows_are_named(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0] + (3 * 2 + 1) * 8
    data[start + 350] ^= 1
    saved.write_bytes(data)
    load_fails(saved, f"is damaged: its bytes {start + 300:,} to {start + 399:,} are not those that were saved")


def write_file(path: Path, header: object, rest: bytes, state_bytes: int = (3 * 2 + 1) * 8) -> None:
    """With the first checksum right, so that it is not what gives the file away."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    blocks = (len(rest) - state_bytes) // 104  # of 100 bytes and their checksum
    tail = len(rest) - 4 * (1 + blocks + bool((len(rest) - state_bytes) % 104 > 4))
    path.write_bytes(head + rest[:tail] + struct.pack("<I", zlib.crc32(head + rest[:state_bytes])) + rest[tail + 4 :])


def test_the_files_that_tests_write_are_good(saved: Path) -> None:
    write_file(saved, *header_of(saved))
    StreamingKVCacheFp16.load(saved, device="cpu")


METADATA = [
    ("format", "pt", "is not a file of StreamingKVCacheFp16.save"),
    ("format", None, "is not a file of StreamingKVCacheFp16.save"),
    (
        "version",
        "2",
        "has version 2 of the format (written by kvcache_ext 0.1.0), and this kvcache_ext reads version 1",
    ),
    ("version", "0", "gives version as 0"),
    ("version", "x", "gives version as 'x'"),
    ("version", None, "gives version as None"),
    ("num_layers", "0", "gives num_layers as 0"),
    ("num_layers", "2", "has no keys.1, or not its shape"),
    ("num_layers", "9" * 18, "has no keys.1, or not its shape"),
    ("num_layers", "9" * 19, "gives num_layers as"),
    ("num_layers", "-1", "gives num_layers as '-1'"),
    ("num_layers", 1, "gives num_layers as 1"),
    ("batch_size", "3", '"shape": [1, 2]'),
    ("max_positions", "1", "gives sink_positions as 1, and max_positions as 1"),
    ("max_positions", "7", "no cache has the lengths that it gives for layer 0"),
    ("num_heads", "4", "as keys.0, and should have"),
    ("head_dim", "\u0668", "gives head_dim as"),
    ("sink_positions", "0", "no cache has the lengths that it gives"),
    ("overflow", "wrap", "gives overflow as 'wrap'"),
    ("block_bytes", "0", "gives block_bytes as 0"),
    ("block_bytes", "50", "as checksums, and should have"),
    ("block_bytes", str(2**27), "gives block_bytes as"),
    ("overflow", "on\nand" + "on" * 10**5, r"gives overflow as 'on\nandonon"),
]


@pytest.mark.parametrize("name, value, words", METADATA)
def test_wrong_metadata(saved: Path, no_allocation: None, name: str, value: object, words: str) -> None:
    header, rest = header_of(saved)
    header["__metadata__"][name] = value
    if value is None:
        del header["__metadata__"][name]
    write_file(saved, header, rest)
    load_fails(saved, words)


def _without(header: dict[str, Any], name: str) -> None:
    del header[name]


ENTRIES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda h: _without(h, "values.0"), "has null as values.0"),
    (lambda h: _without(h, "keys.0"), "has no keys.0"),
    (lambda h: _without(h, "seen"), "has null as seen"),
    (lambda h: _without(h, "__metadata__"), "is not a file of StreamingKVCacheFp16.save"),
    (lambda h: h["keys.0"].update(dtype="BF16"), '"BF16"'),
    (lambda h: h["keys.0"].update(shape=[12, 8, 2]), "[12, 8, 2]"),
    (lambda h: h["keys.0"].update(shape=[2**63, 2, 8]), "has no keys.0, or not its shape"),
    (lambda h: h["keys.0"].update(shape=[-1, 2, 8]), "has no keys.0, or not its shape"),
    (lambda h: h["keys.0"].update(shape=[True, 2, 8]), "has no keys.0, or not its shape"),
    (lambda h: h["keys.0"].update(shape=[]), "has no keys.0, or not its shape"),
    (lambda h: h["values.0"].update(data_offsets=[0, 8]), "as values.0, and should have"),
    (lambda h: h.update(another={"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}), "has an entry 'another'"),
    (lambda h: h.update({"keys.0": 5}), "has no keys.0, or not its shape"),
    (lambda h: h.update(__metadata__=[]), "is not a file of StreamingKVCacheFp16.save"),
    (lambda h: h.update({"\n" * 10**5: 1}), r"has an entry '\n\n"),
    (lambda h: h["values.0"].update(more="x" * 10**5), "as values.0, and should have"),
    (lambda h: h["__metadata__"].update(version="7", writer="a\nb" + "c" * 10**5), r"(written by a\nbccc"),
]


@pytest.mark.parametrize("change, words", ENTRIES, ids=range(len(ENTRIES)))
def test_wrong_entries(
    saved: Path, no_allocation: None, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    header, rest = header_of(saved)
    change(header)
    write_file(saved, header, rest)
    load_fails(saved, words)


def write_state(path: Path, seen: int, first: int, length: int, rows: int | None = None, overflows: int = 0) -> None:
    """A file that is right in all but, perhaps, the state of sequence 0. Sequence 1 holds 4 positions."""
    rows = length + 4 if rows is None else rows
    header, _ = header_of(path)
    size, begin = rows * 2 * 8 * 2, 7 * 8
    for name in ("keys.0", "values.0"):
        header[name] = {"dtype": "F16", "shape": [rows, 2, 8], "data_offsets": [begin, begin + size]}
        begin += size
    blocks = [bytes(100)] * (2 * size // 100) + [bytes(2 * size % 100)] * (2 * size % 100 > 0)
    checksum_bytes = 4 * (1 + len(blocks))
    header["checksums"] = {
        "dtype": "U32",
        "shape": [1 + len(blocks)],
        "data_offsets": [begin, begin + checksum_bytes],
    }
    state = struct.pack("<7q", seen, 4, first, 1, length, 4, overflows)
    tail = struct.pack(f"<{len(blocks)}I", *map(zlib.crc32, blocks))
    write_file(path, header, state + b"".join(blocks) + bytes(4) + tail)


@pytest.mark.parametrize(
    "seen, first, length", [(11, 4, 8), (0, 1, 0), (1, 1, 1), (2**62 - 1, 2**62 - 8, 8), (11, 11, 1)]
)
def test_possible_lengths(saved: Path, seen: int, first: int, length: int) -> None:
    """So that it is nothing else that gives away the files of the next test."""
    write_state(saved, seen, first, length)
    cache = StreamingKVCacheFp16.load(saved, device="cpu")
    assert cache.tensors.state[:2, 0, 0].tolist() == [seen, first]


@pytest.mark.parametrize(
    "seen, first, length",
    [
        pytest.param(-1, 1, -1, id="seen below 0"),
        pytest.param(2**62, 2**62 - 7, 8, id="seen too large"),
        pytest.param(5, 0, 6, id="first is a sink"),
        pytest.param(11, 3, 9, id="more than the ring has"),
        pytest.param(0, 2, 0, id="first beyond seen"),
        pytest.param(11, 4, 7, id="held is less"),
        pytest.param(11, 4, 9, id="held is more"),
    ],
)
def test_impossible_lengths(saved: Path, no_allocation: None, seen: int, first: int, length: int) -> None:
    """Each breaks one condition, and no other: without that one the file would be loaded."""
    write_state(saved, seen, first, length)
    load_fails(
        saved,
        "is damaged: no cache has the lengths that it gives "
        f"for layer 0: {seen} seen, {first} the first, {length} held",
    )


@pytest.mark.parametrize("rows", [11, 13])
def test_lengths_of_other_rows(saved: Path, no_allocation: None, rows: int) -> None:
    write_state(saved, 11, 4, 8, rows)
    load_fails(saved, f"is damaged: no cache has the lengths that it gives for layer 0: 12 positions, {rows} rows")


def test_impossible_counters(saved: Path, no_allocation: None) -> None:
    write_state(saved, 11, 4, 8, overflows=-1)
    load_fails(saved, "is damaged: it gives -1 overflows for layer 0")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "it has 0 bytes"),
        (b"#!/bin/sh\nexit 0\n", "is not a file of StreamingKVCacheFp16.save"),
        (struct.pack("<Q", 10) + b"          ", "it is not JSON"),
        (struct.pack("<Q", 0) + b"          ", "its header would have 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "its header would have"),
        (struct.pack("<Q", 2) + b"{}", "its metadata does not say format 'kvcache_ext'"),
        (struct.pack("<Q", 2) + b"[]", "its metadata does not say format 'kvcache_ext'"),
        (struct.pack("<Q", 2) + b"\xff\xff", "it is not JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "it is not JSON"),
        (struct.pack("<Q", 100) + b"{}", "is truncated"),
    ],
)
def test_foreign_files(path: Path, no_allocation: None, data: bytes, words: str) -> None:
    path.write_bytes(data)
    load_fails(path, words)


def test_foreign_safetensors(path: Path, no_allocation: None) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.zeros(4)}, path, {"format": "pt"})
    load_fails(path, "is not a file of StreamingKVCacheFp16.save: its metadata does not say format 'kvcache_ext'")
    torch.save({"weight": torch.zeros(4)}, path)
    load_fails(path, "is not a file of StreamingKVCacheFp16.save")


def test_a_file_cut_while_it_is_read(saved: Path) -> None:
    def cut(done: int, total: int) -> None:
        os.truncate(saved, 100)

    with pytest.raises(ValueError, match="was cut short while it was being read"):
        StreamingKVCacheFp16.load(saved, device="cpu", progress=cut)


def test_what_does_not_fit_is_not_allocated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(MemoryError, match="largest max_positions that fits is 0"):
        StreamingKVCacheFp16.load(saved, device="cpu")


@pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_default_device(device: torch.device, path: Path, default: str) -> None:
    """What is made on the host is made there."""
    cache = make_cache(device, batch_size=2)
    fill(cache, 5)
    with torch.device(default):
        cache.save(path)
        loaded = StreamingKVCacheFp16.load(path, device=device)
    assert_same_held(loaded, cache)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_moved_memory_is_not_saved(device: torch.device, path: Path, name: str) -> None:
    cache = make_cache(device)
    fill(cache, 5)
    cache.save(path)
    before = path.read_bytes()
    for change in (lambda t: t.set_(torch.zeros_like(t)), lambda t: t.untyped_storage().resize_(0)):
        moved = copy.deepcopy(cache)
        with torch.no_grad():
            change(getattr(moved, name))
        with pytest.raises(RuntimeError, match=r"^save: the cache's memory has been moved"):
            moved.save(path)
    assert path.read_bytes() == before


# Paths and arguments


class Named:
    def __init__(self, name: object) -> None:
        self.name = name

    def __fspath__(self) -> Any:
        return self.name


def test_kinds_of_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(torch.device("cpu"))
    fill(cache, 5)
    monkeypatch.chdir(path.parent)
    long = "x" * 251 + ".bin"
    for name in (path, str(path), Named(str(path)), "here", Path("there"), "ein Name mit Ümläuten", long):
        cache.save(name)
        assert_same_held(StreamingKVCacheFp16.load(name, device="cpu"), cache)
    assert sorted(os.listdir()) == sorted([path.name, "here", "there", "ein Name mit Ümläuten", long])


@pytest.mark.parametrize("bad", [5, None, b"name", Named(b"name"), Named(5), object()])
def test_paths_of_wrong_types(bad: Any) -> None:
    for call in (make_cache(torch.device("cpu")).save, StreamingKVCacheFp16.load):
        with pytest.raises(TypeError, match=r"^(save|load): path must be a str or an os\.PathLike of one, got "):
            call(bad)


@pytest.mark.parametrize("bad", ["", "a\0b", "newdir/"])
def test_paths_that_are_no_names(bad: str) -> None:
    for call in (make_cache(torch.device("cpu")).save, StreamingKVCacheFp16.load):
        with pytest.raises(ValueError, match="path must be a file's name"):
            call(bad)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    cache = make_cache(torch.device("cpu"))
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(IsADirectoryError, match=r"\] save: path must name a file, not a folder"):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="save: path cannot be written: No such file or directory"):
        cache.save(tmp_path / "no" / "file")
    with pytest.raises(NotADirectoryError, match="save: path cannot be looked at: Not a directory"):
        cache.save(tmp_path / "file" / "file")
    for name in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="save: path must name a regular file or a new one"):
            cache.save(name)
        with pytest.raises(ValueError, match="load: path must name a regular file"):
            StreamingKVCacheFp16.load(name, device="cpu")
    with pytest.raises(IsADirectoryError, match=r"\] load: path must name a file, not a folder"):
        StreamingKVCacheFp16.load(tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match="load: path cannot be read: No such file or directory"):
        StreamingKVCacheFp16.load(tmp_path / "no", device="cpu")
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="save: path cannot be written: Permission denied"):
            make_cache(torch.device("cpu")).save(tmp_path / "file")
    finally:
        tmp_path.chmod(0o700)


def test_wrong_arguments_of_load(saved: Path) -> None:
    for bad in (True, 1.5, "8"):
        with pytest.raises(TypeError, match="load: max_positions must be an int or None, got"):
            StreamingKVCacheFp16.load(saved, device="cpu", max_positions=bad)  # type: ignore[arg-type]
    for number in (-1, 0, 1):
        with pytest.raises(ValueError, match="load: max_positions must be more than the 1 sink positions"):
            StreamingKVCacheFp16.load(saved, device="cpu", max_positions=number)
    with pytest.raises(ValueError, match="device must"):
        StreamingKVCacheFp16.load(saved, device="meta")


def test_wrong_progress(saved: Path) -> None:
    data = saved.read_bytes()
    for call in (make_cache(torch.device("cpu")).save, StreamingKVCacheFp16.load):
        for bad in (1, "yes", []):
            with pytest.raises(TypeError, match="progress must be True, False, None or a function of two ints, got"):
                call(saved, progress=bad)  # type: ignore[operator]
    assert saved.read_bytes() == data


@needs_gpu
@pytest.mark.gpu
def test_not_during_capture(path: Path) -> None:
    cache = make_cache(torch.device("cuda"))
    fill(cache, 3)
    cache.save(path)
    new = rows(cache, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(0, new, new)
        with pytest.raises(RuntimeError, match="save: a file cannot be part of a CUDA graph"):
            cache.save(path)
        with pytest.raises(RuntimeError, match="load: a file cannot be part of a CUDA graph"):
            StreamingKVCacheFp16.load(path)
    graph.replay()  # moves the length where the host does not see it
    cache.save(path)
    assert_same_held(StreamingKVCacheFp16.load(path), cache)


@needs_gpu
@pytest.mark.gpu
def test_on_another_stream(path: Path) -> None:
    cache = StreamingKVCacheFp16(2, 4096, 8, 128)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fill(cache, 5000)
        torch.cuda._sleep(100_000_000)
        fill(cache, 100, 1)
        cache.save(path)
        loaded = StreamingKVCacheFp16.load(path)
        assert_same_held(loaded, cache)


# Ends in the middle


def listing(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_leaves_the_old_file(saved: Path, error: type[BaseException], device: torch.device) -> None:
    data = saved.read_bytes()
    cache = make_cache(device)
    fill(cache, 8)

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        cache.save(saved, progress=fail)
    assert saved.read_bytes() == data and listing(saved) == [saved.name]
    with pytest.raises(error):
        StreamingKVCacheFp16.load(saved, device=device, progress=fail)
    cache.save(saved)
    assert_same_held(StreamingKVCacheFp16.load(saved, device=device), cache)


KILLED = """
import os, signal, sys, torch
from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.files import transfer
transfer.BLOCK_BYTES = 100
cache = StreamingKVCacheFp16(2, 64, 2, 8, device="cpu")
rows = torch.randn(2, 64, 2, 8)
cache.append_all(rows, rows)

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if sys.argv[2] != "fsync" and done >= total * float(sys.argv[2]):
        kill()

if sys.argv[2] == "fsync":  # called when all is written
    os.fsync = kill
cache.save(sys.argv[1], progress=progress)
"""


@pytest.mark.parametrize("share", ["0", "0.5", "1"])
def test_a_killed_save(saved: Path, share: str) -> None:
    data = saved.read_bytes()
    command = [sys.executable, "-c", KILLED, str(saved), share]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert saved.read_bytes() == data
    (left,) = (saved.parent / name for name in listing(saved) if name != saved.name)
    assert left.name.startswith(f".{saved.name}.") and left.suffix == ".tmp"
    load_fails(left, "is truncated")


def test_a_save_killed_when_all_is_written(saved: Path) -> None:
    """What it leaves is whole, and is the new file in all but its name."""
    data = saved.read_bytes()
    command = [sys.executable, "-c", KILLED, str(saved), "fsync"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert saved.read_bytes() == data
    (left,) = (saved.parent / name for name in listing(saved) if name != saved.name)
    assert left.name.startswith(f".{saved.name}.") and left.suffix == ".tmp"
    assert len(StreamingKVCacheFp16.load(left, device="cpu")) == 64


def test_the_new_file_is_synced_before_it_gets_the_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size}")
        fsync(fd)

    def noted_replace(old: Any, new: Any) -> None:
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    StreamingKVCacheFp16.load(saved, device="cpu").save(saved)
    assert calls == [f"file of {saved.stat().st_size}", "rename", "folder"]


def test_mode_and_links_stay(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(saved.name)
    cache = StreamingKVCacheFp16.load(link, device="cpu")
    cache.save(link)
    assert link.is_symlink() and stat.S_IMODE(saved.stat().st_mode) == 0o640
    assert_same_held(StreamingKVCacheFp16.load(saved, device="cpu"), cache)
    before = os.umask(0o027)
    try:
        cache.save(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_full_disk_is_noticed_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StreamingKVCacheFp16.load(saved, device="cpu")
    data = saved.read_bytes()
    real = os.fstatvfs

    def nearly_full(fd: int) -> Any:
        class Room:
            f_bavail, f_frsize, f_blocks = 1, 512, real(fd).f_blocks

        return Room

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    monkeypatch.setattr(os, "pwritev", lambda *a: pytest.fail("something was written"))
    with pytest.raises(OSError, match=r"save: path needs 0\.00 GB, and 0\.00 GB are free on its disk") as raised:
        cache.save(saved)
    assert raised.value.errno == errno.ENOSPC
    assert saved.read_bytes() == data and listing(saved) == [saved.name]


@pytest.mark.parametrize(
    "call, after", [("pwritev", 0), ("pwritev", 5), ("fsync", 0), ("replace", 0), ("fdatasync", 0)]
)
def test_failing_system_calls(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    cache = StreamingKVCacheFp16.load(saved, device="cpu")
    data = saved.read_bytes()
    real, left = getattr(os, call), [after]

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="save: path cannot be written: No space left on device") as raised:
        cache.save(saved)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(saved)
    assert saved.read_bytes() == data and listing(saved) == [saved.name]


def test_a_limit_of_the_system(path: Path) -> None:
    """A real error from the system, in the middle."""
    cache = make_cache(torch.device("cpu"), max_positions=1000)
    fill(cache, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="save: path cannot be written: File too large"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listing(path) == []


def test_saves_to_one_name_at_once(path: Path) -> None:
    caches = [make_cache(torch.device("cpu"), max_positions=n) for n in (50, 60, 70)]
    for cache in caches:
        fill(cache, 100)
    threads = [threading.Thread(target=cache.save, args=(path,)) for cache in caches for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listing(path) == [path.name]
    loaded = StreamingKVCacheFp16.load(path, device="cpu")
    (same,) = (cache for cache in caches if cache.max_positions == loaded.max_positions)
    assert_same_held(loaded, same)


# Progress


def test_progress_as_a_function(saved: Path, device: torch.device) -> None:
    calls: list[tuple[int, int]] = []
    cache = StreamingKVCacheFp16.load(saved, device=device, progress=lambda done, total: calls.append((done, total)))
    total = 2 * 12 * HEADS * HEAD_DIM * 2
    expected = [(min(i, total), total) for i in range(0, total + 100, 100)]
    assert calls == expected
    calls.clear()
    cache.save(saved, progress=lambda done, total: calls.append((done, total)))
    assert calls == expected
    cache.clear()
    calls.clear()
    cache.save(saved, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 0)]


@pytest.fixture(params=[True, False], ids=["tqdm", "lines"])
def with_tqdm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    yield request.param


def test_progress_as_a_bar(saved: Path, with_tqdm: bool, capfd: pytest.CaptureFixture[str]) -> None:
    cache = StreamingKVCacheFp16.load(saved, device="cpu", progress=True)
    shown = capfd.readouterr()
    assert "load cache.safetensors: 100%" in shown.err and shown.out == ""
    cache.save(saved, progress=True)
    assert "save cache.safetensors: 100%" in capfd.readouterr().err
    cache.clear()
    cache.save(saved, progress=True)
    cache.save(saved, progress=False)
    capfd.readouterr()
    cache.save(saved)
    assert capfd.readouterr().err == ""


# Memory


def test_a_save_takes_next_to_no_memory(device: torch.device, path: Path) -> None:
    """Of the host: pinned buffers on a GPU."""
    cache = StreamingKVCacheFp16(4, 16_384, 8, 128, device=device)
    fill(cache, 10_000)
    cache.save(path)  # the threads and their stacks
    taken = peak_memory(lambda: cache.save(path))
    buffers = 10 * transfer.BLOCK_BYTES if device.type == "cuda" else 0
    assert taken < 16 * 2**20 + buffers < cache.memory_bytes()
