"""Append: keys and values of a 7B layer (32 heads, head_dim 128), FP32, FP16 or BF16, into the FP16 cache.

Sweeps the positions of one append from 1 to 65,536, from contiguous sources and from [H, T, D] ones (the layout of
attention code, passed as a transposed view). Then appends one position to all 32 layers as decoding does: `append_all`
and 32 `append` calls, GPU time in CUDA graphs, and 32 eager calls on the host's clock. Plain torch does the same work
in turn with it.

On a GPU throughput is GPU time: many appends in one CUDA graph, replayed between events, through sources and slots of
800 MB (100 MB for single positions), so that no cache holds them. Short appends are bound by their launch, not by
bytes. On a CPU the same calls are timed by the clock, and the names that say "graph" are plain calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import ceilings
import torch
from common import (
    DTYPES,
    Results,
    Sampler,
    Target,
    Work,
    choose_device,
    compare,
    device_name,
    fill_random,
    free_bytes,
    host_sampler,
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

LAYERS, HEADS, HEAD_DIM = 32, 32, 128
ROW = HEADS * HEAD_DIM
CHUNKS = [4**i for i in range(9)]  # 1 to 65,536
MOST_CALLS = 2_048  # in a graph
DECODE_STEPS = 64  # in a graph

H200_TARGETS = {
    "append/prefill/contiguous/4096": Target(4.2),
    "append/prefill/htd/4096": Target(4.2),
    "append/decode/append_all/graph": Target(3.0, at_least=False),
    "append/decode/32_layers/graph": Target(40.0, at_least=False),
    "append/decode/32_layers/host": Target(230.0, at_least=False),
}
CPU_TARGETS = {
    "append/prefill/contiguous/16384": Target(1.2, over_peer="slice copy_"),
    "append/prefill/contiguous/65536": Target(1.2, over_peer="slice copy_"),
    "append/one_position/host": Target(1.2, at_least=False),
}

Pair = tuple[Tensor, Tensor]  # keys, values


class Sources:
    """Keys and values to append, cut from two large buffers of random numbers."""

    def __init__(self, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.positions = positions
        self.dtype = dtype
        self._buffers = [fill_random(torch.empty(positions * ROW, dtype=dtype, device=device)) for _ in range(2)]

    def cut(self, rows: int, htd: bool) -> list[Pair]:
        """Pairs of [rows, H, D]; `htd`: transposed views of [H, rows, D]."""
        shape = (-1, HEADS, rows, HEAD_DIM) if htd else (-1, rows, HEADS, HEAD_DIM)
        whole = self.positions // rows * rows * ROW
        pieces = [buffer[:whole].view(shape) for buffer in self._buffers]
        keys, values = (piece.transpose(1, 2) if htd else piece for piece in pieces)
        return list(zip(keys.unbind(), values.unbind(), strict=True))


# Plain torch: (all slots of a layer, those to store in, their numbers, the rows to store there).
Store = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def slice_copy(slots: Tensor, part: Tensor, numbers: Tensor, rows: Tensor) -> None:
    part.copy_(rows)


def half_then_copy(slots: Tensor, part: Tensor, numbers: Tensor, rows: Tensor) -> None:
    part.copy_(rows.half())


def index_copy(slots: Tensor, part: Tensor, numbers: Tensor, rows: Tensor) -> None:
    slots.index_copy_(0, numbers, rows.half())


PEERS: dict[str, Store] = {"slice copy_": slice_copy, "half, copy_": half_then_copy, "half, index_copy_": index_copy}


class Storage:
    """A cache, and its own storage for plain torch to write to."""

    def __init__(self, layers: int, positions: int, device: torch.device) -> None:
        self.cache = StreamingKVCacheFp16(layers, positions, HEADS, HEAD_DIM, device=device)
        for tensor in (self.cache.k_cache, self.cache.v_cache):
            tensor.zero_()  # a CPU's memory is there from the first round on
        self.layers = layers
        self.positions = positions
        self.k_slots = self.cache.k_cache[:, 0].unbind()  # [positions, H, D] of each layer
        self.v_slots = self.cache.v_cache[:, 0].unbind()
        self.numbers = torch.arange(positions, device=device)

    def appends(self, sources: list[Pair], calls: int) -> Work:
        """Calls of `append`, each to the next layer, whose ring moves on."""

        def work() -> None:
            for i in range(calls):
                self.cache.append(i % self.layers, *sources[i % len(sources)])

        return work

    def torch_appends(self, sources: list[Pair], calls: int, store: Store) -> Work:
        """The same by plain torch, each to the next slots of the next layer."""
        rows = len(sources[0][0])
        steps = []
        for i in range(calls):
            layer, start = i % self.layers, i // self.layers * rows % (self.positions // rows * rows)
            end = start + rows
            for slots, source in zip(
                (self.k_slots[layer], self.v_slots[layer]), sources[i % len(sources)], strict=True
            ):
                steps.append((slots, slots[start:end], self.numbers[start:end], source))

        def work() -> None:
            for step in steps:
                store(*step)

        return work


class Bench:
    def __init__(self, device: torch.device, results: Results, best: ceilings.Ceilings, quick: bool) -> None:
        self.device = device
        self.results = results
        self.best = best
        self.rounds = 3 if quick else 9

    def prefill(self, name: str, storage: Storage, sources: Sources, rows: int, htd: bool = False) -> None:
        size = rows * ROW * 2 * (sources.dtype.itemsize + 2)
        rotated = 800e6 if on_gpu(self.device) else 200e6
        calls = max(1, min(MOST_CALLS, round(rotated / size)))
        cuts = sources.cut(rows, htd)
        samplers = {"ours": throughput_sampler(storage.appends(cuts, calls), self.device, calls)}
        for peer, store in PEERS.items():
            samplers[peer] = throughput_sampler(storage.torch_appends(cuts, calls, store), self.device, calls)
        config = {
            "layers": storage.layers,
            "positions": storage.positions,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": str(sources.dtype).removeprefix("torch."),
            "source": "[H, T, D]" if htd else "[T, H, D]",
            "calls": calls,
        }
        ceiling = self.best.append(sources.dtype) / 1e12
        timings = compare(samplers, self.rounds)
        self.results.add(measured(name, "TB/s", timings, lambda seconds: size / seconds / 1e12, ceiling, config))

    def _microseconds(
        self, name: str, samplers: dict[str, Sampler], ceiling: float | None, config: dict[str, object]
    ) -> None:
        limit = None if ceiling is None else ceiling * 1e6
        timings = compare(samplers, self.rounds)
        self.results.add(measured(name, "us", timings, lambda seconds: seconds * 1e6, limit, config))

    def decode(self, positions: int) -> None:
        """One position for every layer."""
        storage, device = Storage(LAYERS, positions, self.device), self.device
        cache, k_slots, v_slots = storage.cache, storage.k_slots, storage.v_slots
        keys, values = (
            fill_random(torch.empty(DECODE_STEPS, LAYERS, HEADS, HEAD_DIM, device=device)) for _ in range(2)
        )
        by_step = list(zip(keys.unbind(), values.unbind(), strict=True))  # [L, H, D]
        by_layer = [list(zip(k.unbind(), v.unbind(), strict=True)) for k, v in by_step]  # [step][layer] of [H, D]
        k_rows, v_rows = cache.k_cache[:, 0].transpose(0, 1), cache.v_cache[:, 0].transpose(0, 1)  # [N, L, H, D]
        config: dict[str, object] = {
            "layers": LAYERS,
            "positions": positions,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "float32",
        }

        def append_layers(step: int) -> None:
            for layer, (key, value) in enumerate(by_layer[step]):
                cache.append(layer, key, value)

        def slice_copy_layers(step: int, slot: int) -> None:
            for layer, (key, value) in enumerate(by_layer[step]):
                k_slots[layer][slot].copy_(key)
                v_slots[layer][slot].copy_(value)

        def index_copy_layers(step: int, slot: int) -> None:
            number = storage.numbers[slot : slot + 1]
            for layer, (key, value) in enumerate(by_layer[step]):
                k_slots[layer].index_copy_(0, number, key.half().unsqueeze(0))
                v_slots[layer].index_copy_(0, number, value.half().unsqueeze(0))

        def copy_all_layers(step: int) -> None:
            k_rows[step].copy_(by_step[step][0])
            v_rows[step].copy_(by_step[step][1])

        # Eager calls, the host's time, each at the next slot.
        slots = itertools.cycle(range(positions))
        on_host = self.best.launch_on_host
        self._microseconds(
            "append/decode/32_layers/host",
            {
                "ours": host_sampler(lambda: append_layers(0), device),
                "slice copy_": host_sampler(lambda: slice_copy_layers(0, next(slots)), device),
                "half, index_copy_": host_sampler(lambda: index_copy_layers(0, next(slots)), device),
            },
            LAYERS * on_host if on_host else None,
            config,
        )
        calls = 200
        key, value = by_layer[0][0]

        def append_one_layer() -> None:
            for _ in range(calls):
                cache.append(0, key, value)

        def slice_copy_one_layer() -> None:
            for slot in range(calls):
                k_slots[0][slot].copy_(key)
                v_slots[0][slot].copy_(value)

        self._microseconds(
            "append/one_position/host",
            {
                "ours": host_sampler(append_one_layer, device, calls),
                "slice copy_": host_sampler(slice_copy_one_layer, device, calls),
            },
            on_host,
            config | {"layers": 1},
        )

        # The same steps in CUDA graphs, GPU time; on a CPU by the clock.
        def steps(work: Callable[[int], object]) -> Sampler:
            return throughput_sampler(lambda: [work(step) for step in range(DECODE_STEPS)], device, DECODE_STEPS)

        config["graph"] = on_gpu(device)
        in_graph = self.best.launch_in_graph
        peers = {
            "slice copy_": steps(lambda step: slice_copy_layers(step, step)),
            "half, index_copy_": steps(lambda step: index_copy_layers(step, step)),
        }
        self._microseconds(
            "append/decode/32_layers/graph",
            {"ours": steps(append_layers), **peers},
            LAYERS * in_graph if in_graph else None,
            config,
        )
        self._microseconds(
            "append/decode/append_all/graph",
            {
                "ours": steps(lambda step: cache.append_all(*by_step[step])),
                "copy_ over all layers": steps(copy_all_layers),
                **peers,
            },
            in_graph,
            config,
        )


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device)
    best = ceilings.measure(device, args.quick)
    best.record(results)
    bench = Bench(device, results, best, args.quick)

    largest = 4_096 if args.quick else CHUNKS[-1]
    while largest > 1 and largest * ROW * 28 > 0.7 * free_bytes(device):  # a cache, sources, what peers allocate
        largest //= 4
    chunks = [chunk for chunk in CHUNKS if chunk <= largest]
    narrower = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}
    with progress("append", 2 * len(chunks) + len(narrower) + 1) as advance:
        bench.decode(positions=4_096 if on_gpu(device) else 512)
        advance(1)
        storage = Storage(4 if on_gpu(device) else 1, largest, device)
        sources = Sources(largest, torch.float32, device)
        for layout in ("contiguous", "htd"):
            for chunk in chunks:
                bench.prefill(f"append/prefill/{layout}/{chunk}", storage, sources, chunk, layout == "htd")
                advance(1)
        del sources
        for name, dtype in narrower.items():
            chunk = min(4_096, largest)
            bench.prefill(f"append/prefill/{name}/{chunk}", storage, Sources(largest, dtype, device), chunk)
            advance(1)

    targets = H200_TARGETS if "H200" in device_name(device) else {} if on_gpu(device) else CPU_TARGETS
    print_measurements(f"append, {device_name(device)}", results, targets)
    results.save()


if __name__ == "__main__":
    main()
