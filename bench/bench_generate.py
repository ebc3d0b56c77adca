"""Decoding with Llamas of random weights: tokens a second and peak memory, against transformers' own caches.

Three shapes: `7b` (32 heads, Llama 2's), `8b` (32 heads on 8, Llama 3's) and `8h` (a hybrid as large: three linear
layers to one with attention, Qwen3.5's). Greedy, one sequence or several (`b16`), at
each number of positions held: DynamicCache; StaticCache, eager and compiled with CUDA graphs;
ours eager, in a CUDA graph (`decode_graph`), and that compiled first. The tuned ones (only when asked for, as they take
minutes) are compiled with Inductor's `coordinate_descent_tuning`, and have rows of their own. Caches are filled with
random keys and values instead of by a prompt. Time is the host's clock over whole steps, each token fed back. The
ceiling: the weights and the FP16 keys and values, read once for each token, at the rate of a kernel that only reads, of
the same run.

Peak memory is what the allocator held at most once weights and cache existed, in GB of 10^9 bytes, with the steps' own
needs in it (captures and compiled code too). What does not fit is said and left out, and so are other failures.

How long a prompt takes before that is bench_first_token.py's.

A row `generate/<model>/<weights>/<positions>` is the fastest of our ways but the tuned; each way has a row of its own
behind it. The parts of a step (`generate/step/...`) are CUDA graphs of their own: every matrix product, by torch's own
kernels; append and attention of every layer; and what a step in a plain CUDA graph takes beyond the two.

Parts for a short session: --models, --weights, --positions, --batch, --options, --layers. Without a GPU it is a
rehearsal with a tiny model, under the name `tiny`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import ceilings
import llama
import llama_step
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
from llama import (
    EIGHT_B,
    EIGHT_B_HYBRID,
    OPTIONS,
    SEVEN_B,
    TINY,
    WEIGHT_WORDS,
    WEIGHTS,
    LlamaShape,
    Option,
    Unavailable,
)

MODELS = {"7b": SEVEN_B, "8b": EIGHT_B, "8h": EIGHT_B_HYBRID}
DECODED = {"7b": ["fp16", "fp32", "w4", "w8"], "8b": ["fp16", "bf16"], "8h": ["fp16"]}
GPU_POSITIONS = [1_024, 4_096, 16_384, 65_536, 131_072]
FEWER_POSITIONS = [4_096, 65_536]  # for all but FP16 weights: compiling takes most of the time
CPU_POSITIONS = [128, 512]
EIGHT_B_POSITIONS = [8_192, 32_768, 131_072]
HYBRID_POSITIONS = [32_768]
SEVERAL = 16  # sequences, of the fewest of these positions, FP16 weights
GB = 10**9
WAYS = {"eager": "eager", "graph": "graph", "graph-compiled": "compiled"}  # rows of their own, by what they are called

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
    "generate/8b/fp16/8192/tuned": Target(185),
    "generate/8b/fp16/131072/tuned": Target(108),
    "generate/8b/fp16/b16/8192": Target(1.0, over_peer=OPTIONS["static-compiled"].name),
}


@dataclass(frozen=True)
class Case:
    shape: LlamaShape
    weights: str
    positions: int
    batch: int = 1

    @property
    def name(self) -> str:
        several = "" if self.batch == 1 else f"/b{self.batch}"
        return f"{self.shape.name}/{self.weights}{several}/{self.positions}"

    @property
    def cache_bytes(self) -> int:
        """Of FP16 keys and values."""
        return self.batch * self.positions * self.shape.position_bytes(2)

    @property
    def words(self) -> str:
        several = "" if self.batch == 1 else f"{self.batch} sequences of "
        return f"{self.shape.name}, {self.weights}, {several}{self.positions:,} positions"


@dataclass(frozen=True)
class Figure:
    tokens_per_second: float  # of all sequences
    peak: int  # bytes


def measure_option(option: Option, model: Any, case: Case, device: torch.device, profile: bool) -> Figure:
    cache = option.prepare(model, case.shape, case.positions - llama.RESERVE, case.positions, case.batch)
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with llama.compiler_set_up(case.weights, option.tuned):
        step = option.step(model, cache)
        seconds = llama.step_seconds(step, device, case.batch)
    figure = Figure(case.batch / seconds, llama.peak_bytes(device))
    if profile:
        rows = [
            [name[:100], f"{kernel.launches:g}", f"{1e6 * kernel.seconds:,.1f}"]
            for name, kernel in llama.kernels_of(step, device, case.batch).items()
        ]
        title = f"{case.words}, {option.name}: a step of {1e6 * seconds:,.0f} us"
        print_table(title, ["kernel", "launches a step", "us a step"], rows)
    return figure


def try_option(
    option: Option, model: Any, case: Case, device: torch.device, profile: bool, failed: list[str]
) -> Figure | None:
    """The figure; where there is none it is said why, and noted in `failed` unless it was for want of memory."""
    what = f"{case.words}, {option.name}"
    begin = time.perf_counter()
    words, figure = "", None
    try:
        with torch.no_grad(), one_thread(device):
            figure = measure_option(option, model, case, device, profile)
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
    results: Results, case: Case, figures: dict[str, Figure], tuned: bool, weight_bytes: int, reading: float
) -> None:
    """Ours, the fastest of its ways, with the others beside it, all compiled with Inductor's tuning or all without."""
    chosen = {key: figure for key, figure in figures.items() if OPTIONS[key].tuned == tuned}
    ours = {key: figure for key, figure in chosen.items() if OPTIONS[key].ours}
    others = {OPTIONS[key].name: figure for key, figure in chosen.items() if not OPTIONS[key].ours}
    if not ours:
        return
    needed = weight_bytes + case.cache_bytes
    speeds_of_ours = {OPTIONS[key].name: figure.tokens_per_second for key, figure in ours.items()}
    config = case_config(case) | {"bytes": needed, "ours": speeds_of_ours}
    speeds = {name: figure.tokens_per_second for name, figure in others.items()}
    peaks = {name: figure.peak / GB for name, figure in others.items() if figure.peak}

    def add(name: str, key: str) -> None:
        figure = ours[key]
        found = config | {"option": OPTIONS[key].name, "peak_gb": peaks | {OPTIONS[key].name: figure.peak / GB}}
        value = figure.tokens_per_second
        ratios = {other: value / speed for other, speed in speeds.items()}
        results.add(
            Measurement(f"generate/{name}", value, "tok/s", case.batch * reading / needed, speeds, ratios, found)
        )

    best = max(ours, key=lambda key: ours[key].tokens_per_second)
    name = case.name + ("/tuned" if tuned else "")
    add(name, best)
    for key in ours:
        if key in WAYS:
            add(f"{name}/{WAYS[key]}", key)
    if ours[best].peak:
        results.add(Measurement(f"generate/peak_gb/{name}", ours[best].peak / GB, "GB", peers=peaks, config=config))


