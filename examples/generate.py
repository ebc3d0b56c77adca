"""Generation with a transformers model on the FP16 cache, beside transformers' own DynamicCache.

    python examples/generate.py                                          # a small random model
    python examples/generate.py --model PATH_OR_NAME --prompt "..."      # a checkpoint, its tokenizer and its text

Needs transformers (`pip install '.[transformers]'`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if importlib.util.find_spec("kvcache_ext") is None:  # not installed: the one that was built in place
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kvcache_ext.integrations.transformers import Fp16Cache


class Progress(BaseStreamer):
    """A bar, on a terminal; and the times at which tokens came."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done = -1  # the prompt comes first
        self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        self.done += 1
        self.last = time.perf_counter()
        if self.done <= 1:
            self.first = self.last
        if sys.stdout.isatty():
            filled = 30 * max(self.done, 0) // self.total
            bar = "#" * filled + "-" * (30 - filled)
            print(f"\r{self.name:>14} [{bar}] {max(self.done, 0)}/{self.total}  {self.speed:6.1f} tok/s", end="")

    def end(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)

    @property
    def speed(self) -> float:
        """Tokens a second after the first, which is the prompt's."""
        return (self.done - 1) / (self.last - self.first) if self.last > self.first else 0.0


def random_model(vocabulary: int = 1000) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=65536, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def run(name: str, model: Any, inputs: Any, cache: Any, tokens: int) -> tuple[Tensor, Progress, int]:
    """What it generated, how fast, and the peak of GPU memory beside what was there before (0 on a CPU)."""
    device = model.device
    progress = Progress(name, tokens)
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    out = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False,
        streamer=progress if len(inputs["input_ids"]) == 1 else None,
    )  # fmt: skip
    return out, progress, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint, as from_pretrained takes it; without it, a small random model")
    parser.add_argument("--prompt", default="The key/value cache of a transformer", help="for a checkpoint")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of a random prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--max-positions", type=int, help="of the cache; as many as are needed, if not given")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU, do not decode in a CUDA graph")
    parser.add_argument("--no-comparison", action="store_true", help="leave DynamicCache out")
    o = parser.parse_args(arguments)
    if min(o.prompt_tokens, o.tokens, 1 if o.max_positions is None else o.max_positions) < 1:
        parser.error("numbers of tokens and positions must be at least 1")

    torch.manual_seed(0)
    dtype = getattr(torch, o.dtype)
    tokenizer: Any = None
    if o.model is None:
        model = random_model().to(o.device, dtype).eval()
        ids = torch.randint(1, 1000, (1, o.prompt_tokens), device=o.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(o.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(o.model, dtype=dtype).to(o.device).eval()
        inputs = dict(tokenizer(o.prompt, return_tensors="pt").to(o.device))
    length = inputs["input_ids"].shape[1]

    rows = []
    answers: dict[str, Tensor] = {}
    if not o.no_comparison:
        dynamic = transformers.DynamicCache(config=model.config)
        answers["DynamicCache"], progress, peak = run("DynamicCache", model, inputs, dynamic, o.tokens)
        held = sum(x.nbytes for layer in dynamic.layers for x in (layer.keys, layer.values))
        rows.append(("DynamicCache", progress.speed, held, peak))
    cache = Fp16Cache.for_model(model, o.max_positions or length + o.tokens)
    graphs = cache.cuda_graphs(model) if model.device.type == "cuda" and not o.no_graphs else contextlib.nullcontext()
    with graphs:
        answers["Fp16Cache"], progress, peak = run("Fp16Cache", model, inputs, cache, o.tokens)
    rows.append(("Fp16Cache", progress.speed, cache.memory_bytes(), peak + cache.memory_bytes()))

    new = answers["Fp16Cache"][0, length:].tolist()
    print(tokenizer.decode(answers["Fp16Cache"][0], skip_special_tokens=True) if tokenizer else f"tokens: {new}")
    print(f"\n{'':14} {'tok/s':>8} {'keys and values':>16} {'peak on the GPU':>16}")
    for name, speed, held, peak in rows:
        on_gpu = f"{peak / 1e6:13.1f} MB" if model.device.type == "cuda" else "-"
        print(f"{name:14} {speed:8.1f} {held / 1e6:13.2f} MB {on_gpu:>16}")
    if len(answers) == 2:
        other = answers["DynamicCache"][0, length:].tolist()
        same = next((i for i, (a, b) in enumerate(zip(new, other, strict=False)) if a != b), min(len(new), len(other)))
        print(f"the first {same} of {len(new)} tokens are DynamicCache's")
    return answers


if __name__ == "__main__":
    main()
