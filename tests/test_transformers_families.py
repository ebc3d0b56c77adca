"""Fp16Cache: a fixed part of what `make coverage` runs, and layers that few families have."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from llms import RoundingCache, check_tokens, expected, generate, logits_of, ones_after, prompts

from kvcache_ext.integrations.transformers import NAME, Fp16Cache
from kvcache_ext.integrations.transformers.layers import Fp16Layer

sys.path.insert(0, str(ROOT / "tools"))
import families

pytestmark = pytest.mark.usefixtures("one_thread")

# What each way of attention comes to: "works", or the beginning of the reason why it is refused.
LATENT = "needs keys and values of one width"
FAMILIES: dict[str, tuple[str, str]] = {
    "bamba": ("works", "works"),
    "bart": ("works", "works"),
    "cohere2": ("works", "works"),
    "deepseek_v3": (LATENT, "works"),
    "deepseek_v32": ("chooses some by an index", "works"),
    "deepseek_v4": ("_attention', which it cannot hold", "_attention', which it cannot hold"),
    "doge": ("uses keys and values elsewhere", "works"),
    "falcon": ("does not take attention from transformers' registry", "works"),
    "gemma3n_text": ("works", "works"),
    "gemma4_text": ("works", "works"),
    "gpt_bigcode": ("works", "works"),
    "gpt2": ("works", "works"),
    "granitemoehybrid": ("works", "works"),
    "inkling_text": ("a position bias", "works"),
    "kimi_linear": (LATENT, "works"),
    "llama4_text": ("works", "works"),
    "mamba": ("has no attention", "has no attention"),
    "mimo_v2_flash": (LATENT, "works"),
    "mistral": ("works", "works"),
    "nemotron_h": ("works", "works"),
    "qwen3_5_text": ("works", "works"),
    "zamba2": ("does not take attention from transformers' registry", "works"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    found = families.examine(family).ways
    if "built" in found:
        pytest.skip(f"a tiny {family} cannot be built with transformers {transformers.__version__}: {found['built']}")
    if "_sparse_attention'" in found["None"]:
        pytest.skip(f"transformers {transformers.__version__} has no indexed_attention yet")
    for (way, words), want in zip(found.items(), FAMILIES[family], strict=True):
        assert (words == "works") == (want == "works") and want in words, (way, words)


def test_it_notices_wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, new_tokens: int) -> None:
        self.columns += new_tokens
        self.cache.tensors.k_cache[self.index].neg_()

    monkeypatch.setattr(Fp16Layer, "advance", wrong)
    assert all(words.startswith("WRONG: one prompt") for words in families.examine("llama").ways.values())


def model_of(family: str, device: torch.device, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, family, families.FAMILIES.get(family, {}) | options)
        try:
            model = families.build(family).to(device)
        except (KeyError, ValueError) as error:
            pytest.skip(f"no such tiny model with this transformers: {error}")
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("attention", [NAME, None])
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values(
    device: torch.device, family: str, attention: str | None, counted: dict[str, int]
) -> None:
    """Prompts far longer than the window and the ring of an unshared sliding layer; then a second turn."""
    model = model_of(family, device)
    cache = Fp16Cache.for_model(model, 400, 3, attention=attention)
    for inputs in (prompts(1, 300, device), prompts(3, 200, device, padded=True)):
        got = generate(model, inputs, cache, max_new_tokens=6)
        check_tokens(model, inputs, got, expected(model, inputs, max_new_tokens=6), counted, least=3)
        more = torch.cat([got, prompts(len(got), 20, device)["input_ids"]], 1)
        second = {"input_ids": more, "attention_mask": ones_after(inputs, 26)}
        got = generate(model, second, cache, max_new_tokens=6)
        check_tokens(model, second, got, expected(model, second, max_new_tokens=6), counted, least=3)
        cache.reset()


def test_shared_layers_under_a_4d_mask(device: torch.device) -> None:
    model = model_of("gemma3n_text", device)
    cache, reference = Fp16Cache.for_model(model, 64, 2), RoundingCache(config=model.config)
    ids = prompts(2, 12, device)["input_ids"]
    mask = torch.ones(12, 12, dtype=torch.bool, device=device).tril()[None, None].expand(2, 1, 12, 12)
    masks = {"full_attention": mask, "sliding_attention": mask.triu(-7)}
    got = logits_of(model, cache, input_ids=ids, attention_mask=masks)
    model.set_attn_implementation("eager")
    want = logits_of(model, reference, input_ids=ids)
    assert torch.allclose(got, want, atol=1e-3 * float(want.std()))


def test_more_new_tokens_than_a_shared_ring_takes(device: torch.device) -> None:
    """Where all layers slide, nothing else ends at max_positions."""
    model = model_of("gemma3n_text", device)
    cache = Fp16Cache.for_model(model, 64)
    (shared,) = [layer for layer in cache.attention_layers if layer.most_new is not None]
    assert shared.cache.max_positions == 64 + shared.window and shared.most_new == 65
    with pytest.raises(ValueError, match="66 new tokens at a time are more than the 65 that a sliding window layer"):
        shared.shared.bounded = False
        shared.check_room(1, 66)


@pytest.mark.parametrize("key_dim", [24, 25])  # and values of 8: an even and an odd sum
def test_keys_and_values_of_other_widths(
    device: torch.device, key_dim: int, counted: dict[str, int], tmp_path: Path
) -> None:
    """Stored as two halves of both: tokens, beams' order, copies and files."""
    model = model_of("minicpm3", device, kv_lora_rank=key_dim)
    cache = Fp16Cache.for_model(model, 64, 3, attention=None)
    inputs = prompts(3, 14, device, padded=True)
    check_tokens(model, inputs, generate(model, inputs, cache), expected(model, inputs), counted, least=3)
    layer = cache.attention_layers[0]
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    assert (keys.shape[-1], values.shape[-1]) == layer.widths and keys.shape[-1] != values.shape[-1]
    cache.save(tmp_path / "text")
    loaded = Fp16Cache.load(tmp_path / "text", model, attention=None)
    for other in (loaded, copy.deepcopy(cache)):
        assert torch.equal(other.attention_layers[0].keys, keys) and torch.equal(
            other.attention_layers[0].values, values
        )
    cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
    assert torch.equal(layer.values, values[[2, 0, 1]])  # (its padding too, which is zeros in both)
    with pytest.raises(NotImplementedError, match="needs keys and values of one width"):
        Fp16Cache.for_model(model, 64)