def case_config(case: Case) -> dict[str, Any]:
    return case.shape.config() | {
        "weights": WEIGHT_WORDS[case.weights],
        "positions": case.positions,
        "held_before": case.positions - llama.RESERVE,
        "batch": case.batch,
    }


def record_parts(
    results: Results, case: Case, model: Any, seconds: float, weight_bytes: int, reading: float, device: torch.device
) -> None:
    """The split of a step that takes so many seconds."""
    cache = llama.our_cache(model, case.positions, case.batch)
    llama.fill_ours(cache, case.shape, case.positions - llama.RESERVE)
    attention = llama_step.time_attention(cache, case.shape, model.dtype, device)
    products = llama_step.time_products(model, case.weights, device, case.batch)
    for part, taken, moved in (
        ("weights", products, weight_bytes),
        ("append_attend", attention, case.cache_bytes),
        ("rest", seconds - products - attention, None),
    ):
        least = None if moved is None else 1e3 * moved / reading
        results.add(
            Measurement(f"generate/step/{case.name}/{part}", 1e3 * taken, "ms", least, config=case_config(case))
        )


def comma_list(text: str) -> list[str]:
    return [part for part in text.replace(" ", "").split(",") if part]


def positions_for(model: str, weights: str, args: argparse.Namespace, gpu: bool) -> list[int]:
    if args.positions:
        return [int(part) for part in args.positions]
    if not gpu:
        return CPU_POSITIONS[:1] if args.quick else CPU_POSITIONS
    if args.quick:
        return GPU_POSITIONS[:1]
    if model != "7b":
        return EIGHT_B_POSITIONS if model == "8b" else HYBRID_POSITIONS
    return GPU_POSITIONS if weights == "fp16" else FEWER_POSITIONS


