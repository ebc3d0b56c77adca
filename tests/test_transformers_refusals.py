"""Fp16Cache: what it cannot do it says, in a sentence, before anything is changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT
from llms import VOCABULARY, RoundingCache, generate, logits_of, make_model, prompts, tiny, transformers

from kvcache_ext.integrations import transformers as integration
from kvcache_ext.integrations.transformers import NAME, Fp16Cache

pytestmark = pytest.mark.usefixtures("one_thread")


def test_models_that_it_cannot_hold() -> None:
    def refused(model: Any, match: str, **options: Any) -> None:
        before = model.config._attn_implementation
        with pytest.raises(NotImplementedError, match=match):
            Fp16Cache.for_model(model, 64, **options)
        assert model.config._attn_implementation == before

    rwkv = transformers.RwkvConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2)
    refused(transformers.RwkvForCausalLM(rwkv), "names no num_attention_heads")
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        llama = transformers.LlamaForCausalLM(tiny("Llama", head_dim=20))
        latent = transformers.DeepseekV3ForCausalLM(tiny("DeepseekV3", n_routed_experts=4, n_group=1, topk_group=1))
        mamba = transformers.MambaForCausalLM(tiny("Mamba"))
        compressed = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(num_hidden_layers=2))
    refused(t5, "encoder-decoder")
    refused(latent, "must be on a CPU or a CUDA device, got 'meta'")
    refused(mamba, "MambaForCausalLM has no attention, so no keys and values to hold")
    refused(compressed, "layer 0 of DeepseekV4ForCausalLM is of type '[a-z_]+', which it cannot hold")
    refused(llama, "must be on a CPU or a CUDA device, got 'meta'")
    odd = transformers.LlamaForCausalLM(tiny("Llama", head_dim=20))
    refused(odd, "multiple of 8")
    assert torch.equal(*(generate(odd, prompts(1, 5, torch.device("cpu")), cache)
                         for cache in (Fp16Cache.for_model(odd, 64, attention=None),
                                       RoundingCache(config=odd.config))))  # fmt: skip
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    )
    refused(bloom, "BloomForCausalLM does not take attention")


def test_a_model_of_fp64_is_refused(models: Any) -> None:
    with pytest.raises(TypeError, match="is an FP64 model"):
        Fp16Cache.for_model(copy.deepcopy(models("llama")).double(), 64)


def test_cross_attention_has_no_place() -> None:
    """A decoder that could attend to an encoder's states, too: it works without them, and says why not with them."""
    config = tiny("Bert", num_key_value_heads=4, is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel(config).eval()
    cache = Fp16Cache.for_model(model, 64)
    ids = prompts(1, 3, torch.device("cpu"))["input_ids"]
    assert logits_of(model, cache, input_ids=ids).isfinite().all()
    cache.reset()
    states = torch.randn(1, 2, config.hidden_size)
    with pytest.raises(NotImplementedError, match=r"Fp16Cache: there is no place in it for .* cross-attention"):
        logits_of(model, cache, input_ids=ids, encoder_hidden_states=states)
    assert cache.get_seq_length() == cache.caches[0].position == 0


def test_wrong_arguments(models: Any) -> None:
    model = make_model("llama")
    for arguments, match in (
        ({"max_positions": 0}, "max_positions must be a positive int, got 0"),
        ({"attention": "flash"}, "attention must be 'kvcache_ext' or None, got 'flash'"),
        ({"precision": "fp8"}, "precision must be"),
        ({"overflow": "wrap"}, "overflow must be"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Fp16Cache.for_model(model, **{"max_positions": 8} | arguments)
    with pytest.raises(TypeError, match="model must be a model of transformers, got Linear"):
        Fp16Cache.for_model(torch.nn.Linear(1, 1), 8)
    with pytest.raises(MemoryError, match="the largest max_positions that fits"):
        Fp16Cache.for_model(model, 10**12)
    assert model.config._attn_implementation != NAME


WRONG_CALLS: dict[str, tuple[Callable[[Fp16Cache], object], type[Exception]]] = {
    "an unused sequence": (lambda c: c.reorder_cache(torch.tensor([0, 3])), IndexError),
    "a negative one": (lambda c: c.reorder_cache(torch.tensor([0, -1])), IndexError),
    "no sequence at all": (lambda c: c.reorder_cache(torch.tensor([0, 9])), IndexError),
    "fractions": (lambda c: c.reorder_cache(torch.tensor([0.9, 1.9])), TypeError),
    "truth": (lambda c: c.reorder_cache(torch.tensor([True, False])), TypeError),
    "a table": (lambda c: c.reorder_cache(torch.tensor([[0, 1]])), TypeError),
    "more than there is room for": (lambda c: c.reorder_cache(torch.tensor([0, 1, 0, 1, 0])), ValueError),
    "none": (lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.int64)), ValueError),
    "no times": (lambda c: c.batch_repeat_interleave(0), ValueError),
    "half a time": (lambda c: c.batch_repeat_interleave(0.5), ValueError),
    "too many times": (lambda c: c.batch_repeat_interleave(3), ValueError),
    "crop of a fraction": (lambda c: c.crop(-2.7), TypeError),
    "crop of text": (lambda c: c.crop("-3"), TypeError),
    "crop of nothing": (lambda c: c.crop(None), TypeError),
    "crop of too many": (lambda c: c.crop(-11), ValueError),
    "crop forwards": (lambda c: c.crop(1), ValueError),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(models: Any, device: torch.device, name: str) -> None:
    call, error = WRONG_CALLS[name]
    model = models("llama")
    cache = Fp16Cache.for_model(model, 30, 4)
    logits_of(model, cache, **prompts(2, 10, device))
    before = [tensor.clone() for c in cache.caches for tensor in (c.k_cache, c.v_cache, c.tensors.state)]
    with pytest.raises(error, match="Fp16Cache"):
        call(cache)
    assert cache.shared.active == 2 and cache.get_seq_length() == 10
    for old, new in zip(
        before, (t for c in cache.caches for t in (c.k_cache, c.v_cache, c.tensors.state)), strict=True
    ):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"is_causal": False}, "attention that is not causal"),
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "packed sequences"),
        ({"output_attentions": True}, "attention weights"),
        ({"dropout": 0.5}, "dropout"),
    ],
)
def test_what_the_attention_has_not_is_refused(models: Any, options: dict[str, Any], what: str) -> None:
    """Before anything is stored, in the sentence that says what to use instead."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    module = model.model.layers[0].self_attn
    rows = torch.randn(1, cache.layers[0].cache.num_heads, 5, cache.layers[0].cache.head_dim)
    key, value = cache.update(rows, rows, 0)
    query = torch.randn(1, model.config.num_attention_heads, 5, rows.shape[-1])
    with pytest.raises(NotImplementedError, match=rf"has no {what}.*attention=None"):
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[NAME](module, query, key, value, None, **options)
    assert cache.caches[0].position == 0


def test_what_beginners_forget(models: Any, device: torch.device) -> None:
    model = models("llama")
    inputs = prompts(2, 9, device)
    cache = Fp16Cache.for_model(model, 64, 2)
    generate(model, inputs, cache)
    with pytest.raises(ValueError, match=r"Fp16Cache: .*reset\(\) "):  # another text on the same cache
        generate(model, inputs, cache)
    cache.reset()
    with pytest.raises(ValueError, match="with use_cache=False the whole text comes again"):
        generate(model, prompts(2, 9, device, padded=True), cache, use_cache=False)
    few = make_model("llama", device)
    few.model.layers = few.model.layers[:2]
    few.config.num_hidden_layers = 2
    cache = Fp16Cache.for_model(few, 64, 2)
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="made for a model of 2 layers, and this one has a layer 2"):
        logits_of(model, cache, **inputs)


def test_what_layers_are_not_asked_for(models: Any) -> None:
    cache = Fp16Cache.for_model(models("llama"), 64)
    with pytest.raises(NotImplementedError, match="call this on the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(NotImplementedError, match=r"stay where they are allocated, on .*: there is no offloading"):
        cache.offload(0)
    with pytest.raises(NotImplementedError, match="there is no offloading"):
        cache.prefetch(0)


@pytest.mark.parametrize("attention", [NAME, None])
def test_no_gradient_goes_missing(models: Any, device: torch.device, attention: str | None) -> None:
    model = models("llama")
    out = model(**prompts(1, 5, device), past_key_values=Fp16Cache.for_model(model, 64, attention=attention))
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.logits.sum().backward()


def test_another_models_attention_is_noticed(models: Any, device: torch.device) -> None:
    cache = Fp16Cache.for_model(models("llama"), 64)
    other = make_model("llama", device)
    with pytest.raises(RuntimeError, match="attention=None"):
        logits_of(other, cache, **prompts(1, 5, device))


def test_the_attention_without_this_cache(models: Any, device: torch.device) -> None:
    """No cache, and transformers' own: the model still computes what it did, gradients included."""
    for family in ("llama", "gemma2", "gemma3", "gpt_oss"):
        model = models(family)
        inputs = prompts(2, 12, device, padded=True)
        real = inputs["attention_mask"] == 1
        want = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        Fp16Cache.for_model(model, 8, 1)
        got = model(**inputs).logits
        torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-3)
        got[real].sum().backward()
        model.zero_grad()
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), generated)


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1", "5.25.0", "6.0.0"])
def test_other_versions_of_transformers(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.17 to 5\.24, and this is transformers {version}"):
        integration.check_version()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>="):
        integration.check_version()


def test_the_supported_range_is_the_extras() -> None:
    (oldest, newest) = integration.OLDEST, integration.NEWEST
    wanted = f'"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"'
    assert wanted in (ROOT / "pyproject.toml").read_text()
