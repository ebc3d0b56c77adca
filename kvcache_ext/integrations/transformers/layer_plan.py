"""What a cache needs for each layer of a model of transformers: heads, head_dim, window and device."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from ...memory import attention_serves
from .tensor_parallel import WHOLE, TensorParallel
from .version import CROP_MARGIN, NAME


@dataclass(frozen=True)
class LayerPlan:
    """What a cache needs for one layer."""

    device: torch.device  # where the layer computes
    max_positions: int  # of its ring
    heads: int  # key/value heads, on this rank
    key_dim: int  # head_dim of keys, and of values: they differ with latent attention
    value_dim: int
    window: int | None  # sliding window, in tokens; None: full attention
    present: bool = True  # False: another stage of a pipeline has this layer
    attends: bool = True  # False: it has no keys and values; the four numbers before mean nothing
    states: int = 0  # recurrent or convolutional states that it keeps
    attended_again: bool = False  # by layers after it, which share its keys and values
    indexed: bool = False  # has an index of its keys
    chunked: bool = False  # attention begins anew at each multiple of the window
    shard: tuple[int, int] = WHOLE  # which heads of the model: those of this rank, of so many ranks

    @property
    def group(self) -> tuple[Any, ...]:
        """Layers with equal groups share one `StreamingKVCacheFp16`."""
        # The window changes no shape. But only layers with equal windows hold the same tokens.
        return self.device, self.max_positions, self.heads, self.head_dim, self.window

    @property
    def head_dim(self) -> int:
        """Of the cache: keys and values of different widths are stored as two halves of both."""
        return (self.key_dim + self.value_dim + 1) // 2


def model_type_of(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True).model_type)


def plan_layers(model: Any, max_positions: int, *, device: torch.device | None = None) -> tuple[list[LayerPlan], Any]:
    """A plan for each layer, and the configuration in which the model's attention is set.

    `device`: in place of where the layers are, for a model that is nowhere yet.

    Raises NotImplementedError, TypeError or ValueError if such a cache cannot serve this model.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"Fp16Cache: model must be a model of transformers, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"Fp16Cache: {name} is an encoder-decoder model; only decoders are supported")
    text = config.get_text_config(decoder=True)
    layer_configs = _layer_configs(text)
    if any(hasattr(module, "conv1d_state") or hasattr(module, "recurrent_states") for module in model.modules()):
        raise NotImplementedError(
            f"Fp16Cache: {name} keeps its recurrent states on its own modules, where no cache can take them along"
        )
    if _value(text, "cross_attention_layers"):
        raise NotImplementedError(f"Fp16Cache: {name} has cross-attention layers")
    if not isinstance(max_positions, int) or isinstance(max_positions, bool) or max_positions < 1:
        raise ValueError(f"Fp16Cache: max_positions must be a positive int, got {max_positions!r}")

    if getattr(model, "dtype", None) == torch.float64:
        raise TypeError(f"Fp16Cache: {name} is an FP64 model; FP32, FP16 and BF16 models can have such a cache")
    types = _layer_types(name, text)
    for i, (layer_type, _) in enumerate(types):
        if layer_type not in (*WITH_KEYS, *WITHOUT_KEYS):
            raise NotImplementedError(
                f"Fp16Cache: layer {i} of {name} is of type {layer_type!r}, which it cannot hold (see "
                "docs/transformers.md)"
            )
    if types and not any(layer_type in WITH_KEYS for layer_type, _ in types):
        raise NotImplementedError(f"Fp16Cache: {name} has no attention, so no keys and values to hold")
    modules, present = _attention_modules(model, text.num_hidden_layers)
    per_stack = getattr(text, "num_layers_per_stack", None)
    if per_stack:  # HrmText runs fewer modules several times. Each run has cache layers of its own.
        modules = {i: modules[i % per_stack] for i in range(text.num_hidden_layers) if i % per_stack in modules}
        present = set(modules)
    tensor_parallel = TensorParallel.of(model)
    plans = []
    again = _attended_again(text, [layer_type for layer_type, _ in types])
    for i, (layer_type, options) in enumerate(types):
        here = i in present or not present
        at = device or (_device(model, modules.get(i)) if here else torch.device("cpu"))
        states = options.get("number_of_states", 1) if layer_type in WITH_STATES else 0
        if layer_type in WITHOUT_KEYS:
            plans.append(LayerPlan(at, 0, 0, 0, 0, None, here, attends=False, states=states))
            continue
        heads, key_dim, value_dim = _shape(name, layer_configs[i], modules.get(i))
        shard = tensor_parallel.shard(name, i, modules.get(i), heads)
        window = None
        ring = max_positions
        if WITH_KEYS[layer_type]:
            window = options.get("sliding_window")
            if window is None:
                raise NotImplementedError(f"Fp16Cache: layer {i} of {name} has a sliding window of no size")
            # What other layers attend to again has to hold the windows of all new tokens, once these are stored.
            ring = max_positions + window if again[i] else min(max_positions, window + CROP_MARGIN)
        shape = heads // shard[1], key_dim, value_dim, window, here
        plans.append(
            LayerPlan(
                at,
                ring,
                *shape,
                states=states,
                attended_again=again[i],
                indexed=layer_type == "indexed_attention",
                chunked=layer_type == "chunked_attention",
                shard=shard,
            )
        )
    plans += [plans[i] for i in _repeated_layers(name, text)]
    if not any(plan.present for plan in plans):
        raise NotImplementedError(f"Fp16Cache: {name} has no layers")
    if not any(plan.present and plan.attends for plan in plans):
        raise NotImplementedError(
            f"Fp16Cache: of the layers of {name} that are here none has attention: there are no keys and values to hold"
        )
    configs = [module.config for module in modules.values() if hasattr(module, "config")]
    return plans, configs[0] if configs else text


