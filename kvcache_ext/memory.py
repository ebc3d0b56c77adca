"""How much memory a cache takes, and whether it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES_PER_ELEMENT = 2  # FP16
GB = 10**9

MOST_MULTIPROCESSORS = 192  # no GPU so far has more; for a plan that names no device
# What PyTorch's CUDA allocator may take beyond what it is asked for: keys and values are rounded up to 2 MiB each, and
# what is below 10 MiB comes out of a block of 20 MiB.
CUDA_ROUNDING = 24 * 2**20
# What each GPU takes for exchanging partial answers, where positions are dealt out to several.
EXCHANGE_BYTES = 32 * 10**6


def cache_bytes(num_layers: int, batch_size: int, max_positions: int, num_heads: int, head_dim: int) -> int:
    """The bytes of keys and values: `layers * batch * positions * heads * head_dim`, two tensors, two bytes each."""
    return num_layers * batch_size * max_positions * num_heads * head_dim * 2 * BYTES_PER_ELEMENT


def state_bytes(num_layers: int, batch_size: int) -> int:
    """The bytes of lengths (three int64 for each sequence of each layer) and overflow counters (one for each layer)."""
    return (3 * num_layers * batch_size + num_layers) * 8


WORKSPACE_FLOATS_OF_A_SEQUENCE = 4  # two int64 numbers


def attention_serves(head_dim: int) -> bool:
    """Whether attention kernels take such a head_dim. (Everything else takes any.)"""
    return head_dim % 8 == 0 and head_dim <= 512


def workspace_floats(device: torch.device | None, head_dim: int, batch_size: int) -> int:
    """FP32 elements of attention's workspace: 1,024 counters, two int64 numbers a sequence, and room for partials.

    A partial is a weighted sum, a maximum and a sum of weights, which a later block merges. There is room for those of
    128 queries a multiprocessor (256 queries on a CPU), with head_dim padded to a power of two: 8.8 MB on an H200 with
    head_dim 128. A launch has no more splits than there is room for. There is none where attention does not serve
    head_dim. The two numbers of a sequence say how many of a prompt's positions are stored before attention, and how
    many after it.
    """
    fixed = 1024 + WORKSPACE_FLOATS_OF_A_SEQUENCE * batch_size
    if not attention_serves(head_dim):
        return fixed
    multiprocessors = MOST_MULTIPROCESSORS if device is None else 0
    if device is not None and device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    width = max(64, 1 << (head_dim - 1).bit_length())
    queries = 128 * multiprocessors or 8 * 32
    return fixed + queries * (width + 2)


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


@dataclass(frozen=True)
class Plan:
    """What a cache takes, in bytes, and whether that fits: what `StreamingKVCacheFp16.plan` returns.

    Attributes:
        num_layers, max_positions, num_heads, head_dim, batch_size: the cache's shape, as its constructor takes it.
        cache_bytes: keys and values, `memory_bytes()` of the cache.
        state_bytes: lengths and overflow counters.
        workspace_bytes: attention's workspace.
        rounding_bytes: what PyTorch's CUDA allocator takes beyond that, at most; 0 on a CPU.
        weights_bytes: the model's weights that have yet to go beside the cache.
        device: what was planned for, such as "cuda:0" or "cpu"; None: any GPU.
        free_bytes: what can be allocated before weights and cache; None: not known, and then the last three properties
            are None as well.
    """

    num_layers: int
    max_positions: int
    num_heads: int
    head_dim: int
    batch_size: int
    cache_bytes: int
    state_bytes: int
    workspace_bytes: int
    rounding_bytes: int
    weights_bytes: int
    device: str | None
    free_bytes: int | None

    @property
    def beside_bytes(self) -> int:
        """All that the cache takes beside keys and values."""
        return self.state_bytes + self.workspace_bytes + self.rounding_bytes

    @property
    def total_bytes(self) -> int:
        """All that the cache takes. Weights are not in it."""
        return self.cache_bytes + self.beside_bytes

    @property
    def fp32_bytes(self) -> int:
        """What keys and values would take in FP32."""
        return 2 * self.cache_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the cache and the weights fit into what is free."""
        return None if self.free_bytes is None else self.total_bytes + self.weights_bytes <= self.free_bytes

    @property
    def largest_max_positions(self) -> int | None:
        """The largest `max_positions` that fits, all else equal; 0 where not even one position does."""
        if self.free_bytes is None:
            return None
        room = self.free_bytes - self.weights_bytes - self.beside_bytes
        return max(room, 0) // (self.cache_bytes // self.max_positions)

    @property
    def largest_batch_size(self) -> int | None:
        """The largest `batch_size` that fits, all else equal; 0 where not even one sequence does."""
        if self.free_bytes is None:
            return None
        of_a_sequence = self.cache_bytes // self.batch_size + 3 * self.num_layers * 8
        of_a_sequence += 4 * WORKSPACE_FLOATS_OF_A_SEQUENCE
        fixed = self.total_bytes - self.batch_size * of_a_sequence
        return max(self.free_bytes - self.weights_bytes - fixed, 0) // of_a_sequence


