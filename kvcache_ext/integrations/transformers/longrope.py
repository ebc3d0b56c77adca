"""Longrope (Phi-3): generation past the first set of frequencies, in the cache that was given.

A model with longrope has two sets of frequencies, for short and for long texts. At the token where a text outgrows the
first set, transformers drops the cache that it was given and goes on with one of its own, to which it feeds the whole
text again. `KeepsCache` resets the given cache instead, so the whole text is fed to that one.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from .shared import find_cache
from .version import cache_argument


class KeepsCache:
    """Stands in for `prepare_inputs_for_generation` of a model with longrope."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # generate() reads the signature.
        functools.update_wrapper(self, type(model).prepare_inputs_for_generation, updated=())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        def prepare() -> Any:
            return type(self.model).prepare_inputs_for_generation(self.model, *arguments, **options)

        inputs, name = prepare(), cache_argument()
        given = find_cache([options.get(name)])
        if given is not None and inputs.get(name) is None:
            given.reset()
            options["next_sequence_length"] = None  # otherwise older releases go on with the newest token alone
            inputs = prepare()
            inputs[name] = given
        return inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepsCache:
        return KeepsCache(copy.deepcopy(self.model, memo))


def keep_cache_where_rope_changes(model: Any) -> None:
    """Puts a `KeepsCache` on a model with longrope."""
    if hasattr(getattr(model, "config", None), "original_max_position_embeddings") and hasattr(
        model, "prepare_inputs_for_generation"
    ):
        model.prepare_inputs_for_generation = KeepsCache(model)
