"""Attention of many queries (a prompt, or a chunk of one) over the FP16 cache, in TFLOP/s over the visible pairs.

A row `prompt/<shape>/<T>x<S>/<fp32|fp16|bf16>` is one call of `attend` of T queries over S positions held, the T own
ones included: causal, 4 * head_dim FLOP for each query head and each pair of a query and a key that it sees. `fp32`:
FP32 queries, precision="fp32". `fp16`, `bf16`: queries of that dtype, precision="fp16", as Fp16Cache asks for models of
that dtype. `bf16-exact`: BF16 queries, precision="fp32". `window4096`: a sliding window of 4,096. `ragged8`: a batch of
8 sequences, of 0.3 of S to S positions. A row `.../portable` is by the kernel for every GPU (mma.sync), on one
that has a faster kernel (wgmma). A row `.../append` is `truncate` back to S - T positions and `append_attend` together;
its peers copy the new rows into a cache of their own dtype, then attend.

The others are torch's scaled_dot_product_attention over copies `[B, H, S, D]` of the query's dtype (sdpa_peers.py).
FP32: the memory-efficient kernel, alone and with the gathering of FP32 copies from the cache counted ("to FP32, SDPA").
FP16 and BF16: flash and cuDNN. A ragged batch is a call for each of its sequences. A peer that refuses a case, does not
fit into memory or answers something else is left out, and it is said why.

The ceiling is torch.mm of the same run: FP16 or BF16, and for FP32 rows half of FP16, as an FP32 query takes two FP16
products. (On a CPU: FP32 for all.) On a GPU times are those of eager calls by events, while the host is ahead.

--crossover measures few queries instead, T = 2 to 128 (bench_prompt_few.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import ceilings
import torch
from common import (
    Results,
    Sampler,
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
)
from sdpa_peers import (
    CUDNN,
    EFFICIENT,
    FLASH,
    NAMES,
    Attention,
    Missing,
    checked,
    chosen,
    in_eager_calls,
    repeated,
    rounds_for,
    using,
)
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext._extension import extension

HEAD_DIM = 128
SHAPES = {"mha32": (32, 32), "gqa32x8": (32, 8), "gqa64x8": (64, 8)}  # query heads, KV heads
BATCH = 8  # sequences of a ragged batch
SHORTEST = 0.3  # of the longest of them
SECONDS = 0.4  # for the rounds of a row

H200_TARGETS = {
    f"prompt/mha32/{size}/{kind}": Target(rate)
    for kinds, rates in (
        (("fp32",), {"2048x2048": 260, "4096x4096": 320, "16384x16384": 330, "2048x65536": 300}),
        (("fp16", "bf16"), {"2048x2048": 380, "4096x4096": 510, "16384x16384": 600, "2048x65536": 570}),
    )
    for kind in kinds
    for size, rate in rates.items()
} | {"prompt/mha32/4096x4096/fp32/portable": Target(190)}


@dataclass(frozen=True)
class Size:
    queries: int
    held: int
    window: int | None = None
    ragged: bool = False
    append: bool = False  # also with `append_attend`

    def name(self) -> str:
        more = (f"/window{self.window}" if self.window else "") + (f"/ragged{BATCH}" if self.ragged else "")
        return f"{self.queries}x{self.held}{more}"

    def lengths(self) -> list[int]:
        """Positions held of each sequence."""
        if not self.ragged:
            return [self.held]
        shares = [SHORTEST + (1 - SHORTEST) * i / (BATCH - 1) for i in range(BATCH)]
        return [max(self.queries, int(share * self.held)) for share in shares]

    def pairs(self) -> int:
        """Queries and keys that see each other, of one head."""
        window = self.window or self.held
        return sum(min(p, window) for n in self.lengths() for p in range(n - self.queries + 1, n + 1))


# The rows that have a target come first.
PLAIN_SIZES = [
    Size(2_048, 2_048, append=True),
    Size(4_096, 4_096, append=True),
    Size(16_384, 16_384),
    Size(2_048, 65_536, append=True),
    Size(512, 512),
    Size(2_048, 16_384),
    Size(512, 16_384),
    Size(512, 65_536),
    Size(2_048, 131_072),
    Size(512, 131_072),
]
WINDOW_SIZES = [Size(2_048, 65_536, window=4_096), Size(16_384, 16_384, window=4_096)]
RAGGED_SIZES = [Size(512, 8_192, ragged=True)]
CPU_SIZES = [*(Size(queries, 4_096) for queries in (2, 8, 16, 17, 32, 64)), Size(512, 4_096)]
QUICK_SIZES = [
    Size(24, 24, append=True),
    Size(16, 40, append=True),
    Size(16, 40, window=8),
    Size(8, 40, ragged=True),
]


@dataclass(frozen=True)
class Kind:
    dtype: torch.dtype  # of the queries
    precision: str
    peers: dict[str, SDPBackend | None]  # on a GPU

    @property
    def cpu_peer(self) -> str:
        return {torch.float32: "SDPA FP32", torch.float16: "SDPA FP16"}.get(self.dtype, "SDPA BF16")


HALF_PEERS: dict[str, SDPBackend | None] = {NAMES[backend]: backend for backend in (FLASH, CUDNN)}
KINDS = {
    "fp32": Kind(torch.float32, "fp32", {NAMES[EFFICIENT]: EFFICIENT}),
    "fp16": Kind(torch.float16, "fp16", HALF_PEERS),
    "bf16": Kind(torch.bfloat16, "fp16", HALF_PEERS),
    "bf16-exact": Kind(torch.bfloat16, "fp32", HALF_PEERS),
}


class Case:
    """A cache that holds `size.held` positions of one layer, FP32 queries, and everybody's way to attend to it."""

    def __init__(self, query_heads: int, heads: int, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.lengths = size.lengths()
        batch = len(self.lengths)
        self.cache = StreamingKVCacheFp16(1, size.held, heads, HEAD_DIM, batch_size=batch, device=device)
        chunk = min(size.held, 4_096)
        keys, values = (fill_random(torch.empty(1, chunk, heads, HEAD_DIM, device=device)) for _ in range(2))
        for sequence, length in enumerate(self.lengths):
            for begin in range(0, length, chunk):
                rows = min(chunk, length - begin)
                self.cache.append(0, keys[:, :rows], values[:, :rows], sequences=[sequence])
        self.query = torch.randn(batch, size.queries, query_heads, HEAD_DIM, device=device)
        self.flop = 4 * HEAD_DIM * query_heads * size.pairs()

    def ours(self, kind: Kind) -> Callable[[], Tensor]:
        query = self.query.to(kind.dtype)

        def attend() -> Tensor:
            answer = self.cache.attend(0, query, precision=kind.precision, window=self.size.window)
            assert isinstance(answer, Tensor)
            return answer

        return attend

    def ours_appending(self, kind: Kind) -> Work:
        query = self.query.to(kind.dtype)
        before = self.size.held - self.size.queries
        key, value = (x[0, :, before:].to(kind.dtype, copy=True) for x in (self.cache.k_cache, self.cache.v_cache))

        def append_attend() -> None:
            self.cache.truncate(before)
            self.cache.append_attend(0, query, key, value, precision=kind.precision, window=self.size.window)

        return append_attend

    def attentions(self, kind: Kind, backend: SDPBackend | None) -> list[Attention]:
        """A call of torch's for each sequence."""
        found = []
        for sequence, length in enumerate(self.lengths):
            query = self.query[sequence : sequence + 1].transpose(1, 2).contiguous().to(kind.dtype)
            keys, values = (
                x[0, sequence : sequence + 1, :length].transpose(1, 2).contiguous().to(kind.dtype)
                for x in (self.cache.k_cache, self.cache.v_cache)
            )
            found.append(Attention.prepared(backend, query, keys, values, self.size.window))
        return found

    # What the others do: the work, and its answers, one a sequence.

    def sdpa(self, kind: Kind, backend: SDPBackend | None) -> tuple[Work, list[Tensor]]:
        attentions = self.attentions(kind, backend)

        def attend() -> list[Tensor]:
            return [attention() for attention in attentions]

        return attend, attend()

    def sdpa_appending(self, kind: Kind, backend: SDPBackend | None) -> tuple[Work, list[Tensor]]:
        (attention,) = self.attentions(kind, backend)
        newest = slice(-self.size.queries, None)
        key, value = attention.keys[:, :, newest].clone(), attention.values[:, :, newest].clone()

        def append_attend() -> Tensor:
            attention.keys[:, :, newest].copy_(key)
            attention.values[:, :, newest].copy_(value)
            return attention()

        return append_attend, [append_attend()]

    def sdpa_gathering(self, kind: Kind, backend: SDPBackend | None) -> tuple[Work, list[Tensor]]:
        """What FP32 code does without this package's attention: gather the layer as FP32, then attend to that."""
        (attention,) = self.attentions(kind, backend)
        heads = attention.keys.shape[1]
        attention = replace(attention, keys=torch.empty(0), values=torch.empty(0))

        def gather_attend() -> Tensor:
            keys, values = (x[None].transpose(1, 2) for x in self.cache.get_valid_f32(0))
            return replace(attention, keys=repeated(keys, heads), values=repeated(values, heads))()

        return gather_attend, [gather_attend()]


class Bench:
    def __init__(self, results: Results, device: torch.device, quick: bool) -> None:
        self.results, self.device, self.quick = results, device, quick
        self.missing = Missing()
        self._rates: dict[torch.dtype, float] = {}

    def ceiling(self, kind: Kind) -> float:
        """FLOP a second."""
        dtype = kind.dtype
        if not on_gpu(self.device):
            dtype = torch.float32
        elif kind.precision == "fp32":
            dtype = torch.float16 if kind.dtype == torch.float32 else kind.dtype
        if dtype not in self._rates:
            self._rates[dtype] = ceilings.matmul_rate(self.device, dtype, self.quick, self.results)
        halved = on_gpu(self.device) and kind.dtype == torch.float32
        return self._rates[dtype] / (2 if halved else 1)

    def peers(self, name: str, case: Case, kind: Kind, want: Tensor, append: bool) -> dict[str, Sampler]:
        """Those that can do this case here and answer what we do."""
        found: dict[str, Sampler] = {}
        for peer, backend in (kind.peers if on_gpu(self.device) else {kind.cpu_peer: None}).items():
            ways = {f"copy_, {peer}": case.sdpa_appending} if append else {peer: case.sdpa}
            if kind.dtype == torch.float32 and not append and case.size.window is None and not case.size.ragged:
                ways["to FP32, SDPA"] = case.sdpa_gathering
            for way, make in ways.items():
                try:
                    with using(backend):
                        work, answers = make(kind, backend)
                        checked(answers, want)
                    found[way] = in_eager_calls(work, self.device, backend)
                except Exception as error:  # a peer's failure is not to cost the row
                    self.missing.note(name, way, error)
        return found

    def measure(self, name: str, case: Case, kind: Kind, append: bool) -> None:
        attend = case.ours(kind)
        samplers = {"ours": in_eager_calls(case.ours_appending(kind) if append else attend, self.device)}
        samplers |= self.peers(name, case, kind, attend(), append)
        timings = compare(samplers, rounds_for(samplers, SECONDS, self.quick))
        c = case.cache
        config = {
            "queries": case.size.queries,
            "positions": case.size.held,
            "lengths": case.lengths,
            "query_heads": case.query.shape[2],
            "kv_heads": c.num_heads,
            "head_dim": HEAD_DIM,
            "batch": c.batch_size,
            "window": case.size.window,
            "precision": kind.precision,
            "flop": case.flop,
            "us": timings["ours"].seconds * 1e6,
        }
        ceiling = self.ceiling(kind) / 1e12
        self.results.add(measured(name, "TFLOP/s", timings, lambda s: case.flop / s / 1e12, ceiling, config))

    def run(self, name: str, make: Callable[[], Case], kind: Kind, append: bool, case: Case | None) -> Case | None:
        """One row. Returns the case, made if there is none yet; None after a failure, which may have changed it."""
        try:
            case = case or make()
            with portable_kernel(name.endswith("/portable")):
                self.measure(name, case, kind, append)
        except Exception as error:  # one row's failure is not to cost the others'
            self.missing.note(name, "ours", error)
            case = None
        if on_gpu(self.device):
            torch.cuda.empty_cache()  # here, where no traceback holds a peer's copies any more
        self.results.save(last=False)
        return case


@contextlib.contextmanager
def portable_kernel(wanted: bool) -> Iterator[None]:
    """The kernel for every GPU, where this one would take that for sm_90a."""
    if wanted:
        extension.prefer_portable_prompts(True)
    yield
    if wanted:
        extension.prefer_portable_prompts(False)


# The command line


def sizes_of(shape: str, device: torch.device, quick: bool) -> list[Size]:
    if quick:
        return QUICK_SIZES if shape != "gqa64x8" else []
    if not on_gpu(device):
        return CPU_SIZES if shape == "mha32" else []
    sizes = list(PLAIN_SIZES)
    sizes += WINDOW_SIZES if shape == "mha32" else []
    return sizes + (RAGGED_SIZES if shape != "gqa64x8" else [])


def runs_sm90_code(device: torch.device) -> bool:
    return on_gpu(device) and torch.cuda.get_device_capability(device) == (9, 0)


def rows_of(shape: str, size: Size, device: torch.device, quick: bool) -> list[tuple[str, Kind, bool]]:
    """Name, kind, and whether it appends."""
    found = []
    for name, kind in KINDS.items():
        if (name == "bf16-exact" and shape != "mha32") or (name != "fp32" and not on_gpu(device) and not quick):
            continue
        row = f"prompt/{shape}/{size.name()}/{name}"
        found.append((row, kind, False))
        if size.append and name != "bf16-exact":
            found.append((f"{row}/append", kind, True))
        if size.append and shape == "mha32" and name in ("fp32", "fp16") and runs_sm90_code(device):
            found.append((f"{row}/portable", kind, False))
    return found


def main() -> int:
    p = parser(__doc__)
    p.add_argument(
        "--only",
        default="",
        help="rows whose name has this in it, such as mha32 or 2048x65536/fp32; several with commas (default: all)",
    )
    p.add_argument("--crossover", action="store_true", help="few queries instead: prompt/few/...")
    args: argparse.Namespace = p.parse_args()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    results = open_results(args, device)
    begin = time.perf_counter()
    if args.crossover:
        import bench_prompt_few

        missing = bench_prompt_few.run(device, results, args.quick, args.only)
    else:
        missing = run(device, results, args.quick, args.only)
    targets = H200_TARGETS if "H200" in device_name(device) else {}
    print_measurements(f"attention of many queries, {device_name(device)}", results, targets)
    print(f"{time.perf_counter() - begin:.0f} s")
    results.save()
    if missing.failed:
        print("\nFailed:\n  " + "\n  ".join(missing.failed))
    return 1 if missing.failed else 0


def run(device: torch.device, results: Results, quick: bool, only: str) -> Missing:
    bench = Bench(results, device, quick)
    sweep = []
    for shape, (query_heads, heads) in SHAPES.items():
        for size in sizes_of(shape, device, quick):
            rows = [row for row in rows_of(shape, size, device, quick) if chosen(row[0], only)]
            needed = 4 * HEAD_DIM * heads * size.held * len(size.lengths())
            if rows and needed < 0.3 * free_bytes(device):
                sweep.append((query_heads, heads, size, rows))
    with progress("prompts", sum(len(rows) for *_, rows in sweep)) as advance:
        for query_heads, heads, size, rows in sweep:
            case = None
            for name, kind, append in rows:
                case = bench.run(name, lambda: Case(query_heads, heads, size, device), kind, append, case)  # noqa: B023
                advance(1)
            del case
    return bench.missing


if __name__ == "__main__":
    sys.exit(main())
