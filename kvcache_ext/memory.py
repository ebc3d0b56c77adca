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

    A launch has at most one block a multiprocessor that leaves anything, the weighted sums, maxima and sums of weights
    of up to 16 queries, for head sizes padded to a power of two; or two blocks that leave those of one query.
    """
    multiprocessors = 0
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    width = max(64, 1 << (head_dim - 1).bit_length())
    return 1024 + max(multiprocessors, 8) * 16 * (width + 2)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cgroup_folders() -> list[tuple[Path, bool]]:
    """The folders of this process's memory groups and of those above them, and whether each is of version 1."""
    root = Path("/sys/fs/cgroup")
    found = [(root, False), (root / "memory", True)]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:  # such as "0::/user.slice/some.scope", or in version 1 "4:memory:/some/group"
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            first = controllers != ""
            folder = (root / "memory" if first else root) / path.strip("/")
            found += [(f, first) for f in (folder, *folder.parents) if f.is_relative_to(root) and f != root]
    return list(dict.fromkeys(found))


def _cgroup_room() -> int | None:
    """Bytes left under this process's memory limits, or None where there are none."""
    rooms = []
    for folder, first in _cgroup_folders():
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
        most, used = _read_number(f"{folder}/memory.{limit}"), _read_number(f"{folder}/memory.{usage}")
        if most is None or used is None:
            continue
        try:  # pages of files that can be dropped count as used, but are there for the asking
            lines = (line.split() for line in Path(f"{folder}/memory.stat").read_text().splitlines())
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
    # Beside keys and values: the state, the counters and attention's workspace.
    beside = (3 * num_layers * batch_size + num_layers) * 8 + workspace_floats(device, head_dim) * 4
    needed = cache_bytes(num_layers, batch_size, max_positions, num_heads, head_dim) + beside
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    per_position = cache_bytes(num_layers, batch_size, 1, num_heads, head_dim)
    raise MemoryError(
        f"StreamingKVCacheFp16: a cache of {max_positions} positions needs {needed / GB:.2f} GB on {device}, which has "
        f"{free / GB:.2f} GB free; the largest max_positions that fits is {max(free - beside, 0) // per_position}"
    )
