"""Fp16Cache: models whose layers keep recurrent or convolutional states, instead of keys and values or beside them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from llms import (
    ATTENTIONS,
    HYBRIDS,
    RoundingCache,
    check_beams,
    check_tokens,
    expected,
    generate,
    logits_of,
    make_model,
    ones_after,
    prompts,
)
from torch import Tensor

from kvcache_ext.integrations.transformers import NAME, Fp16Cache
from kvcache_ext.integrations.transformers.states import chosen

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = list(HYBRIDS)


def cache_of(model: Any, batch_size: int = 1, attention: str | None = NAME, **options: Any) -> Fp16Cache:
    return Fp16Cache.for_model(model, 64, batch_size, attention=attention if attention == NAME else None, **options)


def states_of(cache: Fp16Cache) -> dict[tuple[int, str], Tensor]:
    """The states of the sequences in use, cloned: by layer and name."""
    return {
        (i, name): state.clone()
        for i, layer in enumerate(cache.state_layers)
        for name, state in layer.saved_states().items()
    }


def check_states(got: Fp16Cache, want: dict[tuple[int, str], Tensor]) -> None:
    found = states_of(got)
    assert found.keys() == want.keys()
    for name, state in want.items():
        assert torch.equal(found[name], state), name


def addresses(cache: Fp16Cache) -> list[int]:
    return [memory.data_ptr() for layer in cache.state_layers for memory in layer.memory.values()]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(models: Any, device: torch.device, family: str, attention: str, counted: dict[str, int]) -> None:
    """One prompt; then another number of sequences, padded, after reset()."""
    model = models(family)
    cache = cache_of(model, 3, attention)
    for inputs in (prompts(1, 5, device), prompts(3, 14, device, padded=True), prompts(2, 9, device)):
        got = generate(model, inputs, cache)
        check_tokens(model, inputs, got, expected(model, inputs), counted)
        cache.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(models: Any, device: torch.device, family: str, counted: dict[str, int]) -> None:
    model = models(family)
    inputs = prompts(2, 9, device)
    options = {"num_beams": 3, "num_return_sequences": 3}
    got = generate(model, inputs, cache_of(model, 6), **options)
    check_beams(model, inputs, got, expected(model, inputs, **options), counted, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_models_own_cache(models: Any, device: torch.device, family: str) -> None:
    """Unrounded: equal bit for bit, after the prompt and after a step, where the keys and values are equal, too."""
    model = models(family)
    cache, reference = cache_of(model, 2, attention=None), RoundingCache(config=model.config)
    inputs = prompts(2, 9, device)
    first = [logits_of(model, each, **inputs).argmax(-1)[:, -1:] for each in (cache, reference)]
    assert torch.equal(*first)
    for each in (cache, reference):
        logits_of(model, each, input_ids=first[0], attention_mask=ones_after(inputs, 1))
    own = [layer for layer in reference.layers if hasattr(layer, "conv_states")]
    assert len(own) == len(cache.state_layers) > 0
    for layer, theirs in zip(cache.state_layers, own, strict=True):
        for name, state in layer.saved_states().items():
            part, _, number = name.partition(".")
            assert torch.equal(state, getattr(theirs, f"{part}_states")[int(number)])


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_are_chosen_and_repeated(models: Any, device: torch.device, family: str) -> None:
    model = models(family)
    inputs = prompts(3, 9, device)
    cache = cache_of(model, 6)
    logits_of(model, cache, **inputs)
    before, at = states_of(cache), addresses(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0], device=device))
    check_states(cache, {name: state[[2, 0, 0]] for name, state in before.items()})
    cache.batch_select_indices(torch.tensor([True, False, True]))
    check_states(cache, {name: state[[2, 0]] for name, state in before.items()})
    cache.batch_repeat_interleave(3)
    check_states(cache, {name: state[[2, 2, 2, 0, 0, 0]] for name, state in before.items()})
    assert addresses(cache) == at  # which captured CUDA graphs know
    token = torch.full((6, 1), 5, device=device)
    got = logits_of(model, cache, input_ids=token)
    alone = cache_of(model, 3)
    logits_of(model, alone, **inputs)
    want = logits_of(model, alone, input_ids=token[:3])
    assert torch.allclose(got, want[[2, 2, 2, 0, 0, 0]], atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(models: Any, device: torch.device, family: str, way: str) -> None:
    model = models(family)
    cache = cache_of(model, 3)
    inputs = prompts(2, 9, device)
    logits_of(model, cache, **inputs)
    if way == "deepcopy":
        copied_model, copied = model, copy.deepcopy(cache)
    else:  # together with its model: alone it comes back with a configuration of its own
        copied_model, copied = pickle.loads(pickle.dumps((model, cache)))
    before = states_of(cache)
    check_states(copied, before)
    token = torch.full((2, 1), 5, device=device)
    step = {"input_ids": token, "attention_mask": ones_after(inputs, 1)}
    want = logits_of(copied_model, copied, **step)
    check_states(cache, before)
    assert torch.equal(logits_of(model, cache, **step), want)
    assert not set(addresses(cache)) & set(addresses(copied))
    copied.reset()
    copied.reorder_cache(torch.tensor([0]))
    for layer in copied.state_layers:
        for (part, number), memory in layer.memory.items():
            assert getattr(layer, f"{part}_states")[number].data_ptr() == memory.data_ptr()
    with pytest.raises(NotImplementedError, match="cannot be copied without its cache"):
        copy.deepcopy(cache.state_layers[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_files(models: Any, device: torch.device, family: str, tmp_path: Path) -> None:
    model = models(family)
    inputs = prompts(2, 9, device, padded=True)
    cache = cache_of(model, 3)
    logits_of(model, cache, **inputs)
    cache.save(tmp_path / "text")
    loaded = Fp16Cache.load(tmp_path / "text", model, max_positions=80, batch_size=2)
    check_states(loaded, states_of(cache))
    step = {"input_ids": torch.full((2, 1), 5, device=device), "attention_mask": ones_after(inputs, 1)}
    assert torch.allclose(logits_of(model, loaded, **step), logits_of(model, cache, **step), atol=1e-5)
    with pytest.raises(ValueError, match=r"its dtype is torch.float32 in the file and torch.bfloat16 in this one"):
        Fp16Cache.load(tmp_path / "text", make_model(family, device, torch.bfloat16))
    empty = cache_of(model, 2)
    empty.save(tmp_path / "empty")
    assert torch.equal(
        logits_of(model, Fp16Cache.load(tmp_path / "empty", model), **inputs), logits_of(model, empty, **inputs)
    )
    others = [other for other in FAMILIES if other != family]
    with pytest.raises(ValueError, match="is of another model"):
        Fp16Cache.load(tmp_path / "text", models(others[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_cannot_be_taken_back(models: Any, device: torch.device, family: str) -> None:
    model = models(family)
    cache = cache_of(model)
    inputs = prompts(1, 9, device)
    want = logits_of(model, cache, **inputs)
    before = states_of(cache)
    with pytest.raises(NotImplementedError, match="tokens cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="tokens cannot be taken back"):
        cache.activate_past_recording()
    assert not cache.is_croppable and cache.get_seq_length() == 9
    check_states(cache, before)
    cache.crop(-9)  # all of them: as reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_of(model, cache, **inputs), want)
    with pytest.raises(ValueError, match=r"crop\(-10\) of 9 tokens"):
        cache.crop(-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.long])])
def test_replayed_steps(models: Any, device: torch.device, family: str, compile: bool, counted: dict[str, int]) -> None:
    """In CUDA graphs where there is a GPU: capturing takes its steps back, and other texts come between replays."""
    if compile and device.type != "cuda":
        pytest.skip("there is no GPU")
    model = models(family)
    cache = cache_of(model, 3)
    with cache.cuda_graphs(model, compile=compile):
        for inputs in (prompts(1, 5, device), prompts(3, 14, device, padded=True), prompts(1, 9, device)):
            got = generate(model, inputs, cache)
            check_tokens(model, inputs, got, expected_outside(model, inputs), counted)
            cache.reset()


def expected_outside(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`expected`, with the model's own forward, which replayed steps have taken the place of."""
    patched = model.__dict__.pop("forward")
    try:
        return expected(model, inputs)
    finally:
        model.forward = patched


