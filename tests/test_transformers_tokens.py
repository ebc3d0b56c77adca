"""Fp16Cache: transformers models generate on it what they generate on a DynamicCache that rounds to FP16 as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llms import (
    ATTENTIONS,
    FAMILIES,
    WINDOW,
    RoundingCache,
    check_beams,
    check_tokens,
    expected,
    generate,
    make_model,
    prompts,
    transformers,
)

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.integrations.transformers import CROP_MARGIN, NAME, Fp16Cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt(models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]) -> None:
    """Window layers wrap their view during this one."""
    model = models(family)
    inputs = prompts(1, 5, device)
    cache = Fp16Cache.for_model(model, 64, attention=NAME if attention == NAME else None)
    assert model.config._attn_implementation == attention
    got = generate(model, inputs, cache)
    check_tokens(model, inputs, got, expected(model, inputs), counted)
    assert cache.get_seq_length() == got.shape[1] - 1  # the last token has not been through the model


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(
    models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]
) -> None:
    model = models(family)
    inputs = prompts(3, 14, device, padded=True)
    cache = Fp16Cache.for_model(model, 64, 3, attention=NAME if attention == NAME else None)
    got = generate(model, inputs, cache)
    check_tokens(model, inputs, got, expected(model, inputs), counted)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_longer_than_a_ring(
    models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]
) -> None:
    """The rings of window layers, of window + 128 positions, are overrun by the prompt, and go round again."""
    model = models(family)
    inputs = prompts(2, 3 * (WINDOW + CROP_MARGIN) + 5, device, padded=True)
    cache = Fp16Cache.for_model(model, 512, 2, attention=NAME if attention == NAME else None)
    got = generate(model, inputs, cache)
    check_tokens(model, inputs, got, expected(model, inputs), counted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_sdpa_on_gathered_keys(models: Any, device: torch.device, family: str, counted: dict[str, int]) -> None:
    model = models(family)
    model.set_attn_implementation("sdpa")
    inputs = prompts(2, 150, device, padded=True)
    got = generate(model, inputs, Fp16Cache.for_model(model, 256, 2, attention=None))
    check_tokens(model, inputs, got, expected(model, inputs), counted)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_beams(models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]) -> None:
    model = models(family)
    inputs = prompts(2, 12, device, padded=True)
    cache = Fp16Cache.for_model(model, 64, 2 * 3, attention=NAME if attention == NAME else None)
    got = generate(model, inputs, cache, num_beams=3, num_return_sequences=2)
    want = expected(model, inputs, num_beams=3, num_return_sequences=2)
    check_beams(model, inputs, got, want, counted, returned=2)


@pytest.mark.parametrize("length", [12, 150])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3"])
def test_assisted_and_prompt_lookup(
    models: Any, device: torch.device, family: str, length: int, counted: dict[str, int]
) -> None:
    """Rejected tokens are cropped, before and after the rings have wrapped."""
    model = models(family)
    inputs = prompts(1, length, device)
    inputs["input_ids"][:, length // 2 :] = inputs["input_ids"][:, : length // 2]  # something to look up
    cache = Fp16Cache.for_model(model, 256)
    want = expected(model, inputs)
    assistant = make_model("llama", device)
    with torch.no_grad():
        assistant.lm_head.weight += 0.1 * torch.randn_like(assistant.lm_head.weight)
    check_tokens(model, inputs, generate(model, inputs, cache, assistant_model=assistant), want, counted)
    cache.reset()
    check_tokens(model, inputs, generate(model, inputs, cache, prompt_lookup_num_tokens=5), want, counted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_chunked_prefill(models: Any, device: torch.device, family: str, counted: dict[str, int]) -> None:
    model = models(family)
    inputs = prompts(3, 40, device, padded=True)
    got = generate(model, inputs, Fp16Cache.for_model(model, 128, 3), prefill_chunk_size=7)
    check_tokens(model, inputs, got, expected(model, inputs), counted)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_conversation(models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]) -> None:
    """A second turn on the same cache, and a third with another attention."""
    model = models(family)
    cache = Fp16Cache.for_model(model, 256, 2, attention=NAME if attention == NAME else None)
    reference = RoundingCache(config=model.config)
    inputs = prompts(2, 12, device, padded=True)
    for turn in range(3):
        if turn == 2 and attention == NAME:
            model.set_attn_implementation("eager")
        got = generate(model, inputs, cache, max_new_tokens=10)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        want = generate(model, inputs, reference, max_new_tokens=10)
        model.set_attn_implementation(before)
        check_tokens(model, inputs, got, want, counted)
        # Windows count columns in transformers, padding in the middle included, and tokens here: see below.
        more = prompts(2, 9 + turn, device, padded=family == "llama")
        generated = torch.ones_like(got)
        generated[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        inputs = {
            "input_ids": torch.cat([got, more["input_ids"]], 1),
            "attention_mask": torch.cat([generated, more["attention_mask"]], 1),
        }


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(device: torch.device, family: str, dtype: torch.dtype) -> None:
    model = make_model(family, device, dtype)
    inputs = prompts(2, 20, device, padded=True)
    with torch.no_grad():
        want = model(**inputs, past_key_values=RoundingCache(config=model.config)).logits
        cache = Fp16Cache.for_model(model, 64, 2)
        got = model(**inputs, past_key_values=cache).logits
    assert got.dtype == dtype
    error = (got - want)[inputs["attention_mask"] == 1].float().norm() / want.float().norm()
    assert error < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert generate(model, inputs, Fp16Cache.for_model(model, 64, 2)).shape == (2, 44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_precision_of_a_prompt(
    device: torch.device, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt is one call a layer, also where it is longer than a window's ring, at the precision asked for."""
    model = make_model("gemma3", device, dtype)
    inputs = prompts(2, 2 * (WINDOW + CROP_MARGIN), device, padded=True)
    cache = Fp16Cache.for_model(model, 512, 2, precision=precision)
    asked = []
    original = StreamingKVCacheFp16.append_attend

    def noting(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments[2].shape[1], named["precision"]))
        return original(*arguments, **named)

    monkeypatch.setattr(StreamingKVCacheFp16, "append_attend", noting)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    automatic = "fp32" if dtype == torch.float32 else "fp16"
    wanted = automatic if precision == "auto" else precision
    assert asked == [(inputs["input_ids"].shape[1], wanted)] * len(cache.layers)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(models: Any, device: torch.device, family: str, attention: str) -> None:
    """Rotated keys are FP32 there, and values BF16."""
    model = models(family)
    inputs = prompts(2, 20, device, padded=True)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generate() has them
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        want = model(**inputs, position_ids=places, past_key_values=RoundingCache(config=model.config)).logits.float()
        cache = Fp16Cache.for_model(model, 64, 2, attention=NAME if attention == NAME else None)
        got = model(**inputs, position_ids=places, past_key_values=cache).logits.float()
        there = inputs["attention_mask"] == 1
        assert (got - want)[there].norm() < 0.03 * want[there].norm()
        cache.reset()
        tokens = generate(model, inputs, cache)
        assert tokens.shape == (2, 44) and torch.equal(tokens[:, 20], got[:, -1].argmax(-1))


@pytest.mark.long
def test_compiled_generation(models: Any, device: torch.device, counted: dict[str, int]) -> None:
    """`generate` compiles the model by itself for a cache that says it may; padded, and in one graph without breaks."""
    torch._dynamo.reset()
    model = models("gemma3")
    inputs = prompts(2, 12, device, padded=True)
    want = generate(model, inputs, Fp16Cache.for_model(model, 64, 2))
    cache = Fp16Cache.for_model(model, 64, 2, compileable=True)
    assert cache.is_compileable
    config = transformers.CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    got = generate(model, inputs, cache, compile_config=config)
    check_tokens(model, inputs, got, expected(model, inputs), counted)
    if torch.device(device).type == "cpu":
        assert torch.equal(got, want)
    torch._dynamo.reset()
