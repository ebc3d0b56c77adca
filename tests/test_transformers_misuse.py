"""Fp16Cache: what would be a wrong text without a word is the right text, or an error before anything is stored."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from llms import (
    ATTENTIONS,
    BASE,
    RoundingCache,
    expected,
    generate,
    logits_of,
    make_model,
    prompts,
    tiny,
    transformers,
)
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16
from kvcache_ext.integrations.transformers import NAME, Fp16Cache
from kvcache_ext.integrations.transformers.positions import UNKNOWN

pytestmark = pytest.mark.usefixtures("one_thread")

AGAIN = r"comes again on top of what the cache holds.*reset\(\) the cache"


def cache_for(model: Any, attention: str, max_positions: int = 64, batch_size: int = 1, **options: Any) -> Fp16Cache:
    """With this package's attention or with eager attention over gathered keys and values."""
    if attention != NAME:
        model.set_attn_implementation(attention)
    ours = attention if attention == NAME else None
    return Fp16Cache.for_model(model, max_positions, batch_size, attention=ours, **options)


def stored(cache: Fp16Cache) -> list[Tensor]:
    tensors = [t for c in cache.caches for t in c.tensors[:4]]
    return [t.clone().view(torch.uint8) for t in tensors]


def unchanged(before: list[Tensor], cache: Fp16Cache) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, stored(cache), strict=True))


