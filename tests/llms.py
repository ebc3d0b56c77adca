"""Small random transformers models, the cache that Fp16Cache is compared with, and how tokens are compared.

Greedy tokens are compared one by one; where they part, the two tokens must be nearly equal in FP64 (`NEAR_TIE`), and
how often that happened is printed at the end.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
try:
    from kvcache_ext.integrations.transformers import NAME
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

transformers.logging.set_verbosity_error()

# Of the logits' spread: the FP32 answers of two ways to attend differ by some 1e-6 of it, but for keys and values that
# this difference rounds to another FP16 number, 5e-4 of one element.
NEAR_TIE = 1e-3
VOCABULARY = 97
WINDOW = 8


class RoundingCache(transformers.DynamicCache):
    """The reference: keys and values of any dtype, rounded to FP16 as they come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = (x.half().to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 7, "sliding_window": WINDOW}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "layer_types": ALTERNATING}),
    "gemma3": ("Gemma3", {**GEMMA, "layer_types": ALTERNATING}),
    "gpt_oss": ("GptOss", {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = list(CONFIGURATIONS)
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# Of layers with recurrent or convolutional states, instead of keys and values (first three) or beside them (the last).
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3Next",
        {
            **{"head_dim": 16, "shared_expert_intermediate_size": 32, **LINEAR, **EXPERTS},
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 1},
    ),
    "falcon_h1": ("FalconH1", {"head_dim": 16, **MAMBA}),
}
ATTENTIONS = [NAME, "eager"]


def make_model(family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    name, options = (CONFIGURATIONS | HYBRIDS)[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config_name)(**BASE | options))
    for layer in model.model.layers:
        if hasattr(getattr(layer, "self_attn", None), "sinks"):
            torch.nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("eager")
    return model.eval().to(device, dtype)


_made: dict[tuple[str, torch.device], Any] = {}


def model_of(family: str, device: torch.device) -> Any:
    """Made once, with eager attention until a cache changes it."""
    if (family, device) not in _made:
        _made[family, device] = make_model(family, device)
    model = _made[family, device]
    model.set_attn_implementation("eager")
    return model


def tiny(name: str, **options: Any) -> Any:
    small = {k: v for k, v in BASE.items() if k not in ("initializer_range", "tie_word_embeddings")}
    return getattr(transformers, f"{name}Config")(**small | options)


def prompts(batch: int, length: int, device: torch.device, *, padded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(batch * 1000 + length)
    ids = torch.randint(2, VOCABULARY, (batch, length), device=device)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(batch - 1):
            mask[b, : (b + 1) * length // (batch + 1)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def ones_after(inputs: dict[str, Tensor], count: int) -> Tensor:
    return torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)


def logits_of(model: Any, cache: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


def generate(model: Any, inputs: dict[str, Tensor], cache: Any, **options: Any) -> Tensor:
    arguments = {"max_new_tokens": 24, "do_sample": False} | options
    return model.generate(**inputs, past_key_values=cache, **arguments)


def expected(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """With the model's eager attention and the reference cache. Leaves the model's attention as it was."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    tokens = generate(model, inputs, RoundingCache(config=model.config), **options)
    model.set_attn_implementation(before)
    return tokens


def exact_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """In FP64, over keys and values in FP16, without the padding: [tokens that are not padding, vocabulary]."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    real = torch.nn.functional.pad(mask, (0, len(tokens) - len(mask)), value=1) == 1
    with torch.no_grad():
        return exact(tokens[None, real], past_key_values=RoundingCache(config=model.config)).logits[0]


def check_tokens(
    model: Any, inputs: dict[str, Tensor], got: Tensor, want: Tensor, counts: dict[str, int], least: int = 6
) -> None:
    assert got.shape == want.shape
    start = inputs["input_ids"].shape[1]
    new = want[:, start:]
    assert len(new.unique()) >= least, "the model repeats itself: nothing is tested"
    for b in range(len(want)):
        differing = (got[b] != want[b]).nonzero()
        if len(differing) == 0:
            counts["tokens"] += new.shape[1]
            continue
        at = int(differing[0])
        logits = exact_logits(model, want[b, :at], inputs["attention_mask"][b])[-1]
        gap = (logits.max() - torch.minimum(logits[got[b, at]], logits[want[b, at]])) / logits.std()
        assert gap < NEAR_TIE, f"sequence {b} parts at token {at}, where FP64 has a gap of {gap:.2e}"
        counts["tokens"] += at - start
        counts["near ties"] += 1


def check_beams(
    model: Any, inputs: dict[str, Tensor], got: Tensor, want: Tensor, counts: dict[str, int], returned: int
) -> None:
    """Beams that differ must be nearly as good: log-probability per token, in FP64."""
    assert got.shape == want.shape
    start = inputs["input_ids"].shape[1]
    for i in range(len(want)):
        counts["tokens"] += want.shape[1] - start
        if torch.equal(got[i], want[i]):
            continue
        scores = []
        for tokens in (got[i], want[i]):
            logits = exact_logits(model, tokens, inputs["attention_mask"][i // returned])
            picked = logits[start - len(tokens) - 1 : -1].log_softmax(-1).gather(1, tokens[start:, None])
            scores.append(float(picked.mean()))
        assert abs(scores[0] - scores[1]) < NEAR_TIE, f"beam {i} scores {scores[0]} in FP64 instead of {scores[1]}"
        counts["near ties"] += 1
