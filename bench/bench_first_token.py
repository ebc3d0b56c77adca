"""How long a model of random weights reads a prompt: with Fp16Cache, and with DynamicCache and torch's attention.

`first_token/<model>/<weights>/<tokens>`: the prompt in one forward pass, as `generate` reads it; seconds until the next
token is on the host. `gpu015/7b/<weights>/prefill`: in chunks of 2,048, tokens a second, the rows that gpu015.py takes
too. Both are the host's clock over the whole prompt, the fastest of a row's runs, after a short prompt.

The bound: the model's matrix products and attention's, at the rates of torch.mm of the same run, each in its dtype (for
attention of an FP32 model half of FP16's). The logits, of one token, are left out of it.

Without a GPU it is a rehearsal with a tiny model, of which nothing is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import ceilings
import gpu015_model
import llama
import llama_prompt
import torch
from common import (
    Measurement,
    Results,
    choose_device,
    device_name,
    on_gpu,
    one_thread,
    open_results,
    parser,
    print_measurements,
)
from llama import EIGHT_B, SEVEN_B, TINY, WEIGHT_WORDS, LlamaShape, Unavailable
from llama_prompt import Prompt
from sdpa_peers import Missing, chosen

GB = 10**9


@dataclass(frozen=True)
class Case:
    shape: LlamaShape
    weights: str
    tokens: int
    chunk: int | None = None  # None: one forward pass
    runs: int = 2

    @property
    def name(self) -> str:
        if self.chunk is not None:
            return f"gpu015/{self.shape.name}/{self.weights}/prefill"
        return f"first_token/{self.shape.name}/{self.weights}/{self.tokens}"


def cases(layers: int | None, quick: bool, gpu: bool) -> list[Case]:
    """Those of one model stand together."""
    if not gpu:
        tiny = TINY.with_layers(layers)
        kinds = ("fp16", "fp32", "bf16")
        return [Case(tiny, kind, tokens, chunk, 1) for kind in kinds for tokens, chunk in ((96, None), (96, 32))]
    seven, eight = (shape.with_layers(layers or (2 if quick else None)) for shape in (SEVEN_B, EIGHT_B))
    tokens, chunk = (2_048, 512) if quick else (16_384, gpu015_model.PROMPT_CHUNK)
    longest = gpu015_model.POSITIONS - llama.RESERVE
    return [
        Case(seven, "fp16", tokens),
        Case(seven, "fp16", tokens if quick else longest, chunk, 1),
        Case(seven, "bf16", tokens),
        Case(eight, "bf16", tokens),
        Case(seven, "fp32", tokens, runs=1),
        Case(seven, "fp32", tokens, chunk, 1),
    ]


class Rates:
    """FLOP a second of torch.mm, each dtype measured when it is first asked for."""

    def __init__(self, device: torch.device, results: Results, quick: bool) -> None:
        self._device, self._results, self._quick = device, results, quick
        self._found: dict[torch.dtype, float] = {}

    def of(self, dtype: torch.dtype) -> float:
        if dtype not in self._found:
            self._found[dtype] = ceilings.matmul_rate(self._device, dtype, self._quick, self._results)
        return self._found[dtype]

    def least_seconds(self, case: Case) -> float:
        """For the case's products and attention."""
        s, dtype = case.shape, llama.WEIGHTS[case.weights]
        heads = 2 * s.heads + 2 * s.kv_heads  # queries and outputs, keys and values
        products = 2 * case.tokens * s.layers * s.hidden * (heads * s.head_dim + 3 * s.intermediate)
        pairs = case.tokens * (case.tokens + 1) // 2
        attention = 4 * pairs * s.layers * s.heads * s.head_dim
        if dtype == torch.float32 and on_gpu(self._device):
            return products / self.of(dtype) + attention / (self.of(torch.float16) / 2)
        return (products + attention) / self.of(dtype if on_gpu(self._device) else torch.float32)


def record(case: Case, ours: Prompt, dynamic: Prompt | None, positions: int, least: float, results: Results) -> None:
    config = case.shape.config() | {"positions": positions, "weights": WEIGHT_WORDS[case.weights]}
    if case.chunk is not None:
        bound = case.tokens / least
        gpu015_model.record_prefill(ours, dynamic, case.shape, case.weights, config, results, bound)
        return
    config |= {"tokens": case.tokens, "peak_gb": ours.peak / GB}
    peers = {} if dynamic is None else {"DynamicCache": dynamic.seconds}
    speedups = {} if dynamic is None else {"DynamicCache": dynamic.seconds / ours.seconds}
    if dynamic is not None:
        config["dynamic_peak_gb"] = dynamic.peak / GB
    results.add(Measurement(case.name, ours.seconds, "s", least, peers, speedups, config))


def measure(case: Case, model: Any, rates: Rates, device: torch.device, results: Results) -> None:
    chunk = case.chunk or case.tokens
    dynamic = llama_prompt.read_prompt_dynamic(model, case.tokens, chunk, case.runs, device)
    llama.tidy(device)
    positions = gpu015_model.POSITIONS if case.chunk is not None and on_gpu(device) else case.tokens
    cache = llama.our_cache(model, positions)
    ours = llama_prompt.read_prompt_ours(model, cache, case.tokens, chunk, case.runs, device)
    record(case, ours, dynamic, positions, rates.least_seconds(case), results)


def run(wanted: list[Case], device: torch.device, results: Results, quick: bool) -> list[str]:
    """The names of the cases that failed."""
    rates, missing = Rates(device, results, quick), Missing()
    model, made = None, None
    for case in wanted:
        begin = time.perf_counter()
        if made != (case.shape, case.weights):
            del model
            llama.tidy(device)
            model, made = None, (case.shape, case.weights)
            try:
                longest = max(c.tokens for c in wanted if (c.shape, c.weights) == made)
                model = llama.try_model(case.shape, case.weights, max(longest, gpu015_model.POSITIONS), device)
            except Unavailable as why:
                print(f"{case.name}: {why}: left out", flush=True)
        if model is None:
            continue
        try:
            with torch.no_grad(), one_thread(device):
                measure(case, model, rates, device, results)
        except Exception as error:  # one case's failure is not to cost the others'
            missing.note(case.name, "ours", error)
        llama.tidy(device)  # here, where no traceback holds a cache any more
        results.save(last=False)
        print(f"{case.name} [{time.perf_counter() - begin:.0f} s]", flush=True)
    return missing.failed


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--only", default="", help="rows whose name has this in it, such as 7b/fp16; several with commas")
    p.add_argument("--layers", type=int, help="of the models (default: all of them); no results are kept")
    args = p.parse_args()
    if args.layers is not None and args.layers < 1:
        p.error(f"--layers must be at least 1, got {args.layers}")
    return args


def main() -> int:
    args = arguments()
    torch.set_grad_enabled(False)
    device = choose_device(args.device)
    try:
        llama.transformers()
    except Unavailable as why:
        print(f"bench_first_token: {why}")
        return 0
    results = open_results(args, device, keep=on_gpu(device) and args.layers is None)
    wanted = [case for case in cases(args.layers, args.quick, on_gpu(device)) if chosen(case.name, args.only)]
    failed = run(wanted, device, results, args.quick)
    print_measurements(f"reading a prompt, {device_name(device)}", results, {})
    results.save()
    if failed:
        print("\nFailed:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
