"""Decode attention over the FP16 cache: one new position appended and attended to, FP32 queries, microseconds a layer.

Sweeps the positions held, for 32 heads (`mha32`), 32 query heads on 8 KV heads (`gqa32x8`), 64 on 8 (`gqa64x8`), 28 on
4 (`gqa28x4`) and 64 on 4 (`gqa64x4`), and batches. Each layer's query is the answer of the layer before it, so layers
cannot overlap. The ceiling is a kernel that only reads the same bytes, in the same kind of graph.

The others attend to the same stored FP16 data, read in place through views: torch's scaled_dot_product_attention with
each of its backends (FP16 queries and answers), FlashInfer where it is installed, and what FP32 code does without
this package: convert the layer to FP32, then FP32 attention. None of them appends.

On a GPU this is the time of replayed CUDA graphs over as many layers as hold 2 GB; on a CPU plain calls.

`attention/held/...`: `attend` over 1,000 positions in a cache of 131,072, beside the same in a cache of 1,024.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import ceilings
import torch
from common import (
    Measurement,
    Results,
    Sampler,
    Target,
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
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcache_ext import StreamingKVCacheFp16, reference

HEAD_DIM = 128
SHAPES = {  # query heads, KV heads
    "mha32": (32, 32),
    "gqa32x8": (32, 8),
    "gqa64x8": (64, 8),
    "gqa28x4": (28, 4),
    "gqa64x4": (64, 4),
}
GPU_POSITIONS = [256, 1_024, 4_096, 16_384, 65_536, 131_072, 262_144]
CPU_POSITIONS = [1_024, 4_096, 65_536]
BATCHES = [1, 8, 64]
GRAPH_BYTES = 2e9  # of keys and values in a graph: many times any cache
GPU_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}

HELD, LITTLE_ROOM, MUCH_ROOM = 1_000, 1_024, 131_072
HELD_SHAPES = SHAPES | {"gqa8x1": (8, 1), "gqa71x1": (71, 1)}
HELD_LAYERS = 8  # the most room is 2 GB a layer

H200_TARGETS = {
    "attention/mha32/65536": Target(234, at_least=False),
    "attention/mha32/16384": Target(61, at_least=False),
    "attention/mha32/4096": Target(17.5, at_least=False),
    "attention/mha32/1024": Target(6.5, at_least=False),
    "attention/gqa32x8/65536": Target(61, at_least=False),
    "attention/gqa32x8/4096": Target(6.5, at_least=False),
} | {f"attention/held/{shape}": Target(0.95, over_peer=f"a cache of {LITTLE_ROOM:,}") for shape in HELD_SHAPES}
ERROR_TARGET = {"attention/error/fp32": Target(1e-6, at_least=False)}

Layer = Callable[[int, Tensor], Tensor]  # (layer, query [B, 1, Hq, D]) -> answer of the same shape


class Case:
    """A full cache of one shape, and everybody's way to attend to it."""

    def __init__(self, query_heads: int, heads: int, positions: int, batch: int, device: torch.device) -> None:
        self.bytes = 2 * batch * positions * heads * HEAD_DIM * 2  # of keys and values of a layer
        fits = int(0.6 * free_bytes(device) / self.bytes)
        wanted = max(2, round(GRAPH_BYTES / self.bytes)) if on_gpu(device) else 1
        self.layers = max(2, min(wanted, fits, 256) // 2 * 2) if on_gpu(device) else 1
        self.cache = StreamingKVCacheFp16(self.layers, positions, heads, HEAD_DIM, batch_size=batch, device=device)
        chunk = min(positions, 1_024)
        keys, values = (fill_random(torch.empty(batch, chunk, heads, HEAD_DIM, device=device)) for _ in range(2))
        for layer in range(self.layers):
            for _ in range(0, positions, chunk):
                self.cache.append(layer, keys, values)
        self.device = device
        self.group = query_heads // heads
        self.query = torch.randn(batch, 1, query_heads, HEAD_DIM, device=device)
        self.key, self.value = keys[:, :1].clone(), values[:, :1].clone()
        # [B, H, N, D], as SDPA wants them, where they lie
        self.k_views = self.cache.k_cache.transpose(2, 3).unbind()
        self.v_views = self.cache.v_cache.transpose(2, 3).unbind()

    def sampler(self, layer: Layer, dtype: torch.dtype = torch.float32) -> Sampler:
        query = self.query.to(dtype)

        def work() -> None:
            x = query
            for i in range(self.layers):
                x = layer(i, x)

        return throughput_sampler(work, self.device, self.layers)

    def ours(self, layer: int, query: Tensor) -> Tensor:
        answer = self.cache.append_attend(layer, query, self.key, self.value)
        assert isinstance(answer, Tensor)
        return answer

    def sdpa(self, layer: int, query: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2), self.k_views[layer], self.v_views[layer], enable_gqa=self.group > 1
        ).transpose(1, 2)

    def converted(self, layer: int, query: Tensor) -> Tensor:
        keys, values = self.k_views[layer].float(), self.v_views[layer].float()
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, enable_gqa=self.group > 1
        ).transpose(1, 2)

    def peers(self) -> dict[str, Sampler]:
        """Those that can do this shape here."""
        found: dict[str, Sampler] = {}
        backends = GPU_BACKENDS if on_gpu(self.device) else {"SDPA FP16": SDPBackend.MATH}
        for name, backend in backends.items():

            def attend(layer: int, query: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend) if on_gpu(self.device) else contextlib.nullcontext():
                    return self.sdpa(layer, query)

            with contextlib.suppress(RuntimeError):  # not for this shape, or not in this build
                found[name] = self.sampler(attend, torch.float16)
        if self.bytes < 2**28 or (self.bytes < 2**31 and len(self.query) == 1):
            with contextlib.suppress(RuntimeError):
                found["to FP32, SDPA"] = self.sampler(self.converted)
        if on_gpu(self.device) and len(self.query) == 1:
            with contextlib.suppress(ImportError, RuntimeError):
                from flashinfer import single_decode_with_kv_cache  # type: ignore[import-not-found]

                def flashinfer(layer: int, query: Tensor) -> Tensor:
                    keys, values = self.cache.k_cache[layer, 0], self.cache.v_cache[layer, 0]
                    answer: Tensor = single_decode_with_kv_cache(query[0, 0], keys, values)
                    return answer[None, None]

                found["FlashInfer"] = self.sampler(flashinfer, torch.float16)
        return found

    def read_only(self) -> Sampler | None:
        """Reads the bytes of K and V of a layer, once for each layer."""
        if not on_gpu(self.device):
            numbers = fill_random(torch.empty(self.bytes // 4))
            return throughput_sampler(lambda: numbers.sum(), self.device)
        sink = torch.zeros(1, dtype=torch.int32, device=self.device)
        # One launch for as many bytes as a layer's keys and values: the keys of two layers, then the values of two.
        halves = [tensor.view(self.layers // 2, -1) for tensor in (self.cache.k_cache, self.cache.v_cache)]
        pieces = [piece for half in halves for launch in half for piece in launch.split(ceilings.MOST_VECTORS * 8)]
        works = [ceilings.plain_kernel("read_only", piece.nbytes // 16, piece, sink) for piece in pieces]

        def work() -> None:
            for read in works:
                assert read is not None
                read()

        if None in works:
            return None
        return throughput_sampler(work, self.device, self.layers)


def measure(name: str, case: Case, results: Results, rounds: int) -> None:
    samplers = {"ours": case.sampler(case.ours)} | case.peers()
    read = case.read_only()
    if read is not None:
        samplers["read only"] = read
    timings = compare(samplers, rounds)
    ceiling = timings.pop("read only").seconds * 1e6 if read is not None else None
    c = case.cache
    config = {
        "layers": case.layers,
        "positions": c.max_positions,
        "query_heads": case.query.shape[2],
        "kv_heads": c.num_heads,
        "head_dim": HEAD_DIM,
        "batch": c.batch_size,
        "bytes": case.bytes,
    }
    results.add(measured(name, "us", timings, lambda seconds: seconds * 1e6, ceiling, config))


def measure_held(name: str, query_heads: int, heads: int, device: torch.device, results: Results, rounds: int) -> None:
    """What a short text costs in a long cache."""
    query = torch.randn(1, 1, query_heads, HEAD_DIM, device=device)
    rows = fill_random(torch.empty(1, HELD, heads, HEAD_DIM, device=device))

    def sampler(room: int) -> Sampler:
        cache = StreamingKVCacheFp16(HELD_LAYERS, room, heads, HEAD_DIM, device=device)
        for layer in range(HELD_LAYERS):
            cache.append(layer, rows, rows)

        def work() -> None:
            x = query
            for layer in range(HELD_LAYERS):
                answer = cache.attend(layer, x)
                assert isinstance(answer, Tensor)
                x = answer

        return throughput_sampler(work, device, HELD_LAYERS)

    timings = compare({"ours": sampler(MUCH_ROOM), f"a cache of {LITTLE_ROOM:,}": sampler(LITTLE_ROOM)}, rounds)
    config = {"positions": HELD, "max_positions": MUCH_ROOM, "query_heads": query_heads, "kv_heads": heads}
    config |= {"head_dim": HEAD_DIM, "layers": HELD_LAYERS}
    results.add(measured(name, "us", timings, lambda seconds: seconds * 1e6, None, config))


def measure_error(device: torch.device, positions: int, results: Results) -> None:
    """The largest relative error of a head, FP32 queries against FP64 attention over the stored values."""
    cache = StreamingKVCacheFp16(1, positions, 4, HEAD_DIM, device=device)
    cache.append(
        0, torch.randn(positions, 4, HEAD_DIM, device=device), torch.randn(positions, 4, HEAD_DIM, device=device)
    )
    query = torch.randn(1, 1, 16, HEAD_DIM, device=device)
    answer = cache.attend(0, query)
    assert isinstance(answer, Tensor)
    want, _ = reference.attend(*cache.tensors[:3], 0, query)
    error = ((answer.double() - want).norm(dim=-1) / want.norm(dim=-1)).max()
    keys, values = cache.k_cache[0].transpose(1, 2), cache.v_cache[0].transpose(1, 2)
    half = functional.scaled_dot_product_attention(query.half().transpose(1, 2), keys, values, enable_gqa=True)
    peer = ((half.transpose(1, 2).double() - want).norm(dim=-1) / want.norm(dim=-1)).max()
    config = {"positions": positions, "kv_heads": 4, "query_heads": 16, "head_dim": HEAD_DIM}
    results.add(
        Measurement("attention/error/fp32", float(error), "relative", peers={"SDPA FP16": float(peer)}, config=config)
    )


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes_of(text: str) -> dict[str, tuple[int, int]]:
    """Of "32/2,8/8": query heads on KV heads, by the names that such measurements have."""
    pairs = [whole_numbers(part.replace("/", ",")) for part in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 or pair[0] % pair[1] for pair in pairs):
        raise argparse.ArgumentTypeError(f"takes query heads/KV heads, the first a multiple of the second, got {text}")
    return {f"mha{q}" if q == kv else f"gqa{q}x{kv}": (q, kv) for q, kv in pairs}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--only", default="", help="those whose name has this in it, such as mha32/b8 (default: all)"
    )
    arguments.add_argument("--shapes", type=shapes_of, help="others: query heads/KV heads, such as 32/2,71/1")
    arguments.add_argument("--batches", type=whole_numbers, help="others, such as 1,17")
    arguments.add_argument("--positions", type=whole_numbers, help="others. No results are written with any of these")
    args = arguments.parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device, keep=not (args.shapes or args.batches or args.positions))
    rounds = 3 if args.quick else 5 if on_gpu(device) else 9

    sweep = []
    for batch in args.batches or (BATCHES if on_gpu(device) else BATCHES[:2]):
        for shape, (query_heads, heads) in (args.shapes or SHAPES).items():
            for positions in args.positions or (GPU_POSITIONS if on_gpu(device) else CPU_POSITIONS):
                size = 2 * batch * positions * heads * HEAD_DIM * 2
                # On a GPU two layers at least; on a CPU one, and what converting it to FP32 makes of it.
                if size > (0.3 if on_gpu(device) else 0.2) * free_bytes(device) or (args.quick and size > 2**28):
                    continue
                name = f"attention/{shape}{'' if batch == 1 else f'/b{batch}'}/{positions}"
                if args.only in name:
                    sweep.append((name, query_heads, heads, positions, batch))
    held = {f"attention/held/{shape}": heads for shape, heads in HELD_SHAPES.items()}
    fixed = on_gpu(device) and not (args.shapes or args.batches or args.positions or args.quick)
    held = {name: heads for name, heads in held.items() if fixed and args.only in name}
    with progress("attention", len(sweep) + len(held) + 1) as advance:
        if args.only in "attention/error/fp32":
            measure_error(device, 4_096 if args.quick else 65_536, results)
        advance(1)
        for name, query_heads, heads, positions, batch in sweep:
            measure(name, Case(query_heads, heads, positions, batch, device), results, rounds)
            results.save(last=False)
            advance(1)
        for name, (query_heads, heads) in held.items():
            measure_held(name, query_heads, heads, device, results, rounds)
            advance(1)

    targets = ERROR_TARGET | (H200_TARGETS if "H200" in device_name(device) else {})
    print_measurements(f"attention, {device_name(device)}", results, targets)
    results.save()


if __name__ == "__main__":
    main()
