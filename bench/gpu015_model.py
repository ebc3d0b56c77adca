"""GPU-015's second half: a 7B model decodes with the cache full.

For each kind of weights (FP16; 4 bits, or 8 where there are no 4-bit kernels; FP32): a prompt in chunks, timed, into a
DynamicCache too (bench_first_token.py measures the same rows without the rest); random
keys and values up to 65,536 positions where the prompt was shorter; then decoding to the last position, in a CUDA graph
and in a compiled one, the faster of which counts. The weights are random, as speed does not depend on them.

The split of a step is measured in parts, each as a CUDA graph of its own: every matrix product of the model; appending
to and attending to every layer of the full cache; the rest is what the whole step takes beyond the two.

Peak memory is what the allocator held at most after weights and cache were there; beside it what the driver says is in
use on the device, with the CUDA context and the allocator's spare memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import llama
import llama_prompt
import llama_step
import torch
from common import (
    Measurement,
    Results,
    on_gpu,
    one_thread,
    print_table,
    quantity,
    synchronize,
)
from llama import SEVEN_B, TINY, WEIGHT_WORDS, LlamaShape, Unavailable
from llama_prompt import Prompt

GB = 10**9
POSITIONS, CPU_POSITIONS = 65_536, 256
PROMPT_CHUNK = 2_048
PROMPTS = {"fp16": POSITIONS, "fp32": 16_384}  # tokens of the prompt that is timed, at most
KINDS = ("fp16", "w4", "fp32")
LEAST_TOKENS_PER_SECOND = 5.0
MOST_VRAM_GB = 48.0


@dataclass
class Criterion:
    """A line of the verdict; `passed` None where nothing is to be reached, or nothing was measured."""

    name: str
    figure: str
    target: str = ""
    passed: bool | None = None

    def cells(self) -> list[str]:
        return [self.name, self.figure, self.target, "" if self.passed is None else "pass" if self.passed else "FAIL"]


@dataclass
class Decoding:
    """One kind of weights; times in seconds, memory in bytes."""

    step: float = 0.0  # the fastest way's
    ways: dict[str, float] = field(default_factory=dict)  # seconds a step of each
    products: float = 0.0
    attention: float = 0.0
    weights: int = 0
    cache: int = 0
    buffers: int = 0
    activations: int = 0
    peak: int = 0
    driver: int = 0
    prompt: Prompt | None = None
    dynamic: Prompt | None = None  # the same, read into a DynamicCache
    held: int = 0

    @property
    def rest(self) -> float:
        return self.step - self.products - self.attention


def fits(device: torch.device) -> bool:
    """Whether the smallest variant can be expected to fit: its cache, its weights, and some room."""
    if not on_gpu(device):
        return True
    total: int = torch.cuda.get_device_properties(device).total_memory
    return total > POSITIONS * SEVEN_B.position_bytes(2) + 6 * GB


def decode(shape: LlamaShape, weights: str, positions: int, device: torch.device, compiled: bool) -> Decoding:
    """Everything about one kind of weights. Raises Unavailable, or an error for want of memory."""
    found = Decoding()
    model = llama.try_model(shape, weights, positions, device)
    held = positions - llama.RESERVE
    prompt = min(PROMPTS.get(weights, 0), held)
    if prompt:  # before our cache is there, as both may not fit
        found.dynamic = llama_prompt.read_prompt_dynamic(model, prompt, PROMPT_CHUNK, 1, device)
        llama.tidy(device)
    cache = llama.our_cache(model, positions)
    found.weights, found.cache = llama.weight_bytes(model), cache.memory_bytes()
    if prompt:
        found.prompt = llama_prompt.read_prompt_ours(model, cache, prompt, PROMPT_CHUNK, 1, device)
    llama.fill_ours(cache, shape, held)

    ways = [False, True] if compiled and on_gpu(device) else [False]
    for compile in ways:
        llama.tidy(device)
        if on_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
        with llama.compiler_set_up(weights):
            step = cache.decode_graph(model, compile=compile)
            seconds = llama.step_seconds(step, device)
        found.ways["compiled" if compile else "plain"] = seconds
        if seconds <= min(found.ways.values()):
            found.step, found.peak, found.driver = seconds, llama.peak_bytes(device), llama.driver_bytes(device)
            allocated = torch.cuda.memory_allocated(device) if on_gpu(device) else 0
            found.buffers = max(0, allocated - found.weights - found.cache)
            found.activations = max(0, found.peak - allocated)
        if compile is ways[-1]:
            ids = torch.ones(1, 1, dtype=torch.int64, device=device)
            while cache.get_seq_length() < positions:
                step(ids)
            synchronize(device)
            found.held = len(cache.caches[0])
        del step
        if compile is not ways[-1]:
            cache.crop(held - cache.get_seq_length())
    llama.tidy(device)
    found.attention = llama_step.time_attention(cache, shape, model.dtype, device)
    found.products = llama_step.time_products(model, weights, device)
    return found


def record(
    found: Decoding, shape: LlamaShape, weights: str, positions: int, reading: float | None, results: Results
) -> None:
    name = f"gpu015/{shape.name}/{weights}"
    config = shape.config() | {"positions": positions, "weights": WEIGHT_WORDS[weights]}
    table = (
        shape.vocabulary * shape.hidden * llama.WEIGHTS[weights].itemsize
    )  # of the embedding, of which a row is read
    weight_bytes, cache_bytes = found.weights - table, found.cache
    bound = None if reading is None else reading / (weight_bytes + cache_bytes)
    ways = {way: 1 / seconds for way, seconds in found.ways.items()}
    peaks = {"peak_gb": found.peak / GB} if found.peak else {}
    m = Measurement(f"{name}/decode", 1 / found.step, "tok/s", bound, config=config | peaks | {"ways": ways})
    results.add(m)
    for part, seconds, moved in (
        ("weights", found.products, weight_bytes),
        ("append_attend", found.attention, cache_bytes),
        ("rest", found.rest, None),
    ):
        least = None if reading is None or moved is None else 1e3 * moved / reading
        results.add(Measurement(f"{name}/step/{part}", 1e3 * seconds, "ms", least, config=config))
    if found.peak:
        results.add(Measurement(f"{name}/peak_gb", found.peak / GB, "GB", config=config))
        results.add(Measurement(f"{name}/driver_gb", found.driver / GB, "GB", config=config))
    if found.prompt:
        record_prefill(found.prompt, found.dynamic, shape, weights, config, results)


def record_prefill(
    prompt: Prompt,
    dynamic: Prompt | None,
    shape: LlamaShape,
    weights: str,
    config: dict[str, Any],
    results: Results,
    bound: float | None = None,
) -> None:
    """`config`: the model's, and what its cache has room for. `bound`: tokens a second at most."""
    config = config | {"tokens": prompt.tokens, "chunk": prompt.chunk, "peak_gb": prompt.peak / GB}
    peers = {} if dynamic is None else {"DynamicCache": prompt.tokens / dynamic.seconds}
    speedups = {} if dynamic is None else {"DynamicCache": dynamic.seconds / prompt.seconds}
    if dynamic is not None:
        config["dynamic_peak_gb"] = dynamic.peak / GB
    name = f"gpu015/{shape.name}/{weights}/prefill"
    results.add(Measurement(name, prompt.tokens / prompt.seconds, "tok/s", bound, peers, speedups, config))