def _value(config: Any, name: str, default: Any = None) -> Any:
    """An attribute of a configuration. One that differs between layers counts as absent."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError
        return default


def _layer_configs(text: Any) -> list[Any]:
    """The configuration of each layer: its own where layers may differ, else the model's."""
    per_layer = _value(text, "per_layer_config")
    return [text if per_layer is None else per_layer[i] for i in range(text.num_hidden_layers)]


def _shape(name: str, config: Any, module: Any) -> tuple[int, int, int]:
    """Heads of the keys and values of a layer, and the head_dim of keys and of values."""
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise NotImplementedError(f"Fp16Cache: {name} names no num_attention_heads: it has no attention of this kind")
    if getattr(config, "kv_lora_rank", None):  # latent attention: what is stored depends on transformers' release
        if hasattr(module, "expand_kv"):
            return 1, config.kv_lora_rank, config.qk_rope_head_dim
        return config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "dim_head", None)  # CPM-Ant's
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if module is None:
        return heads, head_dim, head_dim
    head_dim = module.head_dim if isinstance(getattr(module, "head_dim", None), int) else head_dim
    sizes = [getattr(getattr(module, part, None), "out_features", None) for part in ("k_proj", "v_proj")]
    if isinstance(sizes[0], int) and sizes[0] % head_dim == 0:
        heads = sizes[0] // head_dim
    elif getattr(module, "new_decoder_architecture", False):  # Falcon's: keys are repeated to all heads
        heads = config.num_attention_heads
    else:
        counts = (getattr(module, named, None) for named in ("num_kv_heads", "kv_heads"))  # Falcon, GPTBigCode
        heads = next((count for count in counts if isinstance(count, int)), heads)
    value_dim = head_dim if None in sizes or sizes[0] == sizes[1] else sizes[1] // heads
    return heads, head_dim, value_dim


def _repeated_layers(name: str, text: Any) -> list[int]:
    """The layers that a looped model runs again. In this order it appends cache layers for them."""
    if hasattr(text, "n_recurrent_loops"):  # Dory
        if text.recurrent_kv_cache_mode == "last_loop":
            raise NotImplementedError(
                f"Fp16Cache: {name} reads the keys and values of other loops from its cache (recurrent_kv_cache_mode="
                "'last_loop')"
            )
        first, loops = text.n_input_layers, text.n_recurrent_loops
        return list(range(first, first + text.n_recurrent_layers)) * (loops - 1)
    if hasattr(text, "loop_num_passes"):  # Inkling 2
        looped = range(text.num_hidden_layers)[text.loop_layer_index_start : text.loop_layer_index_end]
        return list(looped) * (text.loop_num_passes - 1)
    return []


# Types of layers, as transformers names them: whether those with keys and values have a sliding window.
# (Chunked attention needs no more than the last chunk: masks say where chunks begin.)
WITH_KEYS = {
    **{"full_attention": False, "sliding_attention": True, "chunked_attention": True},
    **{"hybrid": False, "hybrid_sliding": True, "indexed_attention": False},
}
WITH_STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
WITHOUT_KEYS = ("linear_attention", "conv", "dummy", "moe", "mlp")