def plan(
    num_layers: int,
    max_positions: int,
    num_heads: int,
    head_dim: int,
    batch_size: int = 1,
    *,
    device: torch.device | None = None,
    free: int | None = None,
    weights_bytes: int = 0,
) -> Plan:
    """The plan of a cache, arguments unchecked. `free` None: what `device` has free, where that is named and known."""
    if free is None and device is not None:
        free = free_bytes(device)
    return Plan(
        num_layers=num_layers,
        max_positions=max_positions,
        num_heads=num_heads,
        head_dim=head_dim,
        batch_size=batch_size,
        cache_bytes=cache_bytes(num_layers, batch_size, max_positions, num_heads, head_dim),
        state_bytes=state_bytes(num_layers, batch_size),
        workspace_bytes=workspace_floats(device, head_dim, batch_size) * 4,
        rounding_bytes=0 if device is not None and device.type == "cpu" else CUDA_ROUNDING,
        weights_bytes=weights_bytes,
        device=None if device is None else str(device),
        free_bytes=free,
    )


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer: `[batch_size, slots, heads, head_dim]` each. `window`: None: full attention."""

    slots: int
    heads: int
    head_dim: int
    window: int | None = None


def plans_of_layers(
    layers: Iterable[LayerShape | None], batch_size: int, *, device: torch.device | None = None
) -> list[Plan]:
    """The plans of the caches that hold these layers, one cache for all layers of one shape. None: no keys and values.

    Nothing is said of free memory.
    """
    alike = Counter(layer for layer in layers if layer is not None)
    return [
        plan(count, shape.slots, shape.heads, shape.head_dim, batch_size, device=device, free=0)
        for shape, count in alike.items()
    ]


def largest_that_fits(bytes_of: Callable[[int], int], room: int) -> int | None:
    """The largest number that takes `room` bytes at most. 0: not even 1 does. None: any number does.

    `bytes_of(number)` never falls as the number grows.
    """
    low, high = 0, 1 << 62
    if bytes_of(high) <= room:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= room else (low, middle)
    return low


def shown_gb(size: int) -> str:
    """Bytes in words: GB of 10^9 bytes, and MB where it is less than 10 MB."""
    return f"{size / GB:,.2f} GB" if size == 0 or size >= GB // 100 else f"{size / 1e6:,.2f} MB"


def check_fits(planned: Plan) -> None:
    """Raises MemoryError, before anything is allocated, when a planned cache does not fit on its device."""
    if planned.fits is False and planned.free_bytes is not None:
        raise MemoryError(
            f"StreamingKVCacheFp16: a cache of {planned.max_positions} positions needs "
            f"{planned.total_bytes / GB:.2f} GB on {planned.device}, which has {planned.free_bytes / GB:.2f} GB free; "
            f"the largest max_positions that fits is {planned.largest_max_positions}"
        )
