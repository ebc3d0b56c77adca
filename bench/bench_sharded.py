"""Several GPUs: attention over positions that are dealt out to them, the merge alone, prompts, and whole models.

Starts a process for each GPU that is there (--ranks: fewer), which make up a process group. Times are those of CUDA
graphs, of the slowest rank; the peers are of the same run. One GPU: a plain cache of all positions on the first GPU,
while the others wait. Without a GPU it is a rehearsal of two processes on the CPU, whose figures mean nothing.

- `sharded/<shape>/<positions>`: append_attend of one position, in microseconds a layer, as `attention/...` on one GPU.
- `sharded/prompt/<shape>/<positions>`: attend of 2,048 queries, in milliseconds.
- `sharded/merge/<queries>x<heads>`: the exchange and the merge of that many answers alone, in microseconds; beside it
  what NCCL takes to gather and symmetric memory to add up as many bytes.
- `generate/.../sharded`, `generate/.../tp`: tokens a second of a model in a plain CUDA graph, with its positions or its
  heads on several GPUs.

The ceiling is a kernel that only reads what a GPU has to read, at its rate in this run. Parts: --parts, --positions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ceilings
import llama
import torch
import torch.distributed as dist
from common import (
    SLEEP_CYCLES,
    Measurement,
    Results,
    Target,
    choose_device,
    device_name,
    fill_random,
    on_gpu,
    open_results,
    parser,
    print_measurements,
    quantity,
)
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.distributed import ShardedKVCacheFp16

HEAD_DIM = 128
SHAPES = {"mha32": (32, 32), "gqa32x8": (32, 8)}  # query heads, KV heads
POSITIONS = [131_072, 262_144]
PROMPT = 2_048
MERGES = {"1x32": (1, 32), "16x32": (16, 32), "2048x32": (PROMPT, 32)}  # queries, heads
GRAPH_BYTES = 9e9  # of keys and values of all ranks in a graph
PARTS = ["attention", "prompt", "merge", "models", "tp"]
ROUNDS = 7

ONE = "one GPU"
H200_TARGETS = {
    "sharded/mha32/131072": Target(1.90, over_peer=ONE),
    "sharded/mha32/262144": Target(1.95, over_peer=ONE),
    "sharded/gqa32x8/131072": Target(1.72, over_peer=ONE),
    "sharded/gqa32x8/262144": Target(1.84, over_peer=ONE),
    "sharded/merge/1x32": Target(7, at_least=False),
    "sharded/prompt/mha32/131072": Target(1.8, over_peer=ONE),
    "generate/8b/fp16/1048576/sharded": Target(40),
    "generate/8b/fp16/131072/tp": Target(1.5, over_peer=ONE),
}

Work = Callable[[], object]


@dataclass
class Rank:
    """This process, in its group."""

    rank: int
    ranks: int
    device: torch.device
    quick: bool

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, words: str) -> None:
        if self.first:
            print(words, flush=True)

    def seconds(self, work: Work, units: int = 1, alone: bool = False) -> float:
        """Of one of the `units` of `work`, of the slowest rank, the median of rounds. `alone`: only the first works."""
        runs = self.first or not alone
        run = self._captured(work) if runs else None
        repeats = torch.zeros(1, device=self.device)
        if run is not None:
            run()
            began = time.perf_counter()
            run()
            self._synchronize()
            repeats.fill_(max(1, min(50, int(5e-3 / (time.perf_counter() - began)))))
        if not alone:
            dist.broadcast(repeats, 0)  # all ranks make the same calls
        times = [self._sample(run, int(repeats.item())) for _ in range(ROUNDS if run is not None else 0)]
        found = torch.tensor([statistics.median(times) / units if times else 0.0], dtype=torch.float64)
        found = found.to(self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found.item())

    def _captured(self, work: Work) -> Work:
        work()
        if not on_gpu(self.device):
            return work
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog makes calls of its own
            work()

        def replay(kept: Work = work) -> None:  # the graph uses the tensors of `work`
            graph.replay()

        return replay

    def _sample(self, run: Work | None, repeats: int) -> float:
        assert run is not None
        if not on_gpu(self.device):
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - began) / repeats
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        run()  # the ranks meet here
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def _synchronize(self) -> None:
        if on_gpu(self.device):
            torch.cuda.synchronize(self.device)


# Attention


def filled(cache: StreamingKVCacheFp16, positions: int, device: torch.device) -> StreamingKVCacheFp16:
    chunk = min(positions, 4_096)
    size = (chunk, cache.num_heads, HEAD_DIM)
    keys, values = (fill_random(torch.empty(size, device=device)) for _ in range(2))
    for layer in range(cache.num_layers):
        for _ in range(0, positions, chunk):
            cache.append(layer, keys, values)
    return cache


def steps(cache: StreamingKVCacheFp16, query_heads: int, device: torch.device) -> Work:
    """One position a layer, each layer's query the answer of the layer before."""
    query = torch.randn(1, 1, query_heads, HEAD_DIM, device=device)
    key, value = (torch.randn(1, 1, cache.num_heads, HEAD_DIM, device=device) for _ in range(2))

    def work() -> None:
        x: Any = query
        for layer in range(cache.num_layers):
            x = cache.append_attend(layer, x, key, value)

    return work


