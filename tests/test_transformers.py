"""Fp16Cache: transformers models generate on it what they generate on a DynamicCache that rounds to FP16 as it does.

The models are random and small. Greedy tokens are compared one by one; where they part, the two tokens must be nearly
equal in FP64 (`NEAR_TIE`), and how often that happened is printed at the end.
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, NOTES, ROOT, needs_gpu
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
try:
    from kvcache_ext.integrations import transformers as integration
    from kvcache_ext.integrations.transformers import CROP_MARGIN, NAME, Fp16Cache, shared
    from kvcache_ext.integrations.transformers.version import cache_argument
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
_models: dict[tuple[str, torch.device], Any] = {}


def make_model(family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    name, options = CONFIGURATIONS[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config_name)(**BASE | options))
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sinks"):
            torch.nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("eager")
    return model.eval().to(device, dtype)


@pytest.fixture
def models(device: torch.device) -> Any:
    """Models by family, made once, with eager attention until a cache changes it."""

    def get(family: str) -> Any:
        if (family, device) not in _models:
            _models[family, device] = make_model(family, device)
        model = _models[family, device]
        model.set_attn_implementation("eager")
        return model

    return get


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Work this small is slower on several, and far slower where others use them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def counted() -> Iterator[dict[str, int]]:
    counts = {"tokens": 0, "near ties": 0}
    yield counts
    NOTES.append(
        f"token identity with a DynamicCache that rounds to FP16: {counts['tokens']} tokens compared, "
        f"{counts['near ties']} sequences parted at near ties (FP64: within {NEAR_TIE})"
    )


def prompts(batch: int, length: int, device: torch.device, *, padded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(batch * 1000 + length)
    ids = torch.randint(2, VOCABULARY, (batch, length), device=device)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(batch - 1):
            mask[b, : (b + 1) * length // (batch + 1)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


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


def check_tokens(model: Any, inputs: dict[str, Tensor], got: Tensor, want: Tensor, counts: dict[str, int]) -> None:
    assert got.shape == want.shape
    start = inputs["input_ids"].shape[1]
    new = want[:, start:]
    assert len(new.unique()) > 5, "the model repeats itself: nothing is tested"
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


# Token identity

ATTENTIONS = [NAME, "eager"]


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


# Masks


def logits_of(model: Any, cache: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


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


def test_masks_looked_at_a_step_later(
    models: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, counted: dict[str, int]
) -> None:
    """What a GPU does so as not to wait, here on any device: the same tokens, and errors at the next step."""
    monkeypatch.setattr(shared.Shared, "looks_late", staticmethod(lambda mask: True))
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


# What generation does to a cache


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


def ones_after(inputs: dict[str, Tensor], count: int) -> Tensor:
    return torch.nn.functional.pad(inputs["attention_mask"], (0, count), value=1)


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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_decode_graph(models: Any, device: torch.device, family: str) -> None:
    """One step as a CUDA graph (on a CPU the step itself), by hand and in `generate`."""
    model = models(family)
    cache = Fp16Cache.for_model(model, 64, 2)
    inputs = prompts(2, 12, device, padded=True)
    want = generate(model, inputs, cache)
    cache.reset()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    token = logits_of(model, cache, **inputs, position_ids=positions)[:, -1:].argmax(-1)
    step = cache.decode_graph(model)
    tokens = [token]
    for _ in range(10):
        tokens.append(step(tokens[-1])[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), want[:, 12:23])
    assert cache.get_seq_length() == 22
    with pytest.raises(ValueError, match="2 sequences by one token"):
        step(tokens[-1][:1])
    cache.crop(-4)
    assert torch.equal(step(tokens[6])[:, -1:].argmax(-1), want[:, 19:20])
    cache.reset()
    with cache.cuda_graphs(model):
        assert torch.equal(generate(model, inputs, cache), want)
    assert "forward" not in model.__dict__
    assert cache.get_seq_length() == 12 + 23


@pytest.mark.parametrize("beams", [1, 3])
def test_graphs_of_fewer_sequences_than_the_cache_has_room_for(models: Any, device: torch.device, beams: int) -> None:
    """Whose slots the graph has the address of: they must not go away, whatever happens to the cache meanwhile."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 8)
    for batch in (2, 1, 2):  # each captures anew
        inputs = prompts(batch, 9, device, padded=True)
        cache.reset()
        want = generate(model, inputs, cache, num_beams=beams)
        slots = weakref.ref(cache._shared.slots(torch.device(device))["sequences"])
        cache.reset()
        with cache.cuda_graphs(model):
            assert torch.equal(generate(model, inputs, cache, num_beams=beams), want)
            cache.reset()
            noise = [torch.full((n,), 7, dtype=torch.int64, device=device) for n in range(1, 9)]  # in what was freed
            assert torch.equal(generate(model, inputs, cache, num_beams=beams), want)
        assert slots() is not None and len(noise) == 8


