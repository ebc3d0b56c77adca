"""How much memory a cache takes, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import torch

BYTES_PER_ELEMENT = 2  # FP16
GB = 10**9


def cache_bytes(num_layers: int, batch_size: int, max_positions: int, num_heads: int, head_dim: int) -> int:
    """The bytes of keys and values: `layers * batch * positions * heads * head_dim`, two tensors, two bytes each."""
    return num_layers * batch_size * max_positions * num_heads * head_dim * 2 * BYTES_PER_ELEMENT


def workspace_floats(device: torch.device, head_dim: int) -> int:
    """FP32 elements of attention's workspace: 1,024 tickets, and what each block of the largest launch leaves.

    A launch has at most two blocks a multiprocessor that leave anything: up to 8 queries' weighted sums, maxima and
    sums of weights.
    """
    multiprocessors = 0
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return 1024 + 2 * max(multiprocessors, 8) * 8 * (head_dim + 2)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cgroup_room() -> int | None:
    """Bytes left under this process's memory limit, or None where there is none."""
    rooms = []
    for limit, usage, stat in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        most, used = _read_number(limit), _read_number(usage)
        if most is None or used is None:
            continue
        try:  # pages of files that can be dropped count as used, but are there for the asking
            lines = (line.split() for line in Path(stat).read_text().splitlines())
            reclaimable = sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))
        except (OSError, ValueError):
            reclaimable = 0
        rooms.append(most - max(used - reclaimable, 0))
    return min(rooms) if rooms else None


def free_bytes(device: torch.device) -> int | None:
    """The bytes that can be allocated on `device`, or None where that cannot be found out.

    On a GPU: what the driver has free and what PyTorch's allocator holds unused. On a CPU: what the machine has
    available, or its cgroup's limit leaves, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(unused)
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    room = _cgroup_room()
    numbers = [number for number in (available, room) if number is not None]
    return min(numbers) if numbers else None


def check_fits(
    num_layers: int, batch_size: int, max_positions: int, num_heads: int, head_dim: int, device: torch.device
) -> None:
    """Raises MemoryError, before anything is allocated, when the cache does not fit on `device`."""
    needed = cache_bytes(num_layers, batch_size, max_positions, num_heads, head_dim)
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    per_position = cache_bytes(num_layers, batch_size, 1, num_heads, head_dim)
    raise MemoryError(
        f"StreamingKVCacheFp16: a cache of {max_positions} positions needs {needed / GB:.2f} GB on {device}, which has "
        f"{free / GB:.2f} GB free; the largest max_positions that fits is {max(free, 0) // per_position}"
    )