def show(found: dict[str, Decoding], shape: LlamaShape, positions: int, gpu: bool) -> None:
    """A column for each kind of weights: a step's time in parts, the budget of memory, the prompt."""
    kinds = list(found)

    def milliseconds(seconds: float, whole: float) -> str:
        return f"{1e3 * seconds:.3g} ms, {100 * seconds / whole:.0f}%"

    def gigabytes(size: int) -> str:
        return f"{size / GB:.2f} GB" if size > GB / 10 else f"{size / 1e6:.2f} MB"

    rows = [
        ["tokens a second", *(f"{1 / found[kind].step:.3g}" for kind in kinds)],
        ["a step", *(f"{1e3 * found[kind].step:.3g} ms" for kind in kinds)],
        ["  weights", *(milliseconds(found[kind].products, found[kind].step) for kind in kinds)],
        ["  append and attend", *(milliseconds(found[kind].attention, found[kind].step) for kind in kinds)],
        ["  the rest", *(milliseconds(found[kind].rest, found[kind].step) for kind in kinds)],
        ["memory: weights", *(gigabytes(found[kind].weights) for kind in kinds)],
        ["  cache", *(gigabytes(found[kind].cache) for kind in kinds)],
    ]
    if gpu:
        rows += [
            ["  activations", *(gigabytes(found[kind].activations) for kind in kinds)],
            ["  buffers", *(gigabytes(found[kind].buffers) for kind in kinds)],
            ["  total, the allocator's peak", *(gigabytes(found[kind].peak) for kind in kinds)],
            ["  in use, says the driver", *(gigabytes(found[kind].driver) for kind in kinds)],
        ]

    def speed(prompt: Prompt | None) -> str:
        return "" if prompt is None else f"{prompt.tokens / prompt.seconds:,.0f} tok/s ({prompt.tokens:,} tokens)"

    rows.append([f"prompt, in chunks of {PROMPT_CHUNK:,}", *(speed(found[kind].prompt) for kind in kinds)])
    rows.append(["  the same into a DynamicCache", *(speed(found[kind].dynamic) for kind in kinds)])
    title = f"GPU-015: a {shape.name} model ({shape.layers} layers) decoding at {positions:,} positions"
    print_table(title, ["", *kinds], rows)


