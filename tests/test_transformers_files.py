"""Fp16Cache in a file: the text goes on where it was, and what does not belong together is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, ROOT
from llms import ATTENTIONS, FAMILIES, WINDOW, generate, logits_of, make_model, ones_after, prompts, tiny, transformers

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.files import open_layers, save_layers
from kvcache_ext.integrations.transformers import NAME, Fp16Cache

pytestmark = pytest.mark.usefixtures("one_thread")


def next_turn(inputs: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, torch.Tensor]:
    more = prompts(len(text), 5, text.device)["input_ids"]
    longer = torch.cat([text, more], 1)
    return {"input_ids": longer, "attention_mask": ones_after(inputs, longer.shape[1] - inputs["input_ids"].shape[1])}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [3, 150])
def test_the_text_goes_on(
    models: Any, device: torch.device, tmp_path: Path, family: str, attention: str, tokens: int
) -> None:
    """Padded, beyond a window's ring, into a cache with more room, for another copy of the model."""
    model = models(family)
    model.set_attn_implementation(attention)
    ours = attention if attention == NAME else None
    cache = Fp16Cache.for_model(model, 200, 3, attention=ours, overflow="inf")
    inputs = prompts(2, 12, device, padded=True)
    text = generate(model, inputs, cache, max_new_tokens=tokens)
    cache.save(tmp_path / "text")
    other = make_model(family, device)
    loaded = Fp16Cache.load(tmp_path / "text", other, max_positions=333, batch_size=5, attention=ours)
    assert loaded.batch_size == 5 and loaded.get_seq_length() == cache.get_seq_length() == 11 + tokens
    assert loaded.caches[0].overflow == "inf" and loaded.shared.max_positions == 333
    for layer, old in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, old.keys) and torch.equal(layer.values, old.values)
        assert layer.window == old.window and layer.columns == old.columns
    turn = next_turn(inputs, text)
    want = generate(model, turn, cache, max_new_tokens=12)
    assert torch.equal(generate(other, turn, loaded, max_new_tokens=12), want)
    loaded.crop(-3)
    cache.crop(-3)
    assert torch.equal(loaded.caches[0].cache_seqlens[:, :2], cache.caches[0].cache_seqlens[:, :2])
    with pytest.raises(ValueError, match="Fp16Cache: "):  # positions come along: a text fed twice is still one
        generate(other, inputs, loaded)
    loaded.reset()
    assert torch.equal(generate(other, inputs, loaded, max_new_tokens=tokens), text)


def test_what_the_file_holds(models: Any, device: torch.device, tmp_path: Path) -> None:
    """The model's layers in its order, whatever caches hold them, for any reader of the format."""
    model = models("gemma2")
    cache = Fp16Cache.for_model(model, 64, 3)
    logits_of(model, cache, **prompts(2, 9, device, padded=True))
    cache.save(tmp_path / "text")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "text", "pt") as file:
        described = json.loads(file.metadata()["cache"])
        assert described["columns"] == 9 and described["sequences"] == 2 and described["model_type"] == "gemma2"
        assert [layer["window"] for layer in described["layers"]] == [WINDOW, None, WINDOW]
        assert file.get_tensor("lengths").tolist() == [[6, 9]] * 3
        rows = cache.caches[1].get_range_raw(0, 0, 9)[0]
        assert torch.equal(file.get_tensor("keys.1"), torch.cat([rows[0, :6], rows[1]]).cpu())
        assert file.get_tensor("padding.full").tolist() == [[False] * 3 + [True] * 6, [True] * 9]
        assert file.get_tensor("positions").tolist() == [5, 8]


@pytest.mark.parametrize("use", ["nothing", "graph", "prompt"])
def test_a_loaded_cache_is_a_cache(models: Any, device: torch.device, tmp_path: Path, use: str) -> None:
    model = models("llama")
    empty = Fp16Cache.for_model(model, 40, 2)
    empty.save(tmp_path / "empty")
    cache = Fp16Cache.load(tmp_path / "empty", model)
    assert cache.get_seq_length() == 0 and not cache.is_initialized and cache.batch_size == 2
    inputs = prompts(2, 6, device)
    want = generate(model, inputs, empty, max_new_tokens=8)
    if use == "graph":
        with cache.cuda_graphs(model):
            assert torch.equal(generate(model, inputs, cache, max_new_tokens=8), want)
    elif use == "prompt":
        logits_of(model, cache, input_ids=inputs["input_ids"][:, :4])
        cache.save(tmp_path / "prompt")
        cache = Fp16Cache.load(tmp_path / "prompt", model, max_positions=13)
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=8), want)
    else:
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=8), want)


