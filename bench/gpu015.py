"""GPU-015: the KV cache of a 7B model at 65,536 positions, filled, verified bit for bit and read back.

Allocates the cache (32 layers, 65,536 positions, 32 heads, head_dim 128: 34.36 GB), fills it position by position
through all layers with new data each time, as decoding does, and in chunks of 2,048, as a prefill does; compares what
is stored with torch's `.half()` bit for bit; reads every layer back to FP32; and holds the figures against their
targets, against ceilings measured in the same run, and against plain torch doing the same work. Then come 131,072 and
262,144 positions, as far as the device's memory goes.

Then a 7B model decodes with a cache that is full (gpu015_model.py), where transformers is installed and the device's
memory is enough; --no-model leaves that out.

Without a GPU it is a rehearsal: the same code on the CPU with fewer layers and a tiny model, in under two minutes.

The new data: a row for each position, layer, key and value, drawn at random (seeded) from a pool of random rows that is
larger than the processor's cache. Drawing them is in the time of the fills position by position (a small launch or
three a position), as a decoding step computes its keys and values just before too. Chunks are drawn outside the time.

Exit status: 0 when everything passes, else 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass, replace
from typing import Any

import ceilings
import gpu015_model
import torch
from common import (
    DTYPES,
    RESULTS,
    Measurement,
    Results,
    choose_device,
    device_name,
    free_bytes,
    on_gpu,
    open_results,
    parser,
    print_table,
    quantity,
    shown_path,
)
from gpu015_fill import (
    CHUNK,
    CPU_BYTES_A_LAYER,
    CPU_OTHER_SECONDS,
    CPU_VERIFY_EVERY,
    GB,
    HEAD_DIM,
    HEADS,
    LAYERS,
    POSITIONS,
    SEGMENT,
    Fill,
    Mismatch,
    Run,
    Shape,
)
from gpu015_model import Criterion
from llama import WEIGHTS

# The targets, for the 7B shape.
LEAST_FILL_RATE = 30.0  # positions/s through all layers
LEAST_RETRIEVE_RATE = 300.0  # layer-positions/s
MOST_MEMORY_GB = 36.0  # keys and values at 65,536 positions


@dataclass
class Line:
    """A line of the final table; `passed` None where there is nothing to reach."""

    figure: str
    measured: str
    target: str = ""
    passed: bool | None = None
    ceiling: str = ""
    peers: str = ""

    def cells(self) -> list[str]:
        verdict = "" if self.passed is None else "pass" if self.passed else "FAIL"
        return [self.figure, self.measured, self.target, verdict, self.ceiling, self.peers]


class Outcome:
    """The figures of one size: lines of a table, and measurements."""

    def __init__(self, results: Results, prefix: str, config: dict[str, Any]) -> None:
        self._results = results
        self._prefix = prefix
        self._config = config
        self.lines: list[Line] = []

    def record(self, name: str, m: Measurement) -> None:
        self._results.add(replace(m, name=f"{self._prefix}/{name}", config=self._config))

    def add(self, name: str, figure: str, m: Measurement, target: str, passed: bool | None) -> None:
        self.record(name, m)
        ceiling = quantity(m.ceiling, m.unit) if m.ceiling else ""
        peers = "\n".join(f"{peer}: {quantity(value, m.unit)}" for peer, value in m.peers.items())
        self.lines.append(Line(figure, quantity(m.value, m.unit), target, passed, ceiling, peers))

    def rate(
        self, name: str, figure: str, value: float, unit: str, least: float, ceiling: float, peers: dict[str, float]
    ) -> None:
        m = Measurement(name, value, unit, ceiling, peers)
        self.add(name, figure, m, f"> {quantity(least, unit)}", value > least)


def describe(shape: Shape) -> str:
    return f"{shape.layers} layers, {shape.positions:,} positions, {shape.heads} heads, head_dim {shape.head_dim}"


def measure(
    shape: Shape, device: torch.device, best: ceilings.Ceilings, results: Results, whole: bool, reduced: list[str]
) -> list[Line]:
    """One size. `whole`: every way to fill it, and plain torch beside it; else the fast ways alone."""
    print(f"\n{describe(shape)}: {shape.cache_bytes() / GB:.2f} GB of FP16 on {device_name(device)}", flush=True)
    run = Run(shape, device)

    # Ceilings in positions/s: the bytes that must move, and the launches that a way to fill makes.
    moving = best.append(shape.dtype) / shape.append_bytes()

    def at_most(launch: float | None, launches: int) -> float:
        return moving if launch is None else min(moving, 1 / (launch * launches))

    fills: list[Fill] = []
    if whole:
        ceiling = at_most(best.launch_on_host, shape.layers)
        fills.append(Fill("decode", "fill one by one, append", run.fill_by_append(), ceiling))
        ceiling = at_most(best.launch_on_host, 1)
        fills.append(Fill("decode_append_all", "fill one by one, append_all", run.fill_by_append_all(), ceiling))
        run.compare_with_torch(fills, "slice copy_", run.torch_by_copy)
    in_chunks = Fill("prefill", f"fill in chunks of {CHUNK:,}", run.fill_in_chunks(), moving)
    retrieve = run.read_back()
    read_peers: dict[str, float] = {}
    if whole:
        in_chunks.peers["slice copy_"] = run.torch_in_chunks(32 if on_gpu(device) else 4)
        read_peers = {"copy_ into out": run.torch_read_copy(), ".float()": run.torch_read_float()}
    if on_gpu(device):  # last: after a capture the cache has to look up its lengths on the device
        in_graphs = []
        for call, launches in (("append", shape.layers), ("append_all", 1)):
            name = "decode_graph" if call == "append" else "decode_append_all_graph"
            rate = run.fill_by_graph(append_all=call == "append_all")
            ceiling = at_most(best.launch_in_graph, launches)
            in_graphs.append(Fill(name, f"fill one by one, {call}, graph", rate, ceiling))
        if whole:
            run.compare_with_torch(in_graphs, "index_copy_ in a graph", run.torch_by_graph)
        fills += in_graphs
    fills.append(in_chunks)

    share = shape.layers * shape.row / (LAYERS * HEADS * HEAD_DIM)  # a position's part of one of the 7B cache
    outcome = Outcome(results, "gpu015" if whole else f"gpu015/{shape.positions}", shape.config())
    held = Measurement("", len(run.cache), "positions")
    outcome.add("positions", "held", held, f"{shape.positions:,}", held.value == shape.positions)
    memory = run.cache.memory_bytes()
    most = MOST_MEMORY_GB * share * shape.positions / POSITIONS
    m = Measurement("", memory / GB, "GB")
    outcome.add("memory_gb", "keys and values", m, f"< {quantity(most, 'GB')}", memory / GB < most)
    exact = 2 * memory == shape.fp32_bytes() and memory == run.cache.k_cache.nbytes + run.cache.v_cache.nbytes
    outcome.lines.append(
        Line("  of what FP32 takes", f"{100 * memory / shape.fp32_bytes():.6g}%", "exactly half", exact)
    )
    if run.one_by_one < shape.positions:
        reduced.append(f"of the fills one by one {run.one_by_one:,} positions, the others in chunks, to keep the time")
    if on_gpu(device):
        more = run.allocated - memory  # lengths, counters, and what the allocator rounds up
        outcome.lines.append(Line("  the allocator gave", f"{more:,} bytes more", "< 8 MiB more", more < 8 << 20))
        peak = torch.cuda.max_memory_allocated(device) / GB
        outcome.add("peak_gb", "  peak, sources and buffers included", Measurement("", peak, "GB"), "", None)
    for fill in fills:
        name = f"fill_rate/{fill.name}"
        outcome.rate(name, fill.figure, fill.rate, "positions/s", LEAST_FILL_RATE / share, fill.ceiling, fill.peers)
    reading = best.widen / (shape.row * 2 * (2 + 4))
    unit = "layer-positions/s"
    outcome.rate("retrieve_rate", "read back to FP32", retrieve, unit, LEAST_RETRIEVE_RATE, reading, read_peers)
    every = f"of {len(fills) * shape.layers * shape.positions:,}"  # a difference would have raised
    outcome.lines.append(Line("verified bit for bit", f"{run.verified:,} layer-positions", every, True))
    columns = ["figure", "measured", "target", "", "ceiling", "plain torch"]
    print_table(f"GPU-015: {describe(shape)}", columns, [line.cells() for line in outcome.lines])
    return outcome.lines


def reduced_shape(
    asked: Shape, device: torch.device, best: ceilings.Ceilings, own_layers: bool, quick: bool
) -> tuple[Shape, list[str]]:
    """What of the shape asked for this machine does, and in words what was reduced."""
    shape = asked
    if quick:
        shape = replace(shape, layers=min(2, shape.layers), positions=min(4 * CHUNK, shape.positions))
    room = free_bytes(device) - shape.extra_bytes(device) if on_gpu(device) else int(0.4 * free_bytes(device))
    layers = min(shape.layers, room // (shape.cache_bytes() // shape.layers))
    if not on_gpu(device) and not own_layers:
        share = shape.positions * shape.row / (POSITIONS * HEADS * HEAD_DIM)
        layers = min(layers, int(CPU_OTHER_SECONDS * best.copy / (CPU_BYTES_A_LAYER * share)))
    shape = replace(shape, layers=max(1, layers))
    if shape.cache_bytes() > room:
        shape = replace(shape, positions=max(1, shape.positions * room // shape.cache_bytes()))
    words = []
    if shape.layers < asked.layers:
        words.append(f"{shape.layers} of {asked.layers} layers")
    if shape.positions < asked.positions:
        words.append(f"{shape.positions:,} of {asked.positions:,} positions")
    if not on_gpu(device):
        words.append(f"one in {CPU_VERIFY_EVERY} blocks of {SEGMENT:,} positions compared, no graphs, no larger sizes")
    return shape, words


def draw_chart(results: Results) -> None:
    if results.path is None:
        return
    import charts

    folder = charts.IMAGES if results.path.parent == RESULTS else results.path.parent
    written = charts.draw_gpu015(results.path, folder)
    print(f"Chart: {shown_path(written)}" if written else "No chart: matplotlib is not installed")


# The lines of the first half that the verdict repeats, and how it calls them.
CRITERIA = {
    "held": "positions",
    "keys and values": "memory of keys and values",
    "fill one by one, append": "fill rate, position by position",
    "read back to FP32": "retrieval rate",
}


def show_verdict(lines: list[Line], model: list[Criterion]) -> None:
    """Each criterion with its figure."""
    first = {line.figure: line for line in reversed(lines)}  # the first size is the one that was asked for
    criteria = [
        Criterion(name, first[figure].measured, first[figure].target, first[figure].passed)
        for figure, name in CRITERIA.items()
        if figure in first
    ]
    rows = [criterion.cells() for criterion in criteria + model]
    print_table("GPU-015: each criterion", ["criterion", "figure", "target", ""], rows)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--layers", type=int, help=f"(default {LAYERS}; on a CPU what memory and two minutes allow)")
    p.add_argument("--positions", type=int, default=POSITIONS, help="(default %(default)s)")
    p.add_argument("--heads", type=int, default=HEADS, help="key/value heads (default %(default)s)")
    p.add_argument("--head-dim", type=int, default=HEAD_DIM, help="(default %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the keys and values that come in")
    p.add_argument("--no-larger", action="store_true", help="leave out twice and four times the positions")
    p.add_argument(
        "--model",
        action=argparse.BooleanOptionalAction,
        help="the second half, a 7B model (default: with the standard shape, where memory is enough)",
    )
    p.add_argument("--only-model", action="store_true", help="the second half alone")
    p.add_argument("--model-weights", default=",".join(gpu015_model.KINDS), help="of it (default %(default)s)")
    p.add_argument(
        "--no-compile", action="store_true", help="the second half without torch.compile, which takes minutes"
    )
    args = p.parse_args()
    kinds = args.model_weights.split(",")
    if unknown := sorted(set(kinds) - set(WEIGHTS)):
        p.error(f"--model-weights: {', '.join(unknown)} is none of {', '.join(WEIGHTS)}")
    for name in ("layers", "positions", "heads", "head_dim"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    torch.set_grad_enabled(False)

    device = choose_device(args.device)
    asked = Shape(args.layers or LAYERS, args.positions, args.heads, args.head_dim, DTYPES[args.dtype])
    standard = asked == Shape(LAYERS, POSITIONS, HEADS, HEAD_DIM, torch.float32)
    results = open_results(args, device, keep=standard)

    print("Measuring what this machine can do at most ...", flush=True)
    best = ceilings.measure(device, args.quick)
    best.record(results)
    gc.collect()
    shape, reduced = reduced_shape(asked, device, best, args.layers is not None, args.quick)
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    failed: list[str] = []
    with_model = args.model
    if with_model is None:
        with_model = args.only_model or (standard and gpu015_model.fits(device))
    model: list[Criterion] = []
    try:
        lines = [] if args.only_model else measure(shape, device, best, results, True, reduced)
        for times in (2, 4) if on_gpu(device) and not (args.no_larger or args.only_model) else ():
            larger = replace(shape, positions=shape.positions * times)
            gc.collect()
            needed, free = larger.cache_bytes() + larger.extra_bytes(device), free_bytes(device)
            if needed > free:
                print(
                    f"\n{larger.positions:,} positions need {needed / GB:.1f} GB, sources and buffers included; "
                    f"{free / GB:.1f} GB are free: left out"
                )
                continue
            torch.cuda.reset_peak_memory_stats(device)
            lines += measure(larger, device, best, results, False, reduced)
        results.save(last=False)
        if with_model:
            gc.collect()
            free_bytes(device)  # lets go of what the allocator keeps
            reading = best.read if on_gpu(device) else None
            model = gpu015_model.run(device, results, reading, args.quick, kinds, not args.no_compile)
        show_verdict(lines, model)
        failed = [line.figure.strip() for line in lines if line.passed is False]
        failed += [criterion.name for criterion in model if criterion.passed is False]
    except Mismatch as difference:  # then no figure means anything
        failed = [str(difference)]
    else:
        results.save()
        draw_chart(results)

    verdict = f"GPU-015: {'FAIL' if failed else 'PASS'}"
    if not on_gpu(device):
        verdict += ", REHEARSAL on the CPU"
    verdict += f" ({device_name(device)}, {describe(shape)})"
    if not standard:
        verdict += ", not the 7B cache's shape"
    if reduced:
        verdict += f"; reduced: {', '.join(reduced)}"
    if shape != Shape(LAYERS, POSITIONS, HEADS, HEAD_DIM, shape.dtype):
        verdict += "; the targets are scaled to that"
    if args.only_model:
        verdict += "; the first half was left out"
    if model:
        verdict += f"; {'; '.join(f'{criterion.name}: {criterion.figure}' for criterion in model)}"
    if failed:
        verdict += f"; failed: {', '.join(failed)}"
    print(f"\n{verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