def test_graphs_are_used(models: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all else about them would be right in vain."""
    model = models("llama")
    steps = 0
    call = integration.DecodeGraph.__call__

    def counted(self: Any, *args: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return call(self, *args)

    monkeypatch.setattr(integration.DecodeGraph, "__call__", counted)
    cache = Fp16Cache.for_model(model, 64, 2)
    with cache.cuda_graphs(model):
        generate(model, prompts(2, 9, device, padded=True), cache, max_new_tokens=8)
    assert steps == 7


def test_graphs_where_there_is_no_room_to_capture(models: Any, device: torch.device) -> None:
    model = models("llama")
    inputs = prompts(2, 9, device)
    want = generate(model, inputs, Fp16Cache.for_model(model, 64, 2), max_new_tokens=3)
    cache = Fp16Cache.for_model(model, 11, 2)
    with cache.cuda_graphs(model):
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=3), want)


def test_graphs_replay_only_what_they_know(models: Any, device: torch.device) -> None:
    """Whatever else a call brings reaches the model, as it does without graphs."""
    torch.manual_seed(3)
    config = {"vocab_size": VOCABULARY, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **special)).eval().to(device)
    inputs = prompts(2, 9, device)
    inputs["token_type_ids"] = torch.randint(0, VOCABULARY, (2, 9), device=device)
    cache = Fp16Cache.for_model(model, 64, 2)
    want = generate(model, inputs, cache)
    with cache.cuda_graphs(model):
        cache.reset()
        assert torch.equal(generate(model, inputs, cache), want)
    model = models("llama")
    inputs = prompts(3, 9, device, padded=True)
    cache = Fp16Cache.for_model(model, 64, 3)
    mask = ones_after(inputs, 1)
    new = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask}
    logits_of(model, cache, **inputs)
    plain = logits_of(model, cache, **new)  # positions are columns then
    cache.crop(-1)
    with cache.cuda_graphs(model):
        assert torch.equal(logits_of(model, cache, **new), plain)
        cache.crop(-1)
        embeddings = model.get_input_embeddings()(new["input_ids"])
        assert torch.equal(logits_of(model, cache, inputs_embeds=embeddings, attention_mask=mask), plain)


def test_graphs_return_what_the_model_returns(models: Any, device: torch.device) -> None:
    model = copy.deepcopy(models("llama"))
    cache = Fp16Cache.for_model(model, 64, 2)
    inputs = prompts(2, 9, device)
    places = torch.full((2, 1), 9, device=device)
    new = {"input_ids": inputs["input_ids"][:, :1], "position_ids": places, cache_argument(): cache}
    model.config.output_hidden_states = True
    for part, field in ((model, "logits"), (model.model, "last_hidden_state")):
        cache.reset()
        logits_of(model, cache, input_ids=inputs["input_ids"])
        with torch.no_grad():
            want = part(**new)
            cache.crop(-1)
            with cache.cuda_graphs(part):
                got, later = part(**new), part(**new | {"position_ids": places + 1})
        assert type(got) is type(want) and list(got) == list(want)
        torch.testing.assert_close(got[field], want[field])
        torch.testing.assert_close(got.hidden_states, want.hidden_states)
        assert not torch.equal(got[field], later[field])  # a copy, not what the next step overwrites


def test_graphs_of_experts_that_are_to_return_router_logits(device: torch.device) -> None:
    """The loss that comes with them cannot be captured: `decode_graph` goes without, `cuda_graphs` does not replay."""
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**BASE | options)).eval().to(device)
    experts = model.get_experts_implementation()
    cache = Fp16Cache.for_model(model, 64, 2)
    ids = prompts(2, 9, device)["input_ids"]
    logits_of(model, cache, input_ids=ids)
    new = {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), 9, device=device), cache_argument(): cache}
    with torch.no_grad():
        want = model(**new)
        cache.crop(-1)
        torch.testing.assert_close(cache.decode_graph(model)(new["input_ids"]), want.logits)
        cache.crop(-1)
        with cache.cuda_graphs(model):
            got = model(**new)
            cache.crop(-1)
            without = model(**new, output_router_logits=False)
    assert list(got) == list(want) and want.aux_loss is not None
    torch.testing.assert_close((got.logits, got.aux_loss), (want.logits, want.aux_loss))
    assert without.aux_loss is None
    torch.testing.assert_close(without.logits, want.logits)
    assert model.get_experts_implementation() == experts


def test_graphs_with_masks_of_other_kinds(models: Any, device: torch.device) -> None:
    """A dict of masks, as `generate` makes for compileable caches, and one row for all sequences."""
    model = models("gemma3")
    inputs = prompts(2, 12, device, padded=True)
    want = generate(model, inputs, Fp16Cache.for_model(model, 64, 2))
    cache = Fp16Cache.for_model(model, 64, 2, compileable=True)
    with cache.cuda_graphs(model):
        assert torch.equal(generate(model, inputs, cache, disable_compile=True), want)
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 3)
    ids, row = prompts(3, 6, device)["input_ids"], torch.tensor([[0, 1, 1, 1, 1, 1]], device=device)
    with cache.cuda_graphs(model):
        logits_of(model, cache, input_ids=ids, attention_mask=row)
        row = torch.nn.functional.pad(row, (0, 1), value=1)
        new = {"input_ids": ids[:, :1], "position_ids": torch.full((3, 1), 5, device=device)}
        first = logits_of(model, cache, **new, attention_mask=row)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([2, 1, 0], device=device))
        new["input_ids"] = new["input_ids"].flip(0)
        torch.testing.assert_close(logits_of(model, cache, **new, attention_mask=row), first.flip(0))


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


def test_a_model_of_fp64_is_refused(models: Any) -> None:
    with pytest.raises(TypeError, match="is an FP64 model"):
        Fp16Cache.for_model(copy.deepcopy(models("llama")).double(), 64)


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


def test_copies_of_a_model_and_its_cache_belong_together(models: Any, device: torch.device) -> None:
    model = copy.deepcopy(models("llama"))
    cache = Fp16Cache.for_model(model, 64, 1)
    other, of_other = copy.deepcopy((model, cache))
    other.set_attn_implementation("eager")
    inputs = prompts(1, 5, device)
    want = generate(model, inputs, cache)
    assert torch.equal(generate(other, inputs, of_other)[:, :7], want[:, :7])
    of_third, third = copy.deepcopy((cache, model))
    assert third.config is not model.config and of_third._shared.config is model.config


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


@pytest.mark.slow
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


# Layers on several devices


def move_to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return type(x)(move_to(each, device) for each in x)
    return {name: move_to(each, device) for name, each in x.items()} if isinstance(x, dict) else x


def place(layer: torch.nn.Module, device: torch.device, home: torch.device) -> None:
    """As a device map does: what comes to the layer moves to its device, and what it answers back."""
    layer.to(device)
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (move_to(args, device), move_to(kwargs, device)), with_kwargs=True
    )
    layer.register_forward_hook(lambda _, args, answer: move_to(answer, home))


# On a machine with one GPU the second device is the CPU.
OTHER_DEVICE = torch.device("cuda:1" if HAS_GPU and torch.cuda.device_count() > 1 else "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_on_several_devices(family: str, attention: str, beams: int, counted: dict[str, int]) -> None:
    home = torch.device("cuda:0")
    model = make_model(family, home)
    inputs = prompts(3, 14, home, padded=True)
    want = expected(model, inputs, num_beams=beams)
    place(model.model.layers[1], OTHER_DEVICE, home)
    cache = Fp16Cache.for_model(model, 64, 3 * beams, attention=NAME if attention == NAME else None)
    assert [layer.device for layer in cache.layers] == [home, OTHER_DEVICE, home]
    got = generate(model, inputs, cache, num_beams=beams)
    if beams == 1:
        check_tokens(model, inputs, got, want, counted)
    else:
        check_beams(model, inputs, got, want, counted, 1)
    cache.crop(10 - cache.get_seq_length())
    assert [layer.get_seq_length() for layer in cache.layers] == [10, 10, 10]


@pytest.mark.skipif(OTHER_DEVICE.type == "cpu", reason="needs two GPUs")
def test_a_model_on_a_device_that_is_not_current(counted: dict[str, int]) -> None:
    model = make_model("gemma2", OTHER_DEVICE)
    inputs = prompts(3, 14, OTHER_DEVICE, padded=True)
    with torch.cuda.device(0):
        cache = Fp16Cache.for_model(model, 64, 3)
        got = generate(model, inputs, cache)
        check_tokens(model, inputs, got, expected(model, inputs), counted)
        wrong = torch.cat([inputs["attention_mask"].flip(1), torch.ones_like(got)], 1)[:, : got.shape[1]]
        with pytest.raises(ValueError, match="attention_mask says something else"), torch.no_grad():
            for _ in range(2):  # what is wrong is noticed a step later
                model(got[:, -1:], attention_mask=wrong, past_key_values=cache)
                wrong = torch.nn.functional.pad(wrong, (0, 1), value=1)
        assert torch.cuda.current_device() == 0


# The edges


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_whole_masks_of_integers_are_refused(dtype: torch.dtype) -> None:
    model = make_model("llama")
    inputs = prompts(1, 6, torch.device("cpu")) | {"attention_mask": torch.ones(1, 1, 6, 6, dtype=dtype).tril()}
    with pytest.raises(ValueError, match="pass the model a 2D mask, or a 4D one of bool or floating point"):
        model(**inputs, past_key_values=Fp16Cache.for_model(model, 64))


def test_a_default_device() -> None:
    """Indices that the cache makes for itself are made where they are looked at."""
    model = make_model("llama")
    cache = Fp16Cache.for_model(model, 64, 4)
    with torch.no_grad():
        model(**prompts(2, 5, torch.device("cpu")), past_key_values=cache)
    (held,) = cache.caches
    before = held.k_cache[:, :2, :5].clone()
    with torch.device("meta"):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices([3, 0])
    assert cache.get_seq_length() == 5
    assert torch.equal(held.k_cache[:, :2, :5], before.flip(1)) and not torch.equal(before[:, 0], before[:, 1])


def test_shapes_and_memory(models: Any, device: torch.device) -> None:
    model = models("gemma2")
    cache = Fp16Cache.for_model(model, 500, 2)
    assert isinstance(cache, transformers.Cache)
    assert [layer.window for layer in cache.layers] == [WINDOW, None, WINDOW]
    assert [(c.num_layers, c.max_positions) for c in cache.caches] == [(2, WINDOW + CROP_MARGIN), (1, 500)]
    assert cache.memory_bytes() == (2 * (WINDOW + CROP_MARGIN) + 500) * 2 * 2 * 16 * 2 * 2
    assert cache.is_sliding == [True, False, True]
    assert cache.get_max_length() == 500
    assert len(cache) == 3 and cache.is_initialized and not cache.is_compileable
    assert "3 layers" in repr(cache)
    assert cache.overflow_counts().tolist() == [0, 0, 0]


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
    before = [tensor.clone() for c in cache.caches for tensor in (c.k_cache, c.v_cache, c._state)]
    with pytest.raises(error, match="Fp16Cache"):
        call(cache)
    assert cache._shared.active == 2 and cache.get_seq_length() == 10
    for old, new in zip(before, (t for c in cache.caches for t in (c.k_cache, c.v_cache, c._state)), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def test_windows_have_no_end(models: Any, device: torch.device) -> None:
    model = models("mistral")
    cache = Fp16Cache.for_model(model, WINDOW + CROP_MARGIN)
    logits_of(model, cache, **prompts(1, 700, device))
    assert cache.get_seq_length() == 700 and len(cache.caches[0]) == WINDOW + CROP_MARGIN


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


def test_another_models_attention_is_noticed(models: Any, device: torch.device) -> None:
    cache = Fp16Cache.for_model(models("llama"), 64)
    other = make_model("llama", device)
    with pytest.raises(RuntimeError, match="attention=None"):
        logits_of(other, cache, **prompts(1, 5, device))


@pytest.mark.parametrize("attention", [NAME, None])
def test_no_gradient_goes_missing(models: Any, device: torch.device, attention: str | None) -> None:
    model = models("llama")
    out = model(**prompts(1, 5, device), past_key_values=Fp16Cache.for_model(model, 64, attention=attention))
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.logits.sum().backward()


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


def test_what_layers_are_not_asked_for(models: Any) -> None:
    cache = Fp16Cache.for_model(models("llama"), 64)
    with pytest.raises(NotImplementedError, match="call this on the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(NotImplementedError, match=r"stay where they are allocated, on .*: there is no offloading"):
        cache.offload(0)


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


def tiny(name: str, **options: Any) -> Any:
    small = {k: v for k, v in BASE.items() if k not in ("initializer_range", "tie_word_embeddings")}
    return getattr(transformers, f"{name}Config")(**small | options)


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
        hybrid = transformers.Qwen3NextForCausalLM(
            tiny("Qwen3Next", num_experts=2, num_experts_per_tok=1, layer_types=["linear_attention"] * 2 +
                 ["full_attention"], linear_num_key_heads=2, linear_num_value_heads=2)
        )  # fmt: skip
        latent = transformers.DeepseekV3ForCausalLM(tiny("DeepseekV3", n_routed_experts=4, n_group=1, topk_group=1))
    refused(t5, "encoder-decoder")
    refused(hybrid, "layer 0 of Qwen3NextForCausalLM is of type 'linear_attention'")
    refused(latent, "latent attention")
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


def test_cross_attention_has_no_place() -> None:
    """A decoder that could attend to an encoder's states, too: it works without them, and says why not with them."""
    config = tiny("Bert", num_key_value_heads=4, is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel(config).eval()
    cache = Fp16Cache.for_model(model, 64)
    ids = prompts(1, 3, torch.device("cpu"))["input_ids"]
    assert logits_of(model, cache, input_ids=ids).isfinite().all()
    cache.reset()
    states = torch.randn(1, 2, config.hidden_size)
    with pytest.raises(AttributeError, match=r"Fp16Cache: there is no place in it for .* cross-attention"):
        logits_of(model, cache, input_ids=ids, encoder_hidden_states=states)


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