@pytest.mark.long
def test_another_process_goes_on(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model = make_model("gemma2")
    cache = Fp16Cache.for_model(model, 64, 2)
    inputs = prompts(2, 12, cpu, padded=True)
    turn = next_turn(inputs, generate(model, inputs, cache, max_new_tokens=5))
    cache.save(tmp_path / "text")
    torch.save(turn, tmp_path / "turn")
    program = (
        "import sys, torch; from llms import generate, make_model\n"
        "from kvcache_ext.integrations.transformers import Fp16Cache\n"
        "torch.set_num_threads(1); model = make_model('gemma2')\n"
        "cache = Fp16Cache.load(sys.argv[1] + '/text', model)\n"
        "text = generate(model, torch.load(sys.argv[1] + '/turn'), cache, max_new_tokens=6)\n"
        "print(text.tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == generate(model, turn, cache, max_new_tokens=6).tolist()


def test_caches_of_other_models(tmp_path: Path) -> None:
    def made(name: str = "Llama", **options: Any) -> Any:
        return getattr(transformers, f"{name}ForCausalLM")(tiny(name, **options))

    model = made("Mistral", sliding_window=8)
    cache = Fp16Cache.for_model(model, 200)
    logits_of(model, cache, input_ids=torch.ones(1, 5, dtype=torch.int64))
    path = tmp_path / "text"
    cache.save(path)
    others = {
        "its model_type is 'mistral' in the file and 'llama' in this one": made(),
        "the number of its layers is 3 in the file and 2 in this one": made(
            "Mistral", sliding_window=8, num_hidden_layers=2
        ),
        "the window of layer 0 is 8 in the file and 9 in this one": made("Mistral", sliding_window=9),
        "the window of layer 0 is 8 in the file and None in this one": made("Mistral", sliding_window=None),
        "the key/value heads of layer 0 are 2 in the file and 4 in this one": made(
            "Mistral", sliding_window=8, num_key_value_heads=4
        ),
        "the head_dim of layer 0 is 16 in the file and 24 in this one": made("Mistral", sliding_window=8, head_dim=24),
    }
    for sentence, other in others.items():
        before = other.config._attn_implementation
        with pytest.raises(ValueError, match=rf"Fp16Cache\.load: .* is of another model: {sentence}$"):
            Fp16Cache.load(path, other)
        assert other.config._attn_implementation == before
    assert Fp16Cache.load(path, model, max_positions=5).get_seq_length() == 5
    with pytest.raises(ValueError, match="holds 5 tokens, which do not fit into max_positions=4"):
        Fp16Cache.load(path, model, max_positions=4)
    cache.batch_repeat_interleave(1)
    both = Fp16Cache.for_model(model, 20, 2)
    logits_of(model, both, input_ids=torch.ones(2, 5, dtype=torch.int64))
    both.save(path)
    with pytest.raises(ValueError, match=r"batch_size must be at least 2, the number of sequences in .*, got 1"):
        Fp16Cache.load(path, model, batch_size=1)


def test_files_that_are_none_of_a_whole_cache(models: Any, device: torch.device, tmp_path: Path) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, **prompts(1, 5, device))
    group, whole = tmp_path / "group", tmp_path / "whole"
    cache.caches[0].save(group)
    cache.save(whole)
    with pytest.raises(ValueError, match=r"StreamingKVCacheFp16\.load reads"):
        Fp16Cache.load(group, model)
    with pytest.raises(ValueError, match=r"Fp16Cache\.load reads"):
        StreamingKVCacheFp16.load(whole, device=device)
    with open_layers(whole) as file:
        metadata, tensors = file.metadata, file.tensors
    described = json.loads(metadata["cache"])
    layers = [(layer.cache, layer.index) for layer in cache.layers]

    def rewritten(changed: str) -> None:
        save_layers(whole, layers, sequences=1, metadata={"cache": changed}, tensors=tensors)

    described["layers"][1]["kind"] = "linear"
    rewritten(json.dumps(described))
    with pytest.raises(ValueError, match="has layers of kind 'linear', which this kvcache_ext does not know"):
        Fp16Cache.load(whole, model)
    for changed in ("", "[]", "{}", json.dumps({**described, "columns": "many"})):
        rewritten(changed)
        with pytest.raises(ValueError, match="damaged: it does not describe a whole cache"):
            Fp16Cache.load(whole, model)
    with pytest.raises(FileNotFoundError):
        Fp16Cache.load(tmp_path / "nothing", model)


def test_damage_is_found_and_leaves_the_model_as_it_was(models: Any, device: torch.device, tmp_path: Path) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, **prompts(1, 5, device))
    path = tmp_path / "text"
    cache.save(path)
    whole = path.read_bytes()
    model.set_attn_implementation("eager")
    for at in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"Fp16Cache\.load: "):
            Fp16Cache.load(path, model)
    for size in range(0, len(whole), 211):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"Fp16Cache\.load: "):
            Fp16Cache.load(path, model)
    assert model.config._attn_implementation == "eager"


def test_a_pass_that_was_broken_off_is_not_saved(models: Any, device: torch.device, tmp_path: Path) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, **prompts(1, 5, device))
    cache.save(tmp_path / "text")
    before = (tmp_path / "text").read_bytes()
    cache.layers[0].columns += 1
    with pytest.raises(RuntimeError, match="broken off"):
        cache.save(tmp_path / "text")
    assert (tmp_path / "text").read_bytes() == before
    cache.layers[0].columns -= 1
    rows = torch.randn(1, 2, 2, 16, device=device)  # a past made by hand, of which one layer has its part
    cache.update(rows, rows, 0)
    with pytest.raises(RuntimeError, match="broken off"):
        cache.save(tmp_path / "text")


@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")
def test_from_a_gpu_to_a_cpu_and_back(tmp_path: Path) -> None:
    inputs = prompts(2, 9, torch.device("cpu"), padded=True)
    texts = []
    for source, target in (("cuda", "cpu"), ("cpu", "cuda")):
        model = make_model("gemma2", source)
        cache = Fp16Cache.for_model(model, 64, 2)
        here = {name: value.to(source) for name, value in inputs.items()}
        generate(model, here, cache, max_new_tokens=5)
        cache.save(tmp_path / "text")
        other = make_model("gemma2", target)
        loaded = Fp16Cache.load(tmp_path / "text", other)
        assert loaded.caches[0].device.type == target
        for new, old in zip(loaded.layers, cache.layers, strict=True):
            assert torch.equal(new.keys.cpu(), old.keys.cpu())
        text = generate(other, {n: v.to(target) for n, v in inputs.items()}, Fp16Cache.for_model(other, 64, 2))
        turn = {n: v.to(target) for n, v in next_turn(inputs, text.cpu()[:, :14]).items()}
        texts.append(generate(other, turn, loaded, max_new_tokens=8).cpu())
    assert texts[0].shape == texts[1].shape
