"""A long text on several GPUs, or on several processes of a CPU, in three ways: by layers, by heads, by positions.

    torchrun --nproc-per-node 2 examples/long_context.py                                   # a small random model
    torchrun --nproc-per-node 2 examples/long_context.py --way heads
    python examples/long_context.py --way layers                                           # one process, all its GPUs
    torchrun --nproc-per-node 2 examples/long_context.py --model PATH_OR_NAME --prompt-tokens 100000

- positions: every process has the whole model, and every n-th position of the cache (`Fp16Cache.for_model(group=)`).
- heads: every process has a share of the weights and of the key/value heads (transformers' tensor parallelism).
- layers: one process. Its GPUs have some layers each (a device map). Other processes of torchrun have nothing to do.

Each process prints what it holds. Process 0 prints tokens a second. The last line compares the tokens of a short text
with those of one process, which has the model for itself. (By heads sums come in another order, so in FP16 and BF16
tokens may part where two are nearly as likely.) docs/multi-gpu.md says when to use which way. Needs
transformers (`pip install '.[transformers]'`); by layers also accelerate, where there are several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

if importlib.util.find_spec("kvcache_ext") is None:  # not installed: the one that was built in place
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kvcache_ext.integrations.transformers import Fp16Cache

transformers.utils.logging.disable_progress_bar()
SHORT = 24  # tokens of the text whose continuation is compared
WAYS = ("positions", "heads", "layers")


def save_random_model(folder: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1 << 20, initializer_range=0.1, pad_token_id=0,
        eos_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@contextlib.contextmanager
def processes(seconds: float) -> Iterator[tuple[int, int, torch.device]]:
    """This process's number, how many there are, and its device. Without torchrun there is one."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        # Tensor parallelism of transformers shards on the kind of device that torch was built for. Here it is a CPU.
        torch._C._get_accelerator = lambda check=None: torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        alone = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        here: dict[str, Any] = {} if "RANK" in os.environ else alone  # torchrun sets it
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            timeout=timedelta(seconds=seconds),
            device_id=device if on_gpus else None,
            **here,
        )
        try:
            yield rank, ranks, device
        finally:
            gc.collect()  # captured graphs must go before NCCL's communicators
            dist.destroy_process_group()


def load(path: str, way: str, device: torch.device, dtype: torch.dtype, ranks: int) -> Any:
    """The model, or this process's share of it."""
    how: dict[str, Any] = {"dtype": dtype}
    if way == "heads" and ranks > 1:
        how["tp_plan"] = "auto"
    elif way == "layers" and device.type == "cuda" and torch.cuda.device_count() > 1:
        how["device_map"] = "balanced"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a later release has another word for `tp_plan`
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
    return (model if len(how) > 1 else model.to(device)).eval()


def generate(model: Any, cache: Any, ids: Tensor, tokens: int, graphs: bool) -> tuple[Tensor, float]:
    """The new tokens, and how many came a second, the prompt's among them."""
    within = cache.cuda_graphs(model) if graphs else contextlib.nullcontext()
    began = time.perf_counter()
    with within, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a later release has another word for `past_key_values`
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False
        )
    cache.synchronize()  # of positions: an error if the ranks did not do the same
    return out[0, ids.shape[1] :].cpu(), tokens / (time.perf_counter() - began)


def bytes_of(model: Any) -> int:
    """Of the weights that this process holds."""
    local = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.parameters())
    return sum(weight.numel() * weight.element_size() for weight in local)


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="positions")
    parser.add_argument("--model", help="a checkpoint, as from_pretrained takes it; without it, a small random model")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="length of the random prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--max-positions", type=int, help="of the cache; as many as are needed, if not given")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for another process")
    parser.add_argument("--no-comparison", action="store_true", help="the model does not fit into one process")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU, do not decode in a CUDA graph")
    o = parser.parse_args(arguments)
    if min(o.prompt_tokens, o.tokens, 1 if o.max_positions is None else o.max_positions) < 1:
        parser.error("numbers of tokens and positions must be at least 1")
    with contextlib.ExitStack() as stack:
        rank, ranks, device = stack.enter_context(processes(o.timeout))
        path = [o.model]
        if o.model is None:  # process 0 makes one, and all load it
            path = [stack.enter_context(tempfile.TemporaryDirectory())]
            if rank == 0:
                save_random_model(path[0])
            dist.broadcast_object_list(path, src=0)
        same = run(o, path[0], rank, ranks, device)
        dist.barrier()
        return same


def run(o: argparse.Namespace, path: str, rank: int, ranks: int, device: torch.device) -> bool:
    """Whether the short text went on as it does in one process."""
    dtype, graphs = getattr(torch, o.dtype), device.type == "cuda" and not o.no_graphs and o.way != "layers"
    together = o.way != "layers"
    positions = o.max_positions or max(o.prompt_tokens, SHORT) + o.tokens
    same = True
    if together or rank == 0:
        model = load(path, o.way, device, dtype, ranks)
        ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, o.prompt_tokens),
                            generator=torch.Generator().manual_seed(1)).to(model.device)  # fmt: skip
        group = {"group": dist.group.WORLD, "timeout": o.timeout} if o.way == "positions" else {}
        cache = Fp16Cache.for_model(model, positions, **group)
        print(
            f"process {rank} of {ranks}, {o.way}, {device}: weights {bytes_of(model) / 1e6:.1f} MB, "
            f"keys and values {cache.memory_bytes() / 1e6:.2f} MB for {positions:,} positions", flush=True,
        )  # fmt: skip
        _, speed = generate(model, cache, ids, o.tokens, graphs)
        cache.reset()
        short, _ = generate(model, cache, ids[:, :SHORT], o.tokens, graphs)
        if rank == 0:
            print(f"{o.tokens} tokens behind {o.prompt_tokens:,}: {speed:.1f} tok/s, the prompt's time included")
        del model, cache
        if rank == 0 and not o.no_comparison:
            model = load(path, "one process", device, dtype, ranks)
            cache = Fp16Cache.for_model(model, SHORT + o.tokens)
            want, _ = generate(model, cache, ids[:, :SHORT].to(device), o.tokens, False)
            alike = (short == want).cumprod(0).sum()
            same = bool(alike == len(want))
            words = "OK" if same else "DIFFERENT"
            print(
                f"{words}: the first {alike} of {len(want)} tokens behind a short text are those of one process",
                flush=True,
            )
    return same


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
