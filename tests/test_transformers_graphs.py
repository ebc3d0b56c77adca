"""Fp16Cache: decode steps as CUDA graphs. On a CPU they are the steps themselves."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from llms import BASE, VOCABULARY, generate, logits_of, ones_after, prompts, transformers
from torch import Tensor

from kvcache_ext.integrations import transformers as integration
from kvcache_ext.integrations.transformers import Fp16Cache
from kvcache_ext.integrations.transformers.version import cache_argument

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """The graph has the address of their numbers, which must not go away, whatever happens to the cache meanwhile."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 8)
    for batch in (2, 1, 2):  # each captures anew
        inputs = prompts(batch, 9, device, padded=True)
        cache.reset()
        want = generate(model, inputs, cache, num_beams=beams)
        sequences = weakref.ref(cache.shared.sequences_argument(torch.device(device))["sequences"])
        cache.reset()
        with cache.cuda_graphs(model):
            assert torch.equal(generate(model, inputs, cache, num_beams=beams), want)
            cache.reset()
            noise = [torch.full((n,), 7, dtype=torch.int64, device=device) for n in range(1, 9)]  # in what was freed
            assert torch.equal(generate(model, inputs, cache, num_beams=beams), want)
        assert sequences() is not None and len(noise) == 8


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


def test_copies_of_a_model_with_graphs_are_models_of_their_own(models: Any, device: torch.device) -> None:
    model = copy.deepcopy(models("llama"))
    inputs = prompts(2, 9, device)
    cache = Fp16Cache.for_model(model, 64, 2)
    with cache.cuda_graphs(model):
        other = copy.deepcopy(model)
        want = generate(model, inputs, cache)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.set_attn_implementation("eager")
    assert not generate(other, inputs, Fp16Cache.for_model(other, 64, 2))[:, 9:].any()
    own, model.forward = model.forward, lambda *args, **kwargs: own(*args, **kwargs)  # as wrappers of models do
    forward = model.forward
    cache.reset()
    with cache.cuda_graphs(model):
        assert copy.deepcopy(model).forward is forward
        assert torch.equal(generate(model, inputs, cache), want)
    assert model.forward is forward


def test_graphs_of_two_caches_on_one_model(models: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llama")
    inputs = prompts(2, 9, device)
    caches = [Fp16Cache.for_model(model, 64, 2) for _ in range(2)]
    want = generate(model, inputs, caches[0], max_new_tokens=8)
    caches[0].reset()
    steps = []
    call = integration.DecodeGraph.__call__
    monkeypatch.setattr(
        integration.DecodeGraph, "__call__", lambda self, *args: (steps.append(self._cache), call(self, *args))[1]
    )
    with caches[0].cuda_graphs(model), caches[1].cuda_graphs(model):
        for cache in caches:
            assert torch.equal(generate(model, inputs, cache, max_new_tokens=8), want)
    assert [sum(each is cache for each in steps) for cache in caches] == [7, 7]
    assert "forward" not in model.__dict__


def test_a_graph_of_a_function_that_calls_the_model(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 2)
    ids = prompts(2, 9, device)["input_ids"]
    logits_of(model, cache, input_ids=ids)
    want = logits_of(model, cache, input_ids=ids[:, :1], position_ids=torch.full((2, 1), 9, device=device))
    cache.crop(-1)
    step = cache.decode_graph(lambda **arguments: model(**arguments))
    torch.testing.assert_close(step(ids[:, :1]), want)