@pytest.mark.parametrize("attention", [NAME, None])
def test_chunked_attention(device: torch.device, attention: str | None, counted: dict[str, int]) -> None:
    """Chunks of 8 tokens: prompts and answers that go over several."""
    model = model_of("llama4_text", device, attention_chunk_size=8)
    cache = Fp16Cache.for_model(model, 400, 3, attention=attention)
    for inputs in (prompts(1, 21, device), prompts(3, 30, device, padded=True), prompts(1, 200, device)):
        got = generate(model, inputs, cache)
        check_tokens(model, inputs, got, expected(model, inputs), counted, least=3)
        cache.reset()


def test_an_index_of_keys(device: torch.device, counted: dict[str, int], tmp_path: Path) -> None:
    """Tokens, tokens taken back, sequences chosen, copies and files; a pass that was broken off after the index."""
    model = model_of("deepseek_v32", device, index_topk=4)
    if "indexed_attention" not in (model.config.layer_types or ()):
        pytest.skip("this transformers has no indexed_attention yet")
    cache = Fp16Cache.for_model(model, 64, 3, attention=None)
    inputs = prompts(3, 14, device, padded=True)
    check_tokens(model, inputs, generate(model, inputs, cache), expected(model, inputs), counted, least=3)
    cache.reset()
    inputs = prompts(3, 14, device)
    generate(model, inputs, cache)
    cache.crop(14 - cache.get_seq_length())
    step = {"input_ids": torch.full((3, 1), 5, device=device), "attention_mask": ones_after(inputs, 1)}
    fresh = Fp16Cache.for_model(model, 64, 3, attention=None)
    logits_of(model, fresh, **inputs)
    want = logits_of(model, copy.deepcopy(fresh), **step)
    fresh.save(tmp_path / "text")
    loaded = Fp16Cache.load(tmp_path / "text", model, attention=None, max_positions=80)
    for each in (cache, loaded, fresh):
        assert torch.allclose(logits_of(model, each, **step), want, atol=1e-4 * float(want.std()))
    order = torch.tensor([2, 0, 1], device=device)
    before = fresh.layers[0].index_keys[:3, :15].clone()
    fresh.reorder_cache(order)
    assert torch.equal(fresh.layers[0].index_keys[:3, :15], before[order])
    fresh.batch_select_indices(torch.tensor([0]))
    fresh.reset()
    inputs = prompts(2, 9, device)
    check_tokens(model, inputs, generate(model, inputs, fresh), expected(model, inputs), counted, least=3)
    step = {"input_ids": torch.full((2, 1), 5, device=device)}
    with pytest.MonkeyPatch.context() as patch:

        def fail(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(type(fresh.layers[1]), "update_indexer", fail)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, fresh, **step)
    with pytest.raises(RuntimeError, match="broken off"):
        logits_of(model, fresh, **step)


