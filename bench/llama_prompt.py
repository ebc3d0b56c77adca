"""A model of llama.py reads a prompt of random tokens into a cache, by the host's clock; for gpu015_model.py too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import on_gpu, synchronize
from llama import first_line, peak_bytes, tidy, transformers

WARM_PROMPT = 2_048  # tokens of a first prompt, with which libraries set themselves up


@dataclass
class Prompt:
    """A prompt of random tokens read into an empty cache."""

    tokens: int
    chunk: int  # tokens of a forward pass
    seconds: float  # until the next token is on the host
    peak: int  # bytes


def read_prompt(
    model: Any, fresh: Callable[[], Any], tokens: int, chunk: int, runs: int, device: torch.device
) -> Prompt:
    """The fastest of `runs`, after a short one. `fresh` returns an empty cache, each time it is called."""
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=device)

    def run(end: int) -> float:
        cache = fresh()
        synchronize(device)
        begin = time.perf_counter()
        for start in range(0, end, chunk):
            part = ids[:, start : min(start + chunk, end)]
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return time.perf_counter() - begin

    run(min(WARM_PROMPT, tokens))
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    return Prompt(tokens, chunk, min(run(tokens) for _ in range(runs)), peak_bytes(device))


def read_prompt_dynamic(model: Any, tokens: int, chunk: int, runs: int, device: torch.device) -> Prompt | None:
    """With a DynamicCache and torch's attention; None, said in words, where that cannot be done."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        made = transformers().DynamicCache
        return read_prompt(model, lambda: made(config=model.config), tokens, chunk, runs, device)
    except (torch.OutOfMemoryError, MemoryError):
        words = "does not fit into memory"
    except Exception as error:  # the peer's failure is not to cost our figure
        words = first_line(error)
    finally:
        model.set_attn_implementation(before)
    print(f"DynamicCache, a prompt of {tokens:,} tokens: left out: {words}", flush=True)
    tidy(device)  # here, where no traceback holds the cache any more
    return None


def read_prompt_ours(model: Any, cache: Any, tokens: int, chunk: int, runs: int, device: torch.device) -> Prompt:
    def emptied() -> Any:
        cache.reset()
        return cache

    return read_prompt(model, emptied, tokens, chunk, runs, device)