def exchanges(me: Rank) -> tuple[str, ...]:
    return ("symmetric", "gather") if on_gpu(me.device) else ("gather",)


def contenders(
    me: Rank, shape: str, positions: int, layers: int, make: Callable[[StreamingKVCacheFp16], Work]
) -> dict[str, float]:
    """Seconds of what `make` makes, a layer: with each exchange, then on one GPU."""
    heads = SHAPES[shape][1]
    found = {}
    for way in exchanges(me):
        cache = ShardedKVCacheFp16(layers, positions, heads, HEAD_DIM, device=me.device, exchange=way)
        found[way] = me.seconds(make(filled(cache, positions, me.device)), layers)
        cache.synchronize()
        del cache
        llama.tidy(me.device)
    plain = StreamingKVCacheFp16(layers, positions, heads, HEAD_DIM, device=me.device) if me.first else None
    work = make(filled(plain, positions, me.device)) if plain is not None else (lambda: None)
    found[ONE] = me.seconds(work, layers, alone=True)
    del plain, work
    llama.tidy(me.device)
    return found


def record(
    results: Results, name: str, unit: str, factor: float, found: dict[str, float], ceiling: float | None, config: Any
) -> None:
    (ours, value), *others = found.items()
    words = {"gather": "all-gather, then merge"}
    peers = {words.get(name, name): factor * seconds for name, seconds in others}
    ratios = {words.get(name, name): seconds / value for name, seconds in others}
    results.add(
        Measurement(
            name, factor * value, unit, ceiling, peers, ratios, {"exchange": ours, "head_dim": HEAD_DIM} | config
        )
    )
    print(
        f"{name}: {quantity(factor * value, unit)}, {', '.join(f'{n} {f:.2f}x' for n, f in ratios.items())}", flush=True
    )


def attention(me: Rank, positions_of: list[int], reading: float, results: Results) -> None:
    for shape, (query_heads, heads) in SHAPES.items():
        for positions in positions_of:
            moved = 2 * positions * heads * HEAD_DIM * 2
            layers = max(2, min(32, int(GRAPH_BYTES / moved))) if on_gpu(me.device) else 2
            made = functools.partial(steps, query_heads=query_heads, device=me.device)
            found = contenders(me, shape, positions, layers, made)
            if me.first:
                config = {"layers": layers, "kv_heads": heads, "query_heads": query_heads, "ranks": me.ranks}
                ceiling = 1e6 * moved / me.ranks / reading
                record(results, f"sharded/{shape}/{positions}", "us", 1e6, found, ceiling, config)


def prompts(me: Rank, positions_of: list[int], results: Results) -> None:
    queries = PROMPT if on_gpu(me.device) else 32
    shape, positions = "mha32", positions_of[0]
    query = torch.randn(1, queries, SHAPES[shape][0], HEAD_DIM, device=me.device)
    found = contenders(me, shape, positions, 1, lambda cache: lambda: cache.attend(0, query))
    if me.first:
        config = {"queries": queries, "ranks": me.ranks}
        record(results, f"sharded/prompt/{shape}/{positions}", "ms", 1e3, found, None, config)