def test_the_last_tokens_alone_go_through_shared_layers(device: torch.device) -> None:
    """Gemma 4 with logits_to_keep, which `generate` passes: holes in the padding, and 4D masks."""
    model = model_of("gemma4_text", device)
    inputs = prompts(2, 14, device)
    inputs["attention_mask"][0, 3:6] = 0
    inputs["attention_mask"][1, 0] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    whole = Fp16Cache.for_model(model, 64, 2)
    want = logits_of(model, whole, **inputs)
    for keep in (1, 5):
        cache = Fp16Cache.for_model(model, 64, 2)
        got = logits_of(model, cache, **inputs, logits_to_keep=keep)
        assert torch.allclose(got, want[:, -keep:], atol=1e-4 * float(want.std()))
    full = torch.ones(14, 14, dtype=torch.bool, device=device).tril()[None, None].expand(2, 1, 14, 14)
    masks = {"full_attention": full, "sliding_attention": full.triu(-7)}
    ids = inputs["input_ids"]
    want = logits_of(model, Fp16Cache.for_model(model, 64, 2), input_ids=ids)
    got = logits_of(model, Fp16Cache.for_model(model, 64, 2), input_ids=ids, attention_mask=masks, logits_to_keep=2)
    # (Other kernels answer under a mask. What they differ by rounds a key to another FP16 number here and there.)
    assert torch.allclose(got, want[:, -2:], atol=5e-3 * float(want.std()))


def test_chunks_where_their_mask_cannot_be_made(device: torch.device) -> None:
    """A compiled or captured step would attend to a window instead of a chunk, or to the columns of the capture."""
    model = model_of("llama4_text", device, attention_chunk_size=8)
    inputs = prompts(1, 30, device)
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, **inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled code cannot serve chunked attention"):
        logits_of(compiled, cache, input_ids=inputs["input_ids"][:, :1], attention_mask=None)
    torch._dynamo.reset()
    cache.reset()
    logits_of(model, cache, **inputs)
    with pytest.raises(NotImplementedError, match="compiled code cannot serve chunked attention"):
        cache.decode_graph(model, compile=True)
    if device.type == "cuda":
        with pytest.raises(NotImplementedError, match="attends under a 4D mask"):
            cache.decode_graph(model)
    cache.reset()
    want = expected(model, inputs)
    with cache.cuda_graphs(model):
        assert torch.equal(generate(model, inputs, cache), want)


def test_states_on_a_models_own_modules(device: torch.device) -> None:
    model = model_of("recurrent_gemma", device)
    with pytest.raises(NotImplementedError, match="keeps its recurrent states on its own modules"):
        Fp16Cache.for_model(model, 64)


def test_a_file_of_other_widths(device: torch.device, tmp_path: Path) -> None:
    model = model_of("minicpm3", device, kv_lora_rank=24, qk_rope_head_dim=8)
    other = model_of("minicpm3", device, kv_lora_rank=16, qk_rope_head_dim=16)
    cache = Fp16Cache.for_model(model, 64, attention=None)
    logits_of(model, cache, **prompts(1, 5, device))
    cache.save(tmp_path / "text")
    assert cache.attention_layers[0].widths == (24, 8)
    with pytest.raises(ValueError, match=r"layer 0 are as wide as \[24, 8\] in the file and \[16, 16\] in this one"):
        Fp16Cache.load(tmp_path / "text", other, attention=None)


def test_models_without_positions_are_not_captured(device: torch.device) -> None:
    model = model_of("bart", device)
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, input_ids=prompts(1, 5, device)["input_ids"])
    with pytest.raises(NotImplementedError, match="takes no position_ids"):
        cache.decode_graph(model)
