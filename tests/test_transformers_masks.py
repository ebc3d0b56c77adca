"""Fp16Cache: masks of every kind, and padding that must never be lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from llms import (
    RoundingCache,
    check_tokens,
    expected,
    generate,
    logits_of,
    make_model,
    ones_after,
    prompts,
)

from kvcache_ext.integrations.transformers import Fp16Cache, padding

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_2d_masks_of_any_kind(models: Any, device: torch.device, family: str) -> None:
    """Right padding and holes, in one go and in pieces: each sequence gets the logits of its tokens alone."""
    model = models(family)
    inputs = prompts(3, 30, device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[0, 13:] = 0
    mask[1, 4:7] = 0
    mask[1, 11] = 0
    mask[2, :5] = 0
    mask[2, 17:19] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for pieces in ([0, 30], [0, 9, 18, 19, 30]):
        cache = Fp16Cache.for_model(model, 64, 3)
        parts = [
            logits_of(model, cache, input_ids=ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b])
            for a, b in itertools.pairwise(pieces)
        ]
        got = torch.cat(parts, 1)
        assert cache.layers[0].cache.cache_seqlens[0].tolist() == mask.sum(1).tolist()
        assert cache.get_seq_length() == 30
        model.set_attn_implementation("eager")
        for b in range(3):
            real = mask[b] == 1
            want = logits_of(model, RoundingCache(config=model.config), input_ids=ids[b : b + 1, real])
            torch.testing.assert_close(got[b : b + 1, real], want, rtol=0, atol=2e-3 * float(want.std()))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_4d_masks(models: Any, device: torch.device, family: str, kind: str) -> None:
    """Two texts packed into one: neither sees the other. Gathered, and masked as it says."""
    model = models(family)
    inputs = prompts(1, 7, device)
    ids = inputs["input_ids"]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    first = torch.tensor([[1, 1, 1, 0, 0, 0, 0]], device=device)
    mask = (first[:, :, None] == first[:, None]).tril()[:, None]
    if kind == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    want = logits_of(
        model, RoundingCache(config=model.config), input_ids=ids, position_ids=positions,
        attention_mask=mask if kind == "float" else torch.where(mask, 0.0, torch.finfo(torch.float32).min),
    )  # fmt: skip
    cache = Fp16Cache.for_model(model, 64)
    got = logits_of(model, cache, input_ids=ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"mask of shape .* does not fit"):
        logits_of(model, cache, input_ids=ids, attention_mask=torch.ones(1, 1, 7, 5, device=device).bool())
    assert [layer.columns for layer in cache.layers] == [7] * len(cache.layers)  # nothing was begun
    logits_of(model, cache, input_ids=ids)


def test_patterns_other_than_causal(models: Any, device: torch.device) -> None:
    """A mask function that a model lays over the causal one is honoured."""
    from transformers.masking_utils import create_causal_mask

    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    embeddings = torch.zeros(1, 6, 1, device=device)
    arguments = {"config": model.config, "inputs_embeds": embeddings, "past_key_values": cache}
    assert create_causal_mask(**arguments, attention_mask=None) is None
    assert create_causal_mask(**arguments, attention_mask=torch.ones(1, 6, device=device)) is None
    mask = create_causal_mask(
        **arguments, attention_mask=None, or_mask_function=lambda batch, head, query, key: key >= 0
    )
    assert mask.shape == (1, 1, 6, 6) and bool(mask.all())


def test_masks_that_do_not_fit(models: Any, device: torch.device) -> None:
    model = models("llama")
    inputs = prompts(2, 8, device, padded=True)
    cache = Fp16Cache.for_model(model, 64, 2)
    logits_of(model, cache, **inputs)
    next_ids = inputs["input_ids"][:, :3]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    with pytest.raises(ValueError, match="has 3 columns, and the cache holds 8 tokens and gets 3 more"):
        logits_of(model, cache, input_ids=next_ids, attention_mask=mask[:, -3:])
    for column, value in ((0, 1), (7, 0)):  # padding that comes back, a token that goes
        changed = mask.clone()
        changed[0, column] = value
        with pytest.raises(ValueError, match="something else of the tokens in the cache"):
            logits_of(model, cache, input_ids=next_ids, attention_mask=changed)
    logits_of(model, cache, input_ids=next_ids, attention_mask=mask)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_whole_masks_of_integers_are_refused(dtype: torch.dtype) -> None:
    model = make_model("llama")
    inputs = prompts(1, 6, torch.device("cpu")) | {"attention_mask": torch.ones(1, 1, 6, 6, dtype=dtype).tril()}
    with pytest.raises(ValueError, match="pass the model a 2D mask, or a 4D one of bool or floating point"):
        model(**inputs, past_key_values=Fp16Cache.for_model(model, 64))


def test_masks_looked_at_a_step_later(
    models: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, counted: dict[str, int]
) -> None:
    """What a GPU does so as not to wait, here on any device: the same tokens, and errors at the next step."""
    monkeypatch.setattr(padding.Padding, "defers_checks", staticmethod(lambda mask: True))
    for family in ("llama", "gemma3"):
        model = models(family)
        inputs = prompts(3, 14, device, padded=True)
        cache = Fp16Cache.for_model(model, 64, 3)
        got = generate(model, inputs, cache)
        check_tokens(model, inputs, got, expected(model, inputs), counted)
        cache.crop(-10)
        kept = ones_after(inputs, 13)
        assert cache.layers[0].cache.cache_seqlens[0].tolist() == kept.sum(1).tolist()
        mask, ids = ones_after(inputs, 14), got[:, 27:28]
        mask[0, 0] = 1
        logits_of(model, cache, input_ids=ids, attention_mask=mask)
        with pytest.raises(ValueError, match="something else of the tokens in the cache"):
            logits_of(model, cache, input_ids=ids, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1))
        cache.reset()
        with cache.cuda_graphs(model):
            assert torch.equal(generate(model, inputs, cache), got)


def test_a_decode_step_with_padding(models: Any, device: torch.device) -> None:
    """One of two sequences pauses: it appends nothing."""
    model = models("llama")
    inputs = prompts(2, 8, device)
    cache = Fp16Cache.for_model(model, 64, 2)
    logits_of(model, cache, **inputs)
    mask = torch.ones(2, 9, device=device, dtype=torch.int64)
    mask[0, 8] = 0
    logits_of(model, cache, input_ids=inputs["input_ids"][:, :1], attention_mask=mask)
    assert cache.layers[0].cache.cache_seqlens.tolist() == [[8, 9]] * 3
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    got = logits_of(model, cache, input_ids=inputs["input_ids"][:, 1:2], attention_mask=mask, position_ids=positions)
    model.set_attn_implementation("eager")
    text = torch.cat([inputs["input_ids"][:1], inputs["input_ids"][:1, 1:2]], 1)
    want = logits_of(model, RoundingCache(config=model.config), input_ids=text)[:, -1:]
    torch.testing.assert_close(got[:1], want, rtol=0, atol=2e-3 * float(want.std()))


def test_padding_of_single_tokens_is_known_in_a_compileable_cache(models: Any, device: torch.device) -> None:
    model = models("llama")
    ids = prompts(2, 7, device)["input_ids"]
    mask = torch.ones(2, 7, dtype=torch.int64, device=device)
    mask[0, 5] = 0
    held = []
    for compileable in (False, True):
        cache = Fp16Cache.for_model(model, 64, 2, compileable=compileable)
        for begin, end in ((0, 5), (5, 6), (6, 7)):
            logits_of(model, cache, input_ids=ids[:, begin:end], attention_mask=mask[:, :end])
        cache.crop(-1)
        held.append(cache.caches[0].cache_seqlens[0].tolist())
    assert held == [[5, 6], [5, 6]]
    # What the mask says of older tokens is not taken over: a pass of several finds what it contradicts.
    hides = torch.ones(2, 8, dtype=torch.int64, device=device)
    hides[:, 0] = 0
    logits_of(model, cache, input_ids=ids[:, :1], attention_mask=hides[:, :7])
    with pytest.raises(ValueError, match="something else of the tokens in the cache"):
        logits_of(model, cache, input_ids=ids[:, :2], attention_mask=torch.nn.functional.pad(hides, (0, 1), value=1))


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_masks_in_code_that_is_compiled_in_parts(models: Any, device: torch.device, family: str) -> None:
    """Where the compiler gives up on the code around the masks, they are refused as in one piece; none is served."""
    torch._dynamo.reset()
    model = models(family)
    ids = prompts(2, 20, device)["input_ids"]
    cache = Fp16Cache.for_model(model, 64, 2)
    want = logits_of(model, cache, input_ids=ids)
    cache.reset()
    compiled = torch.compile(model, backend="eager")
    for mask in (torch.ones_like(ids), prompts(2, 20, device, padded=True)["attention_mask"]):
        with pytest.raises(RuntimeError, match="compiled code can serve a plain causal or sliding pattern without"):
            logits_of(compiled, cache, input_ids=ids, attention_mask=mask)
        assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits_of(compiled, cache, input_ids=ids), want, rtol=0, atol=1e-4)
    assert cache.caches[0].position == 20
    torch._dynamo.reset()


def test_masked_tokens_after_a_prompt_without_a_mask(models: Any, device: torch.device) -> None:
    """In a compileable cache: the mask of a single token says nothing of the prompt, which was no padding."""
    model = models("llama")
    ids = prompts(2, 12, device)["input_ids"]
    cache = Fp16Cache.for_model(model, 64, 2, compileable=True)
    reference = RoundingCache(config=model.config)
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        mask = torch.ones(2, part.stop, dtype=torch.int64, device=device)
        mask[0, 8:10] = 0 if part.stop == 12 else 1
        options = {} if part.stop == 7 else {"attention_mask": mask}
        got = logits_of(model, cache, input_ids=ids[:, part], **options)
        model.set_attn_implementation("eager")
        want = logits_of(model, reference, input_ids=ids[:, part], **options)
        model.set_attn_implementation("kvcache_ext")
        torch.testing.assert_close(got[mask[:, part] == 1], want[mask[:, part] == 1], rtol=1e-3, atol=1e-3)
    assert cache.caches[0].cache_seqlens[0].tolist() == [10, 12]
