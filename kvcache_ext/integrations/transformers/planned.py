"""What an `Fp16Cache` for a config.json would be, before there is a model: for `python -m kvcache_ext plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config_names import POSITIONS
from .layer_plan import LayerPlan, check_takes_a_cache, plan_layers

# What makes keys of hidden states, alone or with queries and values, as tensor-parallel plans name it.
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")


@dataclass(frozen=True)
class ModelOfConfig:
    """What a config.json says of a cache.

    Attributes:
        layers: for each `max_positions`, the layers that `Fp16Cache.for_model` makes.
        positions: how many positions the model is made for; None: it does not say.
        why_not_by_heads: why tensor parallelism does not deal its key/value heads out to several GPUs, in words; None:
            it does.
    """

    layers: Callable[[int], list[LayerPlan]]
    positions: int | None
    why_not_by_heads: str | None


def model_of_config(path: Path) -> ModelOfConfig:
    """The model with this config.json, which is built without memory, on torch's meta device.

    Raises NotImplementedError where `for_model` would, and whatever transformers raises where it does not know the
    model.
    """
    model = _without_weights(path)

    def layers(max_positions: int) -> list[LayerPlan]:
        return plan_layers(model, max_positions, device=torch.device("cpu"))[0]

    check_takes_a_cache(model)
    layers(1)
    text = model.config.get_text_config(decoder=True)
    made_for = [getattr(text, name, None) for name in POSITIONS]
    positions = next((number for number in made_for if isinstance(number, int) and number > 0), None)
    return ModelOfConfig(layers, positions, _why_not_by_heads(text))


def _why_not_by_heads(text: Any) -> str | None:
    parallel = getattr(text, "base_model_tp_plan", None) or {}
    if not parallel:
        return f"transformers has no tensor-parallel plan for {text.model_type}"
    styles = {style for name, style in parallel.items() if name.rpartition(".")[2] in KEY_PROJECTIONS}
    # Gathered: each GPU computes its own heads, and then gets those of the others (before 5.19 "colwise_rep").
    if any("colwise" in style and not style.endswith(("gather_output", "rep")) for style in styles):
        return None
    return f"transformers' tensor-parallel plan for {text.model_type} leaves every GPU all key/value heads"


def _without_weights(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel)
    with torch.device("meta"):
        for kind in kinds:
            if type(config) in kind._model_mapping:
                return kind.from_config(config)
    raise ValueError(f"{path} is of no model that generates text")
