"""Fp16Cache: layers on several devices, and devices that are not the current one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import HAS_GPU, needs_gpu
from llms import ATTENTIONS, check_beams, check_tokens, expected, generate, make_model, prompts
from torch import Tensor

from kvcache_ext.integrations.transformers import NAME, Fp16Cache

pytestmark = pytest.mark.usefixtures("one_thread")


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
