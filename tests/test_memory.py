"""The memory check at construction: before anything is allocated, with the numbers that help."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU

from kvcache_ext import StreamingKVCacheFp16, memory

SHAPE = {"num_layers": 2, "batch_size": 1, "num_heads": 2, "head_dim": 8}
BYTES_PER_POSITION = 2 * 2 * 8 * 2 * 2
BESIDE = (3 * 2 + 2) * 8 + memory.workspace_floats(torch.device("cpu"), 8) * 4  # state, counters, workspace


def test_bytes() -> None:
    assert memory.cache_bytes(32, 1, 65_536, 32, 128) == 34_359_738_368


def test_free_memory_is_plausible(device: torch.device) -> None:
    free = memory.free_bytes(device)
    assert free is not None
    total = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    )
    assert 0 < free <= total


def test_a_cache_that_just_fits_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * BYTES_PER_POSITION + BESIDE + 1)
    cache = StreamingKVCacheFp16(max_positions=100, device="cpu", **SHAPE)
    assert cache.memory_bytes() == 100 * BYTES_PER_POSITION
    allocated = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a))
    with pytest.raises(MemoryError) as raised:
        StreamingKVCacheFp16(max_positions=101, device="cpu", **SHAPE)
    assert not allocated
    for words in ("101 positions", "needs 0.00 GB", "0.00 GB free", "largest max_positions that fits is 100"):
        assert words in str(raised.value)


def test_the_7b_cache_on_a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * 10**9)
    with pytest.raises(MemoryError) as raised:
        StreamingKVCacheFp16(32, 65_536, 32, 128, device="cpu")
    assert "needs 34.36 GB on cpu, which has 24.00 GB free" in str(raised.value)
    assert "fits is 45776" in str(raised.value)


def test_unknown_free_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    StreamingKVCacheFp16(max_positions=10, device="cpu", **SHAPE)


@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_limits_count(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"/proc/self/cgroup": "5:cpu:/a\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n"}
    files = {
        1: {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "700000",
            "/sys/fs/cgroup/memory/memory.stat": "cache 5\ninactive_file 150000\nactive_file 50000\n",
        },
        2: {
            "/sys/fs/cgroup/memory.max": "1000000",
            "/sys/fs/cgroup/memory.current": "700000",
            "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 150000\nactive_file 50000\n",
        },
    }[version] | {"/proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable:    8888888 kB\n"}

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.free_bytes(torch.device("cpu")) == 1_000_000 - 700_000 + 200_000
    # A group of this process's own has less left than the root's.
    files |= group
    inner = "/sys/fs/cgroup/memory/a/memory" if version == 1 else "/sys/fs/cgroup/a/memory"
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    files |= {f"{inner}.{names[0]}": "500000", f"{inner}.{names[1]}": "400000"}
    assert memory.free_bytes(torch.device("cpu")) == 100_000
    files.pop(f"{inner}.{names[0]}")
    files.pop("/sys/fs/cgroup/memory.max", None)
    files.pop("/sys/fs/cgroup/memory/memory.limit_in_bytes", None)
    assert memory.free_bytes(torch.device("cpu")) == 8_888_888 * 1024


@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")
@pytest.mark.gpu
def test_memory_that_the_allocator_holds_unused_counts_as_free() -> None:
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = memory.free_bytes(device)
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    during = memory.free_bytes(device)
    del block  # stays with PyTorch's allocator
    after = memory.free_bytes(device)
    assert before is not None and during is not None and after is not None
    assert before - during >= 2**30 - 2**25
    assert abs(after - before) < 2**25


@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")
@pytest.mark.gpu
def test_a_cache_larger_than_the_gpu() -> None:
    free = memory.free_bytes(torch.device("cuda"))
    assert free is not None
    allocated = torch.cuda.memory_allocated()
    positions = free // (32 * 32 * 128 * 4) + 1000
    with pytest.raises(MemoryError, match=r"GB on cuda:0, which has .* GB free; the largest max_positions"):
        StreamingKVCacheFp16(32, positions, 32, 128)
    assert torch.cuda.memory_allocated() == allocated