# A text that is fed twice


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_text_fed_twice(models: Any, device: torch.device, family: str, attention: str) -> None:
    """By prompt lookup and assistants in the next turn, which some releases of transformers feed the whole text."""
    model = models(family)
    cache = cache_for(model, attention)
    first = prompts(1, 3, device)
    answer = generate(model, first, cache, max_new_tokens=3)
    held, before = cache.get_seq_length(), stored(cache)
    longer = torch.cat([answer, prompts(1, 5, device)["input_ids"]], 1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    try:
        got = generate(model, inputs, cache, prompt_lookup_num_tokens=2, max_new_tokens=4)
    except ValueError as error:
        assert "Fp16Cache: " in str(error) and "reset() the cache" in str(error)
        assert cache.get_seq_length() == held and unchanged(before, cache)
        got = generate(model, inputs, cache, max_new_tokens=4)  # the plain next turn goes on
    assert torch.equal(got, expected(model, inputs, max_new_tokens=4))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_forgotten_reset(models: Any, device: torch.device, attention: str) -> None:
    """The same prompt again, of every length beside what is held; after reset() it is a text like any other."""
    model = models("llama")
    cache = cache_for(model, attention)
    for length in (1, 2, 3, 5, 9):
        for count in (1, 2, 4, 8, 20):
            cache.reset()
            inputs = prompts(1, length, device)
            want = generate(model, inputs, cache, max_new_tokens=count)
            with pytest.raises(ValueError, match=r"Fp16Cache: .*reset\(\)"):
                generate(model, inputs, cache, max_new_tokens=4)
                if device.type == "cuda":  # one token is looked at a step later
                    cache.crop(-1)
            cache.reset()
            assert torch.equal(generate(model, inputs, cache, max_new_tokens=count), want)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("where", ["call", "config"])
@pytest.mark.parametrize("padded", [False, True])
def test_use_cache_false(device: torch.device, attention: str, where: str, padded: bool) -> None:
    model = make_model("llama", device)
    cache = cache_for(model, attention, batch_size=2)
    options: dict[str, Any] = {}
    if where == "call":
        options["use_cache"] = False
    else:
        model.config.use_cache = model.generation_config.use_cache = False
    with pytest.raises(ValueError, match=r"Fp16Cache: .*use_cache=False"):
        generate(model, prompts(2, 4, device, padded=padded), cache, max_new_tokens=5, **options)
    assert cache.get_seq_length() == 4  # of the first pass, which was right


def test_use_cache_false_in_a_model_without_position_ids(device: torch.device) -> None:
    """Of which neither positions nor, where it is all ones, a mask can be seen."""
    config = transformers.MptConfig(vocab_size=97, d_model=32, n_heads=2, n_layers=2, max_seq_len=64)
    assert config.use_cache is False  # MPT's default
    model = transformers.MptForCausalLM(config).eval().to(device)
    inputs = prompts(1, 4, device)
    cache = Fp16Cache.for_model(model, 64, attention=None)
    with pytest.raises(ValueError, match=r"Fp16Cache: .*use_cache=False"):
        generate(model, inputs, cache, max_new_tokens=5)
    cache.reset()
    got = generate(model, inputs, cache, max_new_tokens=5, use_cache=True)
    assert torch.equal(got, generate(model, inputs, RoundingCache(config=config), max_new_tokens=5, use_cache=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_token_that_was_fed_before(models: Any, device: torch.device, attention: str) -> None:
    """An error at once on a CPU, at the end of a block or with the next tokens on a GPU."""
    model = models("llama")
    cache = cache_for(model, attention, batch_size=2)
    logits_of(model, cache, **prompts(2, 6, device))
    before = stored(cache)
    token = {"input_ids": torch.ones(2, 1, dtype=torch.int64, device=device)}
    places = torch.tensor([[6], [5]], device=device)
    with pytest.raises(ValueError, match=AGAIN):
        logits_of(model, cache, **token, position_ids=places)
        assert device.type == "cuda"
        cache.crop(-1)
    if device.type == "cpu":
        assert unchanged(before, cache)
    else:
        with pytest.raises(ValueError, match=AGAIN):  # until it is forgotten
            cache.crop(-1)
    cache.reset()
    logits_of(model, cache, **prompts(2, 6, device))
    logits_of(model, cache, **token, position_ids=torch.full_like(places, 6))
    cache.crop(-1)
    logits_of(model, cache, **token, position_ids=torch.full_like(places, 6))
    cache.crop(-1)


@pytest.mark.parametrize("use", ["decode_graph", "cuda_graphs"])
def test_one_token_that_was_fed_before_in_a_graph(models: Any, device: torch.device, use: str) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 2)
    logits_of(model, cache, **prompts(2, 6, device))
    token = torch.ones(2, 1, dtype=torch.int64, device=device)

    def steps(places: list[int]) -> None:
        if use == "decode_graph":
            step = cache.decode_graph(model)
            for place in places:
                step(token, torch.full_like(token, place))
            cache.crop(-1)
            return
        with cache.cuda_graphs(model):
            for place in places:
                logits_of(model, cache, input_ids=token, position_ids=torch.full_like(token, place))

    steps([6, 7, 8])
    with pytest.raises(ValueError, match=AGAIN):
        steps([9, 10, 10])


def test_one_token_that_was_fed_before_in_compiled_code(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 2)
    logits_of(model, cache, **prompts(2, 6, device))
    step = torch.compile(model, fullgraph=True)
    token = torch.ones(2, 1, dtype=torch.int64, device=device)

    def run(place: int) -> None:
        options = {"input_ids": token, "position_ids": torch.full_like(token, place), "attention_mask": None}
        logits_of(step, cache, **options)

    for place in (6, 7, 8):
        run(place)
    assert cache.shared.positions.last.tolist() == [8, 8]
    run(8)
    with pytest.raises(ValueError, match=AGAIN):
        cache.crop(-1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_positions_that_are_right(models: Any, device: torch.device, attention: str) -> None:
    """Padded prompts in chunks of every size, padded turns, positions from 5 on, copies, and what changes sequences."""
    model = models("llama")
    for chunk in (1, 2, 3, 7):
        cache = cache_for(model, attention, batch_size=3)
        inputs = prompts(3, 12, device, padded=True)
        got = generate(model, inputs, cache, prefill_chunk_size=chunk, max_new_tokens=5)
        assert torch.equal(got, expected(model, inputs, max_new_tokens=5))
    cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
    cache.batch_select_indices(torch.tensor([0, 2]))
    later = torch.ones(2, 20, dtype=torch.int64, device=device)
    later[0, 16:18] = 0
    mask = torch.cat([inputs["attention_mask"][[2, 1]], later[:, 12:]], 1)
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)[:, 16:]
    more = {"input_ids": prompts(2, 4, device)["input_ids"], "position_ids": places}
    kept = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    logits_of(model, cache, **more, attention_mask=mask)
    for again in (cache, *kept):  # fed once, and to the copies not yet
        if again is not cache:
            again.shared.config = model.config
            logits_of(model, again, **more, attention_mask=mask)
        with pytest.raises(ValueError, match=AGAIN):
            logits_of(model, again, **more, attention_mask=torch.cat([mask, mask[:, -4:]], 1))
            again.crop(-1)
    cache = cache_for(model, attention)
    ids = prompts(1, 6, device)["input_ids"]
    for begin in (0, 2, 4):
        places = torch.arange(begin + 5, begin + 7, device=device)[None]
        logits_of(model, cache, input_ids=ids[:, begin : begin + 2], position_ids=places)
    cache.crop(-3)
    logits_of(model, cache, input_ids=ids[:, 3:], position_ids=torch.arange(8, 11, device=device)[None])


def test_a_refused_pass_is_not_remembered(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 8)
    inputs = prompts(1, 6, device)
    logits_of(model, cache, **inputs)
    more = {"input_ids": prompts(1, 3, device)["input_ids"], "position_ids": torch.arange(6, 9, device=device)[None]}
    with pytest.raises(ValueError, match="do not fit into max_positions=8"):
        logits_of(model, cache, **more)
    logits_of(model, cache, **{name: value[:, :2] for name, value in more.items()})
    assert cache.get_seq_length() == 8


# Pasts made by hand, and storage behind the cache's back


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_past_made_by_hand(models: Any, device: torch.device, family: str, attention: str) -> None:
    """Prefix tuning, and rows from elsewhere: `update` outside the model stores as any cache's does."""
    model = models(family)
    cache, want = cache_for(model, attention, batch_size=2), RoundingCache(config=model.config)
    shape = cache.caches[0].num_heads, cache.caches[0].head_dim
    for layer in range(3):
        for count in (3, 7):
            key, value = (torch.randn(2, shape[0], count, shape[1], device=device) for _ in range(2))
            cache.update(key, value, layer)
            want.update(key, value, layer)
        assert cache.get_seq_length(layer) == 10
        assert torch.equal(cache.layers[layer].keys[:, :, -1], want.layers[layer].keys[:, :, -1].half())
        assert torch.equal(cache.layers[layer].values[:, :, -1], want.layers[layer].values[:, :, -1].half())
    inputs = prompts(2, 5, device)
    got = logits_of(model, cache, input_ids=inputs["input_ids"])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(got, logits_of(model, want, input_ids=inputs["input_ids"]), rtol=1e-3, atol=1e-3)


def test_rows_of_a_wrong_shape_are_refused_at_once(models: Any, device: torch.device) -> None:
    cache = Fp16Cache.for_model(models("llama"), 8)
    good, wrong = torch.zeros(1, 2, 3, 16, device=device), torch.zeros(1, 4, 3, 16, device=device)
    with pytest.raises(ValueError, match=r"values of a layer must be \[B, 2, T, 16\].*got \[1, 4, 3, 16\]"):
        cache.update(good, wrong, 0)
    with pytest.raises(ValueError, match="9 more do not fit"):
        cache.update(torch.zeros(1, 2, 9, 16, device=device), torch.zeros(1, 2, 9, 16, device=device), 0)
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(good, good, 0)
    with pytest.raises(RuntimeError, match="attention=None"):
        keys.mean()
    assert cache.get_seq_length() == 0  # after an error nothing is stored


def test_groups_are_changed_by_their_cache_alone(models: Any, device: torch.device, tmp_path: Any) -> None:
    """A saved group appended to another's storage was counted by nobody: 3 tokens below, 0 above, other tokens."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    logits_of(model, cache, **prompts(1, 3, device))
    group = cache.caches[0]
    group.save(tmp_path / "group")
    loaded = StreamingKVCacheFp16.load(tmp_path / "group", device=device)
    rows = loaded.get_valid_f32(0)
    before = stored(cache)
    calls: dict[str, tuple[Any, ...]] = {
        "append": (0, *rows),
        "append_all": (torch.zeros(3, 2, 16), torch.zeros(3, 2, 16)),
        "append_attend": (0, *rows, rows[0]),
        "truncate": (1,),
        "reset": (),
        "reorder": ([0],),
        "copy_sequence": (0, 0),
        "clear": (),
    }
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"^{name}: this is the storage of an Fp16Cache"):
            getattr(group, name)(*arguments)
    assert unchanged(before, cache)
    assert torch.equal(group.get_valid_f32(0)[0], rows[0])
    assert type(copy.deepcopy(group)) is type(group)


def test_layers_are_copied_with_their_cache(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    with pytest.raises(NotImplementedError, match="a layer cannot be copied without its cache"):
        copy.deepcopy(cache.layers[0])
    cache.layers.append(cache.layers[0])
    with pytest.raises(NotImplementedError, match="has changed its list of 3 layers to one of 4"):
        logits_of(model, cache, **prompts(1, 3, device))
    assert cache.caches[0].position == 0


# Models


def test_first_passes_are_told_from_the_others(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    assert not cache.is_initialized and cache.layers[0].keys is None
    logits_of(model, cache, **prompts(1, 3, device))
    assert cache.is_initialized
    keys = cache.layers[1].keys
    assert keys is not None and torch.equal(keys[0].transpose(0, 1).float(), cache.caches[0].get_valid_f32(1)[0])
    cache.reset()
    assert not cache.is_initialized


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="this transformers has no HrmText")
def test_a_prefix_that_sees_itself(device: torch.device) -> None:
    """Models that lay a pattern over the first pass ask the cache whether it is the first."""
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(**{**BASE, "head_dim": 16, "prefix_lm": True, "eos_token_id": 2})
    model = transformers.HrmTextForCausalLM(config).eval().to(device)
    inputs = {**prompts(1, 7, device), "token_type_ids": torch.tensor([[1, 1, 1, 1, 0, 0, 0]], device=device)}
    model.set_attn_implementation("eager")
    cache = Fp16Cache.for_model(model, 64, attention=None)
    got, want = (logits_of(model, c, **inputs) for c in (cache, RoundingCache(config=config)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_falcon_repeats_its_keys(device: torch.device) -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True,
    )  # fmt: skip
    model = transformers.FalconForCausalLM(config).eval().to(device)
    cache = Fp16Cache.for_model(model, 64, attention=None)
    assert cache.caches[0].num_heads == 4
    inputs = prompts(1, 6, device)
    assert torch.equal(generate(model, inputs, cache), generate(model, inputs, RoundingCache(config=config)))


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="this transformers has no Dory")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_looped_models(device: torch.device, attention: str) -> None:
    """They append copies of the cache's layers: here those are there from the beginning, and known to all calls."""
    torch.manual_seed(0)
    options = {k: v for k, v in BASE.items() if k not in ("initializer_range", "tie_word_embeddings")}
    options |= {"num_hidden_layers": 4, "head_dim": 16, "n_input_layers": 1, "n_output_layers": 1}
    config = transformers.DoryConfig(**options, n_recurrent_loops=3, sliding_window=8, initializer_range=0.2)
    model = transformers.DoryForCausalLM(config).eval().to(device)
    inputs = prompts(2, 5, device)
    want = [expected(model, inputs, max_new_tokens=12, **o) for o in ({"num_beams": 2}, {})]
    cache = cache_for(model, attention, batch_size=4)
    assert len(cache.layers) == 8
    for text, options in zip(want, ({"num_beams": 2}, {}), strict=True):
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=12, **options), text)
        cache.reset()
    config.recurrent_kv_cache_mode = "last_loop"
    with pytest.raises(NotImplementedError, match="last_loop"):
        Fp16Cache.for_model(model, 64)