def _layer_types(name: str, text: Any) -> list[tuple[str, dict[str, Any]]]:
    """The type of each layer and what its cache needs to know, as transformers' own caches have it."""
    try:
        types, options = get_layer_types_and_kwargs(text)
    except (AttributeError, RuntimeError) as error:
        raise NotImplementedError(f"Fp16Cache: transformers names no types of layers for {name}: {error}") from None
    each = [options] * len(types) if isinstance(options, dict) else options  # a dict for all: before 5.19
    return list(zip(types, each, strict=True))


def _attended_again(text: Any, types: list[str]) -> list[bool]:
    """Whether the keys and values of each layer are shared by layers after it."""
    modes = _value(text, "kv_sharing_modes")
    if modes:
        return [mode == "store" for mode in modes]
    # Before 5.23 `types` ends where sharing begins, and the last layer of each type is the one that others share.
    shared = (_value(text, "num_kv_shared_layers") or 0) > 0
    return [shared and layer_type not in types[i + 1 :] for i, layer_type in enumerate(types)]


def _attention_modules(model: Any, layers: int) -> tuple[dict[int, Any], set[int]]:
    """The attention modules that are found, by layer, and the layers that the model has."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: dict[int, Any] = {}
    present: set[int] = set()
    for module in (root or model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers:
            present.add(index)
            # (Where a layer has a recurrent part, too, that may have a head_dim of its own, but no k_proj.)
            is_attention = any(hasattr(module, name) for name in ("head_dim", "kv_lora_rank", "query_key_value"))
            better = index not in found or (hasattr(module, "k_proj") and not hasattr(found[index], "k_proj"))
            if is_attention and better:
                found[index] = module
    return found, present


def _device(model: Any, module: Any) -> torch.device:
    """Where a layer computes. accelerate's hooks know it: on the module, on one within it, or on one around it."""
    hooked = [] if module is None else [module, *module.modules(), *_around(model, module)]
    devices = (getattr(getattr(each, "_hf_hook", None), "execution_device", None) for each in hooked)
    device = next((device for device in devices if device is not None), None)
    if device is None:
        parameter = None if module is None else next(module.parameters(), None)
        device = model.device if parameter is None else parameter.device
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"Fp16Cache: the model must be on a CPU or a CUDA device, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _around(model: Any, module: Any) -> list[Any]:
    """The modules that hold this one, the innermost first."""
    name = next((name for name, each in model.named_modules() if each is module), "")
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)] if name else []


def check_takes_a_cache(model: Any) -> None:
    """Raises if the model's forward has no argument for a cache: such models would ignore it silently."""
    parameters = inspect.signature(model.forward).parameters
    if not {"cache", "past_key_values"} & set(parameters) and len(parameters) > 2:
        raise NotImplementedError(
            f"Fp16Cache: {type(model).__name__} takes no cache of this kind: its forward has no past_key_values"
        )


def check_attention(model: Any, plans: list[LayerPlan]) -> None:
    """Raises if this package's attention cannot serve the model."""
    instead = "make the cache with attention=None, which gives the model gathered keys and values"
    for i, plan in enumerate(plans):
        if plan.indexed:
            raise NotImplementedError(
                f"Fp16Cache: {NAME!r} attention sees all keys, and layer {i} of {type(model).__name__} chooses some by "
                f"an index; {instead}"
            )
        if plan.attends and plan.key_dim != plan.value_dim:
            raise NotImplementedError(
                f"Fp16Cache: {NAME!r} attention needs keys and values of one width, and layer {i} of "
                f"{type(model).__name__} stores keys of {plan.key_dim} and values of {plan.value_dim}; {instead}"
            )
        if plan.attends and not attention_serves(plan.head_dim):
            raise NotImplementedError(
                f"Fp16Cache: {NAME!r} attention needs a head_dim that is a multiple of 8, at most 512, and layer {i} "
                f"has {plan.head_dim}; {instead}"
            )
    if not getattr(model, "_supports_attention_backend", False) and not _uses_the_registry(model):
        raise NotImplementedError(
            f"Fp16Cache: {type(model).__name__} does not take attention from transformers' registry; {instead}"
        )


def _uses_the_registry(model: Any) -> bool:
    """Whether the attention modules are written in files that import transformers' registry of attentions.

    (`_supports_attention_backend` is False of hybrid models, whose other layers have no use for it. A module that does
    not ask the registry after all is noticed at the first forward pass: see `PendingKeyValues`.)
    """
    modules, _ = _attention_modules(model, model.config.get_text_config(decoder=True).num_hidden_layers)
    attention = [module for module in modules.values() if hasattr(module, "k_proj")]
    files = [sys.modules.get(type(module).__module__) for module in attention]
    return bool(files) and all(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)
