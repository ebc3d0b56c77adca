"""Saving a cache to a file and loading it: `StreamingKVCacheFp16.save` and `load`, on a GPU of a whole 7B cache.

Beside them torch.save and torch.load of the same two tensors, and what the machine can do at most, measured in the same
run: a file of the same size written with plain os.write and read with readinto, and copies between pinned memory and
the GPU. There is one file at a time, since two of 34 GB may not fit, and each is removed before the next is begun.

Writing counts until the file is on the disk: an fsync is part of every figure, torch.save's and the plain file's too.
Before reading the file is dropped from the page cache (posix_fadvise after fsync); `storage/load/page_cache` is load
once more without that. What lies below, such as the host of a virtual machine, may have caches of its own.

The host's memory is the peak of the process beyond what it had before the call, pinned buffers added (not all systems
count them), and on a CPU less the tensors that a load is to make.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import (
    ROOT,
    Measurement,
    Results,
    Target,
    Work,
    choose_device,
    device_name,
    fill_random,
    free_bytes,
    on_gpu,
    open_results,
    parser,
    print_measurements,
    progress,
    synchronize,
)

from kvcache_ext import StreamingKVCacheFp16, memory
from kvcache_ext.files import transfer

LARGE = 8 * 10**9  # bytes from which one round is enough, since it takes minutes
CHUNK = 8 * 2**20  # of the plain file
COPIED = 2 * 10**9  # bytes that are copied between host and GPU
TARGETS = {
    "storage/save": Target(1.0, over_peer="torch.save"),
    "storage/load": Target(1.0, over_peer="torch.load"),
    "storage/host_memory/save": Target(1.0, at_least=False),
    "storage/host_memory/load": Target(1.0, at_least=False),
}


def drop_from_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most that is resident while a block runs, beyond what there was before; looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self._before = resident()
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident() - self._before)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident() - self._before)


class Bench:
    """Times are kept for each name, in seconds, and the host's memory, in bytes."""

    def __init__(self, cache: StreamingKVCacheFp16, folder: Path) -> None:
        self.cache = cache
        self.device = cache.device
        self.path = folder / "bench_storage.tmp"
        self.size = cache.memory_bytes()
        self.times: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}

    def timed(self, name: str, work: Work) -> object:
        synchronize(self.device)
        with Peak() as peak:
            start = time.perf_counter()
            answer = work()
            synchronize(self.device)
            self.times.setdefault(name, []).append(time.perf_counter() - start)
        self.peaks[name] = max(self.peaks.get(name, 0), peak.bytes)
        return answer

    @contextlib.contextmanager
    def a_file(self) -> Iterator[None]:
        """The one file that there is."""
        try:
            yield
        finally:
            self.path.unlink(missing_ok=True)
            if on_gpu(self.device):
                torch.cuda.empty_cache()

    def plain(self) -> None:
        block = memoryview(os.urandom(CHUNK))

        def write() -> None:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            left = self.size
            while left > 0:
                left -= os.write(fd, block[: min(left, CHUNK)])
            os.fsync(fd)
            os.close(fd)

        def read() -> None:
            into = bytearray(CHUNK)
            with self.path.open("rb", buffering=0) as file:
                while file.readinto(into):
                    pass

        with self.a_file():
            self.timed("plain write", write)
            drop_from_page_cache(self.path)
            self.timed("plain read", read)

    def ours(self) -> None:
        def load() -> StreamingKVCacheFp16:
            return StreamingKVCacheFp16.load(self.path, device=self.device)

        with self.a_file():
            self.timed("save", lambda: self.cache.save(self.path))
            drop_from_page_cache(self.path)
            loaded = self.timed("load", load)
            assert isinstance(loaded, StreamingKVCacheFp16)
            self._check(loaded.k_cache, loaded.v_cache)
            del loaded
            self.timed("load, page cache", load)

    def torchs(self) -> None:
        tensors = [self.cache.k_cache, self.cache.v_cache]

        def save() -> None:
            with self.path.open("wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

        def load() -> list[torch.Tensor]:
            return torch.load(self.path, map_location=self.device)

        with self.a_file():
            self.timed("torch.save", save)
            drop_from_page_cache(self.path)
            loaded = self.timed("torch.load", load)
            assert isinstance(loaded, list)
            self._check(*loaded)
            del loaded
            self.timed("torch.load, page cache", load)

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The last layer, so that a figure is one of work done."""
        if not torch.equal(keys[-1], self.cache.k_cache[-1]) or not torch.equal(values[-1], self.cache.v_cache[-1]):
            raise RuntimeError("what was loaded is not what was saved: its time means nothing")

    def rate(self, name: str) -> float:
        """GB/s"""
        return self.size / statistics.median(self.times[name]) / 1e9

    def speedup(self, name: str, peer: str) -> float:
        return statistics.median(b / a for a, b in zip(self.times[name], self.times[peer], strict=True))


def bus_rates(device: torch.device) -> tuple[float, float]:
    """GB/s between pinned memory and the GPU: to the host, to the GPU."""
    host = torch.empty(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    repeats = COPIED // host.nbytes

    def rate(copy: Callable[[], object]) -> float:
        copy()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            copy()
        end.record()
        end.synchronize()
        return repeats * host.nbytes / start.elapsed_time(end) / 1e6

    return rate(lambda: host.copy_(there, non_blocking=True)), rate(lambda: there.copy_(host, non_blocking=True))


def add_results(bench: Bench, results: Results, rounds: int) -> None:
    cache = bench.cache
    config = {
        "layers": cache.num_layers,
        "batch": cache.batch_size,
        "positions": cache.max_positions,
        "kv_heads": cache.num_heads,
        "head_dim": cache.head_dim,
        "bytes": bench.size,
        "rounds": rounds,
    }
    ceilings = {"save": bench.rate("plain write"), "load": bench.rate("plain read")}
    for name, rate in (("disk_write", ceilings["save"]), ("disk_read", ceilings["load"])):
        results.add(Measurement(f"storage/ceiling/{name}", rate, "GB/s", config=config))
    if on_gpu(bench.device):
        buses = dict(zip(ceilings, bus_rates(bench.device), strict=True))
        for name, op in (("bus_to_host", "save"), ("bus_to_gpu", "load")):
            results.add(Measurement(f"storage/ceiling/{name}", buses[op], "GB/s", config={"bytes": COPIED}))
        ceilings = {op: min(rate, buses[op]) for op, rate in ceilings.items()}

    def add(name: str, ours: str, peer: str, ceiling: float | None) -> None:
        peers = {peer.partition(",")[0]: bench.rate(peer)}
        speedups = {peer.partition(",")[0]: bench.speedup(ours, peer)}
        results.add(Measurement(name, bench.rate(ours), "GB/s", ceiling, peers, speedups, config))

    add("storage/save", "save", "torch.save", ceilings["save"])
    add("storage/load", "load", "torch.load", ceilings["load"])
    add("storage/load/page_cache", "load, page cache", "torch.load, page cache", None)
    pinned = transfer.BUFFERS * transfer.BLOCK_BYTES if on_gpu(bench.device) else 0
    for op in ("save", "load"):
        made = bench.size if op == "load" and not on_gpu(bench.device) else 0
        peaks = [max(bench.peaks[name] - made, 0) / 1e9 for name in (op, f"torch.{op}")]
        memory_config = config | {"pinned_bytes": pinned}
        results.add(
            Measurement(
                f"storage/host_memory/{op}",
                peaks[0] + pinned / 1e9,
                "GB",
                peers={f"torch.{op}": peaks[1]},
                config=memory_config,
            )
        )


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--layers", type=int, help="(default: 32 on a GPU, 8 on a CPU)")
    p.add_argument("--positions", type=int, help="(default: 65,536 on a GPU, 8,192 on a CPU, as far as that fits)")
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--rounds", type=int, help="(default: 1 for more than 8 GB, else 5)")
    p.add_argument(
        "--folder", type=Path, default=ROOT / "build", help="where the file is to be, on the disk to measure"
    )
    args = p.parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device)

    layers = args.layers or (2 if args.quick else 32 if on_gpu(device) else 8)
    positions = args.positions or (512 if args.quick else 65_536 if on_gpu(device) else 8_192)
    args.folder.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(args.folder)
    a_position = memory.cache_bytes(layers, args.batch, 1, args.heads, args.head_dim)
    # Two caches, or a cache and what torch makes of its file; and one file.
    room = min(0.45 * free_bytes(device), 0.9 * disk.f_bavail * disk.f_frsize)
    if positions * a_position > room:
        positions = int(room / a_position)
        print(f"{positions:,} positions are what fits into memory and onto the disk")

    cache = StreamingKVCacheFp16(layers, positions, args.heads, args.head_dim, batch_size=args.batch, device=device)
    rows = fill_random(torch.empty(args.batch, min(positions, 2_048), args.heads, args.head_dim, device=device))
    for layer in range(layers):
        for start in range(0, positions, rows.shape[1]):
            part = rows[:, : positions - start]
            cache.append(layer, part, part)
    bench = Bench(cache, args.folder)
    rounds = args.rounds or (1 if bench.size > LARGE else 2 if args.quick else 5)
    print(f"{bench.size / 1e9:.2f} GB, {rounds} round{'s' * (rounds > 1)}, in {args.folder}")
    parts: list[Work] = [bench.plain, bench.ours, bench.torchs]
    with progress("storage", rounds * len(parts)) as advance:
        for i in range(rounds):
            for part_of_round in parts[i % len(parts) :] + parts[: i % len(parts)]:
                part_of_round()
                advance(1)
    add_results(bench, results, rounds)
    print_measurements(f"storage, {device_name(device)}", results, TARGETS)
    results.save()


if __name__ == "__main__":
    main()