def test_states_of_an_image_or_an_encoder(device: torch.device) -> None:
    config = transformers.BlipTextConfig(
        vocab_size=97, hidden_size=32, encoder_hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True,
    )  # fmt: skip
    blip = transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config).eval().to(device)
    whisper = transformers.WhisperForCausalLM(
        transformers.WhisperConfig(
            vocab_size=97, d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
            encoder_attention_heads=2, decoder_ffn_dim=32, encoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, is_encoder_decoder=False,
        )
    ).eval().to(device)  # fmt: skip
    states = torch.randn(1, 3, 32, device=device)
    for model, options in ((blip, {"encoder_hidden_states": states}), (whisper, {"encoder_outputs": (states,)})):
        cache = Fp16Cache.for_model(model, 64, attention=None)
        with pytest.raises(NotImplementedError, match=r"no place in it for .* cross-attention"):
            logits_of(model, cache, input_ids=prompts(1, 4, device)["input_ids"], **options)
        assert cache.get_seq_length() == cache.caches[0].position == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_layer_that_gets_more_than_the_texts_own_rows(models: Any, device: torch.device, attention: str) -> None:
    """Where no argument says so beforehand: the layer's second rows of one pass are refused."""
    model = make_model("llama", device)
    cache = cache_for(model, attention)
    extra = torch.zeros(1, 2, 4, 16, device=device)

    def twice(module: Any, arguments: Any, options: Any) -> None:
        cache.update(extra, extra, module.layer_idx)

    model.model.layers[1].self_attn.register_forward_pre_hook(twice, with_kwargs=True)
    with pytest.raises(RuntimeError, match="hands keys and values of 4 more to a layer that holds 0, and those of 3"):
        logits_of(model, cache, **prompts(1, 3, device))
    with pytest.raises(RuntimeError, match=r"broken off; reset\(\) it"):
        logits_of(model, cache, **prompts(1, 3, device))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_longrope(device: torch.device, attention: str) -> None:
    """At its switch transformers lets go of the cache that it was given. Here the text is fed to it anew."""
    torch.manual_seed(0)
    options = {k: v for k, v in BASE.items() if k not in ("initializer_range", "tie_word_embeddings")}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope["original_max_position_embeddings"] = 8
    config = transformers.Phi3Config(
        **options, initializer_range=0.2, original_max_position_embeddings=8, rope_parameters=rope
    )
    model = transformers.Phi3ForCausalLM(config).eval().to(device)
    for length in (6, 12):
        inputs = prompts(2, length, device, padded=True)
        # Without a cache, as older releases go on with the newest token alone where they drop one.
        want = generate(model, inputs, None, max_new_tokens=9, use_cache=False)
        cache = cache_for(model, attention, batch_size=2)
        assert torch.equal(generate(model, inputs, cache, max_new_tokens=9), want)
        assert cache.get_seq_length() == length + 8  # every token is in this cache
    copied = copy.deepcopy(model)
    cache = cache_for(copied, attention, batch_size=2)
    assert torch.equal(generate(copied, inputs, cache, max_new_tokens=9), want) and cache.get_seq_length() == 20
    small = cache_for(model, attention, max_positions=13, batch_size=2)
    with pytest.raises(ValueError, match="do not fit into max_positions=13"):
        generate(model, inputs, small, max_new_tokens=9)