def cases_of(model: str, args: argparse.Namespace, gpu: bool) -> dict[str, list[Case]]:
    """By the kind of weights."""
    shape = (MODELS[model] if gpu else TINY).with_layers(args.layers or (2 if args.quick else None))
    kinds = args.weights or (DECODED[model][:2] if args.quick else DECODED[model])
    cases = {
        kind: [Case(shape, kind, positions, args.batch) for positions in positions_for(model, kind, args, gpu)]
        for kind in kinds
    }
    everything = not (args.weights or args.positions or args.quick) and args.batch == 1
    if everything and gpu and model == "8b":
        cases["fp16"].append(Case(shape, "fp16", EIGHT_B_POSITIONS[0], SEVERAL))
    return cases


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--models", type=comma_list, default=list(MODELS), help=f"of {','.join(MODELS)} (default: all)")
    default = "; ".join(f"{','.join(kinds)} for {model}" for model, kinds in DECODED.items())
    p.add_argument(
        "--weights",
        type=comma_list,
        help=f"of {','.join(WEIGHTS)} (default: {default}; the first two of each when --quick)",
    )
    p.add_argument("--batch", type=int, default=1, help="sequences (default: 1; 16 too for one of 8b's cases)")
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
    for name, known in (("models", MODELS), ("weights", WEIGHTS), ("options", OPTIONS)):
        unknown = set(getattr(args, name) or ()) - set(known)
        if unknown:
            p.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if any(not part.isdigit() or int(part) <= llama.RESERVE for part in args.positions or ()):
        p.error(f"--positions takes whole numbers above {llama.RESERVE}, got {','.join(args.positions)}")
    for name in ("layers", "batch"):
        if (getattr(args, name) or 1) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def decode(
    case: Case,
    model: Any,
    options: list[str],
    profile: bool,
    reading: float,
    results: Results,
    failed: list[str],
    device: torch.device,
) -> None:
    """Every option of one case, and the split of the plain graph's step."""
    figures: dict[str, Figure] = {}
    for key in options:
        figure = try_option(OPTIONS[key], model, case, device, profile, failed)
        if figure is not None:
            figures[key] = figure
    weight_bytes = llama.weight_bytes_read(model)
    for tuned in (False, True):
        record(results, case, figures, tuned, weight_bytes, reading)
    plain = figures.get("graph", figures.get("eager"))
    if plain is not None:
        with torch.no_grad(), one_thread(device):
            record_parts(results, case, model, case.batch / plain.tokens_per_second, weight_bytes, reading, device)
        llama.tidy(device)
    results.save(last=False)


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
    options = args.options or [
        key for key, option in OPTIONS.items() if not option.tuned and (gpu or not option.compiled)
    ]
    if not gpu and not args.options:
        options.remove("graph")  # without a GPU it is the eager step
    if not gpu:
        print("A rehearsal on the CPU, with a tiny model: its figures say nothing about a large one")

    reading = ceilings.read_rate(device, args.quick)
    llama.tidy(device)
    failed: list[str] = []
    for name in args.models if gpu else args.models[:1]:
        for weights, cases in cases_of(name, args, gpu).items():
            try:
                model = llama.try_model(cases[0].shape, weights, max(case.positions for case in cases), device)
            except Unavailable as why:
                llama.tidy(device)
                print(f"{why}: left out", flush=True)
                continue
            for case in cases:
                decode(case, model, options, args.profile, reading, results, failed, device)
            del model
            llama.tidy(device)

    targets = H200_TARGETS if "H200" in device_name(device) else {}
    print_measurements(f"decoding, {device_name(device)}", results, targets)
    results.save()
    if failed:
        print("\nFailed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