# The merge alone


def merges(me: Rank, results: Results) -> None:
    for name, (queries, heads) in MERGES.items():
        found = _merge_seconds(me, queries, heads)
        if me.first:
            nbytes = 4 * queries * heads * (HEAD_DIM + 1)
            config = {"queries": queries, "query_heads": heads, "ranks": me.ranks, "bytes": nbytes}
            record(results, f"sharded/merge/{name}", "us", 1e6, found, None, config)


def _merge_seconds(me: Rank, queries: int, heads: int, count: int = 32) -> dict[str, float]:
    answers = torch.randn(1, queries, heads, HEAD_DIM, device=me.device)
    lses = torch.randn(1, queries, heads, device=me.device)
    out = torch.empty_like(answers)
    found = {}
    for way in exchanges(me):
        cache = ShardedKVCacheFp16(1, 64 * me.ranks, heads, HEAD_DIM, device=me.device, exchange=way)

        def work(cache: ShardedKVCacheFp16 = cache) -> None:
            for _ in range(count):
                cache.between_ranks.merge(cache.native, 0, answers, lses, out, None, None)

        found[way] = me.seconds(work, count)
        cache.synchronize()
    part = torch.cat([answers.view(-1), lses.view(-1)])
    gathered = torch.empty(me.ranks * part.numel(), device=me.device)

    def gathering() -> None:
        for _ in range(count):
            dist.all_gather_into_tensor(gathered, part)

    name = "NCCL's all-gather alone" if on_gpu(me.device) else "gloo's all-gather alone"
    found[name] = me.seconds(gathering, count)
    if on_gpu(me.device):
        with contextlib.suppress(Exception):  # this torch may lack the op, or not serve these GPUs
            found["symmetric memory's one-shot all-reduce"] = _one_shot(me, part, count)
    return found


def _one_shot(me: Rank, part: Tensor, count: int) -> float:
    import torch.distributed._symmetric_memory as symmetric

    shared = symmetric.empty(part.shape, dtype=part.dtype, device=me.device)
    assert dist.group.WORLD is not None
    symmetric.rendezvous(shared, dist.group.WORLD)
    name = dist.group.WORLD.group_name

    def work() -> None:
        for _ in range(count):
            torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)

    return me.seconds(work, count)


# Whole models

MODELS = {  # of llama's shapes: name, weights, positions
    "7b": ("w4", 524_288),
    "8b": ("fp16", 1_048_576),
}
TP_POSITIONS = 131_072


def decode(me: Rank, model: Any, cache: Any, shape: llama.LlamaShape, positions: int) -> float:
    """Tokens a second in a plain CUDA graph."""
    llama.fill_ours(cache, shape, positions - llama.RESERVE)
    step = cache.decode_graph(model)
    seconds = llama.step_seconds(step, me.device)
    if hasattr(cache, "check"):
        cache.check()
    return 1 / seconds


def models(me: Rank, reading: float, results: Results) -> None:
    from kvcache_ext.integrations.transformers import Fp16Cache

    for name, (weights, positions) in MODELS.items():
        shape = {"7b": llama.SEVEN_B, "8b": llama.EIGHT_B}[name] if on_gpu(me.device) else llama.TINY
        if not on_gpu(me.device):
            weights, positions = "fp32", 1_024
        torch.manual_seed(0)  # the same weights on every rank
        model = llama.try_model(shape, weights, positions, me.device)
        with torch.no_grad():
            cache = Fp16Cache.for_model(model, positions, group=dist.group.WORLD)
            speed = decode(me, model, cache, shape, positions)
        read = llama.weight_bytes_read(model) + positions * shape.position_bytes(2) / me.ranks
        full = f"generate/{shape.name}/{weights}/{positions}/sharded"
        if me.first:
            config = shape.config() | {
                "positions": positions,
                "weights": llama.WEIGHT_WORDS[weights],
                "ranks": me.ranks,
            }
            config["peak_gb"] = llama.peak_bytes(me.device) / 1e9
            results.add(Measurement(full, speed, "tok/s", reading / read, {}, {}, config))
            print(f"{full}: {quantity(speed, 'tok/s')} of {quantity(reading / read, 'tok/s')}", flush=True)
        del cache, model
        llama.tidy(me.device)