def test_offloaded_models(device: torch.device, tmp_path: Any) -> None:
    """accelerate's hooks lie on modules around the attention, or within it, and know where it computes."""
    accelerate = pytest.importorskip("accelerate")
    for offload in (accelerate.cpu_offload, lambda model, **o: accelerate.disk_offload(model, str(tmp_path), **o)):
        model = make_model("llama", device)
        inputs = prompts(1, 5, device)
        want = expected(model, inputs)
        offload(model, execution_device=device)
        cache = Fp16Cache.for_model(model, 64)
        assert cache.caches[0].device == device
        assert torch.equal(generate(model, inputs, cache), want)


class Hook:
    def __init__(self, device: Any) -> None:
        self.execution_device = device


@pytest.mark.parametrize("place", ["around", "within", "itself"])
def test_where_an_offloaded_layer_computes(place: str) -> None:
    """The same without accelerate: the parameters are on 'meta', a hook's `execution_device` says where they go."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("Llama"))
    attentions = [layer.self_attn for layer in model.model.layers]
    modules = {"around": [model], "within": [a.k_proj for a in attentions], "itself": attentions}[place]
    for module in modules:
        module._hf_hook = Hook(torch.device("cpu"))
    assert Fp16Cache.for_model(model, 8).caches[0].device == torch.device("cpu")


@pytest.mark.skipif(not hasattr(transformers, "Dots3NoteTextConfig"), reason="this transformers has no dots3_note")
def test_configurations_that_differ_from_layer_to_layer() -> None:
    config = transformers.Dots3NoteTextConfig(num_hidden_layers=4)
    with torch.device("meta"):
        model = transformers.Dots3NoteForCausalLM(config)
    with pytest.raises(NotImplementedError, match="must be on a CPU or a CUDA device, got 'meta'"):
        Fp16Cache.for_model(model, 64)  # read to the end


def test_gathered_keys_are_laid_out_as_any_caches_are(device: torch.device) -> None:
    """GPT-NeoX-Japanese takes views of them, which only contiguous ones have."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXJapaneseConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_multiple_size=2
    )
    model = transformers.GPTNeoXJapaneseForCausalLM(config).eval().to(device)
    cache = Fp16Cache.for_model(model, 64, 2, attention=None)
    inputs = prompts(2, 5, device)
    assert torch.equal(generate(model, inputs, cache), generate(model, inputs, RoundingCache(config=config)))
    rows = torch.randn(2, 2, 3, 16, device=device)
    keys, values = cache.update(rows, rows, 0)
    assert keys.is_contiguous() and values.is_contiguous()