def test_a_pass_that_is_broken_off(models: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first layer, which has a state: nothing else was stored, and the state cannot be put back."""
    model = models("qwen3_next")
    cache = cache_of(model)
    inputs = prompts(1, 5, device)
    logits_of(model, cache, **inputs)
    with monkeypatch.context() as patch:

        def fail(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(model.model.layers[1].self_attn, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, cache, input_ids=torch.full((1, 1), 5, device=device))
    with pytest.raises(RuntimeError, match="broken off after it had stored its tokens"):
        logits_of(model, cache, input_ids=torch.full((1, 1), 5, device=device))
    cache.reset()
    assert torch.equal(logits_of(model, cache, **inputs), logits_of(model, cache_of(model), **inputs))


def test_wrong_calls(models: Any, device: torch.device) -> None:
    model = models("qwen3_next")
    cache = cache_of(model, 2)
    logits_of(model, cache, **prompts(1, 5, device))
    layer = cache.state_layers[0]
    state = layer.saved_states()["conv.0"]
    with pytest.raises(ValueError, match="it holds 1 sequences, and states of 2 came"):
        cache.update_conv_state(state.expand(2, -1, -1), 0)
    with pytest.raises(ValueError, match="3 sequences need batch_size=3 or more"):
        cache_of(model, 2).update_conv_state(state.expand(3, -1, -1), 0)
    for call in (layer.reset, layer.batch_repeat_interleave, layer.crop):
        with pytest.raises(NotImplementedError, match="call this on the cache"):
            call(1)
    with pytest.raises(NotImplementedError, match="which compileable=True does not serve"):
        cache_of(model, compileable=True)


def test_a_stage_of_a_pipeline_without_attention(device: torch.device) -> None:
    model = make_model("qwen3_next", device)
    del model.model.layers[1]  # the one with attention
    with pytest.raises(
        NotImplementedError, match="of the layers of Qwen3NextForCausalLM that are here none has attention"
    ):
        cache_of(model)


def test_training_through_a_state_is_an_error(models: Any, device: torch.device) -> None:
    model = models("lfm2")
    cache = cache_of(model)
    logits = model(**prompts(1, 5, device), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="attention over it has no gradient"):
        logits.sum().backward()
    model.zero_grad()
    assert not any(memory.requires_grad for layer in cache.state_layers for memory in layer.memory.values())


def test_other_dtypes(device: torch.device) -> None:
    """States are of the dtypes that the model hands over."""
    model = make_model("qwen3_next", device, torch.bfloat16)
    cache = cache_of(model, 2)
    logits_of(model, cache, **prompts(2, 9, device))
    dtypes = {name: state.dtype for (_, name), state in states_of(cache).items()}
    assert dtypes["conv.0"] == torch.bfloat16
    reference = RoundingCache(config=model.config)
    logits_of(model, reference, **prompts(2, 9, device))
    assert dtypes["recurrent.0"] == reference.layers[0].recurrent_states[0].dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_that_would_go_into_states(models: Any, device: torch.device, family: str) -> None:
    model = models(family)
    cache = cache_of(model, 2)
    inputs = prompts(2, 9, device)
    right = inputs["attention_mask"].clone()
    right[0, 7:] = 0
    with pytest.raises(ValueError, match="take in padding as if it were text"):
        logits_of(model, cache, input_ids=inputs["input_ids"], attention_mask=right)
    assert cache.get_seq_length() == 0 and not cache.state_layers[0].memory
    logits_of(model, cache, **inputs)
    before = states_of(cache)
    second = torch.cat([inputs["attention_mask"], right.flip(1)], 1)
    with pytest.raises(ValueError, match="take in padding as if it were text"):
        logits_of(model, cache, input_ids=inputs["input_ids"], attention_mask=second)
    check_states(cache, before)
    one = ones_after(inputs, 1)
    one[0, -1] = 0
    with pytest.raises(ValueError, match="take in padding as if it were text"):
        for _ in range(2):  # on a GPU one step later
            logits_of(model, cache, input_ids=torch.full((2, 1), 5, device=device), attention_mask=one)
            one = torch.nn.functional.pad(one, (0, 1), value=1)
    cache.reset()
    logits_of(model, cache, **inputs)
    logits_of(model, cache, input_ids=inputs["input_ids"], attention_mask=torch.ones_like(second))


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode(models: Any, device: torch.device, family: str) -> None:
    """What a text left in it can be reset, and gone on with, outside of it."""
    model = models(family)
    cache = cache_of(model)
    inputs = prompts(1, 9, device)
    with torch.inference_mode():
        model(**inputs, past_key_values=cache)
    token = torch.full((1, 1), 5, device=device)
    got = logits_of(model, cache, input_ids=token)
    other = cache_of(model)
    logits_of(model, other, **inputs)
    assert torch.equal(got, logits_of(model, other, input_ids=token))
    cache.reset()
    logits_of(model, cache, **inputs)
    assert torch.equal(logits_of(model, cache, input_ids=token), got)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_dtype_changes(device: torch.device, family: str, tmp_path: Path) -> None:
    model = make_model(family, device, torch.bfloat16)
    cache = cache_of(model)
    inputs = prompts(1, 9, device)
    logits_of(model, cache, **inputs)
    model.float()
    with pytest.raises((ValueError, RuntimeError)):  # torch's, where the model itself puts the two together first
        logits_of(model, cache, input_ids=torch.full((1, 1), 5, device=device))
        logits_of(model, cache, input_ids=torch.full((1, 3), 5, device=device))
    cache.reset()
    fresh = cache_of(model)
    assert torch.equal(logits_of(model, cache, **inputs), logits_of(model, fresh, **inputs))
    check_states(cache, states_of(fresh))
    cache.save(tmp_path / "text")
    check_states(Fp16Cache.load(tmp_path / "text", model), states_of(fresh))


def test_numbers_out_of_range_leave_their_sequence_as_it_is() -> None:
    """What a GPU's indices come to, which nobody looks at."""
    memory = torch.arange(4.0)[:, None]
    assert chosen(memory, torch.tensor([1, 7, -1]), 3).flatten().tolist() == [1, 1, 2]
    assert chosen(memory, torch.tensor([1, 1, 0, 0]), 2).flatten().tolist() == [1, 1, 0, 0]
