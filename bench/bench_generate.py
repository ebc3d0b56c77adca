"""Decoding with a 7B-shape Llama of random weights: tokens a second and peak memory, against transformers' own caches.

One sequence, greedy, at each number of positions held: DynamicCache; StaticCache, eager and compiled with CUDA graphs;
ours eager, in a CUDA graph (`decode_graph`), and that compiled first. The tuned ones (only when asked for, as they take
minutes) are compiled with Inductor's `coordinate_descent_tuning`, and have rows of their own. Caches are filled with
random keys and values instead of by a prompt. Time is the host's clock over whole steps, each token fed back. The
ceiling: the weights and the FP16 keys and values, read once for each token, at the rate of a kernel that only reads, of
the same run.

Peak memory is what the allocator held at most once weights and cache existed, in GB of 10^9 bytes, with the steps' own
needs in it (captures and compiled code too). What does not fit is said and left out, and so are other failures.

How long a prompt takes before that is bench_first_token.py's.

Parts for a short session: --weights, --positions, --options, --layers. Without a GPU it is a rehearsal with a tiny
model, under the name `tiny`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import ceilings
import llama
import torch
from common import (
    Measurement,
    Results,
    Target,
    choose_device,
    device_name,
    on_gpu,
    one_thread,
    open_results,
    parser,
    print_measurements,
    print_table,
    quantity,
)
from llama import OPTIONS, SEVEN_B, TINY, WEIGHT_WORDS, WEIGHTS, LlamaShape, Option, Unavailable

DECODED = ["fp16", "fp32", "w4", "w8"]
GPU_POSITIONS = [1_024, 4_096, 16_384, 65_536, 131_072]
FEWER_POSITIONS = [4_096, 65_536]  # for all but FP16 weights: compiling takes most of the time
CPU_POSITIONS = [128, 512]
GB = 10**9

H200_TARGETS = {
    "generate/7b/fp16/65536": Target(88),
    "generate/7b/fp16/65536/tuned": Target(88),
    "generate/7b/fp32/65536": Target(69),
    "generate/7b/fp32/65536/tuned": Target(69),
    "generate/7b/w4/65536": Target(100),
    "generate/7b/w8/65536": Target(95),
    "generate/peak_gb/7b/w4/65536": Target(41, at_least=False),
    "generate/peak_gb/7b/w8/65536": Target(44, at_least=False),
    "generate/7b/fp16/1024": Target(1.0, over_peer=OPTIONS["static-compiled"].name),
}


@dataclass(frozen=True)
class Figure:
    tokens_per_second: float
    peak: int  # bytes


def measure_option(
    option: Option, model: Any, shape: LlamaShape, weights: str, positions: int, device: torch.device, profile: bool
) -> Figure:
    cache = option.prepare(model, shape, positions - llama.RESERVE, positions)
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with llama.compiler_set_up(weights, option.tuned):
        step = option.step(model, cache)
        seconds = llama.step_seconds(step, device)
    figure = Figure(1 / seconds, llama.peak_bytes(device))
    if profile:
        rows = [
            [name[:100], f"{kernel.launches:g}", f"{1e6 * kernel.seconds:,.1f}"]
            for name, kernel in llama.kernels_of(step, device).items()
        ]
        title = f"{weights}, {positions:,} positions, {option.name}: a step of {1e6 * seconds:,.0f} us"
        print_table(title, ["kernel", "launches a step", "us a step"], rows)
    return figure


def try_option(
    option: Option,
    model: Any,
    shape: LlamaShape,
    weights: str,
    positions: int,
    device: torch.device,
    profile: bool,
    failed: list[str],
) -> Figure | None:
    """The figure; where there is none it is said why, and noted in `failed` unless it was for want of memory."""
    what = f"{weights}, {positions:,} positions, {option.name}"
    begin = time.perf_counter()
    words, figure = "", None
    try:
        with torch.no_grad(), one_thread(device):
            figure = measure_option(option, model, shape, weights, positions, device, profile)
    except (torch.OutOfMemoryError, MemoryError):
        words = "does not fit into memory: left out"
    except Exception as error:  # one option's failure is not to cost the others' figures
        words = f"failed: {llama.first_line(error)}"
        failed.append(f"{what}: {llama.first_line(error)}")
    llama.tidy(device)  # here, where no traceback holds the cache any more
    if figure is not None:
        words = quantity(figure.tokens_per_second, "tok/s")
        words += f", peak {figure.peak / GB:.2f} GB" if figure.peak else ""
    print(f"{what}: {words} [{time.perf_counter() - begin:.0f} s]", flush=True)
    return figure


def record(
    results: Results,
    shape: LlamaShape,
    weights: str,
    positions: int,
    figures: dict[str, Figure],
    tuned: bool,
    weight_bytes: int,
    reading: float,
) -> None:
    """Ours, the fastest of its ways, with the others beside it, all compiled with Inductor's tuning or all without."""
    options = {OPTIONS[key]: figure for key, figure in figures.items() if OPTIONS[key].tuned == tuned}
    ours = {option.name: figure for option, figure in options.items() if option.ours}
    others = {option.name: figure for option, figure in options.items() if not option.ours}
    if not ours:
        return
    best = max(ours, key=lambda name: ours[name].tokens_per_second)
    needed = weight_bytes + positions * shape.position_bytes(2)
    config = shape.config() | {
        "weights": WEIGHT_WORDS[weights],
        "positions": positions,
        "held_before": positions - llama.RESERVE,
        "option": best,
        "bytes": needed,
        "ours": {name: figure.tokens_per_second for name, figure in ours.items()},
    }
    peaks = {name: figure.peak / GB for name, figure in (ours | others).items() if figure.peak}
    value = ours[best].tokens_per_second
    speeds = {name: figure.tokens_per_second for name, figure in others.items()}
    name = f"{shape.name}/{weights}/{positions}" + ("/tuned" if tuned else "")
    results.add(
        Measurement(
            f"generate/{name}",
            value,
            "tok/s",
            reading / needed,
            speeds,
            {name: value / speed for name, speed in speeds.items()},
            config | {"peak_gb": peaks},
        )
    )
    if ours[best].peak:
        results.add(
            Measurement(
                f"generate/peak_gb/{name}",
                ours[best].peak / GB,
                "GB",
                peers={name: peaks[name] for name in others},
                config=config,
            )
        )