def test_more_sequences_than_it_holds(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 4)
    inputs = prompts(1, 7, device)
    logits_of(model, cache, input_ids=inputs["input_ids"][:, :5])
    options = {"num_return_sequences": 4, "do_sample": True, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"it holds 1 sequences, and these are 4.*batch_repeat_interleave\(4\)"):
        generate(model, inputs, cache, **options)
    cache.batch_repeat_interleave(4)
    torch.manual_seed(3)
    got = generate(model, inputs, cache, **options)
    torch.manual_seed(3)
    assert torch.equal(got, generate(model, inputs, Fp16Cache.for_model(model, 64, 4), **options))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_of_a_pipeline(device: torch.device, tmp_path: Any, stage: int) -> None:
    """A model with one of its layers alone has memory for that one."""
    model = make_model("llama", device)
    model.config.num_hidden_layers = 3
    model.model.layers = torch.nn.ModuleList([model.model.layers[stage]])
    cache = Fp16Cache.for_model(model, 64, 2)
    assert len(cache.layers) == 3 and cache.memory_bytes() == 64 * 2 * 2 * 16 * 2 * 2
    inputs = prompts(2, 9, device, padded=True)
    model.set_attn_implementation("eager")
    want = logits_of(model, RoundingCache(config=model.config), **inputs)  # in one pass
    model.set_attn_implementation(NAME)
    parts = []
    for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
        mask = inputs["attention_mask"][:, : part.stop]
        parts.append(logits_of(model, cache, input_ids=inputs["input_ids"][:, part], attention_mask=mask))
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(torch.cat(parts, 1)[real], want[real], rtol=2e-3, atol=2e-3)
    cache.crop(-2)
    assert cache.get_seq_length() == 7 and cache.overflow_counts().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="has no such layer"):
        cache.update(*torch.zeros(2, 2, 2, 1, 16, device=device), (stage + 1) % 3)
    copied = copy.deepcopy(cache)
    assert copied.get_seq_length(2) == 7 and copied.layers[stage - 1].beside is copied.layers[stage]
    cache.save(tmp_path / "stage")
    loaded = Fp16Cache.load(tmp_path / "stage", model)
    assert loaded.get_seq_length() == 7 and torch.equal(loaded.layers[stage].keys, cache.layers[stage].keys)
    model.model.layers[0].self_attn.layer_idx = (stage + 1) % 3
    with pytest.raises(ValueError, match=f"layer {min(stage, (stage + 1) % 3)} is "):
        Fp16Cache.load(tmp_path / "stage", model)


