"""Llamas and a hybrid with random weights, caches filled with random keys and values, and ways to decode with them.

Nothing here is measured by itself: bench_generate.py and gpu015_model.py do that.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import fill_random, on_gpu, synchronize
from torch import Tensor, nn
from torch.nn import functional

GROUP = 128  # weights that share a scale, in 4 bits
WARM_STEPS = 6
SAMPLE_STEPS, ROUNDS = 16, 3
PROFILED_STEPS = 2
RESERVE = WARM_STEPS + ROUNDS * SAMPLE_STEPS + PROFILED_STEPS  # positions left free for the steps that are timed


class Unavailable(Exception):
    """What was asked for cannot be had here; says why."""


@dataclass(frozen=True)
class LlamaShape:
    name: str  # as it stands in the names of measurements
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    attention_every: int = 1  # of so many layers one, the last, has attention; the others are linear (a Qwen3.5)

    @property
    def attention_layers(self) -> int:
        return self.layers // self.attention_every

    def with_layers(self, layers: int | None) -> LlamaShape:
        if layers is None or layers == self.layers:
            return self
        return replace(self, layers=layers, name=f"{self.name}-{layers}-layers")

    def position_bytes(self, element_bytes: int) -> int:
        """Of keys and values of one position, all layers."""
        return self.attention_layers * 2 * self.kv_heads * self.head_dim * element_bytes

    def config(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "hidden": self.hidden,
            "query_heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate": self.intermediate,
            "vocabulary": self.vocabulary,
            "attention_layers": self.attention_layers,
        }


SEVEN_B = LlamaShape("7b", 32, 4096, 32, 32, 128, 11008, 32000)
EIGHT_B = LlamaShape("8b", 32, 4096, 32, 8, 128, 14336, 128256)  # Llama 3's
EIGHT_B_HYBRID = LlamaShape("8h", 32, 4096, 32, 8, 128, 12288, 128256, attention_every=4)
TINY = LlamaShape("tiny", 4, 256, 4, 4, 64, 512, 1024)  # a rehearsal on a CPU

# What the weights are stored as, and the dtype that the model computes in.
WEIGHTS = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "w4": torch.bfloat16,
    "w8": torch.float16,
}
WEIGHT_WORDS = {
    "fp16": "FP16 weights",
    "fp32": "FP32 model",
    "bf16": "BF16 weights",
    "w4": f"4-bit weights in groups of {GROUP} (torch's _weight_int4pack_mm), BF16 activations",
    "w8": "8-bit weights, a scale a row, converted as they are read where the step is compiled, FP16 activations",
}


def transformers() -> Any:
    """The module, or Unavailable in words where it is not there or not one that this package supports."""
    try:
        import transformers

        import kvcache_ext.integrations.transformers  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"no model is run: {error}") from None
    transformers.logging.set_verbosity_error()
    return transformers


# Weights in few bits


class Int8Linear(nn.Module):
    """y = (x @ int8 weights) * a scale a row. Compiled, one kernel reads the int8 weights; eager copies them first."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1).float().clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4Linear(nn.Module):
    """4-bit weights in groups of GROUP, each with a scale and an offset, by torch's own weight-only kernel."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = self.out_features, self.in_features = weight.shape
        grouped = weight.float().view(rows, columns // GROUP, GROUP)
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        scale = (high - low).clamp_min(1e-6) / 15
        middle = low + 8 * scale  # the kernel's weight is (q - 8) * scale + middle
        q = ((grouped - low) / scale).round().clamp(0, 15).to(torch.int32).view(rows, columns)
        aten = torch.ops.aten
        if weight.is_cuda:
            packed = aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
            self.multiply = aten._weight_int4pack_mm
        else:
            packed = aten._convert_weight_to_int4pack_for_cpu(q, 8)
            self.multiply = aten._weight_int4pack_mm_for_cpu
        self.register_buffer("weight", packed)
        both = torch.cat([scale, middle], -1)  # [rows, groups, 2]
        self.register_buffer("scales", both.transpose(0, 1).contiguous().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, self.in_features), self.weight, GROUP, self.scales)
        return y.view(*x.shape[:-1], self.out_features)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=0.02)


def make_model(shape: LlamaShape, weights: str, positions: int, device: torch.device) -> Any:
    """The model with random weights, each of them made once, on the device, as what it is stored as."""
    library = transformers()
    options = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    if shape.attention_every > 1:
        types = [*["linear_attention"] * (shape.attention_every - 1), "full_attention"] * shape.attention_layers
        linear = {"linear_num_key_heads": shape.heads // 2, "linear_num_value_heads": shape.heads}
        linear |= {"linear_key_head_dim": shape.head_dim, "linear_value_head_dim": shape.head_dim}
        config, kind = library.Qwen3_5TextConfig(**options, **linear, layer_types=types), library.Qwen3_5ForCausalLM
    else:
        config, kind = library.LlamaConfig(**options), library.LlamaForCausalLM
    dtype = WEIGHTS[weights]
    with torch.device("meta"):
        model = kind(config).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    few_bits = {"w4": Int4Linear, "w8": Int8Linear}.get(weights)
    for name, module in list(model.named_modules()):
        if few_bits and isinstance(module, nn.Linear) and name != "lm_head":
            made = few_bits(_random(module.out_features, module.in_features, torch.float32, device), dtype)
            model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], made)
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            size = parameter.shape
            filled = (
                _random(size[0], size[1:].numel(), dtype, device).view(size)
                if parameter.dim() >= 2
                else torch.ones(size, dtype=dtype, device=device)
            )
            module.register_parameter(key, nn.Parameter(filled, requires_grad=False))
    return model


def try_model(shape: LlamaShape, weights: str, positions: int, device: torch.device) -> Any:
    """`make_model`, and one matrix product with it; Unavailable says why this kind of weights cannot be had here."""
    try:
        model = make_model(shape, weights, positions, device)
        layer = model.model.layers[0].mlp.gate_proj
        answer = layer(torch.ones(1, 1, shape.hidden, dtype=WEIGHTS[weights], device=device))
        synchronize(device)
    except torch.OutOfMemoryError:
        raise Unavailable(f"{weights}: the weights do not fit into the device's memory") from None
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise Unavailable(f"{weights}: this torch has no kernel for it here ({first_line(error)})") from None
    assert answer.shape[-1] == shape.intermediate
    return model


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def weight_bytes(model: Any) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def weight_bytes_read(model: Any) -> int:
    """What a token must read of the weights: all but the embedding, of which it needs a row."""
    table = model.model.embed_tokens.weight
    return weight_bytes(model) - table.nbytes + table[0].nbytes


def linears(model: Any) -> list[Any]:
    """Every matrix product of a step, in order."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear, Int4Linear))]


