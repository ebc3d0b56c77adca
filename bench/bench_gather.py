"""Gather: keys and values of one layer of a 7B cache (32 heads, head_dim 128) out of it, FP16 to FP32.

Sweeps the positions read from 1 to 65,536: a range (`get_range_f32` into `out=`) and random positions (`gather` with an
index tensor, into `out=`). Plain torch does the same work in turn with it.

On a GPU throughput is GPU time between events: of eager calls for ranges, which look up lengths on the host and cannot
be captured, launched while the GPU is kept busy so that it never waits for the host; of a replayed CUDA graph for
indices. Layers, positions and outputs rotate. Short gathers are bound by their launch, not by bytes.
"""

from __future__ import annotations

import ceilings
import torch
from common import (
    DTYPES,
    Results,
    Target,
    choose_device,
    compare,
    cpu_sampler,
    device_name,
    eager_sampler,
    fill_random,
    free_bytes,
    measured,
    on_gpu,
    open_results,
    parser,
    print_measurements,
    progress,
    throughput_sampler,
)
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16

HEADS, HEAD_DIM = 32, 128
ROW = HEADS * HEAD_DIM
SIZES = [4**i for i in range(9)]  # 1 to 65,536
MOST_CALLS = 2_048  # in a sample
MOST_EAGER_CALLS = 64  # that the host launches while the GPU sleeps

H200_TARGETS = {"gather/contiguous/65536": Target(4.1), "gather/indices/65536": Target(3.6)}
CPU_TARGETS = {
    "gather/contiguous/16384": Target(1.2, over_peer="copy_"),
    "gather/contiguous/65536": Target(1.2, over_peer="copy_"),
}

Pair = tuple[Tensor, Tensor]  # keys, values


