"""Saving a whole `Fp16Cache` to one file, and loading it for a model.

The file is one of several caches (`kvcache_ext/files`): keys and values of each layer in the model's order, whatever
caches hold them. Beside them it has:

- `__metadata__["cache"]`: JSON.
  - `max_positions`, `batch_size`, `overflow`: what the cache was made with.
  - `columns`: tokens and padding that it holds. `sequences`: those in use, or null.
  - `model_type`: the model's.
  - `layers`: for each layer its `kind`, and what that kind needs. "attention" has a `window` (or null), `first`: the
    columns before that one may be gone from its ring, and `widths`: head_dim of keys and of values, as the model has
    them (none in older files: both are the cache's). Of a tensor-parallel model whose heads are sharded, `shard` is
    the rank and the number of ranks. "states" has recurrent or convolutional states instead, and
    "hybrid" both: `states` says whether each is of a text (`previous`) and its `conv_kernel_size`. "indexed" is an
    "attention" layer with an index of its keys. "empty" has nothing, and "absent" is a layer that another stage of a
    pipeline has: neither has keys and values in the file. A reader that does not know a kind refuses the file.
  - `dtype`: the model's, where there are states or indexes.
- tensors `padding.WINDOW` (`padding.full` for layers without a window), bool `[sequences, n]`, where there may be
  padding: which of the first `n` columns are real. Padding is not stored. Columns from `n` on are real.
- tensors `states.LAYER.conv.N` and `states.LAYER.recurrent.N`, `[sequences, ...]` of any dtype.
- tensor `index.LAYER`, `[sequences, columns, index_head_dim]`.
- tensor `positions`, int64 `[sequences]`: the largest position that each sequence was fed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import shown
from ...files import LayersFile, open_layers, save_layers
from .indexed import IndexedLayer
from .layer_plan import LayerPlan, model_type_of, plan_layers
from .layers import AbsentLayer, Fp16Layer
from .shared import WholeCache
from .states import StateLayer
from .tensor_parallel import WHOLE

NewCache = TypeVar("NewCache", bound=WholeCache)
Progress = bool | Callable[[int, int], object] | None
KINDS = ("attention", "indexed", "hybrid", "states", "empty", "absent")
WITH_KEYS = KINDS[:3]


def _has_keys(layer: Any) -> bool:
    return isinstance(layer, Fp16Layer) and not isinstance(layer, AbsentLayer)


def _kind(layer: Any) -> str:
    if isinstance(layer, IndexedLayer):
        return "indexed"
    if isinstance(layer, StateLayer):
        return "hybrid" if _has_keys(layer) else "states"
    return "attention" if _has_keys(layer) else "absent" if isinstance(layer, AbsentLayer) else "empty"


def _kind_of_plan(plan: LayerPlan) -> str:
    if plan.attends and not plan.present:
        return "absent"
    if plan.indexed:
        return "indexed"
    if plan.states:
        return "hybrid" if plan.attends else "states"
    return "attention" if plan.attends else "empty"


def _shard_name(shard: Any) -> str:
    rank, ranks = shard
    return "all heads" if ranks == 1 else f"the heads of rank {rank} of {ranks}"


def _padding_name(window: int | None) -> str:
    return "padding.full" if window is None else f"padding.{window}"


def save(cache: WholeCache, path: Any, progress: Progress) -> None:
    """See `Fp16Cache.save`."""
    shared = cache.shared
    shared.check_ranks()
    shared.append_pending()
    cache.check_whole()
    shared.raise_deferred_errors(wait=True)
    layers: list[dict[str, Any]] = []
    stored = []
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        described_layer: dict[str, Any] = {"kind": _kind(layer)}
        if _has_keys(layer):
            described_layer |= {"window": layer.window, "first": layer.first_held, "widths": list(layer.widths)}
            if layer.shard != WHOLE:
                described_layer["shard"] = list(layer.shard)
            stored.append((layer.cache, layer.index))
        if isinstance(layer, StateLayer):
            described_layer["states"] = layer.described()
            if shared.active is not None:
                tensors |= {f"states.{i}.{name}": state for name, state in layer.saved_states().items()}
        if isinstance(layer, IndexedLayer) and (index := layer.saved_index()) is not None:
            tensors[f"index.{i}"] = index
        layers.append(described_layer)
    columns = cache.get_seq_length()
    described = {
        "model_type": cache.model_type,
        "max_positions": shared.max_positions,
        "batch_size": shared.batch_size,
        "overflow": cache.caches[0].overflow,
        "columns": columns,
        "sequences": shared.active,
        "layers": layers,
    }
    if cache.state_layers or any(isinstance(layer, IndexedLayer) for layer in cache.layers):
        described["dtype"] = str(cache.model_dtype)
    sequences = shared.active or 1
    for window in shared.padding.windows():
        real = shared.padding.real_columns(window, columns)
        if real is not None:
            tensors[_padding_name(window)] = real
    tensors["positions"] = shared.positions.last[:sequences]

    def write() -> None:
        save_layers(
            path,
            stored,
            sequences=sequences,
            metadata={"cache": json.dumps(described)},
            tensors=tensors,
            progress=progress,
        )

    if shared.agreement is None:
        write()
    else:
        from .sharded import write_together

        write_together(shared.agreement.exchange, write, stored, sequences)


def _together(model: Any, options: dict[str, Any]) -> Callable[[], AbstractContextManager[None]]:
    """What is done within: with a group an error on one rank is one on all."""
    if options["group"] is None:
        return nullcontext
    from .sharded import Sharding, failing_together

    Sharding(options["group"], options["exchange"], options["timeout"])  # which checks the three
    return functools.partial(failing_together, "Fp16Cache.load", options["group"], torch.device(model.device))


class _Saved:
    """What a file says about the whole cache: see the head of this file."""

    def __init__(self, path: Any, file: LayersFile) -> None:
        self.path = path
        try:
            described = json.loads(file.metadata["cache"])
            self.model_type = str(described["model_type"])
            self.max_positions, self.batch_size = int(described["max_positions"]), int(described["batch_size"])
            self.overflow, self.columns = str(described["overflow"]), int(described["columns"])
            self.sequences: int | None = described["sequences"]
            self.layers: list[dict[str, Any]] = list(described["layers"])
            self.dtype: str | None = described.get("dtype")
            kinds = {str(layer["kind"]) for layer in self.layers}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Fp16Cache.load: {path} is damaged: it does not describe a whole cache") from error
        for kind in sorted(kinds - set(KINDS)):
            raise ValueError(
                f"Fp16Cache.load: {path} has layers of kind {kind!r}, which this kvcache_ext does not know; a newer "
                "one is needed"
            )

    def check_fits(self, model_type: str, dtype: Any, plans: list[LayerPlan], file: LayersFile) -> None:
        """Raises ValueError unless the file is of a model with these layers."""

        def check_equal(what: str, there: object, here: object) -> None:
            if there != here:
                raise ValueError(
                    f"Fp16Cache.load: {self.path} is of another model: {what} {there} in the file and {here} in this "
                    "one"
                )

        check_equal("its model_type is", repr(self.model_type), repr(model_type))
        check_equal("the number of its layers is", len(self.layers), len(plans))
        if any(
            plan.states or plan.indexed for plan in plans
        ):  # which are not rounded, so they are of the model's dtype
            check_equal("its dtype is", self.dtype, str(dtype))
        shapes = iter(file.layers)
        for i, (layer, plan) in enumerate(zip(self.layers, plans, strict=True)):
            check_equal(f"layer {i} is", layer["kind"], _kind_of_plan(plan))
            if layer["kind"] not in WITH_KEYS:
                continue
            check_equal(f"the window of layer {i} is", layer["window"], plan.window)
            shape = next(shapes)
            check_equal(f"layer {i} has", _shard_name(layer.get("shard", WHOLE)), _shard_name(plan.shard))
            check_equal(f"the key/value heads of layer {i} are", shape.num_heads, plan.heads)
            check_equal(f"the head_dim of layer {i} is", shape.head_dim, plan.head_dim)
            widths = layer.get("widths", [shape.head_dim, shape.head_dim])
            check_equal(f"keys and values of layer {i} are as wide as", widths, [plan.key_dim, plan.value_dim])


def load(
    for_model: Callable[..., NewCache],
    path: Any,
    model: Any,
    max_positions: int | None,
    batch_size: int | None,
    progress: Progress,
    options: dict[str, Any],
) -> NewCache:
    """See `Fp16Cache.load`. `for_model` makes the cache; `options` are its other arguments."""
    together = _together(model, options)
    with together():
        opened = open_layers(path)
    with opened as file:
        with together():
            saved = _Saved(path, file)
            positions = saved.max_positions if max_positions is None else max_positions
            plans, _ = plan_layers(model, positions)
            device_of_state = [plan.device for plan in plans]
            saved.check_fits(model_type_of(model), getattr(model, "dtype", None), plans, file)
            batch = saved.batch_size if batch_size is None else batch_size
            if isinstance(batch, int) and batch < (saved.sequences or 1):
                raise ValueError(
                    f"Fp16Cache.load: batch_size must be at least {saved.sequences}, the number of sequences in "
                    f"{path}, got {shown(batch_size)}"
                )
        if options["overflow"] is None:
            options["overflow"] = saved.overflow
        before = model.config._attn_implementation
        try:
            cache = for_model(model, positions, batch, **options)
            if cache.shared.bounded and saved.columns > cache.shared.max_positions:
                raise ValueError(
                    f"Fp16Cache.load: {path} holds {saved.columns} tokens, which do not fit into "
                    f"max_positions={positions}"
                )
            present: list[Fp16Layer] = [layer for layer in cache.layers if _has_keys(layer)]
            with together():
                file.load([(layer.cache, layer.index) for layer in present], fresh=True, progress=progress)
        except BaseException:
            if model.config._attn_implementation != before:
                model.set_attn_implementation(before)
            raise
        shared = cache.shared
        shared.active = saved.sequences
        here = [layer for layer in saved.layers if layer["kind"] in WITH_KEYS]
        for layer, described in zip(present, here, strict=True):
            layer.columns = saved.columns
            layer.first_held = max(int(described["first"]), saved.columns - layer.cache.max_positions, 0)
            real = file.tensors.get(_padding_name(layer.window))
            if real is not None:
                shared.padding.restore(layer.window, real.to(layer.device))
        for i, (layer, described) in enumerate(zip(cache.layers, saved.layers, strict=True)):
            if isinstance(layer, StateLayer):
                prefix = f"states.{i}."
                states = {name[len(prefix) :]: x for name, x in file.tensors.items() if name.startswith(prefix)}
                layer.load_states(described["states"], states, device_of_state[i])
            index = file.tensors.get(f"index.{i}")
            if isinstance(layer, IndexedLayer) and index is not None:
                layer.load_index(index, device_of_state[i])
        if "positions" in file.tensors:
            last = file.tensors["positions"]
            shared.positions.last[: len(last)].copy_(last)
        return cache
