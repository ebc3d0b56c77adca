"""Lengths: moving sequences within a cache and from another one (32 heads, head_dim 128), and truncating them.

`reorder` and `copy_sequence` move the rows that are held, in place, in every layer. A rate counts what has to be read
and written: each row that somebody needs once, each row that changes once. Beside it torch's own ways: `index_select`
into a second copy of the cache and `copy_` back; `copy_` from slice to slice, which knows nothing of rings.

Orders: `rotate`, every sequence becomes the next; `beams`, half of them are continued twice; `swap`, two of them change
places, the others stay; `wrapped`, as rotate, of rings that have wrapped.

`copy_sequence` with a `source` copies one sequence of another cache: `same`, a ring of the same size; `smaller`, from a
ring that has wrapped into one of three quarters of its size, so that rows go to slots of other numbers.

On a GPU throughput is GPU time of a replayed CUDA graph, with indices on the device. `truncate`, `drop_newest` and
`reset` move no data: what counts is the launch.
"""

from __future__ import annotations

import ceilings
import torch
from common import (
    Results,
    Target,
    Work,
    choose_device,
    compare,
    device_name,
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

from kvcache_ext import StreamingKVCacheFp16

HEADS, HEAD_DIM = 32, 128
ROW_BYTES = 2 * HEADS * HEAD_DIM * 2  # a key and a value
LAYERS = 8
SINKS = 4
LAUNCHES = 64  # in a graph

# (order, batch, positions held, slots)
GPU_CASES = [
    ("rotate", 2, 16_384, 16_384),
    ("rotate", 8, 4_096, 4_096),
    ("rotate", 64, 512, 512),
    ("rotate", 300, 128, 128),
    ("beams", 8, 4_096, 4_096),
    ("swap", 8, 4_096, 4_096),
    ("wrapped", 8, 4_096, 4_096),
    ("beams", 8, 256, 4_096),
    ("beams", 4, 32, 4_096),
]
CPU_CASES = [
    ("rotate", 4, 1_024, 1_024),
    ("rotate", 64, 64, 64),
    ("beams", 4, 1_024, 1_024),
    ("wrapped", 4, 1_024, 1_024),
]

H200_TARGETS = {  # 90% of copying from device to device
    f"lengths/{what}": Target(3.8)
    for what in (
        "reorder/rotate/8/4096",
        "reorder/rotate/64/512",
        "reorder/beams/8/4096",
        "reorder/wrapped/8/4096",
        "copy_sequence/4096",
    )
}


def order_of(kind: str, batch: int) -> list[int]:
    if kind == "beams":
        return [b // 2 for b in range(batch)]
    if kind == "swap":
        return [1, 0, *range(2, batch)]
    return [(b + 1) % batch for b in range(batch)]


def bytes_of(order: list[int], positions: int, layers: int) -> int:
    """Rows read, each once however many become its copies, and rows written."""
    moved = [(source, b) for b, source in enumerate(order) if source != b]
    return (len({source for source, _ in moved}) + len(moved)) * positions * layers * ROW_BYTES


class Bench:
    def __init__(self, device: torch.device, results: Results, best: ceilings.Ceilings, quick: bool) -> None:
        self.device = device
        self.results = results
        self.best = best
        self.quick = quick
        self.rounds = 3 if quick else 9

    def _cache(
        self, layers: int, batch: int, positions: int, slots: int, wrapped: bool = False
    ) -> StreamingKVCacheFp16:
        cache = StreamingKVCacheFp16(
            layers, slots, HEADS, HEAD_DIM, batch_size=batch, device=self.device, sink_positions=SINKS if wrapped else 0
        )
        rows = fill_random(torch.empty(batch, min(positions, 256), HEADS, HEAD_DIM, device=self.device))
        for layer in range(layers):
            for start in range(0, positions, rows.shape[1]):
                part = rows[:, : positions - start]
                cache.append(layer, part, part)
            if wrapped:
                cache.append(layer, rows[:, :100], rows[:, :100])
        return cache

    def _add(self, name: str, works: dict[str, Work], size: int, cache: StreamingKVCacheFp16, positions: int) -> None:
        timings = compare({peer: throughput_sampler(work, self.device) for peer, work in works.items()}, self.rounds)
        config = {
            "layers": cache.num_layers,
            "batch": cache.batch_size,
            "positions": positions,
            "max_positions": cache.max_positions,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "bytes": size,
        }
        self.results.add(
            measured(name, "TB/s", timings, lambda seconds: size / seconds / 1e12, self.best.copy / 1e12, config)
        )

    def reorder(self, kind: str, batch: int, positions: int, slots: int, layers: int) -> None:
        cache = self._cache(layers, batch, positions, slots, kind == "wrapped")
        order = order_of(kind, batch)
        indices = torch.tensor(order, device=self.device)
        held = [tensor[:, :, :positions] for tensor in (cache.k_cache, cache.v_cache)]

        def index_select() -> None:
            for tensor in held:
                tensor.copy_(tensor.index_select(1, indices))

        works: dict[str, Work] = {"ours": lambda: cache.reorder(indices), "index_select, copy_": index_select}
        size = bytes_of(order, positions, layers)
        self._add(f"lengths/reorder/{kind}/{batch}/{positions}", works, size, cache, positions)

    def copy_sequence(self, batch: int, positions: int, layers: int) -> None:
        cache = self._cache(layers, batch, positions, positions)
        src, dst = (torch.tensor([b], device=self.device) for b in (0, 1))

        def slices() -> None:
            for tensor in (cache.k_cache, cache.v_cache):
                tensor[:, 1].copy_(tensor[:, 0])

        works: dict[str, Work] = {"ours": lambda: cache.copy_sequence(src, dst), "copy_": slices}
        size = 2 * positions * layers * ROW_BYTES
        self._add(f"lengths/copy_sequence/{positions}", works, size, cache, positions)

    def copy_from(self, kind: str, batch: int, slots: int, layers: int) -> None:
        source = self._cache(layers, 2, slots, slots, wrapped=kind == "smaller")
        moved = slots * 3 // 4 if kind == "smaller" else slots
        cache = StreamingKVCacheFp16(
            layers, moved, HEADS, HEAD_DIM, batch_size=batch, device=self.device, sink_positions=source.sink_positions
        )
        src, dst = (torch.tensor([b], device=self.device) for b in (0, 1))

        def slices() -> None:
            for to, of in ((cache.k_cache, source.k_cache), (cache.v_cache, source.v_cache)):
                to[:, 1].copy_(of[:, 0, :moved])

        works: dict[str, Work] = {
            "ours": lambda: cache.copy_sequence(src, dst, source=source),
            "copy_": slices,
        }
        size = 2 * moved * layers * ROW_BYTES
        self._add(f"lengths/copy_from/{kind}/{slots}", works, size, cache, moved)

    def launches(self) -> None:
        """What moves no data: one call of many in a graph, or on the CPU."""
        cache = StreamingKVCacheFp16(32, 16, 1, 8, batch_size=8, device=self.device)
        keys = torch.zeros(32, 8, 16, 1, 8, device=self.device)
        cache.append_all(keys, keys)
        lengths = torch.full((8,), 7, device=self.device)
        some = torch.tensor([5, 2], device=self.device)

        def many(call: Work) -> Work:
            def work() -> None:
                for _ in range(LAUNCHES):
                    call()

            return work

        calls: dict[str, dict[str, Work]] = {
            "truncate": {
                "ours": lambda: cache.truncate(lengths),
                "clamp_ of one tensor": lambda: cache.cache_seqlens.clamp_(max=lengths),
            },
            "drop_newest": {"ours": lambda: cache.drop_newest(some, sequences=some)},
            "reset": {"ours": lambda: cache.reset(some)},
        }
        for name, works in calls.items():
            timings = compare(
                {peer: throughput_sampler(many(call), self.device, LAUNCHES) for peer, call in works.items()},
                self.rounds,
            )
            ceiling = self.best.launch_in_graph
            config = {"layers": 32, "batch": 8, "calls": LAUNCHES}
            self.results.add(
                measured(
                    f"lengths/{name}/graph" if on_gpu(self.device) else f"lengths/{name}",
                    "us",
                    timings,
                    lambda seconds: seconds * 1e6,
                    None if ceiling is None else ceiling * 1e6,
                    config,
                )
            )


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device)
    best = ceilings.measure(device, args.quick)
    best.record(results)

    bench = Bench(device, results, best, args.quick)
    layers = LAYERS if on_gpu(device) else 1
    cases = GPU_CASES if on_gpu(device) else CPU_CASES
    if args.quick:
        cases = [(kind, batch, min(positions, 64), min(slots, 64)) for kind, batch, positions, slots in cases]
        cases = list(dict.fromkeys(cases))
    # A cache, and what index_select makes of its keys or its values.
    room = 0.7 * free_bytes(device)
    cases = [case for case in cases if 1.5 * case[1] * case[3] * layers * ROW_BYTES < room]
    copied = 64 if args.quick else 4_096
    with progress("lengths", len(cases) + 4) as advance:
        for kind, batch, positions, slots in cases:
            bench.reorder(kind, batch, positions, slots, layers)
            advance(1)
        bench.copy_sequence(2 if not on_gpu(device) else 8, copied, layers)
        advance(1)
        for kind in ("same", "smaller"):
            bench.copy_from(kind, 2 if not on_gpu(device) else 8, copied, layers)
            advance(1)
        bench.launches()
        advance(1)

    targets = H200_TARGETS if "H200" in device_name(device) else {}
    print_measurements(f"lengths, {device_name(device)}", results, targets)
    results.save()


if __name__ == "__main__":
    main()