class Bench:
    def __init__(
        self, positions: int, device: torch.device, results: Results, best: ceilings.Ceilings, quick: bool
    ) -> None:
        self.positions = positions
        self.device = device
        self.results = results
        self.best = best
        self.rounds = 3 if quick else 9
        self.layers = 4 if on_gpu(device) else 1
        self.cache = self._full_cache()
        self.k_slots = self.cache.k_cache[:, 0].unbind()  # [positions, H, D] of each layer
        self.v_slots = self.cache.v_cache[:, 0].unbind()

    def _full_cache(self) -> StreamingKVCacheFp16:
        cache = StreamingKVCacheFp16(self.layers, self.positions, HEADS, HEAD_DIM, device=self.device)
        keys, values = (
            fill_random(torch.empty(min(4_096, self.positions), HEADS, HEAD_DIM, device=self.device)) for _ in range(2)
        )
        for layer in range(self.layers):
            for _ in range(0, self.positions, len(keys)):
                cache.append(layer, keys, values)
        return cache

    def _calls(self, rows: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes that a call reads and writes, and how many calls make a sample: 800 MB, on a CPU 200 MB of them."""
        size = rows * ROW * 2 * (2 + dtype.itemsize)
        rotated = 800e6 if on_gpu(self.device) else 200e6
        return size, max(1, min(MOST_CALLS, round(rotated / size)))

    def _outputs(self, rows: int, calls: int, dtype: torch.dtype) -> list[Pair]:
        buffer = torch.empty((2, calls, rows, HEADS, HEAD_DIM), dtype=dtype, device=self.device)
        buffer.zero_()  # a CPU's memory is there from the first round on
        return list(zip(buffer[0].unbind(), buffer[1].unbind(), strict=True))

    def _config(self, calls: int, dtype: torch.dtype) -> dict[str, object]:
        return {
            "layers": self.layers,
            "positions": self.positions,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": str(dtype).removeprefix("torch."),
            "calls": calls,
        }

    def ranges(self, rows: int) -> None:
        size, calls = self._calls(rows, torch.float32)
        calls = min(calls, MOST_EAGER_CALLS) if on_gpu(self.device) else calls
        # (layer, start, end, where to) of each call
        steps = []
        for i, out in enumerate(self._outputs(rows, calls, torch.float32)):
            start = i // self.layers * rows % (self.positions // rows * rows)
            steps.append((i % self.layers, start, start + rows, out))

        def ours() -> None:
            for layer, start, end, out in steps:
                self.cache.get_range_f32(layer, start, end, out=out)

        def torch_copy() -> None:
            for layer, start, end, (keys, values) in steps:
                keys.copy_(self.k_slots[layer][start:end])
                values.copy_(self.v_slots[layer][start:end])

        def torch_float() -> None:
            for layer, start, end, _ in steps:
                self.k_slots[layer][start:end].float()
                self.v_slots[layer][start:end].float()

        # Not as graphs: what was captured would be ranges of these lengths for ever, so get_range_f32 refuses.
        sampler = eager_sampler if on_gpu(self.device) else cpu_sampler
        works = {"ours": ours, "copy_": torch_copy, "float": torch_float}
        timings = compare({peer: sampler(work, calls) for peer, work in works.items()}, self.rounds)
        self.results.add(
            measured(
                f"gather/contiguous/{rows}",
                "TB/s",
                timings,
                lambda seconds: size / seconds / 1e12,
                self.best.widen / 1e12,
                self._config(calls, torch.float32),
            )
        )

    def indices(self, name: str, rows: int, dtype: torch.dtype) -> None:
        size, calls = self._calls(rows, dtype)
        steps = []
        for i, out in enumerate(self._outputs(rows, calls, dtype)):
            chosen = torch.randperm(self.positions, device=self.device)[:rows].clone()
            steps.append((i % self.layers, chosen, out))

        def ours() -> None:
            for layer, chosen, out in steps:
                self.cache.gather(layer, chosen, dtype=dtype, out=out)

        def torch_select() -> None:
            for layer, chosen, _ in steps:
                self.k_slots[layer].index_select(0, chosen).to(dtype)
                self.v_slots[layer].index_select(0, chosen).to(dtype)

        def torch_select_copy() -> None:
            for layer, chosen, (keys, values) in steps:
                keys.copy_(self.k_slots[layer].index_select(0, chosen))
                values.copy_(self.v_slots[layer].index_select(0, chosen))

        select = "index_select, float" if dtype == torch.float32 else "index_select, to"
        works = {"ours": ours, select: torch_select, "index_select, copy_": torch_select_copy}
        timings = compare(
            {peer: throughput_sampler(work, self.device, calls) for peer, work in works.items()}, self.rounds
        )
        ceiling = self.best.widen if dtype == torch.float32 else self.best.copy
        self.results.add(
            measured(
                name,
                "TB/s",
                timings,
                lambda seconds: size / seconds / 1e12,
                ceiling / 1e12,
                self._config(calls, dtype),
            )
        )


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device)
    best = ceilings.measure(device, args.quick)
    best.record(results)

    largest = 4_096 if args.quick else SIZES[-1]
    while largest > 1 and largest * ROW * 28 > 0.7 * free_bytes(device):  # a cache, outputs, what peers allocate
        largest //= 4
    sizes = [size for size in SIZES if size <= largest]
    narrower = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}
    bench = Bench(largest, device, results, best, args.quick)
    with progress("gather", 2 * len(sizes) + len(narrower)) as advance:
        for size in sizes:
            bench.ranges(size)
            advance(1)
        for size in sizes:
            bench.indices(f"gather/indices/{size}", size, torch.float32)
            advance(1)
        for name, dtype in narrower.items():
            size = min(4_096, largest)
            bench.indices(f"gather/{name}/{size}", size, dtype)
            advance(1)

    targets = H200_TARGETS if "H200" in device_name(device) else {} if on_gpu(device) else CPU_TARGETS
    print_measurements(f"gather, {device_name(device)}", results, targets)
    results.save()


if __name__ == "__main__":
    main()
