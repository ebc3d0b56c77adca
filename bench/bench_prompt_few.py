"""`bench_prompt.py --crossover`: attention of few queries, where kernels for decoding give way to those for prompts.

A row `prompt/few/g<query heads to a KV head>/<T>x<S>/<fp32|bf16>` is one call of `attend` of T queries over S positions
of 8 KV heads of 128, in microseconds. There are as many layers as no cache of a processor holds, and each layer's query
is the answer of the layer before it; on a GPU all of them are one CUDA graph. The others are those of bench_prompt.py,
FP32 for some T alone, as it takes long. The ceiling is the longer of two times: reading keys and values at the rate of
a kernel that only reads, and the products at the rate of torch.mm (for FP32 half of FP16's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ceilings
import torch
from common import (
    Results,
    Sampler,
    compare,
    fill_random,
    measured,
    on_gpu,
    progress,
    throughput_sampler,
)
from sdpa_peers import CUDNN, EFFICIENT, FLASH, NAMES, Attention, Missing, checked, chosen, repeated, rounds_for, using
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvcache_ext import StreamingKVCacheFp16

HEADS, HEAD_DIM = 8, 128
GROUPS = [1, 4, 8, 16]
QUERIES = [2, 4, 8, 16, 17, 32, 48, 64, 128]
FP32_PEERS_FOR = [2, 16, 64, 128]
POSITIONS = [4_096, 16_384, 131_072]
LAYER_BYTES = 5e8  # of all layers' keys and values: ten times a GPU's cache
MOST_LAYERS = 64
REPEATED_LAYERS = 2  # of the FP32 copies, which have a KV head for every query head
SECONDS = 0.05  # for the rounds of a row
DTYPES = {"fp32": (torch.float32, "fp32"), "bf16": (torch.bfloat16, "fp16")}  # of queries; precision

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [1, H, S, D]
Layer = Callable[[int, Tensor], Tensor]  # (layer, query) -> answer of the same shape


def chained(layers: int, layer: Layer, query: Tensor) -> Callable[[], Tensor]:
    def work() -> Tensor:
        x = query
        for i in range(layers):
            x = layer(i, x)
        return x

    return work


class Held:
    """Layers of a cache that hold `positions`, and copies of them in other dtypes, made when they are wanted."""

    def __init__(self, positions: int, device: torch.device) -> None:
        layer_bytes = 4 * positions * HEADS * HEAD_DIM
        self.layers = max(2, min(MOST_LAYERS, round(LAYER_BYTES / layer_bytes))) if on_gpu(device) else 1
        self.positions, self.device = positions, device
        self.cache = StreamingKVCacheFp16(self.layers, positions, HEADS, HEAD_DIM, device=device)
        keys, values = (fill_random(torch.empty(1, positions, HEADS, HEAD_DIM, device=device)) for _ in range(2))
        for layer in range(self.layers):
            self.cache.append(layer, keys, values)
        self._copies: dict[tuple[torch.dtype, int], Pairs] = {}

    def copies(self, dtype: torch.dtype, group: int) -> Pairs:
        """`group` above 1: every KV head that many times, and of FP32's only the last group is kept."""
        if (dtype, group) not in self._copies:
            self._copies = {key: pairs for key, pairs in self._copies.items() if key[0] != dtype}
            layers = min(self.layers, REPEATED_LAYERS) if dtype == torch.float32 else self.layers
            sources = zip(self.cache.k_cache[:layers], self.cache.v_cache[:layers], strict=True)
            self._copies[dtype, group] = [
                (self._copy(keys, dtype, group), self._copy(values, dtype, group)) for keys, values in sources
            ]
        return self._copies[dtype, group]

    @staticmethod
    def _copy(stored: Tensor, dtype: torch.dtype, group: int) -> Tensor:
        copy = stored.transpose(1, 2).contiguous().to(dtype)
        return repeated(copy, group * HEADS) if group > 1 else copy

    def ours(self, query: Tensor, precision: str) -> Callable[[], Tensor]:
        def attend(layer: int, query: Tensor) -> Tensor:
            answer = self.cache.attend(layer, query, precision=precision)
            assert isinstance(answer, Tensor)
            return answer

        return chained(self.layers, attend, query)

    def peer(self, query: Tensor, backend: SDPBackend | None) -> tuple[list[Attention], Callable[[], Tensor]]:
        """The call of each layer, and all of them in turn."""
        first = query.transpose(1, 2).contiguous()
        pairs = self.copies(query.dtype, query.shape[2] // HEADS if backend is EFFICIENT else 1)
        template = Attention.prepared(backend, first, *pairs[0])
        layers = [Attention(first, keys, values, template.arguments) for keys, values in pairs]

        def attend(layer: int, query: Tensor) -> Tensor:
            return layers[layer].attend(query)

        return layers, chained(len(layers), attend, first)


class Bench:
    def __init__(self, device: torch.device, results: Results, quick: bool) -> None:
        self.device, self.results, self.quick = device, results, quick
        self.missing = Missing()
        self.reading = ceilings.read_rate(device, quick)
        dtypes = {"fp32": torch.float16, "bf16": torch.bfloat16} if on_gpu(device) else {"fp32": torch.float32}
        self.products = {name: ceilings.matmul_rate(device, dtype, quick, results) for name, dtype in dtypes.items()}
        if on_gpu(device):
            self.products["fp32"] /= 2
        else:
            self.products["bf16"] = self.products["fp32"]

    def backends(self, kind: str, queries: int) -> dict[str, SDPBackend | None]:
        if not on_gpu(self.device):
            return {f"SDPA {kind.upper()}": None}
        if kind == "fp32":
            return {NAMES[EFFICIENT]: EFFICIENT} if queries in FP32_PEERS_FOR else {}
        return {NAMES[backend]: backend for backend in (FLASH, CUDNN)}

    def measure(self, name: str, held: Held, group: int, queries: int, kind: str) -> None:
        dtype, precision = DTYPES[kind]
        query = torch.randn(1, queries, group * HEADS, HEAD_DIM, device=self.device).to(dtype)
        want = held.cache.attend(0, query, precision=precision)
        assert isinstance(want, Tensor)
        samplers: dict[str, Sampler] = {
            "ours": throughput_sampler(held.ours(query, precision), self.device, held.layers)
        }
        for peer, backend in self.backends(kind, queries).items():
            try:
                with using(backend):
                    layers, work = held.peer(query, backend)
                    checked([layers[0]()], want)
                    samplers[peer] = throughput_sampler(work, self.device, len(layers))
            except Exception as error:  # a peer's failure is not to cost the row
                self.missing.note(name, peer, error)
        timings = compare(samplers, rounds_for(samplers, SECONDS, self.quick))
        pairs = queries * (held.positions - queries) + queries * (queries + 1) // 2
        flop = 4 * HEAD_DIM * HEADS * group * pairs
        size = 4 * HEAD_DIM * HEADS * held.positions
        config = {
            "layers": held.layers, "queries": queries, "positions": held.positions, "query_heads": group * HEADS,
            "kv_heads": HEADS, "head_dim": HEAD_DIM, "precision": precision, "bytes": size, "flop": flop,
        }  # fmt: skip
        ceiling = max(size / self.reading, flop / self.products[kind]) * 1e6
        self.results.add(measured(name, "us", timings, lambda seconds: seconds * 1e6, ceiling, config))


def sizes(device: torch.device, quick: bool) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Positions, groups, queries."""
    if quick:
        return [64], [1, 4], [2, 17]
    return (POSITIONS if on_gpu(device) else POSITIONS[:1]), GROUPS, QUERIES


def run(device: torch.device, results: Results, quick: bool, only: str) -> Missing:
    bench = Bench(device, results, quick)
    positions, groups, queries = sizes(device, quick)
    kinds = DTYPES if on_gpu(device) or quick else ["fp32"]
    rows = {
        number: [
            (f"prompt/few/g{group}/{t}x{number}/{kind}", group, t, kind)
            for kind in kinds
            for group in groups
            for t in queries
        ]
        for number in positions
    }
    rows = {number: [row for row in its if chosen(row[0], only)] for number, its in rows.items()}
    with progress("few queries", sum(len(its) for its in rows.values())) as advance:
        for number, its in rows.items():
            held = None
            for name, group, t, kind in its:
                try:
                    held = held or Held(number, device)
                    bench.measure(name, held, group, t, kind)
                except Exception as error:  # one row's failure is not to cost the others'
                    bench.missing.note(name, "ours", error)
                if on_gpu(device):
                    torch.cuda.empty_cache()  # the graphs' memory
                results.save(last=False)
                advance(1)
            del held
    return bench.missing
