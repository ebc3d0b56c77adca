"""The memory check at construction: before anything is allocated, with the numbers that help."""

from __future__ import annotations

import dataclasses
import gc
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, needs_gpu

from kvcache_ext import StreamingKVCacheFp16, memory

SHAPE = {"num_layers": 2, "batch_size": 1, "num_heads": 2, "head_dim": 8}
BYTES_PER_POSITION = 2 * 2 * 8 * 2 * 2
BESIDE = (3 * 2 + 2) * 8 + memory.workspace_floats(torch.device("cpu"), 8, 1) * 4  # state, counters, workspace


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("no")])
@pytest.mark.parametrize("which", [0, 1])
def test_an_allocation_that_fails_all_the_same(
    error: Exception, which: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left, also while the exception is: its traceback holds on to frames and to what they hold."""
    if device.type == "cuda" and type(error) is RuntimeError:
        pytest.skip("on a GPU that is no lack of memory")
    real, made = torch.empty, []

    def failing(*arguments: Any, **named: Any) -> torch.Tensor:
        if len(made) == which:
            raise error
        tensor = real(*arguments, **named)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", failing)
    with pytest.raises(MemoryError) as raised:
        StreamingKVCacheFp16(max_positions=100, device=device, **SHAPE)
    assert len(made) == which and all(tensor() is None for tensor in made)
    sentence = str(raised.value)
    assert re.fullmatch(
        r"StreamingKVCacheFp16: 0\.\d\d GB could not be allocated on \S+, although \S+ GB are free "
        r"\(in pieces .*\); nothing of it is kept",
        sentence,
    ), sentence
    monkeypatch.setattr(torch, "empty", real)
    StreamingKVCacheFp16(max_positions=100, device=device, **SHAPE)


@needs_gpu
@pytest.mark.gpu
def test_another_error_of_a_gpu_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **named: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        StreamingKVCacheFp16(max_positions=100, device="cuda", **SHAPE)


def test_the_plan_of_the_7b_cache() -> None:
    plan = StreamingKVCacheFp16.plan(32, 65_536, 32, 128, free_bytes=48 * 10**9, weights_bytes=4 * 10**9)
    assert plan.cache_bytes == 34_359_738_368
    assert plan.fp32_bytes == 68_719_476_736
    assert 0 < plan.workspace_bytes < 13 * 10**6 and 0 < plan.beside_bytes < 40 * 10**6
    assert plan.total_bytes == plan.cache_bytes + plan.state_bytes + plan.workspace_bytes + plan.rounding_bytes
    assert plan.fits is True and plan.largest_batch_size == 1
    assert plan.largest_max_positions == (44 * 10**9 - plan.beside_bytes) // 524_288
    assert plan == memory.plan(32, 65_536, 32, 128, free=48 * 10**9, weights_bytes=4 * 10**9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.batch_size = 2  # type: ignore[misc]


def test_a_plan_without_free_memory() -> None:
    plan = StreamingKVCacheFp16.plan(2, 10, 2, 8)
    assert plan.free_bytes is plan.fits is plan.largest_max_positions is plan.largest_batch_size is None


@pytest.mark.parametrize("weights", [0, 12_345, 10**7])
def test_a_plan_is_what_construction_goes_by(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that it names fit, and one more does not, in the plan and in construction."""
    free = 10_000_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: free - weights)
    shape = {"num_layers": 2, "max_positions": 50, "num_heads": 2, "head_dim": 8, "batch_size": 3}
    plan = StreamingKVCacheFp16.plan(**shape, device="cpu", free_bytes=free, weights_bytes=weights)
    for name, largest in (("max_positions", plan.largest_max_positions), ("batch_size", plan.largest_batch_size)):
        assert largest is not None
        for number in (largest, largest + 1):
            fits = number == largest
            if number == 0:
                continue
            other = shape | {name: number}
            again = StreamingKVCacheFp16.plan(**other, device="cpu", free_bytes=free, weights_bytes=weights)
            assert again.fits is fits
            if fits:
                StreamingKVCacheFp16(**other, device="cpu")
            else:
                with pytest.raises(MemoryError):
                    StreamingKVCacheFp16(**other, device="cpu")
    assert (plan.largest_max_positions == 0) == (weights == 10**7)


def test_a_plan_allocates_nothing_and_looks_at_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("something was allocated"))
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("something was allocated"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 123_456_789)
    plan = StreamingKVCacheFp16.plan(1000, 10**9, 32, 128, device=device)
    assert plan.free_bytes == 123_456_789 and plan.fits is False and plan.largest_batch_size == 0
    assert plan.device == str(device)
    assert plan.workspace_bytes == 4 * memory.workspace_floats(device, 128, batch_size=1)
    assert (plan.rounding_bytes == 0) == (device.type == "cpu")