# Caches, filled with random keys and values

CHUNK = 4_096


def _random_rows(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of that size."""
    keys, values = (fill_random(torch.empty(size, dtype=dtype, device=device)) for _ in range(2))
    return keys, values


def _begin_states(model: Any, cache: Any, shape: LlamaShape, batch: int) -> None:
    """Has linear layers take in some tokens: what their states hold does not change what a step takes."""
    if shape.attention_every > 1:
        ids = torch.ones(batch, 8, dtype=torch.int64, device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)


def our_cache(model: Any, positions: int, batch: int = 1) -> Any:
    from kvcache_ext.integrations.transformers import Fp16Cache

    return Fp16Cache.for_model(model, positions, batch)


def fill_ours(cache: Any, shape: LlamaShape, held: int) -> None:
    """Random keys and values for the positions up to `held`, as a prompt would have left them."""
    batch = cache.caches[0].batch_size
    chunk = max(1, min(CHUNK // batch, held))
    size = (batch, chunk, shape.kv_heads, shape.head_dim)
    keys, values = _random_rows(size, torch.float32, cache.attention_layers[0].device)
    for i, layer in enumerate(cache.layers):
        while layer in cache.attention_layers and (before := layer.get_seq_length()) < held:
            rows = min(chunk, held - before)
            cache.update(keys[:, :rows].transpose(1, 2), values[:, :rows].transpose(1, 2), i)


def dynamic_cache(model: Any, shape: LlamaShape, held: int, batch: int = 1) -> Any:
    cache = transformers().DynamicCache(config=model.config)
    _begin_states(model, cache, shape, batch)
    for layer in cache.layers:
        if not hasattr(layer, "keys"):
            continue
        sample = torch.empty(batch, shape.kv_heads, 0, shape.head_dim, dtype=model.dtype, device=model.device)
        layer.lazy_initialization(sample, sample)
        size = (batch, shape.kv_heads, held, shape.head_dim)
        layer.keys, layer.values = _random_rows(size, model.dtype, model.device)
    return cache


def static_cache(model: Any, shape: LlamaShape, held: int, positions: int, batch: int = 1) -> Any:
    cache = transformers().StaticCache(config=model.config, max_cache_len=positions)
    if shape.attention_every == 1:
        cache.early_initialization(batch, shape.kv_heads, shape.head_dim, model.dtype, model.device)
    _begin_states(model, cache, shape, batch)
    for layer in cache.layers:
        if not hasattr(layer, "keys"):
            continue
        fill_random(layer.keys)
        fill_random(layer.values)
        layer.cumulative_length.fill_(held)
    return cache


# Ways to decode: each a function from a token of each sequence [B, 1] to logits [B, 1, vocabulary]

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Option:
    """A way to decode. `prepare(model, shape, held, positions, batch)` makes a cache that holds `held` of `positions`
    of each sequence; `step`, then, the step with it."""

    name: str
    prepare: Callable[[Any, LlamaShape, int, int, int], Any]
    step: Callable[[Any, Any], Step]
    compiled: bool = False
    ours: bool = False
    tuned: bool = False  # with Inductor's own matrix-vector products, also where torch has good ones


def _plain_step(model: Any, cache: Any) -> Step:
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    return step


def _static_compiled(model: Any, cache: Any) -> Step:
    compiled = torch.compile(model.forward, mode="reduce-overhead" if model.device.type == "cuda" else "default")

    def step(ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = compiled(input_ids=ids.clone(), past_key_values=cache, use_cache=True).logits
        return logits

    return step


def _prepare_dynamic(model: Any, shape: LlamaShape, held: int, positions: int, batch: int) -> Any:
    model.set_attn_implementation("sdpa")
    return dynamic_cache(model, shape, held, batch)


def _prepare_static(model: Any, shape: LlamaShape, held: int, positions: int, batch: int) -> Any:
    model.set_attn_implementation("sdpa")
    return static_cache(model, shape, held, positions, batch)


def _prepare_ours(model: Any, shape: LlamaShape, held: int, positions: int, batch: int) -> Any:
    cache = our_cache(model, positions, batch)
    _begin_states(model, cache, shape, batch)
    fill_ours(cache, shape, held)
    return cache


def _graph(model: Any, cache: Any) -> Step:
    graph: Step = cache.decode_graph(model)
    return graph


def _graph_compiled(model: Any, cache: Any) -> Step:
    graph: Step = cache.decode_graph(model, compile=True)
    return graph


OPTIONS = {
    "graph": Option("ours, CUDA graph", _prepare_ours, _graph, ours=True),
    "graph-compiled": Option("ours, CUDA graph, compiled", _prepare_ours, _graph_compiled, compiled=True, ours=True),
    "eager": Option("ours, eager", _prepare_ours, _plain_step, ours=True),
    "static-compiled": Option("StaticCache, compiled", _prepare_static, _static_compiled, compiled=True),
    "static": Option("StaticCache, eager", _prepare_static, _plain_step),
    "dynamic": Option("DynamicCache, eager", _prepare_dynamic, _plain_step),
    "graph-tuned": Option("ours, CUDA graph, tuned", _prepare_ours, _graph_compiled, True, True, True),
    "static-tuned": Option("StaticCache, compiled, tuned", _prepare_static, _static_compiled, True, tuned=True),
}


# Timing and memory


def tidy(device: torch.device) -> None:
    """Lets go of compiled code, graphs and unused memory."""
    torch._dynamo.reset()
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def compiler_set_up(weights: str, tuned: bool = False) -> Iterator[None]:
    """8-bit weights need Inductor's own kernels for matrix-vector products, which it makes only with this set."""
    if weights != "w8" and not tuned:
        yield
        return
    from torch._inductor import config

    with config.patch(coordinate_descent_tuning=True):
        yield


def step_seconds(
    step: Step, device: torch.device, batch: int = 1, samples: int = SAMPLE_STEPS, rounds: int = ROUNDS
) -> float:
    """Seconds a step, greedy, each token fed back; the median of rounds, by the host's clock."""
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)

    def run(steps: int) -> float:
        nonlocal ids
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            ids = step(ids).argmax(-1)
        synchronize(device)
        return (time.perf_counter() - start) / steps

    run(WARM_STEPS)
    return statistics.median(run(samples) for _ in range(rounds))


@dataclass
class Kernel:
    launches: float = 0.0  # a step
    seconds: float = 0.0  # a step, of all of them


def kernels_of(step: Step, device: torch.device, batch: int = 1) -> dict[str, Kernel]:
    """What runs on the GPU in a step, by torch's profiler, the longest first. Those that overlap count twice."""
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED_STEPS):
            ids = step(ids).argmax(-1)
        synchronize(device)
    found: dict[str, Kernel] = {}
    for event in seen.events():
        if event.device_type.name == "CUDA":
            kernel = found.setdefault(event.name, Kernel())
            kernel.launches += 1 / PROFILED_STEPS
            kernel.seconds += 1e-6 * event.time_range.elapsed_us() / PROFILED_STEPS
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if on_gpu(device) else 0


def driver_bytes(device: torch.device) -> int:
    """In use on the device as its driver sees it: the context, the allocator's spare memory and other processes too."""
    if not on_gpu(device):
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
