"""What an `Fp16Cache` for a config.json would be, before there is a model: for `python -m kvcache_ext plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...config_names import POSITIONS
from .layer_plan import LayerPlan, check_takes_a_cache, plan_layers


def layers_of_config(path: Path) -> tuple[Callable[[int], list[LayerPlan]], int | None]:
    """The layers, for each `max_positions`, that `Fp16Cache.for_model` makes for a model with this config.json, and how
    many positions the model is made for.

    The model is built without memory, on torch's meta device. Raises NotImplementedError where `for_model` would, and
    whatever transformers raises where it does not know the model.
    """
    model = _without_weights(path)

    def layers(max_positions: int) -> list[LayerPlan]:
        return plan_layers(model, max_positions, device=torch.device("cpu"))[0]

    check_takes_a_cache(model)
    layers(1)
    text = model.config.get_text_config(decoder=True)
    made_for = [getattr(text, name, None) for name in POSITIONS]
    return layers, next((number for number in made_for if isinstance(number, int) and number > 0), None)


def _without_weights(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel)
    with torch.device("meta"):
        for kind in kinds:
            if type(config) in kind._model_mapping:
                return kind.from_config(config)
    raise ValueError(f"{path} is of no model that generates text")