def test_a_plan_counts_what_a_cache_allocates(device: torch.device) -> None:
    plan = StreamingKVCacheFp16.plan(2, 100, 2, 8, batch_size=3, device=device)
    cache = StreamingKVCacheFp16(2, 100, 2, 8, batch_size=3, device=device)
    assert plan.cache_bytes == cache.memory_bytes() == cache.k_cache.nbytes + cache.v_cache.nbytes
    assert plan.state_bytes == cache.tensors.state.nbytes + cache.tensors.overflow_counts.nbytes
    assert plan.workspace_bytes == cache.tensors.workspace.nbytes


@pytest.mark.parametrize("head_dim", [12, 520, 2_000_003])
def test_no_workspace_for_attention_that_is_refused(head_dim: int) -> None:
    """It would take 142 GB on an H200 for the last."""
    assert StreamingKVCacheFp16.plan(1, 1, 1, head_dim).workspace_bytes < 5_000
    cache = StreamingKVCacheFp16(1, 2, 1, head_dim, device="cpu")
    cache.append(0, torch.ones(head_dim), torch.ones(head_dim))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        cache.attend(0, torch.ones(1, head_dim))


# A GPU of 4 GB, whoever else is on it: PyTorch's allocator gives no more, and the driver knows of no more.
SMALL_GPU = """
import torch
from kvcache_ext import StreamingKVCacheFp16, memory

device, total = torch.device("cuda", 0), 4 * 10**9
torch.cuda.mem_get_info = lambda device: (total - torch.cuda.memory_reserved(device), total)
torch.cuda.set_per_process_memory_fraction((total + 1) / torch.cuda.get_device_properties(device).total_memory, device)
"""


def run_on_small_gpu(code: str) -> None:
    """In a process of its own, whose allocator holds nothing yet."""
    subprocess.run([sys.executable, "-c", SMALL_GPU + textwrap.dedent(code)], check=True, cwd=ROOT)


@needs_gpu
@pytest.mark.gpu
def test_the_largest_that_fits_a_gpu_can_be_had() -> None:
    """To the last position, what the allocator rounds up included."""
    run_on_small_gpu("""
        largest = StreamingKVCacheFp16.plan(3, 1000, 7, 128, device=device).largest_max_positions
        assert largest > 300_000
        cache = StreamingKVCacheFp16(3, largest - 20_000, 7, 128, device=device)
        rest = StreamingKVCacheFp16.plan(3, 1000, 7, 128, device=device).largest_max_positions
        assert 0 < rest <= 20_000
        StreamingKVCacheFp16(3, rest, 7, 128, device=device)
        try:
            torch.empty(total, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("the GPU is larger than it was to be")
    """)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
        ({"max_positions": 1.5}, TypeError, "max_positions must be an int"),
        ({"num_heads": True}, TypeError, "num_heads must be an int"),
        ({"head_dim": -1}, ValueError, "head_dim must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"free_bytes": -1}, ValueError, "free_bytes must be at least 0"),
        ({"free_bytes": 1e9}, TypeError, "free_bytes must be an int"),
        ({"weights_bytes": None}, TypeError, "weights_bytes must be an int"),
        ({"device": "meta"}, ValueError, "device must be a CUDA device or the CPU"),
    ],
)
def test_wrong_arguments_of_a_plan(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        StreamingKVCacheFp16.plan(**{"num_layers": 2, "max_positions": 10, "num_heads": 2, "head_dim": 8} | arguments)


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


@needs_gpu
@pytest.mark.gpu
def test_memory_that_the_allocator_holds_unused_counts_as_free() -> None:
    run_on_small_gpu("""
        before = memory.free_bytes(device)
        block = torch.empty(2**30, dtype=torch.uint8, device=device)
        during = memory.free_bytes(device)
        del block  # stays with PyTorch's allocator
        assert before - during == 2**30 and memory.free_bytes(device) == before
    """)


@needs_gpu
@pytest.mark.gpu
def test_a_cache_larger_than_the_gpu() -> None:
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    positions = torch.cuda.get_device_properties(0).total_memory // (32 * 32 * 128 * 4) + 1000
    with pytest.raises(MemoryError, match=r"GB on cuda:0, which has .* GB free; the largest max_positions"):
        StreamingKVCacheFp16(32, positions, 32, 128)
    assert torch.cuda.memory_allocated() == allocated
