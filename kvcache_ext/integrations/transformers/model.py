"""What a model is made of: the shape, window and device of each of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .version import CROP_MARGIN, NAME


@dataclass(frozen=True)
class LayerPlan:
    device: torch.device
    capacity: int
    heads: int
    head_dim: int
    window: int | None

    @property
    def group(self) -> tuple[Any, ...]:
        # The window too, though it changes no storage: layers with equal windows hold the same tokens.
        return self.device, self.capacity, self.heads, self.head_dim, self.window


def plan_layers(model: Any, max_positions: int) -> tuple[list[LayerPlan], Any]:
    """What each layer needs, and the configuration that its attention looks at; raises where a cache cannot serve."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"Fp16Cache: model must be a model of transformers, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"Fp16Cache: {name} is an encoder-decoder model; only decoders are supported")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(
            f"Fp16Cache: {name} has multi-head latent attention, whose keys and values differ in size"
        )
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise NotImplementedError(f"Fp16Cache: {name} has layers that share the keys and values of others")
    if getattr(text, "cross_attention_layers", None):
        raise NotImplementedError(f"Fp16Cache: {name} has cross-attention layers")
    if not isinstance(max_positions, int) or isinstance(max_positions, bool) or max_positions < 1:
        raise ValueError(f"Fp16Cache: max_positions must be a positive int, got {max_positions!r}")

    if getattr(model, "dtype", None) == torch.float64:
        raise TypeError(f"Fp16Cache: {name} is an FP64 model; FP32, FP16 and BF16 models can have such a cache")
    modules = _attention_modules(model, text.num_hidden_layers)
    plans = []
    for i, layer_type in enumerate(_layer_types(text)):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(
                f"Fp16Cache: layer {i} of {name} is of type {layer_type!r}; only 'full_attention' and "
                "'sliding_attention' layers can be held"
            )
        module = modules.get(i)
        layer_config = getattr(text, "per_layer_config", None)
        layer_config = text if layer_config is None else layer_config[i]
        if not isinstance(getattr(layer_config, "num_attention_heads", None), int):
            raise NotImplementedError(
                f"Fp16Cache: {name} names no num_attention_heads: it has no attention of this kind"
            )
        heads = getattr(layer_config, "num_key_value_heads", None) or layer_config.num_attention_heads
        head_dim = getattr(layer_config, "head_dim", None)
        head_dim = head_dim or layer_config.hidden_size // layer_config.num_attention_heads
        if module is not None:
            head_dim = module.head_dim if isinstance(getattr(module, "head_dim", None), int) else head_dim
            sizes = [getattr(getattr(module, part, None), "out_features", None) for part in ("k_proj", "v_proj")]
            if isinstance(sizes[0], int) and sizes[0] % head_dim == 0:
                heads = sizes[0] // head_dim
            elif isinstance(getattr(module, "num_kv_heads", None), int):  # Falcon
                heads = module.num_kv_heads
            if None not in sizes and sizes[0] != sizes[1]:
                raise NotImplementedError(f"Fp16Cache: layer {i} of {name} has keys and values of different sizes")
        window = None
        capacity = max_positions
        if layer_type == "sliding_attention":
            window = layer_config.sliding_window
            if window is None:
                raise NotImplementedError(f"Fp16Cache: layer {i} of {name} has a sliding window of no size")
            capacity = min(max_positions, window + CROP_MARGIN)
        plans.append(LayerPlan(_device(model, module), capacity, heads, head_dim, window))
    configs = [module.config for module in modules.values() if hasattr(module, "config")]
    return plans, configs[0] if configs else text


def _layer_types(text: Any) -> list[str]:
    given = getattr(text, "layer_types", None)
    if given is not None:
        return list(given)
    if getattr(text, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    else:
        kind = "full_attention"
    return [kind] * text.num_hidden_layers


def _attention_modules(model: Any, layers: int) -> dict[int, Any]:
    """The attention module of each layer, as far as they are to be found."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: dict[int, Any] = {}
    for module in (root or model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers and hasattr(module, "head_dim") and index not in found:
            found[index] = module
    return found


def _device(model: Any, module: Any) -> torch.device:
    """Where a layer computes."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        parameter = None if module is None else next(module.parameters(), None)
        device = model.device if parameter is None else parameter.device
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"Fp16Cache: the model must be on a CPU or a CUDA device, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def check_attention(model: Any, plans: list[LayerPlan]) -> None:
    instead = "make the cache with attention=None, which gives the model gathered keys and values"
    for i, plan in enumerate(plans):
        if plan.head_dim % 8 or plan.head_dim > 512:
            raise NotImplementedError(
                f"Fp16Cache: {NAME!r} attention needs a head_dim that is a multiple of 8, at most 512, and layer {i} "
                f"has {plan.head_dim}; {instead}"
            )
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(
            f"Fp16Cache: {type(model).__name__} does not take attention from transformers' registry; {instead}"
        )