def test_how_a_cache_is_made(models: Any) -> None:
    model = models("llama")
    with pytest.raises(TypeError, match=r"Fp16Cache: make one with Fp16Cache\.for_model\(model, max_positions\)"):
        Fp16Cache(model, 100)
    with pytest.raises(TypeError, match="Fp16Cache: batch_size must be an int, got '2'"):
        Fp16Cache.for_model(model, 64, batch_size="2")
    with pytest.raises(ValueError, match="Fp16Cache: overflow must be 'saturate' or 'inf', got 'wrap'"):
        Fp16Cache.for_model(model, 64, overflow="wrap")


def test_a_decoder_that_keeps_nothing_is_refused() -> None:
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=2, d_inner=32)
    with pytest.raises(NotImplementedError, match="takes no cache"):
        Fp16Cache.for_model(transformers.XLNetLMHeadModel(config), 64, attention=None)


def test_a_cache_that_a_pass_left_empty(models: Any, device: torch.device) -> None:
    model = make_model("llama", device)
    cache = Fp16Cache.for_model(model, 64)
    inner = model.model.layers
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(NotImplementedError, match="stored nothing in it"):
        logits_of(model, cache, **prompts(1, 3, device))
    model.model.layers = inner
    assert int(cache.shared.positions.last.max()) == UNKNOWN