def run(
    device: torch.device, results: Results, reading: float | None, quick: bool, kinds: list[str], compiled: bool
) -> list[Criterion]:
    """The second half; its lines of the verdict. `reading`: bytes a second that a kernel that only reads reads."""
    gpu = on_gpu(device)
    shape = (SEVEN_B.with_layers(2) if quick else SEVEN_B) if gpu else TINY
    positions = (1_024 if quick else POSITIONS) if gpu else CPU_POSITIONS
    try:
        llama.transformers()
    except Unavailable as why:
        print(f"\nGPU-015, second half: {why}")
        return [Criterion("tokens a second", "not measured", str(why))]
    print(f"\nA {shape.name} model at {positions:,} positions" + ("" if gpu else ": a rehearsal, tiny"), flush=True)

    found: dict[str, Decoding] = {}
    lines: list[Criterion] = []
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop(0)
        words, passed = "", None
        begin = time.perf_counter()
        try:
            with torch.no_grad(), one_thread(device):
                found[kind] = decode(shape, kind, positions, device, compiled)
        except Unavailable as why:
            words = str(why)
            if kind == "w4" and "w8" not in kinds:
                waiting.insert(0, "w8")
        except (torch.OutOfMemoryError, MemoryError):
            words = "does not fit into this device's memory"
        except Exception as error:  # one kind's failure is not to cost the others' figures
            words, passed = f"failed: {llama.first_line(error)}", False
        llama.tidy(device)  # here, where no traceback holds model and cache any more
        if kind in found:
            record(found[kind], shape, kind, positions, reading, results)
            results.save(last=False)
            words = f"{1 / found[kind].step:.3g} tok/s"
        else:
            lines.append(Criterion(f"{kind}: tokens a second", words, passed=passed))
        print(f"{WEIGHT_WORDS[kind]}: {words} [{time.perf_counter() - begin:.0f} s]", flush=True)
    if found:
        show(found, shape, positions, gpu)
    for kind, d in found.items():
        expected = "" if shape is SEVEN_B else f" ({shape.name})"
        lines.append(
            Criterion(
                f"tokens a second, {kind}{expected}",
                quantity(1 / d.step, "tok/s"),
                f">= {quantity(LEAST_TOKENS_PER_SECOND, 'tok/s')}" if gpu else "",
                1 / d.step >= LEAST_TOKENS_PER_SECOND if gpu else None,
            )
        )
        if d.held != positions:
            lines.append(Criterion(f"positions held at the end, {kind}", f"{d.held:,}", f"{positions:,}", False))
    if gpu:
        for kind, d in found.items():
            must = kind in ("w4", "w8")
            lines.append(
                Criterion(
                    f"total VRAM, {kind}",
                    f"{d.peak / GB:.2f} GB (driver: {d.driver / GB:.2f})",
                    f"< {MOST_VRAM_GB:g} GB" if must else "",
                    d.peak / GB < MOST_VRAM_GB if must else None,
                )
            )
    return lines