def comma_list(text: str) -> list[str]:
    return [part for part in text.replace(" ", "").split(",") if part]


def positions_for(weights: str, args: argparse.Namespace, gpu: bool) -> list[int]:
    if args.positions:
        return [int(part) for part in args.positions]
    if not gpu:
        return CPU_POSITIONS[:1] if args.quick else CPU_POSITIONS
    if args.quick:
        return GPU_POSITIONS[:1]
    return GPU_POSITIONS if weights == "fp16" else FEWER_POSITIONS


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    default = f"{','.join(DECODED)}; fp16,fp32 when --quick"
    p.add_argument("--weights", type=comma_list, help=f"of {','.join(WEIGHTS)} (default: {default})")
    p.add_argument(
        "--positions", type=comma_list, help="such as 4096,65536 (default: 1,024 to 131,072; fewer but for fp16)"
    )
    p.add_argument(
        "--options",
        type=comma_list,
        help=f"of {','.join(OPTIONS)} (default: all but the tuned; on a CPU none compiled)",
    )
    p.add_argument("--layers", type=int, help="of the model (default: all of them)")
    p.add_argument("--profile", action="store_true", help="show the time of every kernel of a step, too (on a GPU)")
    args = p.parse_args()
    for name, known in (("weights", WEIGHTS), ("options", OPTIONS)):
        unknown = set(getattr(args, name) or ()) - set(known)
        if unknown:
            p.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if any(not part.isdigit() or int(part) <= llama.RESERVE for part in args.positions or ()):
        p.error(f"--positions takes whole numbers above {llama.RESERVE}, got {','.join(args.positions)}")
    if args.layers is not None and args.layers < 1:
        p.error(f"--layers must be at least 1, got {args.layers}")
    return args


def main() -> int:
    args = arguments()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    gpu = on_gpu(device)
    if args.profile and not gpu:
        print("bench_generate: --profile shows the kernels of a GPU, and here there is none")
        return 2
    try:
        llama.transformers()
    except Unavailable as why:
        print(f"bench_generate: {why}")
        return 0
    results = open_results(args, device, keep=args.layers is None)
    shape = (SEVEN_B if gpu else TINY).with_layers(args.layers or (2 if args.quick else None))
    options = args.options or [
        key for key, option in OPTIONS.items() if not option.tuned and (gpu or not option.compiled)
    ]
    if not gpu and not args.options:
        options.remove("graph")  # without a GPU it is the eager step
    kinds = args.weights or (["fp16", "fp32"] if args.quick else DECODED)
    if not gpu:
        print(
            f"A rehearsal on the CPU, with a tiny model ({shape.layers} layers): its figures say nothing about a 7B one"
        )

    reading = ceilings.read_rate(device, args.quick)
    llama.tidy(device)
    failed: list[str] = []
    for weights in kinds:
        positions = positions_for(weights, args, gpu)
        try:
            model = llama.try_model(shape, weights, max(positions), device)
        except Unavailable as why:
            llama.tidy(device)
            print(f"{why}: left out", flush=True)
            continue
        for number in positions:
            figures: dict[str, Figure] = {}
            for key in options:
                figure = try_option(OPTIONS[key], model, shape, weights, number, device, args.profile, failed)
                if figure is not None:
                    figures[key] = figure
            for tuned in (False, True):
                record(results, shape, weights, number, figures, tuned, llama.weight_bytes_read(model), reading)
            results.save(last=False)
        del model
        llama.tidy(device)

    targets = H200_TARGETS if "H200" in device_name(device) else {}
    print_measurements(f"decoding, {shape.name}, {device_name(device)}", results, targets)
    results.save()
    if failed:
        print("\nFailed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