# Found by a hostile tester


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_pass_that_fails_before_or_after_all_is_stored(device: torch.device, attention: str, where: str) -> None:
    """After the last layer has stored, all layers hold the same: only the pass itself knows that it failed."""
    model = make_model("llama", device)
    cache = cache_for(model, attention)
    ids = prompts(1, 6, device)["input_ids"]

    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    module = model.model.layers[0] if where == "first" else model.model.norm
    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, cache, input_ids=ids)
    hook.remove()
    if where == "last":
        for call in (lambda: logits_of(model, cache, input_ids=ids), lambda: cache.crop(-1)):
            with pytest.raises(RuntimeError, match=r"broken off after it had stored its tokens; reset\(\) it"):
                call()
        cache.reset()
    else:  # nothing was stored: a past made by hand is one
        rows = torch.randn(1, 2, 5, 16, device=device)
        for layer in range(3):
            cache.update(rows, rows, layer)
        assert cache.get_seq_length() == 5
        cache.reset()
    got = logits_of(model, cache, input_ids=ids)
    model.set_attn_implementation("eager")
    want = logits_of(model, RoundingCache(config=model.config), input_ids=ids)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_text_fed_twice_under_finished_masks(models: Any, device: torch.device, kind: torch.dtype) -> None:
    """A 4D mask says of each token whether it exists: whether it sees itself."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 2)
    ids = prompts(2, 7, device)["input_ids"]
    sees = torch.ones(7, 14, dtype=torch.bool, device=device).tril(7).expand(2, 1, 7, 14).clone()
    sees[0, :, :2] = False  # two rows of padding

    def mask(of: Tensor) -> Tensor:
        return of if kind == torch.bool else torch.where(of, 0.0, torch.finfo(kind).min)

    places = (torch.arange(7, device=device) - torch.tensor([[2], [0]], device=device)).clamp(min=0)
    logits_of(model, cache, input_ids=ids, attention_mask=mask(sees[..., 7:]), position_ids=places)
    before = stored(cache)
    with pytest.raises(ValueError, match=AGAIN):
        logits_of(model, cache, input_ids=ids, attention_mask=mask(sees), position_ids=places)
    assert unchanged(before, cache)
    later = (torch.arange(7, device=device) + torch.tensor([[3], [7]], device=device)) * sees[:, 0, :, 7:].diagonal(
        0, 1, 2
    )
    logits_of(model, cache, input_ids=ids, attention_mask=mask(sees), position_ids=later)
    assert cache.get_seq_length() == 14


def test_a_text_fed_twice_with_masks_that_generate_prepares(models: Any, device: torch.device) -> None:
    model = models("llama")
    model.set_attn_implementation("eager")
    cache = Fp16Cache.for_model(model, 64, attention=None, compileable=True)
    model.generation_config.disable_compile = True
    try:
        with pytest.raises(ValueError, match=AGAIN):
            generate(model, prompts(1, 9, device), cache, use_cache=False, max_new_tokens=8)
    finally:
        model.generation_config.disable_compile = False


@pytest.mark.long
def test_several_tokens_that_were_fed_before_in_compiled_code(models: Any, device: torch.device) -> None:
    """Compiled code cannot raise: the next call that is not compiled does."""
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    step = torch.compile(model, fullgraph=True)
    options = {"input_ids": prompts(1, 7, device)["input_ids"], "attention_mask": None}
    places = torch.arange(7, device=device)[None]
    logits_of(step, cache, **options, position_ids=places)
    logits_of(step, cache, **options, position_ids=places + 7)
    assert cache.shared.positions.last.tolist() == [13]
    logits_of(step, cache, **options, position_ids=places + 7)
    with pytest.raises(ValueError, match=AGAIN):
        cache.crop(-1)


def test_a_cache_that_comes_without_its_name(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64)
    ids, places = prompts(1, 6, device)["input_ids"], torch.arange(6, device=device)[None]
    with torch.no_grad():
        model.model(ids, None, places, cache)
        with pytest.raises(ValueError, match=AGAIN):
            model.model(ids, None, places, cache)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bert"])
def test_no_new_tokens(device: torch.device, name: str) -> None:
    """The prompt once more, of which the cache holds all: some models would stumble over nothing before any mask."""
    options = {"is_decoder": True} if name == "Bert" else {"ffn_dim": 32} if name == "OPT" else {}
    kind = {"Bert": "BertLMHeadModel", "GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, kind)(tiny(name, num_key_value_heads=4, **options)).eval().to(device)
    cache = Fp16Cache.for_model(model, 64)
    generate(model, prompts(1, 7, device), cache, max_new_tokens=10)
    with pytest.raises(ValueError, match=r"Fp16Cache: .*reset\(\)"):
        generate(model, prompts(1, 7, device), cache, max_new_tokens=10)


def test_arguments_of_another_batch(models: Any, device: torch.device) -> None:
    model = models("llama")
    cache = Fp16Cache.for_model(model, 64, 2)
    ids = prompts(2, 4, device)["input_ids"]
    for name, shape in (("attention_mask", (3, 4)), ("position_ids", (3, 4))):
        with pytest.raises(ValueError, match=f"Fp16Cache: {name} must have 2 rows, one for each sequence, got 3"):
            logits_of(model, cache, input_ids=ids, **{name: torch.ones(shape, dtype=torch.int64, device=device)})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_right_uses_that_must_not_be_refused(models: Any, device: torch.device, attention: str) -> None:
    model = models("llama")
    cache = cache_for(model, attention)
    ids = prompts(1, 4, device)["input_ids"]

    def feed(*places: int, **options: Any) -> None:
        where = torch.tensor([places], device=device)
        logits_of(model, cache, input_ids=ids[:, : len(places)], position_ids=where, **options)

    feed(0, 1, 2, 3)
    feed(100, 101, 102, 103)  # a gap
    cache.crop(-4)
    feed(4, 5, 6, 7)
    logits_of(model, cache, input_ids=ids[:, :1], use_cache=False)  # goes on by itself
    cache.reset()
    for layer in range(3):  # a past from elsewhere, whose positions nobody knows
        cache.update(*torch.randn(2, 1, 2, 3, 16, device=device), layer)
    feed(0, 1, 2, 3)


@pytest.mark.parametrize("how", ["plain", "lookup", "padded", "cropped", "reordered"])
def test_a_text_fed_twice_to_a_model_without_positions(device: torch.device, how: str) -> None:
    """Bloom has no `position_ids`, and transformers 5.24 takes masks of ones away: the tokens themselves tell."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=None
    )
    model = transformers.BloomForCausalLM(config).eval().to(device)
    inputs = prompts(2, 5, device, padded=how == "padded")
    inputs = inputs if how in ("padded", "reordered") else {name: value[:1] for name, value in inputs.items()}
    cache = Fp16Cache.for_model(model, 64, 2, attention=None)
    text = generate(model, inputs, cache, max_new_tokens=4)
    if how == "cropped":
        cache.crop(-2)
    elif how == "reordered":
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        text = text[[1, 0]]
    longer = torch.cat([text, prompts(len(text), 6, device)["input_ids"]], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, longer.shape[1] - 5), value=1)
    turn = {"input_ids": longer, "attention_mask": mask}
    want = generate(model, turn, RoundingCache(config=config), max_new_tokens=6)
    if how == "lookup":
        held = cache.get_seq_length()
        try:
            got = generate(model, turn, cache, max_new_tokens=6, prompt_lookup_num_tokens=2)
        except ValueError as error:
            assert "comes again on top" in str(error) or "attention_mask has" in str(error)
            assert cache.get_seq_length() == held
            return
        assert torch.equal(got, want)
        return
    with torch.no_grad(), pytest.raises(ValueError, match=AGAIN):
        model(input_ids=longer, past_key_values=cache)
    assert torch.equal(generate(model, turn, cache, max_new_tokens=6), want)