def tensor_parallel(me: Rank, reading: float, results: Results) -> None:
    """transformers' own tensor parallelism, with a cache of this rank's heads; beside it one GPU."""
    from kvcache_ext.integrations.transformers import Fp16Cache

    shape, weights = (llama.EIGHT_B, "fp16") if on_gpu(me.device) else (llama.TINY, "fp32")
    positions = TP_POSITIONS if on_gpu(me.device) else 1_024
    folder: list[Any] = [None]
    alone = read = 0.0
    with tempfile.TemporaryDirectory() as made:
        if me.first:
            model = llama.try_model(shape, weights, positions, me.device)
            read = llama.weight_bytes_read(model) + positions * shape.position_bytes(2)
            model.save_pretrained(made)
            folder = [made]
            with torch.no_grad():
                alone = decode(me, model, Fp16Cache.for_model(model, positions), shape, positions)
            del model
            llama.tidy(me.device)
        dist.broadcast_object_list(folder, 0)
        model = llama.transformers().AutoModelForCausalLM.from_pretrained(
            folder[0], dtype=llama.WEIGHTS[weights], tp_plan="auto", attn_implementation="sdpa"
        )
        model.eval()
        assert model.device == me.device, f"the model is on {model.device}"
        dist.barrier()
    with torch.no_grad():
        cache = Fp16Cache.for_model(model, positions)
        local = replace(shape, kv_heads=cache.caches[0].num_heads)
        speed = decode(me, model, cache, local, positions)
    if me.first:
        name = f"generate/{shape.name}/{weights}/{positions}/tp"
        config = shape.config() | {"positions": positions, "weights": llama.WEIGHT_WORDS[weights], "ranks": me.ranks}
        ceiling = me.ranks * reading / read
        results.add(Measurement(name, speed, "tok/s", ceiling, {ONE: alone}, {ONE: speed / alone}, config))
        print(f"{name}: {quantity(speed, 'tok/s')}, one GPU {quantity(alone, 'tok/s')}", flush=True)


# Processes


@contextlib.contextmanager
def process_group(rank: int, ranks: int, store: str, gpu: bool) -> Iterator[torch.device]:
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    options: dict[str, Any] = {"device_id": device} if gpu else {}
    if gpu:
        torch.cuda.set_device(device)
        # transformers asks for these
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    else:
        torch.set_num_threads(1)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, **options)
    try:
        yield device
    finally:
        llama.tidy(device)  # graphs hold on to communicators
        dist.destroy_process_group()


def run(rank: int, ranks: int, store: str, args: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    with process_group(rank, ranks, store, args.gpu) as device:
        me = Rank(rank, ranks, device, args.quick)
        results = open_results(args, device, keep=args.gpu)
        reading = ceilings.read_rate(device, args.quick)
        llama.tidy(device)
        positions = args.positions or (POSITIONS if args.gpu else [512])
        if "attention" in args.parts:
            attention(me, positions, reading, results)
        if "prompt" in args.parts:
            prompts(me, positions, results)
        if "merge" in args.parts:
            merges(me, results)
        if me.first:
            results.save(last=False)
        if "models" in args.parts:
            models(me, reading, results)
        if "tp" in args.parts:
            tensor_parallel(me, reading, results)
        if me.first:
            targets = H200_TARGETS if "H200" in device_name(device) else {}
            print_measurements(f"{ranks} ranks, {device_name(device)}", results, targets)
            results.save()


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--ranks", type=int, help="processes (default: one a GPU; 2 without a GPU)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    p.add_argument("--positions", type=int, nargs="+", help="of attention (default: 131072 262144)")
    args = p.parse_args()
    args.gpu = on_gpu(choose_device(args.device))
    there = torch.cuda.device_count() if args.gpu else 2
    ranks = args.ranks or there
    if args.gpu and not 2 <= ranks <= there:
        print(f"bench_sharded: it needs 2 GPUs or more, and there {'is' if there == 1 else 'are'} {there}: left out")
        return 0
    if not args.gpu:
        print("A rehearsal on the CPU: its figures mean nothing")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (ranks, str(Path(folder) / "store"), args), nprocs=ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
