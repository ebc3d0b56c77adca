"""Fp16Cache: what generation does to a cache. Tokens taken back, sequences chosen, copies, no more room."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from llms import WINDOW, RoundingCache, generate, logits_of, make_model, ones_after, prompts, transformers
from torch import Tensor

from kvcache_ext.integrations.transformers import CROP_MARGIN, NAME, Fp16Cache

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shapes_and_memory(models: Any, device: torch.device) -> None:
    model = models("gemma2")
    cache = Fp16Cache.for_model(model, 500, 2)
    assert isinstance(cache, transformers.Cache)
    assert [layer.window for layer in cache.layers] == [WINDOW, None, WINDOW]
    assert [(c.num_layers, c.max_positions) for c in cache.caches] == [(2, WINDOW + CROP_MARGIN), (1, 500)]
    assert cache.memory_bytes() == (2 * (WINDOW + CROP_MARGIN) + 500) * 2 * 2 * 16 * 2 * 2
    assert cache.is_sliding == [True, False, True]
    assert cache.get_max_length() == 500
    assert len(cache) == 3 and not cache.is_initialized and not cache.is_compileable
    assert "3 layers" in repr(cache)
    assert cache.overflow_counts().tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_crop(models: Any, device: torch.device, family: str) -> None:
    """Cropped and appended again is as if it had not been, also of padded sequences and of full rings."""
    model = models(family)
    inputs = prompts(2, 200, device, padded=True)
    inputs["attention_mask"][0, 195:197] = 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = Fp16Cache.for_model(model, 256, 2)
    want = logits_of(model, cache, input_ids=ids, attention_mask=mask, position_ids=positions)
    for count in (1, 4, 100, CROP_MARGIN):
        cache.crop(-count)
        assert cache.get_seq_length() == 200 - count
        assert cache.layers[0].cache.cache_seqlens[0].tolist() == mask[:, : 200 - count].sum(1).tolist()
        part = slice(200 - count, 200)
        again = logits_of(model, cache, input_ids=ids[:, part], attention_mask=mask, position_ids=positions[:, part])
        real = mask[:, part] == 1
        torch.testing.assert_close(again[real], want[:, part][real], rtol=0, atol=2e-3 * float(want.std()))
    cache.crop(0)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    with pytest.raises(ValueError, match=r"crop\(-201\) of 200 tokens"):
        cache.crop(-201)
    if family == "mistral":
        with pytest.raises(ValueError, match="can take back 128"):
            cache.crop(-(CROP_MARGIN + 2))
    else:
        cache.crop(-200)
        assert cache.get_seq_length() == 0
    assert cache.get_seq_length() in (0, 200)


def test_crop_after_a_call_that_was_refused() -> None:
    """Its mask is not that of what the cache holds."""
    model = make_model("llama")
    inputs = prompts(2, 10, torch.device("cpu"), padded=True)
    lengths = inputs["attention_mask"][:, :9].sum(1)
    cache = Fp16Cache.for_model(model, 11, 2)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[0, 1], [1, 1]])], 1)
        with pytest.raises(ValueError, match="do not fit"):
            model(torch.ones(2, 2, dtype=torch.int64), attention_mask=mask, past_key_values=cache)
    cache.crop(-1)
    assert (cache.caches[0].cache_seqlens == lengths).all()


def test_crop_after_a_forward_pass_that_was_broken_off(models: Any, device: torch.device) -> None:
    for family in ("llama", "gemma3"):
        model = models(family)
        inputs = prompts(3, 13, device, padded=True)
        cache = Fp16Cache.for_model(model, 64, 3)
        logits_of(model, cache, **inputs)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, cache, input_ids=inputs["input_ids"][:, :5], attention_mask=ones_after(inputs, 5))
        hook.remove()
        before = [each.cache_seqlens.clone() for each in cache.caches]
        with pytest.raises(RuntimeError, match="broken off; reset"):
            cache.crop(-2)
        assert all(torch.equal(each.cache_seqlens, held) for each, held in zip(cache.caches, before, strict=True))


def test_a_forward_pass_that_was_broken_off(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    inputs = prompts(1, 5, device)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits_of(model, cache, **inputs)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"hold from 0 to 5 tokens.* reset"):
        logits_of(model, cache, **inputs)
    cache.reset()
    logits_of(model, cache, **inputs)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_crop_of_padding_from_a_full_ring(models: Any, device: torch.device, family: str) -> None:
    """A ring whose text had padding once has lost fewer tokens than columns: a later crop, and gathering, know."""
    model = models(family)
    prompt = prompts(2, 200, device)["input_ids"]

    def ask(cache: Fp16Cache, ids: Tensor, pads: int = 0) -> Tensor:
        mask = torch.ones(2, 200 + ids.shape[1], dtype=torch.int64, device=device)
        mask[0, 200 : 200 + pads] = 0
        places = (mask.cumsum(1) - 1)[:, 200:]
        return logits_of(model, cache, input_ids=ids, attention_mask=mask, position_ids=places)[:, -1]

    question, other = (prompts(2, n, device)["input_ids"] for n in (10, 4))
    cache = Fp16Cache.for_model(model, 400, 2)
    logits_of(model, cache, input_ids=prompt)
    want = ask(copy.deepcopy(cache), question)
    ask(cache, question, pads=5)
    cache.crop(-10)
    ask(cache, other)
    gathers = copy.deepcopy(cache)
    cache.crop(-4)
    assert cache.layers[0].cache.position == 200
    torch.testing.assert_close(ask(cache, question), want, rtol=0, atol=2e-3 * float(want.std()))
    straight = Fp16Cache.for_model(model, 400, 2)
    logits_of(model, straight, input_ids=prompt)
    ask(straight, other)
    model.set_attn_implementation("eager")
    new = {"input_ids": question[:, :3], "position_ids": torch.arange(204, 207, device=device).expand(2, -1)}
    want = logits_of(model, straight, **new)
    torch.testing.assert_close(logits_of(model, gathers, **new), want, rtol=0, atol=2e-3 * float(want.std()))


def test_reset_and_copies(models: Any, device: torch.device) -> None:
    model = models("gemma2")
    cache = Fp16Cache.for_model(model, 64, 2)
    inputs = prompts(2, 10, device, padded=True)
    first = generate(model, inputs, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, inputs, cache), first)
    cache.reset()
    logits_of(model, cache, **inputs)
    prefilled = copy.deepcopy(cache)  # a prompt used twice
    assert prefilled.layers[0].shared.config is model.config
    assert prefilled.layers[0].cache is prefilled.caches[0] is not cache.caches[0]
    answers = [generate(model, inputs | {"input_ids": first[:, :11], "attention_mask": ones_after(inputs, 1)}, c)
               for c in (cache, prefilled)]  # fmt: skip
    assert torch.equal(*answers)
    single = {name: x[1:] for name, x in inputs.items()}
    cache.reset()
    assert torch.equal(generate(model, single, cache), first[1:])


def test_copies_of_a_model_and_its_cache_belong_together(models: Any, device: torch.device) -> None:
    model = copy.deepcopy(models("llama"))
    cache = Fp16Cache.for_model(model, 64, 1)
    other, of_other = copy.deepcopy((model, cache))
    other.set_attn_implementation("eager")
    inputs = prompts(1, 5, device)
    want = generate(model, inputs, cache)
    assert torch.equal(generate(other, inputs, of_other)[:, :7], want[:, :7])
    of_third, third = copy.deepcopy((cache, model))
    assert third.config is not model.config and of_third.shared.config is model.config


@pytest.mark.parametrize("attention", [NAME, None])
def test_batches_that_grow_and_shrink(models: Any, device: torch.device, attention: str | None) -> None:
    model = models("gemma3")
    inputs = prompts(2, 12, device, padded=True)
    cache = Fp16Cache.for_model(model, 64, 5, attention=attention)
    logits_of(model, cache, **inputs)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2, 3], device=device))
    with pytest.raises(ValueError, match="3 sequences 2 times need batch_size=6"):
        cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 1, 1], device=device)
    ids = torch.tensor([[5], [6], [7]], device=device)
    mask = ones_after(inputs, 1)[rows]
    positions = (mask.cumsum(1) - 1)[:, -1:]
    got = logits_of(model, cache, input_ids=ids, attention_mask=mask, position_ids=positions)
    model.set_attn_implementation("eager")
    reference = RoundingCache(config=model.config)
    logits_of(model, reference, **{name: x[rows] for name, x in inputs.items()})
    want = logits_of(model, reference, input_ids=ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.std()))


def test_chosen_sequences(models: Any, device: torch.device) -> None:
    model = models("llama")
    inputs = prompts(3, 6, device)
    cache = Fp16Cache.for_model(model, 64, 4)
    logits_of(model, cache, **inputs)
    for wrong, error in (([], TypeError), ("a", TypeError), ([True, False], TypeError), ([3], IndexError)):
        with pytest.raises(error, match="indices of sequences must be"):
            cache.batch_select_indices(wrong)
        with pytest.raises(IndexError, match="from 0 to 2"):
            cache.batch_select_indices(torch.tensor([-1]))
    cache.batch_select_indices([True, False, True])
    want = Fp16Cache.for_model(model, 64, 4)
    logits_of(model, want, input_ids=inputs["input_ids"][::2])
    new = inputs["input_ids"][:2, :1]
    torch.testing.assert_close(logits_of(model, cache, input_ids=new), logits_of(model, want, input_ids=new))


def test_a_cache_that_holds_nothing_takes_any_number_of_sequences(models: Any, device: torch.device) -> None:
    """Also after a call that was refused, and when everything has been taken back."""
    model = models("llama")
    inputs = prompts(1, 5, device, padded=True)
    want = generate(model, inputs, Fp16Cache.for_model(model, 64, 3))
    cache = Fp16Cache.for_model(model, 64, 3)
    logits_of(model, cache, **prompts(3, 6, device, padded=True))
    cache.crop(-6)
    assert torch.equal(generate(model, inputs, cache), want)
    cache.reset()
    with pytest.raises(TypeError, match="float64"):
        logits_of(copy.deepcopy(model).double(), cache, **prompts(2, 6, device, padded=True))
    assert torch.equal(generate(model, inputs, cache), want)
    # Slots that have gone out of use, and what was planned for another number of sequences, are of no consequence.
    for padded in (False, True):
        cache.reset()
        logits_of(model, cache, **prompts(3, 6, device, padded=padded))
        cache.batch_select_indices([0, 1])
        cache.crop(-6)
        with pytest.raises(ValueError, match="4 sequences need batch_size=4"):
            logits_of(model, cache, **prompts(4, 6, device, padded=True))
        three = prompts(3, 7, device)["input_ids"]
        got = logits_of(model, cache, input_ids=three)
        assert torch.equal(got, logits_of(model, Fp16Cache.for_model(model, 64, 3), input_ids=three))
        cache.crop(-1)
        assert cache.caches[0].cache_seqlens.tolist() == [[6] * 3] * 3
        with pytest.raises(ValueError, match="it holds 3 sequences, and these are 2"):
            logits_of(model, cache, **prompts(2, 7, device))


def test_a_full_cache_says_so(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 20)
    inputs = prompts(1, 15, device)
    assert generate(model, inputs, cache, max_new_tokens=6).shape == (1, 21)
    cache.reset()
    with pytest.raises(ValueError, match=r"20 tokens are in the cache and 1 more do not fit into max_positions=20"):
        generate(model, inputs, cache, max_new_tokens=7)
    with pytest.raises(ValueError, match="3 sequences need batch_size=3"):
        logits_of(model, Fp16Cache.for_model(model, 20), **prompts(3, 5, device))
    with pytest.raises(ValueError, match="it holds 1 sequences, and these are 2"):
        cache = Fp16Cache.for_model(model, 20, 2)
        logits_of(model, cache, **prompts(1, 5, device))
        logits_of(model, cache, input_ids=prompts(2, 5, device)["input_ids"])


@pytest.mark.parametrize("attention", ["kvcache_ext", None])
def test_a_full_cache_whose_first_layer_has_a_window(models: Any, device: torch.device, attention: str | None) -> None:
    """A ring never ends, but layers behind it do: it must not have begun."""
    model = models("gemma2")
    cache = Fp16Cache.for_model(model, 150, 2, attention=attention)
    before = logits_of(model, cache, input_ids=prompts(1, 140, device)["input_ids"])
    with pytest.raises(ValueError, match=r"140 tokens are in the cache and 17 more do not fit into max_positions=150"):
        logits_of(model, cache, input_ids=prompts(1, 17, device)["input_ids"])
    assert {layer.columns for layer in cache.layers} == {140}
    after = logits_of(model, cache, input_ids=prompts(1, 10, device)["input_ids"])
    assert before.isfinite().all() and after.isfinite().all()
    fresh = Fp16Cache.for_model(model, 150, 2, attention=attention)
    with pytest.raises(ValueError, match="do not fit"):
        logits_of(model, fresh, input_ids=prompts(2, 151, device)["input_ids"])
    logits_of(
        model, fresh, input_ids=prompts(1, 5, device)["input_ids"]
    )  # of another number of sequences, as none had come


def test_windows_have_no_end(models: Any, device: torch.device) -> None:
    model = models("mistral")
    cache = Fp16Cache.for_model(model, WINDOW + CROP_MARGIN)
    logits_of(model, cache, **prompts(1, 700, device))
    assert cache.get_seq_length() == 700 and len(cache.caches[0]) == WINDOW + CROP_MARGIN


@pytest.mark.parametrize("max_positions", [5, 20, 136, 137])
def test_a_window_layer_has_no_more_slots_than_the_longest_text(
    models: Any, device: torch.device, max_positions: int
) -> None:
    cache = Fp16Cache.for_model(models("mistral"), max_positions)
    slots = min(max_positions, WINDOW + CROP_MARGIN)
    assert [c.max_positions for c in cache.caches] == [slots]
    assert cache.memory_bytes() == 3 * slots * 2 * 16 * 2 * 2
    assert cache.get_max_length() == (max_positions if max_positions < WINDOW + CROP_MARGIN else -1)
